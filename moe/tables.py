"""Tables of the documents, from the models and from the records in moe/records: nothing in them is typed.

python moe/tables.py parameters    # exact counts beside the published cells; status 1 if one differs
python moe/tables.py demo          # or quality, speed, layer: a table of the records
python moe/tables.py write         # every <!-- table: NAME --> of README.md, MOE.md and moe/README.md
python moe/tables.py check         # status 1 if a document's table is not that of the records
"""

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from open_lm.config import ModelFlags, MoEConfig
from open_lm.config.resolve import resolve_model
from open_lm.model import count_parameters

ROOT = Path(__file__).parents[1]
RECORDS = ROOT / "moe" / "records"
DOCUMENTS = ("README.md", "MOE.md", "moe/README.md")
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


def read_records(name: str) -> list[dict[str, Any]]:
    """The lines of moe/records/NAME.jsonl, oldest first; none if nothing was recorded."""
    path = RECORDS / f"{name}.jsonl"
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


def speed() -> tuple[str, bool]:
    """The newest whole-step timing of each model and device beside the published one."""
    newest = {(r["device"], r["experts"], r["extra_flags"], r["model"]): r for r in read_records("speed")}
    rows: list[list[object]] = [
        [f"{'dense' if e == 1 else f'{e} experts'}, published (A100)", *cells] for e, cells in SPEED.items()
    ]
    for device, experts, flags in dict.fromkeys(key[:3] for key in newest):
        row: list[object] = [f"{'dense' if experts == 1 else f'{experts} experts'}, {device} {flags}".strip()]
        for model in MODELS:
            r = newest.get((device, experts, flags, model))
            row.append(f"{r['tokens_per_second'] / 1e3:.1f}K" if r else "")
        rows.append(row)
    if not newest:
        return markdown(["", *MODELS], rows), True
    last = list(newest.values())[-1]
    note = f"Ours: torch {last['torch']}, commit {last['commit']}, sequences of 2,048 tokens, synthetic data."
    return f"{markdown(['', *MODELS], rows)}\n\n{note}", True


def layer() -> tuple[str, bool]:
    """TFLOP/s of one MoE layer: the newest timing per shape, from `python moe/bench.py --output`."""
    kind = lambda r: r["layer"] + (", compiled" if r["compiled"] else "")
    newest = {(r["shape"], kind(r)): r for r in read_records("layer")}
    if not newest:
        return "Not recorded yet.", True
    kinds = sorted({k for _, k in newest}, key=lambda k: ("reference" in k, "compiled" in k, k))
    rows = []
    for shape in dict.fromkeys(shape for shape, _ in newest):
        found = {k: newest[shape, k] for k in kinds if (shape, k) in newest}
        s = next(iter(found.values()))
        size = ", ".join(str(s[key]) for key in ("tokens", "dim", "width", "experts", "top_k", "ffn_type"))
        rows.append([f"{shape}: {size}", *(f"{found[k]['tflops']:.0f}" if k in found else "" for k in kinds)])
    last = list(newest.values())[-1]
    note = (
        f"TFLOP/s of the experts' products, forward + backward, {last['dtype']}, dropless, fresh router; "
        f'"dense" is one FFN of the same active FLOPs. {last["device"]}, torch {last["torch"]}, '
        f"commit {last['commit']}."
    )
    return f"{markdown(['shape: tokens, d, width, experts, k, type', *kinds], rows)}\n\n{note}", True


TABLES = {f.__name__: f for f in (parameters, demo, quality, speed, layer)}


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
