"""Runs to one HTML page that opens anywhere: no scripts, no requests."""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from html import escape
from typing import Any, NamedTuple

from open_lm.report.chart import CHART_STYLE, COLOURS, Series, bar_chart, heat_map, line_chart, short
from open_lm.report.runs import (
    ALL,
    Run,
    observations,
    perplexities,
    perplexity_curve,
    together,
    unigram_perplexities,
)


class Measure(NamedTuple):
    """A metric of speed or memory: where it is logged, its names in the table and above its chart."""

    metric: str
    column: str
    title: str
    write: Callable[[float], str]


MEASURES = (
    Measure("train/tokens_per_second", "tokens/s", "Tokens per second", lambda v: f"{v:,.0f}"),
    Measure("train/mfu", "MFU", "Model FLOPs utilisation", lambda v: f"{v:.1%}"),
    Measure("train/memory_gib", "GiB", "Memory at most, GiB per GPU", lambda v: f"{v:.3g}"),
)


def short_entries(entries: Sequence[str]) -> dict[str, str]:
    """Entries without what they have in common: corpus/{prose,code}/held_out/manifest.jsonl → prose, code."""
    parts = [entry.split("/") for entry in dict.fromkeys(entries)]
    names = {}
    for own in parts:
        others = [p for p in parts if p != own]
        differing = [word for i, word in enumerate(own) if any(p[i : i + 1] != [word] for p in others)]
        words = [w for w in (differing or own[-3:]) if w != "manifest.jsonl"]
        names["/".join(own)] = "/".join(words) or "/".join(own)
    return names | {ALL: ALL}


def entries_of(runs: Sequence[Run]) -> dict[str, str]:
    """Short names of all runs' --val-data entries, ALL first where there are several."""
    entries = list(dict.fromkeys(entry for run in runs for entry in perplexities(run)))
    names = short_entries([entry for entry in entries if entry != ALL])
    return {entry: names[entry] for entry in entries}


def summary_rows(runs: Sequence[Run], unigram: dict[str, float]) -> list[list[str]]:
    """Header and one row per run, and the unigram's, as strings."""
    entries = entries_of(runs)
    columns = ["all" if entry == ALL else name for entry, name in entries.items()]
    measured = [m for m in MEASURES if any(run.curve(m.metric) for run in runs)]
    rows = [["run", "parameters", "active", "steps", "tokens", *(f"ppl {c}" for c in columns)]]
    rows[0] += [m.column for m in measured]
    for run in runs:
        steps = max([line["step"] for line in run.training] + [e.step for e in run.evaluations], default=0)
        counts = [run.facts.get("parameters"), run.facts.get("active_parameters"), steps, run.tokens]
        rows.append(
            [run.name]
            + [f"{count:,}" if count is not None else "–" for count in counts]
            + perplexity_cells(perplexities(run), entries)
            + ["–" if (value := run.median(m.metric)) is None else m.write(value) for m in measured]
        )
        for average in run.averages:
            cells = perplexity_cells(perplexities(run, average), entries)
            rows.append([f"{run.name}, {average}", "", "", "", "", *cells, *("" for _ in measured)])
    if unigram:
        cells = perplexity_cells(unigram, entries)
        rows.append(["unigram (yardstick)", "", "", "", "", *cells, *("" for _ in measured)])
    return rows


def perplexity_cells(values: dict[str, float], entries: Iterable[str]) -> list[str]:
    return [f"{values[entry]:,.1f}" if entry in values else "–" for entry in entries]


def loss_chart(runs: Sequence[Run]) -> str:
    """Training loss of all runs over tokens, with held-out losses as points."""
    series = []
    for colour, run in enumerate(runs):
        own = [e for e in run.evaluations if not e.average]
        points = []
        for step, tokens in sorted({(e.step, e.tokens) for e in own}):
            points.append((tokens, math.log(together([e for e in own if e.step == step]))))
        series.append(Series(run.name, colour, run.curve("train/loss"), points))
    return line_chart("Loss", series, x_label="tokens", y_label="nats per token")


def perplexity_chart(runs: Sequence[Run], unigram: dict[str, float]) -> str:
    """Bars of the last held-out perplexity: a group per entry, a bar per run, the unigram's in grey."""
    groups = []
    for entry, name in entries_of(runs).items():
        bars: list[tuple[str, int | None, float]] = [
            (run.name, colour, perplexities(run)[entry])
            for colour, run in enumerate(runs)
            if math.isfinite(perplexities(run).get(entry, math.nan))
        ]
        bars += [("unigram", None, unigram[entry])] if entry in unigram else []
        groups.append((name, bars))
    return bar_chart("Held-out perplexity", groups)


def perplexity_curves(runs: Sequence[Run]) -> str:
    """A figure per entry: held-out perplexity over tokens, on a log scale; none if no run has two points."""
    figures = []
    for entry, name in entries_of(runs).items():
        curves = [
            (f"{run.name}, {average}" if average else run.name, colour, perplexity_curve(run, entry, average))
            for colour, run in enumerate(runs)
            for average in ("", *run.averages)
        ]
        series = [
            Series(name, colour, [], [(x, math.log(y)) for x, y in points if math.isfinite(y)])
            for name, colour, points in curves
        ]
        if any(len(one.points) > 1 for one in series):
            figures.append(small_chart(name, series, y_format=lambda y: short(math.exp(y))))
    return f'<div class="pairs">{"".join(figures)}</div>' if figures else ""


