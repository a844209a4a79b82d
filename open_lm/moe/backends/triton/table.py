"""Tile sizes: a short table, measured by moe/tune.py, so that the first step need not search.

Shapes: D model width, F expert width.
"""

import os
from typing import NamedTuple

import torch


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
    rows: int = 128
    """Rows of a tile; of the kernels that run over rows all have BLOCK_ROWS."""


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def block_rows(dtype: torch.dtype) -> int:
    """BM of every kernel over rows."""
    if interpreted():
        return 32
    return 128 if dtype.itemsize == 2 else 64


SMALL = Tile(32, 16, 4, 1, rows=32, per_sm=1, group=2, parts=2)
WIDE = Tile(64, 32, 4, 3, rows=64, per_sm=2, parts=2)  # 32 bits
HOPPER = {
    "up": Tile(128, 64, 4, 3, per_sm=2, parts=2),
    "up_gated": Tile(128, 64, 8, 3, parts=4),
    "up_backward": Tile(128, 64, 4, 3, per_sm=2, parts=4),
    "up_backward_gated": Tile(128, 64, 4, 3, per_sm=2, parts=4),
    "rows": Tile(256, 64, 8, 3, flatten=True),
    "weights": Tile(128, 64, 4, 3),
}
AMPERE = {
    "up": Tile(128, 32, 4, 3, per_sm=2, parts=2),
    "up_gated": Tile(64, 32, 4, 3, per_sm=2, parts=2),
    "up_backward": Tile(128, 32, 4, 3, per_sm=2, parts=4),
    "up_backward_gated": Tile(128, 32, 4, 3, per_sm=2, parts=4),
    "rows": Tile(128, 32, 4, 3, per_sm=2),
    "weights": Tile(128, 32, 4, 3),
}


def choose(kernel: str, device: torch.device, dtype: torch.dtype) -> Tile:
    """The tile of a kernel for operands of this dtype on this device."""
    if interpreted():
        return SMALL
    if dtype.itemsize == 4:
        return WIDE
    return (HOPPER if hopper(device) else AMPERE)[kernel]


def hopper(device: torch.device) -> bool:
    """Whether the device has tensor descriptors (TMA)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
