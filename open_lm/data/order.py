"""The order of the data: pure functions of (seed, step), the same for any number of ranks and workers.

Mix. Put the sources' weights end to end on a line of length 1. Step t of B sequences takes the source at each
of the B points (u_t + i) / B, i < B (systematic sampling): a source of weight w has floor(wB) or ceil(wB) of
them. u_t = (a t + b mod m) / m is an exact integer rotation by nearly the golden ratio, so the number of
sequences that a source has given before step t is a sum of floors, known in O(log m) for any t.

Source (`source_order.py`). The k-th sequence of a source of n is number k mod n of pass k // n.

History. At a step of a run the data may have grown (--append-data), or the batch or the weights have changed: from
there on every source goes on where it was. The order is a pure function of (seed, history, step).

Legend: B sequences in a batch, K positions asked for.
"""

from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from open_lm.data.randomness import draw, permute
from open_lm.data.source_order import SourceOrder

MODULUS = 2**32  # m
MULTIPLIER = 2654435769  # a: odd, so the period is m; a / m is nearly (sqrt(5) - 1) / 2


def normalize_weights(weights: Sequence[float | Fraction] | None, sources: int) -> list[Fraction]:
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


def upsample_weights(factors: Sequence[str], sequences: Sequence[int]) -> list[Fraction]:
    """Weights in proportion to sequences times factor (one per source, decimal). ValueError if they cannot be."""
    flag = f"--train-data-upsampling-factors {'::'.join(factors)}"
    if len(factors) != len(sequences):
        raise ValueError(f"{flag}: {len(factors)} factors for {len(sequences)} sources")
    try:
        exact = [Fraction(factor) for factor in factors]
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"{flag}: a factor must be a number, 0 or more") from None
    if min(exact) < 0 or not any(factor * n for factor, n in zip(exact, sequences, strict=True)):
        raise ValueError(f"{flag}: factors must be 0 or more, and not 0 for every source")
    weights = [factor * n for factor, n in zip(exact, sequences, strict=True)]
    return [weight / sum(weights) for weight in weights]


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


class Change(NamedTuple):
    """A step from which on the data, the batch or the weights are others: what there was before it."""

    step: int
    counts: tuple[int, ...]
    """Sequences that each source had given."""
    shards: tuple[int, ...]
    """Shards that each source had."""


class Order:
    """Which sequences make the global batch of a step, from that of the last change on.

    `lengths`: for each source the number of sequences of each of its shards. `weights`: None, or one per
    source. `batch`: sequences. `shuffle`: also inside shards. `resampled`: with replacement. `history`: the
    changes so far, in their order. ValueError if the weights do not fit, or a source that has weight is empty.
    """

    def __init__(
        self,
        lengths: Sequence[Sequence[int]],
        weights: Sequence[float | Fraction] | None,
        batch: int,
        seed: int,
        shuffle: bool = True,
        resampled: bool = False,
        history: Sequence[Change] = (),
    ):
        self.weights = normalize_weights(weights, len(lengths))
        self.mix = Mix(self.weights, batch, seed)
        self.seed = seed
        self.sources = [
            SourceOrder(
                length_N,
                seed=seed,
                source=source,
                shuffle=shuffle,
                resampled=resampled,
                history=[(change.counts[source], change.shards[source]) for change in history],
            )
            for source, length_N in enumerate(lengths)
        ]
        self.first_step = history[-1].step if history else 0
        given = history[-1].counts if history else [0] * len(lengths)
        # what the sources had given, less what this mix would have taken by then
        self.ahead = [n - m for n, m in zip(given, self.mix.counts(self.first_step), strict=True)]
        for source, weight in zip(self.sources, self.weights, strict=True):
            if weight and not source.total:
                raise ValueError(f"source {source.names[1]} has weight {float(weight):g} and no sequences")

    def counts(self, step: int) -> list[int]:
        """Sequences that each source gives before this step. ValueError if it is before the last change."""
        if step < self.first_step:
            raise ValueError(f"step {step}: this order begins at the last change, step {self.first_step}")
        return [n + ahead for n, ahead in zip(self.mix.counts(step), self.ahead, strict=True)]

    def batch(self, step: int) -> list[tuple[int, int, int]]:
        """(source, shard, sequence) of every slot of the global batch."""
        return self.slots(step, 0, self.mix.batch)

    def slots(self, step: int, first: int, end: int) -> list[tuple[int, int, int]]:
        """(source, shard, sequence) of the slots first … end-1 of the global batch: a rank's share."""
        sorted_B = np.repeat(np.arange(len(self.sources)), self.mix.sizes(step))
        source_B = sorted_B[permute(self.mix.batch, self.seed, "slots", step)]
        chosen: list[tuple[int, int, int]] = [(0, 0, 0)] * (end - first)
        for source, before in enumerate(self.counts(step)):
            slot_K = np.flatnonzero(source_B == source)
            k_K = before + np.arange(len(slot_K))
            mine_K = (slot_K >= first) & (slot_K < end)
            for slot, place in zip(
                slot_K[mine_K].tolist(), self.sources[source].locate(k_K[mine_K]), strict=True
            ):
                chosen[slot - first] = (source, *place)
        return chosen