def measure_section(runs: Sequence[Run]) -> str:
    """Speed, MFU and memory over tokens: a figure for each that some run has logged."""
    figures = []
    for measure in MEASURES:
        series = [Series(run.name, i, run.curve(measure.metric)) for i, run in enumerate(runs)]
        if any(one.line for one in series):
            figures.append(small_chart(measure.title, series, from_zero=True, y_format=measure.write))
    return f'<h2>Speed and memory</h2><div class="pairs">{"".join(figures)}</div>' if figures else ""


def small_chart(title: str, series: Sequence[Series], **options: Any) -> str:
    chart = line_chart(title, series, x_label="tokens", y_label="", size=(450, 220), **options)
    return f"<figure><figcaption>{escape(title)}</figcaption>{chart}</figure>"


def router_section(run: Run) -> str:
    """Expert load of each MoE layer over time, and the layers' entropy, fullest expert, dropped share."""
    lines = [line for line in run.training if line.get("router")]
    layers = [layer["layer"] for layer in lines[-1]["router"]]

    def values(position: int, key: str) -> list[tuple[float, Any]]:
        found = [(line["tokens"], line["router"][position]) for line in lines]
        return [(tokens, layer[key]) for tokens, layer in found if key in layer]

    maps = []
    for position, layer in enumerate(layers):
        title = f"Layer {layer}: share of the assignments by expert"
        chart = heat_map(title, values(position, "share"), x_label="tokens")
        maps.append(f"<figure><figcaption>Layer {layer}</figcaption>{chart}</figure>")
    experts = {len(layer["share"]) for layer in lines[-1]["router"]}
    undecided = (math.log(max(experts)), f"log {max(experts)}: undecided") if len(experts) == 1 else None
    small = []
    for title, key, reference, write in (
        ("Router entropy, nats", "entropy", undecided, short),
        ("Fullest expert over the mean (1: balanced)", "fullest_over_mean", (1.0, ""), short),
        ("Dropped share", "dropped_share", None, lambda value: f"{100 * value:.3g}%"),
        ("Dead experts", "dead_experts", None, lambda value: f"{value:.0f}" if value % 1 == 0 else ""),
    ):
        series = [Series(f"layer {n}", i, values(i, key)) for i, n in enumerate(layers)]
        small.append(small_chart(title, series, reference=reference, from_zero=True, y_format=write))
    if any("largest_bias" in layer for line in lines for layer in line["router"]):
        series = [Series(f"layer {n}", i, values(i, "largest_bias")) for i, n in enumerate(layers)]
        small.append(small_chart("Largest bias of an expert", series, from_zero=True))
    if run.curve("train/router_loss"):
        series = [Series("in the objective", 0, run.curve("train/router_loss"))]
        small.append(small_chart("Router losses, weighted", series, from_zero=True))
    return (
        f"<h2>Experts of {escape(run.name)}</h2>"
        '<p class="note">Share of the assignments that each expert receives, before any is dropped. No colour: '
        'the even share; <span class="key over"></span> up to twice it or more; <span class="key under"></span> '
        "down to half of it or less. At the right, each expert's last share.</p>"
        f'<div class="pairs">{"".join(maps)}</div><div class="pairs">{"".join(small)}</div>'
        f'<div class="scroll"><table class="layers">{layer_rows(lines[-1]["router"])}</table></div>'
    )


def layer_rows(layers: Sequence[dict[str, Any]]) -> str:
    """Table rows: the last statistics of each MoE layer."""
    heads = ["last logged", "entropy, nats", "fullest over mean", "dropped", "dead experts"]
    biased = any("largest_bias" in layer for layer in layers)
    heads += ["largest bias"] * biased
    rows = ["<tr>" + "".join(f"<th>{head}</th>" for head in heads) + "</tr>"]
    for layer in layers:
        experts = len(layer["share"])
        cells = (
            f"layer {layer['layer']}",
            f"{layer['entropy']:.3f} of {math.log(experts):.3f}",
            f"{layer['fullest_over_mean']:.2f}",
            f"{layer['dropped_share']:.1%}",
            f"{layer['dead_experts']} of {experts}",
            *([f"{layer.get('largest_bias', 0.0):.3g}"] * biased),
        )
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return "".join(rows)


def details(run: Run, colour: int) -> str:
    """The run's commit, machine and flags, folded."""
    flags = run.facts.get("flags") or {}
    rows = "".join(
        f"<tr><td>--{escape(str(key)).replace('_', '-')}</td><td>{escape(json.dumps(value))}</td></tr>"
        for key, value in flags.items()
        if value not in (None, [], "")
    )
    facts = ", ".join(
        f"{key.replace('_', ' ')} {run.facts[key]}"
        for key in ("commit", "torch", "device", "world_size")
        if run.facts.get(key) is not None
    )
    head = f'<span class="key s{colour % COLOURS}"></span>{escape(run.name)}'
    return (
        f'<details><summary>{head}<span class="facts">{escape(facts)}</span></summary>'
        f'<div class="scroll"><table class="flags">{rows}</table></div></details>'
    )


