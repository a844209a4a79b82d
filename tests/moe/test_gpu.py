"""The layer on a GPU: backends agree in every precision, nothing waits for the host, runs repeat bit by bit."""

import pytest
import torch

from open_lm.config.moe import MoEConfig
from open_lm.moe.layer import MoE

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    # torch's compiler and its sync detector warn about themselves.
    pytest.mark.filterwarnings("default"),
]


def make_layer(backend: str, factor: float, ffn_type="swiglu", dim=72, hidden_dim=100) -> MoE:
    """Weights and inputs are exact in 16 bits, so that all precisions choose the same experts."""
    moe = MoEConfig(
        dim=dim,
        num_experts=8,
        capacity_factor=factor,
        ffn_type=ffn_type,  # type: ignore[arg-type]
        hidden_dim=hidden_dim,
        backend=backend,  # type: ignore[arg-type]
    )
    layer = MoE(moe)
    torch.manual_seed(0)
    for parameter in layer.parameters():
        parameter.data = (parameter.data.normal_(std=dim**-0.5)).bfloat16().half().float()
    return layer.cuda()


def run(layer, x: torch.Tensor) -> list[torch.Tensor]:
    x = x.detach().clone().requires_grad_()
    for parameter in layer.parameters():
        parameter.grad = None
    y, stats = layer(x)
    (y.float().square().sum() + stats.loss).backward()
    found = [y.detach(), x.grad, *(parameter.grad for parameter in layer.parameters())]
    assert all(part is not None and part.isfinite().all() for part in found)
    return [part.clone() for part in found]


def x_of(tokens: int, dim=72) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(1, tokens, dim).bfloat16().half().float().cuda()


def assert_near(ours: list[torch.Tensor], wanted: list[torch.Tensor], tolerance: float):
    for a, b in zip(ours, wanted, strict=True):
        assert (a.float() - b.float()).norm() <= tolerance * b.float().norm() + 1e-30


TOLERANCES = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("ffn_type", ["gelu", "swiglu"])
@pytest.mark.parametrize("factor", [0.0, 0.5])
@pytest.mark.parametrize("tokens", [0, 1, 1000])
@pytest.mark.parametrize("compiled", [False, True])
def test_grouped_mm_is_the_reference(dtype, ffn_type, factor, tokens, compiled):
    if compiled and (tokens < 1000 or ffn_type == "gelu"):
        pytest.skip("compiled for swiglu and full batches alone: each compilation takes long")
    x = x_of(tokens)
    wanted = run(make_layer("reference", factor, ffn_type), x)
    layer = make_layer("grouped_mm", factor, ffn_type).to(dtype)
    if compiled:
        layer.compile(fullgraph=True)
    assert_near(run(layer, x.to(dtype)), wanted, TOLERANCES[dtype])


def test_an_expert_without_tokens_has_a_zero_gradient():
    layer = make_layer("grouped_mm", 0.0).bfloat16()
    x = x_of(3).bfloat16()
    _, stats = layer(x)
    run(layer, x)
    idle = stats.count_E == 0
    assert idle.any()
    for weight in layer.experts.mlp.parameters():
        assert weight.grad is not None
        assert (weight.grad[idle] == 0).all()


@pytest.mark.parametrize("factor", [0.0, 1.25])
def test_bfloat16_does_not_wait_for_the_host_and_repeats(factor):
    layer = make_layer("grouped_mm", factor)
    x = x_of(4096)

    def step() -> list[torch.Tensor]:
        x_in = x.detach().clone().requires_grad_()
        layer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            y, stats = layer(x_in)
        (y.float().square().sum() + stats.loss).backward()
        assert x_in.grad is not None
        return [y.detach(), x_in.grad, *(p.grad.clone() for p in layer.parameters() if p.grad is not None)]

    first = step()
    try:
        torch.cuda.set_sync_debug_mode("error")
        second = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
