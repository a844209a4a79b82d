"""Documents of .jsonl files to a source of token sequences: what the recorded runs were trained on.

    python moe/real_text.py --inputs books.jsonl reference.jsonl --tokenizer tokenizer.json --output corpus/a

Each line is {"text": …}. Documents are joined by the tokenizer's end of text and cut into sequences of seq_len + 1
ids, sequences are shuffled. The same inputs and flags give the same bytes.
"""

import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import tyro

from open_lm.tokenize.corpus import encode
from open_lm.tokenize.shard_writer import write_shards

END_OF_TEXT = "<|endoftext|>"
DOCUMENTS_AT_ONCE = 2048


@dataclass(frozen=True)
class RealText:
    """Tokenizes documents into shards with a manifest."""

    inputs: tuple[Path, ...]
    """Files of JSON lines with a "text"."""
    tokenizer: Path
    """A tokenizer.json whose vocabulary holds <|endoftext|> and fits 16 bits."""
    output: Path
    """Folder for the shards and manifest.jsonl; must not exist."""
    seq_len: int = 2048
    """Inputs per sequence."""
    share: float = 1.0
    """Share of the documents that is taken, chosen by the hash of their text."""
    seed: int = 0
    """Of the shuffle; -1 keeps the documents' order (held-out text)."""
    sequences_per_shard: int = 1024
    """Sequences in a tar."""


def documents(config: RealText) -> Iterator[str]:
    """The chosen texts, in the files' order. Raises ValueError naming a line without text."""
    for path in config.inputs:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                text = json.loads(line).get("text")
                if not isinstance(text, str):
                    raise ValueError(f"{path}, line {number}: no text")
                if zlib.crc32(text.encode()) < config.share * 2**32:
                    yield text


def tokenize(config: RealText) -> np.ndarray:
    """tokens_NL, uint16: every id in order, but for a last incomplete sequence."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(config.tokenizer))
    end_of_text = tokenizer.token_to_id(END_OF_TEXT)
    if end_of_text is None:
        raise ValueError(f"--tokenizer {config.tokenizer}: no {END_OF_TEXT} in its vocabulary")
    if tokenizer.get_vocab_size() > 2**16:
        raise ValueError(
            f"--tokenizer {config.tokenizer}: {tokenizer.get_vocab_size()} ids do not fit 16 bits"
        )
    tokenizer.encode_special_tokens = True  # a document that quotes the marker does not end there
    texts, pieces = documents(config), []
    while batch := list(islice(texts, DOCUMENTS_AT_ONCE)):
        pieces += [np.array([*ids, end_of_text], dtype=np.uint16) for ids in encode(tokenizer, batch)]
    ids = np.concatenate(pieces) if pieces else np.empty(0, np.uint16)
    length = config.seq_len + 1
    return ids[: len(ids) // length * length].reshape(-1, length)


def main(config: RealText) -> None:
    if config.output.exists():
        raise SystemExit(f"--output {config.output} exists: name another folder")
    tokens_NL = tokenize(config)
    if config.seed >= 0:
        tokens_NL = np.random.default_rng(config.seed).permutation(tokens_NL)
    shards = write_shards(config.output, tokens_NL, config.sequences_per_shard)
    print(
        f"{config.output}: {len(tokens_NL):,} sequences, {len(tokens_NL) * config.seq_len:,} tokens, "
        f"{len(shards)} shards"
    )


if __name__ == "__main__":
    main(tyro.cli(RealText, description=__doc__))
