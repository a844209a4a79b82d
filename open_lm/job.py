"""`Job`: a run whose flags, model, data and checkpoint have been found to agree, before any work."""

import warnings
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from open_lm.checkpoint import start as starting
from open_lm.checkpoint.start import Start, find_soup, find_start
from open_lm.config.averaging import Averager, parse_averagers
from open_lm.config.check import trains
from open_lm.config.model import ModelConfig
from open_lm.config.parse import changed_flags
from open_lm.config.resolve import check_model, reconcile
from open_lm.config.run import RunConfig
from open_lm.config.schedule import Batch, Schedule, divide_batch, plan_steps
from open_lm.config.survival import refuse_nondeterministic
from open_lm.data.cache import find_cache
from open_lm.data.loader import TrainData, ValData
from open_lm.data.masks import find_masks
from open_lm.data.names import name_entries
from open_lm.log.owner import Owner
from open_lm.moe.backends import select
from open_lm.moe.notes import notes as notes_on_experts
from open_lm.nn.attention import load_xformers
from open_lm.parallel import mesh
from open_lm.parallel.gather import on_first_rank
from open_lm.parallel.mesh import World
from open_lm.parallel.plan import compute_dtype


@dataclass(frozen=True)
class Job:
    """What `main` executes."""

    run: RunConfig
    given: Collection[str]
    """Names of the flags that were given, by the command line or --config."""
    config: ModelConfig
    world: World
    batch: Batch
    val_batch_sequences: int
    """Sequences per rank and forward pass in evaluation."""
    folder: Path
    start: Start | None
    """The checkpoint of --resume or --pretrained; the first of --average."""
    schedule: Schedule | None
    """None: evaluate and stop."""
    train_data: TrainData | None
    averagers: tuple[Averager, ...]
    val_data: tuple[ValData, ...]
    notes: tuple[str, ...]
    """Warnings and decisions to show once logging has begun."""


def folder_of(run: RunConfig, world: World) -> Path:
    """LOGS/NAME, the same on all ranks. Collective."""
    batch = divide_batch(run.optim, world.world_size)
    return Path(run.log.logs) / (run.log.name or mesh.agreed_name(default_name(run, batch)))


def own(run: RunConfig, folder: Path, world: World) -> Owner | None:
    """The run's folder, for this process alone: on rank 0. Before anything in it, or in its remote copy, is looked
    for, fetched or moved. Raises ValueError where another one has it, or it cannot be written to."""
    if not world.is_first:
        return None
    try:
        return Owner(folder)
    except OSError as error:
        verb = "written to" if folder.is_dir() else "made"
        raise ValueError(f"--logs {run.log.logs}: {folder} cannot be {verb}: {error.strerror}") from error


