"""A whole corpus tokenized by both engines: seconds, counts, and whether all their files are the same.

    python bench/corpus.py --inputs corpus/*.jsonl --tokenizer tokenizer.json

Appends a line per engine to bench/records/corpus.jsonl. Status 1 if any file differs.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

from open_lm.log import commit

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Corpus:
    """Times each engine on the same inputs, in turn."""

    inputs: tuple[Path, ...]
    """As --inputs of open_lm.tokenize."""
    tokenizer: Path
    """A tokenizer.json."""
    engines: tuple[str, ...] = ("local", "ray")
    """In this order."""
    workers: int = os.cpu_count() or 1
    """Processes, or CPUs of Ray."""
    seq_len: int = 2048
    """Tokens the model sees."""
    held_out_share: float = 0.01
    """Of the documents."""
    folder: Path | None = None
    """Where the outputs lie, and are removed; default: the temporary folder."""
    record: Path = ROOT / "bench" / "records" / "corpus.jsonl"
    """File to append to."""


def run(corpus: Corpus, engine: str, output: Path) -> dict:
    """The record of one engine."""
    flags = [
        "--seq-len",
        str(corpus.seq_len),
        "--held-out-share",
        str(corpus.held_out_share),
        "--engine",
        engine,
    ]
    flags += ["--processes", str(corpus.workers)]
    places = ["--tokenizer", str(corpus.tokenizer), "--output", str(output)]
    command = [
        sys.executable,
        "-m",
        "open_lm.tokenize",
        "--inputs",
        *map(str, corpus.inputs),
        *places,
        *flags,
    ]
    load, started = os.getloadavg()[0], time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - started
    parts = [json.loads(path.read_text()) for path in (output / "info.json", output / "held_out/info.json")]
    sources = parts[0]["sources"]
    return {
        "engine": engine,
        "workers": corpus.workers,
        "inputs": [path.name for path in corpus.inputs],
        "flags": " ".join(flags),
        "text_bytes": sum(source["bytes_read"] for source in sources),
        "documents": sum(source["documents_read"] for source in sources),
        "tokens": sum(part["tokens"] for part in parts),
        "seconds": seconds,
        "load": load,
        "cores": os.cpu_count(),
        "commit": commit(),
        "sha256": {
            path.relative_to(output).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(output.rglob("*"))
            if path.is_file() and path.suffix in (".jsonl", ".tar")
        },
    }


def main(corpus: Corpus) -> None:
    with tempfile.TemporaryDirectory(dir=corpus.folder) as folder:
        rows = [run(corpus, engine, Path(folder, engine)) for engine in corpus.engines]
    digests = [row.pop("sha256") for row in rows]
    for row, digest in zip(rows, digests, strict=True):
        row |= {"files": len(digest), "manifest_sha256": digest["manifest.jsonl"]}
        print(json.dumps(row))
        with open(corpus.record, "a") as file:
            file.write(json.dumps(row) + "\n")
    differing = [
        name for name in digests[0] if any(digest.get(name) != digests[0][name] for digest in digests)
    ]
    if differing or any(digest.keys() != digests[0].keys() for digest in digests):
        sys.exit(f"the engines' files differ: {differing or 'in their names'}")


if __name__ == "__main__":
    main(tyro.cli(Corpus))
