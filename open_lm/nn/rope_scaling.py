"""Rotary frequencies for texts longer than a model was trained on.

Shapes: K rotated width of a head, J = K / 2 rotation planes.
Each function takes the frequencies theta**(-2j / K), in radians per position, and returns those to use and what
cosines and sines are multiplied by.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from open_lm.config.model import ModelConfig


def keep(frequency_J: Tensor, config: ModelConfig) -> tuple[Tensor, float]:
    """The frequencies as they are."""
    return frequency_J, 1.0


def linear(frequency_J: Tensor, config: ModelConfig) -> tuple[Tensor, float]:
    """All divided by the factor: positions between the old ones (arXiv:2306.15595)."""
    return frequency_J / factor_of(config), 1.0


def llama3(frequency_J: Tensor, config: ModelConfig) -> tuple[Tensor, float]:
    """Divided where the original length holds few turns, kept where it holds many (Llama 3.1's own code)."""
    low, high = config.rope_llama3_low_freq, config.rope_llama3_high_freq
    kept_J = ((turns(frequency_J, config) - low) / (high - low)).clamp(0, 1)
    return mix(frequency_J, kept_J, config), 1.0


def yarn(frequency_J: Tensor, config: ModelConfig) -> tuple[Tensor, float]:
    """Divided and kept by a ramp over the planes, and a temperature of the scores (arXiv:2309.00071).

    The factor of cosines and sines is DeepSeek's: what `rope_yarn_mscale_all_dim` adds to all scores
    (`score_factor`) is taken out of it.
    """
    planes = len(frequency_J)
    first = max(math.floor(plane_of(config.rope_yarn_beta_fast, config)), 0)
    last = min(math.ceil(plane_of(config.rope_yarn_beta_slow, config)), 2 * planes - 1)
    plane_J = torch.arange(planes, device=frequency_J.device, dtype=torch.float32)
    kept_J = 1 - ((plane_J - first) / max(last - first, 1e-3)).clamp(0, 1)
    magnitude = temperature(config.rope_yarn_mscale, config)
    return mix(frequency_J, kept_J, config), magnitude / temperature(config.rope_yarn_mscale_all_dim, config)


def score_factor(config: ModelConfig) -> float:
    """What latent attention multiplies all its scores by (DeepSeek-V2, arXiv:2405.04434, and its own code)."""
    return temperature(config.rope_yarn_mscale_all_dim, config) ** 2 if config.rope_scaling == "yarn" else 1.0


def temperature(mscale: float, config: ModelConfig) -> float:
    """0.1 * mscale * ln(factor) + 1: root of what YaRN multiplies scores by."""
    return 0.1 * mscale * math.log(max(factor_of(config), 1)) + 1


def turns(frequency_J: Tensor, config: ModelConfig) -> Tensor:
    """How often each plane turns around within the original length."""
    assert config.rope_original_seq_len is not None
    return config.rope_original_seq_len * frequency_J / (2 * math.pi)


def plane_of(number_of_turns: float, config: ModelConfig) -> float:
    """The plane, not rounded, that turns so often within the original length."""
    assert config.rope_original_seq_len is not None
    wavelength = config.rope_original_seq_len / number_of_turns
    return config.rotary_dim * math.log(wavelength / (2 * math.pi)) / (2 * math.log(config.rope_theta))


def mix(frequency_J: Tensor, kept_J: Tensor, config: ModelConfig) -> Tensor:
    """A share kept_J of each frequency, the rest of it divided by the factor."""
    return kept_J * frequency_J + (1 - kept_J) * frequency_J / factor_of(config)


def factor_of(config: ModelConfig) -> float:
    assert config.rope_scaling_factor is not None
    return config.rope_scaling_factor


# --rope-scaling → (frequency_J, config) → (frequency_J, factor of cosines and sines)
SCALINGS: dict[str, Callable[[Tensor, ModelConfig], tuple[Tensor, float]]] = {
    "none": keep,
    "linear": linear,
    "llama3": llama3,
    "yarn": yarn,
}
