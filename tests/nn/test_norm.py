"""Norms against their definitions in float64."""

import pytest
import torch
import torch.nn.functional as F

from open_lm.nn.norm import NORMS

EPS = 1e-2  # large, so that its place in the formula matters
PARAMETERS = {
    "default_layer_norm": {"weight", "bias"},
    "lp_layer_norm": {"weight", "bias"},
    "gain_only_lp_layer_norm": {"weight"},
    "gain_only_layer_norm": {"weight"},
    "no_wb_layer_norm": set(),
    "rms_norm": {"weight"},
}


def make_norm(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    norm = NORMS[name](24, EPS)
    for parameter in norm.parameters():
        torch.nn.init.normal_(parameter)
    return norm


def define(name: str, norm: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    x = x.double()
    if name != "rms_norm":
        x = x - x.mean(-1, keepdim=True)
    y = x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()
    parameters = dict(norm.named_parameters())
    return y * parameters.get("weight", torch.ones(24)) + parameters.get("bias", torch.zeros(24))


@pytest.mark.parametrize("name", NORMS)
def test_definition(name):
    norm = make_norm(name)
    assert {n for n, _ in norm.named_parameters()} == PARAMETERS[name]
    x = torch.randn(3, 5, 24) * 0.3 + 1
    torch.testing.assert_close(norm(x).double(), define(name, norm, x), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", NORMS)
def test_autocast_lowers_only_the_low_precision_norms(name):
    norm = make_norm(name)
    x = torch.randn(3, 24)
    with torch.autocast("cpu", torch.bfloat16):
        y = norm(x)
    if "lp" not in name:
        torch.testing.assert_close(y, norm(x))
        return
    parameters = [None if p is None else p.bfloat16() for p in (norm.weight, norm.bias)]
    torch.testing.assert_close(y, F.layer_norm(x.bfloat16(), (24,), *parameters, EPS), atol=0, rtol=0)


def test_rms_norm_rounds_before_the_gain():
    norm = make_norm("rms_norm")
    x = torch.randn(7, 24).bfloat16()
    normed = (define("rms_norm", NORMS["rms_norm"](24, EPS), x)).bfloat16()
    assert norm(x).dtype == torch.float32  # fp32 gain, as open_lm's
    torch.testing.assert_close(norm(x), normed * norm.weight, atol=1e-6, rtol=8e-3)


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights(name, dtype):
    norm = make_norm(name).to(dtype)
    x = torch.randn(3, 24).to(dtype)
    assert norm(x).dtype == dtype
    torch.testing.assert_close(norm(x).double(), define(name, norm, x), atol=3e-2, rtol=3e-2)
