"""Sequences of the sources as rows of a batch: one length, checked against the vocabulary.

Rows are as narrow as the vocabulary allows, because they travel between processes; `make_batch` widens them.

Legend: B rows, L = sequence length + 1 tokens of a row.
"""

import resource
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from open_lm.data.binary import BinaryShard, UnreadableSample
from open_lm.data.manifest import Shard, Source
from open_lm.data.order import draw
from open_lm.data.remote import Cache
from open_lm.data.shards import ShardReader, open_shard


class Rows(NamedTuple):
    """What a worker sends: token ids (uint16 or int32), and which rows are good (the others are zeros)."""

    tokens_BL: np.ndarray
    good_B: np.ndarray


class OpenShards:
    """Open readers of one process, the least recently used closed above `limit`."""

    def __init__(self, key: str, cache: Cache, limit: int = 512):
        self.key = key
        self.cache = cache
        self.limit = limit
        self.readers: OrderedDict[str, ShardReader | BinaryShard] = OrderedDict()

    def get(self, shard: Shard) -> ShardReader | BinaryShard:
        """The shard's reader. ValueError if it does not hold what its manifest promises."""
        if shard.url not in self.readers:
            self.readers[shard.url] = open_shard(shard, self.key, self.cache)
        self.readers.move_to_end(shard.url)
        if len(self.readers) > self.limit:
            self.readers.popitem(last=False)[1].close()
        return self.readers[shard.url]

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
        files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self.open_shards = OpenShards(key, cache, limit=max(16, min(1024, files // 2)))
        self.length = seq_len + 1
        self.vocab_size = vocab_size
        self.ignore_parse_errors = ignore_parse_errors
        self.dtype = np.dtype(np.uint16 if vocab_size <= 2**16 else np.int32)
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
        for row, (source, shard, sequence) in enumerate(places):
            reader = self.open_shards.get(self.sources[source].shards[shard])

            def start(tokens: int, row: int = row) -> int:
                spare = tokens - self.length
                return draw(spare + 1, *crop_names, first + row) if spare and crop_names else 0

            try:
                good_B[row] = self.read_row(tokens_BL[row], reader, sequence, start)
            except UnreadableSample:
                if not self.ignore_parse_errors:
                    raise
                tokens_BL[row] = 0
        if self.vocab_size <= np.iinfo(self.dtype).max and tokens_BL.max(initial=0) >= self.vocab_size:
            row, column = np.argwhere(tokens_BL >= self.vocab_size)[0].tolist()
            source, shard, sequence = places[row]
            reader = self.open_shards.get(self.sources[source].shards[shard])
            raise self.outside(reader, sequence, tokens_BL[row, column])
        return Rows(tokens_BL, good_B)

    def read_row(
        self, row_L: np.ndarray, reader: ShardReader | BinaryShard, sequence: int, start: Callable[[int], int]
    ) -> bool:
        """Fills a row from where `start(tokens)` says; False if the sequence is too short. Ids that fit the row's
        dtype may still be outside the vocabulary."""
        if isinstance(reader, BinaryShard):
            stored = reader.layout.sequence_tokens
            if stored < self.length:
                return False
            if reader.dtype == row_L.dtype:
                reader.read_into(row_L, sequence, start(stored))
                return True
            tokens_L = np.empty(self.length, dtype=reader.dtype)
            reader.read_into(tokens_L, sequence, start(stored))
        else:
            tokens = reader[sequence]
            if len(tokens) < self.length:
                return False
            first = start(len(tokens))
            tokens_L = tokens[first : first + self.length]
            # open_lm's data may count special tokens from the vocabulary's end: -1 is its last id
            tokens_L[(tokens_L < 0) & (tokens_L >= -self.vocab_size)] += self.vocab_size
        outside_L = (tokens_L < 0) | (tokens_L >= self.vocab_size)
        if outside_L.any():
            raise self.outside(reader, sequence, tokens_L[outside_L][0])
        row_L[:] = tokens_L
        return True

    def outside(self, reader: ShardReader | BinaryShard, sequence: int, token: int) -> ValueError:
        return ValueError(
            f"shard {reader.url}: sample {reader.name(sequence)} has token id {token}, "
            f"the model's vocabulary has {self.vocab_size}: another tokenizer's data, or the wrong --model"
        )