def prepare(
    run: RunConfig,
    config: ModelConfig,
    given: Collection[str],
    world: World,
    folder: Path,
    notes: Sequence[str],
) -> Job:
    """Opens everything that the flags name and raises ValueError on any contradiction, before any work.

    `folder` is the run's, and this process's: `own`.
    """
    batch = divide_batch(run.optim, world.world_size)
    averagers = parse_averagers(run.averaging.averagers)
    # all reading of checkpoints is here: what follows may fail on one rank alone, so it calls no collective
    found = mesh.broadcast_object(on_first_rank(lambda: look_around(run, folder, averagers)))
    start, warned = found or (None, ())
    notes = [*notes, *world.notes, *warned]
    if start is not None and start.model_config is not None:
        config, taken = reconcile(config, start.model_config, given, start.name)
        notes += taken
    else:
        check_model(config, given)
    if config.moe.enabled:
        select(config.moe.backend)
    notes += notes_on_experts(config.moe)
    if world.device.type == "cpu" and compute_dtype(run.distributed, run.optim.precision) == torch.float16:
        notes.append(
            f"--precision {run.optim.precision}: float16 is slow on a CPU; fp32 was ten times as fast on one"
        )
    if run.optim.deterministic:
        refuse_nondeterministic(config)
    if config.attn_name.startswith("xformers"):
        load_xformers(world.device)
    val_batch = run.eval.global_val_batch_size or batch.micro_sequences * world.world_size
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
            end_of_text=config.end_of_text,
            stop=world.watch.stop,
        )
        if start is not None and start.state is not None:
            notes += refuse_changed_run(run, train_data, start.state, start.name)
        train_data.check_enough(schedule.end_step)
        if start is not None and start.state is not None:
            if start.lies_in(folder / "checkpoints"):
                refuse_other_intervals(run, start)
            if changed := changed_flags(run, start.state["flags"]):
                notes.append(f"{start.name} was saved with other flags: {', '.join(changed)}")
            dropped = set(start.averages) - {a.name for a in averagers}
            notes += [
                f"{start.name} holds the average {n}: without --averagers {n} it ends here" for n in dropped
            ]
        if run.optim.warmup >= schedule.total_steps and not run.optim.skip_scheduler:
            notes.append(
                f"--warmup {run.optim.warmup}: --lr {run.optim.lr} is never reached in {schedule.total_steps} steps"
            )
    entries = run.eval.val_data or ()
    keys = run.eval.val_data_key or (run.data.data_key,) * len(entries)
    names = run.eval.val_data_name or (name_entries(entries) if len(entries) > 1 else (None,) * len(entries))
    masks = find_masks(run.data, config.vocab_size, config.end_of_text)
    val_data = tuple(
        ValData(
            entry,
            key,
            seq_len=config.seq_len,
            vocab_size=config.vocab_size,
            max_tokens=run.eval.val_num_samples,
            ignore_parse_errors=run.data.ignore_parse_errors,
            workers=run.data.workers,
            masks=masks,
            cache=find_cache(run.data),
            stop=world.watch.stop,
            name=name,
        )
        for entry, key, name in zip(entries, keys, names, strict=True)
    )
    return Job(
        run=run,
        given=given,
        config=config,
        world=world,
        batch=batch,
        val_batch_sequences=val_batch // world.world_size,
        folder=folder,
        start=start,
        schedule=schedule,
        train_data=train_data,
        averagers=averagers,
        val_data=val_data,
        notes=tuple(notes),
    )


def default_name(run: RunConfig, batch: Batch) -> str:
    """open_lm's name of a run that was given none."""
    date = datetime.now().strftime("%Y_%m_%d-%H_%M_%S")
    return f"{date}-model_{Path(run.model.model).stem}-lr_{run.optim.lr}-b_{batch.rank_sequences}"


def leave_later(job: Job) -> Job:
    """Moves aside what the run had done after an older state of its own that it goes back to, once nothing is
    refused any more."""
    if not job.world.is_first:
        return job
    return replace(job, notes=(*job.notes, *starting.leave_later(job.run, job.folder, job.start)))


def look_around(
    run: RunConfig, folder: Path, averagers: Sequence[Averager]
) -> tuple[Start | None, tuple[str, ...]]:
    """What the run starts from, and what there is to warn of. For rank 0."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = find_start(run, folder, averagers) or find_soup(run, averagers)
    return found, tuple(str(warning.message) for warning in caught)


def refuse_other_intervals(run: RunConfig, start: Start) -> None:
    """Raises ValueError where epoch_N.pt would be another step than it is in the run's folder."""
    assert start.state is not None
    there, here = start.state["flags"]["train_num_samples"], run.data.train_num_samples
    if there != here:
        raise ValueError(
            f"--train-num-samples {here}, but {start.name} was written with {there}: epoch_N.pt would be of "
            "another step, and replace older ones; use its value, or another --name with --pretrained"
        )


def refuse_changed_run(run: RunConfig, data: TrainData, state: dict[str, Any], path: str) -> list[str]:
    """Lets the data go on where the checkpoint's did; warnings of --resume-changed. Raises ValueError where they,
    their order or the weights' dtype are not those of the checkpoint."""
    changed = "; ".join(data.resume(state["data"], state["step"]))
    text = f"{path} was trained on other data or in another order ({changed})"
    if changed and not run.checkpoint.resume_changed:
        raise ValueError(
            f"{text}: restore the flags, start a new run with --pretrained, or go on so with --resume-changed"
        )
    precision = state["flags"]["precision"]
    if (precision == "bf16") != (run.optim.precision == "bf16"):
        raise ValueError(
            f"--precision {run.optim.precision}, but {path} was trained with {precision}: weights and moments "
            "have another dtype; use its value, or start a new run with --pretrained"
        )
    return [f"{text}: it goes on, by --resume-changed"] if changed else []
