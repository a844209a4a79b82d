"""The files of a checkpoint on disk: written atomically, read without executing anything. One process."""

import contextlib
import errno
import os
import re
import shutil
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PARTS = ("optimizer", "stats", "epoch")  # the order of the renames: where the epoch is, the others are
LATEST = "latest"  # the label of --save-most-recent's checkpoint; others are an interval's number
# Every file of a checkpoint: its part (of an average, its name, such as ema_0.99_1) and label.
FILE = re.compile(r"(epoch|optimizer|stats|(?:ema|poly)(?:_[0-9.eE+-]+)*)_(\d+|latest)\.pt")


def paths_of(epoch: Path, averagers: Iterable[str] = ()) -> dict[str, Path]:
    """The files of epoch_N.pt in the order of the renames: averages, optimizer, stats, itself.

    Raises ValueError if it is named otherwise.
    """
    match = FILE.fullmatch(epoch.name)
    if not match or match[1] != "epoch":
        raise ValueError(
            f"{epoch} is not named epoch_N.pt: to start from its weights alone, use --pretrained"
        )
    return {part: epoch.with_name(f"{part}_{match[2]}.pt") for part in (*averagers, *PARTS)}


def all_paths(epoch: Path) -> dict[str, Path]:
    """`paths_of` with the averages that epoch_N.pt was saved with."""
    return paths_of(epoch, saved_averages(epoch))


def saved_averages(epoch: Path) -> tuple[str, ...]:
    """The names of the averages that epoch_N.pt, or its temporary file, was saved with; none if unreadable."""
    try:
        return tuple(read(epoch).get("averagers", ()))
    except (OSError, ValueError):
        return ()


def group(names: Iterable[str]) -> dict[str, list[str]]:
    """{label: its files' names, epoch_N.pt last} of the names that are checkpoints' files, finished ones alone."""
    groups: dict[str, list[str]] = {}
    for name in sorted(names, key=lambda name: name.startswith("epoch_")):
        if match := FILE.fullmatch(name):
            groups.setdefault(match[2], []).append(name)
    return groups


def delete(folder: Path, label: str) -> None:
    """Remove every file of a checkpoint, epoch_N.pt first: what is left of a killed removal is no checkpoint."""
    for name in reversed(group(path.name for path in folder.glob("*.pt")).get(label, [])):
        (folder / name).unlink(missing_ok=True)


def alias(epoch: Path, label: str) -> None:
    """Give a complete checkpoint a second label, atomically; no second copy where the disk has hard links."""
    sources = all_paths(epoch)
    paths = paths_of(epoch.with_name(f"epoch_{label}.pt"), saved_averages(epoch))
    for part, source in sources.items():
        target = temporary(paths[part])
        target.unlink(missing_ok=True)
        try:
            os.link(source, target)
        except OSError:
            shutil.copyfile(source, target)
    replace(paths)


def temporary(path: Path) -> Path:
    """Where `path` is written before it takes its place."""
    return path.with_name(path.name + ".tmp")


def prepare(folder: Path) -> None:
    """Make the folder, and remove what a killed save left in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise OSError(e.errno, f"cannot make the checkpoint folder {folder}: {e.strerror}") from e
    remove_temporaries(folder)


def remove_temporaries(folder: Path) -> None:
    """Remove unfinished files."""
    for path in folder.glob("*_*.pt.tmp"):
        if FILE.fullmatch(path.stem):
            path.unlink(missing_ok=True)


def write(path: Path, content: dict[str, Any]) -> None:
    """To disk (fsync), and read once: that it cannot be loaded must not be found out when it is needed.

    Raises OSError naming the file.
    """
    try:
        with open(path, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as e:
        cause = next((c for c in _causes(e) if isinstance(c, OSError)), None)
        code = cause.errno if cause and cause.errno else errno.EIO
        reason = cause.strerror if cause else str(e)
        raise OSError(code, f"cannot write {path}: {reason}; earlier checkpoints are unchanged") from e
    read(path)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The exception and those it came from: torch.save hides the OSError of a full disk behind its own."""
    at: BaseException | None = error
    while at is not None:
        yield at
        at = at.__cause__ or at.__context__


