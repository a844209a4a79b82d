"""Faults of processes, of whoever runs beside them, and of time."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from tests.faults.runs import (
    MOE,
    ROOT,
    STEP_TOKENS,
    SYNTHETIC,
    Ranks,
    fault,
    hash_of,
    held_out,
    last_step,
    losses,
    newest_epoch,
    resumed_step,
    run,
    source,
    steps,
)

LONG = f"{SYNTHETIC} {MOE} {steps(1000, 4000)}"


def saved_step(ranks: Ranks) -> int:
    return int(re.findall(r"saved .* at step (\d+)", ranks.text())[-1])


@fault(
    4,
    "SIGTERM or Slurm's SIGUSR1 to one of two ranks: in a step, in evaluation, compiling, while the data stall",
    "all save one step, each ends with 0 within a step; the evaluation is made up for",
)
def stop_signals(folder: Path, quick: bool) -> str:
    seen = []
    for name, number in (("step", signal.SIGTERM), ("step, USR1", signal.SIGUSR1))[: 1 if quick else 2]:
        place = folder / name.replace(", ", "_")
        ranks = Ranks(place, LONG, ranks=2, faults="slow:0.05")
        ranks.until_step(3)
        seen.append(f"in a {name}: {end_by(ranks, 1, number)}")
        ranks = run(place, f"{LONG} --resume latest --max-steps {saved_step(ranks) + 1}", ranks=2)
        assert resumed_step(ranks) > 0, ranks.text()
    place = folder / "evaluation"
    flags = f"{SYNTHETIC} {MOE} {steps(3, 6)} --val-data {held_out(folder)} --data-key json"
    flags += " --global-val-batch-size 2 --save-frequency 10"
    ranks = Ranks(place, flags, ranks=2, faults="slow_evaluation:0.2")
    ranks.until(lambda: (place / "evaluating_0").exists())
    seen.append(f"in evaluation: {end_by(ranks, 1, signal.SIGTERM)}")
    assert not (place / "run/checkpoints/results.jsonl").exists()
    again = run(place, f"{flags} --resume latest", ranks=2)
    assert "no evaluation: evaluated now" in again.text(), again.text()
    for rank in (0, 1)[: 1 if quick else 2]:
        place = folder / f"stall_{rank}"
        ranks = Ranks(place, LONG, ranks=2, faults="stall_data:4:0")  # rank 0's data: rank 1 waits for rank 0
        ranks.until_step(4)
        time.sleep(1)
        seen.append(f"data stalled, rank {rank} told: {end_by(ranks, rank, signal.SIGTERM)}")
    if not quick and shutil.which("g++"):
        place = folder / "compiling"
        ranks = Ranks(place, f"{LONG} --torchcompile", faults="slow:0.01")
        ranks.until(lambda: "1 rank on cpu" in ranks.text())
        time.sleep(2)
        assert last_step(place) == 0, "compiled already"
        ranks.signal(0, signal.SIGTERM)
        ranks.ends(0)
        seen.append(f"compiling: 0, step {saved_step(ranks)} saved once that step was done")
    return "; ".join(seen)


def end_by(ranks: Ranks, rank: int, number: int) -> str:
    """What came of a signal to a rank."""
    started = time.monotonic()
    ranks.signal(rank, number)
    ranks.ends(0, 0, seconds=60)
    seconds = time.monotonic() - started
    assert seconds < 20, f"{seconds:.1f} s"
    assert f"stopped by {signal.Signals(number).name} to rank {rank}" in ranks.text(), ranks.text()
    return f"both 0 after {seconds:.1f} s, step {saved_step(ranks)} saved"


@fault(
    16,
    "a rank sleeps in a step",
    "--hang-timeout ends both, names the rank and shows its stack; not 0",
)
def hang(folder: Path, quick: bool) -> str:
    ranks = Ranks(folder, f"{LONG} --hang-timeout 3", ranks=2, faults="sleep:2:1")
    codes = ranks.wait(90)
    seconds = time.monotonic() - ranks.started
    text = ranks.text()
    assert all(codes), codes
    assert "rank 1 hangs: no progress for" in text, text[-3000:]
    report = text[text.rindex("rank 1 hangs") :]
    assert "injected_sleep" in report, report
    assert "rank 0 hangs" not in text
    for rank in (0, 1):
        assert f"[rank {rank}] in step 2" in text
    first = report.splitlines()[0]
    seen = (
        f"exit statuses {codes} {seconds:.0f} s after the start; “{first}” with injected_sleep in the stack"
    )
    return seen if quick else f"{seen}; {frozen(folder / 'frozen')}"


def frozen(folder: Path) -> str:
    """Rank 0, by whose store the others would learn of it, does nothing at all any more."""
    ranks = Ranks(folder, f"{LONG} --hang-timeout 3", ranks=2, faults="slow:0.05")
    ranks.until_step(5)
    started = time.monotonic()
    ranks.signal(0, signal.SIGSTOP)
    try:
        code = ranks.processes[1].wait(60)
    finally:
        ranks.kill()
    assert code == 1, code
    assert "rank 0 hangs: the store that it holds does not answer" in ranks.text(), ranks.text()[-3000:]
    return f"rank 0 frozen: rank 1 names it and ends with 1 after {time.monotonic() - started:.0f} s"


@fault(17, "a rank raises", "its peer ends within 30 s; the first traceback is the last that is shown")
def failing_rank(folder: Path, quick: bool) -> str:
    seen = []
    for name, options in (("without torchrun", {}), ("torchrun", {"torchrun": ""})):
        place = folder / name.replace(" ", "_")
        ranks = Ranks(place, LONG, ranks=2, faults="slow:0.05;fail:5:1", **options)
        ranks.until_step(5)
        started = time.monotonic()
        codes = ranks.wait(60)
        seconds = time.monotonic() - started
        assert all(codes), codes
        assert seconds < 30, f"{seconds:.1f} s"
        text = ranks.text()
        last = text[text.rindex("Traceback (most recent call last)") :]
        assert "injected: this rank fails first" in last, text[-3000:]
        assert "injected_failure" in last
        seen.append(
            f"{name}: exit statuses {codes} after {seconds:.1f} s, the injected error's traceback last"
        )
    return "; ".join(seen)


@fault(
    22,
    "a second run in the same folder",
    "refused, with the first one's host and process; a dead one's lock is stale",
)
def second_run(folder: Path, quick: bool) -> str:
    first = Ranks(folder, LONG, faults="slow:0.05")
    first.until_step(2)
    second = Ranks(folder, f"{LONG} --resume latest").ends(2)
    expected = f"is in use by process {first.processes[0].pid} on {socket.gethostname()}"
    assert expected in second.text(), second.text()
    first.kill()
    third = run(folder, f"{LONG} --resume latest --max-steps 2")
    message = next(line for line in second.text().splitlines() if expected in line)
    assert "Traceback" not in third.text()
    return f"status 2: “…{message[message.index('is in use') :]}”; after SIGKILL of the first it starts"


@fault(
    24,
    "wandb's server and TensorBoard's folder are down",
    "training is unaffected: the same weights, status 0",
)
def trackers_down(folder: Path, quick: bool) -> str:
    flags = f"{SYNTHETIC} {MOE} {steps(5, 10)}"
    run(folder / "alone", flags)
    place = folder / "down"
    (place / "run").mkdir(parents=True)
    (place / "run" / "tensorboard").write_text("not a folder")
    nobody = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0" * 40}
    ranks = run(place, f"{flags} --report-to wandb,tensorboard", environment=nobody)
    assert hash_of(newest_epoch(place)) == hash_of(newest_epoch(folder / "alone"))
    warned = [line for line in ranks.text().splitlines() if "wandb" in line or "tensorboard" in line]
    assert any("tensorboard" in line for line in warned), ranks.text()
    assert any("wandb" in line for line in warned), ranks.text()
    return f"status 0, equal weights; {len(warned)} lines say what is missing, e.g. “{warned[0][9:110]}”"


@fault(25, "1,000 steps", "memory and open files do not grow")
def leaks(folder: Path, quick: bool) -> str:
    total, warm = (300, 100) if quick else (1000, 200)
    flags = f"{SYNTHETIC} {MOE} {steps(total // 4, total)} --val-data {held_out(folder)} --data-key json"
    run(
        folder,
        f"{flags.replace('--workers 0', '--workers 1')} --skip-loss-spikes 9 --save-frequency 2",
        faults="measure",
    )
    usage = [json.loads(line) for line in (folder / "usage_0.jsonl").read_text().splitlines()]
    usage = [each for each in usage if each["step"] >= warm]
    first, last = usage[0], usage[-1]
    assert max(each["files"] for each in usage) <= first["files"] + 1, usage
    assert max(each["threads"] for each in usage) <= first["threads"] + 2, usage
    # allocators jump: the slope of a straight line through all measurements, not the difference of two
    x = [each["step"] - first["step"] for each in usage]
    y = [each["mib"] for each in usage]
    middle_x, middle_y = sum(x) / len(x), sum(y) / len(y)
    slope = sum((a - middle_x) * (b - middle_y) for a, b in zip(x, y, strict=True))
    slope *= 1024 / sum((a - middle_x) ** 2 for a in x)
    limit = 32 if quick else 5  # four measurements say little
    assert slope < limit, f"{slope:.1f} kB a step, {usage}"
    return (
        f"{slope:.1f} kB a step; "
        f"steps {first['step']} to {last['step']}: {first['mib']:.0f} to {last['mib']:.0f} MiB, {first['files']} "
        f"to {last['files']} open files, {first['threads']} to {last['threads']} threads"
    )


SECRETS = {
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMIK7MDENGbPxRfiCYEXAMPLE1",
    "WANDB_API_KEY": "5ecre7" * 6 + "abcd",
    "HF_TOKEN": "hf_" + "Ab3dEfGhIjKlMnOpQrStUvWx",
}
KEY_ID = "AKIA" + "IOSFODNN7EXAMPLE"  # in two: no tracked file may hold what looks like one
PASSWORD, SIGNATURE = "hunter2pass", "5f1d9c0ffee5"


@fault(
    21,
    "secrets in environment, URLs and flags",
    "in no log, checkpoint, params.txt, report, wandb or TensorBoard file, ps",
)
def secrets(folder: Path, quick: bool) -> str:
    url = f"https://me:{PASSWORD}@store.example/x?X-Amz-Signature={SIGNATURE}"
    notes = f"see {url} with api_key={SECRETS['WANDB_API_KEY']}"
    environment = SECRETS | {"AWS_ACCESS_KEY_ID": KEY_ID, "WANDB_MODE": "offline"}
    words = [*SECRETS.values(), KEY_ID, PASSWORD, SIGNATURE]
    flags = f"{SYNTHETIC} {MOE} {steps(5, 10)} --report-to wandb,tensorboard --debug --wandb-notes '{notes}'"
    ranks = Ranks(folder / "run", flags, environment=environment, faults="slow:0.1")
    ranks.until_step(2)
    title = Path(f"/proc/{ranks.processes[0].pid}/cmdline").read_bytes()
    ranks.ends(0)
    report = [
        sys.executable,
        "-m",
        "open_lm.report",
        str(folder / "run/run"),
        "--output",
        f"{folder}/report.html",
    ]
    subprocess.run(
        report,
        cwd=ROOT,
        env=os.environ | environment | {"PYTHONPATH": str(ROOT)},
        check=True,
        capture_output=True,
    )
    failing = Ranks(folder / "run", f"{flags} --pretrained {url}", environment=environment)
    failing.wait()
    crashing = Ranks(folder / "crash", flags, environment=environment, faults="fail:1:0")
    crashing.wait()
    files = [path for path in folder.rglob("*") if path.is_file()]
    for word in words:
        assert word.encode() not in title, f"{word} in the process's title"
        holding = [str(path) for path in files if word.encode() in path.read_bytes()]
        assert not holding, f"{word} in {holding}"
    assert any(path.suffix == ".html" for path in files)
    return f"{len(words)} secrets looked for in {len(files)} files and /proc/PID/cmdline: none found"


def restart(folder: Path, quick: bool) -> str:
    """torchrun --max-restarts: a run of the default name goes on by itself, also where one of two agents, as on two
    nodes, has no failure of its own to count."""
    flags = f"{source(folder)} --workers 1 {MOE} {steps(5, 30)}"
    whole = folder / "whole"
    run(whole, flags, ranks=2)
    if quick:
        return restarted(folder / "agents", whole, flags, agents=2, kills=1)
    one = restarted(folder / "killed", whole, flags, kills=1)
    return f"{one}; two agents: {restarted(folder / 'agents', whole, flags, agents=2, kills=3)}"


def restarted(place: Path, whole: Path, flags: str, *, agents: int = 1, kills: int) -> str:
    """What came of a run under torchrun in which the last rank is killed, then the first, and so on."""
    ranks = Ranks(
        place, f"{flags} --name ''", ranks=2, torchrun="--max-restarts 3", agents=agents, faults="slow:0.1"
    )

    def folder_of_run() -> Path | None:
        found = [p.parent for p in place.glob("*/log.jsonl")]
        return found[0] if found else None

    name = ranks.until(folder_of_run)
    (place / "run").symlink_to(name)
    begun = []
    for kill in range(kills):
        ranks.until_step(8 + 6 * kill)
        pids = [
            int(pid)
            for agent in ranks.processes
            for pid in subprocess.run(
                ["pgrep", "-P", str(agent.pid)], capture_output=True, text=True, check=True
            ).stdout.split()
        ]
        os.kill(pids[0 if kill % 2 else -1], signal.SIGKILL)
        again = f"torchrun has started the ranks again ({kill + 1})"
        ranks.until(lambda again=again: "resumed " in ranks.text().partition(again)[2])
        begun.append(resumed_step(ranks))
    ranks.ends(*[0] * agents)
    assert [p.parent for p in place.glob("*/log.jsonl") if not p.parent.is_symlink()] == [name]
    assert all(at <= 8 + 6 * kill + 5 for kill, at in enumerate(begun)), (begun, ranks.text())
    assert begun[0] in (5, 10), ranks.text()
    assert last_step(place) == 30
    assert hash_of(newest_epoch(place)) == hash_of(newest_epoch(whole))
    assert losses(place) == losses(whole)
    return f"{kills} of the ranks killed, went on from {begun}, the same weights"


assert STEP_TOKENS
