"""epoch_N.pt and AVERAGER_N.pt: whole weights for people and for open_lm, made of a state's shards. One process."""

import contextlib
import itertools
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from open_lm.checkpoint import state
from open_lm.checkpoint.seal import read, write
from open_lm.checkpoint.state import Shards, state_folder, states

LATEST = "latest"  # the label of --save-most-recent's checkpoint; others are an interval's number
# Every file of weights: its part (of an average, its name, such as ema_0.99_1) and label.
FILE = re.compile(r"(epoch|(?:ema|poly)(?:_[0-9.eE+-]+)*)_(\d+|latest)\.pt")
ABANDONED = "abandoned"  # folders of what came after a step that a run was taken back to
LEAVING = "leaving.json"  # while that is moved there
RESULTS = "results.jsonl"  # what evaluations of the checkpoints found
OLD_STATE = re.compile(r"(optimizer|stats)_(\d+|latest)\.pt")  # of earlier versions


def paths_of(epoch: Path, averagers: Iterable[str] = ()) -> dict[str, Path]:
    """The files of weights of epoch_N.pt in the order of their renames: averages, itself.

    Raises ValueError if it is named otherwise.
    """
    match = FILE.fullmatch(epoch.name)
    if not match or match[1] != "epoch":
        raise ValueError(
            f"{epoch} is not named epoch_N.pt: to start from its weights alone, use --pretrained"
        )
    return {part: epoch.with_name(f"{part}_{match[2]}.pt") for part in (*averagers, "epoch")}


def saved_averages(epoch: Path) -> tuple[str, ...]:
    """The names of the averages that epoch_N.pt was saved with; none if unreadable."""
    try:
        names = read(epoch).get("averagers", ())
    except (OSError, ValueError):
        return ()
    # a name becomes a path
    return (
        tuple(n for n in names if isinstance(n, str) and state.AVERAGE.fullmatch(n))
        if isinstance(names, list)
        else ()
    )


def state_of(path: Path) -> Path:
    """The state that epoch_N.pt was made of, beside it; a state's own folder stays as it is.

    Raises ValueError, naming --pretrained, where it is missing or the file is not of this program.
    """
    if path.is_dir():
        return path
    step, label = read(path).get("step"), next(iter(FILE.findall(path.name)), (None, ""))[1]
    folder = state_folder(path.parent, step) if isinstance(step, int) else None
    if folder is not None and (folder / state.DIGESTS).is_file():
        return folder
    if (path.parent / f"optimizer_{label}.pt").exists():
        raise ValueError(
            f"{path} cannot be resumed: optimizer_{label}.pt and stats_{label}.pt, which an older version wrote, "
            "are not read any more; start a new run from its weights with --pretrained"
        )
    missing = (
        "it does not say its step" if folder is None else f"{folder.name}, its state, is missing beside it"
    )
    raise ValueError(f"{path} cannot be resumed: {missing} (--pretrained needs only weights)")


def consolidate(folder: Path, label: str) -> Path:
    """Makes epoch_LABEL.pt and its averages' files of a state; returns the former, which is renamed last.

    Raises OSError naming the file.
    """
    content, shards = state.read_json(folder / state.CONTENT), Shards(folder)
    averages = content["averages"]
    paths = paths_of(folder.parent / f"epoch_{label}.pt", averages)
    header = {key: content[key] for key in ("epoch", "name", "step", "tokens")}
    header["model_config"] = content["model_config"]

    def weights(prefix: str, fallback: str) -> dict[str, torch.Tensor]:
        keys, others = shards.named(prefix), shards.named(fallback)
        whole = {name: shards.whole(key) for name, key in (others | keys).items()}
        return {alias: whole[name] for alias, name in content["weights"].items()}

    model, last = "model/", {"averagers": list(averages)}
    try:
        for name, facts in averages.items():
            sums = {"av_model_sd": weights(f"average/{name}/", model)}
            write(temporary(paths[name]), header | {k: v for k, v in facts.items() if k != "steps"} | sums)
        write(temporary(paths["epoch"]), header | last | {"state_dict": weights(model, model)})
    except BaseException:
        for path in paths.values():
            temporary(path).unlink(missing_ok=True)
        raise
    replace(paths)
    return paths["epoch"]


def group(names: Iterable[str]) -> dict[str, list[str]]:
    """{label: its files' names, epoch_N.pt last} of the names that are files of weights, finished ones alone."""
    groups: dict[str, list[str]] = {}
    for name in sorted(names, key=lambda name: name.startswith("epoch_")):
        if match := FILE.fullmatch(name):
            groups.setdefault(match[2], []).append(name)
    return groups


def delete(folder: Path, label: str) -> None:
    """Removes a checkpoint: epoch_N.pt first, its averages, and its state unless another label's file is of it."""
    step = step_of(folder / f"epoch_{label}.pt")
    for name in reversed(group(path.name for path in folder.glob("*.pt")).get(label, [])):
        (folder / name).unlink(missing_ok=True)
    if step is not None and step not in steps_in_use(folder).values():
        state.delete(state_folder(folder, step))


def steps_in_use(folder: Path) -> dict[str, int | None]:
    """{label: the step of its epoch_N.pt}."""
    found = (FILE.fullmatch(path.name) for path in folder.glob("epoch_*.pt"))
    return {match[2]: step_of(folder / match[0]) for match in found if match}


