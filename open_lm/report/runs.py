"""What runs' folders say: logs and results read back, perplexities and their yardstick, and it all in sentences."""

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from open_lm.log.lines import read_lines, supersede
from open_lm.report.chart import short

ALL = "all held-out text"


class Evaluation(NamedTuple):
    """One --val-data entry at one step: loss in nats per token, and how many tokens it is the mean of.

    `average` names the averaged weights that were evaluated, "" the run's own.
    """

    step: int
    tokens: int
    entry: str
    loss: float
    val_tokens: int
    average: str = ""


class Run(NamedTuple):
    """What LOGS/NAME says: the facts of its start, its training lines, its evaluations, by step.

    `resumed`: after which steps it went on; `superseded`: lines of steps that it then did again, left out.
    """

    name: str
    facts: dict[str, Any]
    training: list[dict[str, Any]]
    evaluations: list[Evaluation]
    resumed: tuple[int, ...] = ()
    superseded: int = 0

    @property
    def tokens(self) -> int:
        """Tokens trained on."""
        return max(
            [line["tokens"] for line in self.training] + [e.tokens for e in self.evaluations], default=0
        )

    @property
    def averages(self) -> list[str]:
        """Names of the averaged weights that were evaluated."""
        return list(dict.fromkeys(e.average for e in self.evaluations if e.average))

    def last(self, average: str = "") -> dict[str, Evaluation]:
        """The last evaluation of each entry, of the run's own weights or of an average's."""
        return {e.entry: e for e in self.evaluations if e.average == average}

    def curve(self, metric: str) -> list[tuple[float, float]]:
        """(tokens, value) of a training metric, of the lines that have it."""
        return [(line["tokens"], float(line[metric])) for line in self.training if metric in line]

    def median(self, metric: str) -> float | None:
        """Over the log's lines: a slow start or a pause does not count."""
        values = [value for _, value in self.curve(metric) if math.isfinite(value)]
        return statistics.median(values) if values else None

    @property
    def tokens_per_second(self) -> float | None:
        return self.median("train/tokens_per_second")


def read_run(folder: Path) -> Run:
    """Reads log.jsonl and checkpoints/results.jsonl. Of steps that were done again after a resume the later
    lines count.

    Raises ValueError if the folder holds no log.
    """
    lines, superseded = supersede(read_lines(folder / "log.jsonl"))
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
    found = read_evaluations(results)
    gone = read_evaluations(superseded).keys() - found.keys()
    for key, one in read_evaluations(read_lines(folder / "checkpoints" / "results.jsonl")).items():
        if key not in gone:
            found[key] = one
    return Run(
        facts.get("name", folder.name),
        facts,
        training,
        sorted(found.values(), key=lambda e: e.step),
        tuple(line["resumed"] for line in lines if "resumed" in line),
        len(superseded),
    )


def read_evaluations(lines: Sequence[dict[str, Any]]) -> dict[tuple[int, str, str], Evaluation]:
    """The evaluations among `lines`, by step, entry and average; of equal ones the last."""
    found = [e for line in lines if (e := find_evaluation(line))]
    return {(e.step, e.entry, e.average): e for e in found}


def find_evaluation(line: dict[str, Any]) -> Evaluation | None:
    """What a line of log.jsonl (`valid/loss`, or `valid/NAME/loss`) or of results.jsonl (`loss`) says; None of
    a line of another kind, of sums of checkpoints and averages' files, and of another program's."""
    entry, average = line.get("val_data"), line.get("average") or "none"
    if isinstance(entry, list) and len(entry) == 1:
        entry = entry[0]
    own = average != "none" or Path(line.get("checkpoint_path", "epoch_")).name.startswith("epoch_")
    if not isinstance(entry, str) or "soup" in line or not own:
        return None
    names = [key for key in line if key.startswith("valid/") and key.endswith("/loss")] + ["loss"]
    prefix = names[0].removesuffix("loss")
    seen = "tokens" if prefix else "train_tokens"
    if not line.keys() >= {"step", seen, f"{prefix}loss", f"{prefix}tokens"}:
        return None
    loss, val_tokens = float(line[f"{prefix}loss"]), line[f"{prefix}tokens"]
    return Evaluation(line["step"], line[seen], entry, loss, val_tokens, "" if average == "none" else average)


def together(evaluations: Sequence[Evaluation]) -> float:
    """Perplexity over all tokens of several entries: exp of the token-weighted mean loss."""
    total = sum(e.val_tokens for e in evaluations)
    return math.exp(min(sum(e.loss * e.val_tokens for e in evaluations) / total, 700.0))


def perplexities(run: Run, average: str = "") -> dict[str, float]:
    """Last held-out perplexity by entry, and ALL where there are several."""
    last = run.last(average)
    values = {entry: together([e]) for entry, e in last.items()}
    return ({ALL: together(list(last.values()))} if len(values) > 1 else {}) | values


def perplexity_curve(run: Run, entry: str, average: str = "") -> list[tuple[float, float]]:
    """(tokens, held-out perplexity of an entry) over time; of ALL where every entry was evaluated."""
    evaluations = [e for e in run.evaluations if e.average == average and entry in (ALL, e.entry)]
    steps = dict.fromkeys(e.step for e in evaluations)
    groups = [[e for e in evaluations if e.step == step] for step in steps]
    whole = len(run.last(average)) if entry == ALL else 1
    return [(group[0].tokens, together(group)) for group in groups if len(group) == whole]


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
        for average in run.averages:
            name, averaged = next(iter(perplexities(run, average).items()))
            if name in values and math.isfinite(ratio := averaged / values[name]):
                place = "below" if ratio < 1 else "above"
                said.append(
                    f"{average} of {run.name} reached {averaged:,.1f}, {percent(ratio)} {place} its own weights."
                )
    for run in runs:
        if run.resumed:
            after = ", ".join(f"{step:,}" for step in run.resumed)
            left_out = f"; {run.superseded} log lines of steps that it did again are left out"
            said.append(f"{run.name} was resumed after step {after}{left_out if run.superseded else ''}.")
    first = runs[0]
    for other in runs[1:]:
        if set(first.last()) != set(other.last()) or not first.last():
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
