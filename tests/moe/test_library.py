"""The layer in somebody else's network: any shape, torch.func, compilation, recomputation, autocast, copies."""

import copy
import re
from pathlib import Path

import pytest
import torch
from torch.func import functional_call, grad, vmap
from torch.utils.checkpoint import checkpoint

from open_lm.moe import MoE, MoEConfig

D, E = 9, 5
BACKENDS = ["reference", "grouped_mm"]
OPTIONS = {
    "dropless": {"capacity_factor": 0.0},
    "normalized, swiglu, biases": {
        "capacity_factor": 0.0, "normalize_weights": True, "ffn_type": "swiglu", "expert_bias": True,
    },
    "sigmoid, groups, bias": {
        "capacity_factor": 0.0, "score": "sigmoid", "num_experts": 6, "num_groups": 3, "top_groups": 2,
        "balance": ("bias",), "loss_weight": 0.1, "z_loss_weight": 0.5,
    },
    "drops": {"capacity_factor": 0.6},
    "drops by weight": {"capacity_factor": 0.6, "drop_policy": "probs", "normalize_after_drops": True},
    "drops by choice, input weights": {"capacity_factor": 0.6, "drop_policy": "choice", "straight_through": True},
    "padded": {"capacity_factor": 0.8, "pad_to_capacity": True, "expert_bias": True},
    "threshold": {"router": "threshold", "capacity_factor": 0.6, "threshold": 1e-6},
    "shared, residual": {"capacity_factor": 0.0, "shared_hidden_dim": 4, "shared_mix": "gate", "residual": True},
}  # fmt: skip
CASES = pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
# torch says once that its vmap of searchsorted makes a copy.
VMAP = pytest.mark.filterwarnings("ignore:torch.searchsorted.*non-contiguous")
# torch's compiler uses what torch itself deprecates.
COMPILES = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def make_layer(**options) -> MoE:
    torch.manual_seed(0)
    layer = MoE(MoEConfig(dim=D, hidden_dim=7, **({"num_experts": E} | options)))
    for parameter in layer.parameters():
        parameter.data.normal_(std=D**-0.5)
    return layer


def objective(output) -> torch.Tensor:
    y, stats = output
    return y.float().square().sum() + stats.loss


def gradients(layer: MoE, call=None, x=None) -> dict[str, torch.Tensor]:
    """Of the objective, by ordinary autograd."""
    layer.zero_grad()
    objective((layer if call is None else call)(x)).backward()
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in layer.named_parameters()
    }


def assert_close(ours: dict, wanted: dict, **tolerances):
    assert ours.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(ours[name], wanted[name], **({"atol": 1e-5, "rtol": 1e-5} | tolerances))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(), (7,), (2, 3), (2, 3, 4), (1, 2, 1, 3), (0,), (2, 0), (0, 3)])
