"""The experts in Triton kernels: gather, products, activation and their gradients, rows of no padding.

Shapes: T tokens, D model width, E experts, F expert width, R rows (assignments), K rows per token.
"""

import os
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from open_lm.moe.backends.grouped_mm import align, compute_dtype, grouped_mm
from open_lm.moe.routing import Routing

if TYPE_CHECKING:
    from open_lm.moe.experts import ExpertMLP

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def load() -> None:
    """Raises ValueError where the kernels cannot run: no Triton; or no GPU of compute capability 8.0, nor Triton's
    interpreter (TRITON_INTERPRET=1).
    """
    instead = "or use --moe-backend grouped_mm"
    if find_spec("triton") is None:
        raise ValueError(
            f"--moe-backend triton needs Triton, which is not installed: `pip install triton`, {instead}"
        )
    if os.environ.get("TRITON_INTERPRET") == "1":
        return
    if not torch.cuda.is_available():
        raise ValueError(f"--moe-backend triton runs on a GPU alone, and torch sees none: get one, {instead}")
    if (capability := torch.cuda.get_device_capability()) < (8, 0):
        raise ValueError(
            f"--moe-backend triton needs a GPU of compute capability 8.0 (Ampere) or newer, this one has "
            f"{'.'.join(map(str, capability))}: {instead.removeprefix('or ')}"
        )


def triton(x_TD: Tensor, routing: Routing, mlp: "ExpertMLP") -> Tensor:
    """y_TD: each token's sum of weight * expert(x) over its kept rows, to rounding the same as `reference`.

    In bfloat16, float16 and float32 (products in tf32 where torch's own would be), without a host sync, compiled as
    one graph if the layer is. What it saves for backward is the input and the experts' pre-activation (with
    --moe-recompute the input alone; where the table of tiles says so, the activation too). float64, no tokens, and
    torch.func's transforms go to grouped_mm. No second derivatives.
    """
    dtype = compute_dtype(x_TD)
    transformed = not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()
    if dtype not in DTYPES or not len(x_TD) or not routing.token_R.shape[0] or transformed:
        return grouped_mm(x_TD, routing, mlp)
    from open_lm.moe.backends.triton import launch
    from open_lm.moe.backends.triton.ops import Experts, Plan, rows_of

    def ready(x: Tensor | None) -> Tensor | None:
        return None if x is None else align(x, dtype).contiguous()

    rows = rows_of(routing.token_R, routing.count_E, routing.row_TK, len(x_TD))
    weights = [ready(w) for w in (mlp.w1, mlp.v1, mlp.w2, mlp.b1, mlp.c1, mlp.b2)]
    scale_R = routing.input_weight_R
    per_row = (routing.weight_R.contiguous(), None if scale_R is None else scale_R.contiguous())
    save = torch.is_grad_enabled() and not mlp.recompute
    _, D, width = mlp.w1.shape
    activation, in_place = launch.plan(x_TD.device, dtype, D, width, mlp.v1 is not None)
    plan = Plan(save, save and activation, in_place)
    y_TD = Experts.apply(align(x_TD, dtype).contiguous(), *weights, *per_row, *rows, mlp.kind, plan)
    return y_TD[:, : mlp.w2.shape[2]]
