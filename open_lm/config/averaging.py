"""Averages of weights: along one run, and over checkpoints."""

import math
import re
from dataclasses import dataclass

NONE = "none"  # among --averagers: the weights as they are
DEFAULTS = {"ema": 0.99, "poly": 0.0}  # the methods, and what their parameter is where a name leaves it out


@dataclass(frozen=True)
class AveragingConfig:
    """Weight averaging."""

    averagers: str | None = None
    """Averages kept beside the weights, with commas: ema_GAMMA_FREQ, poly_ETA_FREQ (FREQ: steps per update,
    default 1). Each is evaluated when the weights are, and saved as NAME_N.pt. Without training data: which of
    them beside --resume to evaluate (`none`: epoch_N.pt itself)."""

    log_avg_model_training_loss: int = 0
    """Every N steps also log each average's loss on that step's batch, train/NAME_loss, at the cost of a forward
    pass each; 0: never."""

    average: tuple[str, ...] | None = None
    """Start from, or evaluate, the weighted sum of these checkpoints' weights (a model soup)."""

    average_coefficients: tuple[float, ...] | None = None
    """A weight per --average checkpoint. Default: equal ones."""


@dataclass(frozen=True)
class Averager:
    """What one name of --averagers asks for."""

    name: str
    """As given: it names files (NAME_N.pt) and metrics."""
    method: str
    parameter: float
    """gamma of ema, eta of poly."""
    freq: int
    """Steps per update."""


def parse_averagers(names: str | None) -> tuple[Averager, ...]:
    """The averages that --averagers asks for, without `none`. Raises ValueError quoting a name that is wrong."""
    given = names.split(",") if names is not None else []
    averagers = [_parse(name) for name in given if name != NONE]
    for name in given:
        if given.count(name) > 1:
            raise ValueError(f"--averagers {names}: {name} is given twice")
    return tuple(averagers)


def _parse(name: str) -> Averager:
    method, *numbers = name.split("_")
    where = f"--averagers {name}"
    if method not in DEFAULTS:
        raise ValueError(
            f"{where}: unknown method {method!r}, expected ema_GAMMA_FREQ, poly_ETA_FREQ or {NONE}"
        )
    if len(numbers) > 2:
        raise ValueError(f"{where}: {len(numbers) + 1} parts, expected at most METHOD_PARAMETER_FREQ")
    parameter, freq = [*numbers, *(str(DEFAULTS[method]), "1")[len(numbers) :]]
    # the name becomes part of a file's name: nothing but digits, signs and points
    if not re.fullmatch(r"[0-9.eE+-]+", parameter) or not _is_number(parameter):
        raise ValueError(f"{where}: {parameter!r} is no number")
    if not re.fullmatch(r"[0-9]+", freq) or int(freq) < 1:
        raise ValueError(f"{where}: updates every {freq!r} steps, expected 1 or more")
    value = float(parameter)
    if method == "ema" and not 0 <= value < 1:
        raise ValueError(f"{where}: gamma {parameter}, expected 0 <= gamma < 1")
    if method == "poly" and not 0 <= value < math.inf:
        raise ValueError(f"{where}: eta {parameter}, expected 0 or more")
    return Averager(name, method, value, int(freq))


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def coefficients_of(config: AveragingConfig) -> tuple[float, ...]:
    """--average-coefficients, or equal ones that sum to 1."""
    paths = config.average or ()
    return config.average_coefficients or (1 / len(paths),) * len(paths)
