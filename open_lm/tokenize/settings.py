"""What `python -m open_lm.tokenize` is told: a field is a flag, the text under it its help."""

import os
import posixpath
from dataclasses import dataclass
from typing import Literal

from open_lm.data.retry import Patience
from open_lm.tokenize.places import is_inside


@dataclass(frozen=True)
class TokenizeConfig:
    """Documents in, shuffled tar shards of token sequences with a manifest out.

    The same inputs and flags give the same bytes with any engine and any number of processes. Killed and started
    again with the same flags, it goes on where it was.
    """

    inputs: tuple[str, ...]
    """One entry per source: a file, a folder, a glob, {00..99} braces, s3://BUCKET/PREFIX/; `::` joins several.
    Files are .jsonl, .txt, .parquet, or .tar of these; all but parquet also with .gz or .zst. What a folder or a
    tar holds beside them is passed over, and said."""

    output: str
    """Folder or s3:// URL for shard_*.tar, manifest.jsonl, info.json, tokenizer.json and held_out/."""

    tokenizer: str | None = None
    """A tokenizer.json, a folder that holds one, or the name of one on the Hugging Face hub."""

    train_tokenizer: int | None = None
    """Train a byte-level BPE tokenizer of this many ids on the training part instead."""

    train_tokenizer_megabytes: float = 100.0
    """Text to train it on."""

    end_of_text: str | None = None
    """The token after every document. Default: the tokenizer's own, if it is one of the well-known."""

    seq_len: int = 2048
    """Tokens the model sees; every sequence holds one more."""

    text_key: str = "text"
    """Key (or parquet column) of a document's text."""

    txt_documents: Literal["file", "line"] = "file"
    """What is a document in a .txt file."""

    sampling_rates: tuple[float, ...] | None = None
    """One per entry of --inputs: 0.3 takes 30 % of the documents (by their hash), 2.5 each two or three
    times. Default: 1. Held-out documents are never repeated."""

    held_out_share: float = 0.0
    """Share of the documents that goes to held_out/, by the hash of their text alone: equal ones stay together."""

    seed: int = 0
    """Of the order of the documents and sequences, and of the sampling."""

    packing: Literal["join", "best-fit"] = "join"
    """join: documents are joined by end-of-text and cut. best-fit: no document is cut unless it is longer than a
    sequence; what is left of a sequence is padded."""

    pad_token: str | None = None
    """Fills sequences of best-fit. Default: end-of-text, which then is a target like any other; a token of its own
    can be ignored in training by --target-mask-individual."""

    format: Literal["binary", "json.gz"] = "binary"
    """binary: raw uint16, or uint32 above 65,536 ids. json.gz: what open_lm's own reader takes."""

    sequences_per_shard: int = 8192
    """Sequences in a tar; the last one may hold fewer."""

    on_bad: Literal["fail", "skip"] = "fail"
    """A document that cannot be read: stop and name it, or skip, count and name it."""

    max_bad: int = 1000
    """Stop when --on-bad skip has skipped more."""

    engine: Literal["local", "ray"] = "local"
    """Processes on this machine, or a Ray cluster (pip install ray). Never changes the result."""

    processes: int = os.cpu_count() or 1
    """Processes of --engine local, CPUs of a Ray that is started here."""

    ray_address: str | None = None
    """A running Ray cluster, e.g. auto or ray://HOST:10001; it must see inputs and output.
    Default: one is started here."""

    work: str | None = None
    """Empty or new folder, or URL, for intermediate files, which are removed at the end. Default: OUTPUT/work."""

    take_over: bool = False
    """Go on in a remote --output or --work whose owner.json names another run: only when that run is dead.
    (A dead one of this host is noticed.)"""

    unit_megabytes: float = 16.0
    """Input to a task, where files can be divided (.jsonl, .parquet). Never changes the result."""

    bucket_megabytes: float = 256.0
    """Input shuffled at a time: memory of a process is a few times as much."""

    data_retries: int = 6
    """How often a read or write of a remote file is tried again, with waits of 1, 2, 4 … seconds, when the server
    throttles, fails or resets. Then the run ends, and goes on when started again."""

    data_timeout: float = 30.0
    """Seconds that a connection to a remote file may say nothing."""

    progress_seconds: float = 10.0
    """Between two lines of progress where the output is no terminal."""

    @property
    def patience(self) -> Patience:
        """With remote files."""
        return Patience(self.data_retries, self.data_timeout)


# Flags that decide the bytes written, or the tasks: a run with others cannot go on in the same output.
DECISIVE = (
    "end_of_text text_key txt_documents held_out_share seed packing pad_token format seq_len sequences_per_shard "
    "bucket_megabytes unit_megabytes train_tokenizer train_tokenizer_megabytes"
).split()


def check(config: TokenizeConfig) -> None:
    """ValueError, naming flag and value, for settings that cannot work."""
    positive = (
        "seq_len sequences_per_shard processes unit_megabytes bucket_megabytes progress_seconds "
        "train_tokenizer_megabytes data_timeout"
    ).split()
    for name in positive:
        if not getattr(config, name) > 0:
            raise ValueError(f"{flag(name)} {getattr(config, name)} must be more than 0")
    if config.data_retries < 0:
        raise ValueError(f"--data-retries {config.data_retries} must be 0 or more")
    if not config.inputs or not all(config.inputs):
        raise ValueError("--inputs names nothing")
    if (config.tokenizer is None) == (config.train_tokenizer is None):
        raise ValueError("give one of --tokenizer and --train-tokenizer")
    if config.train_tokenizer is not None and config.train_tokenizer < 257:
        raise ValueError(
            f"--train-tokenizer {config.train_tokenizer} must be at least 257: all bytes and one end"
        )
    if not 0 <= config.held_out_share < 1:
        raise ValueError(f"--held-out-share {config.held_out_share} must be 0 or more, and less than 1")
    if config.pad_token is not None and config.packing != "best-fit":
        raise ValueError(f"--pad-token {config.pad_token} needs --packing best-fit, not {config.packing}")
    if config.ray_address is not None and config.engine != "ray":
        raise ValueError(f"--ray-address {config.ray_address} needs --engine ray, not {config.engine}")
    if config.work is not None and is_inside(config.output, config.work):
        raise ValueError(
            f"--work {config.work} is or holds --output {config.output}: name a folder of its own for --work, or "
            "leave it out (it is OUTPUT/work then)"
        )
    if config.work is not None and is_inside(config.work, posixpath.join(config.output, "held_out")):
        raise ValueError(f"--work {config.work} is where --output {config.output} writes its held-out part")
    if not -(2**63) <= config.seed < 2**63:
        raise ValueError(f"--seed {config.seed} must be from -2^63 to 2^63 - 1")
    rates = config.sampling_rates
    if rates is not None:
        text = " ".join(map(str, rates))
        if len(rates) != len(config.inputs):
            raise ValueError(
                f"--sampling-rates {text}: {len(rates)} rates for {len(config.inputs)} entries of --inputs"
            )
        if not all(0 <= rate < 1000 for rate in rates) or not any(rates):
            raise ValueError(f"--sampling-rates {text}: each must be from 0 to 1000, and one more than 0")


def flag(name: str) -> str:
    """A field's flag."""
    return "--" + name.replace("_", "-")
