"""The router's module: from tokens to logits, in float32. What follows from them is in `routers`.

Shapes: T tokens, D model width, E experts.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from open_lm.config.moe import MoEConfig


class Router(nn.Module):
    """One linear map from a token to E scores, and with --moe-balance bias each expert's bias, a buffer."""

    bias_E: Tensor | None

    def __init__(self, config: MoEConfig):
        super().__init__()
        assert config.dim
        assert isinstance(config.num_experts, int)
        self.jitter = config.jitter
        self.layer = nn.Linear(config.dim, config.num_experts, bias=False)
        bias_E = torch.zeros(config.num_experts) if "bias" in config.balances else None
        self.register_buffer("bias_E", bias_E)

    def forward(self, x_TD: Tensor) -> Tensor:
        """logits_TE, always computed in float32: in 16 bits close scores tie, and the choice is arbitrary."""
        with torch.autocast(x_TD.device.type, enabled=False):
            weight_ED = self.layer.weight.float()
            jitter = self.jitter and self.training
            if x_TD.is_cuda and x_TD.dtype == torch.bfloat16 and not jitter and not _transformed():
                return _Logits.apply(x_TD, weight_ED)
            x_TD = x_TD.float()
            if jitter:
                # Switch Transformer (2101.03961), section 2.4; DeepSpeed's `Jitter`
                x_TD = x_TD * torch.empty_like(x_TD).uniform_(1 - self.jitter, 1 + self.jitter)
            return F.linear(x_TD, weight_ED)


class _Logits(torch.autograd.Function):
    """x_TD w_EDᵀ of bfloat16 x and float32 w, to float32's precision, by the GPU's units for bfloat16.

    A float32 number is the sum of three of bfloat16, whose products with x are exact in float32. Reads x as it is:
    a copy in float32 and a float32 product take several times as long as all memory traffic that is needed.
    """

    @staticmethod
    def forward(x_TD: Tensor, w_ED: Tensor) -> Tensor:
        parts = _mm(x_TD, torch.cat(_thirds(w_ED)).t())
        return parts.unflatten(1, (3, -1)).sum(dim=1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor):
        x_TD, w_ED = ctx.saved_tensors
        (g_TE,) = gradients
        high_TE, middle_TE, low_TE = _thirds(g_TE)
        high_ED, middle_ED, _ = _thirds(w_ED)
        # rounded to bfloat16 at the end: the three largest of the nine products will do
        g_TE3, w_3ED = torch.cat((high_TE, middle_TE, high_TE), 1), torch.cat((high_ED, high_ED, middle_ED))
        dx_TD = _mm(g_TE3, w_3ED, torch.bfloat16)
        dw = _mm(torch.cat((high_TE, middle_TE, low_TE), 1).t(), x_TD)
        return dx_TD, dw.unflatten(0, (3, -1)).sum(dim=0)


def _thirds(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Three bfloat16 tensors whose sum is x (float32)."""
    high = x.bfloat16()
    rest = x - high.float()
    middle = rest.bfloat16()
    return high, middle, (rest - middle.float()).bfloat16()


@torch.library.custom_op("open_lm::mm", mutates_args=())
def _mm(a: Tensor, b: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The product of two bfloat16 matrices in `dtype`, added up in float32."""
    if a.is_cuda:
        return torch.mm(a, b) if dtype == a.dtype else torch.mm(a, b, out_dtype=dtype)
    return (a.float() @ b.float()).to(dtype)


@_mm.register_fake
def _(a: Tensor, b: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return a.new_empty((a.shape[0], b.shape[1]), dtype=dtype)


def _transformed() -> bool:
    """Whether torch.func is at work, which cannot look into the operator."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()
