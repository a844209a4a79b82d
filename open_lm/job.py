"""`Job`: a run whose flags, model, data and checkpoint have been found to agree, before any work."""

import atexit
import os
import shutil
import tempfile
import warnings
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from open_lm import checkpoint
from open_lm.checkpoint.remote import CHECKPOINTS, RemoteFolder, bring, fetch, newest
from open_lm.config.averaging import Averager, parse_averagers
from open_lm.config.check import trains
from open_lm.config.model import ModelConfig
from open_lm.config.resolve import RUNTIME_FIELDS, check_model, flatten, reconcile
from open_lm.config.run import RunConfig
from open_lm.config.schedule import Batch, Schedule, divide_batch, plan_steps
from open_lm.data.cache import find_cache
from open_lm.data.loader import TrainData, ValData
from open_lm.data.masks import find_masks
from open_lm.data.names import name_entries
from open_lm.data.remote import is_local
from open_lm.log.owner import refuse_owned
from open_lm.moe.backends import select
from open_lm.moe.notes import notes as notes_on_experts
from open_lm.nn.attention import load_xformers
from open_lm.parallel import mesh
from open_lm.parallel.gather import on_first_rank
from open_lm.parallel.mesh import World


@dataclass(frozen=True)
class Start:
    """The checkpoint that a run begins with, as rank 0 has read it: other hosts need not see its files."""

    name: str
    """The path or URL, for people."""
    file: str
    """Where rank 0 reads it."""
    model_config: dict[str, Any] | None
    state: dict[str, Any] | None
    """What `checkpoint.save` was given, if the run goes on with it; None: weights alone."""
    averages: tuple[str, ...] = ()
    """The averages saved with it."""
    fetched_to: str | None = None
    """A temporary folder that holds the file."""
    soup: tuple[str, ...] = ()
    """Where rank 0 reads the checkpoints of --average."""

    def discard(self) -> None:
        """Removes what was fetched for the start alone."""
        if self.fetched_to:
            shutil.rmtree(self.fetched_to, ignore_errors=True)


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


def prepare(
    run: RunConfig, config: ModelConfig, given: Collection[str], world: World, notes: Sequence[str]
) -> Job:
    """Opens everything that the flags name and raises ValueError on any contradiction, before any work."""
    batch = divide_batch(run.optim, world.world_size)
    folder = Path(run.log.logs) / (run.log.name or mesh.agreed_name(default_name(run, batch)))
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
        )
        if start is not None and start.state is not None:
            notes += refuse_changed_run(run, train_data, start.state, start.name)
        train_data.check_enough(schedule.end_step)
        if start is not None and start.state is not None:
            if Path(start.file).parent == folder / "checkpoints":
                refuse_other_intervals(run, start)
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


def remote_folder(run: RunConfig, folder: Path) -> RemoteFolder | None:
    """The run's folder behind --remote-sync."""
    url = run.checkpoint.remote_sync
    return RemoteFolder(f"{url.rstrip('/')}/{folder.name}") if url else None


def look_around(
    run: RunConfig, folder: Path, averagers: Sequence[Averager]
) -> tuple[Start | None, tuple[str, ...]]:
    """What the run starts from, and what there is to warn of; the run's folder can be written to. For rank 0."""
    refuse_owned(folder)
    is_new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--logs {run.log.logs}: {folder} cannot be made: {error.strerror}") from error
    if not os.access(folder, os.W_OK):
        raise ValueError(f"--logs {run.log.logs}: {folder} cannot be written to")
    if is_new:  # what is refused leaves nothing behind
        folder.rmdir()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        start = find_start(run, folder, averagers) or find_soup(run, averagers)
    return start, tuple(str(warning.message) for warning in caught)


