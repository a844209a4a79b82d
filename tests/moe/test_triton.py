"""The Triton backend's kernels in Triton's interpreter, on the CPU, in float32, beside the loop over experts."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from open_lm.config.moe import MoEConfig
from open_lm.moe.backends import reference
from open_lm.moe.backends.triton import load, triton
from open_lm.moe.experts import EXPERTS
from open_lm.moe.layer import MoE
from open_lm.moe.routing import sort_by_expert

from .test_backends import run

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
THIS = Path(__file__)
interpreted = pytest.mark.skipif(not INTERPRETED, reason="run by test_kernels_in_the_interpreter")


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="the interpreter runs all of this file already")
def test_kernels_in_the_interpreter():
    """Triton decides when it is imported, for the whole process, whether it interprets: so in one of its own."""
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", str(THIS)]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


def test_it_needs_a_gpu(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"--moe-backend triton runs on a GPU .* --moe-backend grouped_mm"):
        MoE(MoEConfig(dim=8, num_experts=4, backend="triton"))


def test_it_needs_triton(monkeypatch):
    monkeypatch.setattr(sys.modules[triton.__module__], "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"`pip install triton`, or use --moe-backend grouped_mm"):
        load()


def test_it_needs_ampere(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(sys.modules[triton.__module__], "find_spec", lambda name: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    with pytest.raises(ValueError, match=r"capability 8.0 .* this one has 7.5: use --moe-backend grouped_mm"):
        load()


def make_layer(compute, **options) -> MoE:
    config = {"dim": 9, "hidden_dim": 7, "num_experts": 5, "capacity_factor": 0.0} | options
    layer = MoE(MoEConfig(**config))
    torch.manual_seed(0)
    for parameter in layer.parameters():
        parameter.data.normal_(std=config["dim"] ** -0.5)
    layer.experts.compute = compute
    return layer


def test_recomputing_needs_it():
    with pytest.raises(ValueError, match="--moe-recompute True needs --moe-backend triton"):
        MoE(MoEConfig(dim=8, num_experts=4, recompute=True))


def compare(tokens: int = 20, seed: int = 1, tolerance: float = 2e-6, **options) -> None:
    """Output and every gradient, by the norm of the error over the norm."""
    torch.manual_seed(seed)
    x = torch.randn(tokens, options.get("dim", 9))
    wanted, ours = run(make_layer(reference, **options), x), run(make_layer(triton, **options), x)
    for name in wanted:
        error = (ours[name] - wanted[name]).norm()
        assert error <= tolerance * wanted[name].norm(), f"{name}: {error} of {wanted[name].norm()}"


@interpreted
@pytest.mark.parametrize("kind", EXPERTS)
def test_every_kind_of_expert(kind):
    compare(ffn_type=kind, expert_bias=EXPERTS[kind].gated)


OPTIONS = {
    "one choice, two tokens, idle experts": {"tokens": 2, "top_k": 1},
    "three choices": {"top_k": 3, "expert_bias": True},
    "drops": {"capacity_factor": 0.5, "expert_bias": True},
    "all but few dropped": {"capacity_factor": 0.1, "tokens": 40, "ffn_type": "swiglu"},
    "input weights": {
        "capacity_factor": 0.5,
        "straight_through": True,
        "drop_policy": "probs",
        "expert_bias": True,
    },
    "padded": {"capacity_factor": 0.8, "pad_to_capacity": True, "expert_bias": True},
    "padded input weights": {"capacity_factor": 0.8, "pad_to_capacity": True, "straight_through": True},
    "experts choose": {"router": "expert_choice", "capacity_factor": 1.0, "ffn_type": "swiglu"},
    "more rows than a tile, widths of several": {
        "tokens": 150,
        "dim": 70,
        "hidden_dim": 101,
        "num_experts": 3,
    },
    "gated, the same": {
        "tokens": 150,
        "dim": 70,
        "hidden_dim": 64,
        "num_experts": 3,
        "ffn_type": "geglu_tanh",
    },
    "many experts": {"num_experts": 100, "top_k": 9, "tokens": 10},
    "threshold": {"router": "threshold", "threshold": 0.3},
    "in turns": {"router": "uniform", "balance": ("none",)},
    "one expert": {"num_experts": 1, "top_k": 1},
    "no tokens": {"tokens": 0},
    "recomputed": {"backend": "triton", "recompute": True},
    "recomputed, gated": {"backend": "triton", "recompute": True, "ffn_type": "swiglu", "expert_bias": True},
}


@interpreted
@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
def test_it_is_the_loop(options):
    compare(**options)


@interpreted
@pytest.mark.parametrize("ffn_type", ["gelu", "swiglu"])
def test_the_tiles_that_a_gpu_may_choose(ffn_type, monkeypatch):
    """Stores by descriptor, pre-activations fetched early, and on older GPUs no descriptors at all."""
    from open_lm.moe.backends.triton import launch

    options = {"tokens": 100, "dim": 24, "hidden_dim": 40, "num_experts": 3, "ffn_type": ffn_type}
    small = launch.choose("up", torch.device("cpu"), torch.float32, 24, 40)
    monkeypatch.setattr(
        launch,
        "choose",
        lambda *_: small._replace(early=True, store=True, parts=4, gathered=True),
    )
    compare(**options)
    monkeypatch.setattr(launch, "tma", lambda device: False)
    compare(**options)


PLANS = {"saved": {"saves_activation": True}, "in place": {"in_place": True},
         "both": {"saves_activation": True, "in_place": True}}  # fmt: skip


@pytest.fixture(params=PLANS, ids=list(PLANS))
def other_plan(request, monkeypatch):
    """Another way through backward than SMALL's, for every kernel."""
    from open_lm.moe.backends.triton import table

    monkeypatch.setattr(table, "SMALL", table.SMALL._replace(**PLANS[request.param]))
    table.choose.cache_clear()
    yield PLANS[request.param]
    table.choose.cache_clear()


