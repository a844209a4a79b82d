"""Second pass: a bucket's documents → shuffled rows. Third: a share of every bucket's rows → a shard.

A bucket's file is its rows, then (packing join) the ids that filled none: `Tails` joins those of all buckets, so
that of a whole part fewer than one row is dropped. Once per bucket the rest of a document thus follows the end of
another one.

Legend: N rows, L ids in a row (seq_len + 1).
"""

import hashlib
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from open_lm.data.randomness import permute
from open_lm.data.retry import Patience
from open_lm.tokenize.folder import Folder, open_folder
from open_lm.tokenize.mapping import Block
from open_lm.tokenize.packing import best_fit, join
from open_lm.tokenize.shard_writer import pack_tar


class Rows(NamedTuple):
    """What the tasks agree on: ids of a row, type of an id, how documents are packed, the padding, the seed, the
    patience with remote files."""

    length: int
    dtype: str
    packing: str
    pad: int
    seed: int
    patience: Patience


@dataclass(frozen=True)
class Pack:
    """Task: make rows of a bucket's documents."""

    name: str
    work: str
    rows: Rows
    part: str
    bucket: int
    blocks: tuple[Block, ...]

    @property
    def patience(self) -> Patience:
        """With remote files."""
        return self.rows.patience


@dataclass(frozen=True)
class Tails:
    """Task: make rows of what was left of the buckets: (file, offset in bytes, ids) of each."""

    name: str
    work: str
    rows: Rows
    part: str
    tails: tuple[tuple[str, int, int], ...]

    @property
    def patience(self) -> Patience:
        """With remote files."""
        return self.rows.patience


@dataclass(frozen=True)
class WriteShard:
    """Task: write a shard of rows (file, first row, count) of each bucket."""

    name: str
    work: str
    output: str
    rows: Rows
    part: str
    number: int
    slices: tuple[tuple[str, int, int], ...]
    format: str

    @property
    def patience(self) -> Patience:
        """With remote files."""
        return self.rows.patience


def read_block(folder: Folder, block: Block, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Keys, lengths and ids."""
    size = block.documents * 12 + block.tokens * dtype.itemsize
    data = folder.read(block.piece, block.offset, size)
    keys = np.frombuffer(data, "<u8", block.documents)
    lengths = np.frombuffer(data, "<u4", block.documents, block.documents * 8)
    return keys, lengths, np.frombuffer(data, dtype, offset=block.documents * 12)


def pack_bucket(task: Pack) -> dict:
    """Writes `NAME.rows`. Result: rows, ids left over, ids of padding."""
    folder, dtype = open_folder(task.work, task.rows.patience), np.dtype(task.rows.dtype)
    keys, lengths, ids = zip(*(read_block(folder, b, dtype) for b in task.blocks), strict=True)
    ids, lengths = np.concatenate(ids), np.concatenate(lengths)
    ends = np.cumsum(lengths, dtype=np.int64)
    order = np.argsort(np.concatenate(keys), kind="stable")
    documents = [ids[ends[i] - lengths[i] : ends[i]] for i in order]
    padding, tail = 0, ids[:0]
    if task.rows.packing == "join":
        rows_NL, tail = join(documents, task.rows.length)
    else:
        rows_NL, padding = best_fit(documents, task.rows.length, task.rows.pad)
    rows_NL = rows_NL[permute(len(rows_NL), task.rows.seed, "rows", task.part, task.bucket)]
    folder.write(f"{task.name}.rows", rows_NL.tobytes() + tail.tobytes())
    return {"rows": len(rows_NL), "tail": len(tail), "padding": padding}


def join_tails(task: Tails) -> dict:
    """Writes `NAME.rows` as a bucket of its own. Result as `pack_bucket`: the ids left over are dropped."""
    folder, dtype = open_folder(task.work, task.rows.patience), np.dtype(task.rows.dtype)
    tails = [folder.read(name, offset, count * dtype.itemsize) for name, offset, count in task.tails]
    rows_NL, tail = join([np.frombuffer(data, dtype) for data in tails], task.rows.length)
    rows_NL = rows_NL[permute(len(rows_NL), task.rows.seed, "rows", task.part, "tails")]
    folder.write(f"{task.name}.rows", rows_NL.tobytes())
    return {"rows": len(rows_NL), "tail": len(tail), "padding": 0}


def write_shard(task: WriteShard) -> dict:
    """Writes the tar. Result: its line of the manifest."""
    folder, dtype = open_folder(task.work, task.rows.patience), np.dtype(task.rows.dtype)
    width = task.rows.length * dtype.itemsize
    data = b"".join(folder.read(name, first * width, count * width) for name, first, count in task.slices)
    rows_NL = np.frombuffer(data, dtype).reshape(-1, task.rows.length)
    rows_NL = rows_NL[permute(len(rows_NL), task.rows.seed, "shard", task.part, task.number)]
    tar, layout = pack_tar(rows_NL, task.number, task.format)
    shard = f"shard_{task.number:08d}"
    open_folder(task.output, task.rows.patience).write(f"{shard}.tar", tar)
    return {
        "shard": shard,
        "num_sequences": len(rows_NL),
        "tokens": rows_NL.size,
        "bytes": len(tar),
        "sha256": hashlib.sha256(tar).hexdigest(),
        "sequence_tokens": task.rows.length,
        **layout,
    }
