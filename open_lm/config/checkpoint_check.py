"""Contradictions among the checkpoint flags."""

from open_lm.config.checkpoint import CheckpointConfig


def check_checkpoint(checkpoint: CheckpointConfig, trains: bool) -> None:
    """Raises ValueError on the first contradiction; `trains`: the flags name training data."""
    if checkpoint.save_frequency < 0:
        raise ValueError(f"--save-frequency {checkpoint.save_frequency}: expected 0 or more")
    if checkpoint.remote_sync_frequency < 1:
        raise ValueError(
            f"--remote-sync-frequency {checkpoint.remote_sync_frequency}: expected 1 second or more"
        )
    for name in ("save_every_steps", "save_every_tokens", "save_every_minutes", "keep_every"):
        value = getattr(checkpoint, name)
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"--{name.replace('_', '-')} {value}: expected more than 0")
    if checkpoint.keep_last_states < 1:
        raise ValueError(f"--keep-last-states {checkpoint.keep_last_states}: expected 1 or more")
    if checkpoint.keep_every is not None and not checkpoint.delete_previous_checkpoint:
        raise ValueError(
            f"--keep-every {checkpoint.keep_every} needs --delete-previous-checkpoint: all are kept without it"
        )
    if checkpoint.load_pretrained_state and not checkpoint.pretrained:
        raise ValueError(
            "--load-pretrained-state needs --pretrained (--resume goes on with all state anyway)"
        )
    if checkpoint.load_pretrained_state and not trains:
        raise ValueError("--load-pretrained-state goes on training, but no training data are given")
