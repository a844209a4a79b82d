"""The order of the items is known: what the next ones need is fetched while the present one is read."""

import logging
import os
import queue
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, Protocol

from torch.utils.data import Dataset, get_worker_info

from open_lm.data.cache import Cache
from open_lm.data.manifest import Shard
from open_lm.data.remote import is_local, open_file

logger = logging.getLogger(__name__)

THREADS = 4
AHEAD_SHARDS = 16  # fetched, or being fetched, and not needed yet
AHEAD_ITEMS = 256


class Items(Protocol):
    """A data set whose items are read from shards."""

    def __getitem__(self, number: int) -> Any: ...

    def shards(self, number: int) -> Sequence[Shard]:
        """What an item is read from."""
        ...

    def settle(self) -> None:
        """Makes sure of all items that were read. Raises what is wrong with them."""
        ...


class ReadAhead(Dataset):
    """The same items as `items`, asked for in the order of `numbers`.

    Threads of the process that reads them (with several workers each has its own) bring the shards of the next
    items into the cache: at most AHEAD_SHARDS of them and half the cache's bytes before they are needed, none
    that `numbers` do not need. What cannot be fetched is only logged: whoever reads the item meets the error. The
    last item of a process is given once all of its items are settled.
    """

    def __init__(self, items: Items, numbers: Sequence[int], cache: Cache):
        self.items = items
        self.numbers = numbers
        self.cache = cache
        self.fetcher: Fetcher | None = None  # of this process: threads do not live through a fork
        self.last: int | None = None  # of this process

    def __getitem__(self, number: int) -> Any:
        if self.fetcher is None:
            worker = get_worker_info()
            mine = self.numbers[self.numbers.index(number) :: worker.num_workers if worker else 1]
            self.last = mine[-1]
            self.fetcher = Fetcher(self.items.shards, mine, self.cache)
        self.fetcher.reach(number)
        item = self.items[number]
        if number == self.last and not isinstance(item, Exception):
            try:
                self.items.settle()
            except (ValueError, OSError, ImportError) as error:
                return error
        return item

    def close(self) -> None:
        """Ends the threads; what they are in the middle of is given up at the next part or attempt."""
        if self.fetcher is not None:
            self.fetcher.close()
            self.fetcher = None


class Fetcher:
    """The threads: one finds out what is needed next, the others fetch it."""

    def __init__(self, find_shards: Callable[[int], Sequence[Shard]], numbers: Sequence[int], cache: Cache):
        self.find_shards = find_shards
        self.numbers = numbers
        self.stop = threading.Event()
        self.cache = replace(cache, patience=replace(cache.patience, stop=self.stop))
        self.position = 0  # in `numbers`, of the item that is being read
        self.needed: dict[str, int] = {}  # shard → position of the first item after its fetch that needs it
        self.size: dict[str, int] = {}  # of shards in `needed`, in bytes
        self.planned: dict[str, int] = {}  # shard → position of the last planned item that needs it
        self.largest = 0
        self.changed = threading.Condition()
        self.waiting: queue.SimpleQueue[Shard | None] = queue.SimpleQueue()
        targets = [self.plan] + [self.fetch] * THREADS
        self.threads = [threading.Thread(target=target, daemon=True, name="read-ahead") for target in targets]
        for thread in self.threads:
            thread.start()

    def reach(self, number: int) -> None:
        """An item is about to be read."""
        with self.changed:
            self.position = self.numbers.index(number)
            for url in [url for url, position in self.needed.items() if position <= self.position]:
                del self.needed[url], self.size[url]
            self.changed.notify_all()

    def close(self) -> None:
        self.stop.set()
        with self.changed:
            self.changed.notify_all()
        for _ in range(THREADS):
            self.waiting.put(None)

    def plan(self) -> None:
        with suppress(Exception):  # reading the item gives it again
            for position, number in enumerate(self.numbers):
                with self.changed:
                    self.changed.wait_for(lambda: self.stop.is_set() or self.is_near(position))  # noqa: B023
                for shard in dict.fromkeys(self.find_shards(number)):
                    self.schedule(shard, position)
                if self.stop.is_set():
                    return

    def schedule(self, shard: Shard, position: int) -> None:
        """Has the shard fetched, once there is room, unless it was for a near item before."""
        last = self.planned.get(shard.url)
        self.planned[shard.url] = position
        if is_local(shard.url) or (last is not None and position - last <= AHEAD_ITEMS):
            return
        with self.changed:
            self.changed.wait_for(lambda: self.stop.is_set() or self.has_room(shard, position))
            if self.stop.is_set():
                return
            if position > self.position:
                self.needed[shard.url] = position
                self.size[shard.url] = shard.bytes or 0
        self.waiting.put(shard)

    def is_near(self, position: int) -> bool:
        return position <= self.position + AHEAD_ITEMS

    def has_room(self, shard: Shard, position: int) -> bool:
        """Whether the shard may be fetched for the item at `position`. Unknown sizes: as the largest met."""
        if position <= self.position:
            return True
        if len(self.needed) >= AHEAD_SHARDS:
            return False
        total = sum(size or self.largest for size in self.size.values()) + (shard.bytes or self.largest)
        return total <= self.cache.limit_bytes // 2

    def fetch(self) -> None:
        while not self.stop.is_set() and (shard := self.waiting.get()) is not None:
            try:
                fd = open_file(shard.url, self.cache, shard.bytes, shard.sha256)
            except Exception as error:
                logger.debug("read-ahead gave up: %s", error)
                continue
            size = os.fstat(fd).st_size
            os.close(fd)
            with self.changed:
                self.largest = max(self.largest, size)
                if shard.url in self.size:
                    self.size[shard.url] = size
                self.changed.notify_all()


def read_ahead(items: Any, numbers: Sequence[int]) -> Any:
    """`items`, wrapped in ReadAhead if any of their shards is remote and the cache keeps what is fetched."""
    reader = getattr(items, "reader", None)
    if reader is None or not reader.open_shards.cache.limit_bytes or not len(numbers):
        return items
    if all(is_local(shard.url) for source in reader.sources for shard in source.shards):
        return items
    return ReadAhead(items, numbers, reader.open_shards.cache)
