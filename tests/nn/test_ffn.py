"""FFNs against their formulas with plain matrices; shapes from open_lm's model table."""

from dataclasses import replace

import pytest
import torch

from open_lm.config import ModelConfig
from open_lm.nn.ffn import FFNS

CONFIG = ModelConfig(dim=488, n_layers=1, n_heads=12, seq_len=8, vocab_size=8)
SWIGLU = {"w12.weight": (2 * 1536, 488), "w3.weight": (488, 1536)}  # int(8 * 488 / 3) = 1301 → 1536
SHAPES = {
    "swiglu": SWIGLU,
    "swiglu_torch": SWIGLU,
    "gelu": {"0.weight": (1952, 488), "2.weight": (488, 1952)},
    "gelu_tanh": {"0.weight": (1952, 488), "2.weight": (488, 1952)},
    "gemma_geglu": {
        "gate_proj.weight": (1536, 488),
        "gate_proj.bias": (1536,),
        "up_proj.weight": (1536, 488),
        "up_proj.bias": (1536,),
        "down_proj.weight": (488, 1536),
        "down_proj.bias": (488,),
    },
}


def gelu(x):
    return x * 0.5 * (1 + torch.erf(x / 2**0.5))


def gelu_tanh(x):
    return x * 0.5 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


def swiglu(x, p):
    gate, up = x @ p["w12.weight"][:1536].T, x @ p["w12.weight"][1536:].T
    return (gate * torch.sigmoid(gate) * up) @ p["w3.weight"].T


def geglu(x, p):
    gate = x @ p["gate_proj.weight"].T + p["gate_proj.bias"]
    up = x @ p["up_proj.weight"].T + p["up_proj.bias"]
    return (gelu(gate) * up) @ p["down_proj.weight"].T + p["down_proj.bias"]


FORMULAS = {
    "swiglu": swiglu,
    "swiglu_torch": swiglu,
    "gelu": lambda x, p: gelu(x @ p["0.weight"].T) @ p["2.weight"].T,
    "gelu_tanh": lambda x, p: gelu_tanh(x @ p["0.weight"].T) @ p["2.weight"].T,
    "gemma_geglu": geglu,
}


@pytest.mark.parametrize("name", FFNS)
def test_formula(name):
    torch.manual_seed(0)
    ffn = FFNS[name](CONFIG).double()
    parameters = dict(ffn.named_parameters())
    assert {n: tuple(p.shape) for n, p in parameters.items()} == SHAPES[name]
    x = torch.randn(3, 488, dtype=torch.float64)
    torch.testing.assert_close(ffn(x), FORMULAS[name](x, parameters))


@pytest.mark.parametrize("name", FFNS)
def test_width_and_biases_of_its_own(name):
    """Zero weights leave what the last bias says; every width is the model's."""
    ffn = FFNS[name](replace(CONFIG, ffn_hidden_dim=40, ffn_bias=True))
    shapes = {n: tuple(p.shape) for n, p in ffn.named_parameters()}
    into, out = (
        ("w12", "w3") if "swiglu" in name else ("0", "2") if "gelu" in name else ("up_proj", "down_proj")
    )
    assert shapes[f"{into}.weight"] == ((80 if "swiglu" in name else 40), 488)
    assert shapes[f"{out}.weight"] == (488, 40)
    for parameter in ffn.parameters():
        torch.nn.init.zeros_(parameter)
    bias = torch.nn.init.normal_(ffn.get_parameter(f"{out}.bias"))
    assert torch.equal(ffn(torch.randn(3, 488)), bias.expand(3, -1))
