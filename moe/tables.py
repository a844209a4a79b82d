"""Tables of the documents, from the models and from the records in moe/records: nothing in them is typed.

python moe/tables.py parameters    # exact counts beside the published cells; status 1 if one differs
python moe/tables.py demo          # or quality, runs, router, throughput, layer …: a table of the records
python moe/tables.py flags         # every flag of open_lm and every one of ours, and what it does
python moe/tables.py write         # every <!-- table: NAME --> of the documents
python moe/tables.py check         # status 1 if a document's table is not that of the records
"""

import argparse
import ast
import inspect
import json
import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from typing import Any

from open_lm.config import ModelFlags, MoEConfig, RunConfig
from open_lm.config.parse import NO_FLAGS
from open_lm.config.resolve import resolve_model
from open_lm.model import count_parameters

ROOT = Path(__file__).parents[1]
RECORDS = ROOT / "moe" / "records"
DATA_RECORDS = ROOT / "bench" / "records"
DOCUMENTS = ("README.md", "MOE.md", "moe/README.md", "bench/README.md", "docs/running.md")
MODELS = ("41m", "87m", "160m", "410m", "830m")

# As printed in open_lm's MOE.md, https://github.com/mlfoundations/open_lm/blob/main/MOE.md:
# "Training Parameters" (8, 32 experts) and "Inference Parameters" (2) …
PARAMETERS = {
    8: ("68.9M", "165.4M", "360.6M", "1.1B", "2.4B"),
    32: ("164.5M", "439.9M", "1.0B", "3.5B", "7.9B"),
    2: ("45.0M", "96.8M", "190.7M", "509.2M", "1.1B"),
}
# … perplexity after 20 billion tokens, by experts (1: dense) …
PERPLEXITY = {
    1: ("27.61", "18.68", "14.87", "10.54", "9.39"),
    8: ("19.85", "14.66", "12.26", "9.82", "8.84"),
    32: ("20.55", "15.28", "14.62", "", ""),
}
# … and tokens per second and A100.
SPEED = {
    1: ("141.2K", "106.0K", "95.5K", "30.3K", "16.0K"),
    8: ("69.5K", "66.6K", "66.2K", "18.5K", "9.2K"),
}


