"""The ranks' store with a limit on every call: torch's waits for ever where the process that holds it is frozen."""

import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist

ANSWER_SECONDS = 15.0  # more than the store's own limit, which is that of a key that nobody sets


class SilentStore(TimeoutError):
    """The store does not answer: the process that holds it is frozen, or its machine is."""


class BoundedStore:
    """Some of a store's methods. SilentStore after ANSWER_SECONDS without an answer, and from then on at once.

    A thread makes the calls, in their order; it ends with the process.
    """

    def __init__(self, store: dist.Store) -> None:
        self.store = store
        self.is_silent = False
        self._calls: queue.SimpleQueue[tuple[Callable[[], Any], queue.SimpleQueue]] = queue.SimpleQueue()
        self._lock = threading.Lock()  # the watch and the main thread may call at once
        threading.Thread(target=self._work, daemon=True, name="store").start()

    def check(self, keys: list[str]) -> bool:
        return self._call(lambda: self.store.check(keys))

    def get(self, key: str) -> bytes:
        return self._call(lambda: self.store.get(key))

    def set(self, key: str, value: str) -> None:
        self._call(lambda: self.store.set(key, value))

    def add(self, key: str, amount: int) -> int:
        return self._call(lambda: self.store.add(key, amount))

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        return self._call(lambda: self.store.compare_set(key, expected, desired))

    def _call(self, action: Callable[[], Any]) -> Any:
        with self._lock:
            if self.is_silent:
                raise SilentStore("the ranks' store does not answer")
            answer: queue.SimpleQueue[Sequence[Any]] = queue.SimpleQueue()
            self._calls.put((action, answer))
            try:
                value, error = answer.get(timeout=ANSWER_SECONDS)
            except queue.Empty:
                self.is_silent = True
                raise SilentStore(f"the ranks' store has not answered for {ANSWER_SECONDS:g} s") from None
        if error is not None:
            raise error
        return value

    def _work(self) -> None:
        while True:
            action, answer = self._calls.get()
            try:
                answer.put((action(), None))
            except Exception as error:
                answer.put((None, error))
