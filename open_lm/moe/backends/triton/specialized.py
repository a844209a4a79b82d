"""Launches `gluon_rows`' kernels, where this Triton, this GPU and these operands are what they were made for.

Gluon is experimental: its functions change from one release of Triton to the next, so that these kernels are used
with the release they were written and measured with alone. Everywhere else `launch` takes those of `rows`.

Shapes: T tokens, D model width, E experts, F expert width, R rows.
"""

# A kernel's numbers known when it is compiled are given as plain ones.
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false

from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from open_lm.moe.backends.triton.table import Tile, choose, interpreted

TRITON = (3, 6)
"""The release of Triton whose Gluon this is."""


@cache
def gluon() -> Any:
    """(up_kernel, up_backward_kernel), or None if this is another Triton or its Gluon does not import."""
    if interpreted() or tuple(int(part) for part in triton.__version__.split(".")[:2]) != TRITON:
        return None
    try:
        from open_lm.moe.backends.triton.gluon_backward import up_backward_kernel
        from open_lm.moe.backends.triton.gluon_rows import up_kernel
    except (ImportError, AttributeError, TypeError):  # a Gluon that lacks a name or an argument
        return None
    return up_kernel, up_backward_kernel


@cache
def tile_of(kernel: str, device: torch.device, dtype: torch.dtype, D: int, F: int) -> Tile | None:
    """The tile for "up" or "up_backward" of these widths, ungated; None: `rows`' kernel is to do it."""
    if device.type != "cuda" or dtype.itemsize != 2 or torch.cuda.get_device_capability(device)[0] != 9:
        return None
    tile = choose(f"{kernel}_specialized", device, dtype, D, F)
    return tile if tile is not None and gluon() is not None and fits(tile, D, F) else None


def fits(tile: Tile, D: int, F: int) -> bool:
    """Whether the widths are whole tiles."""
    return D % tile.depth == 0 and F % tile.columns == 0


def _descriptor(x: Tensor | None, block: list[int]) -> Any:
    if x is None:
        return None
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    dtype = gl.bfloat16 if x.dtype == torch.bfloat16 else gl.float16
    layout = gl.NVMMASharedLayout.get_default_for(block, dtype)
    return TensorDescriptor(x, list(x.shape), list(x.stride()), block, layout)


def _meta(tile: Tile) -> dict[str, Any]:
    return {"BM": tile.rows, "BN": tile.columns, "BK": tile.depth, "STAGES": tile.stages, "GROUP": tile.group,
            "TAKE_TURNS": tile.take_turns, "REGISTERS": tile.registers, "num_warps": 4}  # fmt: skip


def _grid(device: torch.device) -> tuple[int]:
    return (torch.cuda.get_device_properties(device).multi_processor_count,)


def up(
    x_TD: Tensor, token_R: Tensor, w: Tensor, table: Tensor, kind: str, save: bool, activate: bool,
    weight_R: Tensor | None, tile: Tile,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """(h_RF if `save`, a_RF if `activate`, times weight_R if there): see `gluon_rows.up_kernel`."""
    R, (E, D, width) = token_R.numel(), w.shape
    block = [tile.rows if tile.take_turns else tile.rows // 2, 64]
    h = x_TD.new_empty(R, width) if save else None
    a = x_TD.new_empty(R, width) if activate else None
    gluon()[0][_grid(x_TD.device)](
        x_TD, token_R, _descriptor(w.view(E * D, width), [tile.depth, tile.columns]), _descriptor(h, block), h,
        _descriptor(a, block), a, weight_R, table, (table.numel() - 2) // 3, R, D=D, F=width, KIND=kind,
        GATHER=True, **_meta(tile),
    )  # fmt: skip
    return h, a


def up_backward(
    g_RD: Tensor, w2: Tensor, weight_R: Tensor, h: Tensor, table: Tensor, kind: str, in_place: bool, tile: Tile
) -> tuple[Tensor, Tensor]:
    """(dh_RF, the gradient of weight_R): see `gluon_backward.up_backward_kernel`. `in_place`: dh is h."""
    R, (E, width, D) = len(g_RD), w2.shape
    block = [tile.rows if tile.take_turns else tile.rows // 2, 64]
    dh = h if in_place else torch.empty_like(h)
    # zeros: rows that were dropped are in no tile
    partial = torch.zeros(width // tile.columns, R, dtype=torch.float32, device=h.device)
    gluon()[1][_grid(h.device)](
        _descriptor(g_RD, [tile.rows, tile.depth]),
        _descriptor(w2.view(E * width, D), [tile.columns, tile.depth]), _descriptor(h, block),
        _descriptor(dh, block), dh, weight_R, partial, table, (table.numel() - 2) // 3, R, D=D, F=width, KIND=kind,
        PIECES=tile.columns // 64, **_meta(tile),
    )  # fmt: skip
    return dh, partial.sum(dim=0)
