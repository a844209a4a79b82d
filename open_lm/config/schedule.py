"""Batch and run length in sequences, tokens and steps: open_lm's odd flag meanings are converted here."""

from dataclasses import dataclass

from open_lm.config.data import DataConfig
from open_lm.config.optim import OptimConfig

DEFAULT_GLOBAL_BATCH_SEQUENCES = 64


@dataclass(frozen=True)
class Batch:
    """How a step's sequences are divided: over ranks, then over micro-batches."""

    global_sequences: int
    rank_sequences: int
    micro_sequences: int
    micro_batches: int


def divide_batch(optim: OptimConfig, world_size: int) -> Batch:
    """Raises ValueError where --batch-size, --global-batch-size, --accum-freq and the ranks do not fit."""
    total = optim.global_batch_size
    if optim.batch_size is not None:
        if total is not None and total != optim.batch_size * world_size:
            raise ValueError(
                f"--global-batch-size {total} != --batch-size {optim.batch_size} * {world_size} ranks "
                f"= {optim.batch_size * world_size}: give one of the two"
            )
        total = optim.batch_size * world_size
    if total is None:
        total = DEFAULT_GLOBAL_BATCH_SEQUENCES
    if total % world_size:
        raise ValueError(f"--global-batch-size {total} is not divisible by the {world_size} ranks")
    rank = total // world_size
    if rank % optim.accum_freq:
        raise ValueError(
            f"--accum-freq {optim.accum_freq} does not divide the {rank} sequences of a rank's batch "
            f"(--global-batch-size {total} over {world_size} ranks)"
        )
    return Batch(total, rank, rank // optim.accum_freq, optim.accum_freq)


@dataclass(frozen=True)
class Schedule:
    """Steps of a run. Interval n (from 1) ends after step `interval_end(n)`; remainders carry over, so that
    n intervals train on n * interval_tokens tokens to within one batch."""

    batch_tokens: int
    interval_tokens: int
    intervals: int
    max_steps: int | None = None

    def interval_end(self, n: int) -> int:
        """Steps done when interval n is complete."""
        return n * self.interval_tokens // self.batch_tokens

    def interval_of(self, step: int) -> int:
        """The interval (from 1) that step `step` (from 0) belongs to."""
        return ((step + 1) * self.batch_tokens - 1) // self.interval_tokens + 1

    @property
    def total_steps(self) -> int:
        """Steps of the whole run; what the learning-rate schedule spans, without --lr-decay-steps."""
        return self.interval_end(self.intervals)

    @property
    def end_step(self) -> int:
        """Steps after which this process ends: --max-steps, or the whole run."""
        return self.total_steps if self.max_steps is None else min(self.max_steps, self.total_steps)


def plan_steps(data: DataConfig, optim: OptimConfig, global_sequences: int, seq_len: int) -> Schedule:
    """Raises ValueError where an interval is shorter than one batch, or the cool-down begins before the run."""
    if data.train_num_samples is None:
        raise ValueError("--train-num-samples (tokens in a checkpoint interval) is needed for training")
    batch_tokens = global_sequences * seq_len
    if data.train_num_samples < batch_tokens:
        raise ValueError(
            f"--train-num-samples {data.train_num_samples} tokens is less than one batch: {global_sequences} "
            f"sequences of {seq_len} tokens = {batch_tokens}. Raise it or lower --global-batch-size"
        )
    schedule = Schedule(batch_tokens, data.train_num_samples, optim.epochs, optim.max_steps)
    cooldown_steps = (optim.epochs_cooldown or 0) * schedule.interval_end(1)
    if optim.lr_decay_steps is not None and cooldown_steps > optim.lr_decay_steps:
        raise ValueError(
            f"--epochs-cooldown {optim.epochs_cooldown} is {cooldown_steps} steps > --lr-decay-steps "
            f"{optim.lr_decay_steps}, where it ends: lower one or raise the other"
        )
    return schedule
