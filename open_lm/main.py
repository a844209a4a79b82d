"""`torchrun … -m open_lm.main`: parse, set up, train or evaluate. The only place that knows the whole.

python -m open_lm.main --help
"""

import json
import logging
import os
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn

from open_lm import checkpoint
from open_lm.config.check import check, trains
from open_lm.config.model import ModelConfig
from open_lm.config.parse import flag_values, parse
from open_lm.config.resolve import reconcile, resolve_model
from open_lm.config.run import RunConfig
from open_lm.config.schedule import Batch, Schedule, divide_batch, plan_steps
from open_lm.data.loader import TrainData, ValData
from open_lm.eval.perplexity import evaluate
from open_lm.log import Log, logger
from open_lm.model import count_parameters
from open_lm.nn.attention import load_xformers
from open_lm.optim import LossScale, make_optimizer
from open_lm.parallel import mesh
from open_lm.parallel.gather import on_first_rank
from open_lm.parallel.mesh import World
from open_lm.parallel.plan import parallelize
from open_lm.train import Progress, train


@dataclass(frozen=True)
class Job:
    """A run whose flags, model, data and checkpoint have been found to agree."""

    run: RunConfig
    config: ModelConfig
    world: World
    batch: Batch
    val_batch_sequences: int
    """Sequences per rank and forward pass in evaluation."""
    folder: Path
    start_from: str | None
    """The checkpoint of --resume or --pretrained."""
    schedule: Schedule | None
    """None: evaluate and stop."""
    train_data: TrainData | None
    val_data: tuple[ValData, ...]
    notes: tuple[str, ...]
    """Warnings and decisions to show once logging has begun."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs what the command line says. A contradiction in it ends the process: one message, status 2."""
    with refusing():
        run, given = parse(sys.argv[1:] if arguments is None else arguments)
        notes = check(run, given)
        config = resolve_model(run.model, run.moe, given)
        divide_batch(run.optim, int(os.environ.get("WORLD_SIZE", "1")))
        world = mesh.start(run.distributed)
    try:
        with refusing():
            job = prepare(run, config, given, world, notes)
        execute(job)
    finally:
        mesh.stop()


@contextmanager
def refusing() -> Iterator[None]:
    """Turns an error in flags or files, met before any work, into one message and exit status 2."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        if int(os.environ.get("RANK", "0")) == 0:
            print(f"open_lm.main: error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None


def prepare(
    run: RunConfig, config: ModelConfig, given: Collection[str], world: World, notes: Sequence[str]
) -> Job:
    """Opens everything that the flags name and raises ValueError on any contradiction, before any work."""
    batch = divide_batch(run.optim, world.world_size)
    folder = mesh.broadcast_object(Path(run.log.logs) / (run.log.name or default_name(run, batch)))
    start_from = mesh.broadcast_object(on_first_rank(lambda: find_start(run, folder)))
    notes = list(notes)
    if start_from is not None:
        saved = checkpoint.read_model_config(start_from)
        if saved is not None:
            config, taken = reconcile(config, saved, given, start_from)
            notes += taken
    if config.attn_name.startswith("xformers"):
        load_xformers(world.device)
    val_batch = run.eval.global_val_batch_size or batch.rank_sequences * world.world_size
    if val_batch % world.world_size:
        raise ValueError(f"--global-val-batch-size {val_batch} is not divisible by {world.world_size} ranks")
    schedule = train_data = None
    if trains(run):
        schedule = plan_steps(run.data, run.optim, batch.global_sequences, config.seq_len)
        train_data = TrainData(
            run.data,
            seq_len=config.seq_len,
            vocab_size=config.vocab_size,
            rank=world.rank,
            world_size=world.world_size,
            global_batch=batch.global_sequences,
            seed=run.optim.seed,
        )
        train_data.check_enough(schedule.end_step)
    entries = run.eval.val_data or ()
    keys = run.eval.val_data_key or (run.data.data_key,) * len(entries)
    val_data = tuple(
        ValData(
            entry,
            key,
            seq_len=config.seq_len,
            vocab_size=config.vocab_size,
            max_tokens=run.eval.val_num_samples,
            ignore_parse_errors=run.data.ignore_parse_errors,
            workers=run.data.workers,
        )
        for entry, key in zip(entries, keys, strict=True)
    )
    return Job(
        run=run,
        config=config,
        world=world,
        batch=batch,
        val_batch_sequences=val_batch // world.world_size,
        folder=folder,
        start_from=start_from,
        schedule=schedule,
        train_data=train_data,
        val_data=val_data,
        notes=tuple(notes),
    )


def default_name(run: RunConfig, batch: Batch) -> str:
    """open_lm's name of a run that was given none."""
    date = datetime.now().strftime("%Y_%m_%d-%H_%M_%S")
    return f"{date}-model_{Path(run.model.model).stem}-lr_{run.optim.lr}-b_{batch.rank_sequences}"


