"""The order of the data: pure functions of (seed, step), the same for any number of ranks and workers.

Mix. Put the sources' weights end to end on a line of length 1. Step t of B sequences takes the source at each
of the B points (u_t + i) / B, i < B (systematic sampling): a source of weight w has floor(wB) or ceil(wB) of
them. u_t = (a t + b mod m) / m is an exact integer rotation by nearly the golden ratio, so the number of
sequences that a source has given before step t is a sum of floors, known in O(log m) for any t.

Source. The k-th sequence of a source of n is number k mod n of pass k // n. A pass puts the shards in a new
order, cuts their sequences into 64 lanes of equal length, and takes from the lanes in turn; a shard's sequences
are in a new order in every pass too. So every sequence comes once in a pass, and few shards are open at a time.

Randomness. Philox4x64 (raw 64-bit words) keyed by BLAKE2b-128 of the text "seed/purpose/…"; a permutation is
the stable argsort of such words. All are fixed by their definitions, so an order outlives versions of numpy.

Legend: B sequences in a batch, N shards of a source, K positions asked for.
"""

import hashlib
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from itertools import pairwise

import numpy as np

LANES = 64
RESAMPLE_BLOCK = 128  # sequences that a lane draws from a shard it drew; 1 if all shards can be open at once
MODULUS = 2**32  # m
MULTIPLIER = 2654435769  # a: odd, so the period is m; a / m is nearly (sqrt(5) - 1) / 2


def philox(*names: int | str) -> np.random.Philox:
    """The bit generator of this purpose: a function of the names alone."""
    digest = hashlib.blake2b("/".join(map(str, names)).encode(), digest_size=16).digest()
    return np.random.Philox(key=int.from_bytes(digest, "little"))


def draw(n: int, *names: int | str) -> int:
    """A number in [0, n), uniform up to n / 2^64."""
    return int(philox(*names).random_raw()) % n


def permute(n: int, *names: int | str) -> np.ndarray:
    """A permutation of range(n): the stable argsort of n random words."""
    return argsort(philox(*names).random_raw(n))


def argsort(word_N: np.ndarray) -> np.ndarray:
    """np.argsort(word_N, kind="stable") of uint64 words, several times as fast (measured) where they are random."""
    # A word's high bits with its index below them sort in place; what is equal there is put right afterwards.
    bits = np.uint64(len(word_N).bit_length())
    mixed_N = word_N >> bits << bits
    mixed_N |= np.arange(len(word_N), dtype=np.uint64)
    mixed_N.sort()
    index_N = (mixed_N & ((np.uint64(1) << bits) - np.uint64(1))).astype(np.int64)
    mixed_N >>= bits
    equal = mixed_N[1:] == mixed_N[:-1]
    if equal.any():
        tied = np.flatnonzero(np.append(equal, False) | np.append(False, equal))
        tied_K = index_N[tied]
        index_N[tied] = tied_K[np.lexsort((tied_K, word_N[tied_K]))]
    return index_N


def normalize_weights(weights: Sequence[float] | None, sources: int) -> list[Fraction]:
    """Weights that sum to one, exactly, as written in decimal; None: all alike. ValueError if they cannot."""
    if weights is None:
        return [Fraction(1, sources)] * sources
    text = " ".join(map(str, weights))
    if len(weights) != sources:
        raise ValueError(f"--train-data-mix-weights {text}: {len(weights)} weights for {sources} sources")
    if not all(0 <= weight < float("inf") for weight in weights):
        raise ValueError(f"--train-data-mix-weights {text}: a weight must be a finite number, 0 or more")
    exact = [Fraction(str(weight)) for weight in weights]
    if sum(exact) == 0:
        raise ValueError(f"--train-data-mix-weights {text}: at least one weight must be more than 0")
    return [weight / sum(exact) for weight in exact]


def floor_sum(n: int, m: int, a: int, b: int) -> int:
    """sum of floor((a i + b) / m) over i < n, in O(log m), by exchanging the axes as Euclid's algorithm does.

    n, a, b >= 0, m > 0.
    """
    total = 0
    while True:
        total += a // m * (n * (n - 1) // 2) + b // m * n
        a, b = a % m, b % m
        top = a * n + b
        if top < m:
            return total
        n, b = divmod(top, m)
        m, a = a, m


class Mix:
    """How many sequences each source gives: `batch` a step, in the proportion of `weights`."""

    def __init__(self, weights: Sequence[Fraction], batch: int, seed: int):
        self.batch = batch
        self.shift = draw(MODULUS, seed, "mix")  # b
        cumulative = [sum(weights[:s], Fraction(0)) for s in range(len(weights) + 1)]
        # Slot i is at i * m + (a t + b mod m) on a line of B * m, on which source s ends here:
        self.ends = [divmod(round(c * batch * MODULUS), MODULUS) for c in cumulative]

    def sizes(self, step: int) -> list[int]:
        """Sequences of each source in the batch of this step."""
        rotation = (MULTIPLIER * step + self.shift) % MODULUS
        slots = [whole + (rotation < part) for whole, part in self.ends]
        return [after - before for before, after in pairwise(slots)]

    def counts(self, step: int) -> list[int]:
        """Sequences of each source in all batches before this step."""
        base = floor_sum(step, MODULUS, MULTIPLIER, self.shift)
        slots = []
        for whole, part in self.ends:
            # Steps whose rotation is below `part`: x mod m < f just if floor(x / m) > floor((x - f) / m).
            shifted = (
                floor_sum(step, MODULUS, MULTIPLIER, self.shift + MODULUS - part) if part else base + step
            )
            slots.append(whole * step + base + step - shifted)
        return [after - before for before, after in pairwise(slots)]


