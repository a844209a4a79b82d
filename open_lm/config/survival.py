"""Contradictions among the flags by which a run survives: time-outs, skipped updates, determinism."""

import math
from collections.abc import Collection
from dataclasses import replace

from open_lm.config.model import ModelConfig
from open_lm.config.run import RunConfig

FEWEST_LOSSES = 8  # of which a median deviation says anything


def check_survival(run: RunConfig, given: Collection[str]) -> list[str]:
    """Raises ValueError on the first contradiction; returns one warning line per flag that does nothing."""
    optim, parallel = run.optim, run.distributed
    if not 0 < parallel.collective_timeout < math.inf:
        raise ValueError(
            f"--collective-timeout {parallel.collective_timeout:g}: expected seconds, more than 0"
        )
    if not 0 <= parallel.hang_timeout < math.inf:
        raise ValueError(f"--hang-timeout {parallel.hang_timeout:g}: expected seconds, or 0 for never")
    if optim.max_skipped_updates < 1:
        raise ValueError(f"--max-skipped-updates {optim.max_skipped_updates}: expected at least 1")
    if optim.skip_loss_spikes is not None and not 0 < optim.skip_loss_spikes < math.inf:
        raise ValueError(f"--skip-loss-spikes {optim.skip_loss_spikes:g}: expected more than 0")
    if optim.loss_spike_window < FEWEST_LOSSES:
        raise ValueError(
            f"--loss-spike-window {optim.loss_spike_window}: expected at least {FEWEST_LOSSES} losses"
        )
    warnings = []
    if parallel.hang_timeout > parallel.collective_timeout and "hang_timeout" in given:
        warnings.append(
            f"--hang-timeout {parallel.hang_timeout:g} > --collective-timeout {parallel.collective_timeout:g}: "
            "a collective fails first, which does not say who hangs"
        )
    if "loss_spike_window" in given and optim.skip_loss_spikes is None:
        warnings.append("--loss-spike-window does nothing without --skip-loss-spikes")
    return warnings


def refuse_nondeterministic(config: ModelConfig) -> None:
    """Raises ValueError where --deterministic cannot hold for the model's kernels."""
    if config.moe.enabled and config.moe.backend == "megablocks":
        raise ValueError(
            "--deterministic with --moe-backend megablocks: its kernels are not torch's to control; use grouped_mm"
        )
    if config.attn_name.startswith("xformers"):
        raise ValueError(
            f"--deterministic with --attn-name {config.attn_name}: its backward pass is not; use torch_attn"
        )


def after_restart(
    run: RunConfig, restarts: int, trains: bool, begun: bool = True
) -> tuple[RunConfig, list[str]]:
    """The flags of a run that torchrun has started again after a rank died: it goes on from its newest state, or
    where there is none yet from what the first start began with. Where no start has `begun` yet, each was refused
    or died before: the flags are as they were."""
    if not restarts or not trains or not begun:
        return run, []
    options = replace(run.checkpoint, resume="latest")
    if run.checkpoint.resume not in (None, "latest"):
        options = replace(options, pretrained=run.checkpoint.resume, load_pretrained_state=True)
    again = replace(run, checkpoint=options)
    return again, [
        f"torchrun has started the ranks again ({restarts}): the run goes on from its newest state"
    ]
