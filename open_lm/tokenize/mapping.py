"""First pass: a unit of input → its documents' ids, in pieces that are ordered by bucket.

A piece is, bucket by bucket, uint64 keys, uint32 lengths and the ids of its documents. Every document ends with
end-of-text, which counts as one of its tokens.
"""

from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from open_lm.data.retry import Patience
from open_lm.tokenize.folder import open_folder
from open_lm.tokenize.inputs import Unit
from open_lm.tokenize.readers import How, count_lines, name_place, read_unit
from open_lm.tokenize.split import Split, choose, find_slot, order_key
from open_lm.tokenize.vocabulary import BATCH_BYTES, BATCH_DOCUMENTS, encode, open_tokenizer

PIECE_TOKENS = 32 * 2**20
NAMED = 10  # members of a unit that are passed over


class Block(NamedTuple):
    """A bucket's documents in a piece: where they begin, how many, how many ids."""

    piece: str
    offset: int
    documents: int
    tokens: int


@dataclass(frozen=True)
class Encode:
    """Task: tokenize a unit."""

    name: str
    work: str
    output: str
    unit: Unit
    how: How
    split: Split
    end_of_text: int
    dtype: str
    on_bad: str
    max_bad: int

    @property
    def patience(self) -> Patience:
        """With remote files."""
        return self.how.patience


class BadDocument(ValueError):
    """A document that cannot be read, with --on-bad fail: its file, line and problem."""


class Pieces:
    """Collects documents and writes them as files of about PIECE_TOKENS ids."""

    def __init__(self, task: Encode) -> None:
        self.task = task
        self.held: dict[int, list[tuple[int, np.ndarray]]] = {}
        self.tokens = 0
        self.count = 0
        self.blocks: dict[int, list[Block]] = {}

    def add(self, slot: int, key: int, ids: np.ndarray) -> None:
        self.held.setdefault(slot, []).append((key, ids))
        self.tokens += len(ids)
        if self.tokens >= PIECE_TOKENS:
            self.flush()

    def flush(self) -> None:
        """Writes what is held."""
        if not self.held:
            return
        name, parts, offset = f"{self.task.name}_{self.count:04d}.ids", [], 0
        for slot, documents in sorted(self.held.items()):
            lengths = np.array([len(ids) for _, ids in documents], "<u4")
            block = [np.array([key for key, _ in documents], "<u8").tobytes(), lengths.tobytes()]
            block.append(np.concatenate([ids for _, ids in documents]).tobytes())
            self.blocks.setdefault(slot, []).append(Block(name, offset, len(documents), int(lengths.sum())))
            parts += block
            offset += sum(map(len, block))
        open_folder(self.task.work, self.task.patience).write(name, b"".join(parts))
        self.held, self.tokens, self.count = {}, 0, self.count + 1


def encode_unit(task: Encode) -> dict:
    """Writes the unit's pieces. Result: blocks by slot, counts by name, lines, the bad documents, the first members
    that are passed over.

    BadDocument: --on-bad fail, and there is one (or more than --max-bad in this unit alone).
    """
    tokenizer = open_tokenizer(task.output, task.patience)
    dtype, source, number = np.dtype(task.dtype), task.unit.file.source, task.unit.file.number
    pieces, counts, bad, passed, lines = Pieces(task), Counter(), [], [], 0
    chosen: list[tuple[str, int, str]] = []  # part, copies, position of each text
    texts: list[str] = []
    characters = 0

    def encode_batch() -> None:
        for (part, copies, position), ids in zip(
            chosen, encode(tokenizer, texts, task.end_of_text, dtype), strict=True
        ):
            counts[f"{part}_documents"] += copies
            counts[f"{part}_tokens"] += copies * len(ids)
            for copy in range(copies):
                key = order_key(source, number, position, copy, task.split.seed)
                pieces.add(find_slot(part, key, task.split), key, ids)
        chosen.clear()
        texts.clear()

    for document in read_unit(task.unit, task.how):
        lines = document.line
        if document.text is None:
            refuse(task, document.member, document.line, document.problem, len(bad))
            bad.append((document.member, document.line, document.problem))
            continue
        if not document.text:
            counts["empty"] += bool(document.position)  # a blank line is no document
            counts["passed"] += document.is_passed
            if document.is_passed and len(passed) < NAMED:
                passed.append(name_place(task.unit, document.member, 0, 0))
            continue
        data = document.text.encode()
        part, copies = choose(data, source, task.split)
        counts["documents"] += 1
        counts["bytes"] += len(data)
        if copies:
            counts[f"{part}_bytes"] += copies * len(data)
            counts["encoded_bytes"] += len(data)
            chosen.append((part, copies, document.position))
            texts.append(document.text)
            characters += len(document.text)
        else:
            counts["not_sampled"] += 1
        if len(texts) >= BATCH_DOCUMENTS or characters >= BATCH_BYTES:
            encode_batch()
            characters = 0
    if texts:
        encode_batch()
    pieces.flush()
    counts["bad"] = len(bad)
    return {
        "blocks": pieces.blocks, "counts": dict(sorted(counts.items())), "lines": lines, "bad": bad,
        "passed": passed,
    }  # fmt: skip


def refuse(task: Encode, member: str, line: int, problem: str, before: int) -> None:
    if task.on_bad == "skip" and before < task.max_bad:
        return
    place = name_place(task.unit, member, line, count_lines(task.unit, task.how.patience))
    advice = "--on-bad skip passes over such documents"
    if task.on_bad == "skip":
        advice = f"more than --max-bad {task.max_bad} are bad"
    raise BadDocument(f"{place}: {problem} ({advice})")
