"""`make demo`: trains a dense model and a mixture of experts on real text, evaluates both, writes a report.

    python moe/demo.py

Every step is an ordinary command of this project, printed before it runs, to copy and change. A run's folder is
LOGS/{dense,moe}; LOGS is logs/demo, or logs/demo-2 and so on where that exists.
"""

import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

from open_lm.report import write_report
from open_lm.report.runs import ALL, Run, perplexities, unigram_perplexities

console = Console(soft_wrap=True, highlight=False)

MODEL = {"hidden_dim": 192, "n_layers": 4, "n_heads": 6, "post_embed_norm": False, "weight_tying": False}
MOE_FLAGS = (
    "--moe-freq 2 --moe-num-experts 8 --moe-top-k 2 --moe-ffn-type swiglu --moe-init scaled "
    "--moe-capacity-factor 0 --moe-normalize-weights --moe-loss-weight 0.01"
)
RUNS = {"dense": "", "moe": MOE_FLAGS}
# On a CPU glibc returns each step's memory to the system and asks for it again: training is then half as fast.
KEEP_MEMORY = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**33),
    "MALLOC_TOP_PAD_": str(2**28),
    "MALLOC_MMAP_THRESHOLD_": str(2**32),
}


@dataclass(frozen=True)
class Demo:
    """Train a dense model and an 8-expert MoE on the text of this Python environment; compare them."""

    steps: int = 300
    """Steps of --global-batch-size sequences, for each model."""

    global_batch_size: int = 8
    """Sequences in a step."""

    seq_len: int = 256
    """Tokens in a sequence."""

    lr: float = 3e-3
    """Peak learning rate."""

    corpus: Path = Path("corpus")
    """The text: written here, or reused."""

    megabytes_per_source: float = 8.0
    """Text to take for the corpus, for each of prose and code."""

    logs: Path | None = None
    """Folder of this demo's runs. Default: logs/demo, numbered where it exists."""

    record: Path | None = None
    """Append a line per run to this file, e.g. moe/records/demo.jsonl."""

    check: bool = True
    """Fail unless both perplexities are below half of the unigram's."""


def main() -> None:
    start = time.perf_counter()
    demo = tyro.cli(Demo)
    demo = replace(demo, logs=demo.logs or free_folder(Path("logs/demo")))
    runs = run_demo(demo)
    assert demo.logs is not None
    unigram = unigram_perplexities(list(runs[0].last()))
    console.print(results_table(runs, unigram))
    minutes = (time.perf_counter() - start) / 60
    console.print(f"report: {demo.logs / 'report.html'}   ({minutes:.1f} minutes)")
    if demo.record:
        record(demo.record, runs, unigram, minutes)
    if demo.check:
        check_perplexity(runs, unigram)


def run_demo(demo: Demo) -> list[Run]:
    """Corpus, training, evaluation, report; returns what the runs' logs say."""
    logs = demo.logs
    assert logs is not None
    call("open_lm.tokenize.corpus", corpus_flags(demo))
    logs.mkdir(parents=True, exist_ok=True)
    vocab_size = json.loads((demo.corpus / "corpus.json").read_text())["vocab_size"]
    model = {**MODEL, "seq_len": demo.seq_len, "vocab_size": vocab_size}
    (logs / "model.json").write_text(json.dumps(model, indent=1) + "\n")
    for name in RUNS:
        call("open_lm.main", train_flags(demo, logs, name))
    for name in RUNS:
        call("open_lm.main", evaluate_flags(demo, logs, name))
    return write_report(
        [logs / name for name in RUNS], logs / "report.html", "A dense model and a mixture of experts"
    )


def corpus_flags(demo: Demo) -> list[str]:
    """The corpus's settings."""
    size = f"--seq-len {demo.seq_len} --max-megabytes-per-source {demo.megabytes_per_source}"
    return ["--output", str(demo.corpus), *size.split()]


def manifests(demo: Demo, part: str) -> list[str]:
    """Manifests of prose and code."""
    return [str(demo.corpus / source / part / "manifest.jsonl") for source in ("prose", "code")]


def model_flags(demo: Demo, logs: Path, name: str) -> list[str]:
    """What training and evaluation of a run share: data format, network, batch."""
    flags = f"--data-key json.gz --model {shlex.quote(str(logs / 'model.json'))} "
    flags += "--model-norm gain_only_layer_norm --precision amp_bf16 "
    flags += f"--global-batch-size {demo.global_batch_size} --logs {shlex.quote(str(logs))} {RUNS[name]}"
    return shlex.split(flags)


