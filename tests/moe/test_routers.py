"""What must hold for every router: properties of any input, causality as announced, compilation."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from open_lm.config.moe import MoEConfig
from open_lm.config.moe_check import check_moe, sees_later_tokens
from open_lm.moe import MoE, Tokens
from open_lm.moe.capacity import capacity
from open_lm.moe.routers import ROUTERS
from open_lm.moe.routing import Context, expert_of_row

EXPERTS_CHOOSE = ("expert_choice", "expert_choice_causal")
REMOVING = ("threshold", "coordinate_descent")


@st.composite
def cases(draw):
    """(router, logits_TE, config, context): any shape, extreme and equal logits, padding, ids."""
    router = draw(st.sampled_from(list(ROUTERS)))
    E = draw(st.integers(2 if router in REMOVING else 1, 9))
    k = draw(st.integers(2 if router in REMOVING else 1, E))
    B, S = draw(st.integers(0, 4)), draw(st.integers(0, 9))
    T = B * S
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9999)))
    logits_TE = torch.randn(T, E, generator=generator) * draw(st.sampled_from([0.0, 1.0, 100.0, 1e4]))
    extreme = draw(st.sampled_from(["none", "signs", "one expert"]))
    if extreme == "signs":
        logits_TE = 1e4 * logits_TE.sign()
    if extreme == "one expert":
        logits_TE[:, E - 1] += 1e4
    config = MoEConfig(
        num_experts=E,
        top_k=k,
        router=router,
        capacity_factor=draw(st.sampled_from([0.3, 1.25, 4.0])),
        weight_scale=draw(st.sampled_from([1.0, 2.5])),
        normalize_weights=router not in EXPERTS_CHOOSE and k > 1 and draw(st.booleans()),
    )
    check_moe(config)
    training = draw(st.booleans())
    real_T = torch.rand(T, generator=generator) < draw(st.sampled_from([0.0, 0.7]))
    context = Context(
        training=training,
        sequences=B,
        capacity=capacity(T, config, training=training),
        real_T=draw(st.sampled_from([None, real_T])),
        id_T=draw(st.sampled_from([None, torch.randint(50, (T,), generator=generator)])),
    )
    return logits_TE, config, context


@settings(max_examples=200, deadline=None)
@given(cases())
def test_any_logits(case):
    logits_TE, config, context = case
    (T, E), k = logits_TE.shape, config.top_k
    logits_TE.requires_grad_()
    routing = ROUTERS[config.router](logits_TE, config, context)
    rows = int(routing.count_E.sum())
    token_R, weight_R = routing.token_R[:rows], routing.weight_R[:rows]

    # rows: by expert, within one by token, no token twice; the rest has weight 0
    place_R = expert_of_row(routing)[:rows] * max(T, 1) + token_R
    assert (place_R.diff() > 0).all()
    assert ((token_R >= 0) & (token_R < T)).all()
    assert routing.count_E.dtype == torch.int64
    assert (routing.weight_R[rows:] == 0).all()
    assert (weight_R >= 0).all()
    assert weight_R.dtype == torch.float32
    assert (weight_R <= config.weight_scale * (1 + 1e-5)).all()

    if config.router in EXPERTS_CHOOSE:
        B = max(context.sequences, 1)
        each = min(max(context.capacity, 1), T)
        if config.router == "expert_choice_causal":
            each = min(max(capacity(B, config, training=context.training), 1), B) * (T // B)
        assert routing.count_E.tolist() == [each] * E
    else:
        assert routing.row_TK is not None
        assert routing.row_TK.flatten().sort().values.tolist() == list(range(T * k))
        assert torch.equal(routing.token_R[routing.row_TK], torch.arange(T)[:, None].expand(T, k))
        if config.router in REMOVING:  # each token keeps its first
            assert (routing.row_TK[:, 0] < rows).all()
        else:
            assert rows == T * k
        if config.normalize_weights and config.router not in REMOVING:
            sum_T = routing.weight_R[routing.row_TK].sum(dim=1)
            # probabilities of exactly 0 have no sum to divide by
            assert torch.allclose(sum_T[sum_T > 0], torch.tensor(config.weight_scale))

    if config.router == "hash":
        assert not routing.weight_R.requires_grad
        return
    routing.weight_R.square().sum().backward()
    assert logits_TE.grad is not None
    assert logits_TE.grad.isfinite().all()


@pytest.mark.parametrize("router", ROUTERS)
def test_all_tokens_prefer_one_expert(router):
    logits_TE = torch.zeros(12, 4)
    logits_TE[:, 2] = 50.0
    config = MoEConfig(num_experts=4, top_k=2, router=router, capacity_factor=1.0)
    context = Context(training=True, capacity=6, sequences=2)
    count_E = ROUTERS[router](logits_TE, config, context).count_E.tolist()
    if router in ("expert_choice", "expert_choice_causal", "uniform"):
        assert count_E == [6] * 4
    elif router == "top_k":
        assert count_E[2] == 12
    elif router == "threshold":  # second choices have gates of 0
        assert count_E == [0, 0, 12, 0]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("router", [name for name in ROUTERS if name not in ("uniform",)])
def test_the_order_of_tokens_does_not_matter(router, training, monkeypatch):
    """Dropless, or experts that choose, with ids, over the one batch; draws that belong to tokens."""
    torch.manual_seed(0)
    T = 24
    logits_TE, id_T, draw_T = torch.randn(T, 6), torch.randint(90, (T,)), torch.rand(T)
    config = MoEConfig(num_experts=6, top_k=2, router=router, normalize_weights=router == "top_k")

    def weights_of(order_T: torch.Tensor) -> torch.Tensor:
        monkeypatch.setattr(torch, "rand_like", lambda like: draw_T[order_T, None].expand_as(like))
        # sequences of one token, so that all are at the same position
        context = Context(training=training, capacity=10, sequences=T, id_T=id_T[order_T])
        routing = ROUTERS[router](logits_TE[order_T], config, context)
        rows = int(routing.count_E.sum())
        weight_TE = torch.zeros(T, 6)
        token_R = order_T[routing.token_R[:rows]]
        weight_TE[token_R, expert_of_row(routing)[:rows]] = routing.weight_R[:rows]
        return weight_TE

    wanted_TE = weights_of(torch.arange(T))
    assert (wanted_TE > 0).any()
    torch.testing.assert_close(weights_of(torch.randperm(T)), wanted_TE)


def announced(config: MoEConfig, training: bool) -> bool:
    """Whether `sees_later_tokens` says so of training, or of evaluation."""
    other = "in evaluation alone" if training else "in training; evaluation is causal"
    return any(other not in reason for reason in sees_later_tokens(config))


@torch.no_grad()
def moves(config: MoEConfig, training: bool, seed: int) -> bool:
    """Whether an output changes when later tokens of its own sequence do."""
    torch.manual_seed(seed)
    B, S = 3, 8
    layer = MoE(config).train(training)
    for parameter in layer.parameters():
        parameter.data.normal_()
    x_BSD, later_BSD = torch.randn(2, B, S, 6)
    ids_BS, later_ids_BS = torch.randint(40, (2, B, S))

    def output(x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(seed + 1)  # the same draws
        return layer(x, Tokens(ids))[0]

    wanted_BSD = output(x_BSD, ids_BS)
    for sequence, cut in ((0, 4), (1, 2), (2, 4)):
        x, ids = x_BSD.clone(), ids_BS.clone()
        x[sequence, cut:] = later_BSD[sequence, cut:]
        ids[sequence, cut:] = later_ids_BS[sequence, cut:]
        before = output(x, ids)[sequence, :cut], wanted_BSD[sequence, :cut]
        if not torch.allclose(*before, atol=1e-4, rtol=1e-4):
            return True
    return False


def causality_cases():
    for router, policy, k in itertools.product(ROUTERS, ("position", "choice", "probs", "random"), (1, 2)):
        for per in ("batch", "sequence")[:k]:
            config = MoEConfig(
                dim=6, hidden_dim=4, num_experts=4, top_k=k, router=router, drop_policy=policy, capacity_per=per,
                capacity_factor=0.7, backend="reference",
            )  # fmt: skip
            try:
                check_moe(config)
            except ValueError:
                continue
            yield config


CAUSALITY = list(causality_cases())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "config", CAUSALITY, ids=lambda c: f"{c.router}-{c.drop_policy}-{c.top_k}-{c.capacity_per}"
)
def test_routers_see_later_tokens_just_where_that_is_announced(config, training):
    found = any(moves(config, training, seed) for seed in range(5))
    assert found == announced(config, training), sees_later_tokens(config)


def test_another_batch_does_not_let_causal_expert_choice_see_later():
    # capacity below one place per position: nothing may be dropped in order afterwards
    config = MoEConfig(
        dim=6, hidden_dim=4, num_experts=8, top_k=1, router="expert_choice_causal", capacity_factor=0.5
    )
    assert not any(moves(config, True, seed) for seed in range(10))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("router", ROUTERS)
def test_compiles_without_graph_breaks(router, training):
    torch._dynamo.reset()
    config = MoEConfig(dim=8, hidden_dim=8, num_experts=4, router=router, capacity_factor=0.7)
    layer = MoE(config).train(training)
    x = torch.randn(2, 7, 8, requires_grad=True)
    tokens = Tokens(torch.randint(40, (2, 7)), torch.arange(14).view(2, 7) % 5 != 0)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")

    def run(function):
        torch.manual_seed(0)
        layer.zero_grad()
        x.grad = None
        y, stats = function(x, tokens)
        (y.square().sum() + stats.loss).backward()
        assert x.grad is not None
        return [y.detach(), stats.count_E, x.grad]

    for ours, wanted in zip(run(compiled), run(layer), strict=True):
        torch.testing.assert_close(ours, wanted)


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("shape", [(0, 4), (1, 1), (2, 3)])
def test_layers_of_few_tokens(router, shape):
    layer = MoE(
        MoEConfig(
            dim=8, hidden_dim=8, num_experts=4, router=router, pad_to_capacity=router == "expert_choice"
        )
    )
    x = torch.randn(*shape, 8, requires_grad=True)
    for training in (True, False):
        y, stats = layer.train(training)(x, Tokens(real=torch.zeros(shape, dtype=torch.bool)))
        assert stats.count_E.sum() == 0
        assert (y == layer.experts.bias).all()
        y, stats = layer(x)
        (y.sum() + stats.loss).backward()
        assert x.grad is not None
        assert x.grad.isfinite().all()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.router.parameters())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"router": "threshold", "top_k": 1}, "--moe-router threshold with --moe-top-k 1"),
        ({"router": "coordinate_descent", "top_k": 1}, "the one weight is 1"),
        ({"router": "sinkhorn", "top_k": 1, "normalize_weights": True}, "makes every weight 1"),
        ({"router": "expert_choice", "normalize_weights": True}, "may get no expert"),
        ({"router": "expert_choice_causal", "pad_to_capacity": True}, "--moe-pad-to-capacity"),
        ({"router": "quantile", "threshold": 0.5}, "--moe-router threshold or coordinate_descent"),
        ({"router": "sinkhorn", "balance": ("aux",)}, "nothing to balance"),
    ],
)
def test_refusals(options, words):
    with pytest.raises(ValueError, match=words):
        check_moe(MoEConfig(num_experts=4, **options))
