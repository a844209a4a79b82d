"""Rows sorted by expert, by counting, in three kernels: within an expert they stay in their order.

Shapes: T tokens, K choices per token, R = T * K rows, E experts, B blocks of rows.
"""

# Kernels are in Triton's language, which only looks like Python.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportCallIssue=false, reportReturnType=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false, reportIndexIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 256


@triton.jit(do_not_specialize=["R"])
def count_kernel(expert_ptr, rank_ptr, count_ptr, R, E: tl.constexpr, BLOCK: tl.constexpr):
    """rank_R: how many rows of its block and its expert are before a row; count_BE, zeros before: each block's."""
    i = tl.arange(0, BLOCK)
    row = tl.program_id(0) * BLOCK + i
    e = tl.load(expert_ptr + row, mask=row < R, other=-1).to(tl.int32)
    rank, later = tl.zeros((BLOCK,), tl.int32), tl.zeros((BLOCK,), tl.int32)
    for j0 in range(0, BLOCK, 16):
        j = j0 + tl.arange(0, 16)
        other = tl.program_id(0) * BLOCK + j
        same = e[:, None] == tl.load(expert_ptr + other, mask=other < R, other=-1).to(tl.int32)[None, :]
        rank += tl.sum((same & (j[None, :] < i[:, None])).to(tl.int32), 1)
        later += tl.sum((same & (j[None, :] > i[:, None])).to(tl.int32), 1)
    tl.store(rank_ptr + row, rank, mask=row < R)
    tl.store(count_ptr + tl.program_id(0) * E + e, rank + 1, mask=(row < R) & (later == 0))


@triton.jit(do_not_specialize=["B"])
def offset_kernel(count_ptr, total_ptr, B, E: tl.constexpr, BP: tl.constexpr):
    """count_BE becomes the rows of an expert in the blocks before; total_E, int64: in all."""
    e = tl.program_id(0)
    b = tl.arange(0, BP)
    count = tl.load(count_ptr + b * E + e, mask=b < B, other=0)
    tl.store(count_ptr + b * E + e, tl.cumsum(count, 0) - count, mask=b < B)
    tl.store(total_ptr + e, tl.sum(count, 0).to(tl.int64))


@triton.jit(do_not_specialize=["R"])
def place_kernel(
    expert_ptr, rank_ptr, offset_ptr, total_ptr, token_ptr, order_ptr, row_ptr, R,
    K: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Each row's place among all, row_TK; there its token and its number before, order_R."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    experts = tl.arange(0, EP)
    total_E = tl.load(total_ptr + experts, mask=experts < E, other=0).to(tl.int32)
    e = tl.load(expert_ptr + row, mask=row < R, other=0).to(tl.int32)
    start = tl.gather(tl.cumsum(total_E, 0) - total_E, e, 0)
    place = start + tl.load(offset_ptr + tl.program_id(0) * E + e, mask=row < R, other=0)
    place += tl.load(rank_ptr + row, mask=row < R, other=0)
    tl.store(row_ptr + row, place.to(tl.int64), mask=row < R)
    tl.store(order_ptr + place, row.to(tl.int64), mask=row < R)
    tl.store(token_ptr + place, (row // K).to(tl.int64), mask=row < R)


@torch.library.custom_op("open_lm::moe_sort", mutates_args=())
def sort_rows(expert_TK: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(token_R, order_R, row_TK, count_E), int64, of int64 expert_TK: a stable sort of its rows by expert."""
    T, K = expert_TK.shape
    R, expert_TK = T * K, expert_TK.contiguous()
    token_R, order_R = expert_TK.new_empty(R), expert_TK.new_empty(R)
    row_TK, count_E = torch.empty_like(expert_TK), expert_TK.new_zeros(experts)
    if not R:
        return token_R, order_R, row_TK, count_E
    blocks = triton.cdiv(R, BLOCK)
    rank_R = torch.empty(R, dtype=torch.int32, device=expert_TK.device)
    count_BE = torch.zeros(blocks, experts, dtype=torch.int32, device=expert_TK.device)
    count_kernel[(blocks,)](expert_TK, rank_R, count_BE, R, E=experts, BLOCK=BLOCK)
    offset_kernel[(experts,)](count_BE, count_E, blocks, E=experts, BP=triton.next_power_of_2(blocks))
    place_kernel[(blocks,)](
        expert_TK, rank_R, count_BE, count_E, token_R, order_R, row_TK, R, K=K, E=experts,
        EP=triton.next_power_of_2(experts), BLOCK=BLOCK,
    )  # fmt: skip
    return token_R, order_R, row_TK, count_E


@sort_rows.register_fake
def _(expert_TK, experts):
    R = expert_TK.shape[0] * expert_TK.shape[1]
    return (
        expert_TK.new_empty(R),
        expert_TK.new_empty(R),
        expert_TK.new_empty(expert_TK.shape),
        expert_TK.new_empty(experts),
    )
