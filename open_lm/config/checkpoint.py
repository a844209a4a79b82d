"""What is saved and what a run starts from."""

from dataclasses import dataclass


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints: LOGS/NAME/checkpoints/{epoch_N.pt, optimizer_N.pt, stats_N.pt}."""

    resume: str | None = None
    """Continue from this epoch_N.pt, or `latest`: the newest of this run's folder if any."""

    pretrained: str | None = None
    """Start a new run from these weights: epoch_N.pt, a bare state dict, or .safetensors."""

    save_frequency: int = 1
    """Save every Nth interval; the last one is always saved. 0: only the last."""
