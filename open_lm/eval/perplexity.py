"""Perplexity of held-out text: exp of the mean negative log-likelihood per token.

Shapes: B sequences, S positions.
"""

import logging
import math
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from open_lm.config.eval import EvalConfig
from open_lm.config.optim import PrecisionName
from open_lm.config.redact import redact
from open_lm.data.errors import DataError, of_data
from open_lm.data.loader import ValData
from open_lm.data.waiting import LEFT, waiting
from open_lm.eval.bootstrap import interval
from open_lm.loss import IGNORE_INDEX, real_positions
from open_lm.model import documents_of
from open_lm.parallel.gather import gather_alike
from open_lm.parallel.mesh import World, agree_to_stop, sum_over_ranks_
from open_lm.parallel.plan import autocast, compiled, reshard_, unwrap

logger = logging.getLogger(__name__)

NAMED_SAMPLES = 5  # bad ones, of each evaluation and rank, that the log names
NO_TARGET = -1.0  # no negative log-likelihood is so low


def evaluate(
    model: nn.Module,
    val_data: ValData,
    *,
    batch_sequences: int,
    world: World,
    precision: PrecisionName,
    config: EvalConfig | None = None,
) -> dict[str, Any]:
    """Exact token-weighted loss and perplexity of every sequence of `val_data` once. Collective.

    `batch_sequences` sequences go through the model at a time on each rank; with it fixed, the result does not
    depend on the number of ranks, even where experts have a capacity. Returns loss (nats per token),
    perplexity, tokens, sequences, skipped_sequences (bad ones), seconds and speeds, of a mixture of experts the
    dropped share of all assignments and, where `config` asks for them, the ends of bootstrap intervals, by
    open_lm's names; the same on all ranks. Padding is routed to no expert. Raises DataError if there is not one
    token to predict or a batch cannot be read, and StopAsked, between two batches, where a signal ended the run.

    --val-tok-ci keeps every token's loss, 4 bytes each (8 for a moment), in rank 0's main memory; the losses of
    a round of batches are gathered on its device.
    """
    config = config or EvalConfig()
    was_training = model.training
    model.eval()
    model_config = unwrap(model).config
    seq_len = model_config.seq_len
    bad: list[str] = []
    # nll, tokens, sequences, skipped sequences, batches, seconds of waiting for data, assignments, dropped ones
    sums = torch.zeros(8, dtype=torch.float64, device=world.device)
    losses = Losses(config)
    waited, rounds = 0.0, 0
    start = ready = time.perf_counter()
    # not inference_mode: FSDP's gathered parameters would stay inference tensors
    with torch.no_grad():
        held_out = val_data.batches(batch_sequences, world.rank, world.world_size)
        for batch in waiting(of_data(held_out), world.watch.asked):
            agree_to_stop(world)
            assert batch is not LEFT  # then all have agreed
            world.watch.at("evaluating" if rounds else "compiling")
            rounds += 1
            waited += time.perf_counter() - ready
            nll_BS = torch.full((batch_sequences, seq_len), NO_TARGET, device=world.device)
            if batch is None:  # other ranks still work, and FSDP gathers parameters from this one
                with autocast(precision, world.device), compiled(False):
                    model(torch.zeros(1, seq_len, dtype=torch.long, device=world.device))
            else:
                real_BS = real_positions(batch.targets_BS) if model_config.moe.enabled else None
                real_BS = None if real_BS is None else real_BS.to(world.device)
                targets_BS = batch.targets_BS.to(world.device)
                # a last, smaller batch is not worth compiling every block anew
                with autocast(precision, world.device), compiled(len(targets_BS) == batch_sequences):
                    output = model(
                        batch.tokens_BS.to(world.device),
                        targets_BS,
                        real_BS=real_BS,
                        documents=documents_of(batch.tokens_BS, unwrap(model).config, world.device),
                    )
                counted_BS = targets_BS != IGNORE_INDEX
                nll = output.loss.nll_BS
                sums[0] += nll.double().sum()
                sums[1] += counted_BS.sum()
                sums[2] += len(targets_BS) - batch.n_bad
                sums[3] += batch.n_bad
                bad += batch.bad[: NAMED_SAMPLES - len(bad)]
                sums[4] += 1
                for layer in output.router_stats:
                    sums[6] += layer.count_E.sum()
                    sums[7] += layer.dropped
                nll_BS[: len(nll)] = nll.where(counted_BS, NO_TARGET)
            losses.add(nll_BS)
            ready = time.perf_counter()
    sums[5] += waited
    nll, tokens, sequences, skipped, batches, waited, assignments, dropped = sum_over_ranks_(sums).tolist()
    seconds = time.perf_counter() - start
    for sample in bad:
        logger.warning("%s: ignored", sample)
    if skipped > len(bad) and bad:
        entry = redact(val_data.entry)
        logger.warning("%s: %d sequences of %d were ignored", entry, skipped, skipped + sequences)
    reshard_(model)
    model.train(was_training)
    if not tokens:
        raise DataError(
            f"--val-data {redact(val_data.entry)} has no token to predict: all "
            f"{sequences + skipped:.0f} sequences are "
            f"shorter than {seq_len} + 1 tokens, unreadable or masked"
        )
    speed = (sequences + skipped) * seq_len / max(seconds, 1e-9)
    return {
        "loss": nll / tokens,
        "perplexity": perplexity(nll / tokens),
        **losses.intervals(world.device),
        # text of one kind crowds the experts that know it: a capacity drops far more here than in training
        **({"dropped_share": dropped / assignments} if assignments else {}),
        "tokens": int(tokens),
        "sequences": int(sequences),
        "batch_sequences": batch_sequences,
        "skipped_sequences": int(skipped),
        "seconds": seconds,
        "tokens_per_second": tokens / max(seconds, 1e-9),
        # open_lm's "samples" are tokens, masked ones too; times are one batch's on its rank
        "samples_per_second": speed,
        "samples_per_second_per_gpu": speed / world.world_size,
        "data_time": waited / batches,
        "batch_time": seconds * world.world_size / batches,
    }


