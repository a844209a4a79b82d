"""The mixture-of-experts layers. `moe.num_experts` is the flag `--moe-num-experts`."""

from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import arg


@dataclass(frozen=True)
class MoEConfig:
    """Mixture of experts. Defaults are open_lm's: ungated tanh-GELU experts of width 4d, capacity 1.25."""

    freq: Annotated[int, arg(name="moe-freq")] = 0
    """Layer N is an MoE when N % freq == 0; 0: a dense model."""

    num_experts: Annotated[int | None, arg(name="moe-num-experts")] = None
    """Experts in each MoE layer."""

    top_k: Annotated[int, arg(name="moe-top-k")] = 2
    """Experts that each token is sent to."""

    router: Annotated[Literal["top_k"], arg(name="moe-router")] = "top_k"
    """How tokens choose experts: a function in open_lm/moe/routers.py."""

    normalize_weights: Annotated[bool, arg(name="moe-normalize-weights")] = False
    """Rescale a token's k combine weights to sum to one (Mixtral does, OLMoE and open_lm do not)."""

    capacity_factor: Annotated[float, arg(name="moe-capacity-factor")] = 1.25
    """An expert takes at most int(factor * k * T / E) of T tokens, first come first served; 0: dropless."""

    loss_weight: Annotated[float, arg(name="moe-loss-weight")] = 0.1
    """Weight of the load-balancing loss: mean over MoE layers and micro-batches of E * sum(f * P)."""

    z_loss_weight: Annotated[float, arg(name="moe-z-loss-weight")] = 0.0
    """Weight of the router z-loss: mean over MoE layers and tokens of logsumexp(router logits) squared."""

    ffn_type: Annotated[Literal["gelu", "swiglu"], arg(name="moe-ffn-type")] = "gelu"
    """What an expert is: an ungated tanh-GELU MLP, or SwiGLU."""

    hidden_dim: Annotated[int | None, arg(name="moe-hidden-dim")] = None
    """Width of an expert. Default: 4d for gelu, 256*ceil(int(8d/3)/256) for swiglu."""

    init: Annotated[Literal["open_lm", "scaled"], arg(name="moe-init")] = "open_lm"
    """Expert initialisation: N(0, .02) as open_lm, or scaled by fan-in and depth as its dense layers."""

    backend: Annotated[Literal["auto", "reference", "grouped_mm"], arg(name="moe-backend")] = "auto"
    """Expert computation: `reference` loops over experts, `grouped_mm` is one grouped matrix product."""
