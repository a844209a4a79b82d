"""Rows of a remote shard before the shard is in the cache: read by byte ranges, so that a run begins at once.

A batch's rows are scattered over many shards of which each is fetched whole, for later batches. Until a shard is
there, the rows that a batch needs are asked for one by one, all at the same time, if each carries a digest
(`digests`) that tells whether it is the right one. When the shard is there, what was given before is compared with
it.
"""

import functools
import logging
import os
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np

from open_lm.config.redact import redact
from open_lm.data.binary import (
    BLOCK_BYTES,
    BinarySequences,
    BinaryShard,
    Layout,
    parse_header,
    promised_layout,
)
from open_lm.data.cache import Cache, path_in
from open_lm.data.digests import find_fault, row_start
from open_lm.data.manifest import Shard
from open_lm.data.remote import (
    PIPE,
    REFETCHES,
    REMEDY,
    Found,
    WrongFile,
    find_remote,
    is_local,
    name_in_cache,
    read_part,
)
from open_lm.data.retry import Patience, retry

logger = logging.getLogger(__name__)

CONNECTIONS = 32  # requests at a time, of a process
MERGE_BYTES = 16 * 2**10  # two rows no farther from each other are one request
RANGE_BYTES = 4 * 2**20  # of a request at most, unless a row is longer
IDLE_SECONDS = 10


class Threads:
    """At most `limit` threads that run what is submitted, in its order; one that has nothing to do ends.

    Daemons: the end of a process does not wait for a server.
    """

    def __init__(self, limit: int, name: str):
        self.limit = limit
        self.name = name
        self.process = os.getpid()
        self.count = 0
        self.lock = threading.Lock()
        self.tasks: queue.SimpleQueue[tuple[Future, Callable[[], Any]]] = queue.SimpleQueue()

    def submit(self, task: Callable[[], Any]) -> Future:
        future: Future = Future()
        with self.lock:
            self.tasks.put((future, task))
            if self.count < self.limit:
                self.count += 1
                threading.Thread(target=self.run, daemon=True, name=self.name).start()
        return future

    def run(self) -> None:
        while True:
            try:
                future, task = self.tasks.get(timeout=IDLE_SECONDS)
            except queue.Empty:
                with self.lock:
                    if not self.tasks.empty():
                        continue
                    self.count -= 1
                    return
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(task())
            except BaseException as error:
                future.set_exception(error)
            del future, task  # what they hold is not kept while there is nothing to do


