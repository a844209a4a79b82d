"""What a run says of its MoE layers before its first step."""

from open_lm.config.moe import MoEConfig
from open_lm.config.moe_check import sees_later_tokens
from open_lm.moe.backends import resolve


def notes(moe: MoEConfig) -> list[str]:
    """A sentence for each reason why a token sees later ones, and for what flags that were left out stand for."""
    if not moe.enabled:
        return []
    said = sees_later_tokens(moe)
    if moe.backend == "auto":
        said.append(f"--moe-backend auto: {resolve('auto')}")
    if moe.balance is None and not moe.balances:
        said.append(f"--moe-balance none: --moe-router {moe.router} needs no balancing")
    return said
