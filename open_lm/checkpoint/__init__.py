"""Checkpoints: step_S/, all of a run's state in sharded safetensors and JSON, and made of it epoch_N.pt (whole
weights) and an AVERAGER_N.pt for each average; N is an interval's number or `latest`.

A state is complete or absent, holds a digest of every file, and loads on any number of ranks; epoch_N.pt says the
step of the state it belongs to. Nothing in a file is executed when it is loaded. `save` and `load_…` are
collective; an error on one rank is raised on every rank.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from open_lm.averaging import Average
from open_lm.checkpoint.average import load_averages, load_soup, path_of_average
from open_lm.checkpoint.files import LATEST, saved_averages, state_of, step_of
from open_lm.checkpoint.fit import check_fit, or_zeros, read_weights
from open_lm.checkpoint.recover import SaveError, check_made, latest
from open_lm.checkpoint.saver import Save, Saver
from open_lm.checkpoint.seal import read_whole
from open_lm.checkpoint.state import CONTENT, Shards, is_state, read_content, read_json, verify
from open_lm.checkpoint.tensors import random_state, restore_, tensors_of
from open_lm.parallel.gather import gather_objects, on_first_rank, spread_
from open_lm.parallel.mesh import broadcast_object, this_rank
from open_lm.parallel.plan import reshard_, unwrap

logger = logging.getLogger("open_lm")
__all__ = [
    "LATEST",
    "Save",
    "SaveError",
    "Saver",
    "averages_of_state",
    "check_made",
    "is_state",
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
    "state_of",
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
    """Writes the state and epoch_LABEL.pt for each label (default: `number`) at once; the first's path. Collective.

    As `Saver.save`, but raises the error: OSError naming the file if one cannot be written; earlier checkpoints
    are untouched then.
    """
    saver = Saver(folder, model=model, optimizer=optimizer, averages=averages, in_background=False)
    done = saver.save(state, number=number, labels=labels or (str(number),))
    if done.error is not None:
        raise done.error
    return done.path


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
        _warn_of_biases(path, new)
    return broadcast_object(rest)


def load_training_state(
    path: Path | str, model: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Weights, moments and random state that epoch_N.pt, or the state at `path`, belongs to; returns the `state` it
    was saved with. Collective.

    Any number of ranks, in any layout, may load what any number saved. Hyperparameters (betas, decay) stay
    `optimizer`'s: flags win. Random state is restored if the number of ranks is the same. Raises ValueError if
    the state is missing, damaged (naming the file) or does not fit; then nothing is changed.
    """
    reshard_(model)
    bare = unwrap(model)

    def find() -> tuple[Path, dict[str, Any], dict[str, tuple]]:
        folder = state_of(Path(path))
        content, shards = read_content(folder), Shards(folder)
        weights = shards.named("model/")
        aliases = bare.state_dict(keep_vars=True).keys() - tensors_of(bare).keys()
        check_fit(
            folder,
            {
                name: shards.whole(key) if name in aliases else torch.empty(shards.shape(key), device="meta")
                for name, key in weights.items()
            },
            bare,
        )
        return folder, content, {key: (shards.shape(key), shards.dtype(key)) for key in sorted(shards.keys())}

    folder, content, kinds = broadcast_object(on_first_rank(find)) or (Path(), {}, {})
    wanted: dict[str, Tensor] = {}
    new = []
    for name, tensor in tensors_of(bare).items():
        if f"model/{name}" in kinds:
            wanted[f"model/{name}"] = tensor.detach()
        else:
            new.append(name)
            tensor.detach().zero_()
    if new:
        _warn_of_biases(path, new)
    optimizer.state.clear()
    parameters = dict(bare.named_parameters())
    for key, (shape, dtype) in kinds.items():
        part, name, *rest = key.split("/")
        if part == "optimizer" and name in parameters:
            parameter = parameters[name]
            if shape == parameter.shape:  # sharded as its parameter is
                value = torch.empty_like(parameter, requires_grad=False)  # of its dtype, too
            else:
                value = torch.empty(shape, dtype=dtype, device=parameter.device)
            optimizer.state[parameter][rest[0]] = wanted[key] = value
    restore_(folder, wanted)
    if content["world_size"] == len(gather_objects(None)):
        _restore_random(folder)
    return content["state"]


def _restore_random(folder: Path) -> None:
    """Every rank's own generators. Collective."""
    states = {key: state for ranks in gather_objects(random_state()) for key, state in ranks.items()}
    saved = broadcast_object(on_first_rank(lambda: list(Shards(folder).keys())))
    states = {key: state for key, state in states.items() if key in (saved or ())}
    restore_(folder, states)
    mine = f"random/{this_rank()}/"
    if f"{mine}cpu" in states:
        torch.set_rng_state(states[f"{mine}cpu"])
    if f"{mine}cuda" in states:
        torch.cuda.set_rng_state(states[f"{mine}cuda"])


def _warn_of_biases(path: Path | str, names: Sequence[str]) -> None:
    logger.warning(
        "%s was trained without --moe-balance bias: the routers' biases start at 0 (%s …)", path, names[0]
    )


def read_state(path: Path | str) -> dict[str, Any]:
    """The `state` that `save` was given, of epoch_N.pt or the state at `path`; errors as `load_training_state`."""
    return read_content(state_of(Path(path)))["state"]


def averages_of_state(path: Path | str) -> tuple[str, ...]:
    """The averages saved with the state of `path`; errors as `read_state`."""
    return tuple(read_content(state_of(Path(path)))["averages"])


def read_step(path: Path | str) -> int:
    """Steps done when epoch_N.pt, or the state at `path`, was written; -1 if it does not say."""
    step = step_of(Path(path))
    return -1 if step is None else step


def read_model_config(path: Path | str) -> dict[str, Any] | None:
    """asdict(ModelConfig) of the run that wrote `path`; None if the file does not say (open_lm's do not).

    Reads every byte: ValueError naming the file where it is damaged.
    """
    path = Path(path)
    if path.is_dir():
        verify(path)
        return read_json(path / CONTENT)["model_config"]
    return None if path.suffix == ".safetensors" else read_whole(path).get("model_config")
