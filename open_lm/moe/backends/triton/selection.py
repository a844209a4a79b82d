"""The K largest of a token's E scores, in one kernel: torch's topk sorts, for many times as long.

Shapes: T tokens, E experts, K choices per token.
"""

# Kernels are in Triton's language, which only looks like Python.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportCallIssue=false, reportReturnType=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false, reportIndexIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit(do_not_specialize=["T"])
def top_k_kernel(key_ptr, out_ptr, T, E: tl.constexpr, EP: tl.constexpr, K: tl.constexpr, BT: tl.constexpr):
    """out_TK: the experts of the K largest keys, the largest first, of equal ones the first; NaN is the largest."""
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    e = tl.arange(0, EP)
    there = (t < T)[:, None] & (e < E)[None, :]
    key = tl.load(key_ptr + t[:, None].to(tl.int64) * E + e[None, :], mask=there, other=0.0)
    # as integers in the same order, so that no score is as small as what is taken already; +0 and -0 are equal
    key = tl.where(key == 0, 0.0, key)
    bits = key.to(tl.int32, bitcast=True)
    order = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    order = tl.where(key != key, 0x7FFFFFFF, order)
    order = tl.where(there, order, -0x80000000)
    for k in tl.static_range(K):
        best = tl.argmax(order, 1, tie_break_left=True)
        tl.store(out_ptr + t.to(tl.int64) * K + k, best.to(tl.int64), mask=t < T)
        order = tl.where(e[None, :] == best[:, None], -0x80000000, order)


@torch.library.custom_op("open_lm::moe_top_k", mutates_args=())
def top_k(key_TE: Tensor, k: int) -> Tensor:
    """int64 (T, k): as key_TE.topk(k).indices of float32 keys, of equal ones the first."""
    T, E = key_TE.shape
    out = torch.empty(T, k, dtype=torch.int64, device=key_TE.device)
    EP = triton.next_power_of_2(E)
    BT = max(1, 2048 // EP)
    if T:
        top_k_kernel[(triton.cdiv(T, BT),)](key_TE.contiguous(), out, T, E=E, EP=EP, K=k, BT=BT)
    return out


@top_k.register_fake
def _(key_TE, k):
    return key_TE.new_empty((key_TE.shape[0], k), dtype=torch.int64)
