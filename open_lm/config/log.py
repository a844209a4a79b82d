"""What a run writes besides checkpoints."""

from dataclasses import dataclass


@dataclass(frozen=True)
class LogConfig:
    """Logging. A run writes LOGS/NAME/{out.log, log.jsonl, params.txt, checkpoints/, tensorboard/}."""

    logs: str = "./logs/"
    """Folder that holds the runs' folders."""

    name: str | None = None
    """The run's folder. Default: date, model, learning rate and batch size."""

    log_local: bool = False
    """Every rank writes a log of its own, out-RANK.log; otherwise rank 0 alone logs."""

    log_every_n_steps: int = 100
    """Steps between log lines."""

    report_to: str = ""
    """wandb, tensorboard, both with a comma, or all."""

    wandb_notes: str = ""
    """Notes shown with the wandb run."""

    wandb_project_name: str = "open-lm"
    """wandb project."""

    debug: bool = False
    """Log more."""

    log_logit_mean: bool = False
    """Log the mean of all logits."""

    copy_codebase: bool = False
    """Copy the code that runs into LOGS/NAME/code."""
