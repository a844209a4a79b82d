"""What is saved and what a run starts from."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints: LOGS/NAME/checkpoints/step_S/ (all of the state after step S) and epoch_N.pt (whole weights)."""

    resume: str | None = None
    """Continue from this epoch_N.pt or step_S (a path, or a URL such as s3://…), or `latest`: the newest complete
    one of this run's folder or its --remote-sync copy, if any; damaged ones are passed over with a warning."""

    pretrained: str | None = None
    """Start a new run from these weights (path or URL): epoch_N.pt, a bare state dict, or .safetensors."""

    resume_changed: bool = False
    """Resume although the data or the batch are others than the checkpoint's: the list of differences is then a
    warning. Sources that are still the same go on where they were."""

    save_frequency: int = 1
    """Save every Nth interval; the last one is always saved. 0: only the last."""

    load_pretrained_state: bool = False
    """--pretrained: go on with its optimizer, step of the schedule and place in the data too, in this run's own
    folder. Needs its step_S beside it, and the same data."""

    save_most_recent: bool = False
    """After every interval, also those that --save-frequency leaves out: epoch_latest.pt and its step_S,
    replaced each time."""

    save_every_steps: int | None = None
    """Also save the state (step_S, without an epoch_N.pt) whenever the step is a multiple of this."""

    save_every_tokens: int | None = None
    """Also save the state (step_S) each time another so many tokens have been trained on."""

    save_every_minutes: float | None = None
    """Also save the state (step_S) when so many minutes, of rank 0's clock, have passed since the last save."""

    keep_last_states: int = 2
    """How many states between intervals (of --save-every-steps and the like, of signals) stay; older ones are
    deleted once a newer state is complete."""

    keep_every: int | None = None
    """--delete-previous-checkpoint: keep every Nth epoch_N.pt with its state all the same."""

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
