"""Sequences of the sources as rows of a batch: one length, checked against the vocabulary.

Rows are as narrow as the vocabulary allows, because they travel between processes; `make_batch` widens them.

Legend: B rows, L = sequence length + 1 tokens of a row.
"""

import functools
import logging
import os
import resource
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future
from typing import NamedTuple

import numpy as np

from open_lm.config.redact import redact
from open_lm.data.binary import BinarySequences, BinaryShard, UnreadableSample
from open_lm.data.manifest import Shard, Source
from open_lm.data.randomness import draw
from open_lm.data.ranges import (
    CONNECTIONS,
    RangedShard,
    Threads,
    find_ranged,
    may_have_ranges,
)
from open_lm.data.remote import Cache, WrongFile, is_local
from open_lm.data.shards import ShardReader, open_shard
from open_lm.data.source_order import LANES

logger = logging.getLogger(__name__)

# A manifest names the local shard, so it was there: network disks and shards in replacement lack it for a moment.
# An object store's 404 is final.
GONE_RETRIES = 2
# What a request costs, in bytes of a whole shard: 3 ms of CPU, 50 on the way, in which some MB come. When those of
# a shard's rows have cost as much as all of it, it is waited for.
REQUEST_BYTES = 4 * 2**20
FETCHES = 4  # whole shards at a time, beside those that are read ahead

Reader = ShardReader | BinarySequences


class Rows(NamedTuple):
    """What a worker sends: token ids (uint16 or uint32), and which rows are good (the others are zeros)."""

    tokens_BL: np.ndarray
    good_B: np.ndarray
    bad: tuple[str, ...] = ()
    """Of each row that is not good: shard, sample and what is wrong."""


