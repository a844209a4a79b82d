"""The sum of each token's rows: gathered, added in float32, no atomics.

Shapes: T tokens, D model width, R rows, K rows per token.
"""

# Kernels are in Triton's language, which only looks like Python.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportCallIssue=false, reportReturnType=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false, reportIndexIssue=false

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["T"])
def combine_kernel(
    y_ptr, weight_ptr, row_ptr, start_ptr, end_ptr, out_ptr, T,
    D: tl.constexpr, E: tl.constexpr, K: tl.constexpr, WEIGHTED: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """out_TD: for each token the sum of (weight *) y over its rows.

    Token t's rows are row[t * K:t * K + K], or with K = 0 (BT = 1) row[start[t]:start[t + 1]]. Rows behind the
    last expert's are dropped ones: they count as zeros and are not read.
    """
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    total = tl.load(end_ptr + E - 1)
    acc = tl.zeros((BT, BD), tl.float32)
    if K > 0:
        for k in tl.static_range(K):
            row = tl.load(row_ptr + t.to(tl.int64) * K + k, mask=t < T, other=0).to(tl.int64)
            there = (t < T) & (row < total)
            y = tl.load(
                y_ptr + row[:, None] * D + d[None, :], mask=there[:, None] & (d < D)[None, :], other=0.0
            ).to(tl.float32)
            if WEIGHTED:
                y *= tl.load(weight_ptr + row, mask=there, other=0.0)[:, None]
            acc += y
    else:
        start = tl.load(start_ptr + tl.program_id(0))
        end = tl.load(start_ptr + tl.program_id(0) + 1)
        for i in range(start, end):
            row = tl.load(row_ptr + i + tl.zeros((BT,), tl.int32)).to(tl.int64)
            there = row < total
            y = tl.load(
                y_ptr + row[:, None] * D + d[None, :], mask=there[:, None] & (d < D)[None, :], other=0.0
            ).to(tl.float32)
            if WEIGHTED:
                y *= tl.load(weight_ptr + row, mask=there, other=0.0)[:, None]
            acc += y
    tl.store(
        out_ptr + t.to(tl.int64)[:, None] * D + d[None, :],
        acc.to(out_ptr.dtype.element_ty),
        mask=(t < T)[:, None] & (d < D)[None, :],
    )


@triton.jit(do_not_specialize=["R"])
def gather_kernel(
    x_ptr,
    token_ptr,
    end_ptr,
    out_ptr,
    R,
    D: tl.constexpr,
    E: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
):
    """out_RD = x[token]; zeros for rows behind the last expert's."""
    row = tl.program_id(0) * BR + tl.arange(0, BR)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    real = row < tl.minimum(tl.load(end_ptr + E - 1), R)
    token = tl.load(token_ptr + row, mask=real, other=0).to(tl.int64)
    x = tl.load(x_ptr + token[:, None] * D + d[None, :], mask=real[:, None] & (d < D)[None, :], other=0.0)
    tl.store(
        out_ptr + row.to(tl.int64)[:, None] * D + d[None, :], x, mask=(row < R)[:, None] & (d < D)[None, :]
    )