def read_records(name: str, folder: Path = RECORDS) -> list[dict[str, Any]]:
    """The lines of FOLDER/NAME.jsonl, oldest first; none if nothing was recorded."""
    path = folder / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def markdown(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table; the first column to the left, numbers to the right."""
    lines = [head, ["-", *["-:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def parameters_of(model: str, experts: int) -> int:
    """All parameters of open_lm_<model> with that many experts in every second layer, and gain-only norms."""
    flags = ModelFlags(model=f"open_lm_{model}", model_norm="gain_only_layer_norm")
    return count_parameters(resolve_model(flags, MoEConfig(freq=2, num_experts=experts), given=())).total


def shorten(number: float) -> str:
    """68884704 → "68.9M", 2420092416 → "2.4B"."""
    return f"{number / 1e9:.1f}B" if number >= 1e9 else f"{number / 1e6:.1f}M"


def parameters() -> tuple[str, bool]:
    """Exact counts from the meta device beside the published cells, and whether all agree."""
    rows, agree = [], True
    for experts, cells in PARAMETERS.items():
        row: list[object] = [f"{experts} experts"]
        for model, published in zip(MODELS, cells, strict=True):
            exact = parameters_of(model, experts)
            match = shorten(exact) == published
            agree = agree and match
            row.append(f"{exact:,} ({published}{'' if match else ', DIFFERS'})")
        rows.append(row)
    note = (
        'Exact (published). Top-2, every second layer an MoE, gain-only norms; 2 experts is "inference '
        'parameters".'
    )
    return f"{markdown(['', *MODELS], rows)}\n\n{note}", agree


def demo() -> tuple[str, bool]:
    """The newest `make demo`."""
    records = read_records("demo")
    if not records:
        return "Not recorded yet.", True
    newest = [r for r in records if r["started"] == records[-1]["started"]]
    sources = list(newest[0]["perplexity"])
    rows = [
        [r["run"], f"{r['parameters']:,}", f"{r['active_parameters']:,}",
         *(f"{r['perplexity'][s]:.1f}" for s in sources), f"{r['tokens_per_second']:,.0f}"]
        for r in newest
    ]  # fmt: skip
    last = newest[-1]
    rows.append(["unigram", "", "", *(f"{last['unigram'][s]:.1f}" for s in sources), ""])
    head = ["", "parameters", "active", *(f"perplexity, {s}" for s in sources), "tokens/s"]
    note = (
        f"{last['tokens']:,} tokens each, {last['minutes']:.1f} minutes for corpus, both runs and the report, on "
        f"{last['machine']}; commit {last['commit']}, torch {last['torch']}."
    )
    return f"{markdown(head, rows)}\n\n{note}", True


def quality() -> tuple[str, bool]:
    """Published perplexities; ours stand beside them once there is a run of that budget."""
    rows = [
        [f"{'dense' if e == 1 else f'{e} experts'}, published", *cells] for e, cells in PERPLEXITY.items()
    ]
    rows += [[f"{'dense' if e == 1 else f'{e} experts'}, ours", *["not run"] * 5] for e in PERPLEXITY]
    return markdown(["20 B tokens", *MODELS], rows), True


def real_runs() -> list[tuple[dict[str, Any], dict[str, Any], list[dict[str, Any]]]]:
    """Of each line of moe/records/runs.jsonl: itself, the run's facts, and the lines of its log.jsonl."""
    found = []
    for record in read_records("runs"):
        first, *lines = read_records(f"runs/{record['name']}/log")
        found.append((record, first["run"], lines))
    return found


def middle(lines: Sequence[dict[str, Any]], metric: str) -> float:
    """Median of a metric over the log's lines, so that a slow start does not count."""
    return statistics.median(line[metric] for line in lines if metric in line)


def runs() -> tuple[str, bool]:
    """Runs on real text: the last held-out perplexity of each domain, speed, MFU, memory."""
    rows, names = [], []
    for record, _, lines in real_runs():
        last = max(line["step"] for line in lines)
        ends = {line["val_name"]: line for line in lines if line["step"] == last and "val_name" in line}
        names = list(ends)
        rows.append(
            [f"{record['name']}: {record['what']}", f"{max(line['tokens'] for line in lines) / 1e6:.1f}M"]
            + [f"{line[f'valid/{name}/perplexity']:.1f}" for name, line in ends.items()]
            + [f"{middle(lines, 'train/tokens_per_second') / 1e3:.0f}K", f"{middle(lines, 'train/mfu'):.1%}"]
            + [f"{max(line.get('train/memory_gib', 0) for line in lines):.1f}"]
        )
    if not rows:
        return "Not recorded yet.", True
    _, facts, _ = real_runs()[-1]
    note = (
        f"{facts['device']}, torch {facts['torch']}, --torchcompile, commits "
        f"{', '.join(sorted({r['commit'] for r in read_records('runs')}))}; flags, logs and results of each run in "
        "moe/records/runs."
    )
    head = ["", "tokens", *names, "tokens/s", "MFU", "GiB"]
    return f"{markdown(head, rows)}\n\n{note}", True


def router() -> tuple[str, bool]:
    """What the routers of these runs did at the end: means over the MoE layers, of the last logged window.

    The share dropped of held-out text is that of the last evaluation, from its least to its greatest domain.
    """
    rows = []
    for record, _, lines in real_runs():
        seen = [line["router"] for line in lines if line.get("router")]
        if not seen:
            continue
        last = seen[-2]  # the last window may be of a few steps
        mean = lambda key, last=last: statistics.mean(layer[key] for layer in last)
        experts = len(last[0]["share"])
        rows.append(
            [record["name"], f"{mean('entropy'):.2f} of {math.log(experts):.2f}",
             f"{mean('fullest_over_mean'):.2f}", f"{mean('dropped_share'):.2%}", held_out_drop(lines),
             str(max(layer["dead_experts"] for layer in last))]
        )  # fmt: skip
    head = (
        "", "entropy, nats", "fullest expert over mean", "dropped in training", "dropped held out", "dead experts"
    )  # fmt: skip
    return markdown(head, rows), True


def held_out_drop(lines: Sequence[dict[str, Any]]) -> str:
    """Least and greatest share over the domains of the last evaluation; a run may be older than this metric."""
    last = max(line["step"] for line in lines)
    ends = [line for line in lines if line["step"] == last and "val_name" in line]
    names = [f"valid/{line['val_name']}/dropped_share" for line in ends]
    if not ends or any(name not in line for name, line in zip(names, ends, strict=True)):
        return "not logged"
    shares = [line[name] for name, line in zip(names, ends, strict=True)]
    low, high = f"{min(shares):.1%}", f"{max(shares):.1%}"
    return low if low == high else f"{low} to {high}"


def flags() -> tuple[str, bool]:
    """Every flag, its default and its help: the fields of open_lm/config and the text under them."""
    rows, defaults = [], RunConfig()
    for group in fields(RunConfig):
        part = getattr(defaults, group.name)
        rows.append([f"**{group.name}**", "", ""])
        for name, text in field_help(type(part)).items():
            if name in NO_FLAGS:
                continue
            flag = f"moe_{name}" if group.name == "moe" else name
            default = getattr(part, name)
            shown = "" if default in (None, "", False) else f"`{default}`"
            rows.append([f"`--{flag.replace('_', '-')}`", shown, text.replace("|", "\\|")])
    return markdown(["flag", "default", "what it does here"], rows).replace("-: | -:", "- | -"), True


def field_help(group: type) -> dict[str, str]:
    """{field: the text under it, in one line} of a dataclass, from its source."""
    (body,) = ast.parse(inspect.getsource(group)).body
    assert isinstance(body, ast.ClassDef)
    found = {}
    for field, text in pairwise(body.body):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
            assert isinstance(field.target, ast.Name)
            found[field.target.id] = " ".join(ast.literal_eval(text.value).split())
    return found


def throughput() -> tuple[str, bool]:
    """Compiled whole-step timings beside the published ones: the newest of each model, device and set of flags."""
    records = [
        r | {"flags": r["extra_flags"].replace("--torchcompile", "").strip()}
        for r in read_records("speed")
        if r.get("compiled", "--torchcompile" in r["extra_flags"])
    ]
    newest = {(r["device"], r["experts"], r["flags"], r["model"]): r for r in records}
    rows: list[list[object]] = [
        [f"{'dense' if e == 1 else f'{e} experts'}, published (A100)", *cells] for e, cells in SPEED.items()
    ]
    for device, experts, flags in dict.fromkeys(key[:3] for key in newest):
        row: list[object] = [f"{'dense' if experts == 1 else f'{experts} experts'}, {device} {flags}".strip()]
        found = {
            m: newest[device, experts, flags, m] for m in MODELS if (device, experts, flags, m) in newest
        }
        row[0] = f"{row[0]}, {', '.join(dict.fromkeys(r['commit'] for r in found.values()))}"
        rows.append([*row, *(step_cell(found[m]) if m in found else "" for m in MODELS)])
    torches = ", ".join(dict.fromkeys(r["torch"] for r in newest.values()))
    note = (
        f"Ours, compiled, with the commit timed: torch {torches}, sequences of 2,048 tokens, synthetic data; in "
        "brackets sequences a step, the model FLOPs utilization by open_lm/flops.py and the peak memory."
    )
    return f"{markdown(['', *MODELS], rows)}\n\n{note}", True


def step_cell(record: dict[str, Any]) -> str:
    """Tokens per second, and what else was recorded."""
    more = [str(record["batch_size"] * record["accum_freq"])]
    more += [f"{record['mfu']:.0%}"] if record.get("mfu") else []
    more += [f"{record['memory_gib']:.0f} GiB"] if record.get("memory_gib") else []
    return f"{record['tokens_per_second'] / 1e3:.1f}K" + (f" ({', '.join(more)})" if more else "")


# TFLOP/s on another H100 by SonicMoE's own benchmark shapes, after its JIT; it has no ungated gelu.
SONIC = {"olmoe": 591, "qwen3_moe": 518}


def layer() -> tuple[str, bool]:
    """TFLOP/s of one compiled MoE layer: the newest timing of each, from `python moe/bench.py --output`."""
    newest: dict[tuple[str, str, str], dict[str, Any]] = {}
    for r in read_records("layer"):
        # one way of the table's plan, the fastest launch that the layer allows
        if r["compiled"] and "plan" not in r and (r.get("graph") or r["layer"] != "triton"):
            newest[r["shape"], r["layer"], r.get("routing", "")] = r
    rows, commits = [], {}
    for shape in dict.fromkeys(shape for shape, layer, _ in newest if layer == "triton"):
        of = lambda layer, routing, shape=shape: newest.get((shape, layer, routing))
        dense = of("dense", "")
        assert dense is not None
        cells = []
        for routing in ("random", "zipf"):
            ours = of("triton", routing)
            cells.append(f"{ours['tflops']:.0f} ({ours['tflops'] / dense['tflops']:.2f})" if ours else "")
            commits |= {ours["commit"]: None} if ours else {}
        peers = [of("megablocks", "random"), of("grouped_mm", "random") or of("grouped_mm", "")]
        ours = of("triton", "random")
        known = ours is not None and ours.get("peak_mib") and dense.get("peak_mib")
        peak = (
            f"{ours['peak_mib']:,.0f} ({ours['peak_mib'] / dense['peak_mib']:.2f})" if ours and known else ""
        )
        size = ", ".join(
            str(dense[key]) for key in ("tokens", "dim", "width", "experts", "top_k", "ffn_type")
        )
        others = [*(f"{p['tflops']:.0f}" if p else "" for p in peers), SONIC.get(shape, "")]
        rows.append([f"{shape}: {size}", f"{dense['tflops']:.0f}", *cells, *others, peak])
    last = list(newest.values())[-1]
    note = (
        f"TFLOP/s of the experts' products, forward + backward, {last['dtype']}, dropless, all compiled, ours and "
        "dense as CUDA graphs; in brackets, of dense: one FFN of the same active FLOPs. Zipf: expert i chosen 1/i "
        "as often. MegaBlocks waits for the host in every layer, so its figure depends on the machine's. "
        f"{last['device']}, torch {last['torch']}, commits {', '.join(commits)}; SonicMoE measured elsewhere, on "
        "another H100."
    )
    head = ["shape: tokens, d, width, experts, k, type", "dense", "ours, random", "ours, Zipf", "MegaBlocks dMoE",
            "grouped_mm", "SonicMoE", "peak of ours, MiB"]  # fmt: skip
    return f"{markdown(head, rows)}\n\n{note}", True


def curves() -> tuple[str, bool]:
    """Whether a backend learns what another does: `python moe/curves.py --record`, the newest of each model."""
    newest = {r["model"]: r for r in read_records("curves")}
    rows = []
    for r in newest.values():
        known = (
            r["model"],
            r["experts"],
            r["backend"],
            f"{r['losses'][r['backend']][-1]:.3f}",
            f"{r['noise']:.4f}",
        )
        rows += [[*known, other, f"{apart:.4f}", r["commit"]] for other, apart in r["difference"].items()]
    head = [
        "",
        "experts",
        "backend",
        "last loss",
        "another seed differs by",
        "other backend",
        "differs by",
        "commit",
    ]
    steps = ", ".join(dict.fromkeys(str(r["steps"]) for r in newest.values()))
    note = (
        f"Training loss on real text, {steps} steps of the ordinary command, compiled, bf16 autocast, one H100; "
        "mean absolute difference of the last third."
    )
    good = all(apart <= r["noise"] for r in newest.values() for apart in r["difference"].values())
    return f"{markdown(head, rows)}\n\n{note}", good


def routing() -> tuple[str, bool]:
    """Every router and balancing method on the demo's text, from `python moe/compare.py --record`."""
    newest = {r["method"]: r for r in read_records("routing")}
    if not newest:
        return "Not recorded yet.", True
    rows = []
    for method, r in newest.items():
        balance = (
            (f"{r['fullest']:.2f}", f"{r['dead']:.1f}", f"{r['dropped']:.1%}")
            if "fullest" in r
            else ("",) * 3
        )
        plot = f"[plot](moe/records/figures/routing/{r['plot']})" if r.get("plot") else ""
        speed, gpu = f"{r['tokens_per_second'] / 1e3:.0f}K", r["device"].removeprefix("NVIDIA ").split()[0]
        rows.append([method, f"{r['perplexity']:.1f}", *balance, speed, gpu, plot])
    last, commits = list(newest.values())[-1], ", ".join(dict.fromkeys(r["commit"] for r in newest.values()))
    note = (
        f"{last['tokens'] / 1e6:.2f}M tokens each ({last['steps']} steps), one seed; fullest expert over the mean, "
        "experts without a token and dropped share are of the last tenth of training, means over MoE layers. "
        f"Torch {last['torch']}, commits {commits}; flags in moe/compare.py and "
        "moe/records/routing.jsonl."
    )
    head = [
        "",
        "held-out perplexity",
        "fullest over mean",
        "dead experts",
        "dropped",
        "tokens/s",
        "GPU",
        "load over time",
    ]
    return f"{markdown(head, rows)}\n\n{note}", True


def reading() -> tuple[str, bool]:
    """Our data reader beside others, from `python bench/data.py`: the newest record."""
    record = read_records("data", DATA_RECORDS)[-1]
    rows = []
    for r in record["rows"]:
        local, resume, s3 = (r.get(part, {}) for part in ("local", "resume", "s3"))
        whole = s3 and s3["first_batch_seconds"] + s3["tokens"] / s3["tokens_per_second"]
        values = (
            f"{local['tokens_per_cpu_second'] / 1e6:.0f}", f"{local['first_batch_seconds']:.2f}",
            f"{resume['first_batch_seconds']:.2f}", f"{local['peak_bytes'] / 1e6:.0f}",
            f"{s3['first_batch_seconds']:.2f}" if s3 else "failed", f"{whole:.1f}" if s3 else "",
            f"{s3['server_cpu_seconds']:.1f}" if s3 else "", f"{s3['peak_bytes'] / 1e6:.0f}" if s3 else "",
        )  # fmt: skip
        rows.append([r["reader"], *values])
    settings, (before, after) = record["settings"], record["load"]
    note = (
        f"{settings['sequences']:,} sequences of {settings['seq_len'] + 1:,} uint16 ids, "
        f"{settings['shards']} shards, batches of {settings['batch']}, no worker processes, warm page cache, "
        f"best of {settings['repeats']} (S3: one run). S3 is a server on loopback ({settings['server']}), which "
        f"shares the cores. A loop that takes {settings['rate'] / 1e6:g} M tokens/s, with a worker process, waits "
        f"for our batches {record['waiting']['share']:.2%} of its time{waiting_on_a_gpu()}. "
        f"{record['cores']} cores, load {before:.1f} before and {after:.1f} after."
    )
    head = ["", "M tokens/s a core", "first batch, s", "resume at 90 %, s", "peak MB", "S3: first batch, s",
            "S3: whole pass, s", "of it the server's CPU, s", "S3: peak MB"]  # fmt: skip
    return f"{markdown(head, rows)}\n\n{note}", True


def waiting_on_a_gpu() -> str:
    """Of bench/records/waiting_h100.jsonl, the log of a training run: steps before 40 are not counted."""
    first, *lines = read_records("waiting_h100", DATA_RECORDS)
    windows = [line for line in lines if "train/data_time" in line and line["step"] > 40]
    mean = lambda key: statistics.mean(line[key] for line in windows)
    run = first["run"]
    return (
        f"; training {run['flags']['model']} on one {run['device'].removeprefix('NVIDIA ').split()[0]}, "
        f"{mean('train/tokens_per_second') / 1e6:.2f} M tokens/s with {run['flags']['workers']} worker, waits "
        f"{mean('train/data_time') / mean('train/batch_time'):.2%} of it (commit {run['commit']})"
    )


def tokenizing_runs() -> dict[tuple[int, str], list[dict]]:
    """(workers, case) → the runs of the newest commit, from `python bench/tokenizing.py`."""
    records = read_records("tokenizing", DATA_RECORDS)
    runs: dict[tuple, list[dict]] = {}
    for r in records:
        if r.get("commit") == records[-1]["commit"]:
            runs.setdefault((r["workers"], r["case"]), []).append(r)
    return runs


def tokenizing_share() -> tuple[str, bool]:
    """The same in a sentence."""
    seconds = {
        key: statistics.median(r["seconds"] for r in found) for key, found in tokenizing_runs().items()
    }
    one, two = (seconds[n, "library"] / seconds[n, "local"] for n in (1, 2))
    ray = seconds[1, "ray"] / seconds[2, "ray"]
    spread = max(
        max(each) / min(each) for each in ([r["seconds"] for r in f] for f in tokenizing_runs().values())
    )
    return (
        f"With one process {one:.0%} and with two {two:.0%} of what the `tokenizers` library alone does on the\n"
        f"same text, two Ray workers {ray:.1f} times one: medians of runs, one of which took up to {spread - 1:.0%}"
        "\nlonger than its twin (`bench/README.md`)."
    ), min(one, two) >= 0.9 and ray >= 1.6


def tokenizing() -> tuple[str, bool]:
    """Tokenizing beside the tokenizers library alone: medians."""
    runs = tokenizing_runs()
    last = next(iter(runs.values()))[-1]
    names = {"library": "tokenizers alone", "local": "--engine local", "ray": "--engine ray"}
    rows = []
    for (workers, case), found in sorted(runs.items()):
        seconds = statistics.median(r["seconds"] for r in found)
        cpu = statistics.median(r["cpu_seconds"] for r in found) if found[0]["cpu_seconds"] else None
        least, most = (f(r["seconds"] for r in found) for f in (min, max))
        values = (
            f"{found[0]['text_bytes'] / 1e6 / seconds:.2f}",
            f"{seconds:.1f}",
            f"{least:.1f} … {most:.1f}",
            len(found),
        )
        rows.append([names[case], workers, *values, f"{cpu:.1f}" if cpu else ""])
    note = (
        f"{last['text_bytes'] / 1e6:.0f} MB of text, GPT-NeoX's tokenizer, {last['cores']} cores; "
        "each a process from its start to its end, shuffling and writing included; medians, on a machine without "
        f"other work, commit {last['commit']}."
    )
    head = ["", "workers", "MB/s", "s", "least … most", "runs", "CPU s"]
    return f"{markdown(head, rows)}\n\n{note}", True


def corpus() -> tuple[str, bool]:
    """A whole corpus by both engines: bench/records/corpus.jsonl."""
    records = list({r["engine"]: r for r in read_records("corpus", DATA_RECORDS)}.values())  # the newest
    rows = [
        [f"--engine {r['engine']}", r["workers"], f"{r['text_bytes'] / 1e6:.0f}", f"{r['tokens'] / 1e6:.1f}",
         f"{r['seconds']:.0f}", f"{r['load']:.0f}", r["manifest_sha256"][:12]]
        for r in records
    ]  # fmt: skip
    agree = len({(r["tokens"], r["manifest_sha256"]) for r in records}) == 1
    head = ["", "workers", "MB of text", "M tokens", "s", "load", "sha256 of the manifest"]
    return markdown(head, rows), agree


def saves() -> tuple[str, bool]:
    """What saving costs the loop: the newest per model of `python moe/save.py --record moe/records/save.jsonl`."""
    newest = {(r["model"], r["experts"], r["device"]): r for r in read_records("save")}
    rows = []
    for (model, experts, _), r in newest.items():
        written = statistics.median(r["write_seconds"])
        rows.append(
            [f"{model}, {'dense' if experts == 1 else f'{experts} experts'}", f"{r['bytes'] / 1e9:.2f}",
             f"{r['step_seconds']:.3f}", f"{max(r['stall_seconds']):.3f}", f"{max(r['lost_seconds']):.3f}",
             f"{written:.1f}"]
        )  # fmt: skip
    head = ["", "GB", "a step, s", "stall, s", "slower in all, s", "written in, s"]
    last = list(newest.values())[-1]
    note = (
        "The worst of each run's saves, of weights and both moments; slower in all: by how much the steps were, "
        f"while it was written. {last['device']}, torch {last['torch']}, commit {last['commit']}."
    )
    return f"{markdown(head, rows)}\n\n{note}", True


def faults() -> tuple[str, bool]:
    """What `make faults` showed: moe/records/faults.json, by `python -m tests.faults --output` this file."""
    record = json.loads((RECORDS / "faults.json").read_text())
    rows = [
        [r["number"], r["fault"], r["expected"], "yes" if r["passed"] else "no", f"{r['seconds']:.0f}"]
        for r in record["faults"]
    ]
    passed = sum(r["passed"] for r in record["faults"])
    note = f"{passed} of {len(rows)}, on {record['cores']} cores, commit {record['commit']}."
    return f"{markdown(['', 'fault', 'expected', 'seen', 's'], rows)}\n\n{note}", passed == len(rows)


TABLES = {
    f.__name__: f
    for f in (
        parameters,
        demo,
        quality,
        runs,
        router,
        flags,
        throughput,
        layer,
        curves,
        routing,
        reading,
        tokenizing,
        tokenizing_share,
        corpus,
        saves,
        faults,
    )
}


def fill(text: str) -> str:
    """`text` with every `<!-- table: NAME -->…<!-- end -->` filled anew."""
    pattern = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
    return pattern.sub(lambda m: f"{m[1]}{TABLES[m[2]]()[0]}\n{m[3]}", text)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=[*TABLES, "write", "check"])
    what = parser.parse_args().what
    if what in TABLES:
        table, agree = TABLES[what]()
        print(table)
        return 0 if agree else 1
    stale = []
    for name in DOCUMENTS:
        text = (ROOT / name).read_text(encoding="utf-8")
        if (filled := fill(text)) != text:
            stale.append(name)
            if what == "write":
                (ROOT / name).write_text(filled, encoding="utf-8")
    if what == "check" and stale:
        print(f"{', '.join(stale)}: not the tables of the records; run python moe/tables.py write")
    return 1 if what == "check" and stale else 0


if __name__ == "__main__":
    raise SystemExit(main())
