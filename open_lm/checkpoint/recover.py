"""What killed and failed saves left: made good where it can be, else said. One process."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from open_lm.checkpoint import seal, state
from open_lm.checkpoint.files import (
    LEAVING,
    OLD_STATE,
    alias,
    consolidate,
    paths_of,
    read_leaving,
    saved_averages,
    set_aside,
    step_of,
    steps_in_use,
)
from open_lm.checkpoint.state import read_content, state_folder, states


class SaveError(OSError):
    """What a run could not save, at its end: shown as one line, as a traceback would say nothing of it."""

    written_to = ""
    """The file that holds the traceback."""


def finish(folder: Path) -> Path:
    """Makes what a killed save had not made of a state; its epoch_N.pt, or `folder` where it belongs to none."""
    content = state.read_json(folder / state.CONTENT)
    found, failed = None, False
    for label in content["labels"]:
        epoch = folder.parent / f"epoch_{label}.pt"
        step = step_of(epoch)
        damaged = step == content["step"] and next(filter(None, map(_damage, _written(epoch))), None)
        if damaged:
            warnings.warn(f"{damaged}: made anew of {folder.name}", stacklevel=2)
        if step is None or step < content["step"] or damaged:
            try:
                consolidate(folder, label)
            except (OSError, ValueError) as error:  # nothing depends on it
                warnings.warn(f"epoch_{label}.pt could not be made of {folder}: {error}", stacklevel=2)
                failed = True
                continue
        if step is None or step <= content["step"]:
            found = found or epoch
    _note(folder, failed)
    return found or folder


def _note(folder: Path, failed: bool) -> None:
    try:
        state.owe(folder) if failed else state.settle(folder)
    except OSError as error:
        warnings.warn(f"{folder / state.OWED} cannot be changed: {error.strerror}", stacklevel=3)


def make_owed(
    checkpoints: Path,
    until: int,
    make: Callable[[Path, str], Any] = consolidate,
    written: int | None = None,
) -> tuple[tuple[str, ...], Exception | None]:
    """Makes the epoch_N.pt that states up to the step `until` owe, the oldest first; the labels made, and the first
    error of those that could not be. `written`: the step whose state this process has just written, else each is
    read first."""
    made, first = [], None
    for folder, labels in owed(checkpoints).items():
        step, done = int(folder.name.removeprefix("step_")), []
        if step > until:
            continue
        try:
            if labels and step != written:
                state.verify(folder)
            for label in labels:
                if done:
                    alias(checkpoints / f"epoch_{done[0]}.pt", label)
                else:
                    make(folder, label)
                done.append(label)
            state.settle(folder)
        except (OSError, ValueError) as error:
            first = first or error
        made += done
    return tuple(made), first


def owed(checkpoints: Path) -> dict[Path, list[str]]:
    """{state: labels whose epoch_N.pt it still owes}, the oldest first; a label of several states is the last's."""
    found, taken = {}, set()
    for folder in states(checkpoints):
        try:
            labels = state.check_content(folder / state.CONTENT)["labels"]
        except ValueError:
            continue  # damaged: passed over by `latest`
        if state.is_owed(folder):
            step = int(folder.name.removeprefix("step_"))
            steps = {label: step_of(checkpoints / f"epoch_{label}.pt") or 0 for label in labels}
            found[folder] = [n for n in labels if n not in taken and steps[n] <= step]
        taken |= set(labels)
    return dict(reversed(found.items()))


def check_made(checkpoints: Path) -> None:
    """Raises SaveError where a state still owes its epoch_N.pt."""
    for folder, labels in owed(checkpoints).items():
        if labels:
            raise SaveError(
                f"{checkpoints} has no epoch_{labels[0]}.pt, as it could not be made; its weights are in {folder}: "
                "the same command with --resume latest tries again"
            )


def _written(epoch: Path) -> list[Path]:
    """epoch_N.pt and its averages' files."""
    return [path for path in paths_of(epoch, saved_averages(epoch)).values() if path.is_file()]


def _damage(path: Path) -> str | None:
    try:
        return seal.damage(path)
    except OSError as error:
        return f"{path} cannot be read: {error.strerror}"


def latest(folder: Path | str) -> Path | None:
    """The newest complete state: its epoch_N.pt or epoch_latest.pt, or its folder; None if there is none.

    Finishes a save that was killed when its state was complete; warns of what it passes over: a state with a
    damaged file, an epoch_N.pt that is newer than its state. For one rank. Raises ValueError where a run of an
    earlier version lies there, which would otherwise be begun anew.
    """
    folder = Path(folder)
    if (folder / LEAVING).is_file():
        set_aside(folder, read_leaving(folder)[0])
    state.finish_renames(folder)
    best = None
    for candidate in states(folder):
        try:
            best = read_content(candidate)["step"], candidate
            break
        except ValueError as error:
            warnings.warn(f"{candidate} is passed over: {error}", stacklevel=2)
    for label, step in steps_in_use(folder).items():
        if (best is None or (step or -1) > best[0]) and not (
            state_folder(folder, step or -1) / state.DIGESTS
        ).exists():
            about = "it cannot be read" if step is None else f"step_{step}, its state, is missing beside it"
            warnings.warn(f"{folder / f'epoch_{label}.pt'} is passed over: {about}", stacklevel=2)
    if best is not None:
        found = finish(best[1])
        _, error = make_owed(folder, best[0] - 1)
        if error is not None:
            warnings.warn(f"an epoch_N.pt is still missing: {error}", stacklevel=2)
        return found
    if old := next((path for path in folder.glob("*.pt") if OLD_STATE.fullmatch(path.name)), None):
        raise ValueError(
            f"--resume latest: {old} was written by an older version and is not read any more: start a new run, "
            "under another --name, from the weights beside it with --pretrained"
        )
    return None
