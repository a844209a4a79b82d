"""Averages of weights: along one run, and over checkpoints."""

from dataclasses import dataclass


@dataclass(frozen=True)
class AveragingConfig:
    """Weight averaging."""

    averagers: str | None = None
    """Averages kept beside the weights, with commas: ema_GAMMA_FREQ, poly_ETA_FREQ (FREQ: steps per update)."""

    log_avg_model_training_loss: int = 0
    """Every N steps also log the averaged weights' loss on that step's batch; 0: never."""

    average: tuple[str, ...] | None = None
    """Start from, or evaluate, the weighted sum of these checkpoints' weights (a model soup)."""

    average_coefficients: tuple[float, ...] | None = None
    """A weight per --average checkpoint. Default: equal ones."""
