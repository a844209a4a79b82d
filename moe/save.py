"""What saving costs the training loop: seconds lost per save, beside the seconds of a step.

    python moe/save.py --models 160m 830m --record moe/records/save.jsonl

Each row is one run of the ordinary command on synthetic tokens that saves its state (weights, moments of AdamW)
every few steps. `stall` is what the run itself logs; `lost` is found from outside: by how much steps between
the beginning of a save and its end took longer than the median of the others, so that it also sees a loop which
the writing thread slows down. Saves that come faster than they are written wait for one another, and that counts
as stall: give --every more steps than `write` takes.
"""

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class SaveCost:
    """Times the saves of the ordinary training command."""

    models: tuple[str, ...] = ("160m", "830m")
    """Sizes of open_lm's models."""
    experts: int = 1
    """Experts in every second layer; 1: dense."""
    steps: int = 60
    """Steps of each run."""
    every: int = 20
    """Steps from one save to the next."""
    batch_size: int = 8
    """Sequences of 2,048 tokens per GPU and step."""
    logs: Path | None = None
    """Where the runs write, and so the disk that is measured; default: the temporary folder."""
    flags: str = ""
    """More flags for the training command, in one string."""
    record: Path | None = None
    """Append a JSON line per run to this file."""


def time_saves(cost: SaveCost, model: str, logs: Path) -> dict[str, Any]:
    """Runs the command; raises CalledProcessError with its output shown where it fails."""
    command = [sys.executable, "-m", "open_lm.main", "--dataset-type", "synthetic", "--model", f"open_lm_{model}",
               "--precision", "amp_bfloat16", "--grad-clip-norm", "1", "--model-norm", "gain_only_layer_norm",
               "--batch-size", str(cost.batch_size), "--train-num-samples", "1000000000", "--epochs", "1",
               "--max-steps", str(cost.steps), "--log-every-n-steps", "1",
               "--save-every-steps", str(cost.every), "--keep-last-states", "1"]  # fmt: skip
    if cost.experts > 1:
        command += ["--moe-freq", "2", "--moe-num-experts", str(cost.experts)]
    command += cost.flags.split()
    done = subprocess.run([*command, "--logs", str(logs), "--name", model], capture_output=True, text=True)
    if done.returncode:
        print(done.stdout[-3000:], done.stderr[-3000:], sep="\n")
        done.check_returncode()
    lines = [json.loads(line) for line in (logs / model / "log.jsonl").read_text().splitlines()]
    run = lines[0]["run"]
    # the last save is not between steps: the run waits for it at its end
    saves = [e for e in lines if "checkpoint/step" in e and e["checkpoint/step"] < cost.steps]
    seconds = {e["step"]: e["train/batch_time"] for e in lines if "train/batch_time" in e}
    during = {step for save in saves for step in range(save["checkpoint/step"] + 1, save["step"] + 1)}
    warm_up = cost.every // 2
    alone = statistics.median(s for step, s in seconds.items() if step > warm_up and step not in during)
    lost = [
        sum(seconds[s] - alone for s in range(save["checkpoint/step"] + 1, save["step"] + 1) if s in seconds)
        for save in saves
    ]
    return {"model": model, "experts": cost.experts, "parameters": run["parameters"],
            "bytes": saves[0]["checkpoint/bytes"], "step_seconds": alone,
            "stall_seconds": [save["checkpoint/stall_seconds"] for save in saves], "lost_seconds": lost,
            "write_seconds": [save["checkpoint/write_seconds"] for save in saves],
            "batch_size": cost.batch_size, "extra_flags": cost.flags, "device": run["device"],
            "world_size": run["world_size"], "torch": run["torch"], "commit": run["commit"],
            "command": " ".join(command[1:])}  # fmt: skip


def main(cost: SaveCost) -> None:
    table = Table(title="Seconds per save")
    for column in ("model", "experts", "GB", "step", "stall, worst", "lost, worst", "write", "device"):
        table.add_column(column, justify="right")
    for model in cost.models:
        logs = Path(tempfile.mkdtemp(dir=cost.logs))
        try:
            row = time_saves(cost, model, logs)
        finally:
            shutil.rmtree(logs)
        table.add_row(
            model, str(cost.experts), f"{row['bytes'] / 1e9:.2f}", f"{row['step_seconds']:.3f}",
            f"{max(row['stall_seconds']):.3f}", f"{max(row['lost_seconds']):.3f}",
            f"{statistics.median(row['write_seconds']):.1f}", row["device"],
        )  # fmt: skip
        if cost.record:
            with open(cost.record, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
    Console().print(table)


if __name__ == "__main__":
    main(tyro.cli(SaveCost))