def test_any_leading_shape(backend, shape):
    layer = make_layer(backend=backend, capacity_factor=0.0)
    x = torch.randn(*shape, D)
    y, stats = layer(x)
    assert y.shape == x.shape
    assert stats.tokens == x[..., 0].numel()
    by_token = [layer(token)[0] for token in x.reshape(-1, D)]
    if by_token:
        torch.testing.assert_close(y.reshape(-1, D), torch.stack(by_token), atol=1e-5, rtol=1e-5)
    objective((y, stats)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


@CASES
@pytest.mark.parametrize("backend", BACKENDS)
def test_functional_call_and_grad(backend, options):
    layer, x_TD = make_layer(backend=backend, **options), torch.randn(11, D)
    parameters = dict(layer.named_parameters())
    ours = grad(lambda p: objective(functional_call(layer, p, (x_TD,))))(parameters)
    assert_close(ours, gradients(layer, x=x_TD))


@VMAP
@CASES
def test_per_sample_gradients(options):
    layer, x_NTD = make_layer(**options), torch.randn(4, 11, D)

    def loss(parameters, x_TD):
        return objective(functional_call(layer, parameters, (x_TD,)))

    ours = vmap(grad(loss), in_dims=(None, 0), randomness="different")(dict(layer.named_parameters()), x_NTD)
    for n, x_TD in enumerate(x_NTD):
        assert_close({name: g[n] for name, g in ours.items()}, gradients(layer, x=x_TD))


@VMAP
@CASES
@pytest.mark.parametrize("in_dim", [None, 0], ids=["one input", "an input each"])
def test_an_ensemble_of_layers(options, in_dim):
    layers = [make_layer(**options) for _ in range(3)]
    for layer, scale in zip(layers, (1.0, 0.5, -1.0), strict=True):
        for parameter in layer.parameters():
            parameter.data *= scale
    stacked = torch.func.stack_module_state(layers)[0]  # type: ignore[arg-type]
    x = torch.randn(11, D) if in_dim is None else torch.randn(3, 11, D)

    def loss(parameters, x_TD):
        return objective(functional_call(layers[0], parameters, (x_TD,)))

    ours = vmap(grad(loss), in_dims=(0, in_dim), randomness="different")(stacked, x)
    for n, layer in enumerate(layers):
        wanted = gradients(layer, x=x if in_dim is None else x[n])
        assert_close({name: g[n] for name, g in ours.items()}, wanted)


def test_the_reference_refuses_vmap():
    """It reads the number of each expert's rows on the host."""
    layer = make_layer(backend="reference", capacity_factor=0.0)
    with pytest.raises(RuntimeError):
        vmap(lambda x_TD: layer(x_TD)[0])(torch.randn(4, 11, D))


@VMAP
def test_a_gradient_through_vmap_and_per_sample_gradients_in_bfloat16():
    layer, x_NTD = make_layer(capacity_factor=0.0, expert_bias=True), torch.randn(4, 11, D)
    parameters = dict(layer.named_parameters())

    def loss(parameters, x_TD):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return objective(functional_call(layer, parameters, (x_TD,)))

    def of_all(parameters):
        return vmap(loss, in_dims=(None, 0))(parameters, x_NTD).sum()

    each = vmap(grad(loss), in_dims=(None, 0))(parameters, x_NTD)
    wanted = [grad(loss)(parameters, x_TD) for x_TD in x_NTD]
    for n in range(4):
        assert_close({name: g[n] for name, g in each.items()}, wanted[n], atol=1e-2, rtol=1e-2)
    total = {name: sum(g[name] for g in wanted) for name in parameters}
    assert_close(grad(of_all)(parameters), total, atol=3e-2, rtol=2e-2)


def test_second_derivatives():
    layer = make_layer(capacity_factor=0.6, ffn_type="geglu", expert_bias=True).double()
    x_TD = torch.randn(6, D, dtype=torch.float64, requires_grad=True)
    weights = [p for name, p in layer.named_parameters() if name.startswith("experts.mlp")]
    with torch.no_grad():
        layer.router.layer.weight.zero_()[:, 0] = torch.arange(E)  # what is in float32 does not depend on x

    def function(x_TD, *_):
        return layer(torch.cat([torch.ones_like(x_TD[:, :1]), x_TD[:, 1:]], dim=1))[0]

    assert torch.autograd.gradgradcheck(function, (x_TD, *weights), fast_mode=True)


@COMPILES
@CASES
def test_compiles_as_one_graph_with_its_loss(options):
    layer = make_layer(**options)
    x_BSD = torch.randn(2, 8, D)
    wanted = gradients(layer, x=x_BSD)
    torch._dynamo.reset()
    # This backend traces, decomposes and partitions as the default one does, but needs no C++ compiler.
    compiled = torch.compile(layer, backend="aot_eager_decomp_partition", fullgraph=True)
    assert_close(gradients(layer, compiled, x_BSD), wanted)


@CASES
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recomputation(options, use_reentrant):
    layer = make_layer(**options)
    x_BSD = torch.randn(2, 8, D, requires_grad=True)
    wanted = gradients(layer, x=x_BSD)
    # torch's reentrant form passes gradients through a flat tuple of tensors alone
    y, loss = checkpoint(  # type: ignore[misc]
        lambda x: (lambda y, stats: (y, stats.loss))(*layer(x)), x_BSD, use_reentrant=use_reentrant
    )
    layer.zero_grad()
    (y.square().sum() + loss).backward()
    for name, parameter in layer.named_parameters():
        found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        assert torch.equal(found, wanted[name]), name


@CASES
def test_bfloat16_autocast(options):
    layer, x_BSD = make_layer(**options), torch.randn(2, 8, D)
    wanted = gradients(layer, x=x_BSD)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, stats = layer(x_BSD)
        assert y.dtype == torch.bfloat16
        assert stats.loss.dtype == torch.float32
        ours = gradients(layer, x=x_BSD)
    for name in wanted:
        assert ours[name].dtype == torch.float32
        assert (ours[name] - wanted[name]).norm() <= 3e-2 * wanted[name].norm(), name


@CASES
def test_copies_and_state_dicts(options):
    layer, x_TD = make_layer(**options), torch.randn(11, D)
    twin = copy.deepcopy(layer)
    other = MoE(layer.config)
    other.load_state_dict(layer.state_dict(), strict=True)
    for same in (twin, other):
        assert torch.equal(same(x_TD)[0], layer(x_TD)[0])
    with torch.no_grad():
        twin.experts.mlp.w1.add_(1.0)
    assert not torch.equal(twin(x_TD)[0], layer(x_TD)[0])


def test_nothing_is_kept_from_one_call_to_the_next():
    layer, (a_TD, b_TD) = make_layer(capacity_factor=0.0), torch.randn(2, 11, D)
    wanted = gradients(layer, x=a_TD)
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    first, second = layer(a_TD), layer(b_TD)
    layer.zero_grad()
    objective(first).backward()
    assert_close({name: p.grad for name, p in layer.named_parameters()}, wanted)
    assert second[1].loss.grad_fn is not None
    assert all(torch.equal(value, state[name]) for name, value in layer.state_dict().items())


def test_the_snippet_of_the_documentation():
    text = (Path(__file__).parents[2] / "MOE.md").read_text(encoding="utf-8")
    section = text.split("## Use the layer in your own network")[1].split("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    scope = {}
    exec(code, scope)
    network, share_E = scope["network"], scope["share_E"]
    assert all(p.grad is not None and p.grad.any() for p in network.parameters())
    assert len(share_E) == 8
    assert torch.isclose(share_E.sum(), torch.tensor(1.0))
