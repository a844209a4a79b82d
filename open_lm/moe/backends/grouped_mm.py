"""All experts in one `torch.nn.functional.grouped_mm` per matrix.

Shapes: T tokens, D model width, E experts, F expert width, R rows (assignments).

Fast on H100 and newer in bfloat16, without a host sync. In other dtypes, and on older GPUs, torch itself
loops over the experts inside the operator.
"""

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from open_lm.moe.dispatch import combine, dispatch, samples_first
from open_lm.moe.routing import Routing, expert_of_row, invert

if TYPE_CHECKING:
    from open_lm.moe.experts import ExpertMLP

ROWS = 64


def grouped_mm(x_TD: Tensor, routing: Routing, mlp: "ExpertMLP") -> Tensor:
    """y_TD: each token's sum of weight * expert(x) over its kept rows; same numbers as `reference`."""
    dtype = compute_dtype(x_TD)
    x_TD = align(x_TD, dtype)
    end_E = group_ends(routing)
    expert_R = None if mlp.b2 is None else expert_of_row(routing)

    def product(a_RD: Tensor, w_EDF: Tensor, b_EF: Tensor | None) -> Tensor:
        w_EDF, b_EF = align(w_EDF, dtype), None if b_EF is None else align(b_EF, dtype)
        if routing.rows_per_expert:  # all groups are equal: --moe-pad-to-capacity
            y_ECF = a_RD.unflatten(0, (-1, routing.rows_per_expert)) @ w_EDF
            return (y_ECF if b_EF is None else y_ECF + b_EF[:, None]).flatten(0, 1)
        return add_bias(multiply(a_RD, w_EDF, end_E), b_EF, expert_R, end_E)

    x_RD = dispatch(x_TD, routing)
    gate_RF = product(x_RD, mlp.w1, mlp.b1)
    value_RF = None if mlp.v1 is None else product(x_RD, mlp.v1, mlp.c1)
    y_RD = product(mlp.activate(gate_RF, value_RF), mlp.w2, mlp.b2)
    return combine(y_RD, routing)[:, : mlp.w2.shape[2]]


def compute_dtype(x: Tensor) -> torch.dtype:
    """What a Linear would compute x in: these operators do not follow autocast by themselves."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def group_ends(routing: Routing) -> Tensor:
    """Where each expert's rows end, int32 (E,). The last expert's group takes in the dropped rows.

    Rows outside all groups would stay uninitialised, forward and in the input's gradient. Computed and then
    multiplied by their weight 0 they count as zeros in both: cheaper than two masked copies of all rows.
    """
    end_E = routing.count_E.cumsum(0, dtype=torch.int32)
    expert_E = torch.arange(end_E.numel(), device=end_E.device)
    # Not end_E[-1] = …, which syncs, nor F.pad, which torch 2.11's compiler for GPUs loses after a cumsum.
    return torch.where(expert_E == end_E.numel() - 1, routing.token_R.numel(), end_E)


def align(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x (T, D), (E, F) or (E, D, F) as `dtype`, its widths D and F padded with zeros to multiples of 16 bytes.

    grouped_mm takes only rows that start at multiples of 16 bytes. The padding adds nothing to any product.
    """
    x = x.to(dtype)
    multiple = 16 // x.element_size()
    padding = [0, -x.shape[-1] % multiple] + ([0, -x.shape[-2] % multiple] if x.ndim == 3 else [])
    return F.pad(x, padding) if any(padding) else x


def multiply(a_RD: Tensor, b_EDF: Tensor, end_E: Tensor) -> Tensor:
    """y_RF: rows end_E[e-1] to end_E[e] of a times b[e]."""
    # The operator's fake kernel knows bfloat16 only; `_product` lets the other dtypes compile too.
    if a_RD.dtype == torch.bfloat16 and a_RD.is_cuda:
        return F.grouped_mm(a_RD, b_EDF, offs=end_E)
    return _Product.apply(a_RD, b_EDF, end_E)


def add_bias(y_RF: Tensor, b_EF: Tensor | None, expert_R: Tensor | None, end_E: Tensor) -> Tensor:
    """y_RF plus each row's expert's bias, if there are any."""
    return y_RF if b_EF is None else _AddBias.apply(y_RF, b_EF, expert_R, end_E)


