"""Gradients of the experts' weights: products over each expert's rows, one side gathered while it is read.

Shapes: T tokens, E experts, R rows; P and Q the two widths of a weight.
"""

# Kernels are in Triton's language, which only looks like Python.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportCallIssue=false, reportReturnType=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false, reportIndexIssue=false

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["C", "chunk", "R"])
def weights_kernel(
    x_ptr, token_ptr, scale_ptr, y, dw_ptr, db_ptr, end_ptr, chunk_ptr, C, chunk, R,
    E: tl.constexpr, P: tl.constexpr, Q: tl.constexpr, GATHER_LEFT: tl.constexpr, SCALED: tl.constexpr,
    BIASED: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr,
    BP: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """dw_EPQ: for each expert the sum over its rows of left_RP ⊗ right_RQ; db: of the right side alone.

    GATHER_LEFT: left is x_TP[token], right is y_RQ; else left is y_RP and right is x_TQ[token]. SCALED: the
    gathered side's rows are multiplied by scale_R, in db alone where it is the right one. SPLIT: not for each
    expert but for each of C chunks of `chunk` rows (a table of `tiles.schedule_kernel`): so several programs share
    an expert of many rows.
    """
    PT: tl.constexpr = (P + BP - 1) // BP
    QT: tl.constexpr = (Q + BQ - 1) // BQ
    tile = tl.program_id(0)
    e = tile // (PT * QT)
    inside = tile % (PT * QT)
    first = inside // (GROUP * QT) * GROUP
    size = tl.minimum(PT - first, GROUP)
    pt = first + inside % (GROUP * QT) % size
    qt = inside % (GROUP * QT) // size
    if SPLIT:
        there = e < tl.load(chunk_ptr + 3 * C)
        start = tl.load(chunk_ptr + C + e, mask=there, other=0)
        of_expert = tl.load(end_ptr + tl.load(chunk_ptr + e, mask=there, other=0))
        end = tl.where(there, tl.minimum(of_expert, start + chunk), start)
    else:
        start = tl.load(end_ptr + e - 1, mask=e > 0, other=0)
        end = tl.load(end_ptr + e)
    p = pt * BP + tl.arange(0, BP)
    q = qt * BQ + tl.arange(0, BQ)
    acc = tl.zeros((BP, BQ), tl.float32)
    db = tl.zeros((BQ,), tl.float32)
    X: tl.constexpr = P if GATHER_LEFT else Q
    Y: tl.constexpr = Q if GATHER_LEFT else P
    BX: tl.constexpr = BP if GATHER_LEFT else BQ
    x_col = p if GATHER_LEFT else q
    y_col = q if GATHER_LEFT else p
    y0 = (qt * BQ) if GATHER_LEFT else (pt * BP)
    for row0 in tl.range(start, end, BK):
        row = row0 + tl.arange(0, BK)
        real = row < end
        token = tl.load(token_ptr + row, mask=real, other=0).to(tl.int64)
        x_mask = real[:, None]
        if X % BX != 0:
            x_mask = x_mask & (x_col < X)[None, :]
        x = tl.load(x_ptr + token[:, None] * X + x_col[None, :], mask=x_mask, other=0.0)
        if TMA:
            # what follows the expert's rows is multiplied by zeros
            side = y.load([row0, y0])
        else:
            y_mask = real[:, None] & (y_col < Y)[None, :]
            side = tl.load(y + row.to(tl.int64)[:, None] * Y + y_col[None, :], mask=y_mask, other=0.0)
        if SCALED:
            scale = tl.load(scale_ptr + row, mask=real, other=0.0)
            if GATHER_LEFT:
                x = (x * scale[:, None]).to(x.dtype)
        if BIASED:
            if GATHER_LEFT:
                db += tl.sum(tl.where(real[:, None], side, 0.0).to(tl.float32), 0)
            elif SCALED:
                db += tl.sum(x.to(tl.float32) * scale[:, None], 0)
        if GATHER_LEFT:
            acc = tl.dot(x.T, side, acc, input_precision=PRECISION)
        else:
            acc = tl.dot(side.T, x, acc, input_precision=PRECISION)
    rows = P
    if SPLIT:
        rows = tl.where(there, P, 0)  # what is behind the last chunk is read by nobody
    mask = (p < rows)[:, None] & (q < Q)[None, :]
    dw_ptrs = dw_ptr + e.to(tl.int64) * P * Q + p[:, None].to(tl.int64) * Q + q[None, :]
    tl.store(dw_ptrs, acc.to(dw_ptr.dtype.element_ty), mask=mask)
    if BIASED and pt == 0:
        tl.store(db_ptr + e.to(tl.int64) * Q + q, db.to(db_ptr.dtype.element_ty), mask=q < Q)


@triton.jit(do_not_specialize=["C"])
def add_chunks_kernel(part_ptr, dw_ptr, chunk_ptr, C, N: tl.constexpr, CP: tl.constexpr, BLOCK: tl.constexpr):
    """dw_EN: for each expert the sum of its chunks' part_CN."""
    e = tl.program_id(0)
    c = tl.arange(0, CP)
    there = c < tl.load(chunk_ptr + 3 * C)
    expert_C = tl.load(chunk_ptr + c, mask=there, other=-1)
    first = tl.sum((there & (expert_C < e)).to(tl.int32), 0)
    count = tl.sum((expert_C == e).to(tl.int32), 0)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    for i in range(first, first + count):
        acc += tl.load(part_ptr + tl.cast(i, tl.int64) * N + n, mask=n < N, other=0.0)
    tl.store(dw_ptr + tl.cast(e, tl.int64) * N + n, acc.to(dw_ptr.dtype.element_ty), mask=n < N)