def place_in_lane(position_K: np.ndarray, total: int) -> np.ndarray:
    """Where in a pass of `total` sequences the position-th comes from: lanes are contiguous, taken in turn."""
    lane_K, turn_K = position_K % LANES, position_K // LANES
    return lane_K * (total // LANES) + np.minimum(lane_K, total % LANES) + turn_K


class SourceOrder:
    """The order of one source: its k-th sequence, for any k. `lengths`: sequences of each shard."""

    def __init__(self, lengths: Sequence[int], *, seed: int, source: int, shuffle: bool, resampled: bool):
        self.length_N = np.asarray(lengths, dtype=np.int64)
        self.end_N = np.cumsum(self.length_N)
        self.total = int(self.length_N.sum())
        self.names = (seed, source)
        self.shuffle = shuffle
        self.locate = self.draw if resampled else self.take
        self.block = 1 if len(self.length_N) <= LANES else RESAMPLE_BLOCK
        # Caches, not state: a step needs few shards, and they stay for thousands of steps.
        self.lay_out = lru_cache(4)(self.lay_out)
        self.permute_shard = lru_cache(512)(self.permute_shard)
        self.draw_shard = lru_cache(512)(self.draw_shard)

    def take(self, k_K: np.ndarray) -> list[tuple[int, int]]:
        """(shard, sequence in it) of the k-th sequences, each sequence once in a pass."""
        taken = []
        for number in np.unique(k_K // self.total):  # mostly one pass
            shard_N, end_N = self.lay_out(int(number))
            place_K = place_in_lane(k_K[k_K // self.total == number] % self.total, self.total)
            turn_K = np.searchsorted(end_N, place_K, side="right")
            shard_K = shard_N[turn_K]
            inside_K = place_K - end_N[turn_K] + self.length_N[shard_K]
            for shard, inside in zip(shard_K.tolist(), inside_K.tolist(), strict=True):
                taken.append(
                    (shard, int(self.permute_shard(int(number), shard)[inside]) if self.shuffle else inside)
                )
        return taken

    def lay_out(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """The shards in the order of a pass, and where each ends, in sequences."""
        shard_N = permute(len(self.length_N), *self.names, "shards", number)
        return shard_N, np.cumsum(self.length_N[shard_N])

    def permute_shard(self, number: int, shard: int) -> np.ndarray:
        """The order of a shard's sequences in a pass."""
        return permute(int(self.length_N[shard]), *self.names, "sequences", number, shard).astype(np.uint32)

    def draw(self, k_K: np.ndarray) -> list[tuple[int, int]]:
        """(shard, sequence in it) of the k-th draws with replacement, uniform over the source's sequences."""
        drawn = []
        for k in k_K.tolist():
            shard = self.draw_shard(k % LANES, k // LANES // self.block)
            drawn.append((shard, draw(int(self.length_N[shard]), *self.names, "drawn sequence", k)))
        return drawn

    def draw_shard(self, lane: int, block: int) -> int:
        """A shard, in proportion to its length."""
        place = draw(self.total, *self.names, "drawn shard", lane, block)
        return int(np.searchsorted(self.end_N, place, side="right"))


class Order:
    """Which sequences make the global batch of a step.

    `lengths`: for each source the number of sequences of each of its shards. `weights`: None, or one per
    source. `batch`: sequences. `shuffle`: also inside shards. `resampled`: with replacement.
    ValueError if the weights do not fit, or a source that has weight is empty.
    """

    def __init__(
        self,
        lengths: Sequence[Sequence[int]],
        weights: Sequence[float] | None,
        batch: int,
        seed: int,
        shuffle: bool = True,
        resampled: bool = False,
    ):
        self.weights = normalize_weights(weights, len(lengths))
        self.mix = Mix(self.weights, batch, seed)
        self.seed = seed
        self.sources = [
            SourceOrder(length_N, seed=seed, source=source, shuffle=shuffle, resampled=resampled)
            for source, length_N in enumerate(lengths)
        ]
        for source, weight in zip(self.sources, self.weights, strict=True):
            if weight and not source.total:
                raise ValueError(f"source {source.names[1]} has weight {float(weight):g} and no sequences")

    def counts(self, step: int) -> list[int]:
        """Sequences that each source gives before this step."""
        return self.mix.counts(step)

    def batch(self, step: int) -> list[tuple[int, int, int]]:
        """(source, shard, sequence) of every slot of the global batch."""
        return self.slots(step, 0, self.mix.batch)

    def slots(self, step: int, first: int, end: int) -> list[tuple[int, int, int]]:
        """(source, shard, sequence) of the slots first … end-1 of the global batch: a rank's share."""
        sorted_B = np.repeat(np.arange(len(self.sources)), self.mix.sizes(step))
        source_B = sorted_B[permute(self.mix.batch, self.seed, "slots", step)]
        chosen: list[tuple[int, int, int]] = [(0, 0, 0)] * (end - first)
        for source, before in enumerate(self.mix.counts(step)):
            slot_K = np.flatnonzero(source_B == source)
            k_K = before + np.arange(len(slot_K))
            mine_K = (slot_K >= first) & (slot_K < end)
            for slot, place in zip(
                slot_K[mine_K].tolist(), self.sources[source].locate(k_K[mine_K]), strict=True
            ):
                chosen[slot - first] = (source, *place)
        return chosen
