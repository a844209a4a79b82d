"""What a run writes besides checkpoints."""

from dataclasses import dataclass


@dataclass(frozen=True)
class LogConfig:
    """Logging. A run writes LOGS/NAME/{out.log, log.jsonl, params.txt, config.yaml, checkpoints/, tensorboard/}.

    `--config LOGS/NAME/config.yaml --name OTHER` trains the same run again; where a resumed run has other flags
    it writes config-2.yaml and params-2.txt beside the first ones.
    """

    logs: str = "./logs/"
    """Folder that holds the runs' folders."""

    name: str | None = None
    """The run's folder. Default: date, model, learning rate and batch size."""

    log_local: bool = False
    """Every rank writes a log of its own, out-RANK.log; otherwise rank 0 alone logs."""

    log_every_n_steps: int = 100
    """Steps between log lines."""

    report_to: str = ""
    """wandb, tensorboard, both with a comma, or all. A server that fails or hangs never stops a run: without a
    key or an answer wandb logs offline. A resumed run goes on in its own curves."""

    wandb_notes: str = ""
    """Notes shown with the wandb run."""

    wandb_project_name: str = "open-lm"
    """wandb project. The run's id is kept in LOGS/NAME/wandb/run_id; $WANDB_RUN_ID goes before it."""

    debug: bool = False
    """Log lines of level DEBUG too, with where they come from: every parameter's shape and dtype, every line
    of metrics. (No wandb.watch.)"""

    log_logit_mean: bool = False
    """Log the mean of all logits."""

    copy_codebase: bool = False
    """Copy the code that runs into LOGS/NAME/code as a record (the run does not execute it there): the package,
    in a checkout all that git does not ignore, with COMMIT and changes.diff. Files over 1 MB are left out; a
    resumed run whose code differs writes code-2."""

    @property
    def targets(self) -> set[str]:
        """Which of `wandb` and `tensorboard` are asked for."""
        names = {name.strip() for name in self.report_to.split(",") if name.strip()}
        return {"wandb", "tensorboard"} if "all" in names else names