class Losses:
    """The losses that the intervals of `config` are of, on rank 0, in the order of the data."""

    def __init__(self, config: EvalConfig) -> None:
        self.config = config
        self.of_sequences: list[np.ndarray] = []
        self.of_tokens: list[np.ndarray] = []

    def add(self, nll_BS: Tensor) -> None:
        """A batch of every rank, NO_TARGET where nothing is predicted; nothing if no interval is asked for.
        Collective: rank r's batch is the r-th of this round, so the order does not depend on the ranks."""
        if not (self.config.val_seq_ci or self.config.val_tok_ci):
            return
        everyone = gather_alike(nll_BS)
        if everyone is None:
            return
        losses_BS = everyone.flatten(0, 1).numpy()
        counted_BS = losses_BS != NO_TARGET
        if self.config.val_tok_ci:
            self.of_tokens.append(losses_BS[counted_BS])
        if self.config.val_seq_ci:
            tokens_B = counted_BS.sum(1)
            nll_B = losses_BS.sum(1, where=counted_BS, dtype=np.float64)
            some_B = tokens_B > 0
            self.of_sequences.append(nll_B[some_B] / tokens_B[some_B])

    def intervals(self, device: torch.device) -> dict[str, float]:
        """{"loss_sequences_lower_95": …} of what was asked for, of at least one token. Collective: rank 0
        computes, all ranks know."""
        asked = {"sequences": self.config.val_seq_ci, "tokens": self.config.val_tok_ci}
        found = {}
        for kind, parts in (("sequences", self.of_sequences), ("tokens", self.of_tokens)):
            if not asked[kind]:
                continue
            ends = 0.0, 0.0
            if parts:
                population, iterations = self.config.val_max_pop_ci, self.config.val_iter_ci
                ends = interval(np.concatenate(parts), max_population=population, iterations=iterations)
            ends = torch.tensor(ends, dtype=torch.float64, device=device)
            lower, upper = sum_over_ranks_(ends).tolist()
            found |= {f"loss_{kind}_lower_95": lower, f"loss_{kind}_upper_95": upper}
        return found


def perplexity(loss: float) -> float:
    """exp(loss); inf where that is more than a float holds."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