@interpreted
@pytest.mark.parametrize(
    "name",
    [
        "three choices",
        "drops",
        "all but few dropped",
        "input weights",
        "padded",
        "experts choose",
        "more rows than a tile, widths of several",
        "gated, the same",
        "recomputed, gated",
        "one choice, two tokens, idle experts",
    ],
)
def test_other_plans_are_the_loop(other_plan, name):
    compare(**OPTIONS[name])


@interpreted
@pytest.mark.parametrize("chunks", [0, 3])
def test_other_plans_with_torchs_product(other_plan, chunks, monkeypatch):
    """Weights' gradients by grouped_mm, where rows are gathered into memory that is free."""
    from open_lm.moe.backends.triton import launch

    small = launch.choose("up", torch.device("cpu"), torch.float32, 24, 40)

    def choose(kernel, *_):
        return None if kernel[:2] == "dw" and not chunks else small._replace(gathered=True)

    def product(x, y, offs):
        parts = zip([0, *offs.tolist()[:-1]], offs.tolist(), strict=True)
        return torch.stack([x[:, start:end] @ y[start:end] for start, end in parts])

    monkeypatch.setattr(launch, "choose", choose)
    monkeypatch.setattr(launch.F, "grouped_mm", product)
    for options in ({}, {"ffn_type": "swiglu"}, {"capacity_factor": 0.5}):
        compare(tokens=100, dim=24, hidden_dim=40, num_experts=3, **options)


@interpreted
def test_a_retained_graph_is_not_consumed(other_plan):
    """Two backwards in turn give the same gradients; after one that retains nothing, torch refuses another."""
    layer, x = make_layer(triton, ffn_type="swiglu"), torch.randn(20, 9, requires_grad=True)
    y = layer(x)[0].sin().sum()
    first = torch.autograd.grad(y, [x, *layer.parameters()], retain_graph=True, allow_unused=True)
    second = torch.autograd.grad(y, [x, *layer.parameters()], allow_unused=True)
    for one, two in zip(first, second, strict=True):
        assert one is not None
        assert two is not None
        assert torch.equal(one, two)
    with pytest.raises(RuntimeError, match="a second time"):
        y.backward()


@interpreted
@pytest.mark.parametrize("backend", ["aot_eager", "aot_eager_decomp_partition"])
def test_other_plans_compiled(other_plan, backend):
    """As in eager mode, in one graph; also where the same layer meets the same input twice, whose forwards a
    compiler may take for one."""
    layer, x = make_layer(triton, ffn_type="swiglu"), torch.randn(20, 9)
    layer.experts.mlp.requires_grad_(True)

    def twice(x):
        one, two = layer(x), layer(x)
        return one[0].sin() + two[0].square(), one[1].loss + two[1].loss

    def gradients(function):
        leaf = x.clone().requires_grad_()
        y, loss = function(leaf)
        return torch.autograd.grad(y.sum() + loss, [leaf, *layer.parameters()])

    torch.compiler.reset()
    wanted, ours = gradients(twice), gradients(torch.compile(twice, backend=backend, fullgraph=True))
    for one, two in zip(wanted, ours, strict=True):
        torch.testing.assert_close(one, two)


