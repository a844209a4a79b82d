"""Every router and every balancing method, trained for the same steps on the demo's text: one table, one plot each.

    python moe/compare.py --record moe/records/routing.jsonl --figures moe/records/figures/routing

Each row is the ordinary training and evaluation command with the flags that `METHODS` shows.
`moe/tables.py routing` prints the record again.
"""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import demo
import tyro
from rich.console import Console
from rich.table import Table

from open_lm.report.chart import heat_map
from open_lm.report.page import stand_alone
from open_lm.report.runs import ALL, Run, perplexities, read_run

EXPERTS = "--moe-freq 2 --moe-num-experts 8 --moe-top-k 2 --moe-ffn-type swiglu --moe-init scaled"
DROPLESS = f"{EXPERTS} --moe-capacity-factor 0"
LIGHT = "--moe-loss-weight 0.01"
METHODS = {
    "dense": "",
    "none": f"{DROPLESS} --moe-balance none",
    "aux": f"{DROPLESS} --moe-balance aux {LIGHT}",
    "aux, capacity 1.25": f"{EXPERTS} --moe-balance aux {LIGHT}",
    "sequence": f"{DROPLESS} --moe-balance sequence {LIGHT}",
    "global": f"{DROPLESS} --moe-balance global {LIGHT}",
    "first_choice": f"{DROPLESS} --moe-balance first_choice {LIGHT}",
    "importance": f"{DROPLESS} --moe-balance importance {LIGHT}",
    "bias": f"{DROPLESS} --moe-balance bias",
    "sigmoid, bias and sequence": f"{DROPLESS} --moe-score sigmoid --moe-normalize-weights "
    "--moe-balance bias sequence --moe-loss-weight 0.0001",
    "expert_choice": f"{EXPERTS} --moe-router expert_choice --moe-capacity-factor 1",
    "expert_choice_causal": f"{EXPERTS} --moe-router expert_choice_causal --moe-capacity-factor 1",
    "sinkhorn": f"{DROPLESS} --moe-router sinkhorn",
    "threshold": f"{EXPERTS} --moe-router threshold --moe-balance first_choice {LIGHT} --moe-capacity-factor 0.625 "
    "--moe-eval-capacity-factor 1 --moe-min-capacity 4 --moe-capacity-per sequence --moe-drop-policy choice",
    "threshold, dropless": f"{DROPLESS} --moe-router threshold --moe-balance first_choice {LIGHT}",
    "coordinate_descent": f"{DROPLESS} --moe-router coordinate_descent {LIGHT}",
    "quantile": f"{DROPLESS} --moe-router quantile",
    "hash": f"{DROPLESS} --moe-router hash",
    "uniform": f"{DROPLESS} --moe-router uniform",
    # combine weights: hash has 1/K, the others' are at first near 1/E
    "aux, normalised": f"{DROPLESS} --moe-balance aux {LIGHT} --moe-normalize-weights",
    "hash, weights 1/E": f"{DROPLESS} --moe-router hash --moe-weight-scale 0.25",
}


@dataclass(frozen=True)
class Compare:
    """Train each method of METHODS on the demo's corpus, evaluate it, and show all in one table."""

    methods: tuple[str, ...] = tuple(METHODS)
    """Which of METHODS."""

    steps: int = 300
    """Steps of each run."""

    global_batch_size: int = 32
    """Sequences of 256 tokens in a step."""

    flags: str = "--precision amp_bf16"
    """More flags for all runs, in one string."""

    corpus: Path = Path("corpus")
    """The demo's corpus; written here if it is not there."""

    logs: Path = Path("logs/compare")
    """Folder of the runs."""

    record: Path | None = None
    """Append a line per run to this file."""

    figures: Path | None = None
    """Write a plot of each run's expert loads over time into this folder."""


