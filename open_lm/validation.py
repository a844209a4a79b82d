"""Every --val-data entry of a job evaluated: a line in the log, for people, and in results.jsonl."""

import json
from pathlib import Path
from typing import Any

from torch import nn

from open_lm.averaging import Average, averaged
from open_lm.config.averaging import NONE, coefficients_of
from open_lm.config.redact import redact, redacted
from open_lm.config.schedule import Schedule
from open_lm.data.errors import DataError
from open_lm.data.loader import ValData
from open_lm.data.remote import is_local
from open_lm.eval.perplexity import evaluate
from open_lm.job import Job
from open_lm.log import Log, jsonable, logger
from open_lm.log.lines import read_lines
from open_lm.metrics import Progress


def evaluate_all(
    job: Job, model: nn.Module, log: Log, progress: Progress, path: str, average: str = NONE
) -> None:
    """Each --val-data entry by itself: to the log, and to results.jsonl beside the checkpoint at `path`.

    `average` names what `model` holds: metrics of an average are `valid/NAME/…`, apart from `valid/…`.
    """
    for val_data in job.val_data:
        result = evaluate(
            model,
            val_data,
            batch_sequences=job.val_batch_sequences,
            world=job.world,
            precision=job.run.optim.precision,
            config=job.run.eval,
        )
        limit, skipped = job.run.data.bad_sample_limit, result["skipped_sequences"]
        if limit is not None and skipped > limit:
            raise DataError(
                f"--bad-sample-limit {limit}: --val-data {redact(val_data.entry)} has {skipped} bad samples"
            )
        result["train_tokens"] = progress.tokens
        facts: dict[str, Any] = {
            "val_name": val_data.name,
            "checkpoint_path": path,
            "model": job.run.model.model,
            "average": average,
        }
        if job.start and job.start.soup and job.schedule is None:
            facts["average"] = "soup"
            coefficients = coefficients_of(job.run.averaging)
            facts["soup"] = [
                list(term) for term in zip(job.run.averaging.average or (), coefficients, strict=True)
            ]
        prefix = "valid" if average == NONE else f"valid/{average}"
        prefix += f"/{val_data.name}" if len(job.val_data) > 1 else ""
        entry: dict[str, Any] = {"tokens": progress.tokens, "val_data": redact(val_data.entry), **facts}
        entry |= {f"{prefix}/{name}": value for name, value in result.items()}
        log.metrics(entry, progress.step)
        if job.world.rank == 0:
            logger.info(("" if average == NONE else f"{average}: ") + describe_result(val_data, result))
            append_result(
                results_path(job, path),
                {"step": progress.step, "val_data": [redact(val_data.entry)], **facts, **result},
            )


def evaluate_average(
    job: Job, model: nn.Module, average: Average, log: Log, progress: Progress, path: str
) -> None:
    """`evaluate_all` with the averaged weights."""
    with averaged(model, average):
        evaluate_all(job, model, log, progress, path, average.name)


def find_owed_evaluation(job: Job, schedule: Schedule, step: int) -> int | None:
    """The interval that ended at `step`, where the run was killed between its checkpoint and its evaluation, or
    --val-data has entries that results.jsonl lacks there; None if nothing is owed. For rank 0; None elsewhere."""
    folder = job.folder / "checkpoints"
    if not job.val_data or job.world.rank or job.start is None or not job.start.lies_in(folder):
        return None
    interval = schedule.interval_of(step - 1)
    last = step >= schedule.end_step
    if not last and (step != schedule.interval_end(interval) or interval % job.run.eval.val_frequency):
        return None
    lines = read_lines(folder / "results.jsonl")
    done = {redact(entry) for line in lines if line.get("step") == step for entry in line.get("val_data", ())}
    return interval if {redact(val_data.entry) for val_data in job.val_data} - done else None


def describe_result(val_data: ValData, result: dict[str, Any]) -> str:
    """A log line for people."""
    entry = redact(val_data.entry)
    parts = [f"{val_data.name}, {entry}" if val_data.name else entry]
    parts[0] += f": loss {result['loss']:.6f}"
    for kind in ("sequences", "tokens"):
        if f"loss_{kind}_lower_95" in result:
            ends = (result[f"loss_{kind}_{end}_95"] for end in ("lower", "upper"))
            parts.append("95 % over {} {:.6f} … {:.6f}".format(kind, *ends))
    parts += [f"perplexity {result['perplexity']:.4f}", f"{result['tokens']:,} tokens"]
    if result.get("dropped_share"):
        parts.append(f"dropped {result['dropped_share']:.1%}")
    return " | ".join(parts)


def results_path(job: Job, checkpoint_path: str) -> Path:
    """results.jsonl beside the checkpoint; in the run's folder where that is remote: it cannot be appended to."""
    folder = Path(checkpoint_path).parent if is_local(checkpoint_path) else job.folder / "checkpoints"
    return folder / "results.jsonl"


def append_result(path: Path, entry: dict[str, Any]) -> None:
    """A line in results.jsonl, by open_lm's names; only a warning where that is read-only."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(redacted(jsonable(entry))) + "\n")
    except OSError as error:
        logger.warning("results.jsonl could not be written (log.jsonl holds the metrics): %s", error)