@interpreted
@pytest.mark.parametrize("donated", [True, False])
def test_compiled_a_graph_is_consumed_once(donated, other_plan):
    """A second backward through a graph, compiled, is right or an error, whether or not torch refuses it itself."""
    import torch._functorch.config as functorch

    torch.compiler.reset()
    layer, x = make_layer(triton, ffn_type="swiglu"), torch.randn(20, 9, requires_grad=True)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with functorch.patch(donated_buffer=donated):
        y = compiled(x)[0].sin().sum()
        if not other_plan.get("in_place"):
            return
        with pytest.raises(RuntimeError, match=r"retain_graph=False|by an inplace operation|a second time"):  # noqa: PT012
            torch.autograd.grad(y, [x], retain_graph=True)
            torch.autograd.grad(y, [x])


@interpreted
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch's compiler needs one of C++")
def test_compiled_nothing_is_copied(monkeypatch):
    """By torch's own compiler too, backward works in the very memory that forward has filled."""
    from open_lm.moe.backends.triton import launch

    small = launch.choose("up", torch.device("cpu"), torch.float32, 9, 7)
    tile = small._replace(saves_activation=True, in_place=True)
    monkeypatch.setattr(launch, "choose", lambda *_: tile)
    up, up_backward, filled, read = launch.up, launch.up_backward, [], []

    def watched_up(*arguments, **named):
        found = up(*arguments, **named)
        h, _, a = found
        filled.append((h.data_ptr(), a.data_ptr()))
        return found

    def watched_backward(*arguments, **named):
        found = up_backward(*arguments, **named)
        read.append((arguments[5].data_ptr(), found[0].data_ptr()))
        return found

    monkeypatch.setattr(launch, "up", watched_up)
    monkeypatch.setattr(launch, "up_backward", watched_backward)
    torch.compiler.reset()
    layer, x = make_layer(triton), torch.randn(20, 9)
    wanted, ours = run(layer, x), run(torch.compile(layer, fullgraph=True), x)
    for name, gradient in wanted.items():
        torch.testing.assert_close(ours[name if name in ours else f"_orig_mod.{name}"], gradient)
    assert read == filled, "h where forward put it, dh in the activation's place"
    assert len(read) == 2


@interpreted
def test_dropped_rows_are_read_by_nobody():
    """What is in memory behind the last expert's rows may be NaN."""
    from open_lm.moe.backends.triton import launch

    end_E = torch.tensor([3, 5], dtype=torch.int32)
    y_RD = torch.full((8, 16), torch.nan)
    y_RD[:5] = torch.randn(5, 16)
    row_TK = torch.tensor([[0, 7], [6, 5], [1, 2], [3, 4]], dtype=torch.int32)
    y_TD = launch.combine(
        y_RD, torch.full((8,), torch.nan).index_fill(0, torch.arange(5), 2), row_TK, None, end_E, 4
    )
    wanted = torch.stack([y_RD[0], 0 * y_RD[0], y_RD[1] + y_RD[2], y_RD[3] + y_RD[4]]) * 2
    torch.testing.assert_close(y_TD, wanted)


@interpreted
@pytest.mark.parametrize("counts", [[5, 0, 70, 1], [0, 0, 0, 0], [64, 32, 0, 0], [0, 0, 0, 100]])
def test_the_table_of_tiles(counts):
    from open_lm.moe.backends.triton import launch

    count_E = torch.tensor(counts)
    total, rows = int(count_E.sum()), 100
    end_E = count_E.cumsum(0, dtype=torch.int32)
    table = launch.schedule(end_E, rows, 32)
    M = (len(table) - 2) // 3
    assert table[-1] == total
    wanted = [
        (e, first, end if end < total else first + 32)
        for e, (end, count) in enumerate(zip(end_E.tolist(), counts, strict=True))
        for first in range(end - count, end, 32)
    ]
    assert table[-2] == len(wanted)
    assert list(zip(*table[: 3 * M].view(3, M)[:, : len(wanted)].tolist(), strict=True)) == wanted


@interpreted
@pytest.mark.parametrize(("E", "K"), [(8, 2), (5, 5), (128, 8), (33, 1)])
def test_top_k(E, K):
    """As torch's, of equal scores the first; also where scores are infinite or NaN."""
    from open_lm.moe.backends.triton.selection import top_k

    torch.manual_seed(0)
    key_TE = torch.randn(300, E)
    assert torch.equal(top_k(key_TE, K), key_TE.topk(K).indices)
    key_TE[0], key_TE[1], key_TE[2], key_TE[3, -1] = 0.0, -torch.inf, torch.inf, torch.nan
    found = top_k(key_TE, K)
    assert found[:3].tolist() == [list(range(K))] * 3
    assert found[3, 0] == E - 1
    assert (found.sort(dim=1).values.diff(dim=1) > 0).all(), "an expert twice"