def train_flags(demo: Demo, logs: Path, name: str) -> list[str]:
    """One training run of `demo.steps` steps: one interval, so one checkpoint, epoch_1.pt."""
    tokens = demo.steps * demo.global_batch_size * demo.seq_len
    optim = f"--lr {demo.lr} --lr-scheduler cosine --lr-cooldown-end {demo.lr / 20:g} "
    optim += f"--warmup {max(1, demo.steps // 10)} "
    optim += "--wd 0.1 --beta2 0.95 --grad-clip-norm 1 --workers 1 --log-every-n-steps 10 "
    optim += f"--train-num-samples {tokens} --epochs 1"
    return [
        *("--dataset-manifest", *manifests(demo, "train"), "--train-data-mix-weights", "0.725", "0.275"),
        *model_flags(demo, logs, name),
        *optim.split(),
        *("--name", name),
    ]


def evaluate_flags(demo: Demo, logs: Path, name: str) -> list[str]:
    """Evaluation of a run's last checkpoint; its results go beside the checkpoint."""
    checkpoint = logs / name / "checkpoints" / "epoch_1.pt"
    return [
        *("--val-data", *manifests(demo, "held_out")),
        *model_flags(demo, logs, name),
        *("--resume", str(checkpoint), "--name", f"{name}-evaluation"),
    ]


def call(module: str, flags: Sequence[str]) -> None:
    """Prints and runs `python -m MODULE FLAGS` on this terminal; ends the demo if it fails."""
    console.print(f"\n[bold]$ python -m {module} {shlex.join(flags)}[/bold]", markup=True)
    done = subprocess.run([sys.executable, "-m", module, *flags], env=KEEP_MEMORY | os.environ)
    if done.returncode:
        sys.exit(f"demo: {module} ended with status {done.returncode}")


def free_folder(folder: Path) -> Path:
    """`folder`, or the first of folder-2, folder-3, … that does not exist."""
    number = 1
    while (free := folder if number == 1 else folder.with_name(f"{folder.name}-{number}")).exists():
        number += 1
    return free


def results_table(runs: Sequence[Run], unigram: dict[str, float]) -> Table:
    """Parameters, perplexity of all held-out text and of each source beside the unigram's, speed."""
    table = Table(title="held-out perplexity", title_justify="left")
    entries = list(perplexities(runs[0]))
    names = ["both" if entry == ALL else Path(entry).parts[-3] for entry in entries]
    for head in ("", "parameters", "active", *names, "tokens/s"):
        table.add_column(head, justify="left" if not head else "right")
    for run in runs:
        values = perplexities(run)
        counts = [f"{run.facts[key]:,}" for key in ("parameters", "active_parameters")]
        cells = [f"{values[entry]:,.1f}" for entry in entries]
        table.add_row(run.name, *counts, *cells, f"{run.tokens_per_second or 0:,.0f}")
    table.add_row("unigram", "", "", *(f"{unigram[entry]:,.1f}" for entry in entries), "")
    return table


def record(path: Path, runs: Sequence[Run], unigram: dict[str, float], minutes: float) -> None:
    """What `moe/tables.py demo` prints, a line per run; held-out sets by their source's name."""
    name = lambda entry: "both" if entry == ALL else Path(entry).parts[-3]
    machine = (
        f"{os.cpu_count()} cores, {platform.processor() or platform.machine()}, {runs[0].facts['device']}"
    )
    with open(path, "a", encoding="utf-8") as file:
        for run in runs:
            line = {
                "run": run.name, "started": round(time.time() - 60 * minutes), "minutes": minutes,
                "parameters": run.facts["parameters"], "active_parameters": run.facts["active_parameters"],
                "tokens": run.tokens, "tokens_per_second": run.tokens_per_second,
                "perplexity": {name(entry): value for entry, value in perplexities(run).items()},
                "unigram": {name(entry): value for entry, value in unigram.items()},
                "commit": run.facts["commit"], "torch": run.facts["torch"], "machine": machine,
            }  # fmt: skip
            file.write(json.dumps(line) + "\n")


def check_perplexity(runs: Sequence[Run], unigram: dict[str, float]) -> None:
    """Ends with status 1 unless every run's perplexity is below half of the unigram's."""
    for run in runs:
        value = perplexities(run)[ALL]
        if not value < unigram[ALL] / 2:
            sys.exit(
                f"demo: {run.name} reached perplexity {value:.1f}, not below half of the unigram's "
                f"{unigram[ALL]:.1f}; something is wrong, or --steps is too small"
            )


if __name__ == "__main__":
    main()
