"""Dense feed-forward networks under open_lm's names.

Shapes: D model width, F hidden width: 4D for gelu, 8D/3 rounded up to a multiple of 256 for the gated ones.
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from open_lm.config.model import ModelConfig


class SwiGLU(nn.Module):
    """(…, D) → (…, D): w3(silu(gate) * up), gate and up from one product (Shazeer, arXiv:2002.05202)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.w12 = nn.Linear(config.dim, 2 * config.swiglu_hidden_dim, bias=False)
        self.w3 = nn.Linear(config.swiglu_hidden_dim, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * up)


class GemmaGeGLU(nn.Module):
    """(…, D) → (…, D): down(gelu(gate(x)) * up(x)), with biases as in open_lm (Gemma's own has none)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.dim, config.swiglu_hidden_dim)
        self.up_proj = nn.Linear(config.dim, config.swiglu_hidden_dim)
        self.down_proj = nn.Linear(config.swiglu_hidden_dim, config.dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.gate_proj(x)) * self.up_proj(x))


def make_gelu(config: ModelConfig) -> nn.Module:
    """(…, D) → (…, D): an ungated MLP with exact GELU and no biases (MPT's)."""
    up = nn.Linear(config.dim, 4 * config.dim, bias=False)
    down = nn.Linear(4 * config.dim, config.dim, bias=False)
    return nn.Sequential(up, nn.GELU(approximate="none"), down)


# --ffn-type → config → module. swiglu was xformers' fused kernel in open_lm: same parameters, same function.
FFNS: dict[str, Callable[[ModelConfig], nn.Module]] = {
    "swiglu": SwiGLU,
    "swiglu_torch": SwiGLU,
    "gelu": make_gelu,
    "gemma_geglu": GemmaGeGLU,
}
