"""Whether a backend learns what another learns: their losses on the same text, step by step, beside noise.

    python moe/curves.py --data corpus/prose/manifest.jsonl --backends grouped_mm triton --record curves.jsonl

Runs the ordinary command once per backend, all with one seed, and the first backend again with another seed: by how
much its losses differ then is the noise. Exits with 1 where a backend's differ by more.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Curves:
    """Compares the losses of backends."""

    data: tuple[str, ...] = ()
    """Manifests of tokenized text; none: synthetic tokens, of which there is little to learn."""
    models: tuple[str, ...] = ("41m", "160m")
    """Sizes of open_lm's models, or names for --model."""
    experts: int = 8
    """Experts in every second layer."""
    backends: tuple[str, ...] = ("grouped_mm", "triton")
    """Of --moe-backend; the others are compared with the first."""
    steps: int = 300
    """Steps of each run."""
    every: int = 10
    """Steps whose mean loss is a point of the curve."""
    batch_size: int = 16
    """Sequences per step."""
    at_once: int = 1
    """Runs at a time, on one GPU: most of a short one is starting and compiling."""
    precision: str = "amp_bfloat16"
    """Of the training command."""
    flags: str = ""
    """More flags for the training command, in one string."""
    record: Path | None = None
    """Append a JSON line per model to this file."""


def run(
    curves: Curves, model: str, backend: str, seed: int, logs: Path
) -> tuple[dict[str, Any], list[float]]:
    """The run's facts and its curve; raises CalledProcessError with its output shown where it fails."""
    name = f"{backend}-{seed}"
    data = ["--dataset-manifest", *curves.data] if curves.data else ["--dataset-type", "synthetic"]
    known = model if "_" in model or model.endswith(".json") else f"open_lm_{model}"
    command = [sys.executable, "-m", "open_lm.main", *data, "--model", known, "--moe-freq", "2",
               "--moe-num-experts", str(curves.experts), "--moe-capacity-factor", "0", "--moe-backend", backend,
               "--precision", curves.precision, "--batch-size", str(curves.batch_size), "--seed", str(seed),
               "--train-num-samples", "1000000000", "--epochs", "1", "--warmup", str(curves.steps // 10),
               "--max-steps", str(curves.steps), "--log-every-n-steps", str(curves.every),
               "--save-frequency", "0", *curves.flags.split()]  # fmt: skip
    done = subprocess.run([*command, "--logs", str(logs), "--name", name], capture_output=True, text=True)
    if done.returncode:
        print(done.stdout[-3000:], done.stderr[-3000:], sep="\n")
        done.check_returncode()
    first, *lines = [json.loads(line) for line in (logs / name / "log.jsonl").read_text().splitlines()]
    facts = {key: first["run"][key] for key in ("device", "torch", "commit")}
    losses = [e["train/loss"] for e in lines if "train/loss" in e and e["step"] % curves.every == 0]
    return facts | {"command": " ".join(command[1:])}, losses


def difference(one: Sequence[float], other: Sequence[float]) -> float:
    """Mean absolute difference of two curves' last thirds."""
    apart = [abs(a - b) for a, b in zip(one, other, strict=True)]
    return statistics.mean(apart[-max(1, len(apart) // 3) :])


def compare(curves: Curves, model: str, logs: Path) -> dict[str, Any]:
    """The record of one model."""
    first, *others = curves.backends
    with ThreadPoolExecutor(curves.at_once) as pool:
        runs = {
            which: pool.submit(run, curves, model, *which, logs)
            for which in ((first, 1), (first, 2), *((backend, 1) for backend in others))
        }
    facts, expected = runs[first, 1].result()
    again = runs[first, 2].result()[1]
    found = {backend: runs[backend, 1].result()[1] for backend in others}
    return {"model": model, "experts": curves.experts, "steps": curves.steps, "every": curves.every,
            "batch_size": curves.batch_size, "backend": first, "noise": difference(expected, again),
            "difference": {backend: difference(expected, losses) for backend, losses in found.items()},
            "losses": {first: expected, f"{first}, another seed": again} | found, **facts}  # fmt: skip


def main(curves: Curves) -> int:
    """Prints the table; 1 if a backend differs by more than the noise."""
    table = Table(
        title=f"Mean difference of the losses to {curves.backends[0]}'s, last third of {curves.steps} steps"
    )
    for column in ("model", "experts", "last loss", "another seed", *curves.backends[1:]):
        table.add_column(column, justify="right")
    good = True
    for model in curves.models:
        with tempfile.TemporaryDirectory() as logs:
            record = compare(curves, model, Path(logs))
        good = good and all(value <= record["noise"] for value in record["difference"].values())
        numbers = (record["losses"][curves.backends[0]][-1], record["noise"], *record["difference"].values())
        table.add_row(model, str(curves.experts), *(f"{number:.4f}" for number in numbers))
        if curves.record:
            with open(curves.record, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
    Console(width=110).print(table)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Curves, description=__doc__)))