@interpreted
@pytest.mark.parametrize(
    ("T", "E", "K"), [(400, 8, 2), (100, 5, 5), (70, 300, 8), (1, 2, 1), (0, 4, 2), (300, 1, 1)]
)
def test_sorting_by_counting(T, E, K):
    """The Routing that torch's stable sort makes."""
    from open_lm.moe.backends.triton.sorting import sort_rows

    torch.manual_seed(0)
    expert_TK = torch.rand(T, E).topk(K).indices
    wanted = sort_by_expert(expert_TK, torch.rand(T, K), torch.zeros(T, E))
    token_R, order_R, row_TK, count_E = sort_rows(expert_TK, E)
    assert torch.equal(order_R, expert_TK.flatten().sort(stable=True).indices)
    assert torch.equal(token_R, wanted.token_R)
    assert torch.equal(row_TK, wanted.row_TK)
    assert torch.equal(count_E, wanted.count_E)
    torch.library.opcheck(sort_rows, (expert_TK, E), test_utils=("test_schema", "test_faketensor"))


@interpreted
@pytest.mark.parametrize("ffn_type", ["gelu", "swiglu"])
def test_the_operators(ffn_type):
    """Their fake implementations tell the truth, and they mutate nothing."""
    from open_lm.moe.backends.triton import ops, selection

    torch.manual_seed(0)
    T, D, width, E, K = 10, 8, 12, 3, 2
    gated = ffn_type == "swiglu"
    w1, v1 = torch.randn(E, D, width), torch.randn(E, D, width) if gated else None
    b1, c1, b2 = torch.randn(E, width), torch.randn(E, width) if gated else None, torch.randn(E, D)
    expert_R, order_R = torch.randint(E, (T * K,)).sort(stable=True)
    end_E = torch.searchsorted(expert_R, torch.arange(E), right=True).int()
    row_TK = torch.empty_like(order_R).scatter(0, order_R, torch.arange(T * K)).view(T, K).int()
    inputs = (torch.randn(T, D), w1, v1, torch.randn(E, width, D), b1, c1, b2, torch.rand(T * K), torch.rand(T * K),
              (order_R // K).int(), end_E, row_TK, None)  # fmt: skip
    tests = ("test_schema", "test_faketensor")
    for save in ((True, False), (False, False), (True, True)):
        torch.library.opcheck(ops.forward, (*inputs, torch.empty(0), ffn_type, *save), test_utils=tests)
    _, *saved = ops.forward(*inputs, torch.empty(0), ffn_type, True, True)
    again = (torch.randn(T, D), *inputs, *saved, ffn_type)
    torch.library.opcheck(ops.backward, (*again, False), test_utils=tests)
    torch.library.opcheck(selection.top_k, (torch.randn(T, E), K), test_utils=tests)


@interpreted
@pytest.mark.filterwarnings("ignore:.*non-contiguous:UserWarning")
def test_torch_func_and_float64_go_elsewhere():
    layer = make_layer(triton)
    parameters = dict(layer.named_parameters())
    x = torch.randn(4, 6, 9)

    def loss(parameters, x):
        return torch.func.functional_call(layer, parameters, (x,))[0].square().sum()

    per_sample = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    assert per_sample["experts.mlp.w1"].shape == (4, 5, 9, 7)
    double = make_layer(triton).double()
    assert run(double, x.double())["y"].dtype == torch.float64


@interpreted
def test_without_gradients_nothing_is_saved():
    from open_lm.moe.backends.triton import launch

    layer, x = make_layer(triton, ffn_type="swiglu"), torch.randn(20, 9)
    saved = []
    up = launch.up

    def watched(*arguments, **named):
        found = up(*arguments, **named)
        saved.append(found[0] is not None)
        return found

    launch.up = watched
    try:
        wanted = layer(x)[0]
        with torch.no_grad():
            torch.testing.assert_close(layer(x)[0], wanted)
        recomputing = make_layer(triton, ffn_type="swiglu", backend="triton", recompute=True)
        torch.testing.assert_close(recomputing(x)[0], wanted)
    finally:
        launch.up = up
    assert saved == [True, False, False]