def make_page(runs: Sequence[Run], title: str = "Report") -> str:
    """The whole page. Raises ValueError without runs."""
    if not runs:
        raise ValueError("a report needs at least one run's folder, LOGS/NAME")
    unigram = unigram_perplexities(list(dict.fromkeys(e.entry for run in runs for e in run.evaluations)))
    head, *rows = summary_rows(runs, unigram)
    colours = [
        f'<span class="key s{i % COLOURS}"></span>' for i, run in enumerate(runs) for _ in ("", *run.averages)
    ]
    colours += ['<span class="key neutral"></span>'] * (len(rows) - len(colours))
    body = "".join(
        f"<tr><td>{colour}{escape(row[0])}</td>{''.join(f'<td>{escape(cell)}</td>' for cell in row[1:])}</tr>"
        for colour, row in zip(colours, rows, strict=True)
    )
    header = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    seen = "".join(f"<li>{escape(sentence)}</li>" for sentence in observations(runs, unigram))
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="note">{escape(" · ".join(run.name for run in runs))}</p>',
        f'<div class="scroll"><table><tr>{header}</tr>{body}</table></div>',
        f"<h2>What is seen</h2><ul>{seen}</ul>",
    ]
    if any(run.training for run in runs):
        parts.append(
            '<h2>Loss</h2><p class="note">Lines: training loss, the mean since the line before. Points: held-out '
            f"loss.</p><figure>{loss_chart(runs)}</figure>"
        )
    if any(run.evaluations for run in runs):
        note = "exp of the mean loss over all tokens. "
        if unigram:
            note += (
                "Unigram: exp of the entropy of the held-out tokens' own frequencies, the best that a predictor "
                "without context can do on this text."
            )
        chart = perplexity_chart(runs, unigram)
        parts.append(f'<h2>Held-out perplexity</h2><p class="note">{note}</p><figure>{chart}</figure>')
        parts.append(perplexity_curves(runs))
    parts.append(measure_section(runs))
    parts += [router_section(run) for run in runs if any(line.get("router") for line in run.training)]
    parts.append("<h2>Flags</h2>" + "".join(details(run, colour) for colour, run in enumerate(runs)))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{CHART_STYLE}{PAGE_STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(parts)
        + "\n</main>\n</body>\n</html>\n"
    )


def make_figures(runs: Sequence[Run]) -> dict[str, str]:
    """{name: SVG that stands alone}: the loss, and the held-out perplexity at the end and over tokens."""
    unigram = unigram_perplexities(list(dict.fromkeys(e.entry for run in runs for e in run.evaluations)))
    figures = {"loss": loss_chart(runs)} if any(run.training for run in runs) else {}
    if any(run.evaluations for run in runs):
        figures["perplexity"] = perplexity_chart(runs, unigram)
    return {name: stand_alone(chart) for name, chart in figures.items()}


def stand_alone(chart: str) -> str:
    """A chart of the page as a file of its own."""
    head, rest = chart.split(">", 1)
    return f'{head} xmlns="http://www.w3.org/2000/svg"><style>{CHART_STYLE}</style>{rest}\n'


PAGE_STYLE = """
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI",
 Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 980px; margin: 0 auto; padding: 40px 24px 80px; }
h1 { font-size: 1.9rem; line-height: 1.2; letter-spacing: -.02em; margin: 0; }
h2 { font-size: 1.2rem; letter-spacing: -.01em; margin: 48px 0 8px; }
.note { color: var(--soft); font-size: .9rem; margin: 4px 0 16px; max-width: 72ch; }
ul { padding-left: 1.2em; margin: 8px 0; max-width: 80ch; }
li { margin: 5px 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th { color: var(--soft); font-weight: 500; }
th, td { text-align: right; padding: 9px 0 9px 18px; white-space: nowrap; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
td:first-child { font-weight: 600; }
figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 16px; }
figcaption { font-size: .9rem; font-weight: 600; margin-bottom: 8px; }
.pairs { display: grid; grid-template-columns: repeat(auto-fit, minmax(330px, 1fr)); gap: 14px; margin-top: 14px; }
.layers { margin-top: 18px; }
.note .key { margin: 0 2px 0 4px; }
details { border-bottom: 1px solid var(--line); padding: 10px 0; }
summary { cursor: pointer; font-weight: 600; }
.facts { color: var(--soft); font-weight: 400; font-size: .85rem; margin-left: 12px; }
.flags { font: .82rem/1.4 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; width: auto; margin: 10px 0; }
.flags td { text-align: left; border: 0; padding: 2px 24px 2px 0; white-space: normal; overflow-wrap: anywhere; }
.flags td:first-child { font-weight: 400; color: var(--soft); white-space: nowrap; }
@media print { main { max-width: none; } figure { break-inside: avoid; } }
"""