class OpenShards:
    """Open readers of one process, the least recently used closed above `limit`."""

    def __init__(self, key: str, cache: Cache, limit: int = 512, cut_short: bool = False):
        self.key = key
        self.cache = cache
        self.limit = limit
        self.cut_short = cut_short
        """Whether the readable part of a tar that is cut short will do."""
        self.readers: OrderedDict[str, Reader] = OrderedDict()
        self.unproved: list[RangedShard] = []  # closed, and what they gave was not compared
        self.start()

    def start(self) -> None:
        """With threads of this process."""
        self.process = os.getpid()
        self.asking = Threads(CONNECTIONS, "ranges")
        self.fetching = Threads(FETCHES, "whole shards")

    def get(self, shard: Shard) -> Reader:
        """The shard's reader. ValueError if it does not hold what its manifest promises; FileNotFoundError if it
        is gone, a local one also after waiting for it; OSError if rows that ranges gave are not those it has."""
        reader = self.readers.get(shard.url)
        if isinstance(reader, RangedShard) and reader.has_come():
            reader = self.replace(reader)
        if reader is None:
            return self.put(self.open(shard))
        self.readers.move_to_end(shard.url)
        return reader

    def put(self, reader: Reader) -> Reader:
        self.readers[reader.url] = reader
        if len(self.readers) > self.limit:
            oldest = self.readers.popitem(last=False)[1]
            if isinstance(oldest, RangedShard) and oldest.given:
                self.unproved.append(oldest)
            else:
                oldest.close()
        return reader

    def prepare(self, wanted: Sequence[tuple[Shard, int]]) -> None:
        """Gets the bytes of those (shard, sequence) whose shards are remote and not in the cache yet, all at the
        same time, and then has the shards fetched. Errors as of `get`."""
        sequences: dict[Shard, list[int]] = {}
        for shard, sequence in wanted:
            if not is_local(shard.url):
                sequences.setdefault(shard, []).append(sequence)
        if not sequences:
            return
        if self.process != os.getpid():  # forked: the threads, and their connections, are the parent's
            self.start()
            for url in [url for url, reader in self.readers.items() if isinstance(reader, RangedShard)]:
                del self.readers[url]
            self.unproved.clear()
        for reader in [r for r in self.readers.values() if isinstance(r, RangedShard) and r.has_come()]:
            self.replace(reader)  # so that damage is noticed whether the shard is needed again or not
        new = [s for s in sequences if s.url not in self.readers and may_have_ranges(s, self.cache)]
        finding = [self.asking.submit(functools.partial(find_ranged, shard, self.cache)) for shard in new]
        for future in finding:
            if (ranged := future.result()) is not None:
                self.put(ranged)
        for shard in sequences:  # who is faster than the fetch waits: requests, and their bytes, stay few
            reader = self.readers.get(shard.url)
            if isinstance(reader, RangedShard) and len(reader.given) * REQUEST_BYTES > (
                reader.found.size or 0
            ):
                self.replace(reader)
        readers = [
            (reader, sequences[shard])
            for shard in sequences
            if isinstance(reader := self.readers.get(shard.url), RangedShard) and not reader.has_come()
        ]
        keeping = [
            (reader, self.asking.submit(functools.partial(reader.keep, together)))
            for reader, needed in readers
            for together in reader.requests(needed)
        ]
        wrong = []
        for reader, future in keeping:
            try:
                future.result()
            except WrongFile:  # damaged there: of the whole shard, rows go by the policy
                if not self.cut_short:
                    raise
                wrong.append(reader)
        for reader, _ in readers:
            self.fetch(reader)
        for reader in dict.fromkeys(wrong):
            self.replace(reader)

    def fetch(self, reader: RangedShard) -> "Future[Reader]":
        """Has the whole shard fetched, once."""
        if reader.whole is None:
            reader.whole = self.fetching.submit(functools.partial(self.open, reader.shard))
        return reader.whole

    def replace(self, reader: RangedShard) -> Reader:
        """Waits for the whole shard and takes it from now on."""
        del self.readers[reader.url]
        return self.put(self.prove(reader))

    def prove(self, reader: RangedShard) -> BinaryShard:
        """The whole shard, with which the rows that were read by ranges agree."""
        try:
            whole = self.fetch(reader).result()
        except (PermissionError, FileNotFoundError):
            raise
        except OSError as error:
            logger.warning("%s; fetched once more", error)  # that may be long ago
            whole = self.open(reader.shard)
        assert isinstance(whole, BinaryShard)  # its layout is promised
        reader.compare(whole)
        return whole

    def settle(self) -> None:
        """Compares all rows that were read by ranges with their shards, fetched for it. Errors as of `get`."""
        for reader in [reader for reader in self.readers.values() if isinstance(reader, RangedShard)]:
            if reader.given:
                self.replace(reader)
        while self.unproved:
            self.prove(self.unproved.pop()).close()

    def open(self, shard: Shard) -> ShardReader | BinaryShard:
        """The whole shard, fetched if it is remote."""
        patience = self.cache.patience
        looks = min(patience.retries, GONE_RETRIES) if is_local(shard.url) else 0
        for attempt in range(1, looks + 1):
            try:
                return open_shard(shard, self.key, self.cache, cut_short=self.cut_short)
            except FileNotFoundError as error:
                seconds = patience.wait_seconds(attempt)
                logger.warning(
                    "%s; it is looked for again in %.1f s", str(error).partition(": check")[0], seconds
                )
                (patience.stop or threading.Event()).wait(seconds)
        return open_shard(shard, self.key, self.cache, cut_short=self.cut_short)

    def close(self) -> None:
        """Closes all."""
        while self.readers:
            self.readers.popitem()[1].close()


