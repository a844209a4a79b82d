"""The mixture-of-experts layer: route, drop, compute, combine.

Shapes: B batch, S sequence, T = B*S tokens, D model width, E experts, K choices per token.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from open_lm.config.model import ModelConfig
from open_lm.config.moe import MoEConfig
from open_lm.moe.experts import Experts
from open_lm.moe.routers import ROUTERS
from open_lm.moe.routing import drop_by_position
from open_lm.moe.stats import RouterStats, measure


class MoE(nn.Module):
    """A feed-forward layer of E experts, of which each token is sent to K (Shazeer et al., 1701.06538).

    y = sum over the token's kept experts e of weight_e * expert_e(x), plus a bias. A token whose experts were
    all full gets the bias alone: it passes through the block's residual.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config.moe
        self.router = Router(config)
        self.experts = Experts(config)

    def forward(self, x_BSD: Tensor) -> tuple[Tensor, RouterStats]:
        """(y_BSD in the dtype a Linear would give, statistics whose two losses carry gradients)."""
        x_TD = x_BSD.flatten(0, -2)

        routed = ROUTERS[self.config.router](self.router(x_TD), self.config)
        limit = capacity(len(x_TD), self.config)
        kept = drop_by_position(routed, limit) if limit else routed
        y_TD = self.experts(x_TD, kept)

        return y_TD.view_as(x_BSD), measure(routed, kept)


class Router(nn.Module):
    """One linear map from a token to E scores."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        assert config.moe.num_experts
        assert config.moe.top_k <= config.moe.num_experts
        self.layer = nn.Linear(config.dim, config.moe.num_experts, bias=False)

    def forward(self, x_TD: Tensor) -> Tensor:
        """logits_TE, always computed in float32: in 16 bits close scores tie, and the choice is arbitrary.

        The weight itself is of 16 bits where FSDP gathers it so (--fsdp-amp), or under --precision bf16, fp16.
        """
        with torch.autocast(x_TD.device.type, enabled=False):
            return F.linear(x_TD.float(), self.layer.weight.float())


def capacity(tokens: int, config: MoEConfig) -> int:
    """The most assignments an expert takes out of a batch of `tokens`: int(capacity_factor * k*T/E).

    0 means that nothing is dropped, as in MegaBlocks: with --moe-capacity-factor 0, and for batches so small
    that the formula gives 0 (a token at a time, in generation).
    """
    assert config.num_experts
    return int(config.capacity_factor * (config.top_k * tokens / config.num_experts))
