"""ST-MoE's sparse block in a plain transformer layer of torch: attention, dense FFN, mixture of experts, dense FFN.

    python examples/st_moe_block.py --experts 8 --steps 300

The task is to copy: the second half of each sequence repeats its random first half. The MoE is ST-MoE's
(Zoph et al., 2202.08906) as in st-moe-pytorch: gated experts, threshold routing, capacity per sequence, losses
of balance and of the router's logits; around each part an RMSNorm and a residual.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from open_lm.moe import MoE, MoEConfig, RouterStats


@dataclass(frozen=True)
class Flags:
    """Train two transformer layers with ST-MoE's block to copy."""

    experts: int = 8
    top_k: int = 2
    threshold: float = 0.2
    """A second choice of gate g is kept with probability g / threshold."""
    dim: int = 64
    heads: int = 4
    layers: int = 2
    length: int = 16
    """Tokens to copy; sequences are twice as long."""
    vocab_size: int = 32
    batch_size: int = 32
    steps: int = 300
    lr: float = 2e-3
    seed: int = 0


class Dense(nn.Module):
    """x + a gated FFN of norm(x), (…, D)."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm, self.up, self.down = nn.RMSNorm(dim), nn.Linear(dim, 8 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.up(self.norm(x)).chunk(2, dim=-1)
        return x + self.down(F.gelu(gate) * value)


class SparseBlock(nn.Module):
    """ST-MoE's block: Dense, x + MoE(norm(x)), Dense; (B, S, D), and the router's statistics."""

    def __init__(self, flags: Flags):
        super().__init__()
        self.before, self.norm, self.after = Dense(flags.dim), nn.RMSNorm(flags.dim), Dense(flags.dim)
        self.moe = MoE(
            MoEConfig(
                dim=flags.dim,
                num_experts=flags.experts,
                top_k=flags.top_k,
                router="threshold",
                threshold=flags.threshold,
                # its factor does not count a token's K choices
                capacity_factor=1.25 / flags.top_k,
                eval_capacity_factor=2.0 / flags.top_k,
                min_capacity=4,
                capacity_per="sequence",
                drop_policy="choice",
                straight_through=True,
                balance=("first_choice",),
                loss_weight=0.01,
                z_loss_weight=0.001,
                ffn_type="geglu",
                hidden_dim=8 * flags.dim // 3,
                expert_bias=True,
                output_bias=False,
            )
        )

    def forward(self, x_BSD: Tensor) -> tuple[Tensor, RouterStats]:
        x_BSD = self.before(x_BSD)
        y_BSD, stats = self.moe(self.norm(x_BSD))
        return self.after(x_BSD + y_BSD), stats


class Layer(nn.Module):
    """A causal transformer layer whose feed-forward part is a SparseBlock."""

    def __init__(self, flags: Flags):
        super().__init__()
        self.norm = nn.RMSNorm(flags.dim)
        self.attention = nn.MultiheadAttention(flags.dim, flags.heads, batch_first=True)
        self.feed_forward = SparseBlock(flags)

    def forward(self, x_BSD: Tensor) -> tuple[Tensor, RouterStats]:
        S = x_BSD.shape[1]
        later_SS = torch.ones(S, S, dtype=torch.bool, device=x_BSD.device).triu(1)
        h_BSD = self.norm(x_BSD)
        h_BSD, _ = self.attention(h_BSD, h_BSD, h_BSD, attn_mask=later_SS, need_weights=False)
        return self.feed_forward(x_BSD + h_BSD)


class Network(nn.Module):
    """Tokens (B, S) → logits (B, S, V), and the statistics of each layer."""

    def __init__(self, flags: Flags):
        super().__init__()
        self.tokens = nn.Embedding(flags.vocab_size, flags.dim)
        self.positions = nn.Parameter(torch.randn(2 * flags.length, flags.dim))
        self.layers = nn.ModuleList(Layer(flags) for _ in range(flags.layers))
        self.outputs = nn.Linear(flags.dim, flags.vocab_size)

    def forward(self, tokens_BS: Tensor) -> tuple[Tensor, list[RouterStats]]:
        x_BSD, stats = self.tokens(tokens_BS) + self.positions[: tokens_BS.shape[1]], []
        for layer in self.layers:
            x_BSD, of_layer = layer(x_BSD)
            stats.append(of_layer)
        return self.outputs(x_BSD), stats


def look(network: Network, flags: Flags) -> tuple[Tensor, Tensor, list[RouterStats]]:
    """(loss, accuracy on the second half, statistics) on new sequences."""
    half = torch.randint(flags.vocab_size, (flags.batch_size, flags.length))
    tokens = torch.cat([half, half], dim=1)
    logits, stats = network(tokens[:, :-1])
    logits, targets = (
        logits[:, flags.length - 1 :],
        tokens[:, flags.length :],
    )  # the first half cannot be known
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    return loss, (logits.argmax(dim=-1) == targets).float().mean(), stats


def main(arguments: list[str] | None = None) -> None:
    flags = tyro.cli(Flags, args=arguments, description=__doc__)
    torch.manual_seed(flags.seed)
    try:
        network = Network(flags)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    optimizer = torch.optim.Adam(network.parameters(), lr=flags.lr)
    layers = [f"experts of layer {i}, %" for i in range(flags.layers)]
    table = Table(
        "step", "loss", "accuracy", *layers, "dropped", title=f"copying {flags.length} tokens, evaluation"
    )
    for step in range(1, flags.steps + 1):
        network.train()
        loss, _, stats = look(network, flags)
        optimizer.zero_grad()
        (loss + sum(layer.loss for layer in stats)).backward()
        optimizer.step()
        if step % max(flags.steps // 6, 1) == 0:
            network.eval()
            with torch.no_grad():
                loss, accuracy, stats = look(network, flags)
            shares = [" ".join(f"{100 * n / s.count_E.sum():.0f}" for n in s.count_E) for s in stats]
            dropped = sum(float(s.dropped) for s in stats) / sum(float(s.count_E.sum()) for s in stats)
            table.add_row(str(step), f"{loss:.3f}", f"{accuracy:.1%}", *shares, f"{dropped:.1%}")
    Console().print(table)


if __name__ == "__main__":
    main()