def find_start(run: RunConfig, folder: Path) -> str | None:
    """The checkpoint to start from. Raises ValueError where it, or the run's folder, does not fit."""
    resume = run.checkpoint.resume
    if resume == "latest":
        newest = checkpoint.latest(folder / "checkpoints")
        if newest is None and not trains(run):
            raise ValueError(f"--resume latest: no checkpoint in {folder / 'checkpoints'}")
        return None if newest is None else str(newest)
    path = resume or run.checkpoint.pretrained
    if path is not None and not Path(path).is_file():
        raise ValueError(f"{'--resume' if resume else '--pretrained'} {path}: no such file")
    continues_here = resume is not None and Path(resume).resolve().is_relative_to(folder.resolve())
    if (folder / "out.log").exists() and trains(run) and not continues_here:
        raise ValueError(
            f"{folder} already holds a run: give another --name, or --resume latest to continue it"
        )
    return path


def execute(job: Job) -> None:
    """Trains, or evaluates once, with a log open."""
    run, world = job.run, job.world
    log = Log(job.folder, rank=world.rank, local=run.log.log_local, debug=run.log.debug)
    flags = flag_values(run)
    total, active = count_parameters(job.config)
    try:
        log.describe(
            flags,
            parameters=total,
            active_parameters=active,
            world_size=world.world_size,
            device=device_name(world.device),
            torch=torch.__version__,
        )
        if "tensorboard" in run.log.report_to or "all" in run.log.report_to:
            log.add_tensorboard()
        if "wandb" in run.log.report_to or "all" in run.log.report_to:
            log.add_wandb(run.log.wandb_project_name, run.log.wandb_notes, flags)
        for note in job.notes:
            logger.warning(note)
        logger.info(
            f"{job.folder} | {run.model.model}: {total:,} parameters, {active:,} active | "
            f"{world.world_size} rank{'s' * (world.world_size > 1)} on {device_name(world.device)}"
        )
        model = parallelize(
            job.config,
            world=world,
            distributed=run.distributed,
            precision=run.optim.precision,
            seed=run.optim.seed,
            grad_checkpointing=run.model.grad_checkpointing,
            torchcompile=run.model.torchcompile,
            meta=not run.model.disable_meta_device,
        )
        if job.schedule is None:
            evaluate_once(job, model, log)
        else:
            train_all(job, job.schedule, model, log)
    finally:
        log.close()


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def evaluate_once(job: Job, model: nn.Module, log: Log) -> None:
    """`--val-data … --resume …` without training data. Results go beside the checkpoint, as open_lm's."""
    assert job.start_from is not None
    with refusing():
        saved = checkpoint.load_weights(job.start_from, model)
    progress = Progress(step=saved.get("step") or 0, tokens=saved.get("tokens") or 0)
    evaluate_all(job, model, log, progress, job.start_from)


