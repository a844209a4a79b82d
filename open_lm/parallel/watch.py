"""A thread per rank beside the training loop: it hears signals, tells the other ranks, and notices hangs.

It works while the loop is in a collective, a compilation or a wait, where Python's signal handlers do not run: the
C-level handler writes each signal's number to a socket that the thread reads (`signal.set_wakeup_fd`). Ranks tell
each other through the store in which they met, with no collective; that all stop at the same step is agreed on by
the loop itself, in the sum over ranks that every step begins with.
"""

import faulthandler
import logging
import os
import select
import signal
import socket
import stat
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from open_lm.config.redact import redact
from open_lm.parallel.hang import State, report_hang
from open_lm.parallel.store import BoundedStore, SilentStore

logger = logging.getLogger("open_lm")

TICK_SECONDS = 0.5
RANKS_PER_TICK = (
    128  # so many more ranks, so many more ticks between two looks at the store, which one process serves
)
SAME_SIGNAL_SECONDS = 2.0  # torchrun passes on what a terminal or Slurm has sent to every process already
GRACE_SECONDS = 5.0  # for a rank to end by itself once another has failed
GENEROUS = {"starting": 6, "compiling": 6, "saving": 6}  # times --hang-timeout
UNSTOPPABLE_SECONDS = 60.0  # beyond a hang's limit: the thread itself cannot run


class StopAsked(Exception):
    """All ranks have agreed to end the run in good order."""


