"""Inputs that a test and the script that stored a peer's outputs both make, by formula and not by a generator."""

import math
from typing import NamedTuple

import torch
from torch import Tensor


def wave(*shape: int, phase: float, scale: float = 1.0) -> Tensor:
    """float32 numbers without ties, of about normal size: sin(phase + 12.9898 i) times sqrt(2) times scale."""
    steps = torch.arange(math.prod(shape), dtype=torch.float64)
    return (scale * math.sqrt(2) * torch.sin(phase + 12.9898 * steps)).float().reshape(shape)


class StMoECase(NamedTuple):
    sequences: int
    length: int
    k: int = 2
    experts: int = 4
    dim: int = 6
    factor: float = 1.25  # st-moe-pytorch's, without K
    threshold: float = 0.7
    training: bool = True
    differentiable: bool = False


ST_MOE = {
    "top_2": StMoECase(1, 24),
    "top_2_full_experts": StMoECase(1, 24, factor=0.7),
    "top_3_two_sequences": StMoECase(2, 20, k=3, experts=5, factor=1.5),
    "top_2_evaluation": StMoECase(2, 20, factor=1.0, training=False),
    "smallest_capacity": StMoECase(2, 7, experts=8, factor=0.5),
    "coordinate_descent": StMoECase(1, 24, differentiable=True),
    "coordinate_descent_evaluation": StMoECase(2, 20, k=3, differentiable=True, training=False),
}


def st_moe_inputs(case: StMoECase) -> dict[str, Tensor]:
    """x (B, S, D), slope alike, draw (B, S, K), gate (E, D), and each expert's weights in torch's orientation."""
    B, S, D, E = case.sequences, case.length, case.dim, case.experts
    F = int(D * 4 * 2 / 3)
    steps = torch.arange(B * S * case.k, dtype=torch.float64)
    return {
        "x": wave(B, S, D, phase=1.0),
        "slope": wave(B, S, D, phase=2.0),
        "draw": (steps * 0.6180339887).frac().float().reshape(B, S, case.k),
        "gate": wave(E, D, phase=3.0, scale=0.8),
        "in": wave(E, 2 * F, D, phase=4.0, scale=D**-0.5),
        "in_bias": wave(E, 2 * F, phase=5.0, scale=0.1),
        "between": 1 + wave(E, F, phase=6.0, scale=0.1),
        "out": wave(E, D, F, phase=7.0, scale=F**-0.5),
        "out_bias": wave(E, D, phase=8.0, scale=0.1),
    }


def megatron_logits(tokens: int, experts: int) -> Tensor:
    """Router logits with experts that are more popular than others."""
    return wave(tokens, experts, phase=0.3) + torch.linspace(1, -1, experts)