def main() -> None:
    compare = tyro.cli(Compare)
    if unknown := [name for name in compare.methods if name not in METHODS]:
        raise SystemExit(f"--methods {unknown[0]}: expected some of {', '.join(METHODS)}")
    if not compare.corpus.is_dir():
        demo.call("open_lm.tokenize.corpus", demo.corpus_flags(demo.Demo(corpus=compare.corpus)))
    compare.logs.mkdir(parents=True, exist_ok=True)
    vocab_size = json.loads((compare.corpus / "corpus.json").read_text())["vocab_size"]
    model = {**demo.MODEL, "seq_len": 256, "vocab_size": vocab_size}
    (compare.logs / "model.json").write_text(json.dumps(model, indent=1) + "\n")
    rows = []
    for method in compare.methods:
        if (line := measure(compare, method)) is None:
            continue
        rows.append(line)
        if compare.record:
            with open(compare.record, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
    show(rows)
    if len(rows) < len(compare.methods):
        sys.exit(f"{len(compare.methods) - len(rows)} methods failed")


def measure(compare: Compare, method: str) -> dict[str, Any] | None:
    """Trains and evaluates one method; its line of the record, None where the command failed."""
    name = method.replace(", ", "-").replace(" ", "-").replace("/", "-")
    setup = demo.Demo(steps=compare.steps, global_batch_size=compare.global_batch_size, corpus=compare.corpus)
    flags = [
        *demo.train_flags(setup, compare.logs, "dense"),
        *METHODS[method].split(),
        *compare.flags.split(),
    ]
    flags += [
        "--val-data",
        *demo.manifests(setup, "held_out"),
        "--val-data-name",
        "prose",
        "code",
        "--name",
        name,
    ]
    folder = compare.logs / name
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "open_lm.main", *flags],
        env=demo.KEEP_MEMORY | os.environ,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        print(f"{method} failed: {done.stdout[-2000:]}\n{done.stderr[-3000:]}", flush=True)
        return None
    run = read_run(folder)
    line = {"method": method, "flags": METHODS[method], "steps": compare.steps, "tokens": run.tokens,
            "perplexity": perplexities(run)[ALL], "tokens_per_second": run.tokens_per_second,
            **balance_of(run), "seconds": time.perf_counter() - start,
            **{key: run.facts[key] for key in ("commit", "torch", "device", "parameters", "active_parameters")},
            "command": f"python -m open_lm.main {' '.join(flags)}"}  # fmt: skip
    if compare.figures and "fullest" in line:
        compare.figures.mkdir(parents=True, exist_ok=True)
        line["plot"] = f"{name}.svg"
        (compare.figures / line["plot"]).write_text(plot(run, method), encoding="utf-8")
    return line


def balance_of(run: Run) -> dict[str, float]:
    """The last tenth of a run's log lines: fullest expert over the mean, dead experts, dropped share; in training
    the means over MoE layers, in evaluation over the held-out sets."""
    lines = [line["router"] for line in run.training if line.get("router")]
    if not lines:
        return {}
    layers = [layer for line in lines[-max(1, len(lines) // 10) :] for layer in line]
    mean = lambda key: sum(layer[key] for layer in layers) / len(layers)
    return {
        "fullest": mean("fullest_over_mean"),
        "dead": mean("dead_experts"),
        "dropped": mean("dropped_share"),
        "entropy": mean("entropy"),
    }


def plot(run: Run, method: str) -> str:
    """The share of the assignments of each expert of the last MoE layer over the run."""
    shares = [(line["tokens"], line["router"][-1]["share"]) for line in run.training if line.get("router")]
    return stand_alone(heat_map(f"{method}: share of the assignments by expert", shares, x_label="tokens"))


def show(rows: list[dict[str, Any]]) -> None:
    """The table on the terminal."""
    table = Table(title="Held-out perplexity and balance by routing method", title_justify="left")
    for head in ("", "perplexity", "fullest over mean", "dead", "dropped in training", "tokens/s"):
        table.add_column(head, justify="left" if not head else "right")
    for r in rows:
        balance = (
            (f"{r['fullest']:.2f}", f"{r['dead']:.1f}", f"{r['dropped']:.1%}")
            if "fullest" in r
            else ("",) * 3
        )
        table.add_row(r["method"], f"{r['perplexity']:.1f}", *balance, f"{r['tokens_per_second']:,.0f}")
    Console().print(table)


if __name__ == "__main__":
    main()
