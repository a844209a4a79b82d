"""Batch sizes, interval ends and run lengths."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from open_lm.config.data import DataConfig
from open_lm.config.optim import OptimConfig
from open_lm.config.schedule import Batch, Schedule, divide_batch, plan_steps


def test_batch_size_is_per_rank_and_global_is_over_all() -> None:
    assert divide_batch(OptimConfig(batch_size=8, accum_freq=4), 8) == Batch(64, 8, 2, 4)
    assert divide_batch(OptimConfig(global_batch_size=64, accum_freq=4), 8) == Batch(64, 8, 2, 4)
    assert divide_batch(OptimConfig(), 2) == Batch(64, 32, 32, 1)
    assert divide_batch(OptimConfig(batch_size=8, global_batch_size=16), 2) == Batch(16, 8, 8, 1)


@pytest.mark.parametrize(
    ("optim", "world_size", "message"),
    [
        (OptimConfig(batch_size=8, global_batch_size=64), 2, r"64 != --batch-size 8 \* 2 ranks = 16"),
        (OptimConfig(global_batch_size=9), 2, "9 is not divisible by the 2 ranks"),
        (OptimConfig(batch_size=6, accum_freq=4), 1, "--accum-freq 4 does not divide the 6 sequences"),
    ],
)
def test_batches_that_do_not_fit(optim: OptimConfig, world_size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        divide_batch(optim, world_size)


def test_interval_shorter_than_a_batch() -> None:
    with pytest.raises(
        ValueError, match=r"100 tokens is less than one batch: 8 sequences of 16 tokens = 128"
    ):
        plan_steps(DataConfig(train_num_samples=100), OptimConfig(), 8, 16)


def test_a_cooldown_that_would_begin_before_the_run() -> None:
    optim = OptimConfig(lr_scheduler="const-cooldown", epochs=4, epochs_cooldown=2, lr_decay_steps=9)
    with pytest.raises(ValueError, match="--epochs-cooldown 2 is 10 steps > --lr-decay-steps 9"):
        plan_steps(DataConfig(train_num_samples=640), optim, 8, 16)
    assert plan_steps(DataConfig(train_num_samples=512), optim, 8, 16).total_steps == 16


@given(batch=st.integers(1, 1000), extra=st.integers(0, 5000), intervals=st.integers(1, 30))
def test_intervals_cover_the_run(batch: int, extra: int, intervals: int) -> None:
    schedule = Schedule(batch, batch + extra, intervals)
    ends = [0] + [schedule.interval_end(n) for n in range(1, intervals + 1)]
    for n, (start, end) in enumerate(itertools.pairwise(ends), start=1):
        assert end > start
        assert all(schedule.interval_of(step) == n for step in range(start, end))
        # remainders carry over: never more than one batch behind the tokens asked for
        assert 0 <= n * (batch + extra) - end * batch < batch
    assert schedule.total_steps == ends[-1]


def test_max_steps_ends_early_and_leaves_the_schedule() -> None:
    schedule = Schedule(10, 100, 5, max_steps=7)
    assert (schedule.end_step, schedule.total_steps) == (7, 50)
    assert Schedule(10, 100, 5, max_steps=99).end_step == 50