def tidy(folder: Path, step: int, keep: int) -> None:
    """After the state of `step` is complete: removes states of earlier steps that no file of weights belongs to any
    more, and those between intervals but for the newest `keep`. Where the file could not be made yet, or is
    damaged, its state stays: the weights are in it."""
    of_label, between = steps_in_use(folder), 0
    in_use, damaged = set(of_label.values()), {label for label, number in of_label.items() if number is None}
    for path in states(folder):
        number = int(path.name.removeprefix("step_"))
        if number > step:
            continue  # not this run's past: it must not crowd that out
        try:
            labels = state.check_content(path / state.CONTENT)["labels"]
        except ValueError:
            continue  # damaged: not ours to judge
        between += not labels
        if (
            number < step
            and number not in in_use
            and not state.is_owed(path)
            and not damaged & set(labels)
            and (labels or between > keep)
        ):
            state.delete(path)


def set_aside(folder: Path, step: int) -> Path | None:
    """Moves what lies after `step`, which a run is about to leave by going on from there, into
    abandoned_after_step_S (…_2, …): states, files of weights, and their results. Where that is; None if there was
    nothing.

    Killed half-way it is finished by `latest`: till then LEAVING says the step and the place.
    """
    state.finish_renames(folder)
    found = [path for path in folder.glob("step_*") if is_after(path.name, step)]
    for label, number in steps_in_use(folder).items():
        if number is not None and number > step:
            found += [path for path in folder.glob(f"*_{label}.pt") if FILE.fullmatch(path.name)]
    past, later = divide_results(folder / RESULTS, step)
    if not found and not later:
        (folder / LEAVING).unlink(missing_ok=True)
        return None
    place = None
    if (folder / LEAVING).is_file():
        with contextlib.suppress(ValueError):
            place = folder / read_leaving(folder)[1]
    if place is None:
        place = next(folder / name for name in places(step) if not (folder / name).exists())
        state.write_json(temporary(folder / LEAVING), {"step": step, "place": place.name})
        os.replace(temporary(folder / LEAVING), folder / LEAVING)
    place.mkdir(exist_ok=True)
    state.sync_folder(folder)
    for path in found:
        os.rename(path, place / path.name)
    if later:
        write_lines(place / RESULTS, later)
        write_lines(folder / RESULTS, past)
    state.sync_folder(place)
    state.sync_folder(folder)
    (folder / LEAVING).unlink()
    return place


def read_leaving(folder: Path) -> tuple[int, str]:
    """(Step, place) of the move that was killed. ValueError, with what to do, where the file does not say them."""
    path = folder / LEAVING
    try:
        content = state.read_json(path)
        step, place = content["step"], content["place"]
        if isinstance(step, int) and re.fullmatch(rf"{ABANDONED}_after_step_\d+(_\d+)?", place):
            return step, place
    except (ValueError, LookupError, TypeError):
        pass
    raise ValueError(
        f"{path} is damaged: the run was being taken back to an older state, and it does not say which. Do it "
        f"again: --resume {folder}/epoch_N.pt (or step_S); or remove {path} to go on from the newest state"
    )


def divide_results(path: Path, step: int) -> tuple[list[str], list[str]]:
    """The lines of results.jsonl up to a step, and those of later ones."""
    parts: tuple[list[str], list[str]] = [], []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        with contextlib.suppress(ValueError, AttributeError, TypeError):
            parts[json.loads(line).get("step", 0) > step].append(line)
            continue
        parts[0].append(line)  # not ours
    return parts


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Atomically."""
    with open(temporary(path), "w", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in lines)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary(path), path)


def is_after(name: str, step: int) -> bool:
    """Whether this is the name of a state, or of an unfinished one, of a later step."""
    match = state.NAME.fullmatch(name.removesuffix(state.TEMPORARY))
    return match is not None and int(match[1]) > step


def places(step: int) -> Iterator[str]:
    """Names for `set_aside`, one after the other."""
    first = f"{ABANDONED}_after_step_{step}"
    yield first
    yield from (f"{first}_{n}" for n in itertools.count(2))


def alias(epoch: Path, label: str) -> None:
    """Gives files of weights a second label, atomically; no second copy where the disk has hard links."""
    averages = saved_averages(epoch)
    paths = paths_of(epoch.with_name(f"epoch_{label}.pt"), averages)
    for part, source in paths_of(epoch, averages).items():
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
    """Makes the folder, and removes what a killed save left in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise OSError(e.errno, f"cannot make the checkpoint folder {folder}: {e.strerror}") from e
    state.finish_renames(folder)
    state.remove_temporaries(folder)
    for path in folder.glob("*_*.pt.tmp"):
        if FILE.fullmatch(path.stem):
            path.unlink(missing_ok=True)


def replace(paths: dict[str, Path]) -> None:
    """Let the temporary files take their places, in this order. Raises OSError naming the file."""
    for part in paths:
        try:
            os.replace(temporary(paths[part]), paths[part])
        except OSError as e:
            raise OSError(e.errno, f"cannot replace {paths[part]}: {e.strerror}") from e
    state.sync_folder(paths["epoch"].parent)


def step_of(path: Path) -> int | None:
    """The step that a file, or a state's folder, is of; None if it is missing, broken or does not say."""
    try:
        step = state.read_json(path / state.CONTENT)["step"] if path.is_dir() else read(path).get("step")
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return step if isinstance(step, int) else None