def replace(paths: dict[str, Path]) -> None:
    """Let the temporary files take their places, in this order. Raises OSError naming the file."""
    for part in paths:
        try:
            os.replace(temporary(paths[part]), paths[part])
        except OSError as e:
            raise OSError(e.errno, f"cannot replace {paths[part]}: {e.strerror}") from e
    descriptor = os.open(paths["epoch"].parent, os.O_RDONLY)
    # renames survive a power cut once their folder is on disk; some network file systems cannot promise it
    with contextlib.suppress(OSError):
        os.fsync(descriptor)
    os.close(descriptor)


def read(path: Path) -> dict[str, Any]:
    """A file's dict, its tensors mapped from disk.

    Raises FileNotFoundError, or ValueError if it is no checkpoint or holds more than plain data.
    """
    if not path.is_file():
        raise FileNotFoundError(errno.ENOENT, f"no checkpoint file {path}")
    with open(path, "rb") as file:
        is_zip = file.read(4) == b"PK\x03\x04"
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception as e:
        raise ValueError(
            f"{path} cannot be loaded: it is damaged, no checkpoint, or holds more than plain values and "
            f"tensors, which is refused because loading that could run code ({type(e).__name__})"
        ) from e
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not the dict of a checkpoint")
    return content


def read_training_state(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any], list]:
    """(Moments, state, random state of each rank) of epoch_N.pt's companions.

    Raises ValueError if one is missing, of another step, or not written by `save`.
    """
    paths, files = all_paths(path), {}
    for part, file in paths.items():
        if not file.exists():
            raise ValueError(
                f"{path} cannot be resumed: {file.name} is missing (--pretrained needs only weights)"
            )
        files[part] = read(file)
    steps = {paths[part].name: files[part].get("step") for part in paths}
    if len(set(steps.values())) != 1 or None in steps.values():
        raise ValueError(f"{path} cannot be resumed: its files must be of one step, but have {steps}")
    try:
        return files["optimizer"]["optimizer"]["state"], files["stats"]["state"], files["stats"]["rng"]
    except KeyError:
        raise ValueError(f"{path} is of another program: use --pretrained for its weights alone") from None


def latest(folder: Path | str) -> Path | None:
    """The complete epoch_N.pt or epoch_latest.pt of the highest step; None if there is none.

    Complete: its files are all there and of one step. Finishes a save that was killed between its renames;
    warns of a checkpoint it passes over. For one rank.
    """
    folder = Path(folder)
    found = (FILE.fullmatch(path.name.removesuffix(".tmp")) for path in folder.glob("epoch_*"))
    labels = {match[2] for match in found if match and match[1] == "epoch"}
    numbers = sorted(labels - {LATEST}, key=int, reverse=True)
    best: tuple[int, Path] | None = None
    for candidates in (numbers, labels & {LATEST}):
        newest = next(_complete(folder, candidates), None)
        if newest is not None and (best is None or newest[0] > best[0]):
            best = newest
    return best and best[1]


def _complete(folder: Path, labels: Iterable[str]) -> Iterator[tuple[int, Path]]:
    """(Step, epoch_N.pt) of the checkpoints that are complete."""
    for label in labels:
        epoch = folder / f"epoch_{label}.pt"
        _finish_renames(epoch)
        paths = all_paths(epoch)
        steps = {path.name: step_of(path) for path in paths.values()}
        (step, *others) = set(steps.values())
        if step is not None and not others:
            yield step, paths["epoch"]
        elif paths["epoch"].exists():
            warnings.warn(
                f"{paths['epoch']} is passed over: its files must be of one step, but have {steps}",
                stacklevel=4,
            )


def _finish_renames(epoch: Path) -> None:
    """Completes a save that was killed after everything was written."""
    paths = paths_of(epoch, saved_averages(temporary(epoch)))  # renamed last: while others wait, it does
    waiting = [part for part in paths if temporary(paths[part]).exists()]
    files = [temporary(paths[part]) if part in waiting else paths[part] for part in paths]
    steps = {step_of(file) for file in files}
    if waiting and len(steps) == 1 and None not in steps:
        for part in waiting:
            with contextlib.suppress(FileNotFoundError):  # another process was quicker
                os.replace(temporary(paths[part]), paths[part])


def step_of(path: Path) -> int | None:
    """The step that a file is of; None if it is missing, broken or does not say."""
    try:
        return read(path).get("step")
    except (OSError, ValueError):
        return None