def train_all(job: Job, schedule: Schedule, model: nn.Module, log: Log) -> None:
    """The whole run: restore, train, save and evaluate at the end of every interval."""
    run, world, data = job.run, job.world, job.train_data
    assert data is not None
    optimizer = make_optimizer(model, run.optim)
    loss_scale = LossScale() if run.optim.precision in ("amp", "fp16") else None
    progress = Progress()
    if run.checkpoint.pretrained:
        with refusing():
            checkpoint.load_weights(run.checkpoint.pretrained, model)
        logger.info("weights from %s, a new optimizer at step 0", run.checkpoint.pretrained)
    elif job.start_from:
        with refusing():
            state = checkpoint.load_training_state(job.start_from, model, optimizer)
            refuse_changed_data(state["data"], data.fingerprint(), job.start_from)
        progress = Progress(**state["progress"])
        if loss_scale and state["loss_scale"]:
            loss_scale.load_state_dict(state["loss_scale"])
        logger.info("resumed %s at step %d, %d tokens", job.start_from, progress.step, progress.tokens)
    if progress.step >= schedule.end_step:
        logger.info("nothing left to do: %d of %d steps are done", progress.step, schedule.end_step)
        return
    folder = job.folder / "checkpoints"

    def end_interval(n: int) -> None:
        last = progress.step == schedule.end_step
        every = run.checkpoint.save_frequency
        path = folder / f"epoch_{n}.pt"
        if last or (every and n % every == 0):
            state = {
                "name": job.folder.name,
                "step": progress.step,
                "tokens": progress.tokens,
                "progress": progress.to_dict(),
                "loss_scale": loss_scale.state_dict() if loss_scale else None,
                "data": data.fingerprint(),
                "flags": flag_values(run),
            }
            checkpoint.save(folder, n, model=model, optimizer=optimizer, state=state)
            logger.info("saved %s at step %d", path, progress.step)
        if job.val_data and (last or n % run.eval.val_frequency == 0):
            evaluate_all(job, model, log, progress, str(path))

    train(
        model,
        optimizer,
        data.batches(progress.step, schedule.end_step),
        progress,
        config=job.config,
        optim=run.optim,
        schedule=schedule,
        plan=job.batch,
        world=world,
        log=log,
        log_every_n_steps=run.log.log_every_n_steps,
        loss_scale=loss_scale,
        end_interval=end_interval,
    )


def evaluate_all(job: Job, model: nn.Module, log: Log, progress: Progress, path: str) -> None:
    """Each --val-data entry by itself: to the log, and to results.jsonl beside the checkpoint at `path`."""
    for val_data in job.val_data:
        result = evaluate(
            model,
            val_data,
            batch_sequences=job.val_batch_sequences,
            world=job.world,
            precision=job.run.optim.precision,
        )
        entry: dict[str, Any] = {
            "tokens": progress.tokens,
            "val_data": val_data.entry,
            "checkpoint_path": path,
            "model": job.run.model.model,
        }
        entry |= {f"valid/{name}": value for name, value in result.items()}
        log.metrics(entry, progress.step)
        if job.world.rank == 0:
            logger.info(
                "%s: loss %.6f | perplexity %.4f | %s tokens",
                val_data.entry, result["loss"], result["perplexity"], f"{result['tokens']:,}",
            )  # fmt: skip
            append_result(Path(path).parent / "results.jsonl", {"step": progress.step, **entry})


def append_result(path: Path, entry: dict[str, Any]) -> None:
    """A line in results.jsonl; where the checkpoint's folder is read-only, only a warning."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
    except OSError as error:
        logger.warning("%s could not be written: %s", path, error)


def refuse_changed_data(saved: dict[str, Any], current: dict[str, Any], path: str) -> None:
    """Raises ValueError where the run's data differ from the checkpoint's: the order would be another."""
    changed = [
        f"{key}: {saved.get(key)!r} there, {current.get(key)!r} here"
        for key in sorted(saved.keys() | current.keys())
        if saved.get(key) != current.get(key)
    ]
    if changed:
        raise ValueError(
            f"{path} was trained on other data or in another order ({'; '.join(changed)}): "
            "restore the flags, or start a new run with --pretrained"
        )


if __name__ == "__main__":
    logging.captureWarnings(True)
    main()
