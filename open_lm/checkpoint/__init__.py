"""Checkpoints: epoch_N.pt (weights), optimizer_N.pt, stats_N.pt and an AVERAGER_N.pt for each average, whole
tensors whatever the sharding; N is an interval's number or `latest`.

Every file holds "step", so that files of different saves are never taken for one checkpoint; nothing in a
file is executed when it is loaded. `save` and `load_…` are collective: every rank calls them, rank 0 alone
touches the disk, and its error is raised on every rank.
"""

import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from open_lm.averaging import Average
from open_lm.checkpoint.average import (
    gather_weights,
    load_averages,
    load_soup,
    path_of_average,
    saved_average,
)
from open_lm.checkpoint.files import (
    LATEST,
    alias,
    all_paths,
    latest,
    paths_of,
    prepare,
    read,
    read_training_state,
    remove_temporaries,
    replace,
    saved_averages,
    step_of,
    temporary,
    write,
)
from open_lm.checkpoint.fit import or_zeros, read_weights, tensors_of
from open_lm.model import Transformer
from open_lm.parallel.gather import gather, gather_objects, on_first_rank, spread_
from open_lm.parallel.mesh import broadcast_object, this_rank
from open_lm.parallel.plan import reshard_, unwrap

logger = logging.getLogger("open_lm")
__all__ = [
    "LATEST",
    "all_paths",
    "latest",
    "load_averages",
    "load_soup",
    "load_training_state",
    "load_weights",
    "path_of_average",
    "read_model_config",
    "read_state",
    "read_step",
    "save",
    "saved_averages",
]


def save(
    folder: Path | str,
    number: int,
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    averages: Sequence[Average] = (),
    labels: Sequence[str] = (),
) -> Path:
    """Write epoch_LABEL.pt and its companions for each label (default: `number`); returns the first's path.

    Collective.

    `state` (plain values and tensors; "step" is required; "name" and "tokens" are copied into every file)
    comes back from `load_training_state`. All files are complete on disk before the first takes its place.
    Raises OSError naming the file if one cannot be written: earlier checkpoints are untouched then.
    """
    folder = Path(folder)
    names = [average.name for average in averages]
    first, *others = labels or (str(number),)
    paths = paths_of(folder / f"epoch_{first}.pt", names)
    header = {"epoch": number, "name": state.get("name", "")}
    header |= {"step": state["step"], "tokens": state.get("tokens")}
    reshard_(model)
    bare = unwrap(model)
    model_config = asdict(bare.config)

    def put(part: str, content: dict[str, Any]) -> None:
        on_first_rank(lambda: write(temporary(paths[part]), header | content))

    on_first_rank(lambda: prepare(folder))
    try:
        weights = gather_weights(bare)
        put("epoch", {"state_dict": weights, "model_config": model_config, "averagers": names})
        del weights  # one copy at a time on rank 0
        for average in averages:
            put(average.name, saved_average(bare, average) | {"model_config": model_config})
        put("optimizer", {"optimizer": _gather_optimizer(bare, optimizer)})
        put("stats", {"state": state, "rng": gather_objects(_rng())})
    except BaseException:
        if this_rank() == 0:
            remove_temporaries(folder)
        raise
    on_first_rank(lambda: replace(paths))
    for label in others:
        on_first_rank(lambda label=label: alias(paths["epoch"], label))
    return paths["epoch"]


def load_weights(path: Path | str, model: nn.Module) -> dict[str, Any]:
    """Fill `model` from epoch_N.pt or AVERAGER_N.pt (ours or open_lm's), a bare state dict, or .safetensors.
    Collective.

    Returns what else the file holds ("epoch", "step", "model_config", …). Raises ValueError if the file
    cannot be read without executing it, or does not fit: then `model` is unchanged.
    """
    reshard_(model)
    bare = unwrap(model)
    loaded = on_first_rank(lambda: read_weights(Path(path), bare))
    weights, rest = loaded if loaded else ({}, {})
    for name, tensor in tensors_of(bare).items():
        spread_(tensor, or_zeros(weights, name, tensor) if loaded else None)
    new = [name for name, _ in bare.named_buffers() if loaded and name not in weights]
    if new:
        logger.warning(
            "%s was trained without --moe-balance bias: the routers' biases start at 0 (%s …)", path, new[0]
        )
    return broadcast_object(rest)


def load_training_state(
    path: Path | str, model: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Weights, moments and random state of epoch_N.pt and its companions; returns the saved `state`. Collective.

    Any number of ranks may load what any number saved. Hyperparameters (betas, decay) stay `optimizer`'s:
    flags win. Random state is restored if the number of ranks is the same. Raises ValueError if files are
    missing or of different steps.
    """
    loaded = on_first_rank(lambda: read_training_state(Path(path)))
    load_weights(path, model)
    moments, state, rng = loaded if loaded else ({}, {}, [])
    _spread_optimizer_(unwrap(model), optimizer, moments)
    state, rng = broadcast_object((state, rng))
    if len(rng) == len(gather_objects(None)):
        _set_rng(rng[this_rank()])
    return state


def read_state(path: Path | str) -> dict[str, Any]:
    """The `state` that `save` was given, of epoch_N.pt at `path`; errors as for `load_training_state`."""
    return read_training_state(Path(path))[1]


def read_step(path: Path | str) -> int:
    """Steps done when epoch_N.pt was written; -1 if it does not say."""
    step = step_of(Path(path))
    return -1 if step is None else step


def read_model_config(path: Path | str) -> dict[str, Any] | None:
    """asdict(ModelConfig) of the run that wrote `path`; None if the file does not say (open_lm's do not)."""
    path = Path(path)
    return None if path.suffix == ".safetensors" else read(path).get("model_config")


def _gather_optimizer(bare: Transformer, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """{"state": {parameter name: {"step", "exp_avg", "exp_avg_sq"}}, "param_groups": […names…]}."""
    names = {parameter: name for name, parameter in bare.named_parameters()}
    state = {
        name: {key: gather(value) for key, value in optimizer.state[parameter].items()}
        for parameter, name in names.items()
        if optimizer.state.get(parameter)
    }
    groups = [
        {k: v for k, v in group.items() if k not in ("params", "param_names")}
        | {"params": [names[p] for p in group["params"]]}
        for group in optimizer.param_groups
    ]
    return {"state": state, "param_groups": groups}


def _spread_optimizer_(
    bare: Transformer, optimizer: torch.optim.Optimizer, moments: dict[str, dict[str, Tensor]]
) -> None:
    """Sets `optimizer`'s state from {name: {key: whole tensor}}, which only rank 0 has."""
    kinds = broadcast_object(
        {name: {key: (v.shape, v.dtype) for key, v in entry.items()} for name, entry in moments.items()}
    )
    optimizer.state.clear()
    for name, parameter in bare.named_parameters():
        state = {}
        for key, (shape, dtype) in kinds.get(name, {}).items():
            if shape == parameter.shape:  # sharded as its parameter is
                state[key] = torch.empty_like(parameter, requires_grad=False)  # of its dtype, too
            else:
                state[key] = torch.empty(shape, dtype=dtype, device=parameter.device)
            spread_(state[key], moments.get(name, {}).get(key))
        if state:
            optimizer.state[parameter] = state


def _rng() -> dict[str, Tensor]:
    """The state of this rank's torch generators."""
    cuda = {"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {}
    return {"cpu": torch.get_rng_state()} | cuda


def _set_rng(state: dict[str, Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
