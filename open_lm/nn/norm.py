"""Normalisation layers under open_lm's names. They act on the last axis, of width D."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LayerNorm(nn.Module):
    """(…, D) → (…, D): zero mean, unit variance, then an optional gain and bias (arXiv:1607.06450)."""

    def __init__(self, dim: int, eps: float, *, gain: bool, bias: bool) -> None:
        super().__init__()
        self.eps = eps
        self.shape = (dim,)
        self.weight = nn.Parameter(torch.ones(dim)) if gain else None
        self.bias = nn.Parameter(torch.zeros(dim)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.shape, self.weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        gain, bias = self.weight is not None, self.bias is not None
        return f"{self.shape[0]}, eps={self.eps}, gain={gain}, bias={bias}"


class LowPrecisionLayerNorm(LayerNorm):
    """LayerNorm in the autocast dtype, where autocast itself would go up to fp32 (MosaicML composer's)."""

    def forward(self, x: Tensor) -> Tensor:
        device_type = x.device.type
        if not torch.is_autocast_enabled(device_type):
            return super().forward(x)
        dtype = torch.get_autocast_dtype(device_type)
        weight = None if self.weight is None else self.weight.to(dtype)
        bias = None if self.bias is None else self.bias.to(dtype)
        with torch.autocast(device_type, enabled=False):
            return F.layer_norm(x.to(dtype), self.shape, weight, bias, self.eps)


class RMSNorm(nn.Module):
    """(…, D) → (…, D): x / rms(x) in fp32, rounded to x's dtype, times a gain (arXiv:1910.07467)."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        x_fp32 = x.float()
        normed = x_fp32 * torch.rsqrt(x_fp32.square().mean(-1, keepdim=True) + self.eps)
        return normed.type_as(x) * self.weight

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


# --model-norm → (dim, eps) → module
NORMS: dict[str, Callable[[int, float], nn.Module]] = {
    "default_layer_norm": partial(LayerNorm, gain=True, bias=True),
    "lp_layer_norm": partial(LowPrecisionLayerNorm, gain=True, bias=True),
    "gain_only_lp_layer_norm": partial(LowPrecisionLayerNorm, gain=True, bias=False),
    "gain_only_layer_norm": partial(LayerNorm, gain=True, bias=False),
    "no_wb_layer_norm": partial(LayerNorm, gain=False, bias=False),
    "rms_norm": RMSNorm,
}
