"""The experts' forward and backward in terms of the operators of `ops`.

Shapes: T tokens, D model width, E experts, F expert width, R rows, K rows per token.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from open_lm.moe.backends.triton import ops
from open_lm.moe.backends.triton.table import block_rows


class Rows(NamedTuple):
    """A Routing's indices in 32 bits."""

    token_R: Tensor
    end_E: Tensor
    """Where each expert's rows end; what follows the last one was dropped."""
    row: Tensor
    """Each token's rows: (T, K), or all of them (R,), sorted by token."""
    start_T1: Tensor | None
    """Where in `row` those of each token start; None: every token has K."""


class Experts(torch.autograd.Function):
    """y_TD of x_TD, the weights of an ExpertMLP (w1, v1, w2, b1, c1, b2), each row's weight and its input's."""

    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, w1: Tensor, v1: Tensor | None, w2: Tensor, b1: Tensor | None, c1: Tensor | None,
        b2: Tensor | None, weight_R: Tensor, scale_R: Tensor | None, token_R: Tensor, end_E: Tensor, row: Tensor,
        start_T1: Tensor | None, kind: str, save: bool,
    ) -> Tensor:  # fmt: skip
        table = ops.schedule(end_E, token_R.shape[0], block_rows(x_TD.dtype))
        h, u, a = ops.up(x_TD, token_R, w1, v1, b1, c1, scale_R, table, kind, save, True)
        y_RD = ops.rows(a, w2, None, None, b2, end_E, table, False)
        y_TD = ops.combine(y_RD, weight_R, row, start_T1, end_E, x_TD.shape[0])
        ctx.kind = kind
        ctx.save_for_backward(
            x_TD, w1, v1, w2, b1, c1, b2, weight_R, scale_R, token_R, end_E, row, start_T1, table, h, u
        )
        return y_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor):
        g_TD = gradients[0].contiguous()
        x, w1, v1, w2, b1, c1, b2, weight_R, scale_R, token_R, end_E, row, start_T1, table, h, u = ctx.saved_tensors
        gated = v1 is not None
        dh, du, a, dweight_R = ops.up_backward(
            g_TD, token_R, w2, b2, weight_R, h, u if gated else None, table, ctx.kind
        )
        # db2 is the sum of weight * g, dw2 that of weight * a ⊗ g
        dw2, db2 = ops.weights(
            g_TD, token_R, None if b2 is None else weight_R, a, end_E, False, b2 is not None
        )
        del a
        dx_RD = ops.rows(dh, w1, du if gated else None, v1, None, end_E, table, True)
        dx_TD = ops.combine(dx_RD, scale_R, row, start_T1, end_E, x.shape[0])
        dscale_R = None
        if scale_R is not None:
            real_R = torch.arange(len(token_R), device=x.device) < end_E[-1]
            dscale_R = torch.where(real_R, (x[token_R] * dx_RD).sum(dim=1, dtype=torch.float32), 0.0)
        del dx_RD
        dw1, db1 = ops.weights(x, token_R, scale_R, dh, end_E, True, b1 is not None)
        dv1 = dc1 = None
        if gated:
            dv1, dc1 = ops.weights(x, token_R, scale_R, du, end_E, True, c1 is not None)
        return (
            dx_TD, dw1, dv1, dw2, None if b1 is None else db1, None if c1 is None else dc1,
            None if b2 is None else db2, dweight_R, dscale_R, None, None, None, None, None, None,
        )  # fmt: skip


def rows_of(token_R: Tensor, count_E: Tensor, row_TK: Tensor | None, tokens: int) -> Rows:
    """The indices of a Routing."""
    end_E = count_E.cumsum(0, dtype=torch.int32)
    token_R = token_R.int()
    if row_TK is not None:
        return Rows(token_R, end_E, row_TK.int(), None)
    sorted_R, order_R = token_R.sort(stable=True)
    tokens_T1 = torch.arange(tokens + 1, device=token_R.device, dtype=torch.int32)
    start_T1 = torch.searchsorted(sorted_R, tokens_T1, out_int32=True)
    return Rows(token_R, end_E, order_R.int(), start_T1)
