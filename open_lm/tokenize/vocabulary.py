"""The tokenizer of a run: loaded or trained, with its end of text and the width of its ids."""

import json
import os
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from open_lm.data.randomness import permute
from open_lm.data.retry import Patience
from open_lm.data.stream import open_stream
from open_lm.tokenize.corpus import train_tokenizer
from open_lm.tokenize.folder import open_folder
from open_lm.tokenize.inputs import Unit
from open_lm.tokenize.readers import How, read_unit
from open_lm.tokenize.split import Split, choose

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENIZER = "tokenizer.json"
ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "[SEP]")
U16_IDS = 2**16
BATCH_DOCUMENTS = 256
BATCH_BYTES = 2**20


def load_tokenizer(name: str, patience: Patience) -> bytes:
    """Content of the tokenizer.json that --tokenizer means: a file, a folder's, or the hub's. ValueError: none."""
    path = Path(name)
    try:
        if path.is_dir() and not (path / TOKENIZER).exists():
            raise ValueError(f"--tokenizer {name}: the folder holds no {TOKENIZER}")
        if path.exists() or "://" in name or name.endswith(".json"):
            with open_stream(str(path / TOKENIZER) if path.is_dir() else name, patience) as stream:
                content = stream.read()
        else:
            content = load_from_hub(name)
    except OSError as error:
        raise ValueError(f"--tokenizer {name}: {error}") from None
    parse(content, name)
    return content


def load_from_hub(name: str) -> bytes:
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_pretrained(name).to_str().encode()
    except Exception as error:  # whatever its client raises without a network, or for an unknown name
        raise ValueError(
            f"--tokenizer {name}: no such file or folder here, and the hub gave none: "
            f"{type(error).__name__}: {error}"
        ) from None


def parse(content: bytes, name: str) -> "Tokenizer":
    """ValueError: no tokenizer."""
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_str(content.decode())
    except Exception as error:  # tokenizers raises Exception itself
        raise ValueError(f"--tokenizer {name}: no tokenizer.json: {error}") from None
    tokenizer.encode_special_tokens = True  # a document that quotes the marker does not end there
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


@lru_cache(2)
def open_tokenizer(output: str, patience: Patience) -> "Tokenizer":
    """The tokenizer of an output folder, once per process."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a process is a core
    return parse(open_folder(output, patience).read(TOKENIZER), output)


def find_token(tokenizer: "Tokenizer", token: str, flag: str) -> int:
    """Its id. ValueError if the vocabulary lacks it."""
    number = tokenizer.token_to_id(token)
    if number is None:
        raise ValueError(f"{flag} {token}: not in the tokenizer's vocabulary")
    return number


def find_end_of_text(tokenizer: "Tokenizer", given: str | None) -> int:
    """The id that ends documents: of the given token or of a well-known one. ValueError if there is none."""
    if given is not None:
        return find_token(tokenizer, given, "--end-of-text")
    known = [number for token in ENDS if (number := tokenizer.token_to_id(token)) is not None]
    if not known:
        raise ValueError(
            f"the tokenizer has no end of text (none of {', '.join(ENDS)}): name one by --end-of-text"
        )
    return known[0]


def count_ids(tokenizer: "Tokenizer") -> int:
    """One more than the largest id."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def encode(tokenizer: "Tokenizer", texts: list[str], end: int, dtype: np.dtype) -> Iterator[np.ndarray]:
    """Ids of each text, `end` behind them."""
    for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False):
        ids = encoding.ids
        ids.append(end)
        yield np.fromiter(ids, dtype, len(ids))


def batch(texts: Iterable[str]) -> Iterator[list[str]]:
    """Lists of up to BATCH_DOCUMENTS texts or about BATCH_BYTES characters."""
    held, size = [], 0
    for text in texts:
        held.append(text)
        size += len(text)
        if len(held) >= BATCH_DOCUMENTS or size >= BATCH_BYTES:
            yield held
            held, size = [], 0
    if held:
        yield held


def train(units: list[Unit], how: How, split: Split, vocab_size: int, limit_bytes: float, seed: int) -> bytes:
    """A tokenizer.json of the training documents of units drawn by the seed, up to `limit_bytes` of text."""
    texts, size = [], 0
    for i in permute(len(units), seed, "train_tokenizer"):
        for document in read_unit(units[i], how):
            if size >= limit_bytes:
                break
            if document.text and choose(document.text.encode(), units[i].file.source, split)[0] == "train":
                texts.append(document.text)
                size += len(document.text.encode())
    if not texts:
        raise ValueError("--train-tokenizer: no document to train on")
    content = train_tokenizer(texts, vocab_size).to_str()
    return json.dumps(json.loads(content), ensure_ascii=False, separators=(",", ":")).encode()
