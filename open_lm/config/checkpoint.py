"""What is saved and what a run starts from."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints: LOGS/NAME/checkpoints/{epoch_N.pt, optimizer_N.pt, stats_N.pt}."""

    resume: str | None = None
    """Continue from this epoch_N.pt (a path, or a URL such as s3://…), or `latest`: the newest of this run's
    folder or its --remote-sync copy, if any."""

    pretrained: str | None = None
    """Start a new run from these weights (path or URL): epoch_N.pt, a bare state dict, or .safetensors."""

    resume_changed: bool = False
    """Resume although the data or the batch are others than the checkpoint's: the list of differences is then a
    warning. Sources that are still the same go on where they were."""

    save_frequency: int = 1
    """Save every Nth interval; the last one is always saved. 0: only the last."""

    load_pretrained_state: bool = False
    """--pretrained: go on with its optimizer, step of the schedule and place in the data too, in this run's own
    folder. Needs optimizer_N.pt and stats_N.pt beside it, and the same data."""

    save_most_recent: bool = False
    """After every interval, also those that --save-frequency leaves out: epoch_latest.pt (and companions),
    replaced each time."""

    delete_previous_checkpoint: bool = False
    """Once an epoch_N.pt is complete (and, with --remote-sync, copied), delete the run's one before it, here and
    there. Those that were there when the run was started are kept, but for the one it goes on from."""

    remote_sync: str | None = None
    """Copy the run's folder to this URL/NAME (s3://, anything fsspec knows, a path) while training goes on. A
    URL that cannot be written to ends the run before any work, a later failure is a warning and tried again;
    the run waits up to 30 minutes for its last copy, and ends with status 3 where that failed."""

    remote_sync_frequency: int = 300
    """Seconds between two copies of what is new to --remote-sync; a new checkpoint is copied at once."""

    remote_sync_protocol: Literal["s3", "fsspec"] = "s3"
    """Accepted: both go through fsspec."""
