"""The order of one source: its k-th sequence, for any k.

A pass puts the shards in a new order, cuts their sequences into 64 lanes of equal length, and takes from the lanes
in turn; a shard's sequences are in a new order in every pass too. So every sequence comes once in a pass, and few
shards are open at a time.

When shards are appended in the middle of a pass, the rest of it consists of what was left of the old one, in its
order, and of the new sequences, in a random order of theirs: an exact rotation takes from both in proportion. So
every sequence, old or new, still comes once in that pass; the next one puts all shards in a new order.

Legend: N shards of a source, K positions asked for.
"""

from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from open_lm.data.randomness import draw, permute

LANES = 64
RESAMPLE_BLOCK = 128  # sequences that a lane draws from a shard it drew; 1 if all shards can be open at once


def place_in_lane(position_K: np.ndarray, total: int) -> np.ndarray:
    """Where in a pass of `total` sequences the position-th comes from: lanes are contiguous, taken in turn."""
    lane_K, turn_K = position_K % LANES, position_K // LANES
    return lane_K * (total // LANES) + np.minimum(lane_K, total % LANES) + turn_K


class Whole:
    """The sequences of the shards begin … end-1 in the order of a pass, each once."""

    def __init__(self, source: "SourceOrder", number: int, begin: int, end: int):
        self.source = source
        self.number = number
        self.shards = (begin, end)
        self.total = source.total_of(begin, end)

    def take(self, position_K: np.ndarray) -> list[tuple[int, int]]:
        """(shard, sequence in it) at these positions."""
        source, number = self.source, self.number
        shard_N, end_N = source.lay_out(number, *self.shards)
        place_K = place_in_lane(position_K, self.total)
        turn_K = np.searchsorted(end_N, place_K, side="right")
        shard_K = shard_N[turn_K]
        pairs = zip(
            shard_K.tolist(), (place_K - end_N[turn_K] + source.length_N[shard_K]).tolist(), strict=True
        )
        if not source.shuffle:
            return list(pairs)
        return [(shard, int(source.permute_shard(number, shard)[inside])) for shard, inside in pairs]


class Rest:
    """What is left of a pass after its first `used` sequences, and those of appended shards between."""

    def __init__(self, old: "Whole | Rest", used: int, new: Whole):
        self.old = old
        self.used = used
        self.new = new
        self.left = old.total - used
        self.total = self.left + new.total
        # of the first j sequences floor((j * left + shift) / total) are old ones
        self.shift = draw(self.total, *new.source.names, "appended", new.shards[0], new.number)

    def take(self, position_K: np.ndarray) -> list[tuple[int, int]]:
        """(shard, sequence in it) at these positions."""
        whole_K = position_K.astype(object)  # products may pass 2^63
        old_K = ((whole_K * self.left + self.shift) // self.total).astype(np.int64)
        after_K = (((whole_K + 1) * self.left + self.shift) // self.total).astype(np.int64)
        is_old_K = after_K > old_K
        old = iter(self.old.take(self.used + old_K[is_old_K]) if is_old_K.any() else [])
        new = iter(self.new.take((position_K - old_K)[~is_old_K]) if not is_old_K.all() else [])
        return [next(old) if is_old else next(new) for is_old in is_old_K.tolist()]


class Era(NamedTuple):
    """From the `first` sequence on: the rest of the pass that shards were appended to, then whole passes."""

    first: int
    rest: Rest | None
    next_pass: int
    shards: int

    @property
    def passes_from(self) -> int:
        return self.first + (self.rest.total if self.rest else 0)


class SourceOrder:
    """The order of one source: its k-th sequence, for any k.

    `lengths`: sequences of each shard. `history`: (sequences given, shards there were) at every change so far.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        *,
        seed: int,
        source: int,
        shuffle: bool,
        resampled: bool,
        history: Sequence[tuple[int, int]] = (),
    ):
        self.length_N = np.asarray(lengths, dtype=np.int64)
        self.end_N = np.cumsum(self.length_N)
        self.total = int(self.length_N.sum())
        self.names = (seed, source)
        self.shuffle = shuffle
        self.locate = self.draw if resampled else self.take
        # Caches, not state: a step needs few shards, and they stay for thousands of steps.
        self.lay_out = lru_cache(8)(self.lay_out)
        self.permute_shard = lru_cache(512)(self.permute_shard)
        self.draw_shard = lru_cache(512)(self.draw_shard)
        shards = [n for _, n in history] + [len(self.length_N)]
        self.eras = [Era(0, None, 0, shards[0])]
        for (count, before), after in zip(history, shards[1:], strict=True):
            if after != before:
                self.eras.append(self.append(count, after))

    def append(self, count: int, shards: int) -> Era:
        """The era that begins when, after `count` sequences, there are so many shards."""
        era = self.eras[-1]
        if count < era.passes_from:
            assert era.rest is not None
            old, used, next_pass = era.rest, count - era.first, era.next_pass
        else:
            total = self.total_of(0, era.shards)
            done, used = divmod(count - era.passes_from, total) if total else (0, 0)
            if not used:  # between two passes
                return Era(count, None, era.next_pass + done, shards)
            old = Whole(self, era.next_pass + done, 0, era.shards)
            next_pass = era.next_pass + done + 1
        new = Whole(self, next_pass - 1, era.shards, shards)
        return Era(count, Rest(old, used, new), next_pass, shards)

    def total_of(self, begin: int, end: int) -> int:
        """Sequences in the shards begin … end-1."""
        return int(self.end_N[end - 1] if end else 0) - int(self.end_N[begin - 1] if begin else 0)

    def era_of(self, k: int) -> int:
        """Number of the era that the k-th sequence is in."""
        return bisect_right(self.eras, k, key=lambda era: era.first) - 1

    def take(self, k_K: np.ndarray) -> list[tuple[int, int]]:
        """(shard, sequence in it) of the k-th sequences (ascending), each sequence once in a pass."""
        taken: list[tuple[int, int]] = []
        while len(k_K):  # mostly one turn: one pass
            first = int(k_K[0])
            number = self.era_of(first)
            era = self.eras[number]
            stretch, begin = era.rest, era.first
            if stretch is None or first >= era.passes_from:
                done = (first - era.passes_from) // self.total_of(0, era.shards)
                stretch = Whole(self, era.next_pass + done, 0, era.shards)
                begin = era.passes_from + done * stretch.total
            end = begin + stretch.total
            if number + 1 < len(self.eras):
                end = min(end, self.eras[number + 1].first)
            inside = int(np.searchsorted(k_K, end))
            taken += stretch.take(k_K[:inside] - begin)
            k_K = k_K[inside:]
        return taken

    def lay_out(self, number: int, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """The shards begin … end-1 in the order of a pass, and where each ends, in sequences."""
        purpose = ("shards", number) if begin == 0 else ("appended shards", begin, number)
        shard_N = begin + permute(end - begin, *self.names, *purpose)
        return shard_N, np.cumsum(self.length_N[shard_N])

    def permute_shard(self, number: int, shard: int) -> np.ndarray:
        """The order of a shard's sequences in a pass."""
        return permute(int(self.length_N[shard]), *self.names, "sequences", number, shard).astype(np.uint32)

    def draw(self, k_K: np.ndarray) -> list[tuple[int, int]]:
        """(shard, sequence in it) of the k-th draws with replacement, uniform over the source's sequences."""
        drawn = []
        for k in k_K.tolist():
            shards = self.eras[self.era_of(k)].shards
            block = 1 if shards <= LANES else RESAMPLE_BLOCK
            shard = self.draw_shard(k % LANES, k // LANES // block, shards)
            drawn.append((shard, draw(int(self.length_N[shard]), *self.names, "drawn sequence", k)))
        return drawn

    def draw_shard(self, lane: int, block: int, shards: int) -> int:
        """One of the first `shards` shards, in proportion to its length."""
        place = draw(int(self.end_N[shards - 1]), *self.names, "drawn shard", lane, block)
        return int(np.searchsorted(self.end_N, place, side="right"))
