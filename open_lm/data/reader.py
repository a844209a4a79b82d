"""Sequences of the sources as rows of a batch: one length, checked against the vocabulary.

Rows are as narrow as the vocabulary allows, because they travel between processes; `make_batch` widens them.

Legend: B rows, L = sequence length + 1 tokens of a row.
"""

import logging
import resource
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from open_lm.data.binary import BinaryShard, UnreadableSample
from open_lm.data.manifest import Shard, Source
from open_lm.data.randomness import draw
from open_lm.data.remote import Cache
from open_lm.data.shards import ShardReader, open_shard
from open_lm.data.source_order import LANES

logger = logging.getLogger(__name__)

# A manifest names the shard, so it was there: network disks and shards in replacement lack it for a moment.
GONE_RETRIES = 2


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
        self.readers: OrderedDict[str, ShardReader | BinaryShard] = OrderedDict()

    def get(self, shard: Shard) -> ShardReader | BinaryShard:
        """The shard's reader. ValueError if it does not hold what its manifest promises; FileNotFoundError if it
        is gone, also after waiting for it."""
        reader = self.readers.get(shard.url)
        if reader is not None:
            self.readers.move_to_end(shard.url)
            return reader
        reader = self.readers[shard.url] = self.open(shard)
        if len(self.readers) > self.limit:
            self.readers.popitem(last=False)[1].close()
        return reader

    def open(self, shard: Shard) -> ShardReader | BinaryShard:
        patience = self.cache.patience
        for attempt in range(1, min(patience.retries, GONE_RETRIES) + 1):
            try:
                return open_shard(shard, self.key, self.cache, cut_short=self.cut_short)
            except FileNotFoundError as error:
                seconds = patience.wait_seconds(attempt)
                logger.warning("%s; it is looked for again in %.1f s", error, seconds)
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
        for shard in (shard for source in sources for shard in source.shards):
            if shard.sequence_tokens is not None and shard.sequence_tokens < self.length:
                raise ValueError(
                    f"shard {shard.url}: its manifest says {shard.sequence_tokens} tokens a sequence, the model's "
                    f"seq_len {seq_len} needs {self.length}: tokenize for it, or take another --model"
                )

    def read(self, places: Sequence[tuple[int, int, int]], *crop_names: int | str, first: int = 0) -> Rows:
        """Rows of these (source, shard, sequence). A longer sequence gives one window, drawn by
        (*crop_names, slot) where slots count from `first`, or its beginning if there are no names."""
        tokens_BL = np.zeros((len(places), self.length), dtype=self.dtype)
        good_B = np.zeros(len(places), dtype=bool)
        bad = []
        for row, (row_L, (source, shard, sequence)) in enumerate(zip(tokens_BL, places, strict=True)):
            reader = self.open_shards.get(self.sources[source].shards[shard])
            try:
                if isinstance(reader, BinaryShard) and reader.dtype == self.dtype:
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
                        f"shard {reader.url}: sample {reader.name(sequence)} has {self.length + spare} tokens, "
                        f"{self.length} are needed"
                    )
            except UnreadableSample as error:
                if not self.ignore_parse_errors:
                    raise
                row_L[:] = 0
                bad.append(str(error))
        if self.vocab_size <= np.iinfo(self.dtype).max and tokens_BL.max(initial=0) >= self.vocab_size:
            for row_L, (source, shard, sequence) in zip(tokens_BL, places, strict=True):
                self.check(row_L, self.open_shards.get(self.sources[source].shards[shard]), sequence)
        return Rows(tokens_BL, good_B, tuple(bad))

    def expect(self, streams: int) -> None:
        """Keeps so many times LANES shards open, if the process may open as many files."""
        files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self.open_shards.limit = max(16, min(LANES * streams + 16, files // 2))

    def crop(self, spare: int, names: Sequence[int | str], slot: int) -> int:
        """Where the window of a sequence begins that is `spare` tokens too long."""
        return draw(spare + 1, *names, slot) if spare > 0 and names else 0

    def check(self, tokens_L: np.ndarray, reader: ShardReader | BinaryShard, sequence: int) -> np.ndarray:
        """The tokens with ids in the vocabulary. ValueError if there are others."""
        if tokens_L.dtype.kind == "i":  # -1 is the last id
            tokens_L = np.where(
                (tokens_L < 0) & (tokens_L >= -self.vocab_size), tokens_L + self.vocab_size, tokens_L
            )
        outside_L = (tokens_L < 0) | (tokens_L >= self.vocab_size)
        if outside_L.any():
            raise ValueError(
                f"shard {reader.url}: sample {reader.name(sequence)} has token id {tokens_L[outside_L][0]}, "
                f"the model's vocabulary has {self.vocab_size}: another tokenizer's data, or the wrong --model"
            )
        return tokens_L
