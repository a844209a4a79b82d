"""What a run starts from: --resume, --pretrained or --average, found and fetched. For rank 0."""

import atexit
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from open_lm import checkpoint
from open_lm.checkpoint.bring import bring_named, fetch, newest
from open_lm.checkpoint.files import set_aside
from open_lm.checkpoint.remote import CHECKPOINTS, RemoteFolder
from open_lm.config.averaging import Averager
from open_lm.config.check import trains
from open_lm.config.resolve import RUNTIME_FIELDS, flatten
from open_lm.config.run import RunConfig
from open_lm.data.remote import is_local


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

    def lies_in(self, folder: Path) -> bool:
        """Whether the file is one of this folder's, however both are written."""
        return Path(self.file).resolve().parent == folder.resolve()

    def discard(self) -> None:
        """Removes what was fetched for the start alone."""
        if self.fetched_to:
            shutil.rmtree(self.fetched_to, ignore_errors=True)


def remote_folder(run: RunConfig, folder: Path) -> RemoteFolder | None:
    """The run's folder behind --remote-sync."""
    url = run.checkpoint.remote_sync
    return RemoteFolder(f"{url.rstrip('/')}/{folder.name}") if url else None


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
            file = bring_named(remote, folder, file.name)
        elif not is_local(name):
            fetched_to = temporary_folder()
            file = fetch(name, Path(fetched_to), resumes=whole, averages=bool(averagers) and not training)
        if file is None or not file.exists():
            raise ValueError(f"{flag} {name}: no such file")
    try:
        state = checkpoint.read_state(file) if whole else None
    except ValueError as error:
        raise ValueError(str(error) if resumes else f"--load-pretrained-state: {error}") from error
    if not training:
        find_averages(str(file), averagers)
    config = checkpoint.read_model_config(file)
    averages = checkpoint.averages_of_state(file) if whole else ()
    return Start(name, str(file), config, state, averages, fetched_to)


def find_latest(folder: Path, remote: RemoteFolder | None) -> tuple[Path | None, str]:
    """The run's newest complete checkpoint and where it comes from: here, or fetched from --remote-sync."""
    here = checkpoint.latest(folder / "checkpoints")
    if remote is not None:
        step = -1 if here is None else checkpoint.read_step(here)
        if there := newest(remote, folder, than=step):
            return there, f"{remote.url}/{CHECKPOINTS}{there.name}"
    return here, str(here)


def leave_later(run: RunConfig, folder: Path, start: Start | None) -> list[str]:
    """Where a run goes back to an older state of its own, moves aside what it did after it, here and there: else
    that would be its newest state. Nothing is deleted. For the owner of the folder; what there is to say.
    """
    checkpoints = folder / "checkpoints"
    if start is None or start.state is None or run.checkpoint.resume == "latest":
        return []
    if not start.lies_in(checkpoints):
        return []
    step, remote = start.state["step"], remote_folder(run, folder)
    # there first: killed in between, what is here is still the newest, and is copied there again
    places = [remote.set_aside(step) if remote else None, set_aside(checkpoints, step)]
    return [
        f"--resume {start.name}: what this run had saved after step {step} is abandoned, and was moved to {place}"
        for place in places
        if place
    ]


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
    averages = bool(averagers) and not trains(run)
    fetched_to = None if all(map(is_local, paths)) else temporary_folder()
    files = [
        path
        if is_local(path)
        else str(
            fetch(path, Path(str(fetched_to), str(number)), resumes=False, averages=averages and not number)
        )
        for number, path in enumerate(paths)
    ]
    for path, file in zip(paths, files, strict=True):
        if not Path(file).exists():
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
        if checkpoint.is_state(Path(path)):
            if averager.name not in checkpoint.averages_of_state(path):
                raise ValueError(f"--averagers {averager.name}: {path} was saved without it")
            continue
        file = checkpoint.path_of_average(Path(path), averager.name)
        if not file.is_file():
            raise ValueError(f"--averagers {averager.name}: {path} was saved without it, there is no {file}")
