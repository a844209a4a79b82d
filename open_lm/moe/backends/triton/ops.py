"""The experts' forward and backward as two operators of torch: opaque to its compiler, which sees shapes alone.

They are not differentiable themselves; `Experts` is. What is absent in a result (the second half of an ungated
expert, a bias's gradient) is an empty tensor.

Gradients in the memory of what was saved (`Plan.in_place`): backward's schema says that it mutates nothing, for
torch's compiler copies a saved tensor before an operator that says it does. What makes that safe:
- Nobody else sees h, u and a: each forward call makes its own. A compiler which merges equal calls would share
  them, so each call is given an `aten.empty`, which none merges.
- In eager mode a graph that is retained is not consumed. A compiled graph cannot be told apart, but torch refuses
  to retain it (donated buffers), and where that is switched off the version counter, which the operator counts
  up, makes the second backward an error.

Shapes: T tokens, D model width, E experts, F expert width, R rows, K rows per token.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from open_lm.moe.backends.triton import launch
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


def rows_of(token_R: Tensor, count_E: Tensor, row_TK: Tensor | None, tokens: int) -> Rows:
    """The indices of a Routing."""
    end_E = count_E.cumsum(0, dtype=torch.int32)
    token_R = token_R.int().contiguous()
    if row_TK is not None:
        return Rows(token_R, end_E, row_TK.int().contiguous(), None)
    sorted_R, order_R = token_R.sort(stable=True)
    tokens_T1 = torch.arange(tokens + 1, device=token_R.device, dtype=torch.int32)
    start_T1 = torch.searchsorted(sorted_R, tokens_T1, out_int32=True)
    return Rows(token_R, end_E, order_R.int(), start_T1)


class Plan(NamedTuple):
    """What forward saves for backward, and what backward may do with it."""

    pre_activations: bool
    activation: bool
    in_place: bool


class Experts(torch.autograd.Function):
    """y_TD of x_TD, the weights of an ExpertMLP (w1, v1, w2, b1, c1, b2), each row's weight and its input's."""

    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, w1: Tensor, v1: Tensor | None, w2: Tensor, b1: Tensor | None, c1: Tensor | None,
        b2: Tensor | None, weight_R: Tensor, scale_R: Tensor | None, token_R: Tensor, end_E: Tensor, row: Tensor,
        start_T1: Tensor | None, kind: str, plan: Plan,
    ) -> Tensor:  # fmt: skip
        inputs = (x_TD, w1, v1, w2, b1, c1, b2, weight_R, scale_R, token_R, end_E, row, start_T1)
        unique = torch.empty(0, device=x_TD.device)
        y_TD, h, u, a, table = forward(*inputs, unique, kind, plan.pre_activations, plan.activation)
        ctx.kind, ctx.in_place = kind, plan.in_place
        ctx.save_for_backward(*inputs, h, u, a, table)
        return y_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor):
        inputs = ctx.saved_tensors
        found = backward(gradients[0].contiguous(), *inputs, ctx.kind, ctx.in_place and not _retained())
        ours = (None if x is None else dx for x, dx in zip(inputs, found, strict=False))
        return *ours, None, None, None, None, None, None


def _retained() -> bool:
    """Whether the graph that is in backward is to stay for another one."""
    return not torch.compiler.is_compiling() and torch._C._autograd._get_current_graph_task_keep_graph()  # type: ignore


@torch.library.custom_op("open_lm::moe_experts", mutates_args=())
def forward(
    x_TD: Tensor, w1: Tensor, v1: Tensor | None, w2: Tensor, b1: Tensor | None, c1: Tensor | None,
    b2: Tensor | None, weight_R: Tensor, scale_R: Tensor | None, token_R: Tensor, end_E: Tensor, row: Tensor,
    start_T1: Tensor | None, unique: Tensor, kind: str, save: bool, save_activation: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(y_TD, and for backward, if `save`: the pre-activations h_RF and u_RF; if `save_activation`: weight * the
    activation, (R, F); the table of tiles). `unique` is not used, see above.
    """
    table = launch.schedule(end_E, len(token_R), block_rows(x_TD.dtype))
    # what is weighted before the product need not be after it, and is what dw2 needs
    before, after = (weight_R, None) if save_activation else (None, weight_R)
    h, u, a = launch.up(x_TD, token_R, w1, v1, b1, c1, scale_R, table, kind, save, weight_R=before)
    assert a is not None
    y_RD = launch.rows(a, w2, None, None, b2, end_E, table, transposed=False, weight_R=before)
    if not save_activation:
        a = None  # its memory, for y_TD
    y_TD = launch.combine(y_RD, after, row, start_T1, end_E, len(x_TD))
    return y_TD, _or_empty(h, x_TD), _or_empty(u, x_TD), _or_empty(a, x_TD), table


