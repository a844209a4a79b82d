"""Whole training steps of open_lm's models on this machine, beside the published tokens per second.

    python moe/speed.py --models 41m 160m --experts 1 8 --record moe/records/speed.jsonl

Each row is one run of the ordinary command on synthetic tokens: forward, backward, clipping, AdamW. MFU counts
the FLOPs that open_lm/flops.py states.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console
from rich.table import Table

# Tokens per second and GPU (A100), from open_lm's MOE.md.
PUBLISHED = {
    1: {"41m": "141.2K", "87m": "106.0K", "160m": "95.5K", "410m": "30.3K", "830m": "16.0K"},
    8: {"41m": "69.5K", "87m": "66.6K", "160m": "66.2K", "410m": "18.5K", "830m": "9.2K"},
}


@dataclass(frozen=True)
class Speed:
    """Times the ordinary training command."""

    models: tuple[str, ...] = ("41m", "87m", "160m", "410m", "830m")
    """Sizes of open_lm's models."""
    experts: tuple[int, ...] = (1, 8)
    """Experts in every second layer; 1: dense."""
    steps: int = 30
    """Steps of each run; the first third is not counted."""
    batch_size: int = 16
    """Sequences of 2,048 tokens per micro-batch and GPU."""
    accum_freq: int = 1
    """Micro-batches per step."""
    flags: str = ""
    """More flags for the training command, in one string."""
    record: Path | None = None
    """Append a JSON line per run to this file."""


def time_run(speed: Speed, model: str, experts: int, logs: Path) -> dict[str, Any]:
    """Runs the command; raises CalledProcessError with its output shown where it fails."""
    name, log_every = f"{model}-{experts}", max(1, speed.steps // 3)
    command = [sys.executable, "-m", "open_lm.main", "--dataset-type", "synthetic", "--model", f"open_lm_{model}",
               "--precision", "amp_bfloat16", "--grad-clip-norm", "1", "--model-norm", "gain_only_layer_norm",
               "--batch-size", str(speed.batch_size * speed.accum_freq), "--accum-freq", str(speed.accum_freq),
               "--train-num-samples", "1000000000", "--epochs", "1", "--max-steps", str(speed.steps),
               "--log-every-n-steps", str(log_every)]  # fmt: skip
    if experts > 1:
        command += ["--moe-freq", "2", "--moe-num-experts", str(experts)]
    command += speed.flags.split()
    place = ["--logs", str(logs), "--name", name]
    done = subprocess.run([*command, *place], capture_output=True, text=True)
    if done.returncode:
        print(done.stdout[-3000:], done.stderr[-3000:], sep="\n")
        done.check_returncode()
    compiled = "torch.compile: on" in (logs / name / "out.log").read_text()
    lines = [json.loads(line) for line in (logs / name / "log.jsonl").read_text().splitlines()]
    counted = [e for e in lines if "train/loss" in e and e["step"] > log_every]
    seconds = sum(e["train/batch_time"] for e in counted) / len(counted)
    run = lines[0]["run"]
    mean = lambda key: sum(e[key] for e in counted) / len(counted) if key in counted[-1] else None
    return {"model": model, "experts": experts, "tokens_per_second": mean("train/samples_per_second_per_gpu"),
            "mfu": mean("train/mfu"), "memory_gib": mean("train/memory_gib"), "step_seconds": seconds,
            "data_seconds": mean("train/data_time"), "batch_size": speed.batch_size, "accum_freq": speed.accum_freq,
            "extra_flags": speed.flags, "compiled": compiled, "parameters": run["parameters"],
            "active_parameters": run["active_parameters"], "device": run["device"], "torch": run["torch"],
            "commit": run["commit"], "command": " ".join(command[1:])}  # fmt: skip


def main(speed: Speed) -> None:
    table = Table(title="Whole training steps, tokens per second and GPU")
    for column in ("model", "experts", "ours", "MFU", "GiB", "published (A100)", "batch", "device"):
        table.add_column(column, justify="right")
    for model in speed.models:
        for experts in speed.experts:
            with tempfile.TemporaryDirectory() as logs:
                try:
                    result = time_run(speed, model, experts, Path(logs))
                except subprocess.CalledProcessError as error:
                    table.add_row(model, str(experts), f"failed ({error.returncode})", *[""] * 5)
                    continue
            published = PUBLISHED.get(experts, {}).get(model, "")
            ours = f"{result['tokens_per_second']:,.0f}"
            batch = f"{speed.batch_size}x{speed.accum_freq}"
            mfu, memory = (
                "" if result[key] is None else form.format(result[key])
                for key, form in (("mfu", "{:.1%}"), ("memory_gib", "{:.1f}"))
            )
            table.add_row(model, str(experts), ours, mfu, memory, published, batch, result["device"])
            if speed.record:
                with open(speed.record, "a", encoding="utf-8") as file:
                    file.write(json.dumps(result) + "\n")
    Console(width=110).print(table)


def command(arguments: Sequence[str]) -> None:
    """`main` with flags as typed."""
    main(tyro.cli(Speed, description=__doc__, args=arguments))


if __name__ == "__main__":
    command(sys.argv[1:])
