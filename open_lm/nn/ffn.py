"""Dense feed-forward networks under open_lm's names.

Shapes: D model width, F hidden width: the model's ffn_hidden_dim, or 4D for gelu, 8D/3 rounded up to a multiple of
256 for the gated ones.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from open_lm.config.model import ModelConfig


class SwiGLU(nn.Module):
    """(…, D) → (…, D): w3(silu(gate) * up), gate and up from one product (Shazeer, arXiv:2002.05202)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.ffn_hidden_dim or config.swiglu_hidden_dim
        self.w12 = nn.Linear(config.dim, 2 * width, bias=config.ffn_bias)
        self.w3 = nn.Linear(width, config.dim, bias=config.ffn_bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * up)


class GemmaGeGLU(nn.Module):
    """(…, D) → (…, D): down(gelu(gate(x)) * up(x)), with biases as in open_lm (Gemma's own has none)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.ffn_hidden_dim or config.swiglu_hidden_dim
        self.gate_proj = nn.Linear(config.dim, width)
        self.up_proj = nn.Linear(config.dim, width)
        self.down_proj = nn.Linear(width, config.dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.gate_proj(x)) * self.up_proj(x))


def make_gelu(config: ModelConfig, approximate: Literal["none", "tanh"]) -> nn.Module:
    """(…, D) → (…, D): an ungated MLP; exact without biases is MPT's, tanh with biases GPT-2's and Megatron's."""
    width = config.ffn_hidden_dim or 4 * config.dim
    up = nn.Linear(config.dim, width, bias=config.ffn_bias)
    down = nn.Linear(width, config.dim, bias=config.ffn_bias)
    return nn.Sequential(up, nn.GELU(approximate), down)


# --ffn-type → config → module. swiglu was xformers' fused kernel in open_lm: same parameters, same function.
FFNS: dict[str, Callable[[ModelConfig], nn.Module]] = {
    "swiglu": SwiGLU,
    "swiglu_torch": SwiGLU,
    "gelu": partial(make_gelu, approximate="none"),
    "gelu_tanh": partial(make_gelu, approximate="tanh"),
    "gemma_geglu": GemmaGeGLU,
}
