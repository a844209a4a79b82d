"""Sequences of the sources as rows of a batch: one length, checked against the vocabulary.

Legend: B rows, L = sequence length + 1 tokens of a row.
"""

import resource
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from open_lm.data.manifest import Shard, Source
from open_lm.data.order import draw
from open_lm.data.remote import Cache
from open_lm.data.shards import ShardReader, UnreadableSample, open_shard


class Rows(NamedTuple):
    """What a worker sends: int32 token ids, and which rows are good (the others are zeros)."""

    tokens_BL: np.ndarray
    good_B: np.ndarray


class OpenShards:
    """Open readers of one process, the least recently used closed above `limit`."""

    def __init__(self, key: str, cache: Cache, limit: int = 512):
        self.key = key
        self.cache = cache
        self.limit = limit
        self.readers: OrderedDict[str, ShardReader] = OrderedDict()

    def get(self, shard: Shard) -> ShardReader:
        """The shard's reader. ValueError if it does not hold the promised number of sequences."""
        if shard.url not in self.readers:
            self.readers[shard.url] = open_shard(shard.url, self.key, self.cache, shard.num_sequences)
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
    outside the vocabulary always, unreadable samples unless they are to be ignored.
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

    def read(self, places: Sequence[tuple[int, int, int]], *crop_names: int | str, first: int = 0) -> Rows:
        """Rows of these (source, shard, sequence). A longer sequence gives one window, drawn by
        (*crop_names, slot) where slots count from `first`, or its beginning if there are no names."""
        tokens_BL = np.zeros((len(places), self.length), dtype=np.int64)
        good_B = np.zeros(len(places), dtype=bool)
        for row, (source, shard, sequence) in enumerate(places):
            reader = self.open_shards.get(self.sources[source].shards[shard])
            try:
                tokens = reader[sequence]
            except UnreadableSample:
                if self.ignore_parse_errors:
                    continue
                raise
            spare = len(tokens) - self.length
            if spare < 0:
                continue
            start = draw(spare + 1, *crop_names, first + row) if spare and crop_names else 0
            tokens_BL[row] = tokens[start : start + self.length]
            good_B[row] = True
        # open_lm's data may count special tokens from the vocabulary's end: -1 is its last id
        tokens_BL[(tokens_BL < 0) & (tokens_BL >= -self.vocab_size)] += self.vocab_size
        outside_BL = (tokens_BL < 0) | (tokens_BL >= self.vocab_size)
        if outside_BL.any():
            row, column = np.argwhere(outside_BL)[0]
            source, shard, sequence = places[row]
            reader = self.open_shards.get(self.sources[source].shards[shard])
            raise ValueError(
                f"shard {reader.url}: sample {reader.name(sequence)} has token id {tokens_BL[row, column]}, "
                f"the model's vocabulary has {self.vocab_size}: another tokenizer's data, or the wrong --model"
            )
        return Rows(tokens_BL.astype(np.int32), good_B)
