"""Rotary position embeddings (RoFormer, arXiv:2104.09864): no parameters, no buffers.

Shapes: B batch, S sequence, H heads, K rotated width of a head; J = K / 2 rotation planes.
A table of cosines and sines is made once in every forward pass, for all layers: nothing has to survive
meta-device construction, casts of the model, or moves between devices.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from open_lm.config.model import ModelConfig
from open_lm.nn.rope_scaling import SCALINGS

Rotate = Callable[[Tensor, Tensor, Tensor], Tensor]
Table = tuple[Tensor, Tensor] | None  # cosines and sines, which broadcast to (B, S, H, J)


def frequencies(config: ModelConfig, device: torch.device) -> tuple[Tensor, float]:
    """frequency_J = theta**(-2j / K) after --rope-scaling, in radians per position and fp32, and what cosines and
    sines are multiplied by."""
    plane_J = torch.arange(0, config.rotary_dim, 2, device=device, dtype=torch.float32)
    return SCALINGS[config.rope_scaling](1 / config.rope_theta ** (plane_J / config.rotary_dim), config)


def rotation(position_P: Tensor, config: ModelConfig) -> tuple[Tensor, Tensor]:
    """cos_PJ and sin_PJ of the angles position * frequency, fp32 always; P may be several axes."""
    frequency_J, factor = frequencies(config, position_P.device)
    # In half precision neighbouring positions above 256 would have one angle.
    angle_PJ = position_P.float()[..., None] * frequency_J
    return angle_PJ.cos() * factor, angle_PJ.sin() * factor


def rotate_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(…, K) → (…, K): plane j is (x[j], x[j + K/2]), as GPT-NeoX."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).type_as(x)


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(…, K) → (…, K): plane j is (x[2j], x[2j + 1]), as Llama's own code."""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2).type_as(x)


class Rotary(nn.Module):
    """Rotates queries and keys by their positions, so that their product depends on the distance."""

    def __init__(self, config: ModelConfig, rotate: Rotate) -> None:
        super().__init__()
        self.config = config
        self.rotate = rotate

    def table(self, position_S: Tensor) -> Table:
        """For queries and keys at these positions, (S,) for all rows or (B, S)."""
        cos_SJ, sin_SJ = rotation(position_S, self.config)
        return cos_SJ[..., None, :], sin_SJ[..., None, :]

    def forward(self, q_BSHK: Tensor, k_BSHK: Tensor, table: Table) -> tuple[Tensor, Tensor]:
        assert table is not None
        return self.rotate(q_BSHK, *table), self.rotate(k_BSHK, *table)


class HeadRotary(nn.Module):
    """open_lm's first rotary embedding, which took the heads' axis for the positions' (xformers issue 841).

    Head h is rotated by h at every position, so it carries no position; kept because models were trained so.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config

    def table(self, position_S: Tensor) -> Table:
        return rotation(torch.arange(self.config.n_heads, device=position_S.device), self.config)

    def forward(self, q_BSHK: Tensor, k_BSHK: Tensor, table: Table) -> tuple[Tensor, Tensor]:
        assert table is not None
        return rotate_halves(q_BSHK, *table), rotate_halves(k_BSHK, *table)


class NoPosition(nn.Module):
    """Leaves queries and keys as they are: order is known from the causal mask or learned positions."""

    def table(self, position_S: Tensor) -> Table:
        return None

    def forward(self, q_BSHK: Tensor, k_BSHK: Tensor, table: Table) -> tuple[Tensor, Tensor]:
        return q_BSHK, k_BSHK


Position = Rotary | HeadRotary | NoPosition

# --positional-embedding-type → config → module; learned positions are in the Transformer's embedding
POSITIONS: dict[str, Callable[[ModelConfig], Position]] = {
    "rotary": lambda config: Rotary(config, rotate_halves),
    "llama_rotary": lambda config: Rotary(config, rotate_pairs),
    "head_rotary": HeadRotary,
    "learned": lambda config: NoPosition(),
    "none": lambda config: NoPosition(),
}


def make_position(config: ModelConfig) -> Position:
    """The module of --positional-embedding-type: (q_BSHK, k_BSHK, its table) → (q_BSHK, k_BSHK)."""
    return POSITIONS[config.positional_embedding_type](config)