class Watch:
    """What this rank does and since when; whether any rank was asked to stop. Without `start` it is silent."""

    def __init__(self) -> None:
        self.rank, self.world_size = 0, 1
        self.state = State("starting", 0, time.monotonic())
        self.hang_seconds = 0.0
        self.folder: str | None = None
        """Where what explains a hang is written; the run's folder, once it is known."""
        self.reason = ""
        self.tell: Callable[[str], None] = lambda text: None
        """Keeps the reason for which the run ends by an error; the log's, once it is open."""
        self._store: BoundedStore | None = None
        self._silent = False
        """The store has stopped answering."""
        self._asked, self._closing, self._resting = threading.Event(), threading.Event(), threading.Lock()
        self._asked_at: float | None = None
        self._told = self._ending = False
        self._failed_at: float | None = None
        self._thread: threading.Thread | None = None
        self._previous: dict[int, Any] = {}
        self._signals: tuple[int, ...] = ()

    def start(
        self,
        rank: int,
        world_size: int,
        store: BoundedStore | None,
        signals: Sequence[str],
        hang_seconds: float,
    ) -> None:
        """From now on signals are heard (in the main thread alone can they be) and hangs noticed (0: never)."""
        self.rank, self.world_size, self._store, self.hang_seconds = rank, world_size, store, hang_seconds
        self.at("starting")
        self._main = threading.current_thread()
        self._here, there = socket.socketpair()
        self._there = there
        for end in (self._here, there):
            end.setblocking(False)
        if self._main is threading.main_thread():
            self._signals = tuple(getattr(signal, f"SIG{name}") for name in signals)
            self._previous = {n: signal.signal(n, _heard) for n in self._signals}
            self._previous_fd = signal.set_wakeup_fd(there.fileno(), warn_on_full_buffer=False)
            _in_children(self._signals)
        self._thread = threading.Thread(target=self._work, name="watch", daemon=True)
        self._thread.start()

    def leave_ranks(self) -> None:
        """No other rank is heard or told any more, as their store goes; signals still are."""
        self._store = None

    def close(self, ends: bool = False) -> None:
        """Ends the thread; signals do again what they did before, or, where the process `ends` now, nothing: what
        is done stays done, and its exit status is what it is."""
        if self._thread is None:
            return
        self._closing.set()
        self._poke()
        self._thread.join(GRACE_SECONDS)
        self._thread = None
        self.rest()
        if self._previous:
            for number, handler in self._previous.items():
                signal.signal(number, signal.SIG_IGN if ends else handler)
            signal.set_wakeup_fd(self._previous_fd)
            _in_children(())
            self._previous = {}
        self._here.close()
        self._there.close()

    def at(self, phase: str, step: int | None = None) -> None:
        """The rank has got on: it begins `phase`."""
        self.state = State(phase, self.state.step if step is None else step, time.monotonic())

    def rest(self) -> None:
        """From now on nothing is a hang: last copies and sinks have limits of their own."""
        with self._resting:
            if self.hang_seconds:
                self.hang_seconds = 0.0
                faulthandler.cancel_dump_traceback_later()

    def asked(self) -> bool:
        """Whether this rank knows that the run is to stop. Others may not know yet: agree before acting on it."""
        return self._asked.is_set()

    @property
    def stop(self) -> threading.Event:
        """Set when this rank knows that the run is to stop; for what is done before the ranks agree on it."""
        return self._asked

    def why(self) -> str:
        """The signal and the rank that it came to, once the ranks have agreed to stop."""
        if not self.reason and self._store is not None:
            with suppress(Exception):
                self.reason = self._store.get("stop").decode()
        return self.reason or "a signal"

    def fail(self, error: BaseException) -> None:
        """This rank ends by `error`: the others need not wait for it. Returns once they have ended, so that the
        first error is what is printed last; where another rank was first, says so and ends the process."""
        if self._store is None or self._thread is None:
            return
        self._ending = True
        with suppress(Exception):
            mine = f"{self.rank} {redact(f'{type(error).__name__}: {error}')}"
            first = self._store.compare_set("failed", "", mine).decode()
            self._store.set("event", "failed")
            if first.partition(" ")[2] == mine.partition(" ")[2] and first != mine:
                self._store.add("ended", 1)  # all have met the same error, by agreement: each shows it
                return
            if first != mine:
                self._follow(first)
            deadline = time.monotonic() + GRACE_SECONDS + 4 * TICK_SECONDS
            while time.monotonic() < deadline and self._store.add("ended", 0) < self.world_size - 1:
                time.sleep(0.05)
            self._store.set("done", "1")

    def _follow(self, first: str) -> None:
        """Ends the process, as another rank failed first; that one prints the traceback."""
        rank, _, message = first.partition(" ")
        reason = f"rank {rank} failed first: {message.splitlines()[0]}"
        say(f"[rank {self.rank}] ends, because {reason}")
        with suppress(Exception):
            self.tell(reason)
        assert self._store is not None
        with suppress(Exception):
            self._store.add("ended", 1)
            deadline = time.monotonic() + 2
            while self.rank == 0 and time.monotonic() < deadline and not self._store.check(["done"]):
                time.sleep(0.05)  # the store may be this rank's
        leave(1)

    def _poke(self) -> None:
        with suppress(OSError):
            self._there.send(b"\0")

    def _work(self) -> None:
        ticks, every = 0, 1 + self.world_size // RANKS_PER_TICK
        while not self._closing.is_set():
            select.select([self._here], [], [], TICK_SECONDS)
            with suppress(BlockingIOError):
                for number in self._here.recv(64):
                    if number in self._signals:
                        self._hear(number)
            ticks += 1
            if self._store is not None and (ticks % every == 0 or self._asked.is_set() != self._told):
                try:
                    self._exchange()
                except Exception as error:  # whoever holds the store is gone
                    logger.debug("the ranks' store does not answer: %s", error)
                    self._silent = isinstance(error, SilentStore)
                    self._store = None
            if not (self._closing.is_set() or self._ending) and self._hangs():
                self._end_hang()

    def _hear(self, number: int) -> None:
        now = time.monotonic()
        name = signal.Signals(number).name
        if self._asked_at is None:
            self._asked_at = now
            self.reason = f"{name} to rank {self.rank}"
            self._asked.set()
            say(f"[rank {self.rank}] {name}: the run saves and ends; once more ends this rank at once")
        elif now - self._asked_at > SAME_SIGNAL_SECONDS:
            say(f"[rank {self.rank}] {name} again: ends at once")
            leave(128 + number)

    def _exchange(self) -> None:
        store = self._store
        assert store is not None
        if self._asked.is_set() and not self._told:
            self._told = True
            if store.compare_set("stop", "", self.reason).decode() == self.reason:
                store.set("event", "stop")
        if not store.check(["event"]):
            return
        if not self._told and store.check(["stop"]):
            self._told = True
            self.reason = store.get("stop").decode()
            self._asked.set()
        if not self._ending and store.check(["failed"]):
            self._failed_at = self._failed_at or time.monotonic()
            if time.monotonic() > self._failed_at + GRACE_SECONDS - 2:
                self._follow(store.get("failed").decode())
        if store.check(["hang"]):
            self._end_hang()

    def _hangs(self) -> bool:
        """Whether this rank has made no progress for too long; the others are then told."""
        with self._resting:  # a time limit that is set after `rest` would end a healthy process
            if not self.hang_seconds:
                return False
            limit = self.hang_seconds * GENEROUS.get(self.state.phase, 1)
            # should nothing run but C code that holds Python's lock: the interpreter shows the stacks, and ends
            with suppress(OSError, ValueError, RuntimeError, AttributeError):
                faulthandler.dump_traceback_later(limit + UNSTOPPABLE_SECONDS, exit=True, file=stderr())
            if time.monotonic() - self.state.since <= limit:
                return False
        if self._store is not None:
            try:
                self._store.set("hang", str(self.rank))
                self._store.set("event", "hang")
            except Exception as error:
                self._silent, self._store = isinstance(error, SilentStore), None
        return True

    def _end_hang(self) -> None:
        holder = 0 if self._silent and not has_agent_store() else None
        report_hang(self.rank, self.world_size, self.state, self._main, self._store, self.folder, holder)
        leave(1)


