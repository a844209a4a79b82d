"""What a run sees, from files to batches: exactly once, in proportion, and the same after any interruption.

Sequence i of source s is SHIFT * s + i, repeated.
"""

import gc
import os
from collections import Counter
from itertools import accumulate

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from open_lm.config import DataConfig
from open_lm.data.loader import TrainData
from open_lm.tokenize.shard_writer import write_shards

SHIFT = 1000
LENGTH = 3


def write_sources(folder, sizes, per_shard, key):
    manifests = []
    for number, size in enumerate(sizes):
        tokens_NL = np.repeat(SHIFT * number + np.arange(size)[:, None], LENGTH, axis=1)
        write_shards(folder / str(number), tokens_NL, per_shard, key)
        manifests.append(f"{folder}/{number}/manifest.jsonl")
    return tuple(manifests)


def read(config, start, end, batch, world_size, seed=0):
    """Sequences of the global batches of these steps, put together of all ranks' shares."""
    ranks = [
        [
            rows.tokens_BS[:, 0].tolist()
            for rows in TrainData(config, LENGTH - 1, 10 * SHIFT, rank, world_size, batch, seed).batches(
                start, end
            )
        ]
        for rank in range(world_size)
    ]
    return [[i for share in shares for i in share] for shares in zip(*ranks, strict=True)]


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.lists(st.integers(1, 60) | st.sampled_from([1, 1, 400]), min_size=1, max_size=3),
    per_shard=st.sampled_from([1, 7, 1000]),
    key=st.sampled_from(["u16", "u32", "json.gz"]),
    weights=st.lists(st.sampled_from([0.01, 0.275, 1, 3]), min_size=3, max_size=3),
    share=st.integers(1, 5),
    ranks=st.sampled_from([(1, 2), (2, 1), (4, 2), (1, 4), (8, 1)]),
    shuffle=st.booleans(),
    seed=st.integers(0, 99),
)
def test_every_pass_is_whole_the_mix_holds_and_any_step_resumes(
    tmp_path_factory, sizes, per_shard, key, weights, share, ranks, shuffle, seed
):
    manifests = write_sources(tmp_path_factory.mktemp("passes"), sizes, per_shard, key)
    weights = tuple(weights[: len(sizes)])
    config = DataConfig(
        dataset_manifest=manifests,
        train_data_mix_weights=weights,
        multiple_data_passes=True,
        disable_buffer=not shuffle,
        workers=0,
    )
    batch = share * 8
    steps = min(40, 2 + 2 * sum(sizes) // batch)
    expected = read(config, 0, steps, batch, 1, seed)
    for number, weight in enumerate(weights):
        counts = [sum(i // SHIFT == number for i in one) for one in expected]
        assert all(abs(count - batch * weight / sum(weights)) < 1 + 1e-6 for count in counts)
        seen = [i for one in expected for i in one if i // SHIFT == number]
        whole = len(seen) // sizes[number]
        everything = set(range(SHIFT * number, SHIFT * number + sizes[number]))
        ends = [0, *accumulate(counts)]
        for one in range(
            whole
        ):  # a pass may begin within a batch, whose slots are shuffled: count by batches
            first = max(end for end in ends if end <= one * sizes[number])
            last = min(end for end in ends if end >= (one + 1) * sizes[number])
            assert everything <= set(seen[first:last])
        times = Counter(seen)
        assert max(times.values(), default=0) - min(times[i] for i in everything) <= 1
    for world_size in ranks:
        start = seed % steps
        assert read(config, start, steps, batch, world_size, seed) == expected[start:]


@pytest.mark.parametrize("sizes", [[1], [5], [3, 300]])
def test_more_ranks_and_workers_than_shards(tmp_path, sizes):
    manifests = write_sources(tmp_path, sizes, 1000, "u16")
    config = DataConfig(dataset_manifest=manifests, multiple_data_passes=True, workers=0)
    expected = read(config, 0, 9, 8, 1)
    for workers, world_size, start in ((3, 8, 0), (2, 4, 5)):
        changed = DataConfig(**config.__dict__ | {"workers": workers})
        assert read(changed, start, 9, 8, world_size) == expected[start:]


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize(("key", "length"), [("u16", 1025), ("json.gz", 65)])
def test_a_thousand_steps_take_no_more_memory_and_files(tmp_path, key, length):
    """300 shards of 24 sequences, of which 100 may be open: 1,000 steps are more than two passes."""
    tokens_NL = np.random.default_rng(0).integers(0, 50_000, (7200, length))
    write_shards(tmp_path, tokens_NL, 24, key)
    del tokens_NL
    config = DataConfig(
        dataset_manifest=(f"{tmp_path}/manifest.jsonl",), multiple_data_passes=True, workers=0
    )
    data = TrainData(config, length - 1, 50_000, 0, 1, 16, 0)
    data.items.reader.open_shards.limit = 100
    files, memory = [], []
    for step, _ in enumerate(data.batches(0, 1450)):
        if step in (449, 949, 1449):  # a pass is 450 steps
            gc.collect()
            files.append(len(os.listdir("/proc/self/fd")))
            memory.append(resident_bytes())
    assert files[0] == files[1] == files[2]
    assert memory[2] - memory[0] < 4e6
    data.items.reader.open_shards.close()
    assert len(os.listdir("/proc/self/fd")) == files[0] - 100
