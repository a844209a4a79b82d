"""Which layers of a Transformer are mixtures of experts."""

from open_lm.config.model import ModelConfig


def moe_layers(config: ModelConfig) -> tuple[int, ...]:
    """The layers N whose FFN is an MoE: N % moe.freq == 0 (open_lm); none when freq is 0."""
    freq = config.moe.freq
    return tuple(layer for layer in range(config.n_layers) if freq > 0 and layer % freq == 0)
