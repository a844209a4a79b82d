import hashlib
import json
import math
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from open_lm.data.order import Mix, Order, floor_sum, normalize_weights
from open_lm.data.randomness import argsort
from open_lm.data.source_order import LANES

sizes = st.integers(0, 10**4)
weight_lists = st.lists(
    st.sampled_from([0, 0.1, 0.275, 0.725, 1, 3, 1e-4]) | st.floats(0, 10), min_size=1, max_size=5
).filter(any)


@settings(deadline=None)
@given(n=st.integers(0, 60), m=st.integers(1, 50), a=sizes, b=sizes)
def test_floor_sum_is_the_sum_of_floors(n, m, a, b):
    assert floor_sum(n, m, a, b) == sum((a * i + b) // m for i in range(n))


@settings(deadline=None, max_examples=60)
@given(
    weights=weight_lists, batch=st.integers(1, 100), seed=st.integers(0, 2**63), start=st.integers(0, 10**12)
)
def test_every_batch_holds_the_mix_and_counts_are_its_sums(weights, batch, seed, start):
    exact = normalize_weights(weights, len(weights))
    mix = Mix(exact, batch, seed)
    before = mix.counts(start)
    for step in range(start, start + 100):
        in_batch = mix.sizes(step)
        assert sum(in_batch) == batch
        for weight, size in zip(exact, in_batch, strict=True):
            assert math.floor(weight * batch - Fraction(1, 2**31)) <= size
            assert size <= math.ceil(weight * batch + Fraction(1, 2**31))
            assert weight or size == 0
        assert mix.counts(step) == before
        before = [x + y for x, y in zip(before, in_batch, strict=True)]
    assert mix.counts(0) == [0] * len(weights)


@settings(deadline=None)
@given(weights=weight_lists, batch=st.integers(1, 100), steps=st.integers(1, 10**6))
def test_long_run_shares_are_the_weights(weights, batch, steps):
    exact = normalize_weights(weights, len(weights))
    for weight, count in zip(exact, Mix(exact, batch, 0).counts(steps), strict=True):
        assert (
            abs(count - weight * batch * steps) < 12
        )  # a golden rotation's discrepancy grows with the logarithm


def test_two_sources_hold_725_to_275_in_every_batch_wherever_one_looks():
    order = Order([[1000] * 30, [700] * 5], (0.725, 0.275), 64, seed=124)
    halves = []
    for step in [*range(100), 10**9, 10**15]:
        sources = [source for source, _, _ in order.batch(step)]
        assert sources.count(0) in (46, 47)
        assert len(sources) == 64
        halves.append(sources[:32].count(0))
    assert abs(np.mean(halves) / 32 - 0.725) < 0.02  # ranks and micro-batches see the mix, too
    assert len(set(halves)) > 3


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(0, 90), min_size=1, max_size=8).filter(any),
    batch=st.integers(1, 130),
    shuffle=st.booleans(),
)
def test_every_sequence_comes_once_in_every_pass(lengths, batch, shuffle):
    order = Order([lengths], None, batch, seed=5, shuffle=shuffle)
    total = sum(lengths)
    everything = sorted((shard, i) for shard, n in enumerate(lengths) for i in range(n))
    k_K = np.arange(3 * total)
    passes = order.sources[0].locate(k_K)
    assert order.sources[0].locate(k_K[total // 2 :]) == passes[total // 2 :]  # from anywhere
    for number in range(3):
        assert sorted(passes[number * total : (number + 1) * total]) == everything
    steps = -(-total // batch)
    seen = [place[1:] for step in range(steps) for place in order.batch(step)]
    assert Counter(seen[:total]) <= Counter(passes[: steps * batch])
    assert Counter(seen) == Counter(order.sources[0].locate(np.arange(steps * batch)))


def test_passes_and_seeds_have_different_orders():
    first, second = (
        Order([[50] * 8], None, 40, seed=seed).sources[0].locate(np.arange(800)) for seed in (0, 1)
    )
    assert first[:400] != first[400:]
    assert first != second
    by_shard = [[place[1] for place in first if place[0] == shard] for shard in (0, 1)]
    assert by_shard[0] != by_shard[1]
    assert by_shard[0][:50] != by_shard[0][50:]
    shards = [shard for shard, _ in first[:LANES]]
    assert shards != sorted(shards)
    assert shards != [shard for shard, _ in first[400 : 400 + LANES]]


def test_few_shards_are_open_at_a_time_and_lanes_keep_the_stored_order_without_shuffling():
    source = Order([[100] * 640], None, 64, seed=0, shuffle=False).sources[0]
    window = source.locate(np.arange(LANES * 50))
    assert len({shard for shard, _ in window}) <= LANES
    for lane in range(LANES):
        assert window[lane::LANES] == [(window[lane][0], i) for i in range(50)]


def test_uneven_sources_wrap_by_themselves():
    order = Order([[3], [1000], [1]], (1, 1, 0), 10, seed=0)
    seen = [place for step in range(30) for place in order.batch(step)]
    counts = Counter(source for source, _, _ in seen)
    assert (counts[0], counts[1], counts[2]) == tuple(order.counts(30))
    assert counts[2] == 0
    small = Counter(place for place in seen if place[0] == 0)
    assert max(small.values()) - min(small.values()) <= 1
    assert max(Counter(place for place in seen if place[0] == 1).values()) == 1


def test_ranks_slice_the_batch():
    order = Order([[20] * 3, [9]], (2, 1), 24, seed=3)
    for step in (0, 1, 77):
        for ranks in (1, 2, 4, 24):
            share = 24 // ranks
            slices = [order.slots(step, r * share, (r + 1) * share) for r in range(ranks)]
            assert [place for slots in slices for place in slots] == order.batch(step)


@pytest.mark.parametrize("shards", [1, 10])
def test_resampling_is_uniform_and_a_function_of_the_draw(shards):
    lengths = [1 + number % 3 for number in range(shards)]
    source = Order([lengths], None, 64, seed=0, resampled=True).sources[0]
    drawn = source.locate(np.arange(20_000))
    assert source.locate(np.array([19_999, 5])) == [drawn[-1], drawn[5]]
    counts = np.array(list(Counter(drawn).values()))
    expected = len(drawn) / sum(lengths)
    assert len(counts) == sum(lengths)
    assert ((counts - expected) ** 2 / expected).sum() < 45  # chi², 18 degrees of freedom: p < 0.001


def test_resampling_many_shards_draws_them_by_length_and_opens_few_at_a_time():
    lengths = [1 + number % 3 for number in range(1000)]
    shares = []
    for seed in range(40):
        source = Order([lengths], None, 64, seed=seed, resampled=True).sources[0]
        shares.append(
            np.mean([lengths[source.draw_shard(lane, 0, len(lengths))] == 3 for lane in range(LANES)])
        )
    assert abs(np.mean(shares) - 0.5) < 3.5 * 0.5 / np.sqrt(40 * LANES)
    drawn = source.locate(np.arange(LANES * 129))
    assert len({shard for shard, _ in drawn[: LANES * 128]}) <= LANES
    assert {shard for shard, _ in drawn[LANES * 128 :]} != {shard for shard, _ in drawn[:LANES]}
    assert all(sequence < lengths[shard] for shard, sequence in drawn)


@settings(deadline=None)
@given(n=st.integers(0, 3000), distinct=st.sampled_from([1, 2, 50, 2**40, 2**64]), seed=st.integers(0, 9))
def test_the_fast_sort_is_the_stable_one(n, distinct, seed):
    rng = np.random.default_rng(seed)
    spread_N = rng.integers(0, distinct, n, dtype=np.uint64)
    for word_N in (spread_N, spread_N ^ rng.integers(0, 9, n, dtype=np.uint64)):  # equal, and nearly
        assert (argsort(word_N) == np.argsort(word_N, kind="stable")).all()


GOLDEN = {
    (True, False): "be536e27ab05610533a9af98c37af2b3",
    (False, False): "b878ebfb327865081866cd38f4281187",
    (True, True): "82b2e9a30d02c9695f89611cd1320876",
    (False, True): "82b2e9a30d02c9695f89611cd1320876",
}


@pytest.mark.parametrize(("shuffle", "resampled"), GOLDEN)
def test_a_thousand_places_are_what_they_were(shuffle, resampled):
    """A change here makes every run in progress resume into other data."""
    lengths = [[5000] * 40, [13, 0, 700, 1] * 9, [3]]
    order = Order(lengths, (0.6, 0.3, 0.1), 96, seed=11, shuffle=shuffle, resampled=resampled)
    digest = hashlib.sha256()
    for step in [*range(60), 10**5, 10**9, 10**12]:
        digest.update(json.dumps(order.batch(step)).encode())
    assert digest.hexdigest()[:32] == GOLDEN[shuffle, resampled]


def test_the_order_is_this_one():
    """A change here makes every run in progress resume into other data."""
    order = Order([[5, 3], [4]], (0.725, 0.275), 8, seed=124)
    assert order.batch(0) == PINNED[0]
    assert order.batch(10**6) == PINNED[1]
    assert order.counts(10**6) == PINNED_COUNTS


PINNED = (
    [(0, 1, 1), (0, 1, 2), (0, 1, 0), (0, 0, 2), (0, 0, 1), (1, 0, 2), (1, 0, 0), (0, 0, 0)],
    [(0, 1, 1), (1, 0, 0), (0, 1, 2), (0, 1, 0), (0, 0, 0), (0, 0, 1), (0, 0, 3), (1, 0, 2)],
)
PINNED_COUNTS = [5800000, 2200000]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ((1, 2, 3), "3 weights for 2 sources"),
        ((1, -1), "0 or more"),
        ((1, float("nan")), "0 or more"),
        ((0, 0), "more than 0"),
    ],
)
def test_bad_weights_are_refused(weights, message):
    with pytest.raises(ValueError, match=message):
        Order([[1], [1]], weights, 2, seed=0)


def test_an_empty_source_may_have_no_weight():
    assert Order([[0], [4]], (0, 1), 2, seed=0).counts(5) == [0, 10]
    with pytest.raises(ValueError, match="source 0 has weight"):
        Order([[0], [4]], (1, 1), 2, seed=0)
