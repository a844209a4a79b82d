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
KINDS = ("gelu",)
"""The kinds of experts that have run with them; the others that are not gated compile."""


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
    if device.type != "cuda" or dtype != torch.bfloat16 or torch.cuda.get_device_capability(device)[0] != 9:
        return None
    tile = choose(f"{kernel}_specialized", device, dtype, D, F)
    return tile if tile is not None and gluon() is not None and fits(tile, D, F) else None


def fits(tile: Tile, D: int, F: int) -> bool:
    """Whether the widths are whole tiles, and the depth is enough for what is done in quarters of it."""
    return D % tile.depth == 0 and 4 * tile.depth <= D and F % tile.columns == 0


def _descriptor(x: Tensor | None, block: list[int]) -> Any:
    if x is None:
        return None
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    layout = gl.NVMMASharedLayout.get_default_for(block, gl.bfloat16)
    return TensorDescriptor(x, list(x.shape), list(x.stride()), block, layout)


def _meta(tile: Tile) -> dict[str, Any]:
    return {"BM": tile.rows, "BN": tile.columns, "BK": tile.depth, "STAGES": tile.stages, "GROUP": tile.group,
            "REGISTERS": tile.registers, "num_warps": tile.warps}  # fmt: skip


def _grid(device: torch.device) -> tuple[int]:
    return (torch.cuda.get_device_properties(device).multi_processor_count,)


def up(
    x: Tensor, token_R: Tensor, w: Tensor, table: Tensor, kind: str, save: bool, activate: bool,
    weight_R: Tensor | None, tile: Tile,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """(h_RF if `save`, a_RF if `activate`, times weight_R if there): see `gluon_rows.up_kernel`. x is x_TD, or if
    the tile is `gathered` x[token] already.
    """
    R, (E, D, width) = token_R.numel(), w.shape
    half = [tile.rows // 2, 64]
    h = x.new_empty(R, width) if save else None
    a = x.new_empty(R, width) if activate else None
    gluon()[0][_grid(x.device)](
        _descriptor(x, [tile.rows, tile.depth]) if tile.gathered else x, token_R,
        _descriptor(w.view(E * D, width), [tile.depth, tile.columns]), _descriptor(h, half), h,
        _descriptor(a, half), a, weight_R, table, (table.numel() - 2) // 3, R, D=D, F=width, KIND=kind, OUTS=2,
        GATHER=not tile.gathered, **_meta(tile),
    )  # fmt: skip
    return h, a


def up_backward(
    g_RD: Tensor, w2: Tensor, weight_R: Tensor, h: Tensor, table: Tensor, kind: str, dh: Tensor, tile: Tile
) -> Tensor:
    """Stores dh_RF, which may be h; the gradient of weight_R: see `gluon_backward.up_backward_kernel`."""
    R, (E, width, D) = len(g_RD), w2.shape
    block = [tile.rows if tile.take_turns else tile.rows // 2, 64]
    # zeros: rows that were dropped are in no tile
    partial = torch.zeros(width // tile.columns, R, dtype=torch.float32, device=h.device)
    gluon()[1][_grid(h.device)](
        _descriptor(g_RD, [tile.rows, tile.depth]),
        _descriptor(w2.view(E * width, D), [tile.columns, tile.depth]), _descriptor(h, block),
        _descriptor(dh, block), dh, weight_R, partial, table, (table.numel() - 2) // 3, R, D=D, F=width, KIND=kind,
        PIECES=2, TAKE_TURNS=tile.take_turns, **_meta(tile),
    )  # fmt: skip
    return partial.sum(dim=0)
