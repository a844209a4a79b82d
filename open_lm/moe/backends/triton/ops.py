"""The kernels as operators of torch: opaque to its compiler, which sees shapes alone. None of them is differentiable;
`autograd.Experts` is.

What is absent in a result (the second half of an ungated expert, …) is an empty tensor.
"""

import torch
from torch import Tensor

from open_lm.moe.backends.triton import launch


def _or_empty(x: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if x is None else x


@torch.library.custom_op("open_lm::moe_schedule", mutates_args=())
def schedule(end_E: Tensor, rows: int, block: int) -> Tensor:
    return launch.schedule(end_E, rows, block)


@schedule.register_fake
def _(end_E, rows, block):
    return end_E.new_empty(3 * ((rows + block - 1) // block + end_E.shape[0]) + 2)


@torch.library.custom_op("open_lm::moe_up", mutates_args=())
def up(
    x_TD: Tensor, token_R: Tensor, w: Tensor, v: Tensor | None, b: Tensor | None, c: Tensor | None,
    scale_R: Tensor | None, table: Tensor, kind: str, save: bool, keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    h, u, a = launch.up(x_TD, token_R, w, v, b, c, scale_R, table, kind, save=save, keep=keep)
    return _or_empty(h, x_TD), _or_empty(u, x_TD), _or_empty(a, x_TD)


@up.register_fake
def _(x_TD, token_R, w, v, b, c, scale_R, table, kind, save, keep):
    shape = (token_R.shape[0], w.shape[2])
    there = save, save and v is not None, keep
    return tuple(x_TD.new_empty(shape if is_there else 0) for is_there in there)


@torch.library.custom_op("open_lm::moe_up_backward", mutates_args=())
def up_backward(
    g_TD: Tensor, token_R: Tensor, w2: Tensor, b2: Tensor | None, weight_R: Tensor, h: Tensor, u: Tensor | None,
    table: Tensor, kind: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dh, du, a, dweight_R = launch.up_backward(g_TD, token_R, w2, b2, weight_R, h, u, table, kind)
    return dh, _or_empty(du, g_TD), a, dweight_R


@up_backward.register_fake
def _(g_TD, token_R, w2, b2, weight_R, h, u, table, kind):
    du = g_TD.new_empty(0 if u is None else h.shape)
    return torch.empty_like(h), du, torch.empty_like(h), torch.empty_like(weight_R)


@torch.library.custom_op("open_lm::moe_rows", mutates_args=())
def rows(
    a: Tensor, w: Tensor, a2: Tensor | None, w2: Tensor | None, b: Tensor | None, end_E: Tensor, table: Tensor,
    transposed: bool,
) -> Tensor:  # fmt: skip
    return launch.rows(a, w, a2, w2, b, end_E, table, transposed)


@rows.register_fake
def _(a, w, a2, w2, b, end_E, table, transposed):
    return a.new_empty(a.shape[0], w.shape[1] if transposed else w.shape[2])


@torch.library.custom_op("open_lm::moe_weights", mutates_args=())
def weights(
    x: Tensor, token_R: Tensor, scale_R: Tensor | None, y: Tensor, end_E: Tensor, gather_left: bool, biased: bool
) -> tuple[Tensor, Tensor]:
    dw, db = launch.weights(x, token_R, scale_R, y, end_E, gather_left, biased)
    return dw, _or_empty(db, x)


@weights.register_fake
def _(x, token_R, scale_R, y, end_E, gather_left, biased):
    E, (P, Q) = end_E.shape[0], (x.shape[1], y.shape[1]) if gather_left else (y.shape[1], x.shape[1])
    return x.new_empty(E, P, Q), x.new_empty((E, Q) if biased else 0)


@torch.library.custom_op("open_lm::moe_combine", mutates_args=())
def combine(
    y: Tensor, weight_R: Tensor | None, row: Tensor, start: Tensor | None, end_E: Tensor, tokens: int
) -> Tensor:
    return launch.combine(y, weight_R, row, start, end_E, tokens)


@combine.register_fake
def _(y, weight_R, row, start, end_E, tokens):
    return y.new_empty(tokens, y.shape[1])
