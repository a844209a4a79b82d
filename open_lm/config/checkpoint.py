"""What is saved and what a run starts from."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints: LOGS/NAME/checkpoints/{epoch_N.pt, optimizer_N.pt, stats_N.pt}."""

    resume: str | None = None
    """Continue from this epoch_N.pt, or `latest`: the newest of this run's folder if any."""

    pretrained: str | None = None
    """Start a new run from these weights: epoch_N.pt, a bare state dict, or .safetensors."""

    save_frequency: int = 1
    """Save every Nth interval; the last one is always saved. 0: only the last."""

    load_pretrained_state: bool = False
    """--pretrained: go on with its optimizer, schedule and data too, in this run's own folder."""

    save_most_recent: bool = False
    """After every interval, also those that --save-frequency leaves out: epoch_latest.pt, replaced each time."""

    delete_previous_checkpoint: bool = False
    """Once a checkpoint is complete (and, with --remote-sync, copied), delete the one before it."""

    remote_sync: str | None = None
    """Copy the run's folder to URL/NAME (s3://, or anything fsspec knows, a path too) while training goes on."""

    remote_sync_frequency: int = 300
    """Seconds between two copies to --remote-sync; a new checkpoint is copied at once."""

    remote_sync_protocol: Literal["s3", "fsspec"] = "s3"
    """Accepted: both go through fsspec."""
