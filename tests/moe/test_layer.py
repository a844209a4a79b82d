"""The whole layer: every backend against a dense definition, and what must hold for any input."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from open_lm.config.moe import MoEConfig
from open_lm.moe.capacity import capacity, drop_by
from open_lm.moe.layer import MoE
from open_lm.moe.routers import top_k
from open_lm.moe.routing import Context


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


BACKENDS = ["reference", "grouped_mm"]


def make_layer(*, dim=9, hidden_dim=7, backend="grouped_mm", seed=0, **options) -> MoE:
    """A layer whose outputs, logits and gradients are all of order one. Odd widths need padding."""
    moe = MoEConfig(dim=dim, hidden_dim=hidden_dim, backend=backend, **({"num_experts": 5} | options))
    layer = MoE(moe)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in layer.named_parameters():
        fan_in = {"experts.mlp.w2": hidden_dim, "experts.bias": 1}.get(name, dim)
        parameter.data.normal_(std=fan_in**-0.5, generator=generator)
    return layer


def dense_definition(layer: MoE, x_TD: torch.Tensor) -> torch.Tensor:
    """Every expert on every token, times a mask of weights made assignment by assignment."""
    config, mlp = layer.config, layer.experts.mlp
    p_TE = (x_TD @ layer.router.layer.weight.T).softmax(-1)
    chosen_TK = p_TE.topk(config.top_k).indices
    limit = int(config.capacity_factor * config.top_k * len(x_TD) / p_TE.shape[1]) or len(x_TD)
    mask_TE = torch.zeros_like(p_TE)
    for token, experts in enumerate(chosen_TK.tolist()):
        for expert in experts:
            if mask_TE[:, expert].sum() < limit:
                mask_TE[token, expert] = 1
    weight_TE = p_TE
    if config.normalize_weights:
        weight_TE = p_TE / p_TE.gather(1, chosen_TK).sum(1, keepdim=True)
    h_TEF = torch.einsum("td,edf->tef", x_TD, mlp.w1)
    if config.ffn_type == "swiglu":
        h_TEF = F.silu(h_TEF) * torch.einsum("td,edf->tef", x_TD, mlp.v1)
    else:
        h_TEF = F.gelu(h_TEF, approximate="tanh")
    return torch.einsum("tef,efd,te->td", h_TEF, mlp.w2, weight_TE * mask_TE) + layer.experts.bias


def gradients_of(layer: MoE, x: torch.Tensor, function) -> dict[str, torch.Tensor]:
    x = x.detach().clone().requires_grad_()
    layer.zero_grad()
    y = function(x)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    (y.float() * weights).sum().backward()
    found = {name: parameter.grad for name, parameter in layer.named_parameters()} | {"x": x.grad}
    assert all(gradient is not None for gradient in found.values())
    return {"y": y.detach()} | {name: gradient.clone() for name, gradient in found.items()}


def assert_all_close(ours: dict, wanted: dict, atol=1e-5, rtol=1e-5):
    assert ours.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(
            ours[name], wanted[name], atol=atol, rtol=rtol, msg=lambda m, n=name: f"{n}: {m}"
        )


GRID = list(
    itertools.product(
        BACKENDS,
        ["gelu", "swiglu"],
        [0.0, 1.25, 0.4],
        [(9, 7), (8, 16)],
        [(1, False), (2, False), (3, True)],
    )
)


@pytest.mark.parametrize(("backend", "ffn_type", "factor", "widths", "choice"), GRID)
def test_forward_and_gradients_are_the_dense_definition(backend, ffn_type, factor, widths, choice):
    layer = make_layer(
        dim=widths[0],
        hidden_dim=widths[1],
        backend=backend,
        ffn_type=ffn_type,
        capacity_factor=factor,
        top_k=choice[0],
        normalize_weights=choice[1],
    )
    x_BSD = torch.randn(3, 11, widths[0])
    ours = gradients_of(layer, x_BSD, lambda x: layer(x)[0])
    wanted = gradients_of(layer, x_BSD, lambda x: dense_definition(layer, x.flatten(0, 1)).view_as(x))
    assert_all_close(ours, wanted)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 4), (1, 1), (2, 3)])
@pytest.mark.parametrize("factor", [0.0, 1.25])
def test_few_tokens_and_idle_experts_give_every_parameter_a_finite_gradient(backend, shape, factor):
    layer = make_layer(backend=backend, ffn_type="swiglu", num_experts=16, capacity_factor=factor)
    x_BSD = torch.randn(*shape, 9, requires_grad=True)
    y_BSD, stats = layer(x_BSD)
    (y_BSD.square().sum() + stats.loss).backward()
    assert y_BSD.shape == x_BSD.shape
    for parameter in [*layer.parameters(), x_BSD]:
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()
    idle = stats.count_E == 0
    assert idle.any()
    for weight in layer.experts.mlp.parameters():
        assert weight.grad is not None
        assert (weight.grad[idle] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_tokens_to_one_expert(backend):
    layer = make_layer(backend=backend, top_k=1, capacity_factor=1.25)
    layer.router.layer.weight.data.zero_()[3, 0] = 10.0
    x_BSD = torch.randn(2, 10, 9).abs()
    ours = gradients_of(layer, x_BSD, lambda x: layer(x)[0])
    wanted = gradients_of(layer, x_BSD, lambda x: dense_definition(layer, x.flatten(0, 1)).view_as(x))
    assert_all_close(ours, wanted)
    _, stats = layer(x_BSD)
    assert stats.count_E.tolist() == [0, 0, 0, 20, 0]
    # Capacity int(1.25 * 20 / 5) = 5: the first five tokens are served, the others get the bias and no more.
    assert stats.dropped == 15
    passed_TD = ours["y"].flatten(0, 1)[5:]
    assert torch.equal(passed_TD, layer.experts.bias.detach().expand_as(passed_TD))
    assert (ours["x"].flatten(0, 1)[5:] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropless_is_independent_of_the_order_of_tokens(backend):
    layer = make_layer(backend=backend, ffn_type="swiglu", capacity_factor=0.0)
    x_BSD = torch.randn(1, 32, 9)
    order = torch.randperm(32)
    torch.testing.assert_close(layer(x_BSD)[0][:, order], layer(x_BSD[:, order])[0], atol=1e-6, rtol=1e-5)


def test_reference_gradients_in_double_precision():
    layer = make_layer(backend="reference", ffn_type="swiglu", dim=4, hidden_dim=3).double()
    routing = _routing_of(layer, torch.randn(6, 4))
    mlp = layer.experts.mlp
    x_TD = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    weight_R = routing.weight_R.detach().double().requires_grad_()

    def compute(x, w, *_):
        return layer.experts.compute(x, routing._replace(weight_R=w), mlp)

    assert torch.autograd.gradcheck(compute, (x_TD, weight_R, mlp.w1, mlp.v1, mlp.w2))


def _routing_of(layer: MoE, x_TD: torch.Tensor):
    logits_TE = x_TD @ layer.router.layer.weight.detach().T.float()
    return drop_by(top_k(logits_TE, layer.config, Context()), capacity(len(x_TD), layer.config))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [True, False])
def test_sixteen_bit_output_follows_linear_and_routing_stays_in_float32(backend, dtype, autocast):
    layer = make_layer(backend=backend, ffn_type="swiglu", capacity_factor=0.0, normalize_weights=True)
    exact = gradients_of(layer, x := torch.randn(2, 16, 9).to(dtype).float(), lambda x: layer(x)[0])
    linear = torch.nn.Linear(9, 9)
    if not autocast:
        for parameter in layer.parameters():  # so that 16 bits hold the same weights
            parameter.data = parameter.data.to(dtype).float()
        exact = gradients_of(layer, x, lambda x: layer(x)[0])
        layer, linear, x = layer.to(dtype), linear.to(dtype), x.to(dtype)
    with torch.autocast("cpu", dtype=dtype, enabled=autocast):
        y, stats = layer(x)
        assert y.dtype == linear(x).dtype == dtype
    assert stats.z_loss.dtype == stats.balance_loss.dtype == torch.float32

    def run(x):
        with torch.autocast("cpu", dtype=dtype, enabled=autocast):
            return layer(x)[0]

    low = gradients_of(layer, x, run)
    for name, wanted in exact.items():
        error = (low[name].float() - wanted).norm() / wanted.norm()
        assert error < {torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype], f"{name}: {error}"


def test_router_logits_ignore_autocast():
    layer = make_layer()
    x_TD = torch.randn(64, 9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits_TE = layer.router(x_TD)
    assert torch.equal(logits_TE, F.linear(x_TD, layer.router.layer.weight))


def test_parameter_names_and_shapes_are_open_lms():
    shapes = {name: tuple(p.shape) for name, p in make_layer(ffn_type="gelu").named_parameters()}
    assert shapes == {
        "router.layer.weight": (5, 9),
        "experts.bias": (9,),
        "experts.mlp.w1": (5, 9, 7),
        "experts.mlp.w2": (5, 7, 9),
    }
    layer = MoE(MoEConfig(dim=288, num_experts=2))
    assert layer.experts.mlp.w1.shape == (2, 288, 4 * 288)
    layer = MoE(MoEConfig(dim=288, num_experts=2, ffn_type="swiglu"))
    assert layer.experts.mlp.v1 is not None
    assert layer.experts.mlp.v1.shape == (2, 288, 768)


# torch's compiler uses what torch itself deprecates.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiles_as_one_graph(dtype):
    # This backend traces, decomposes and partitions as the default one does, but needs no C++ compiler.
    layer = make_layer(ffn_type="swiglu", capacity_factor=0.4).to(dtype)
    compiled = torch.compile(layer, backend="aot_eager_decomp_partition", fullgraph=True)
    x_BSD = torch.randn(2, 8, 9, dtype=dtype)
    wanted = gradients_of(layer, x_BSD, lambda x: layer(x)[0])
    assert_all_close(gradients_of(layer, x_BSD, lambda x: compiled(x)[0]), wanted)


def test_recomputation_gives_the_same_gradients():
    layer = make_layer(capacity_factor=0.4)
    x_BSD = torch.randn(2, 8, 9)
    wanted = gradients_of(layer, x_BSD, lambda x: layer(x)[0])
    recomputed = gradients_of(layer, x_BSD, lambda x: checkpoint(layer, x, use_reentrant=False)[0])  # type: ignore[index]
    for name in wanted:
        assert torch.equal(recomputed[name], wanted[name]), name
