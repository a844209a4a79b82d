"""Intervals against numpy's direct bootstrap, the normal approximation, and coverage of a known mean."""

import math
import time

import numpy as np
import pytest

from open_lm.eval import bootstrap
from open_lm.eval.bootstrap import draw_interval, expand_interval, interval


def losses(n: int, seed: int = 0) -> np.ndarray:
    """Skewed, as losses are: mean 3, standard deviation 3."""
    return np.random.default_rng(seed).exponential(3, n).astype(np.float32)


def choice_interval(losses_N, draws, iterations, seed=1):
    """The definition, one sample at a time."""
    random = np.random.default_rng(seed)
    means = [random.choice(losses_N, draws).mean(dtype=np.float64) for _ in range(iterations)]
    return np.percentile(means, 2.5), np.percentile(means, 97.5)


@pytest.mark.parametrize(("n", "limit"), [(20, None), (2000, None), (2000, 50), (50, 2000)])
def test_equals_the_direct_bootstrap(n, limit):
    losses_N = losses(n)
    draws = min(limit or n, n)
    ours = interval(losses_N, max_population=limit, iterations=10_000)
    # a quantile of 10,000 means scatters by 2.7 % of their standard deviation
    scatter = 0.027 * float(losses_N.std()) / math.sqrt(draws)
    assert ours == pytest.approx(choice_interval(losses_N, draws, 10_000), abs=4 * 2**0.5 * scatter)
    assert ours == interval(losses_N, max_population=limit, iterations=10_000)


def test_draws_do_not_depend_on_how_they_are_cut(monkeypatch):
    """One chunk, and one row at a time."""
    expected = draw_interval(losses(100), 100, 501)
    monkeypatch.setattr(bootstrap, "CHUNK_DRAWS", 2 * 100)
    assert draw_interval(losses(100), 100, 501) == expected


def test_what_is_computed_is_the_limit_of_what_is_drawn():
    losses_N = losses(400)
    lower, upper = draw_interval(losses_N, 400, 200_000)
    computed = expand_interval(losses_N, 400)
    sigma = float(losses_N.std()) / 20
    assert computed == pytest.approx((lower, upper), abs=4 * 0.006 * sigma)  # 2.7 % / sqrt(20)
    # the normal interval alone is off by (1.96² - 1) skewness / (6 * 20) = 0.047 standard deviations
    assert lower - (losses_N.mean() - 1.96 * sigma) > 0.03 * sigma
    assert upper - (losses_N.mean() + 1.96 * sigma) > 0.03 * sigma


def test_large_populations_are_quick_and_near_normal():
    losses_N = losses(3_000_000)
    start = time.perf_counter()
    lower, upper = interval(losses_N, max_population=None, iterations=10_000)
    assert time.perf_counter() - start < 2
    half = 1.95996 * losses_N.std(dtype=np.float64) / math.sqrt(len(losses_N))
    mean = losses_N.mean(dtype=np.float64)
    assert (lower, upper) == pytest.approx((mean - half, mean + half), abs=1e-3 * half)
    wide = interval(losses_N, max_population=300_000, iterations=10_000)
    assert wide[1] - wide[0] == pytest.approx(10**0.5 * (upper - lower), rel=1e-6)


@pytest.mark.parametrize("draws_at_most", [100_000, 0], ids=["drawn", "computed"])
def test_covers_the_true_mean(monkeypatch, draws_at_most):
    monkeypatch.setattr(bootstrap, "MAX_DRAWS", draws_at_most)
    hits = 0
    for seed in range(400):
        lower, upper = interval(losses(150, seed), max_population=None, iterations=400)
        hits += lower < 3 < upper
    # 95 % less what a percentile interval loses on 150 skewed losses; ± 3.3 % is three standard deviations
    assert 0.905 < hits / 400 < 0.975


def test_losses_of_no_spread_or_no_number(monkeypatch):
    for draws_at_most in (100_000, 0):
        monkeypatch.setattr(bootstrap, "MAX_DRAWS", draws_at_most)
        same = np.full(9, 2.5, np.float32)
        assert interval(same, max_population=None, iterations=100) == (2.5, 2.5)
        ends = interval(np.array([1.0, math.nan, 2.0]), max_population=None, iterations=100)
        assert all(math.isnan(end) for end in ends)