class SequenceReader:
    """Reads sequences of the sources as rows of seq_len + 1 tokens. A process opens its own files.

    A negative id counts from the vocabulary's end, as in open_lm. ValueError names shard and sample: token ids
    outside the vocabulary always, unreadable samples unless they are to be ignored; at once, a shard whose
    manifest says that all its sequences are too short.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        key: str,
        cache: Cache,
        seq_len: int,
        vocab_size: int,
        ignore_parse_errors: bool,
    ):
        self.sources = sources
        self.open_shards = OpenShards(key, cache, cut_short=ignore_parse_errors)
        self.expect(len(sources))
        self.length = seq_len + 1
        self.vocab_size = vocab_size
        self.ignore_parse_errors = ignore_parse_errors
        self.dtype = np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)
        self.has_remote = not all(is_local(shard.url) for source in sources for shard in source.shards)
        for shard in (shard for source in sources for shard in source.shards):
            if shard.sequence_tokens is not None and shard.sequence_tokens < self.length:
                raise ValueError(
                    f"shard {redact(shard.url)}: its manifest says "
                    f"{shard.sequence_tokens} tokens a sequence, the model's "
                    f"seq_len {seq_len} needs {self.length}: tokenize for it, or take another --model"
                )

    def read(self, places: Sequence[tuple[int, int, int]], *crop_names: int | str, first: int = 0) -> Rows:
        """Rows of these (source, shard, sequence). A longer sequence gives one window, drawn by
        (*crop_names, slot) where slots count from `first`, or its beginning if there are no names."""
        tokens_BL = np.zeros((len(places), self.length), dtype=self.dtype)
        good_B = np.zeros(len(places), dtype=bool)
        bad = []
        if self.has_remote:
            self.open_shards.prepare([(self.sources[source].shards[shard], i) for source, shard, i in places])
        for row, (row_L, (source, shard, sequence)) in enumerate(zip(tokens_BL, places, strict=True)):
            reader = self.open_shards.get(self.sources[source].shards[shard])
            try:
                if isinstance(reader, BinarySequences) and reader.dtype == self.dtype:
                    spare = reader.sequence_tokens - self.length
                    start = self.crop(spare, crop_names, first + row) if spare else 0
                    if spare >= 0:
                        reader.read_into(row_L, sequence, start)
                else:
                    tokens = reader[sequence]
                    spare = len(tokens) - self.length
                    start = self.crop(spare, crop_names, first + row)
                    if spare >= 0:
                        row_L[:] = self.check(tokens[start : start + self.length], reader, sequence)
                good_B[row] = spare >= 0
                if spare < 0:
                    bad.append(
                        f"shard {redact(reader.url)}: sample {reader.name(sequence)} "
                        f"has {self.length + spare} tokens, "
                        f"{self.length} are needed"
                    )
            except UnreadableSample as error:
                if not self.ignore_parse_errors:
                    raise UnreadableSample(f"{error} (--ignore-parse-errors skips such samples)") from error
                row_L[:] = 0
                bad.append(str(error))
        if self.vocab_size <= np.iinfo(self.dtype).max and tokens_BL.max(initial=0) >= self.vocab_size:
            for row_L, (source, shard, sequence) in zip(tokens_BL, places, strict=True):
                self.check(row_L, self.open_shards.get(self.sources[source].shards[shard]), sequence)
        return Rows(tokens_BL, good_B, tuple(bad))

    def settle(self) -> None:
        """Makes sure of the rows that were read before their shards had come whole. Errors as of `read`."""
        self.open_shards.settle()

    def expect(self, streams: int) -> None:
        """Keeps so many times LANES shards open, if the process may open as many files."""
        files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self.open_shards.limit = max(16, min(LANES * streams + 16, files // 2))

    def crop(self, spare: int, names: Sequence[int | str], slot: int) -> int:
        """Where the window of a sequence begins that is `spare` tokens too long."""
        return draw(spare + 1, *names, slot) if spare > 0 and names else 0

    def check(self, tokens_L: np.ndarray, reader: Reader, sequence: int) -> np.ndarray:
        """The tokens with ids in the vocabulary. ValueError if there are others."""
        if tokens_L.dtype.kind == "i":  # -1 is the last id
            tokens_L = np.where(
                (tokens_L < 0) & (tokens_L >= -self.vocab_size), tokens_L + self.vocab_size, tokens_L
            )
        outside_L = (tokens_L < 0) | (tokens_L >= self.vocab_size)
        if outside_L.any():
            raise ValueError(
                f"shard {redact(reader.url)}: sample {reader.name(sequence)} has token "
                f"id {tokens_L[outside_L][0]}, "
                f"the model's vocabulary has {self.vocab_size}: another tokenizer's data, or the wrong --model"
            )
        return tokens_L
