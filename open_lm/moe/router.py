"""The router's module: from tokens to logits, in float32. What follows from them is in `routers`.

Shapes: T tokens, D model width, E experts.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from open_lm.config.moe import MoEConfig


class Router(nn.Module):
    """One linear map from a token to E scores, and with --moe-balance bias each expert's bias, a buffer."""

    bias_E: Tensor | None

    def __init__(self, config: MoEConfig):
        super().__init__()
        assert config.dim
        assert isinstance(config.num_experts, int)
        self.jitter = config.jitter
        self.layer = nn.Linear(config.dim, config.num_experts, bias=False)
        bias_E = torch.zeros(config.num_experts) if "bias" in config.balances else None
        self.register_buffer("bias_E", bias_E)

    def forward(self, x_TD: Tensor) -> Tensor:
        """logits_TE, always computed in float32: in 16 bits close scores tie, and the choice is arbitrary."""
        with torch.autocast(x_TD.device.type, enabled=False):
            x_TD = x_TD.float()
            if self.jitter and self.training:
                # Switch Transformer (2101.03961), section 2.4; DeepSpeed's `Jitter`
                x_TD = x_TD * torch.empty_like(x_TD).uniform_(1 - self.jitter, 1 + self.jitter)
            return F.linear(x_TD, self.layer.weight.float())
