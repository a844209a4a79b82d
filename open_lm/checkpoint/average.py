"""Averages on disk: AVERAGER_N.pt beside epoch_N.pt, with open_lm's keys; and weighted sums of checkpoints."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from open_lm.averaging import Average
from open_lm.checkpoint.files import paths_of, read
from open_lm.checkpoint.fit import or_zeros, read_weights
from open_lm.checkpoint.state import read_content
from open_lm.checkpoint.tensors import restore_, tensors_of
from open_lm.config.averaging import Averager
from open_lm.model import Transformer
from open_lm.parallel.gather import on_first_rank, spread_
from open_lm.parallel.mesh import broadcast_object
from open_lm.parallel.plan import reshard_, unwrap


def facts_of(average: Average) -> dict[str, Any]:
    """What AVERAGER_N.pt holds beside the weights, by open_lm's keys; and the steps seen."""
    averager = average.averager
    parameters = {"ema": "gamma", "poly": "eta"}
    return {
        **average.counters(),
        "freq": averager.freq,
        "method": averager.method,
        "eta": None,
        "gamma": None,
        parameters[averager.method]: averager.parameter,
        "steps": average.steps,
    }


def load_averages(path: Path | str, averages: Sequence[Average], model: nn.Module) -> list[str]:
    """Fill each average from its file (ours or open_lm's) beside epoch_N.pt at `path`, or from the state at `path`.
    Collective.

    Returns the names of those that have no file: they stay as they are. Raises ValueError if a file is of
    another step or another averager, or does not fit `model`.
    """
    reshard_(model)
    bare, missing = unwrap(model), []
    if broadcast_object(Path(path).is_dir()):
        return _restore(Path(path), averages)
    for average in averages:
        loaded = on_first_rank(lambda average=average: _read_average(Path(path), average.averager, bare))
        weights, steps = loaded if loaded else ({}, None)
        steps = broadcast_object(steps)
        if steps is None:
            missing.append(average.name)
            continue
        average.steps = steps
        for name, tensor in average.weights.items():
            spread_(tensor, weights.get(name))
    return missing


def _restore(folder: Path, averages: Sequence[Average]) -> list[str]:
    """`load_averages` from a state."""
    saved: dict[str, Any] = broadcast_object(on_first_rank(lambda: read_content(folder)["averages"])) or {}
    found = [average for average in averages if average.name in saved]
    for average in found:
        restore_(folder, {f"average/{average.name}/{name}": t for name, t in average.weights.items()})
        average.steps = saved[average.name]["steps"]
    return [average.name for average in averages if average.name not in saved]


def _read_average(epoch: Path, averager: Averager, bare: Transformer) -> tuple[dict[str, Tensor], int] | None:
    """(Whole weights, steps seen) of the average beside `epoch`; None if there is none."""
    path = path_of_average(epoch, averager.name)
    if not path.exists():
        return None
    weights, rest = read_weights(path, bare)
    steps = {file.name: read(file).get("step") for file in (epoch, path)}
    if steps[path.name] is not None and steps[path.name] != steps[epoch.name]:  # open_lm's do not say
        raise ValueError(
            f"{path} does not belong to {epoch}: their steps are {steps}; remove it to start anew"
        )
    try:
        parameter = rest["gamma" if averager.method == "ema" else "eta"]
        found = (rest["method"], float(parameter), rest["freq"])
        seen = (rest["step_counter"] - 1) * rest["freq"] + rest["update_counter"] - 1
    except (KeyError, TypeError):
        raise ValueError(
            f"{path} is not an average's file: it does not say its method and counters"
        ) from None
    if found != (averager.method, averager.parameter, averager.freq):
        raise ValueError(f"{path} holds another average than its name says: {found}")
    return weights, seen


def path_of_average(epoch: Path, name: str) -> Path:
    """`name`'s file beside epoch_N.pt. Raises ValueError if this is named otherwise."""
    return paths_of(epoch, (name,))[name]


def load_soup(paths: Sequence[str], coefficients: Sequence[float], model: nn.Module) -> None:
    """Fill `model` with the sum of coefficient * weights over checkpoints, computed in fp32. Collective.

    Files as for `load_weights`. Raises ValueError if one does not fit: then `model` is unchanged.
    """
    reshard_(model)
    bare = unwrap(model)
    files = on_first_rank(lambda: [read_weights(Path(path), bare)[0] for path in paths])
    for name, tensor in tensors_of(bare).items():
        # one tensor at a time: the files are mapped, not read
        spread_(
            tensor,
            weighted_sum([or_zeros(file, name, tensor) for file in files], coefficients) if files else None,
        )


def weighted_sum(tensors: Sequence[Tensor], coefficients: Sequence[float]) -> Tensor:
    """sum of c * tensor, in fp32 whatever the tensors' dtypes."""
    total = torch.zeros_like(tensors[0], dtype=torch.float32)
    for tensor, coefficient in zip(tensors, coefficients, strict=True):
        total += coefficient * tensor.float()
    return total
