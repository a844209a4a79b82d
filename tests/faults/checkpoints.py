"""Faults around checkpoints. Only the command line is used, and files that a glob finds."""

import itertools
import os
import pickle
import random
import re
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from tests.faults.runs import (
    MOE,
    SYNTHETIC,
    Ranks,
    fault,
    files_of_newest,
    hash_of,
    held_out,
    last_step,
    newest_epoch,
    resumed_step,
    run,
    source,
    steps,
)


@fault(
    1,
    "SIGKILL of both ranks at a random step, 20 times",
    "resumed each time; the weights of the uninterrupted run",
)
def kills(folder: Path, quick: bool) -> str:
    count, total = (2, 24) if quick else (20, 120)
    flags = f"{source(folder)} --workers 1 {MOE} {steps(3, total)} --resume latest"
    run(folder / "whole", flags, ranks=2)
    place, at = folder / "killed", sorted(random.Random(0).sample(range(2, total), count))
    resumed = []
    for step in at:
        ranks = Ranks(place, flags, ranks=2, faults="slow:0.03")
        ranks.until_step(step)
        ranks.kill()
        resumed.append(resumed_step(ranks))
    last = run(place, flags, ranks=2)
    hashes = [hash_of(newest_epoch(folder / name)) for name in ("whole", "killed")]
    assert hashes[0] == hashes[1], f"{hashes}, killed at {at}, resumed at {resumed}"
    return f"killed at steps {at}; the last resumed at {resumed_step(last)}; weights {hashes[0]} in both"


def first_checkpoint(folder: Path) -> str:
    """A run with one checkpoint at step 3; the flags by which it goes on, with a next one at step 6."""
    flags = f"{SYNTHETIC} {MOE} {steps(3, 9)}"
    run(folder, f"{flags} --max-steps 3")
    return flags


@fault(2, "SIGKILL during a save, at every file", "the checkpoint before loads; never a partial one")
def kill_in_save(folder: Path, quick: bool) -> str:
    seen = [kill_at_files(folder / "one_rank", 1, 0, quick)]
    if not quick:
        seen += [kill_at_files(folder / f"rank_{rank}_of_two", 2, rank, quick) for rank in (0, 1)]
    return "; ".join(seen)


def kill_at_files(folder: Path, ranks: int, killed: int, quick: bool) -> str:
    """One rank dies before each of its file operations in turn; the others end by themselves, or are killed."""
    flags = f"{SYNTHETIC} {MOE} {steps(3, 9)}"
    run(folder, f"{flags} --max-steps 3", ranks=ranks)
    run(folder / "whole", f"{flags} --max-steps 6", ranks=ranks)
    expected = hash_of(newest_epoch(folder / "whole"))
    touched, number = [], 1
    while number <= 60:
        place = folder / f"kill_{number}"
        shutil.copytree(folder / "run", place / "run")
        faults = f"kill_at_file:{number}:{killed}"
        saving = Ranks(place, f"{flags} --resume latest --max-steps 6", ranks=ranks, faults=faults)
        code = saving.processes[killed].wait(180)
        if code == 0:
            saving.ends(*[0] * ranks)
            break
        assert code == -9, saving.text()
        saving.kill()
        touched.append((place / "touched").read_text().splitlines()[-1].split(" ", 2)[2])
        again = run(place, f"{flags} --resume latest --max-steps 6", ranks=ranks)
        step = resumed_step(again)
        assert step in (3, 6), f"killed at {touched[-1]}: resumed at step {step}\n{again.text()}"
        assert hash_of(newest_epoch(place)) == expected, f"killed at {touched[-1]}"
        shutil.rmtree(place)
        number = number * 3 if quick or ranks > 1 else number + 1
    assert touched
    which = f"rank {killed} of {ranks}: " if ranks > 1 else ""
    return (
        f"{which}killed before {len(touched)} file operations ({', '.join(dict.fromkeys(touched))}): "
        "always 3 or 6, and the weights of the uninterrupted run"
    )


@fault(3, "killed while a save is being written", "`latest` means the one before")
def kill_in_flush(folder: Path, quick: bool) -> str:
    flags = first_checkpoint(folder)
    ranks = Ranks(folder, f"{flags} --resume latest", faults="slow_files:3")
    ranks.until(lambda: (folder / "touching").exists())
    time.sleep(0.5)
    ranks.kill()
    step = last_step(folder)
    again = run(folder, f"{flags} --resume latest --max-steps 4")
    assert resumed_step(again) == 3, again.text()
    return f"killed 0.5 s into the save of step 6 (training was at step {step}); resumed at step 3"