def _heard(number: int, frame: object) -> None:
    """The thread has read the number already."""


_ignored_in_children: tuple[int, ...] = ()


def _in_children(signals: tuple[int, ...]) -> None:
    """Forked processes (data workers) leave stopping to the rank: they ignore what it hears."""
    global _ignored_in_children
    _ignored_in_children = signals


def _after_fork() -> None:
    if _ignored_in_children:
        signal.set_wakeup_fd(-1)
        for number in _ignored_in_children:
            # torch's own handler ends a worker by its rank's SIGTERM
            signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.SIG_IGN)
        _leave_connections()


def _leave_connections() -> None:
    """A rank's connections end with it, not with its data workers: others shall see at once that it is gone. Their
    numbers stay taken, as what holds one must not close another file."""
    with suppress(OSError):  # not Linux
        nothing = os.open(os.devnull, os.O_RDWR)
        for number in map(int, os.listdir("/proc/self/fd")):
            with suppress(OSError):
                if stat.S_ISSOCK(os.fstat(number).st_mode):
                    with socket.socket(fileno=os.dup(number)) as connection:
                        over_network = connection.family in (socket.AF_INET, socket.AF_INET6)
                    if over_network:
                        os.dup2(nothing, number)
        os.close(nothing)


os.register_at_fork(after_in_child=_after_fork)


def open_store(store: dist.Store | None) -> BoundedStore | None:
    """A connection of the thread's own, as torch's waits block the one they use."""
    if store is None:
        return None
    clone = getattr(store, "clone", None)
    with suppress(Exception):
        store = clone() if clone else store
    assert store is not None
    store.set_timeout(timedelta(seconds=10))
    return BoundedStore(dist.PrefixStore("open_lm/watch", store))


def has_agent_store() -> bool:
    """Whether the ranks' store is torchrun's; else rank 0 holds it."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def stderr() -> Any:
    """Where a person sees it, also when sys.stderr was replaced."""
    return sys.__stderr__ if sys.__stderr__ is not None else sys.stderr


def say(text: str) -> None:
    """A line to stderr that no other rank's cuts in two."""
    with suppress(OSError):
        os.write(2, (text.rstrip("\n") + "\n").encode())


def leave(status: int) -> None:
    """Ends the process now: the main thread is where nothing reaches it."""
    logging.shutdown()
    os._exit(status)
