"""The default text: prose and code of the Python environment itself, as two tokenized sources.

    python -m open_lm.tokenize.corpus --output corpus

writes corpus/{prose,code}/{train,held_out}/{manifest.jsonl, shard_*.tar}, tokenizer.json and corpus.json.
No download. A file of the environment is one document: its docstrings (or the text of a README, of a wheel's
METADATA and the like) go to `prose`, its Python without the docstrings to `code`, both to the same side of
the split, which follows from the file's content. Repeated files, vendored copies and repeated passages are
dropped before the split.
"""

import hashlib
import json
import os
import shutil
import sys
import sysconfig
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, get_args

import numpy as np

from open_lm.tokenize.documents import (
    MIN_CHARACTERS,
    Division,
    Part,
    SeenDocuments,
    divide,
    is_document,
    pack,
    part_of,
    unigram_perplexity,
)
from open_lm.tokenize.shard_writer import write_shards

if TYPE_CHECKING:
    from tokenizers import Tokenizer

END_OF_TEXT = "<|endoftext|>"
SOURCES = ("prose", "code")
PARTS = get_args(Part)
FORMAT = 1  # raise when the same settings give other text
FILES_AT_ONCE = 512


@dataclass(frozen=True)
class CorpusConfig:
    """Write the default corpus: prose and code of this Python environment, tokenized, in tar shards."""

    output: Path = Path("corpus")
    """Folder to write. A complete corpus with the same settings is left as it is; another one is replaced."""

    seq_len: int = 256
    """Tokens the model sees; every sample holds one more."""

    vocab_size: int = 8192
    """Ids of the byte-level BPE tokenizer that is trained on the training part."""

    max_megabytes_per_source: float = 8.0
    """Text to take for each of prose and code, in files' order."""

    held_out_share: float = 0.03
    """Share of the documents that is held out."""

    seed: int = 0
    """Of the order of the documents, hence of which are taken, and of the order of the sequences."""

    sequences_per_shard: int = 512
    """Samples in a tar."""

    roots: tuple[Path, ...] = ()
    """Folders to read instead of the environment's standard library and site-packages."""

    processes: int = os.cpu_count() or 1
    """Processes that read and parse files. Never changes the corpus."""


class File(NamedTuple):
    path: Path
    name: str


class Collection(NamedTuple):
    """Texts by (source, part), in order, and how many files were read and dropped as repeated."""

    texts: dict[tuple[str, Part], list[str]]
    files: int
    repeated: int


def environment_roots() -> tuple[Path, ...]:
    """Standard library, site-packages: the folders of the running interpreter."""
    paths = sysconfig.get_paths()
    return tuple(dict.fromkeys(Path(paths[name]).resolve() for name in ("stdlib", "purelib", "platlib")))


def list_files(roots: Sequence[Path], seed: int) -> list[File]:
    """Files that may hold text, in an order that depends on the seed and their names below their root only."""
    files = []
    for root in roots:
        for folder, subfolders, names in os.walk(root):
            # The standard library's folder contains site-packages, which is a root of its own (or another's).
            skipped = {"__pycache__", "site-packages", "dist-packages"}
            subfolders[:] = [name for name in subfolders if name not in skipped]
            paths = [Path(folder, name) for name in names if is_document(name)]
            files += [File(path, path.relative_to(root).as_posix()) for path in paths]
    return sorted(
        files, key=lambda file: (hashlib.sha256(f"{seed} {file.name}".encode()).digest(), file.path)
    )


def read_file(path: Path) -> Division | None:
    """`documents.divide` of a file; None if it cannot be read."""
    try:
        return divide(path.name, path.read_bytes())
    except OSError:
        return None


def read_files(files: Sequence[File], processes: int) -> Iterator[Division | None]:
    """Divisions in the files' order, some hundreds read at once, so that the caller may stop early."""
    if processes == 1:
        yield from (read_file(file.path) for file in files)
        return
    with ProcessPoolExecutor(processes) as pool:
        for start in range(0, len(files), FILES_AT_ONCE):
            paths = [file.path for file in files[start : start + FILES_AT_ONCE]]
            yield from pool.map(read_file, paths, chunksize=16)


def collect(config: CorpusConfig) -> Collection:
    """Documents of the environment until both sources have `max_megabytes_per_source`, or the files end."""
    limit_bytes = int(config.max_megabytes_per_source * 1e6)
    size_bytes = dict.fromkeys(SOURCES, 0)
    texts: dict[tuple[str, Part], list[str]] = {(source, part): [] for source in SOURCES for part in PARTS}
    seen = SeenDocuments()
    files = repeated = 0
    for division in read_files(
        list_files(config.roots or environment_roots(), config.seed), config.processes
    ):
        if min(size_bytes.values()) >= limit_bytes:
            break
        if division is None:
            continue
        files += 1
        if not seen.is_new(division):
            repeated += 1
            continue
        part = part_of(division.digest, config.held_out_share)
        prose = "\n\n".join(seen.new_passages(division.passages))
        for source, text in zip(SOURCES, (prose, division.code), strict=True):
            if len(text) >= MIN_CHARACTERS and size_bytes[source] < limit_bytes:
                texts[source, part].append(text)
                size_bytes[source] += len(text.encode())
    return Collection(texts, files, repeated)


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> "Tokenizer":
    """Byte-level BPE (GPT-2's pre-tokenizer) with END_OF_TEXT as id 0; decoding gives the bytes back."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.encode_special_tokens = True  # a document that quotes the marker does not end there
    return tokenizer


def encode(tokenizer: "Tokenizer", texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, on all cores."""
    ids: list[list[int]] = []
    for start in range(0, len(texts), 256):
        batch = tokenizer.encode_batch_fast(list(texts[start : start + 256]), add_special_tokens=False)
        ids += [encoding.ids for encoding in batch]
    return ids


