"""MegaBlocks' kernels (Gale et al., 2211.15841) under our Routing: its gather and scatter, and its grouped GEMM.

The activation between the products is torch's. The packages are no dependency of ours (MegaBlocks pins an old
torch): they are imported when a layer with --moe-backend megablocks is made.

Shapes: T tokens, D model width, E experts, F expert width, R rows (assignments), K rows per token.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from open_lm.moe.backends.grouped_mm import add_bias, align, compute_dtype, group_ends, grouped_mm
from open_lm.moe.dispatch import combine, dispatch, weigh_inputs
from open_lm.moe.routing import Routing, expert_of_row, invert

if TYPE_CHECKING:
    from open_lm.moe.experts import ExpertMLP

INSTALL = (
    "pip install --no-deps --no-build-isolation megablocks==0.10.0 grouped_gemm==0.3.0 stanford-stk==0.7.1"
)


class Kernels(NamedTuple):
    """What is used of the packages."""

    gather: Callable[..., Tensor]
    """(x_TD, index_R, expert_R, end_E, K) -> x_RD: row r is token index_R[r] // K."""
    scatter: Callable[..., Tensor]
    """(y_RD, index_R, expert_R, weight_TK (flat), end_E, K) -> y_TD: per token the weighted sum of its rows."""
    gmm: Callable[..., Tensor]
    """(a_RD, b_EDF, size_E) -> y_RF: the next size_E[e] rows of a times b[e]; size_E int64, on the CPU."""


def load() -> Kernels:
    """The kernels. Raises ValueError where there is no GPU or a package is missing, with the pip command."""
    instead = "or use --moe-backend grouped_mm"
    if not torch.cuda.is_available():
        raise ValueError(
            f"--moe-backend megablocks runs on a GPU alone, and torch sees none: get one, {instead}"
        )
    try:
        from grouped_gemm import ops as gemm  # type: ignore
        from megablocks import ops  # type: ignore
    except ImportError as error:
        raise ValueError(
            f"--moe-backend megablocks cannot be loaded ({error}): `{INSTALL}`, {instead}"
        ) from error
    return Kernels(ops.gather, ops.scatter, gemm.gmm)


def megablocks(x_TD: Tensor, routing: Routing, mlp: "ExpertMLP") -> Tensor:
    """y_TD: each token's sum of weight * expert(x) over its kept rows, in bfloat16 on a GPU, with one host sync:
    the GEMM is a cuBLAS call per expert, so the host must know each expert's rows.

    Raises ValueError elsewhere and in other dtypes. Not for torch.func, nor for compilation as one graph.
    """
    dtype = compute_dtype(x_TD)
    if not x_TD.is_cuda or dtype != torch.bfloat16:
        raise ValueError(
            f"--moe-backend megablocks computes in bfloat16 on a GPU, not in {dtype} on {x_TD.device.type}: use "
            "--precision amp_bf16, or --moe-backend grouped_mm"
        )
    if not len(x_TD):  # its kernels are not made for empty tensors
        return grouped_mm(x_TD, routing, mlp)
    # MegaBlocks casts whatever it is given under autocast, float32 weights too.
    with torch.autocast("cuda", enabled=False):
        return compute(x_TD, routing, mlp, load(), dtype)


def compute(x_TD: Tensor, routing: Routing, mlp: "ExpertMLP", kernels: Kernels, dtype: torch.dtype) -> Tensor:
    """The computation of `megablocks` with these kernels, in `dtype`."""
    end_E = group_ends(routing)
    size_E = end_E.diff(prepend=end_E.new_zeros(1)).long().cpu()
    expert_R = expert_of_row(routing)
    x_TD, row_TK = align(x_TD, dtype), routing.row_TK

    def product(a_RD: Tensor, w_EDF: Tensor, b_EF: Tensor | None) -> Tensor:
        b_EF = None if b_EF is None else align(b_EF, dtype)
        return add_bias(kernels.gmm(a_RD, align(w_EDF, dtype), size_E), b_EF, expert_R, end_E)

    def experts(x_RD: Tensor) -> Tensor:
        gate_RF = product(x_RD, mlp.w1, mlp.b1)
        value_RF = None if mlp.v1 is None else product(x_RD, mlp.v1, mlp.c1)
        return product(mlp.activate(gate_RF, value_RF), mlp.w2, mlp.b2)

    if row_TK is None:  # its gather and scatter are for K rows per token
        y_TD = combine(experts(dispatch(x_TD, routing)), routing)
    else:
        # As its own layers: 32 bits, and a row is known by its token and choice, t * K + k.
        where = invert(row_TK.flatten()).int(), expert_R.int()
        x_RD = weigh_inputs(kernels.gather(x_TD, *where, end_E, row_TK.shape[1]), routing)
        weight_TK = routing.weight_R.gather(0, row_TK.flatten())
        y_TD = kernels.scatter(experts(x_RD), *where, weight_TK, end_E, row_TK.shape[1])
    return y_TD[:, : mlp.w2.shape[2]]
