"""Rotary position embeddings (RoFormer, arXiv:2104.09864): no parameters, no buffers.

Shapes: B batch, S sequence, H heads, K head width; J = K / 2 rotation planes.
A table of cosines and sines is made once in every forward pass, for all layers: nothing has to survive
meta-device construction, casts of the model, or moves between devices.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from open_lm.config.model import ModelConfig

THETA = 1e4

Rotate = Callable[[Tensor, Tensor, Tensor], Tensor]
Table = tuple[Tensor, Tensor] | None  # cosines and sines, which broadcast to (S, H, J)


def rotation(position_P: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """cos_PJ and sin_PJ of the angles position * THETA**(-2j / K), fp32 always."""
    plane_J = torch.arange(0, head_dim, 2, device=position_P.device, dtype=torch.float32)
    # In half precision neighbouring positions above 256 would have one angle.
    angle_PJ = position_P.float()[:, None] * (1 / THETA ** (plane_J / head_dim))
    return angle_PJ.cos(), angle_PJ.sin()


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

    def __init__(self, head_dim: int, rotate: Rotate) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.rotate = rotate

    def table(self, offset: int, tokens: int, device: torch.device) -> Table:
        """For queries and keys of which the first stands at position `offset`."""
        cos_SJ, sin_SJ = rotation(torch.arange(offset, offset + tokens, device=device), self.head_dim)
        return cos_SJ[:, None], sin_SJ[:, None]

    def forward(self, q_BSHK: Tensor, k_BSHK: Tensor, table: Table) -> tuple[Tensor, Tensor]:
        assert table is not None
        return self.rotate(q_BSHK, *table), self.rotate(k_BSHK, *table)


class HeadRotary(nn.Module):
    """open_lm's first rotary embedding, which took the heads' axis for the positions' (xformers issue 841).

    Head h is rotated by h at every position, so it carries no position; kept because models were trained so.
    """

    def __init__(self, n_heads: int, head_dim: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.head_dim = head_dim

    def table(self, offset: int, tokens: int, device: torch.device) -> Table:
        return rotation(torch.arange(self.n_heads, device=device), self.head_dim)

    def forward(self, q_BSHK: Tensor, k_BSHK: Tensor, table: Table) -> tuple[Tensor, Tensor]:
        assert table is not None
        return rotate_halves(q_BSHK, *table), rotate_halves(k_BSHK, *table)


class NoPosition(nn.Module):
    """Leaves queries and keys as they are: order is known from the causal mask alone."""

    def table(self, offset: int, tokens: int, device: torch.device) -> Table:
        return None

    def forward(self, q_BSHK: Tensor, k_BSHK: Tensor, table: Table) -> tuple[Tensor, Tensor]:
        return q_BSHK, k_BSHK


Position = Rotary | HeadRotary | NoPosition

# --positional-embedding-type → (heads, head width K) → module
POSITIONS: dict[str, Callable[[int, int], Position]] = {
    "rotary": lambda n_heads, head_dim: Rotary(head_dim, rotate_halves),
    "llama_rotary": lambda n_heads, head_dim: Rotary(head_dim, rotate_pairs),
    "head_rotary": HeadRotary,
    "none": lambda n_heads, head_dim: NoPosition(),
}


def make_position(config: ModelConfig) -> Position:
    """The module of --positional-embedding-type: (q_BSHK, k_BSHK, its table) → (q_BSHK, k_BSHK)."""
    return POSITIONS[config.positional_embedding_type](config.n_heads, config.head_dim)
