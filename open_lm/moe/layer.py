"""The mixture-of-experts layer: route, drop, compute, combine.

Shapes: … any leading axes, the last of them the sequence; T tokens, D model width, E experts, K choices per token.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from open_lm.config.moe import MoEConfig
from open_lm.config.moe_check import check_moe
from open_lm.moe.capacity import capacity, drop, fullest, pad_to_capacity
from open_lm.moe.experts import Experts
from open_lm.moe.mixing import Mixing
from open_lm.moe.router import Router
from open_lm.moe.routers import ROUTERS
from open_lm.moe.routing import Context, keep, normalize
from open_lm.moe.stats import RouterStats, measure

EPS = torch.finfo(torch.float32).eps


class Tokens(NamedTuple):
    """What a layer may be told about its tokens, each of the leading shape of x."""

    ids: Tensor | None = None
    """int64: for --moe-router hash."""
    real: Tensor | None = None
    """bool: False for padding, which goes to no expert and counts in no loss. None: all are real."""


class MoE(nn.Module):
    """A feed-forward layer of E experts, of which each token is sent to K (Shazeer et al., 1701.06538).

    y = sum over the token's kept experts e of weight_e * expert_e(x), plus what `config` adds: a bias, a shared
    expert, a residual MLP. A token whose experts were all full gets these alone: it passes through the residual
    around the layer. `MoE(MoEConfig(dim=64, num_experts=8))` works in any network: add the returned statistics'
    `loss` to the objective. Raises ValueError where the configuration contradicts itself.
    """

    def __init__(self, config: MoEConfig):
        super().__init__()
        if not config.dim or not isinstance(config.num_experts, int):
            raise ValueError(
                f"a layer needs its width and its number of experts: dim {config.dim}, num_experts "
                f"{config.num_experts}"
            )
        if config.dense_before or config.dense_after:
            raise ValueError(
                "dense_before and dense_after are a block's: a model puts them around the layer; elsewhere do as "
                "examples/st_moe_block.py"
            )
        check_moe(config, routers=ROUTERS)
        self.config = config
        self.router = Router(config)
        self.experts = Experts(config)
        self.mixing = Mixing(config)

    def forward(self, x: Tensor, tokens: Tokens | None = None) -> tuple[Tensor, RouterStats]:
        """(y, of x's shape, in the dtype a Linear would give; statistics, whose `loss` carries gradients)."""
        config = self.config
        x_TD = x.reshape(-1, x.shape[-1])
        context = self.look_at(x, tokens)

        routed = ROUTERS[config.router](self.router(x_TD), config, context)
        if context.real_T is not None:
            routed = keep(routed, _rows_of(context.real_T, routed))
        kept = drop(routed, config, context)
        stats = measure(routed, kept, config, context)
        if config.normalize_after_drops:
            kept = normalize(kept, EPS)
        if config.straight_through:
            # 1 forward; backward, the weight's gradient (ST-MoE)
            kept = kept._replace(input_weight_R=1 + kept.weight_R - kept.weight_R.detach())
        if config.pad_to_capacity and context.capacity:
            kept = pad_to_capacity(kept, fullest(context, config) * self.groups(context))
        y_TD = self.experts(x_TD, kept)

        return self.mixing(x_TD, y_TD).view_as(x), stats

    def look_at(self, x: Tensor, tokens: Tokens | None) -> Context:
        """What the router may know about the tokens of x."""
        sequences = x.shape[:-2].numel() if x.ndim > 1 else 1
        T = x.shape[:-1].numel()
        per_sequence = self.config.capacity_per == "sequence"
        limit = capacity(T // max(sequences, 1) if per_sequence else T, self.config, training=self.training)
        ids, real = tokens or (None, None)
        return Context(
            training=self.training,
            sequences=sequences,
            capacity=limit,
            real_T=None if real is None else real.reshape(-1),
            bias_E=self.router.bias_E,
            id_T=None if ids is None else ids.reshape(-1),
        )

    def groups(self, context: Context) -> int:
        """How many times an expert has its capacity: once, or once per sequence."""
        return context.sequences if self.config.capacity_per == "sequence" else 1


def _rows_of(real_T: Tensor, routed) -> Tensor:
    """kept_R: the rows of real tokens that were not dropped before."""
    row_R = torch.arange(routed.token_R.numel(), device=real_T.device)
    return real_T[routed.token_R] & (row_R < routed.count_E.sum())