def write(config: CorpusConfig, folder: Path) -> dict:
    """Write the whole corpus into the empty `folder`; returns what corpus.json says."""
    start_seconds = time.perf_counter()

    def say(text: str) -> None:
        print(f"[{time.perf_counter() - start_seconds:5.1f} s] {text}", flush=True)

    texts, files, repeated = collect(config)
    say(f"read {files:,} files, {repeated:,} of them repeated and dropped")
    for source in SOURCES:
        for part in PARTS:
            if not texts[source, part]:
                raise ValueError(
                    f"no {source} for the {part} part: --roots or --held-out-share gives too little"
                )
    tokenizer = train_tokenizer([t for s in SOURCES for t in texts[s, "train"]], config.vocab_size)
    tokenizer.save(str(folder / "tokenizer.json"))
    say(f"trained a tokenizer of {tokenizer.get_vocab_size():,} tokens on the training part")
    sources, held_out_targets = {}, {}
    for source in SOURCES:
        sources[source] = {}
        for part in PARTS:
            documents = texts[source, part]
            tokens_NL, dropped = pack(encode(tokenizer, documents), config.seq_len + 1, 0)
            if part == "train":
                tokens_NL = np.random.default_rng(config.seed).permutation(tokens_NL)
            else:
                held_out_targets[source] = tokens_NL[:, 1:].ravel()
            write_shards(folder / source / part, tokens_NL, config.sequences_per_shard)
            sources[source][part] = {
                "documents": len(documents),
                "bytes": sum(len(text.encode()) for text in documents),
                "sequences": len(tokens_NL),
                "tokens": len(tokens_NL) * config.seq_len,
                "dropped_tail_ids": dropped,
            }
            counts = f"{len(documents):,} documents, {len(tokens_NL) * config.seq_len:,} tokens"
            say(f"wrote {source}/{part}: {counts}")
    unigram = {source: unigram_perplexity(held_out_targets[source]) for source in SOURCES}
    unigram["all"] = unigram_perplexity(np.concatenate(list(held_out_targets.values())))
    summary = {
        "settings": settings(config),
        "vocab_size": tokenizer.get_vocab_size(),
        "end_of_text": 0,
        "files": files,
        "repeated_files": repeated,
        "sources": sources,
        # exp(entropy of the held-out targets' own frequencies), each source by itself and both pooled.
        "held_out_unigram_perplexity": unigram,
    }
    (folder / "corpus.json").write_text(json.dumps(summary, indent=1) + "\n")
    return summary


def settings(config: CorpusConfig) -> dict:
    """What decides the corpus, as plain JSON."""
    decisive = {k: v for k, v in asdict(config).items() if k not in ("output", "processes")}
    decisive["roots"] = [str(root) for root in config.roots]
    return {"format": FORMAT} | decisive


def write_corpus(config: CorpusConfig) -> dict:
    """Write the corpus to `config.output`, or reuse the one that is there; returns corpus.json's content.

    It appears whole or not at all. Raises ValueError if `output` is a folder that holds something else.
    """
    if config.seq_len < 1 or config.vocab_size < 257 or not 0 < config.held_out_share < 1:
        raise ValueError(
            f"--seq-len {config.seq_len} must be at least 1, --vocab-size {config.vocab_size} at least 257 "
            f"(all bytes and {END_OF_TEXT}), --held-out-share {config.held_out_share} between 0 and 1"
        )
    output = config.output.absolute()
    described = output / "corpus.json"
    if described.exists():
        summary = json.loads(described.read_text())
        if summary["settings"] == settings(config):
            print(f"{config.output}: complete, with the same settings; reused")
            return summary
    elif output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"--output {config.output} exists and is no corpus; name another folder")
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    summary = write(config, partial)
    shutil.rmtree(output, ignore_errors=True)
    partial.rename(output)
    print(describe(summary))
    return summary


def describe(summary: dict) -> str:
    """corpus.json's numbers in a few lines."""
    rows = [f"{'':16}{'documents':>10}{'MB':>8}{'tokens':>12}"]
    for source, parts in summary["sources"].items():
        for part, counts in parts.items():
            size = f"{counts['documents']:>10,}{counts['bytes'] / 1e6:>8.2f}{counts['tokens']:>12,}"
            rows.append(f"{source + '/' + part:16}{size}")
    unigram = ", ".join(f"{k} {v:,.0f}" for k, v in summary["held_out_unigram_perplexity"].items())
    return "\n".join([*rows, f"unigram perplexity of the held-out text: {unigram}"])


def main() -> None:
    import tyro

    config = tyro.cli(CorpusConfig)
    try:
        write_corpus(config)
    except ValueError as error:
        sys.exit(f"open_lm.tokenize.corpus: error: {error}")


if __name__ == "__main__":
    main()