def find_start(run: RunConfig, folder: Path, averagers: Sequence[Averager]) -> Start | None:
    """The checkpoint to start from, fetched where it is remote. For rank 0.

    Raises ValueError where it, the run's folder or --remote-sync does not fit; OSError and ImportError too.
    """
    remote, training = remote_folder(run, folder), trains(run)
    if remote is not None and training:
        remote.check_writable(folder)
    options = run.checkpoint
    file, name, flag, fetched_to = None, options.resume, "--resume", None
    if name == "latest":
        file, found = find_latest(folder, remote)
        name = None if file is None else found
        if file is None and not training:
            there = f" or {remote.url}" if remote else ""
            raise ValueError(f"--resume latest: no checkpoint in {folder / 'checkpoints'}{there}")
    else:
        refuse_other_run(run, folder, remote)
    resumes = name is not None
    if not resumes:
        name, flag = options.pretrained, "--pretrained"
    if name is None:
        return None
    whole = training and (resumes or options.load_pretrained_state)
    if file is None:
        file = Path(name)
        if resumes and remote and name.startswith(f"{remote.url}/{CHECKPOINTS}"):
            file = bring(remote, folder, file.stem.removeprefix("epoch_"))
        elif not is_local(name):
            fetched_to = temporary_folder()
            file = fetch(name, Path(fetched_to), whole=whole or bool(averagers))
        if file is None or not file.is_file():
            raise ValueError(f"{flag} {name}: no such file")
    try:
        state = checkpoint.read_state(file) if whole else None
    except ValueError as error:
        raise ValueError(str(error) if resumes else f"--load-pretrained-state: {error}") from error
    if not training:
        find_averages(str(file), averagers)
    config = checkpoint.read_model_config(file)
    return Start(name, str(file), config, state, checkpoint.saved_averages(file) if whole else (), fetched_to)


def find_latest(folder: Path, remote: RemoteFolder | None) -> tuple[Path | None, str]:
    """The run's newest complete checkpoint and where it comes from: here, or fetched from --remote-sync."""
    here = checkpoint.latest(folder / "checkpoints")
    if remote is not None:
        step = -1 if here is None else checkpoint.read_step(here)
        if there := newest(remote, folder, than=step):
            return there, f"{remote.url}/{CHECKPOINTS}{there.name}"
    return here, str(here)


def refuse_other_run(run: RunConfig, folder: Path, remote: RemoteFolder | None) -> None:
    """Raises ValueError where training would begin in a folder, or a remote one, that holds a run already."""
    resume = run.checkpoint.resume
    if not trains(run):
        return
    here = resume is not None and is_local(resume) and Path(resume).resolve().is_relative_to(folder.resolve())
    there = resume is not None and remote is not None and resume.startswith(f"{remote.url}/")
    if here or there:
        return
    taken = str(folder) if (folder / "log.jsonl").exists() else None
    if taken is None and remote is not None and "log.jsonl" in remote.sizes():
        taken = remote.url
    if taken is not None:
        raise ValueError(
            f"{taken} already holds a run: give another --name, or --resume latest to continue it"
        )


def temporary_folder() -> str:
    """For what is fetched for the start alone; removed with the process at the latest."""
    folder = tempfile.mkdtemp(prefix="open_lm-start-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def find_soup(run: RunConfig, averagers: Sequence[Averager]) -> Start | None:
    """The first checkpoint of --average, all fetched where they are remote. For rank 0.

    Raises ValueError where one is missing or of another architecture; OSError and ImportError too.
    """
    paths = run.averaging.average or ()
    if not paths:
        return None
    whole = bool(averagers) and not trains(run)
    fetched_to = None if all(map(is_local, paths)) else temporary_folder()
    files = [
        path
        if is_local(path)
        else str(fetch(path, Path(str(fetched_to), str(number)), whole=whole and not number))
        for number, path in enumerate(paths)
    ]
    for path, file in zip(paths, files, strict=True):
        if not Path(file).is_file():
            raise ValueError(f"--average {path}: no such file")
    configs = zip(paths, map(checkpoint.read_model_config, files), strict=True)
    saved = {path: config for path, config in configs if config}
    for path, config in saved.items():
        first, expected = next(iter(saved.items()))
        there, here = flatten(config), flatten(expected)
        differ = [k for k in here if k not in RUNTIME_FIELDS and there.get(k, here[k]) != here[k]]
        if differ:
            values = "; ".join(f"{key}: {here[key]} and {there[key]}" for key in differ)
            raise ValueError(f"--average {first} {path}: not of one architecture ({values})")
    if not trains(run):
        find_averages(files[0], averagers)
    config = checkpoint.read_model_config(files[0])
    return Start(paths[0], files[0], config, None, fetched_to=fetched_to, soup=tuple(files))


def find_averages(path: str, averagers: Sequence[Averager]) -> None:
    """Raises ValueError where an average to evaluate has no file beside the checkpoint at `path`."""
    for averager in averagers:
        file = checkpoint.path_of_average(Path(path), averager.name)
        if not file.is_file():
            raise ValueError(f"--averagers {averager.name}: {path} was saved without it, there is no {file}")


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
