"""What runs' folders say: logs and results read back, perplexities and their yardstick, and it all in sentences."""

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from open_lm.report.chart import short

ALL = "all held-out text"


class Evaluation(NamedTuple):
    """One --val-data entry at one step: loss in nats per token, and how many tokens it is the mean of."""

    step: int
    tokens: int
    entry: str
    loss: float
    val_tokens: int


class Run(NamedTuple):
    """What LOGS/NAME says: the facts of its first line, its training lines, its evaluations, by step."""

    name: str
    facts: dict[str, Any]
    training: list[dict[str, Any]]
    evaluations: list[Evaluation]

    @property
    def tokens(self) -> int:
        """Tokens trained on."""
        return max(
            [line["tokens"] for line in self.training] + [e.tokens for e in self.evaluations], default=0
        )

    @property
    def last(self) -> dict[str, Evaluation]:
        """The last evaluation of each entry."""
        return {e.entry: e for e in self.evaluations}

    @property
    def tokens_per_second(self) -> float | None:
        """Median over the log's lines: a slow start or a pause does not count."""
        speeds = [
            line["train/tokens_per_second"] for line in self.training if "train/tokens_per_second" in line
        ]
        return statistics.median(speeds) if speeds else None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """JSON objects of a .jsonl; a last line that was cut off is left out. Raises ValueError on other damage."""
    lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
    read = []
    for number, line in enumerate(lines, 1):
        try:
            read += [json.loads(line)] if line.strip() else []
        except ValueError as error:
            if number < len(lines):
                raise ValueError(f"{path}:{number} is not JSON: {error}") from error
    return read


def read_run(folder: Path) -> Run:
    """Reads log.jsonl and checkpoints/results.jsonl. Steps that were run again after a resume count once.

    Raises ValueError if the folder holds no log.
    """
    lines = read_lines(folder / "log.jsonl")
    if not lines:
        raise ValueError(f"{folder}: no log.jsonl with lines in it; name the folder of a run, LOGS/NAME")
    facts: dict[str, Any] = {}
    training: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    for line in lines:
        if "run" in line:
            facts |= line["run"]
        elif "train/loss" in line:
            while training and training[-1]["step"] >= line["step"]:
                training.pop()
            training.append(line)
        else:
            results.append(line)
    results += read_lines(folder / "checkpoints" / "results.jsonl")
    evaluations = [e for line in results if (e := find_evaluation(line))]
    found = {(e.step, e.entry): e for e in evaluations}
    return Run(facts.get("name", folder.name), facts, training, sorted(found.values(), key=lambda e: e.step))


def find_evaluation(line: dict[str, Any]) -> Evaluation | None:
    """What a line of log.jsonl (valid/loss; of one among several entries valid/NAME/loss) or of results.jsonl
    (loss) says; None of a line of another kind, of averaged weights, or of another program."""
    entry = line.get("val_data")
    if isinstance(entry, list) and len(entry) == 1:
        entry = entry[0]
    if "step" not in line or not isinstance(entry, str) or line.get("average", "none") != "none":
        return None
    if "soup" in line or not Path(line.get("checkpoint_path", "epoch_")).name.startswith("epoch_"):
        return None  # not the run's own weights, but a sum of checkpoints, or an average's file
    for prefix, tokens in (
        ("valid/", "tokens"), (f"valid/{line.get('val_name')}/", "tokens"), ("", "train_tokens"),
    ):  # fmt: skip
        if line.keys() >= {tokens, f"{prefix}loss", f"{prefix}tokens"}:
            loss, val_tokens = float(line[f"{prefix}loss"]), line[f"{prefix}tokens"]
            return Evaluation(line["step"], line[tokens], entry, loss, val_tokens)
    return None


def together(evaluations: Sequence[Evaluation]) -> float:
    """Perplexity over all tokens of several entries: exp of the token-weighted mean loss."""
    total = sum(e.val_tokens for e in evaluations)
    return math.exp(min(sum(e.loss * e.val_tokens for e in evaluations) / total, 700.0))


def perplexities(run: Run) -> dict[str, float]:
    """Last held-out perplexity by entry, and ALL where there are several."""
    values = {entry: together([e]) for entry, e in run.last.items()}
    return ({ALL: together(list(run.last.values()))} if len(values) > 1 else {}) | values


def unigram_perplexities(entries: Sequence[str]) -> dict[str, float]:
    """Of entries within a corpus of `open_lm.tokenize.corpus`, from its corpus.json; ALL if all its sources are."""
    values: dict[str, float] = {}
    for entry in entries:
        for folder in Path(entry).parents:
            if (folder / "corpus.json").is_file():
                known = json.loads((folder / "corpus.json").read_text())["held_out_unigram_perplexity"]
                source = Path(entry).relative_to(folder).parts[0]
                if source in known and "held_out" in Path(entry).parts:
                    values[entry] = known[source]
                    if len(values) == len(known) - 1:
                        values[ALL] = known["all"]
                break
    return values


def percent(ratio: float) -> str:
    """1.083 → `8.3%`."""
    return f"{abs(ratio - 1) * 100:.1f}%"


def observations(runs: Sequence[Run], unigram: dict[str, float]) -> list[str]:
    """What is seen, in sentences computed from the numbers; nothing else is claimed."""
    said = []
    for run in runs:
        values = perplexities(run)
        if not values:
            said.append(f"{run.name} trained on {short(run.tokens)} tokens and was not evaluated.")
            continue
        name, value = next(iter(values.items()))
        sentence = f"{run.name} saw {short(run.tokens)} tokens and reached held-out perplexity {value:,.1f}"
        if name in unigram:
            sentence += (
                f", {unigram[name] / value:.2f} times below the unigram perplexity {unigram[name]:,.0f}"
            )
        said.append(sentence + ".")
    first = runs[0]
    for other in runs[1:]:
        if set(first.last) != set(other.last) or not first.last:
            continue
        ratio = next(iter(perplexities(other).values())) / next(iter(perplexities(first).values()))
        if not math.isfinite(ratio):
            continue
        place = "behind" if ratio > 1.0005 else "ahead of" if ratio < 0.9995 else "level with"
        by = f" by {percent(ratio)} in perplexity" if place != "level with" else ""
        if first.tokens == other.tokens:
            at = f"at equal tokens ({short(first.tokens)}, one run each)"
        else:
            at = f"though on {short(other.tokens)} tokens against {short(first.tokens)}"
        sentence = f"{other.name} is {place} {first.name}{by}, {at}"
        if first.tokens_per_second and other.tokens_per_second:
            sentence += (
                f", at {other.tokens_per_second / first.tokens_per_second:.2f} times its tokens per second"
            )
        said.append(sentence + ".")
    for run in runs:
        layers = run.training[-1].get("router") if run.training else None
        if not layers:
            continue
        fullest = max(layers, key=lambda layer: layer["fullest_over_mean"])
        dropped = max(layers, key=lambda layer: layer["dropped_share"])
        dead = sum(layer["dead_experts"] for layer in layers)
        said.append(
            f"At the end of {run.name} the fullest expert gets {fullest['fullest_over_mean']:.2f} times the mean "
            f"(layer {fullest['layer']}), at most {dropped['dropped_share']:.1%} of a layer's assignments are "
            f"dropped (layer {dropped['layer']}), and {dead or 'none'} of {sum(len(x['share']) for x in layers)} "
            f"experts {'is' if dead == 1 else 'are'} dead."
        )
    return said