class _AddBias(torch.autograd.Function):
    """y + b[expert]; torch's gradient of this adds up thousands of rows in 16 bits, one after the other."""

    generate_vmap_rule = True

    @staticmethod
    def forward(y_RF: Tensor, b_EF: Tensor, expert_R: Tensor, end_E: Tensor) -> Tensor:
        return y_RF + b_EF[expert_R]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(inputs[3])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor):
        (g_RF,), (end_E,) = gradients, ctx.saved_tensors
        # a sum over each group's rows: ones times the rows; eight of them, for 16 bytes a row
        ones_R8 = g_RF.new_ones(g_RF.shape[0], 8)
        return g_RF, multiply(ones_R8.t(), g_RF.contiguous(), end_E)[:, 0], None, None


class _Product(torch.autograd.Function):
    """`_product` with its gradient, which is two products again, and its rule for torch.func.vmap."""

    @staticmethod
    def forward(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
        return _product(a, b, ends)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor):
        g = gradients[0].contiguous()
        a, b, ends = ctx.saved_tensors
        if b.ndim == 3:  # g (R, F)
            return _Product.apply(g, b.transpose(1, 2), ends), _Product.apply(a.t(), g, ends), None
        # second derivatives: g (E, D, F) of a (D, R) x b (R, F)
        return _Product.apply(b, g.transpose(1, 2), ends).t(), _Product.apply(a.t(), g, ends), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple, a: Tensor, b: Tensor, ends: Tensor):
        """N samples of E groups are one product of N * E groups; if they share b, of E groups."""
        in_a, in_b, in_ends = in_dims
        a, ends = samples_first(a, in_a, info), samples_first(ends, in_ends, info)
        if in_b is None and b.ndim == 3:
            order_R, end_E = _by_group(ends, a.shape[1])
            y_RF = _Product.apply(a.flatten(0, 1)[order_R], b, end_E)
            return y_RF[invert(order_R)].unflatten(0, a.shape[:2]), 0
        b = samples_first(b, in_b, info)
        rows = a.shape[1] if b.ndim == 4 else a.shape[2]
        first_N = rows * torch.arange(len(a), device=ends.device, dtype=ends.dtype)
        end_E = (ends + first_N[:, None]).flatten()
        if b.ndim == 4:  # (N, R, D) x (N, E, D, F)
            return _Product.apply(a.flatten(0, 1), b.flatten(0, 1), end_E).unflatten(0, a.shape[:2]), 0
        # (N, D, R) x (N, R, F), the left one made so that its columns stay contiguous
        y = _Product.apply(a.transpose(1, 2).flatten(0, 1).t(), b.flatten(0, 1), end_E)
        return y.unflatten(0, ends.shape), 0


def _by_group(end_NE: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """(order_R, end_E): the N * rows rows of all samples sorted by group, and where each group ends then."""
    row_NR = torch.arange(rows, device=end_NE.device, dtype=end_NE.dtype).repeat(len(end_NE), 1)
    group_R = torch.searchsorted(end_NE.contiguous(), row_NR, right=True).flatten()
    return group_R.sort(stable=True).indices, end_NE.sum(dim=0, dtype=end_NE.dtype)


@torch.library.custom_op("open_lm::grouped_mm", mutates_args=())
def _product(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    if a.dtype == torch.float64:
        return _looped_product(a, b, ends.tolist(), multiple=1)
    if a.device.type == "cpu" and a.element_size() == 2:
        return _looped_product(a, b, ends.tolist(), multiple=ROWS)
    return F.grouped_mm(a, b, offs=ends).contiguous()


def _looped_product(a: Tensor, b: Tensor, ends: list[int], multiple: int) -> Tensor:
    """The same, group by group: float64, which grouped_mm lacks, and 16 bits on a CPU, with rounded groups.

    There the CPU library compiles a kernel for every new shape, for milliseconds, where the product itself takes
    a tenth of one; routing makes new group sizes in every step, rows of zeros up to a multiple make them few.
    """
    products = []
    for expert, (start, end) in enumerate(pairwise([0, *ends])):
        padding = -(end - start) % multiple
        if b.ndim == 3:  # (R, D) x (E, D, F): rows are padded
            products.append((F.pad(a[start:end], (0, 0, 0, padding)) @ b[expert])[: end - start])
        else:  # (D, R) x (R, F), a weight's gradient: the sum over rows is
            left = F.pad(a[:, start:end], (0, padding))
            products.append(left @ F.pad(b[start:end], (0, 0, 0, padding)))
    return torch.cat(products) if b.ndim == 3 else torch.stack(products)


@_product.register_fake
def _(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    rows = (ends.shape[0], a.shape[0]) if b.ndim == 2 else (a.shape[0],)
    return a.new_empty(*rows, b.shape[-1])
