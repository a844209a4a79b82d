"""One pre-norm Transformer block.

Shapes: B batch, S sequence, D model width.
"""

from typing import Any

from torch import Tensor, nn

from open_lm.config.model import ModelConfig
from open_lm.nn.attention import Attention, LayerCache
from open_lm.nn.latent_attention import LatentAttention
from open_lm.nn.norm import NORMS
from open_lm.nn.rotary import Table


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)); in training, with dropout on what is added.

    `feed_forward` maps x_BSD to x_BSD (dense) or to (x_BSD, router statistics) (mixture of experts).
    """

    def __init__(self, config: ModelConfig, feed_forward: nn.Module) -> None:
        super().__init__()
        norm = NORMS[config.model_norm]
        self.attention = LatentAttention(config) if config.kv_lora_rank else Attention(config)
        self.feed_forward = feed_forward
        self.attention_norm = norm(config.dim, config.norm_eps)
        self.ffn_norm = norm(config.dim, config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x_BSD: Tensor, cache: LayerCache | None = None, table: Table = None
    ) -> tuple[Tensor, Any]:
        """Returns x_BSD and the router's statistics, None in a dense block."""
        x_BSD = x_BSD + self.dropout(self.attention(self.attention_norm(x_BSD), cache, table))
        y = self.feed_forward(self.ffn_norm(x_BSD))
        y_BSD, router_stats = y if isinstance(y, tuple) else (y, None)
        return x_BSD + self.dropout(y_BSD), router_stats