def two_checkpoints(folder: Path) -> str:
    flags = f"{SYNTHETIC} {MOE} {steps(3, 9)}"
    run(folder, f"{flags} --max-steps 6")
    return flags


def flip(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def damage_newest(folder: Path, quick: bool, *damages: Callable[[bytes], bytes]) -> str:
    """Each file of the newest checkpoint damaged by itself, in each of these ways."""
    flags = two_checkpoints(folder)
    files = sorted(files_of_newest(folder), key=lambda f: -f.stat().st_size)[: 1 if quick else None]
    epoch, seen = newest_epoch(folder), []
    for file, damage in itertools.product(files, damages):
        file.write_bytes(damage(file.read_bytes()))
        explicit = Ranks(folder, f"{flags} --resume {epoch} --max-steps 6")
        (code,) = explicit.wait()
        assert code == 2, f"{file.name} damaged, but {epoch.name} was resumed:\n{explicit.text()[-1500:]}"
        assert file.name in explicit.text(), f"the error does not name {file.name}: {explicit.text()[-600:]}"
        latest = run(folder, f"{flags} --resume latest --max-steps 4")
        assert resumed_step(latest) == 3, f"{file.name} damaged, resumed at {resumed_step(latest)}"
        assert re.search(r"(?i)passed over|falls? back|instead|damaged|cannot be", latest.text()), (
            latest.text()
        )
        seen.append(file.name)
        shutil.rmtree(folder / "run")
        run(folder, f"{flags} --max-steps 6")
    names = ", ".join(dict.fromkeys(seen))
    return f"{names}: each named by --resume FILE (status 2), `latest` went on from step 3 with a warning"


@fault(
    7,
    "one byte flipped in a file of the newest checkpoint",
    "an error that names it; `latest` falls back, warns",
)
def flipped_byte(folder: Path, quick: bool) -> str:
    seen = damage_newest(folder, quick, flip)
    return f"{seen}; {damaged_weights(folder)}; {other_files(folder)}"


def damaged_weights(folder: Path) -> str:
    """epoch_N.pt and the file of an average, by what loads them."""
    place = folder / "weights"
    run(place, f"{SYNTHETIC} {MOE} {steps(3, 3)} --averagers ema_0.9_1")
    epoch, data = newest_epoch(place), f"--val-data {held_out(folder)} --data-key json"
    average = next(epoch.parent.glob("ema_*.pt"))
    for file, flags in (
        (epoch, f"{SYNTHETIC} {MOE} {steps(3, 3)} --name other --pretrained {epoch}"),
        (epoch, f"{data} --name other --resume {epoch}"),
        (average, f"{data} --name other --resume {epoch} --averagers {average.stem.rpartition('_')[0]}"),
    ):
        content = file.read_bytes()
        file.write_bytes(flip(content))
        refused = Ranks(place, flags).ends(2)
        assert f"{file} is damaged" in refused.text(), refused.text()[-1500:]
        file.write_bytes(content)
    return f"{epoch.name} and {average.name}: named by --pretrained and evaluation"


def other_files(folder: Path) -> str:
    """A file that does not belong into the newest state, and states that have changed their names."""
    flags, checkpoints = f"{SYNTHETIC} {MOE} {steps(3, 9)}", folder / "run/checkpoints"
    shutil.rmtree(folder / "run")
    run(folder, f"{flags} --max-steps 6")
    shard = next((checkpoints / "step_3").glob("*.safetensors"))
    shutil.copy(shard, checkpoints / "step_6/zz.safetensors")
    again = run(folder, f"{flags} --resume latest --max-steps 4")
    assert resumed_step(again) == 3, again.text()
    assert "zz.safetensors" in again.text()
    shutil.rmtree(folder / "run")
    run(folder, f"{flags} --max-steps 6")
    for old, new in (("step_3", "x"), ("step_6", "step_3"), ("x", "step_6")):
        (checkpoints / old).rename(checkpoints / new)
    again = run(folder, f"{flags} --resume latest --max-steps 4")
    assert resumed_step(again) == 0, again.text()
    assert "the folder's name is not its own" in again.text()
    return "a shard of another state is passed over, and so are states with each other's names"


@fault(8, "the newest checkpoint is truncated", "falls back, warns")
def truncated(folder: Path, quick: bool) -> str:
    seen = damage_newest(folder, quick, lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b[:-1])
    return f"to half, to nothing and by its last byte: {seen}"


@contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """A tmpfs of 8 MiB at `folder`; False where mounting is not permitted."""
    folder.mkdir(parents=True)
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)], capture_output=True
    )
    try:
        yield done.returncode == 0
    finally:
        if done.returncode == 0:
            subprocess.run(["umount", "-l", str(folder)], check=True)


