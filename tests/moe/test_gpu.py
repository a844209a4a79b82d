"""The layer on a GPU: backends agree in every precision, nothing waits for the host, runs repeat bit by bit."""

import pytest
import torch

from open_lm.config.moe import MoEConfig
from open_lm.moe.backends.grouped_mm import add_bias
from open_lm.moe.experts import EXPERTS
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


MEGABLOCKS = {
    "dropless": {"capacity_factor": 0.0},
    "drops": {"capacity_factor": 0.5},
    "input weights": {"capacity_factor": 0.5, "straight_through": True},
    "padded": {"capacity_factor": 0.8, "pad_to_capacity": True},
    "one choice": {"capacity_factor": 0.0, "top_k": 1},
}


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("options", MEGABLOCKS.values(), ids=list(MEGABLOCKS))
@pytest.mark.parametrize("ffn_type", list(EXPERTS))
@pytest.mark.parametrize("expert_bias", [False, True], ids=["", "biases"])
@pytest.mark.parametrize("tokens", [0, 3, 1000])
def test_megablocks_is_the_reference(autocast, options, ffn_type, expert_bias, tokens):
    """In bfloat16 to 1e-2 of the float32 loop, output and every gradient; three tokens leave experts idle."""
    pytest.importorskip("megablocks")
    pytest.importorskip("grouped_gemm")
    if tokens != 1000 and ffn_type not in ("gelu", "swiglu"):
        pytest.skip("few tokens for two kinds alone")

    def layer_of(backend: str) -> MoE:
        config = MoEConfig(
            dim=72, num_experts=8, hidden_dim=100, ffn_type=ffn_type, expert_bias=expert_bias, backend=backend,
            **options,
        )  # fmt: skip
        layer = MoE(config)
        torch.manual_seed(0)
        for parameter in layer.parameters():
            parameter.data = parameter.data.normal_(std=72**-0.5).bfloat16().float()
        return layer.cuda()

    x = x_of(tokens).bfloat16().float()
    wanted, ours = run(layer_of("reference"), x), layer_of("megablocks")
    if autocast:
        ours.forward = torch.autocast("cuda", dtype=torch.bfloat16)(ours.forward)
        found = run(ours, x)
    else:
        found = run(ours.bfloat16(), x.bfloat16())
    names = ["y", "x", *(name for name, _ in ours.named_parameters())]
    for name, a, b in zip(names, found, wanted, strict=True):
        # relu's slope jumps at 0: where rounding changes the sign, 16 bits have another gradient (1.26e-2 was seen)
        tolerance = 2e-2 if ffn_type in ("relu", "reglu") else 1e-2
        assert (a.float() - b).norm() <= tolerance * b.norm() + 1e-30, name


def test_megablocks_in_other_dtypes_and_inside_a_compiled_function():
    pytest.importorskip("megablocks")
    pytest.importorskip("grouped_gemm")
    layer, x = make_layer("megablocks", 0.0), x_of(100)
    with pytest.raises(ValueError, match=r"computes in bfloat16 on a GPU, not in torch.float32"):
        layer(x)
    layer = layer.bfloat16()
    wanted = run(layer, x.bfloat16())
    layer.compile()
    assert_near(run(layer, x.bfloat16()), wanted, 3e-2)


