"""Items read by a thread, so that a wait for a source that stalls can be left."""

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from enum import Enum
from typing import Final, Literal, TypeVar

T = TypeVar("T")

LOOK_SECONDS = 0.1  # between two looks at whether to leave


class Left(Enum):
    """The wait was left."""

    LEFT = 0


LEFT: Final = Left.LEFT
_END: Final = object()


def waiting(items: Iterable[T], leave: Callable[[], bool]) -> Iterator[T | Literal[Left.LEFT]]:
    """`items`, each read while the one before is worked with; LEFT in place of one that `leave` did not wait for.

    A thread iterates; errors come up in their place. It ends with this iterator, or with the process if the source
    never answers.
    """
    ready: queue.Queue = queue.Queue(1)
    closing = threading.Event()

    def put(entry: tuple[object, BaseException | None]) -> bool:
        while not closing.is_set():
            try:
                ready.put(entry, timeout=LOOK_SECONDS)
                return True
            except queue.Full:
                continue
        return False

    def read() -> None:
        source = iter(items)
        try:
            while not closing.is_set():
                try:
                    item = next(source)
                except StopIteration:
                    put((_END, None))
                    return
                if not put((item, None)):
                    return
        except BaseException as error:
            put((_END, error))
        finally:
            close = getattr(source, "close", None)
            if close is not None:
                close()

    thread = threading.Thread(target=read, name="batches", daemon=True)
    thread.start()
    try:
        while True:
            try:
                item, error = ready.get(timeout=LOOK_SECONDS)
            except queue.Empty:
                if leave():
                    yield LEFT
                continue
            if error is not None:
                raise error
            if item is _END:
                return
            yield item
    finally:
        closing.set()
        thread.join(LOOK_SECONDS * 5)
