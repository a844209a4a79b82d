"""Bootstrap intervals of a mean loss (open_lm's --val-seq-ci and --val-tok-ci).

A bootstrap sample is P of the N losses, drawn with replacement; the interval holds the middle 95 % of many such
samples' means. Up to MAX_DRAWS a sample they are drawn. Above, the quantiles that infinitely many samples tend
to are computed, by the Cornish-Fisher expansion (mean, variance and skewness of the N losses): its error, of
order 1 / P of the interval's width, is far below that of 10,000 samples, whose quantiles scatter by about 3 %
of a standard deviation.

Legend: N losses, P draws of a sample, I samples.
"""

import math
from statistics import NormalDist

import numpy as np

COVERAGE = 0.95
MAX_DRAWS = 100_000  # a sample; 10,000 of them are drawn in 5 to 9 s on one core
CHUNK_DRAWS = 2**20  # at a time: 12 MiB


def interval(losses_N: np.ndarray, *, max_population: int | None, iterations: int) -> tuple[float, float]:
    """Lower and upper end of the bootstrap interval of the mean of at least one loss.

    P is N, or `max_population` where that is less: as if only so many had been evaluated, so the interval grows.
    The same losses in the same order give the same numbers. (nan, nan) if any loss is not finite.
    """
    draws = len(losses_N) if max_population is None else min(max_population, len(losses_N))
    if not np.isfinite(losses_N).all():
        return math.nan, math.nan
    if draws > MAX_DRAWS:
        return expand_interval(losses_N, draws)
    return draw_interval(losses_N, draws, iterations)


def draw_interval(losses_N: np.ndarray, draws: int, iterations: int) -> tuple[float, float]:
    """By `iterations` samples, whose means' quantiles are interpolated linearly."""
    random = np.random.Generator(np.random.SFC64(0))
    rows = max(1, CHUNK_DRAWS // draws)
    means_I = np.empty(iterations)
    for first in range(0, iterations, rows):
        part_I = means_I[first : first + rows]
        chosen_IP = random.integers(len(losses_N), size=(len(part_I), draws), dtype=np.uint32)
        part_I[:] = losses_N[chosen_IP].mean(axis=1, dtype=np.float64)
    lower, upper = np.quantile(means_I, [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2])
    return float(lower), float(upper)


def expand_interval(losses_N: np.ndarray, draws: int) -> tuple[float, float]:
    """By the Cornish-Fisher expansion to second order (Hall, The Bootstrap and Edgeworth Expansion, 2.5)."""
    mean = float(losses_N.mean(dtype=np.float64))
    variance = cubes = 0.0
    for first in range(0, len(losses_N), CHUNK_DRAWS):
        deviation = losses_N[first : first + CHUNK_DRAWS].astype(np.float64) - mean
        squares = deviation * deviation
        variance += float(squares.sum()) / len(losses_N)
        cubes += float(squares @ deviation) / len(losses_N)
    if variance == 0:
        return mean, mean
    z = NormalDist().inv_cdf((1 + COVERAGE) / 2)
    shift = (z * z - 1) * cubes / (6 * variance * draws)  # (z² - 1) skewness σ / 6P: both ends move alike
    half = z * math.sqrt(variance / draws)
    return mean + shift - half, mean + shift + half