class RangedShard(BinarySequences):
    """A shard that is not in the cache: `read_into` gives rows that `keep` was given, or asks for them.

    `whole` is the fetch of the shard, once it was begun.
    """

    def __init__(self, shard: Shard, layout: Layout, found: Found, patience: Patience):
        super().__init__(shard.url, layout)
        self.shard = shard
        self.found = found
        self.patience = patience
        self.whole: Future | None = None
        self.kept: dict[int, memoryview] = {}  # sequence → its header and tokens, until it is read
        self.given: dict[int, int] = {}  # sequence → hash of them

    def close(self) -> None:
        """Gives up the fetch of the whole, unless it has begun."""
        if self.whole is not None:
            self.whole.cancel()

    def has_come(self) -> bool:
        """Whether the whole shard has been fetched, or could not be."""
        return self.whole is not None and self.whole.done()

    def span(self, sequence: int) -> tuple[int, int]:
        """Bytes of the tar that are the sequence and the header before it."""
        start = row_start(self.layout, sequence)
        return start, start + BLOCK_BYTES + self.layout.sequence_bytes

    def requests(self, sequences: Sequence[int]) -> list[list[int]]:
        """The sequences in their order, those that one request shall bring together."""
        groups: list[list[int]] = []
        for sequence in sorted(set(sequences)):
            start, end = self.span(sequence)
            if groups:
                first, last = self.span(groups[-1][0])[0], self.span(groups[-1][-1])[1]
                if start - last <= MERGE_BYTES and end - first <= RANGE_BYTES:
                    groups[-1].append(sequence)
                    continue
            groups.append([sequence])
        return groups

    def keep(self, sequences: Sequence[int]) -> None:
        """Asks for the bytes from the first to the last of these, and keeps them until they are read: again if any
        is not what its digests say, up to 1 + REFETCHES times.

        Errors as of `open_file`: OSError names the shard and the sample whose bytes were wrong each time.
        """
        assert self.shard.row_digests is not None
        begin, end = self.span(sequences[0])[0], self.span(sequences[-1])[1]
        action = f"reading bytes {begin:,} to {end:,} of {self.found.size:,}"
        fault = None
        for attempt in range(1, REFETCHES + 2):
            part = functools.partial(read_part, self.found, begin, end)
            data = memoryview(retry(self.url, action, part, self.patience))
            rows = {i: data[self.span(i)[0] - begin : self.span(i)[1] - begin] for i in sequences}
            faults = (find_fault(row, self.layout, i, self.shard.row_digests) for i, row in rows.items())
            fault = next(filter(None, faults), None)
            if fault is None:
                self.kept.update(rows)
                return
            logger.warning("%s: %s, fetch %d of %d", redact(self.url), fault, attempt, REFETCHES + 1)
        raise WrongFile(
            f"shard {redact(self.url)}: {fault}, after {REFETCHES + 1} fetches: the shard is damaged, or it was "
            f"replaced and the manifest was not{REMEDY}"
        )

    def read_into(self, tokens: np.ndarray, i: int, start: int = 0) -> None:
        """As BinaryShard's."""
        if i not in self.kept:
            self.keep([i])
        content = self.kept.pop(i)
        self.given[i] = hash(bytes(content))
        begin = BLOCK_BYTES + start * tokens.itemsize
        tokens.view(np.uint8)[:] = np.frombuffer(content[begin : begin + tokens.nbytes], np.uint8)

    def compare(self, whole: BinaryShard) -> None:
        """OSError if a row that was given is not what the shard holds."""
        for sequence, expected in self.given.items():
            start, end = self.span(sequence)
            if hash(os.pread(whole.fd, end - start, start)) != expected:
                raise OSError(
                    f"shard {redact(self.url)}: sample {whole.name(sequence)}, read by a range before the whole "
                    "shard had come, is not the one in it: the shard was replaced meanwhile, or bytes were damaged "
                    "on the way"
                )

    def name(self, i: int) -> str:
        """The sample's member name."""
        start = self.span(i)[0]
        try:
            part = functools.partial(read_part, self.found, start, start + BLOCK_BYTES)
            return parse_header(retry(self.url, "reading a header", part, self.patience))[0] or f"number {i}"
        except OSError:
            return f"number {i}"


def may_have_ranges(shard: Shard, cache: Cache) -> bool:
    """Whether rows may be read by ranges: the manifest says where they lie and that they carry digests, the file
    system has ranges for certain (a web server may send all of a file for each), and the shard will be kept once it
    is there."""
    if is_local(shard.url) or shard.url.startswith((PIPE, "http://", "https://")) or not cache.limit_bytes:
        return False
    return shard.row_digests is not None and promised_layout(shard) is not None


def find_ranged(shard: Shard, cache: Cache) -> RangedShard | None:
    """The shard, to be read by ranges; None if it is in the cache, or not what the manifest says: opening it tells
    what is wrong.

    FileNotFoundError, PermissionError and OSError name the URL.
    """
    layout = promised_layout(shard)
    assert layout is not None
    if shard.sha256 is not None and is_cached(shard, cache):
        return None
    found = find_remote(shard.url, cache.patience)
    size = found.size or 0
    if not found.has_parts or shard.bytes not in (None, size) or size < layout.end:
        return None
    return None if is_cached(shard, cache, found) else RangedShard(shard, layout, found, cache.patience)


def is_cached(shard: Shard, cache: Cache, found: Found | None = None) -> bool:
    return path_in(cache, name_in_cache(shard.url, cache, shard.sha256, found)).exists()
