"""Checkpoints fetched from behind a URL, whose names and content are another's: judged before they are used."""

import errno
import os
import shutil
import tempfile
import warnings
from contextlib import suppress
from pathlib import Path

from open_lm.checkpoint import state
from open_lm.checkpoint.files import RESULTS, prepare, saved_averages, step_of, temporary
from open_lm.checkpoint.recover import finish
from open_lm.checkpoint.remote import CHECKPOINTS, PARTIAL, TEMPORARY, RemoteFolder
from open_lm.checkpoint.state import DIGESTS, is_state


def newest(remote: RemoteFolder, folder: Path, than: int) -> Path | None:
    """Fetches the complete state of the highest step above `than` into the run's `folder`; its epoch_N.pt, or it.

    None: there is none. What `bring` says holds here too. OSError where there are states and none could be read,
    and `than` is that of none: a run must not begin anew over them.
    """
    unread = []
    for step in remote.states():
        if step <= than:
            return None
        if path := bring(remote, folder, step, unread):
            return path
    if unread and than < 0:
        raise OSError(f"--resume latest: none of the states in {remote.url} can be read; {unread[0]}")
    return None


def bring(remote: RemoteFolder, folder: Path, step: int, unread: list[OSError] | None = None) -> Path | None:
    """Fetches a state into the run's `folder`, complete or not at all, and makes its epoch_N.pt; that, or it.

    None, with a warning: it is damaged there, or absent, or cannot be read (then the error is added to `unread`).
    The run's other files (logs, results) come along, so that they go on here: those that are missing, and logs that
    are longer there. Names that lead elsewhere are left out, with a warning.
    """
    target = state.state_folder(folder / CHECKPOINTS, step)
    waiting, there = state.temporary_folder(target), f"{remote.url}/{CHECKPOINTS}{target.name}"
    prepare(folder / CHECKPOINTS)
    waiting.mkdir()
    try:
        _get_state(remote, f"{CHECKPOINTS}{target.name}", waiting)
        state.verify(waiting)
        state.owe(waiting)
    except (OSError, ValueError) as error:
        shutil.rmtree(waiting)
        if _is_of_this_disk(error):
            raise
        if isinstance(error, OSError) and not isinstance(error, FileNotFoundError) and unread is not None:
            unread.append(error)
        warnings.warn(f"{there} is passed over: {str(error).replace(str(waiting), there)}", stacklevel=3)
        return None
    state.commit(target)
    for name, size in remote.sizes().items():
        if not comes_along(name):
            continue
        local = folder / name
        try:
            if not local.exists() or (local.suffix in (".jsonl", ".log") and local.stat().st_size < size):
                _get(remote, name, local)
        except OSError as error:
            if _is_of_this_disk(error):
                raise
            warnings.warn(f"{remote.url}/{name} is left out: {error}", stacklevel=3)
    return finish(target)


def comes_along(name: str) -> bool:
    """Whether it is one of a run's files beside its checkpoints, as `Sync` names them; warns of what leads out of
    the run's folder."""
    parts = name.split("/")
    if any(part in ("", ".", "..") or not part.isprintable() or "\\" in part for part in parts):
        warnings.warn(
            f"{name!r}, among the run's remote files, is left out: it is no path in its folder", stacklevel=3
        )
        return False
    unfinished = any(part.startswith(".") or part.endswith((TEMPORARY, PARTIAL)) for part in parts)
    return not unfinished and (not name.startswith(CHECKPOINTS) or name == CHECKPOINTS + RESULTS)


def _is_of_this_disk(error: BaseException) -> bool:
    """Full, or read-only: no older state would fit either."""
    at: BaseException | None = error
    while at is not None and getattr(at, "errno", None) not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        at = at.__cause__
    return at is not None


def _get_state(remote: RemoteFolder, name: str, folder: Path) -> None:
    """The files of a state that its digests.json lists, and no others, whatever else lies there. ValueError where
    it is damaged; FileNotFoundError."""
    _get(remote, f"{name}/{DIGESTS}", folder / DIGESTS)
    for each in state.read_digests(folder):
        _get(remote, f"{name}/{each}", folder / each)


def bring_named(remote: RemoteFolder, folder: Path, name: str) -> Path | None:
    """`bring` of epoch_N.pt or step_S of the run's own remote folder. None: it, or its state, is not there."""
    if is_state(Path(name)):
        return bring(remote, folder, int(name.removeprefix("step_")))
    with tempfile.TemporaryDirectory() as temporary_place:
        local = Path(temporary_place, name)
        remote.get(f"{CHECKPOINTS}{name}", local)
        step = step_of(local)
    return None if step is None or step not in remote.states() else bring(remote, folder, step)


def fetch(url: str, folder: Path, *, resumes: bool, averages: bool = False) -> Path:
    """Fetches the checkpoint file, or the state, at `url` into `folder`: with `resumes` epoch_N.pt's state too, and
    with `averages` those saved beside it."""
    parent, _, name = url.rstrip("/").rpartition("/")
    remote = RemoteFolder(parent)
    if is_state(Path(name)):
        return _fetch_state(remote, name, folder)
    _get(remote, name, folder / name)
    if averages:
        label = Path(name).stem.removeprefix("epoch_")
        for average in saved_averages(folder / name):
            with suppress(FileNotFoundError):
                _get(remote, f"{average}_{label}.pt", folder / f"{average}_{label}.pt")
    if resumes and (step := step_of(folder / name)) is not None:
        _fetch_state(remote, f"step_{step}", folder)
    return folder / name


def _fetch_state(remote: RemoteFolder, name: str, folder: Path) -> Path:
    with suppress(FileNotFoundError):  # whoever reads it says so
        _get_state(remote, name, folder / name)
    return folder / name


def _get(remote: RemoteFolder, name: str, local: Path) -> None:
    local.parent.mkdir(parents=True, exist_ok=True)
    remote.get(name, temporary(local))
    os.replace(temporary(local), local)
