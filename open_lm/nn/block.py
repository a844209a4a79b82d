"""One pre-norm Transformer block.

Shapes: B batch, S sequence, D model width.
"""

from typing import Any

from torch import Tensor, nn

from open_lm.config.model import ModelConfig
from open_lm.nn.attention import Attention, LayerCache
from open_lm.nn.documents import Documents
from open_lm.nn.ffn import FFNS
from open_lm.nn.latent_attention import LatentAttention
from open_lm.nn.norm import NORMS
from open_lm.nn.rotary import Table


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)); in training, with dropout on what is added.

    `feed_forward` maps x_BSD to x_BSD (dense), or (x_BSD, what is known of its tokens) to (x_BSD, router
    statistics) (mixture of experts). Dense networks may stand before and after the latter, each with its norm
    and residual (ST-MoE, 2202.08906, section 3.2).
    """

    def __init__(self, config: ModelConfig, feed_forward: nn.Module, *, sparse: bool = False) -> None:
        super().__init__()
        norm = NORMS[config.model_norm]
        self.attention = LatentAttention(config) if config.kv_lora_rank else Attention(config)
        self.feed_forward = feed_forward
        self.attention_norm = norm(config.dim, config.norm_eps)
        self.ffn_norm = norm(config.dim, config.norm_eps)
        self.sparse = sparse
        self.dense_before = Dense(config) if sparse and config.moe.dense_before else None
        self.dense_after = Dense(config) if sparse and config.moe.dense_after else None
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x_BSD: Tensor,
        cache: LayerCache | None = None,
        table: Table = None,
        tokens: Any = None,
        documents: Documents | None = None,
    ) -> tuple[Tensor, Any]:
        """Returns x_BSD and the router's statistics, None in a dense block."""
        x_BSD = x_BSD + self.dropout(self.attention(self.attention_norm(x_BSD), cache, table, documents))
        if not self.sparse:
            return x_BSD + self.dropout(self.feed_forward(self.ffn_norm(x_BSD))), None
        if self.dense_before is not None:
            x_BSD = self.dense_before(x_BSD)
        y_BSD, router_stats = self.feed_forward(self.ffn_norm(x_BSD), tokens)
        x_BSD = x_BSD + self.dropout(y_BSD)
        return x_BSD if self.dense_after is None else self.dense_after(x_BSD), router_stats


class Dense(nn.Module):
    """(…, D) → (…, D): x + feed_forward(norm(x)), the model's dense FFN, in training with dropout."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.ffn_norm = NORMS[config.model_norm](config.dim, config.norm_eps)
        self.feed_forward = FFNS[config.ffn_type](config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.feed_forward(self.ffn_norm(x)))
