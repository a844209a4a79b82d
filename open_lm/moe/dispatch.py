"""From tokens to rows and back: `dispatch` copies each token to its rows, `combine` adds the rows up again.

The two are transposes of each other, so each one's gradient is the other, and both directions only *gather*:
where every token has K rows, a token fetches them by `row_TK`. So there are no atomics, GPU runs repeat bit
by bit, and nothing accumulates in 16 bits. Without `row_TK` (tokens differ in rows): index_add.

Under torch.func.vmap the N samples are one batch: sample n's tokens and rows follow those of the samples before.

Shapes: T tokens, D model width, R rows (assignments), K rows per token, N samples of a vmap.
"""

from typing import Any

import torch
from torch import Tensor

from open_lm.moe.routing import Routing


def dispatch(x_TD: Tensor, routing: Routing) -> Tensor:
    """x_RD: the input of every row, x[token], times its input weight if there is one; dtype as x."""
    return weigh_inputs(_Dispatch.apply(x_TD, routing.token_R, routing.row_TK), routing)


def weigh_inputs(x_RD: Tensor, routing: Routing) -> Tensor:
    """x_RD times each row's input weight, if there is one, in x's dtype."""
    if routing.input_weight_R is None:
        return x_RD
    return (x_RD * routing.input_weight_R[:, None]).to(x_RD.dtype)


def combine(y_RD: Tensor, routing: Routing) -> Tensor:
    """y_TD: for each token the sum of weight * y over its rows, added in float32, in y's dtype."""
    T = routing.logits_TE.shape[0]
    return _Combine.apply(y_RD, routing.weight_R, routing.token_R, routing.row_TK, T)


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(x_TD: Tensor, token_R: Tensor, row_TK: Tensor | None) -> Tensor:
        return x_TD[token_R]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        x_TD, token_R, row_TK = inputs
        ctx.save_for_backward(token_R, row_TK)
        ctx.tokens = x_TD.shape[0]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor):
        (g_RD,) = gradients
        token_R, row_TK = ctx.saved_tensors
        return _Combine.apply(g_RD, None, token_R, row_TK, ctx.tokens), None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple, x: Tensor, token: Tensor, row: Tensor | None):
        in_x, in_token, in_row = in_dims
        x_NTD, token_NR = samples_first(x, in_x, info), samples_first(token, in_token, info)
        row_TK = None if row is None else _fold(samples_first(row, in_row, info), token_NR.shape[1])
        x_RD = _Dispatch.apply(x_NTD.flatten(0, 1), _fold(token_NR, x_NTD.shape[1]), row_TK)
        return x_RD.unflatten(0, token_NR.shape), 0


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(
        y_RD: Tensor, weight_R: Tensor | None, token_R: Tensor, row_TK: Tensor | None, tokens: int
    ) -> Tensor:
        return _sum_rows(y_RD, weight_R, token_R, row_TK, tokens)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        y_RD, weight_R, token_R, row_TK, _ = inputs
        # without a weight it is linear in y
        ctx.save_for_backward(None if weight_R is None else y_RD, weight_R, token_R, row_TK)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor):
        (g_TD,) = gradients
        y_RD, weight_R, token_R, row_TK = ctx.saved_tensors
        # torch.func and second derivatives, which alone need a gradient here, do not allow what is in place
        differentiated = torch.is_grad_enabled()
        g_RD = _Dispatch.apply(g_TD, token_R, row_TK) if differentiated else g_TD[token_R]
        if weight_R is None:
            return g_RD, None, None, None, None
        gradient_of_weight_R = (y_RD * g_RD).sum(dim=-1, dtype=weight_R.dtype)
        if differentiated:
            return (g_RD * weight_R[:, None]).to(g_RD.dtype), gradient_of_weight_R, None, None, None
        return g_RD.mul_(weight_R[:, None]), gradient_of_weight_R, None, None, None

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple,
        y: Tensor,
        weight: Tensor | None,
        token: Tensor,
        row: Tensor | None,
        tokens: int,
    ):
        in_y, in_weight, in_token, in_row, _ = in_dims
        y_NRD, token_NR = samples_first(y, in_y, info), samples_first(token, in_token, info)
        weight_R = None if weight is None else samples_first(weight, in_weight, info).flatten()
        row_TK = None if row is None else _fold(samples_first(row, in_row, info), token_NR.shape[1])
        N = info.batch_size
        y_TD = _Combine.apply(y_NRD.flatten(0, 1), weight_R, _fold(token_NR, tokens), row_TK, N * tokens)
        return y_TD.unflatten(0, (N, tokens)), 0


def samples_first(tensor: Tensor, dim: int | None, info: Any) -> Tensor:
    """`tensor` with a vmap's axis of samples first, repeated if it has none."""
    return tensor.expand(info.batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def _fold(index: Tensor, size: int) -> Tensor:
    """Indices (N, R, …) into N samples of `size` each → (N * R, …) into all of them, one after the other."""
    first_N = size * torch.arange(len(index), device=index.device)
    return (index + first_N.view(-1, *[1] * (index.ndim - 1))).flatten(0, 1)


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
