"""From tensors to kernels: allocates results, makes descriptors, chooses tiles and grids.

All tensors are contiguous, of one dtype but for weight_R and scale_R (float32) and indices (int32); widths are
multiples of 16 bytes. R and T are at least 1.

Shapes: T tokens, D model width, E experts, F expert width, R rows, K rows per token.
"""

# A kernel's numbers known when it is compiled are given as plain ones.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportCallIssue=false, reportReturnType=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false, reportIndexIssue=false

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from open_lm.moe.backends.triton import specialized
from open_lm.moe.backends.triton.combine import combine_kernel, gather_kernel
from open_lm.moe.backends.triton.rows import rows_kernel, up_backward_kernel, up_kernel
from open_lm.moe.backends.triton.table import Tile, block_rows, choose, hopper, interpreted
from open_lm.moe.backends.triton.tiles import schedule_kernel
from open_lm.moe.backends.triton.weights import add_chunks_kernel, weights_kernel


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; in the interpreter three, so that a program has several tiles."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


def precision(dtype: torch.dtype) -> str:
    """float32 products: exact, or in tf32 where torch's own would be."""
    return "tf32" if dtype != torch.float32 or torch.backends.cuda.matmul.allow_tf32 else "ieee"


def fast(x: Tensor) -> bool:
    """Whether the GPU's approximate instructions are exact enough."""
    return x.element_size() == 2 and not interpreted()


def tma(device: torch.device) -> bool:
    return hopper(device) or interpreted()


def _descriptor(x: Tensor | None, block: list[int], use: bool) -> Any:
    return TensorDescriptor(x, list(x.shape), list(x.stride()), block) if use and x is not None else x


def _weight(w_EKN: Tensor | None, tile: Tile, use: bool, transposed: bool = False) -> Any:
    block = [1, tile.columns, tile.depth] if transposed else [1, tile.depth, tile.columns]
    return _descriptor(w_EKN, block, use)


def _grid(tile: Tile, tiles: int, device: torch.device) -> tuple[int]:
    """As many programs as run at once."""
    return (min(tiles, processors(device) * tile.per_sm),)


def _meta(tile: Tile) -> dict[str, int]:
    return {"BN": tile.columns, "BK": tile.depth, "GROUP": tile.group, "num_warps": tile.warps,
            "num_stages": tile.stages} | ({"maxnreg": tile.registers} if tile.registers else {})  # fmt: skip


def gathers(h: Tensor, D: int, gated: bool) -> bool:
    """Whether `up_backward` takes rows that are gathered already."""
    if not gated and specialized.tile_of("up_backward", h.device, h.dtype, D, h.shape[1]) is not None:
        return True
    tile = choose("up_backward_gated" if gated else "up_backward", h.device, h.dtype, D, h.shape[1])
    return tile is not None and tile.gathered and tma(h.device)


@torch.compiler.assume_constant_result  # the compiler need not look into the table
def plan(device: torch.device, dtype: torch.dtype, D: int, width: int, gated: bool) -> tuple[bool, bool]:
    """(whether forward saves weight * activation, whether backward's dh takes the memory of h)."""
    tile = choose("up_backward_gated" if gated else "up_backward", device, dtype, D, width)
    # the specialised kernel stores dh alone
    saves = not gated and specialized.tile_of("up_backward", device, dtype, D, width) is not None
    return saves or (tile is not None and tile.saves_activation), tile is not None and tile.in_place


