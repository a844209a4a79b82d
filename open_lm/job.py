"""`Job`: a run whose flags, model, data and checkpoint have been found to agree, before any work."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from open_lm import checkpoint
from open_lm.config.averaging import Averager, parse_averagers
from open_lm.config.check import trains
from open_lm.config.model import ModelConfig
from open_lm.config.resolve import RUNTIME_FIELDS, flatten, reconcile
from open_lm.config.run import RunConfig
from open_lm.config.schedule import Batch, Schedule, divide_batch, plan_steps
from open_lm.data.loader import TrainData, ValData
from open_lm.data.masks import find_masks
from open_lm.data.names import name_entries
from open_lm.nn.attention import load_xformers
from open_lm.parallel import mesh
from open_lm.parallel.gather import on_first_rank
from open_lm.parallel.mesh import World


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
    start_from: str | None
    """The checkpoint of --resume or --pretrained; the first of --average."""
    schedule: Schedule | None
    """None: evaluate and stop."""
    train_data: TrainData | None
    averagers: tuple[Averager, ...]
    val_data: tuple[ValData, ...]
    notes: tuple[str, ...]
    """Warnings and decisions to show once logging has begun."""


def prepare(
    run: RunConfig, config: ModelConfig, given: Collection[str], world: World, notes: Sequence[str]
) -> Job:
    """Opens everything that the flags name and raises ValueError on any contradiction, before any work."""
    batch = divide_batch(run.optim, world.world_size)
    folder = mesh.broadcast_object(Path(run.log.logs) / (run.log.name or default_name(run, batch)))
    start_from = mesh.broadcast_object(on_first_rank(lambda: find_start(run, folder) or find_soup(run)))
    averagers = parse_averagers(run.averaging.averagers)
    if start_from is not None and not trains(run):
        on_first_rank(lambda: find_averages(start_from, averagers))
    notes = [*notes, *world.notes]
    if start_from is not None:
        saved = checkpoint.read_model_config(start_from)
        if saved is not None:
            config, taken = reconcile(config, saved, given, start_from)
            notes += taken
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
        )
        train_data.check_enough(schedule.end_step)
        if start_from is not None and run.checkpoint.resume:
            refuse_changed_run(run, train_data.fingerprint(), start_from)
            dropped = set(checkpoint.saved_averages(Path(start_from))) - {a.name for a in averagers}
            notes += [
                f"{start_from} holds the average {n}: without --averagers {n} it ends here" for n in dropped
            ]
        if run.optim.warmup >= schedule.total_steps and not run.optim.skip_scheduler:
            notes.append(
                f"--warmup {run.optim.warmup}: --lr {run.optim.lr} is never reached in {schedule.total_steps} steps"
            )
    entries = run.eval.val_data or ()
    keys = run.eval.val_data_key or (run.data.data_key,) * len(entries)
    names = run.eval.val_data_name or (name_entries(entries) if len(entries) > 1 else (None,) * len(entries))
    masks = find_masks(run.data, config.vocab_size)
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
        start_from=start_from,
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
    if (folder / "log.jsonl").exists() and trains(run) and not continues_here:
        raise ValueError(
            f"{folder} already holds a run: give another --name, or --resume latest to continue it"
        )
    return path


def find_soup(run: RunConfig) -> str | None:
    """The first checkpoint of --average. Raises ValueError where one is missing or of another architecture."""
    paths = run.averaging.average or ()
    for path in paths:
        if not Path(path).is_file():
            raise ValueError(f"--average {path}: no such file")
    saved = {path: config for path in paths if (config := checkpoint.read_model_config(path))}
    for path, config in saved.items():
        first, expected = next(iter(saved.items()))
        there, here = flatten(config), flatten(expected)
        differ = [k for k in here if k not in RUNTIME_FIELDS and there.get(k, here[k]) != here[k]]
        if differ:
            values = "; ".join(f"{key}: {here[key]} and {there[key]}" for key in differ)
            raise ValueError(f"--average {first} {path}: not of one architecture ({values})")
    return paths[0] if paths else None


def find_averages(path: str, averagers: Sequence[Averager]) -> None:
    """Raises ValueError where an average to evaluate has no file beside the checkpoint at `path`."""
    for averager in averagers:
        file = checkpoint.path_of_average(Path(path), averager.name)
        if not file.is_file():
            raise ValueError(f"--averagers {averager.name}: {path} was saved without it, there is no {file}")


def refuse_changed_run(run: RunConfig, fingerprint: dict[str, Any], path: str) -> None:
    """Raises ValueError where the data, their order or the weights' dtype are not those of the checkpoint."""
    state = checkpoint.read_state(path)
    saved = state["data"]
    changed = [
        f"{key}: {saved.get(key)!r} there, {fingerprint.get(key)!r} here"
        for key in sorted(saved.keys() | fingerprint.keys())
        if saved.get(key) != fingerprint.get(key)
    ]
    if changed:
        raise ValueError(
            f"{path} was trained on other data or in another order ({'; '.join(changed)}): "
            "restore the flags, or start a new run with --pretrained"
        )
    precision = state["flags"]["precision"]
    if (precision == "bf16") != (run.optim.precision == "bf16"):
        raise ValueError(
            f"--precision {run.optim.precision}, but {path} was trained with {precision}: weights and moments "
            "have another dtype; use its value, or start a new run with --pretrained"
        )