@fault(
    9,
    "the disk is full, or read-only, during a save",
    "goes on or ends with a clear error; the old checkpoint is whole",
)
def full_disk(folder: Path, quick: bool) -> str:
    flags = f"{SYNTHETIC} {MOE} {steps(3, 9)}"
    with small_disk(folder / "disk") as mounted:
        place = folder / "disk"
        run(place, f"{flags} --max-steps 3")
        before = hash_of(newest_epoch(place))
        if mounted:
            free = shutil.disk_usage(place).free
            (place / "filler").write_bytes(b"\0" * (free - 60_000))
            how = "a tmpfs with 60 kB left"
            ranks = Ranks(place, f"{flags} --resume latest")
        else:
            how = "no mount permitted: RLIMIT_FSIZE of 40 kB"
            limit = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, limit[1]))
            try:
                ranks = Ranks(place, f"{flags} --resume latest")
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        (code,) = ranks.wait()
        text = ranks.text()
        said = [
            line for line in text.splitlines() if re.search(r"(?i)no space|space left|disk|too large", line)
        ]
        assert said, text[-2000:]
        (place / "filler").unlink(missing_ok=True)
        oldest = min(place.glob("run/checkpoints/epoch_*.pt"), key=lambda f: f.stat().st_mtime)
        assert hash_of(oldest) == before
        again = run(place, f"{flags} --resume latest --max-steps 9")
        seen = f"{how}: status {code}, “{said[-1][-140:]}”, then resumed at step {resumed_step(again)}"
        assert resumed_step(again) >= 3
        if mounted:
            subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
            denied = Ranks(folder / "ro", f"{flags} --logs {place} --resume latest --epochs 4")
            (code,) = denied.wait()
            assert code == 2, denied.text()
            subprocess.run(["mount", "-o", "remount,rw", str(place)], check=True)
            seen += f"; read-only: status {code}, “{denied.text().strip().splitlines()[-1][-100:]}”"
    if mounted:
        inside = [
            full_inside(folder / f"full_{number}", name, left)
            for number, (name, left) in enumerate(
                (("shard-", 40_000), ("state.json", 4096), ("epoch_2", 40_000))
            )
        ]
        seen += f"; ENOSPC inside {', '.join(inside)}: status 1, the file is named, step 3 is as it was"
    return seen


def full_inside(disk: Path, name: str, left: int) -> str:
    """The disk is full once so many bytes of a file are written, in spite of any look for space before."""
    flags = f"{SYNTHETIC} {MOE} {steps(3, 6)}"
    with small_disk(disk):
        run(disk, f"{flags} --max-steps 3")
        (old,) = disk.glob("run/checkpoints/epoch_1.pt")
        before = {file: file.read_bytes() for file in (old, *files_of_newest(disk))}
        ranks = Ranks(disk, f"{flags} --resume latest", faults=f"fill_disk_in:{name}:{left}")
        (code,) = ranks.wait()
        (disk / "filler").unlink()
        text = ranks.text()
        assert code == 1, f"{name}: status {code}\n{text[-3000:]}"
        said = re.search(rf"cannot write (\S*/{name}\S*).*No space left on device.*unchanged", text)
        assert said, f"{name}: {text[-3000:]}"
        assert all(file.read_bytes() == content for file, content in before.items()), name
        left_over = [path.name for path in disk.glob("run/checkpoints/*.tmp") if path.is_dir()]
        assert not left_over, f"{name}: {left_over}"
        again = run(disk, f"{flags} --resume latest")
        # the state of step 6 is whole where epoch_2.pt alone is not, which is made up for
        expected = 6 if name.startswith("epoch") else 3
        assert resumed_step(again) == expected, f"{name}: {again.text()}"
        assert newest_epoch(disk).name == "epoch_2.pt", again.text()
        return Path(said[1]).name


