"""Perplexity of held-out text: exp of the mean negative log-likelihood per token.

Shapes: B sequences, S positions.
"""

import math
import time
from typing import Any

import torch
from torch import nn

from open_lm.config.optim import PrecisionName
from open_lm.data.loader import ValData
from open_lm.loss import IGNORE_INDEX
from open_lm.parallel.mesh import World, sum_over_ranks_
from open_lm.parallel.plan import autocast, reshard_, unwrap


def evaluate(
    model: nn.Module,
    val_data: ValData,
    *,
    batch_sequences: int,
    world: World,
    precision: PrecisionName,
) -> dict[str, Any]:
    """Exact token-weighted loss and perplexity of every sequence of `val_data` once. Collective.

    `batch_sequences` sequences go through the model at a time on each rank; with it fixed, the result does not
    depend on the number of ranks, even where experts have a capacity. Returns loss (nats per token),
    perplexity, tokens, sequences, skipped_sequences (bad ones), seconds and tokens_per_second, the same on
    all ranks. Raises ValueError if there is not one token to predict.
    """
    was_training = model.training
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64, device=world.device)  # nll, tokens, sequences, skipped
    start = time.perf_counter()
    # not inference_mode: FSDP's gathered parameters would stay inference tensors
    with torch.no_grad():
        for batch in val_data.batches(batch_sequences, world.rank, world.world_size):
            if batch is None:  # other ranks still work, and FSDP gathers parameters from this one
                with autocast(precision, world.device):
                    model(torch.zeros(1, unwrap(model).config.seq_len, dtype=torch.long, device=world.device))
                continue
            targets_BS = batch.targets_BS.to(world.device)
            with autocast(precision, world.device):
                output = model(batch.tokens_BS.to(world.device), targets_BS)
            sums[0] += output.loss.nll_BS.double().sum()
            sums[1] += (targets_BS != IGNORE_INDEX).sum()
            sums[2] += len(targets_BS) - batch.n_bad
            sums[3] += batch.n_bad
    nll, tokens, sequences, skipped = sum_over_ranks_(sums).tolist()
    seconds = time.perf_counter() - start
    reshard_(model)
    model.train(was_training)
    if not tokens:
        raise ValueError(
            f"--val-data {val_data.entry} has no token to predict: all {skipped:.0f} sequences are shorter than "
            f"{unwrap(model).config.seq_len} + 1 tokens or unreadable"
        )
    return {
        "loss": nll / tokens,
        "perplexity": perplexity(nll / tokens),
        "tokens": int(tokens),
        "sequences": int(sequences),
        "skipped_sequences": int(skipped),
        "seconds": seconds,
        "tokens_per_second": tokens / max(seconds, 1e-9),
    }


def perplexity(loss: float) -> float:
    """exp(loss); inf where that is more than a float holds."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
