"""Multi-head latent attention (MLA, DeepSeek-V2, arXiv:2405.04434): all keys and values from one small latent.

Shapes: B batch, S query positions, T key positions, D model width, H heads, N and R widths of a query or key head's
parts without and with rotary position, K = N + R, V width of a value head, L width of the latent.
"""

import torch
from torch import Tensor, nn

from open_lm.config.model import ModelConfig
from open_lm.nn.attention import LayerCache, make_attention, positions
from open_lm.nn.documents import Documents
from open_lm.nn.norm import NORMS
from open_lm.nn.rope_scaling import score_factor
from open_lm.nn.rotary import Table, make_position


class LatentAttention(nn.Module):
    """Stands where `Attention` does. A key head is N wide from the latent and R wide from one key for all heads."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        latent, nope = config.kv_lora_rank, config.qk_nope_head_dim
        assert latent
        assert nope
        norm, bias = NORMS[config.model_norm], config.attn_bias
        self.qk_parts, self.kv_parts = [nope, config.rotary_dim], [nope, config.value_head_dim]
        self.latent_parts = [latent, config.rotary_dim]
        q_width = config.n_heads * config.qk_head_dim
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(config.dim, q_width, bias=False)
        else:
            self.q_proj = None
            self.q_a_proj = nn.Linear(config.dim, config.q_lora_rank, bias=bias)
            self.q_a_norm = norm(config.q_lora_rank, config.norm_eps)
            self.q_b_proj = nn.Linear(config.q_lora_rank, q_width, bias=False)
        self.kv_a_proj = nn.Linear(config.dim, sum(self.latent_parts), bias=bias)
        self.kv_a_norm = norm(latent, config.norm_eps)
        self.kv_b_proj = nn.Linear(latent, config.n_heads * sum(self.kv_parts), bias=False)
        self.out_proj = nn.Linear(config.n_heads * config.value_head_dim, config.dim, bias=bias)
        self.position = make_position(config)
        self.attend = make_attention(config)
        self.score_factor = score_factor(config)
        self.dropout = {"dropout": config.attn_dropout} if config.attn_dropout else {}

    def position_table(self, position_S: Tensor) -> Table:
        """What `forward` turns queries and keys by, at positions (S,) or (B, S); the same for all layers."""
        return self.position.table(position_S)

    def forward(
        self,
        x_BSD: Tensor,
        cache: LayerCache | None = None,
        table: Table = None,
        documents: Documents | None = None,
    ) -> Tensor:
        """x_BSD → x_BSD. With a cache, the S tokens follow those already in it, and join them.

        The cache holds L + R numbers per position, of which keys and values are made anew in every call.
        """
        table = table or self.position_table(positions(x_BSD, cache, documents))
        latent_BSL, k_BSR = self.kv_a_proj(x_BSD).split(self.latent_parts, dim=-1)
        q_BSHN, q_BSHR = self.queries(x_BSD).unflatten(-1, (-1, sum(self.qk_parts))).split(self.qk_parts, -1)
        q_BSHR, k_BS1R = self.position(q_BSHR, k_BSR[:, :, None], table)
        latent_BTL, k_BT1R = self.kv_a_norm(latent_BSL), k_BS1R
        if cache is not None:
            latent_BTL, k_BT1R = cache.extend_(latent_BTL, k_BT1R)

        kv_BTH = self.kv_b_proj(latent_BTL).unflatten(-1, (-1, sum(self.kv_parts)))
        k_BTHN, v_BTHV = kv_BTH.split(self.kv_parts, dim=-1)
        q_BSHK = torch.cat((q_BSHN, q_BSHR), dim=-1)
        k_BTHK = torch.cat((k_BTHN, k_BT1R.expand(-1, -1, k_BTHN.shape[2], -1).to(k_BTHN.dtype)), dim=-1)
        if self.score_factor != 1:
            q_BSHK = q_BSHK * self.score_factor
        options = self.dropout if self.training else {}
        if documents is not None:
            options = options | {"documents": documents}
        return self.out_proj(self.attend(q_BSHK, k_BTHK, v_BTHV, causal=True, **options).flatten(2))

    def queries(self, x_BSD: Tensor) -> Tensor:
        """(B, S, H * K), through a latent of their own where there is one."""
        if self.q_proj is not None:
            return self.q_proj(x_BSD)
        return self.q_b_proj(self.q_a_norm(self.q_a_proj(x_BSD)))
