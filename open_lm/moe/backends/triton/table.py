"""Tile sizes: a short table, written by moe/tune.py, so that the first step need not search.

Shapes: D model width, F expert width.
"""

import json
import math
import os
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

HOPPER = Path(__file__).with_name("hopper.json")


class Tile(NamedTuple):
    """How one kernel cuts its product, and how it is compiled."""

    columns: int
    """Columns of a tile of the result (BN, BQ)."""
    depth: int
    """How much of the inner dimension is loaded at a time (BK)."""
    warps: int
    stages: int
    per_sm: int = 1
    """Programs per multiprocessor."""
    group: int = 8
    """Tiles of rows that take turns before the next column."""
    parts: int = 1
    """Pieces in which a tile goes through the activation."""
    flatten: bool = False
    """Whether a tile's first loads overlap the last tile's end."""
    early: bool = False
    """Whether pre-activations are fetched while the product is computed, and wait in registers."""
    store: bool = False
    """Whether whole tiles of a plain product are stored by descriptor, in the background."""
    gathered: bool = False
    """Whether rows are gathered before, not while they are loaded."""
    chunks: int = 0
    """A weight's gradient: about how many programs share all rows; 0: one per expert."""
    registers: int | None = None
    """The most registers a thread may have."""
    rows: int = 128
    """Rows of a tile; of the kernels that run over rows all have `block_rows`."""
    take_turns: bool = False
    """up_backward_specialized: whether each of the two consumers has every second tile, not half of each."""
    saves_activation: bool = False
    """up_backward: whether forward saves weight * activation for dw2, which it else computes again and stores."""
    in_place: bool = False
    """up_backward: whether gradients take the memory of the pre-activations that were saved."""


SMALL = Tile(32, 16, 4, 1, group=2, parts=2, rows=32, chunks=3)  # the interpreter's
WIDE = Tile(64, 32, 4, 3, per_sm=2, parts=2, rows=64)  # for 32 bits

HALF = Tile(
    128, 64, 4, 3
)  # for weights' gradients where the table has torch's, which is made for bfloat16 alone
AMPERE = {
    "up": Tile(128, 32, 4, 3, per_sm=2, parts=2),
    "up_gated": Tile(64, 32, 4, 3, per_sm=2, parts=2),
    "up_backward": Tile(128, 32, 4, 3, per_sm=2, parts=4),
    "up_backward_gated": Tile(128, 32, 4, 3, per_sm=2, parts=4),
    "down": Tile(128, 32, 4, 3, per_sm=2),
    "down_backward": Tile(128, 32, 4, 3, per_sm=2),
    "dw1": Tile(128, 32, 4, 3),
    "dw2": Tile(128, 32, 4, 3),
}


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def block_rows(dtype: torch.dtype) -> int:
    """BM of every kernel over rows."""
    if interpreted():
        return 32
    return 128 if dtype.itemsize == 2 else 64


@cache
def hopper_table() -> dict[str, list[tuple[int, int, Tile | None]]]:
    """Kernel → (D, F, tile) measured on an H100 in bfloat16; None: torch's grouped_mm was faster, with a gather, or
    beside a kernel of `specialized` that of `rows`.
    """
    entries = json.loads(HOPPER.read_text(encoding="utf-8"))
    return {
        kernel: [(D, F, None if tile is None else Tile(**tile)) for D, F, tile in rows]
        for kernel, rows in entries.items()
    }


@cache
def hopper(device: torch.device) -> bool:
    """Whether the device has tensor descriptors (TMA)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


@cache
def choose(kernel: str, device: torch.device, dtype: torch.dtype, D: int, F: int) -> Tile | None:
    """The tile of a kernel for these operands: that of the nearest widths measured. None: grouped_mm."""
    if interpreted():
        return SMALL
    if dtype.itemsize == 4:
        return WIDE
    if not hopper(device):
        return AMPERE[kernel]
    measured = [(abs(math.log(D / d)) + abs(math.log(F / f)), tile) for d, f, tile in hopper_table()[kernel]]
    tile = min(measured, key=lambda pair: pair[0])[1]
    return HALF if tile is None and dtype != torch.bfloat16 else tile
