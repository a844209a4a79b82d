"""LOGS/NAME/debug: what a run that ended on skipped updates was doing, to be looked at without the run."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from open_lm.config.redact import redacted
from open_lm.data.batches import Batch
from open_lm.log import jsonable
from open_lm.metrics import Progress, StepResult
from open_lm.optim import grad_norm
from open_lm.parallel.gather import gather, gather_objects
from open_lm.parallel.mesh import World
from open_lm.parallel.plan import reshard_, unwrap

logger = logging.getLogger("open_lm")

HOW_TO_READ = (
    "state.json: the step (done again), its loss, the gradient's L2 norm of every parameter (those that are not "
    "finite: not_finite), each rank's sample names. batch_rank_N.safetensors: tokens (B, S) and targets (B, S; "
    "-100: none) of rank N, and rng, the torch generator's state at the step's begin. weights.safetensors: the "
    "model, which neither the step nor those skipped before it in a row changed, by its parameters' names. Read "
    "them with safetensors.torch.load_file; flags are in ../params.txt."
)


def end_skipping(
    folder: Path,
    model: nn.Module,
    batch: Batch,
    again: StepResult,
    randomness: Tensor,
    progress: Progress,
    *,
    world: World,
    loss_scale: float,
    samples: Sequence[str],
    limit: int,
) -> None:
    """RuntimeError on all ranks, once the step just done, done `again`, is in the folder: the last of the row of
    updates that were skipped, so it has the weights with which the row began. Collective."""
    kept = write_debug_state(
        folder, model, batch, again, randomness, progress, world=world, loss_scale=loss_scale, samples=samples
    )
    kinds = "not finite" if not progress.skipped_spikes else "not finite or a spike"
    raise RuntimeError(
        f"step {progress.step}: loss or gradient was {kinds} {progress.skipped_in_a_row} times in a row "
        f"(--max-skipped-updates {limit}); lower --lr, or resume earlier. {kept}"
    )


def write_debug_state(
    folder: Path,
    model: nn.Module,
    batch: Batch,
    result: StepResult,
    randomness: Tensor,
    progress: Progress,
    *,
    world: World,
    loss_scale: float,
    samples: Sequence[str],
) -> str:
    """Writes the step whose gradients `model` holds; returns what to tell the user. Collective.

    A disk that is full costs the debug state alone: the message says so.
    """
    norms = {name: grad_norm([p]).item() / loss_scale for name, p in unwrap(model).named_parameters()}
    names = gather_objects(list(samples))
    error = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {"tokens": batch.tokens_BS, "targets": batch.targets_BS, "rng": randomness}
        save_file(
            {k: v.contiguous() for k, v in tensors.items()}, folder / f"batch_rank_{world.rank}.safetensors"
        )
    except OSError as caught:
        error = f"{folder} could not be written: {caught}"
    reshard_(model)
    weights = {name: gather(tensor) for name, tensor in unwrap(model).state_dict().items()}
    if world.is_first and error is None:
        loss, z_loss, _, router_loss = result.losses.tolist()
        state = {
            "how_to_read": HOW_TO_READ,
            "step": progress.step,
            "progress": progress.to_dict(),
            "loss": loss,
            "z_loss": z_loss,
            "router_loss": router_loss,
            "loss_scale": loss_scale,
            "tokens": result.tokens,
            "not_finite": [name for name, norm in norms.items() if not torch.tensor(norm).isfinite()],
            "gradient_norms": norms,
            "samples": {f"rank {rank}": each for rank, each in enumerate(names)},
            "bad_samples": list(batch.bad),
        }
        try:
            # clones: safetensors refuses tied weights
            save_file({k: v.clone().contiguous() for k, v in weights.items()}, folder / "weights.safetensors")
            (folder / "state.json").write_text(
                json.dumps(redacted(jsonable(state)), indent=1), encoding="utf-8"
            )
        except OSError as caught:
            error = f"{folder} could not be written: {caught}"
    return error or f"The step is kept in {folder}: state.json says how to read it"