def schedule(end_E: Tensor, rows: int, block: int) -> Tensor:
    """The table of `tiles.schedule_kernel`, int32 (3 M + 2,), M = ceil(rows / block) + E."""
    E = end_E.numel()
    M = triton.cdiv(rows, block) + E
    table = end_E.new_empty(3 * M + 2)
    EP = triton.next_power_of_2(E)
    BLOCK = max(16, min(128, 8192 // EP))
    schedule_kernel[(triton.cdiv(M, BLOCK),)](end_E, table, M, block, E=E, EP=EP, BLOCK=BLOCK)
    return table


def up(
    x_TD: Tensor, token_R: Tensor, w: Tensor, v: Tensor | None, b: Tensor | None, c: Tensor | None,
    scale_R: Tensor | None, table: Tensor, kind: str, save: bool = True, activate: bool = True,
    weight_R: Tensor | None = None, tile: Tile | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """(h_RF and, if gated, u_RF, if `save`; a_RF, if `activate`, times weight_R): see `rows.up_kernel`."""
    R, (_, D, width) = token_R.numel(), w.shape
    if tile is None and kind in specialized.KINDS and b is None and scale_R is None:
        special = specialized.tile_of("up", x_TD.device, x_TD.dtype, D, width)
        if special is not None:
            # the table's last number is that of real rows
            x = gather(x_TD, token_R, table[-1:]) if special.gathered else x_TD
            h, a = specialized.up(x, token_R, w, table, kind, save, activate, weight_R, special)
            return h, None, a
    name = "up" if v is None else "up_gated"
    tile = tile or choose(name, x_TD.device, x_TD.dtype, D, width)
    assert tile is not None
    use, M, BM = tma(x_TD.device), (table.numel() - 2) // 3, block_rows(x_TD.dtype)
    h = x_TD.new_empty(R, width) if save else None
    u = x_TD.new_empty(R, width) if save and v is not None else None
    a = x_TD.new_empty(R, width) if activate else None
    up_kernel[_grid(tile, M * triton.cdiv(width, tile.columns), x_TD.device)](
        x_TD, token_R, _weight(w, tile, use), _weight(v, tile, use), b, c, scale_R, weight_R, h, u, a, table, M, R,
        D=D, F=width, KIND=kind, FAST=fast(x_TD), PRECISION=precision(x_TD.dtype), GATED=v is not None,
        BIASED=b is not None, SCALED=scale_R is not None, TMA=use, BM=BM, FLATTEN=tile.flatten, PARTS=tile.parts,
        **_meta(tile),
    )  # fmt: skip
    return h, u, a


def up_backward(
    g_TD: Tensor, token_R: Tensor, w2: Tensor, b2: Tensor | None, weight_R: Tensor, h: Tensor, u: Tensor | None,
    table: Tensor, kind: str, g_RD: Tensor | None = None, tile: Tile | None = None, activate: bool = True,
    dh: Tensor | None = None, du: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:  # fmt: skip
    """(dh_RF, du_RF if gated, weight * a_RF if `activate`, the gradient of weight_R): see
    `rows.up_backward_kernel`. dh and du are new, or the tensors that are given, which may be h and u.
    """
    R, (_, width, D) = token_R.numel(), w2.shape
    if tile is None and kind in specialized.KINDS and b2 is None and g_RD is not None and not activate:
        special = specialized.tile_of("up_backward", g_TD.device, g_TD.dtype, D, width)
        if special is not None:
            dh = torch.empty_like(h) if dh is None else dh
            return dh, None, None, specialized.up_backward(g_RD, w2, weight_R, h, table, kind, dh, special)
    name = "up_backward" if u is None else "up_backward_gated"
    tile = tile or choose(name, g_TD.device, g_TD.dtype, D, width)
    assert tile is not None
    use, M, BM = tma(g_TD.device), (table.numel() - 2) // 3, block_rows(g_TD.dtype)
    dh = torch.empty_like(h) if dh is None else dh
    du = torch.empty_like(u) if du is None and u is not None else du
    a = torch.empty_like(h) if activate else None
    columns = triton.cdiv(width, tile.columns)
    # zeros: rows that were dropped are in no tile
    partial = torch.zeros(columns, R, dtype=torch.float32, device=h.device)
    gathered = use and g_RD is not None
    g_desc = _descriptor(g_RD, [BM, tile.depth], True) if gathered else None
    up_backward_kernel[_grid(tile, M * columns, h.device)](
        g_TD, g_desc, token_R, _weight(w2, tile, use, transposed=True), b2, weight_R, h, u, dh, du, a, partial,
        table, M, R, D=D, F=width, KIND=kind, FAST=fast(h), PRECISION=precision(h.dtype), GATED=u is not None,
        BIASED=b2 is not None, TMA=use, BM=BM, FLATTEN=tile.flatten, PARTS=tile.parts, EARLY=tile.early,
        GATHERED=gathered, **_meta(tile),
    )  # fmt: skip
    return dh, du, a, partial.sum(dim=0)


def rows(
    a: Tensor, w: Tensor, a2: Tensor | None, w2: Tensor | None, b: Tensor | None, end_E: Tensor, table: Tensor,
    transposed: bool, weight_R: Tensor | None = None, out: Tensor | None = None, tile: Tile | None = None,
) -> Tensor:  # fmt: skip
    """y_RN = a_RK w (+ a2 w2) + b (times weight_R), of each row's expert; w (E, K, N), `transposed` (E, N, K).

    It may take the memory of `out`, of at least its size.
    """
    R, K = a.shape
    N = w.shape[1] if transposed else w.shape[2]
    tile = tile or choose("down_backward" if transposed else "down", a.device, a.dtype, N, K)
    if tile is None and a2 is None and b is None:
        return F.grouped_mm(a, w.transpose(1, 2) if transposed else w, offs=end_E)
    tile = tile or Tile(256, 64, 8, 4, flatten=True)
    use, M, BM = tma(a.device), (table.numel() - 2) // 3, block_rows(a.dtype)
    y = _empty(a, R, N, out)
    block = [BM, tile.depth]
    store = use and tile.store
    rows_kernel[_grid(tile, M * triton.cdiv(N, tile.columns), a.device)](
        _descriptor(a, block, use), _descriptor(a2, block, use), _weight(w, tile, use, transposed),
        _weight(w2, tile, use, transposed), b, weight_R, y,
        _descriptor(y, [BM, tile.columns], True) if store else None,
        table, M, R, K=K, N=N, PRECISION=precision(a.dtype), TRANSPOSED=transposed, TWO=a2 is not None,
        BIASED=b is not None, TMA=use, BM=BM, FLATTEN=tile.flatten, TMA_STORE=store, **_meta(tile),
    )  # fmt: skip
    return y


def weights(
    x: Tensor, token_R: Tensor, scale_R: Tensor | None, y: Tensor, end_E: Tensor, gather_left: bool, biased: bool,
    x_R: Tensor | None = None, tile: Tile | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """(dw_EPQ, db_EQ if `biased`): see `weights.weights_kernel`; x (T, ·) is gathered, y (R, ·) is not.

    x_R are x's rows if they have been gathered already.
    """
    R, E = token_R.numel(), end_E.numel()
    P, Q = (x.shape[1], y.shape[1]) if gather_left else (y.shape[1], x.shape[1])
    tile = tile or choose("dw1" if gather_left else "dw2", x.device, x.dtype, x.shape[1], y.shape[1])
    if tile is None and scale_R is None and not biased:
        return by_grouped_mm(gather(x, token_R, end_E) if x_R is None else x_R, y, end_E, gather_left), None
    tile = tile or Tile(128, 64, 4, 3)
    use = tma(x.device)
    chunk, chunks, C = 0, None, 0
    if tile.chunks and not biased:
        chunk = triton.cdiv(triton.cdiv(R, tile.chunks), 128) * 128
        chunks = schedule(end_E, R, chunk)
        C = (chunks.numel() - 2) // 3
    out = x.new_empty(C or E, P, Q, dtype=torch.float32 if C else x.dtype)
    db = x.new_empty(E, Q) if biased else None
    block = [tile.depth, tile.columns if gather_left else tile.rows]
    meta = _meta(tile)
    meta["BQ"] = meta.pop("BN")
    weights_kernel[((C or E) * triton.cdiv(P, tile.rows) * triton.cdiv(Q, tile.columns),)](
        x, token_R, scale_R, _descriptor(y, block, use), out, db, end_E, chunks, C, chunk, R, E=E, P=P, Q=Q,
        GATHER_LEFT=gather_left, SCALED=scale_R is not None, BIASED=biased, PRECISION=precision(x.dtype), TMA=use,
        BP=tile.rows, SPLIT=C > 0, **meta,
    )  # fmt: skip
    if not C:
        return out, db
    dw = x.new_empty(E, P, Q)
    add_chunks_kernel[(E, triton.cdiv(P * Q, 2048))](
        out, dw, chunks, C, N=P * Q, CP=triton.next_power_of_2(C), BLOCK=2048
    )
    return dw, None


def both_weights(
    x: Tensor,
    token_R: Tensor,
    scale_R: Tensor | None,
    dh: Tensor,
    du: Tensor | None,
    end_E: Tensor,
    biased: bool,
    out: Tensor | None = None,
) -> tuple[tuple[Tensor, Tensor | None], tuple[Tensor | None, Tensor | None]]:
    """(dw1, db1) and, if gated, (dv1, dc1); where torch's product is the faster, x is gathered once for both (into
    `out`'s memory, if that is large enough).
    """
    tile = choose("dw1", x.device, x.dtype, x.shape[1], dh.shape[1])
    if tile is None and scale_R is None and not biased:
        x_R = gather(x, token_R, end_E, out)
        found = [None if y is None else by_grouped_mm(x_R, y, end_E, x_left=True) for y in (dh, du)]
        assert found[0] is not None
        return (found[0], None), (found[1], None)
    of_h = weights(x, token_R, scale_R, dh, end_E, gather_left=True, biased=biased)
    if du is None:
        return of_h, (None, None)
    return of_h, weights(x, token_R, scale_R, du, end_E, gather_left=True, biased=biased)


def _empty(like: Tensor, rows: int, columns: int, out: Tensor | None) -> Tensor:
    """A new tensor, in the memory of `out` where that is large enough."""
    if out is None or out.numel() < rows * columns:
        return like.new_empty(rows, columns)
    return out.view(-1)[: rows * columns].view(rows, columns)


def gather(x_TD: Tensor, token_R: Tensor, end_E: Tensor, out: Tensor | None = None) -> Tensor:
    """x_TD[token_R]; zeros for rows behind the last expert's. It may take the memory of `out`."""
    R, D = len(token_R), x_TD.shape[1]
    out = _empty(x_TD, R, D, out)
    BD = min(triton.next_power_of_2(D), 256)
    grid = (triton.cdiv(R, 8), triton.cdiv(D, BD))
    gather_kernel[grid](x_TD, token_R, end_E, out, R, D=D, E=len(end_E), BR=8, BD=BD)
    return out


def by_grouped_mm(x_R: Tensor, y: Tensor, end_E: Tensor, x_left: bool) -> Tensor:
    """A weight's gradient from rows that are gathered already."""
    return F.grouped_mm(x_R.t(), y, offs=end_E) if x_left else F.grouped_mm(y.t(), x_R, offs=end_E)


def combine(
    y: Tensor, weight_R: Tensor | None, row: Tensor, start: Tensor | None, end_E: Tensor, tokens: int
) -> Tensor:
    """out_TD: see `combine.combine_kernel`; row is row_TK, or with start_T1 the rows sorted by token."""
    D = y.shape[1]
    K = 0 if start is not None else row.shape[1]
    out = y.new_empty(tokens, D)
    BD = min(triton.next_power_of_2(D), 256 if K else 1024)
    BT = 8 if K else 1
    combine_kernel[(triton.cdiv(tokens, BT), triton.cdiv(D, BD))](
        y, weight_R, row, start, end_E, out, tokens, D=D, E=end_E.numel(), K=K, WEIGHTED=weight_R is not None,
        BT=BT, BD=BD,
    )  # fmt: skip
    return out
