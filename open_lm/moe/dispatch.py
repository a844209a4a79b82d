"""From tokens to rows and back: `dispatch` copies each token to its rows, `combine` adds the rows up again.

The two are transposes of each other, so each one's gradient is the other, and both directions only *gather*:
where every token has K rows, a token fetches them by `row_TK`. So there are no atomics, GPU runs repeat bit
by bit, and nothing accumulates in 16 bits. Without `row_TK` (tokens differ in rows): index_add.

Shapes: T tokens, D model width, R rows (assignments), K rows per token.
"""

from typing import Any

import torch
from torch import Tensor

from open_lm.moe.routing import Routing


def dispatch(x_TD: Tensor, routing: Routing) -> Tensor:
    """x_RD: the input of every row, x[token], times its input weight if there is one; dtype as x."""
    x_RD = _Dispatch.apply(x_TD, routing.token_R, routing.row_TK)
    if routing.input_weight_R is None:
        return x_RD
    return (x_RD * routing.input_weight_R[:, None]).to(x_RD.dtype)


def combine(y_RD: Tensor, routing: Routing) -> Tensor:
    """y_TD: for each token the sum of weight * y over its rows, added in float32, in y's dtype."""
    T = routing.logits_TE.shape[0]
    return _Combine.apply(y_RD, routing.weight_R, routing.token_R, routing.row_TK, T)


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, token_R: Tensor, row_TK: Tensor | None) -> Tensor:
        ctx.save_for_backward(token_R, row_TK)
        ctx.tokens = x_TD.shape[0]
        return x_TD[token_R]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor):
        (g_RD,) = gradients
        token_R, row_TK = ctx.saved_tensors
        return _sum_rows(g_RD, None, token_R, row_TK, ctx.tokens), None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y_RD: Tensor, weight_R: Tensor, token_R: Tensor, row_TK: Tensor | None, tokens: int
    ) -> Tensor:
        ctx.save_for_backward(y_RD, weight_R, token_R)
        return _sum_rows(y_RD, weight_R, token_R, row_TK, tokens)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor):
        (g_TD,) = gradients
        y_RD, weight_R, token_R = ctx.saved_tensors
        g_RD = g_TD[token_R]
        gradient_of_weight_R = (y_RD * g_RD).sum(dim=-1, dtype=weight_R.dtype)
        return g_RD.mul_(weight_R[:, None]), gradient_of_weight_R, None, None, None


def _sum_rows(v_RD: Tensor, weight_R: Tensor | None, token_R: Tensor, row_TK: Tensor | None, tokens: int):
    """Per token the (weighted) sum of its rows, (T, D), in v's dtype; the sum itself is in float32 or wider."""
    if row_TK is not None:
        v_TKD = v_RD[row_TK]
        if weight_R is not None:
            # In place, a product of float32 and 16 bits is rounded once and needs no float32 copy of all rows.
            v_TKD.mul_(weight_R[row_TK, None])
        # Inside a sum torch adds 16-bit numbers in float32.
        return v_TKD.sum(dim=1)
    weighted_RD = v_RD if weight_R is None else v_RD * weight_R[:, None]
    wide = torch.promote_types(v_RD.dtype, torch.float32)
    zeros_TD = torch.zeros(tokens, v_RD.shape[1], dtype=wide, device=v_RD.device)
    out_TD = zeros_TD.index_add(0, token_R, weighted_RD.to(wide))
    # Not .to() alone: where that changes nothing, torch 2.11 compiles this to a gradient of zero.
    return out_TD if wide == v_RD.dtype else out_TD.to(v_RD.dtype)
