"""Speed of `python -m open_lm.tokenize` against the `tokenizers` library alone, on the same text.

    python bench/tokenizing.py --inputs books.jsonl --tokenizer tokenizer.json --megabytes 40 --workers 1 2

Every case is a process of its own, from its start to its end. `CPU s` is what the process and its children used,
which other work on the machine disturbs less than seconds; Ray's workers are nobody's children, so it has none.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

from open_lm.log import commit

LIBRARY = """
import json, sys
from tokenizers import Tokenizer
tokenizer = Tokenizer.from_file(sys.argv[1])
texts = [json.loads(line)["text"] for line in open(sys.argv[2], encoding="utf-8")]
for start in range(0, len(texts), 256):
    tokenizer.encode_batch_fast(texts[start : start + 256], add_special_tokens=False)
"""


@dataclass(frozen=True)
class Bench:
    """Times each case, in turn, and appends a line per case to the record."""

    inputs: Path
    """JSON lines with a "text"."""
    tokenizer: Path
    """A tokenizer.json."""
    megabytes: float = 40.0
    """Of the file's beginning."""
    cases: tuple[str, ...] = ("library", "local", "ray")
    """library: encode_batch_fast alone, with as many threads; local, ray: the command with this engine."""
    workers: tuple[int, ...] = (1, 2)
    """Threads, processes or CPUs."""
    repeats: int = 1
    """Rounds; the least of each is shown."""
    record: Path = Path(__file__).parent / "records" / "tokenizing.jsonl"
    """File to append to."""


def take(source: Path, size: int, target: Path) -> int:
    """Whole lines of the first `size` bytes; returns bytes of text."""
    text_bytes = 0
    with open(source, "rb") as lines, open(target, "wb") as output:
        while output.tell() < size and (line := lines.readline()):
            output.write(line)
            text_bytes += len(json.loads(line)["text"].encode())
    return text_bytes


def run_case(case: str, workers: int, bench: Bench, text: Path, folder: Path) -> tuple[float, float]:
    """Seconds and CPU seconds of one run."""
    words = [sys.executable, "-c", LIBRARY, str(bench.tokenizer), str(text)]
    if case != "library":
        words = [sys.executable, "-m", "open_lm.tokenize", "--inputs", str(text), "--engine", case]
        words += ["--tokenizer", str(bench.tokenizer), "--processes", str(workers)]
        words += ["--unit-megabytes", "4", "--output", str(folder)]
    environment = os.environ | {"RAYON_NUM_THREADS": str(workers), "TOKENIZERS_PARALLELISM": "true"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.perf_counter()
    subprocess.run(words, check=True, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    seconds = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main(bench: Bench) -> None:
    best: dict[tuple[str, int], dict] = {}
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder, "text.jsonl")
        text_bytes = take(bench.inputs, int(bench.megabytes * 1e6), text)
        for repeat in range(bench.repeats):
            for workers in bench.workers:
                for case in bench.cases:
                    output = Path(folder, f"{case}{workers}_{repeat}")
                    load = os.getloadavg()[0]
                    seconds, cpu_seconds = run_case(case, workers, bench, text, output)
                    line = {
                        "case": case,
                        "workers": workers,
                        "text_bytes": text_bytes,
                        "seconds": round(seconds, 2),
                        "cpu_seconds": None if case == "ray" else round(cpu_seconds, 2),
                        "load_before": round(load, 1),
                        "cores": os.cpu_count(),
                        "commit": commit(),
                    }
                    bench.record.parent.mkdir(parents=True, exist_ok=True)
                    with open(bench.record, "a") as record:
                        record.write(json.dumps(line) + "\n")
                    held = best.get((case, workers))
                    if held is None or seconds < held["seconds"]:
                        best[case, workers] = line
    print(
        f"| {text_bytes / 1e6:.1f} MB of text | workers | MB/s | s | CPU s | load |\n| - | -: | -: | -: | -: | -: |"
    )
    for (case, workers), line in sorted(best.items()):
        rate, cpu = text_bytes / 1e6 / line["seconds"], line["cpu_seconds"] or ""
        print(f"| {case} | {workers} | {rate:.2f} | {line['seconds']} | {cpu} | {line['load_before']} |")


if __name__ == "__main__":
    main(tyro.cli(Bench, description=__doc__))
