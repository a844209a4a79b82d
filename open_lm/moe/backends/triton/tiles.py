"""Which tile of which expert a program of a kernel computes: a table made on the device, no host sync.

Shapes: E experts, R rows, M tiles of BM rows, at most ceil(R / BM) + E.
"""

# Kernels are in Triton's language, which only looks like Python.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportCallIssue=false, reportReturnType=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false, reportIndexIssue=false

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["M", "BM"])
def schedule_kernel(end_ptr, tile_ptr, M, BM, E: tl.constexpr, EP: tl.constexpr, BLOCK: tl.constexpr):
    """tile: for each of M tiles its expert, its first row, the end of the rows that it may write; then the number
    of real tiles, then that of real rows.

    The last expert's last tile may write to its own end: so a reader of whole blocks finds zeros behind the last
    row, not what was in memory before.
    """
    e = tl.arange(0, EP)
    end_E = tl.load(end_ptr + e, mask=e < E, other=0)
    start_E = tl.load(end_ptr + e - 1, mask=(e > 0) & (e < E), other=0)
    total = tl.max(end_E, 0)
    tiles_E = tl.where(e < E, (end_E - start_E + BM - 1) // BM, 0)
    until_E = tl.cumsum(tiles_E, 0)
    m = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    expert = tl.sum(((until_E[None, :] <= m[:, None]) & (e < E)[None, :]).to(tl.int32), 1)
    here = e[None, :] == expert[:, None]
    first = tl.sum(tl.where(here, (start_E - (until_E - tiles_E) * BM)[None, :], 0), 1) + m * BM
    end = tl.sum(tl.where(here, end_E[None, :], 0), 1)
    end = tl.where(end == total, first + BM, end)
    tl.store(tile_ptr + m, expert, mask=m < M)
    tl.store(tile_ptr + M + m, first, mask=m < M)
    tl.store(tile_ptr + 2 * M + m, end, mask=m < M)
    if tl.program_id(0) == 0:
        tl.store(tile_ptr + 3 * M, tl.sum(tiles_E, 0))
        tl.store(tile_ptr + 3 * M + 1, total)


@triton.jit
def place(tile, tiles_m, NT: tl.constexpr, GROUP: tl.constexpr):
    """(m, n) of a tile: GROUP tiles of rows take turns before the next column, so that both stay in the L2."""
    first = tile // (GROUP * NT) * GROUP
    size = tl.maximum(tl.minimum(tiles_m - first, GROUP), 1)  # 1: of a tile behind the last
    inside = tile % (GROUP * NT)
    return first + inside % size, inside // size


@triton.jit
def multiply_tile(
    acc,
    a,
    a_rows,
    row0,
    w,
    e,
    n0,
    K: tl.constexpr,
    N: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
    A_TMA: tl.constexpr,
    W_TMA: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """acc (BM, BN) += a's rows times w[e][:, n0:n0+BN]; w is (E, K, N), TRANSPOSED (E, N, K).

    With A_TMA `a` is a descriptor and its rows are row0…; else a pointer, and they are a_rows (int64), any rows.
    """
    k = tl.arange(0, BK)
    n = n0 + tl.arange(0, BN)
    if not A_TMA:
        a_ptrs = a + a_rows[:, None] * K + k[None, :]
    if not W_TMA:
        if TRANSPOSED:
            w_ptrs = w + e.to(tl.int64) * K * N + n[None, :].to(tl.int64) * K + k[:, None]
        else:
            w_ptrs = w + e.to(tl.int64) * K * N + k[:, None].to(tl.int64) * N + n[None, :]
    for k0 in range(0, K, BK):
        if A_TMA:
            a_tile = a.load([row0, k0])
        elif K % BK == 0:
            a_tile = tl.load(a_ptrs + k0)
        else:
            a_tile = tl.load(a_ptrs + k0, mask=(k0 + k)[None, :] < K, other=0.0)
        if W_TMA:
            if TRANSPOSED:  # noqa: SIM108
                w_tile = w.load([e, n0, k0]).reshape(BN, BK).T
            else:
                w_tile = w.load([e, k0, n0]).reshape(BK, BN)
        else:
            inside = ((k0 + k)[:, None] < K) & (n[None, :] < N)
            w_tile = tl.load(w_ptrs + k0 * (1 if TRANSPOSED else N), mask=inside, other=0.0)
        acc = tl.dot(a_tile, w_tile, acc, input_precision=PRECISION)
    return acc
