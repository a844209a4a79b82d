"""What is added to the routed output: a shared expert, PR-MoE's residual MLP.

Shapes: T tokens, D model width, F width of an MLP.
"""

from torch import Tensor, nn

from open_lm.config.moe import MoEConfig
from open_lm.moe.experts import EXPERTS, expert_hidden_dim


class MLP(nn.Module):
    """One expert as a dense network, for every token; biases as the experts'."""

    def __init__(self, config: MoEConfig, hidden_dim: int):
        super().__init__()
        assert config.dim
        self.kind = EXPERTS[config.ffn_type]
        self.w1 = nn.Linear(config.dim, hidden_dim, bias=config.expert_bias)
        self.v1 = nn.Linear(config.dim, hidden_dim, bias=config.expert_bias) if self.kind.gated else None
        self.w2 = nn.Linear(hidden_dim, config.dim, bias=config.expert_bias)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.w2(self.kind(self.w1(x_TD), None if self.v1 is None else self.v1(x_TD)))


class Mixing(nn.Module):
    """y_TD as it is, unless --moe-shared-hidden-dim or --moe-residual say otherwise; it has no weights then."""

    def __init__(self, config: MoEConfig):
        super().__init__()
        assert config.dim
        self.config = config
        self.shared = MLP(config, config.shared_hidden_dim) if config.shared_hidden_dim else None
        self.gate = nn.Linear(config.dim, 1, bias=False) if config.shared_mix == "gate" else None
        self.mlp = MLP(config, expert_hidden_dim(config)) if config.residual else None
        self.coefficient = nn.Linear(config.dim, 2) if config.residual else None

    def forward(self, x_TD: Tensor, y_TD: Tensor) -> Tensor:
        """The routed output y_TD, first with the shared expert, then with the residual MLP."""
        if self.shared is not None:
            shared_TD = self.shared(x_TD)
            if self.gate is not None:  # Qwen2-MoE, Megatron
                y_TD = y_TD + self.gate(x_TD).sigmoid() * shared_TD
            elif self.config.shared_mix == "olmo":
                y_TD = (self.config.top_k * y_TD + shared_TD) / (self.config.top_k + 1)
            else:  # DeepSeekMoE (2401.06066)
                y_TD = y_TD + shared_TD
        if self.mlp is not None and self.coefficient is not None:
            # DeepSpeed's PR-MoE (2201.05596), section 4.1
            share_T2 = self.coefficient(x_TD).float().softmax(dim=-1).to(y_TD.dtype)
            y_TD = share_T2[:, :1] * y_TD + share_T2[:, 1:] * self.mlp(x_TD)
        return y_TD