class Malicious:
    """What runs a command when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@fault(10, "a malicious pickle in place of every file that is loaded", "refused, nothing runs")
def malicious(folder: Path, quick: bool) -> str:
    flags, data = f"{SYNTHETIC} {MOE} {steps(3, 9)}", f"--val-data {held_out(folder)} --data-key json"
    run(folder, f"{flags} --max-steps 6 --averagers ema_0.9_1")
    epoch, marker = newest_epoch(folder), folder / "ran"
    average = next(epoch.parent.glob(f"ema_*_{epoch.stem.removeprefix('epoch_')}.pt"))
    writes = {
        "torch.save": lambda file: torch.save({"state_dict": Malicious(marker)}, file),
        "pickle": lambda file: file.write_bytes(pickle.dumps(Malicious(marker))),
    }
    probe = folder / "probe.pt"
    for write in writes.values():  # they do run where pickles are trusted
        write(probe)
        code = f"import pickle, torch; f = {str(probe)!r}\n"
        code += "try: torch.load(f, weights_only=False)\nexcept Exception: pickle.load(open(f, 'rb'))"
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
        assert marker.exists()
        marker.unlink()
    averager = average.stem.rpartition("_")[0]
    loads = dict.fromkeys((epoch, *files_of_newest(folder)), f"{flags} --resume {epoch} --max-steps 6")
    loads[average] = f"{data} --name other --resume {epoch} --averagers {averager}"
    for file, load in list(loads.items())[: 2 if quick else None]:
        content = file.read_bytes()
        for name, write in writes.items():
            write(file)
            pretrained = f"{flags} --name other --pretrained {file} --max-steps 1"
            for arguments in dict.fromkeys((load, pretrained)):
                (code,) = Ranks(folder, arguments).wait()
                assert code == 2, f"{file.name}, by {name}: status {code} of {arguments}"
                assert not marker.exists(), f"{file.name}, by {name}, ran code with {arguments}"
        file.write_bytes(content)
    config = folder / "config.yaml"
    config.write_text(f"lr: !!python/object/apply:os.system ['touch {marker}']\n")
    Ranks(folder, f"{flags} --name other --config {config}").ends(2)
    assert not marker.exists(), "config.yaml ran code"
    return (
        f"{', '.join(file.name for file in loads)}: with torch.save's and plain pickles, by --resume and "
        "--pretrained; a YAML object in --config: nothing ran"
    )


@fault(
    19,
    "resume with another model, data set or batch size",
    "refused, with the differences; --resume-changed allows data and batch",
)
def changed_run(folder: Path, quick: bool) -> str:
    flags = f"{source(folder)} --workers 0 {steps(3, 9)}"
    run(folder, f"{flags} --max-steps 3")
    seen = []
    for change, expected in (
        (f"{flags} {MOE}", "--moe"),
        (f"{flags.replace(str(folder / 'data'), str(other_source(folder)))}", "another"),
        (f"{flags} --global-batch-size 4", "--global-batch-size"),
        (f"{flags} --seed 5", "seed"),
    ):
        ranks = Ranks(folder, f"{change} --resume latest").ends(2)
        said = ranks.text().strip().splitlines()[-1]
        assert expected in said or "other data" in said, said
        seen.append(said[-120:])
    run(folder, f"{flags} --global-batch-size 4 --resume latest --resume-changed --max-steps 5")
    return f"status 2 four times, e.g. “…{seen[2]}”; with --resume-changed it went on to step {last_step(folder)}"


def other_source(folder: Path) -> Path:
    source(folder / "second", 120)
    return folder / "second" / "data"


@fault(
    27, "a crash in evaluation", "the state was saved before: nothing is lost, the evaluation is made up for"
)
def crash_in_evaluation(folder: Path, quick: bool) -> str:
    seen = []
    for extra in ("", "--save-frequency 10"):
        place = folder / f"place{len(seen)}"
        flags = f"{SYNTHETIC} {MOE} {steps(3, 6)} --val-data {held_out(folder)} --data-key json {extra}"
        crashed = Ranks(place, flags, faults="fail_in_evaluation")
        (code,) = crashed.wait()
        assert code, "the injected error is lost"
        again = run(place, f"{flags} --resume latest")
        assert resumed_step(again) == 3, again.text()
        assert "no evaluation: evaluated now" in again.text()
        evaluated = (place / "run/checkpoints/results.jsonl").read_text().count('"step": 3')
        assert evaluated == 1
        seen.append(f"status {code}; resumed at step 3, which was evaluated then; done at {last_step(place)}")
    return f"{seen[0]}; with --save-frequency 10: {seen[1]}"