@forward.register_fake
def _(
    x_TD, w1, v1, w2, b1, c1, b2, weight_R, scale_R, token_R, end_E, row, start_T1, unique, kind, save,
    save_activation,
):  # fmt: skip
    R, block = token_R.shape[0], block_rows(x_TD.dtype)
    saved = (save, save and v1 is not None, save_activation)
    h_u_a = (x_TD.new_empty((R, w1.shape[2]) if there else 0) for there in saved)
    return (
        torch.empty_like(x_TD),
        *h_u_a,
        end_E.new_empty(3 * ((R + block - 1) // block + end_E.shape[0]) + 2),
    )


@torch.library.custom_op("open_lm::moe_experts_backward", mutates_args=())
def backward(
    g_TD: Tensor, x_TD: Tensor, w1: Tensor, v1: Tensor | None, w2: Tensor, b1: Tensor | None, c1: Tensor | None,
    b2: Tensor | None, weight_R: Tensor, scale_R: Tensor | None, token_R: Tensor, end_E: Tensor, row: Tensor,
    start_T1: Tensor | None, h: Tensor, u: Tensor, a: Tensor, table: Tensor, kind: str, in_place: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x_TD, w1, v1, w2, b1, c1, b2, weight_R and scale_R; h and u are computed anew if not saved.

    With `in_place` h, u and a are consumed, see above; RuntimeError if they have been.
    """
    gated = v1 is not None
    if not h.numel():
        again = launch.up(x_TD, token_R, w1, v1, b1, c1, scale_R, table, kind, activate=False)
        h, u = again[0], again[1]  # type: ignore[assignment]
    elif in_place:
        _consume([x for x in (h, u, a) if x.numel()])
    g_RD = launch.gather(g_TD, token_R, end_E) if launch.gathers(h, g_TD.shape[1], gated) else None
    saved_a = a if a.numel() else None
    # Where the activation was saved, dw2 comes first and dh takes its memory, else dh that of h: what is read and
    # what is written in one place at a time slows the kernel down. `free`: of which nobody has need any more, but
    # which is the caller's to free.
    dh_memory = (h if saved_a is None else saved_a) if in_place else None
    du_memory, free = (u, None if saved_a is None else h) if in_place else (None, None)

    def down_weights(weighted_a: Tensor, g_RD: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """db2 is the sum of weight * g, dw2 that of weight * a ⊗ g."""
        scale = None if b2 is None else weight_R
        return launch.weights(
            g_TD, token_R, scale, weighted_a, end_E, gather_left=False, biased=b2 is not None, x_R=g_RD
        )

    if saved_a is not None:
        dw2, db2 = down_weights(saved_a, g_RD)
    dh, du, new_a, dweight_R = launch.up_backward(
        g_TD, token_R, w2, b2, weight_R, h, u if gated else None, table, kind, g_RD, activate=saved_a is None,
        dh=dh_memory, du=du_memory if gated else None,
    )  # fmt: skip
    if new_a is not None:
        dw2, db2 = down_weights(new_a, g_RD)
    del new_a, g_RD
    dx_RD = launch.rows(dh, w1, du, v1, None, end_E, table, transposed=True, out=free)
    dx_TD = launch.combine(dx_RD, scale_R, row, start_T1, end_E, len(x_TD))
    dscale_R = None
    if scale_R is not None:
        real_R = torch.arange(len(token_R), device=x_TD.device) < end_E[-1]
        dscale_R = torch.where(real_R, (x_TD[token_R] * dx_RD).sum(dim=1, dtype=torch.float32), 0.0)
    del dx_RD
    (dw1, db1), (dv1, dc1) = launch.both_weights(
        x_TD, token_R, scale_R, dh, du, end_E, biased=b1 is not None, out=free
    )
    found = (dx_TD, dw1, dv1, dw2, db1, dc1, db2, dweight_R, dscale_R)
    return tuple(_or_empty(gradient, x_TD) for gradient in found)  # type: ignore[return-value]


@backward.register_fake
def _(
    g_TD, x_TD, w1, v1, w2, b1, c1, b2, weight_R, scale_R, token_R, end_E, row, start_T1, h, u, a, table, kind,
    in_place,
):  # fmt: skip
    return tuple(
        x_TD.new_empty(0) if x is None else torch.empty_like(x)
        for x in (x_TD, w1, v1, w2, b1, c1, b2, weight_R, scale_R)
    )


def _consume(saved: list[Tensor]) -> None:
    """Marks tensors as overwritten; RuntimeError if they have been."""
    if any(not x.is_inference() and x._version for x in saved):
        raise RuntimeError(
            "backward a second time through an MoE layer of --moe-backend triton, compiled: its first backward has "
            "overwritten what forward saved. Do without torch.compile where a graph is retained "
            "(retain_graph=True), or use --moe-backend grouped_mm"
        )
    torch.autograd.graph.increment_version(saved)


def _or_empty(x: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if x is None else x