def test_gradients_of_biases_do_not_add_in_16_bits():
    """20,000 rows of 1: in bfloat16, one after the other, they would come to 256."""
    end_E = torch.tensor([20000], dtype=torch.int32, device="cuda")
    c_EF = torch.zeros(1, 8, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    y_RF = torch.zeros(20000, 8, dtype=torch.bfloat16, device="cuda")
    add_bias(y_RF, c_EF, torch.zeros(20000, dtype=torch.int64, device="cuda"), end_E).sum().backward()
    assert c_EF.grad is not None
    assert (c_EF.grad - 20000).abs().max() <= 64


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(
    "options", [{"capacity_factor": 0.8, "pad_to_capacity": True}, {"capacity_factor": 0.0}]
)
def test_biases_and_padding_are_the_reference(dtype, options):
    def layer_of(backend: str) -> MoE:
        layer = MoE(
            MoEConfig(dim=72, num_experts=8, hidden_dim=100, expert_bias=True, backend=backend, **options)  # type: ignore[arg-type]
        )
        torch.manual_seed(0)
        for parameter in layer.parameters():
            parameter.data = parameter.data.normal_(std=72**-0.5).bfloat16().half().float()
        return layer.cuda()

    x = x_of(1000)
    assert_near(
        run(layer_of("grouped_mm").to(dtype), x.to(dtype)), run(layer_of("reference"), x), TOLERANCES[dtype]
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_per_sample_gradients(dtype):
    """torch does bfloat16's product sample by sample there, with a warning."""
    layer = make_layer("grouped_mm", 0.0).to(dtype)
    x_NTD = x_of(4 * 50).view(4, 50, 72).to(dtype)
    parameters = dict(layer.named_parameters())

    def loss(parameters, x_TD):
        y, stats = torch.func.functional_call(layer, parameters, (x_TD,))
        return y.float().square().sum() + stats.loss

    ours = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x_NTD)
    for n in range(4):
        wanted = torch.func.grad(loss)(parameters, x_NTD[n])
        names = list(parameters)
        assert_near([ours[k][n] for k in names], [wanted[k] for k in names], TOLERANCES[dtype])


TRITON = {
    "dropless": {},
    "biases": {"expert_bias": True},
    "drops": {"capacity_factor": 0.5, "expert_bias": True},
    "input weights": {"capacity_factor": 0.5, "straight_through": True},
    "padded": {"capacity_factor": 0.8, "pad_to_capacity": True},
    "odd widths": {"dim": 33, "hidden_dim": 50, "expert_bias": True},
    "wide": {"dim": 512, "hidden_dim": 1152},
    "many experts": {"num_experts": 512, "top_k": 16},
    "recomputed": {"recompute": True},
}
TRITON_TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def layer_of(backend: str, **options) -> MoE:
    """Weights exact in 16 bits, so that all precisions choose the same experts."""
    config = {"dim": 72, "hidden_dim": 100, "num_experts": 8, "capacity_factor": 0.0} | options
    layer = MoE(MoEConfig(backend=backend, **config))  # type: ignore[arg-type]
    torch.manual_seed(0)
    for parameter in layer.parameters():
        parameter.data = parameter.data.normal_(std=config["dim"] ** -0.5).bfloat16().half().float()
    return layer.cuda()


def gradients(layer: MoE, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The output and every gradient, for a gradient of y that does not depend on y's rounding."""
    x = x.detach().clone().requires_grad_()
    layer.zero_grad(set_to_none=True)
    y, stats = layer(x)
    g = torch.linspace(-1, 1, y.numel(), device="cuda").view_as(y).bfloat16().half().to(y.dtype)
    torch.autograd.backward([y, stats.loss], [g, None])
    assert x.grad is not None
    return {"y": y.detach(), "x": x.grad} | {
        n: p.grad for n, p in layer.named_parameters() if p.grad is not None
    }


@pytest.mark.parametrize("dtype", TRITON_TOLERANCES)
@pytest.mark.parametrize("options", TRITON.values(), ids=list(TRITON))
@pytest.mark.parametrize("ffn_type", ["gelu", "swiglu"])
@pytest.mark.parametrize("tokens", [3, 1000])
def test_triton_is_the_reference(dtype, options, ffn_type, tokens):
    """Output and every gradient, beside the loop in float64; three tokens leave experts idle."""
    options = options | {"ffn_type": ffn_type}
    x = x_of(tokens, options.get("dim", 72))
    wanted = gradients(layer_of("reference", **options | {"recompute": False}).double(), x.double())
    found = gradients(layer_of("triton", **options).to(dtype), x.to(dtype))
    assert found.keys() == wanted.keys()
    for name, a in found.items():
        error = (a.double() - wanted[name]).norm()
        assert error <= TRITON_TOLERANCES[dtype] * wanted[name].norm() + 1e-30, name


@pytest.mark.parametrize("ffn_type", list(EXPERTS))
def test_every_kind_of_expert_in_triton(ffn_type):
    x = x_of(500)
    wanted = gradients(layer_of("reference", ffn_type=ffn_type).double(), x.double())
    found = gradients(layer_of("triton", ffn_type=ffn_type).bfloat16(), x.bfloat16())
    for name, a in found.items():
        # relu's slope jumps at 0: where rounding changes the sign, 16 bits have another gradient
        tolerance = 2e-2 if ffn_type in ("relu", "reglu") else 1e-2
        assert (a.double() - wanted[name]).norm() <= tolerance * wanted[name].norm(), name


@pytest.mark.parametrize("ffn_type", ["gelu", "swiglu"])
def test_triton_compiled_and_as_a_cuda_graph(ffn_type):
    """One graph of torch's compiler, one CUDA graph, no wait for the host, the same bits in every run."""
    layer = layer_of("triton", ffn_type=ffn_type, capacity_factor=1.25)
    x = x_of(4096)
    wanted = gradients(layer_of("reference", ffn_type=ffn_type, capacity_factor=1.25), x)
    layer.compile(fullgraph=True)
    x_in = x.clone().requires_grad_()

    def step() -> dict[str, torch.Tensor]:
        x_in.grad = None
        layer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            y, stats = layer(x_in)
        g = torch.linspace(-1, 1, y.numel(), device="cuda").view_as(y).to(y.dtype)
        torch.autograd.backward([y, stats.loss], [g, None])
        return {"y": y.detach(), "x": x_in.grad} | {n: p.grad for n, p in layer.named_parameters()}

    def copy(found):
        return {name: a.clone() for name, a in found.items()}

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
        first = copy(step())
        torch.cuda.synchronize()
        try:
            torch.cuda.set_sync_debug_mode("error")
            second = step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        second = copy(second)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = step()
    graph.replay()
    torch.cuda.synchronize()
    for name, a in first.items():
        assert torch.equal(a, second[name]), name
        assert torch.equal(a, replayed[name]), name
        if (
            name != "router.layer.weight"
        ):  # close scores of the loop's float32 input choose others here and there
            assert (a.double() - wanted[name].double()).norm() <= 2e-2 * wanted[name].double().norm(), name


def test_the_router_in_bfloat16_is_as_exact_as_in_float32():
    layer, x = layer_of("triton"), x_of(1000).bfloat16().requires_grad_()
    logits = layer.router(x[0])
    g = torch.randn_like(logits)
    logits.backward(g)
    x64 = x.detach()[0].double()
    weight = layer.router.layer.weight
    assert weight.grad is not None
    assert x.grad is not None
    assert (logits - x64 @ weight.double().t()).norm() <= 1e-6 * logits.norm()
    assert (weight.grad - g.double().t() @ x64).norm() <= 1e-6 * weight.grad.norm()
    assert (x.grad[0] - g.double() @ weight.double()).norm() <= 4e-3 * x.grad.float().norm()
