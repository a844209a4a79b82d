"""Every backend is the loop over experts, for every kind of expert and option; what cannot run says so early."""

import itertools
import sys

import pytest
import torch

from open_lm.config.moe import MoEConfig
from open_lm.moe import backends
from open_lm.moe.backends import grouped_mm, megablocks, reference
from open_lm.moe.backends.grouped_mm import add_bias, multiply
from open_lm.moe.backends.megablocks import Kernels, compute
from open_lm.moe.experts import EXPERTS
from open_lm.moe.layer import MoE

E, D, WIDTH = 5, 9, 7


# MegaBlocks' kernels as its sources define them, without a GPU.
def gather(x_TD, index_R, expert_R, end_E, K):
    assert len(index_R) == len(expert_R) == len(x_TD) * K
    return x_TD[index_R.long() // K]


def scatter(y_RD, index_R, expert_R, weight_TK, end_E, K):
    weighted_RD = y_RD * weight_TK[index_R.long(), None]
    return torch.zeros_like(y_RD).index_copy(0, index_R.long(), weighted_RD).unflatten(0, (-1, K)).sum(dim=1)


def gmm(a_RD, b_EDF, size_E):
    assert size_E.dtype == torch.int64
    assert not size_E.is_cuda
    assert int(size_E.sum()) == len(a_RD), "rows outside of all groups are not written"
    return torch.cat([rows @ b for rows, b in zip(a_RD.split(size_E.tolist()), b_EDF, strict=True)])


def megablocks_without_gpu(x_TD, routing, mlp):
    return compute(x_TD, routing, mlp, Kernels(gather, scatter, gmm), x_TD.dtype)


def make_layer(compute, **options) -> MoE:
    layer = MoE(MoEConfig(dim=D, hidden_dim=WIDTH, num_experts=E, loss_weight=0.01, **options))
    torch.manual_seed(0)
    for parameter in layer.parameters():
        parameter.data.normal_(std=D**-0.5)
    layer.experts.compute = compute
    return layer


def run(layer: MoE, x: torch.Tensor) -> dict[str, torch.Tensor]:
    x = x.clone().requires_grad_()
    y, stats = layer(x)
    (y.square().sum() + stats.loss).backward()
    assert x.grad is not None
    gradients = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
    assert len(gradients) == len(list(layer.parameters()))
    return {"y": y.detach(), "x": x.grad} | gradients


def assert_near(ours: dict, wanted: dict, tolerance=1e-5):
    """Every output and gradient, by the norm of its error over its own norm."""
    for name in wanted:
        error = (ours[name] - wanted[name]).norm()
        assert error <= tolerance * wanted[name].norm(), f"{name}: {error} of {wanted[name].norm()}"


OPTIONS = {
    "dropless": {"capacity_factor": 0.0},
    "drops": {"capacity_factor": 0.5},
    "input weights": {"capacity_factor": 0.5, "straight_through": True, "drop_policy": "probs"},
    "padded": {"capacity_factor": 0.8, "pad_to_capacity": True},
    "padded input weights": {"capacity_factor": 0.8, "pad_to_capacity": True, "straight_through": True},
    "idle experts": {"capacity_factor": 0.0, "top_k": 1},
}


@pytest.mark.parametrize("compute", [grouped_mm, megablocks_without_gpu])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
@pytest.mark.parametrize("expert_bias", [False, True], ids=["", "biases"])
@pytest.mark.parametrize("kind", EXPERTS)
def test_backends_agree(compute, options, expert_bias, kind):
    torch.manual_seed(1)
    x_BSD = torch.randn(2, 10, D)
    if options.get("top_k") == 1:
        x_BSD = x_BSD[:, :1]  # two tokens, five experts
    options = options | {"ffn_type": kind, "expert_bias": expert_bias}
    wanted = run(make_layer(reference, **options), x_BSD)
    ours = run(make_layer(compute, **options), x_BSD)
    assert_near(ours, wanted)


@pytest.mark.parametrize("compute", [grouped_mm, megablocks_without_gpu])
def test_a_router_without_rows_per_token(compute):
    """As experts' choice: the Routing has no row_TK."""
    layer = make_layer(reference, capacity_factor=0.0, expert_bias=True)

    def through(x_TD, routing, mlp):
        routing = routing._replace(row_TK=None)
        return compute(x_TD, routing, mlp)

    x_TD = torch.randn(12, D)
    wanted = run(layer, x_TD)
    layer.zero_grad()
    layer.experts.compute = through
    ours = run(layer, x_TD)
    assert_near(ours, wanted)


@pytest.mark.parametrize("expert_bias", [False, True])
def test_padding_to_capacity_is_one_batched_product(expert_bias, monkeypatch):
    monkeypatch.setattr(sys.modules[grouped_mm.__module__], "multiply", None)
    options = {"capacity_factor": 0.8, "expert_bias": expert_bias, "ffn_type": "swiglu"}
    layer = make_layer(grouped_mm, pad_to_capacity=True, **options)
    x_BSD = torch.randn(2, 10, D)
    ours, wanted = run(layer, x_BSD), run(make_layer(reference, **options), x_BSD)
    assert_near(ours, wanted)


def test_double_precision():
    """grouped_mm has no float64 in torch: its loop agrees with the reference far below float32's resolution."""
    x_TD = torch.randn(20, D, dtype=torch.float64)
    options = {"capacity_factor": 0.0, "ffn_type": "swiglu", "expert_bias": True}
    wanted, ours = (run(make_layer(compute, **options).double(), x_TD) for compute in (reference, grouped_mm))
    assert wanted["y"].dtype == torch.float64
    weights = [name for name in wanted if name.startswith(("y", "experts"))]
    assert_near({name: ours[name] for name in weights}, {name: wanted[name] for name in weights}, 1e-14)
    assert_near(ours, wanted, 1e-6)  # routing is in float32, and so are the gradients through it


ENDS = {"usual": [2, 3, 7], "empty groups": [0, 7, 7], "all in the last": [0, 0, 7]}


@pytest.mark.parametrize("ends", ENDS.values(), ids=list(ENDS))
def test_first_and_second_derivatives_of_the_product(ends):
    a_RD = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    b_EDF = torch.randn(3, 4, 2, dtype=torch.float64, requires_grad=True)
    c_EF = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    end_E = torch.tensor(ends, dtype=torch.int32)
    expert_R = torch.searchsorted(end_E, torch.arange(7, dtype=torch.int32), right=True)

    def function(a_RD, b_EDF, c_EF):
        return add_bias(multiply(a_RD, b_EDF, end_E), c_EF, expert_R, end_E)

    wanted_RF = torch.stack([a @ b_EDF[e] + c_EF[e] for a, e in zip(a_RD, expert_R.tolist(), strict=True)])
    torch.testing.assert_close(function(a_RD, b_EDF, c_EF), wanted_RF)
    assert torch.autograd.gradcheck(function, (a_RD, b_EDF, c_EF))
    assert torch.autograd.gradgradcheck(function, (a_RD, b_EDF, c_EF))


@pytest.mark.parametrize(
    "in_dims", [d for d in itertools.product([0, None], repeat=3) if any(x == 0 for x in d)]
)
def test_the_product_of_many_samples(in_dims):
    """vmap, value and gradients, whichever of rows, weights and groups differ between samples."""
    N = 3
    a, b, ends = (
        torch.randn(N, 7, 4),
        torch.randn(N, 3, 4, 8),
        torch.tensor([[2, 3, 7], [0, 7, 7], [0, 0, 7]]).int(),
    )
    slope = torch.randn(N, 7, 8)
    a, b, ends = (x if dim == 0 else x[0] for x, dim in zip((a, b, ends), in_dims, strict=True))

    def gradients(a, b, ends, slope):
        def value(a, b):
            y = multiply(a, b, ends)
            return (y * slope).sum(), y

        return torch.func.grad(value, argnums=(0, 1), has_aux=True)(a, b)

    ours = torch.vmap(gradients, in_dims=(*in_dims, 0))(a, b, ends, slope)
    for n in range(N):
        one = (x if dim is None else x[n] for x, dim in zip((a, b, ends), in_dims, strict=True))
        (wanted_a, wanted_b), wanted_y = gradients(*one, slope[n])
        torch.testing.assert_close(ours[1][n], wanted_y, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ours[0][0][n], wanted_a, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ours[0][1][n], wanted_b, atol=1e-5, rtol=1e-5)


def test_gradients_of_biases_do_not_add_in_16_bits():
    """2,000 rows of 1: bfloat16 counts to 256 and no further."""
    end_E = torch.tensor([2000], dtype=torch.int32)
    c_EF = torch.zeros(1, 8, dtype=torch.bfloat16, requires_grad=True)
    y_RF = torch.zeros(2000, 8, dtype=torch.bfloat16)
    add_bias(y_RF, c_EF, torch.zeros(2000, dtype=torch.int64), end_E).sum().backward()
    assert c_EF.grad is not None
    assert (c_EF.grad == 2000).all()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_megablocks_needs_a_gpu():
    with pytest.raises(
        ValueError, match=r"--moe-backend megablocks runs on a GPU .* --moe-backend grouped_mm"
    ):
        MoE(MoEConfig(dim=D, num_experts=E, backend="megablocks"))
    layer = make_layer(megablocks)
    with pytest.raises(
        ValueError, match=r"bfloat16 on a GPU, not in torch.float32 on cpu.* --moe-backend grouped_mm"
    ):
        layer(torch.randn(3, D))


def test_megablocks_needs_its_packages(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "megablocks", None)
    with pytest.raises(ValueError, match="pip install --no-deps --no-build-isolation megablocks") as raised:
        MoE(MoEConfig(dim=D, num_experts=E, backend="megablocks"))
    assert "--moe-backend grouped_mm" in str(raised.value)


@pytest.mark.parametrize(
    ("gpu", "has_triton", "expected"),
    [
        ((9, 0), True, "triton"),
        ((9, 0), False, "grouped_mm"),
        ((8, 0), True, "grouped_mm"),
        (None, True, "grouped_mm"),
    ],
)
def test_auto_is_the_fastest_that_was_measured(gpu, has_triton, expected, monkeypatch):
    def load():
        if not has_triton:
            raise ValueError("no Triton")

    monkeypatch.setattr(backends, "load_triton", load)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: gpu)
    backends.fastest.cache_clear()
    try:
        assert backends.resolve("auto") == expected
        assert backends.resolve("reference") == "reference"
        assert backends.select("auto").__name__ == ("auto" if expected == "triton" else "grouped_mm")
        # a layer that stays on the CPU of such a machine
        layer, x = make_layer(backends.select("auto")), torch.randn(2, 5, D)
        wanted = run(make_layer(reference), x)
        assert_near(run(layer, x), wanted)
    finally:
        backends.fastest.cache_clear()
