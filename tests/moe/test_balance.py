"""Balancing losses against the papers' equations, other systems' totals, and batches on several ranks.

Shapes: T tokens, B sequences, E experts, K choices per token, L layers, D model width.
"""

import re
from pathlib import Path
from statistics import NormalDist

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from open_lm.config.moe import MoEConfig
from open_lm.moe.balance import LOSSES, Choices, count, router_z_loss, switch_loss, update_bias_
from open_lm.moe.routers import top_k
from open_lm.moe.routing import Context
from open_lm.moe.stats import RouterStats, measure, router_loss

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def stats_of(logits_TE: torch.Tensor, config: MoEConfig, **context) -> RouterStats:
    at = Context(**context)
    routing = top_k(logits_TE, config, at)
    return measure(routing, routing, config, at)


def config_of(E: int, k: int, name: str, weight: float = 1.0, **flags) -> MoEConfig:
    return MoEConfig(num_experts=E, top_k=k, balance=(name,), loss_weight=weight, **flags)


def load_balancing_loss(logits_TE, count_E):
    return switch_loss(count_E, logits_TE.softmax(-1).sum(0), len(logits_TE))


def test_bounds_and_no_tokens():
    E = 4
    uniform, collapsed = torch.zeros(8, E), torch.tensor([[100.0, 0, 0, 0]]).repeat(8, 1)
    assert load_balancing_loss(uniform, torch.tensor([2, 2, 2, 2])) == 1
    assert load_balancing_loss(collapsed, torch.tensor([8, 0, 0, 0])) == E
    nothing = torch.zeros(0, E)
    assert load_balancing_loss(nothing, torch.zeros(E, dtype=torch.int64)) == 0
    assert router_z_loss(nothing) == 0


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_every_loss_is_one_when_even_finite_without_tokens_and_where_probabilities_underflow(name):
    E = 4
    even_TE = torch.eye(E).repeat(6, 1)
    assert stats_of(even_TE, config_of(E, 1, name), sequences=2).loss == pytest.approx(
        0.0 if name == "importance" else 1.0, abs=1e-6
    )
    for logits_TE in (torch.zeros(0, E), 300 * even_TE, 300 * torch.eye(E)[:1].repeat(8, 1)):
        logits_TE = logits_TE.clone().requires_grad_()
        for sequences in (1, 2):
            loss = stats_of(logits_TE, config_of(E, 2, name), sequences=sequences).loss
            (gradient_TE,) = torch.autograd.grad(loss, logits_TE)
            assert loss.isfinite()
            assert gradient_TE.isfinite().all()


@pytest.mark.parametrize(("T", "E", "k"), [(20, 6, 2), (17, 3, 1), (9, 5, 5)])
def test_importance_is_the_papers(T, E, k):
    """Importance_i = sum_t p_ti; load_i = sum_t (1 - Phi((eta_t - logit_ti) / sigma)), eta_t the k-th logit, sigma
    1/E; the mean of both squared coefficients of variation (unbiased variance, as Tutel's)."""
    logits_TE = torch.randn(T, E, dtype=torch.float64)
    ours = stats_of(logits_TE.float(), config_of(E, k, "importance")).loss
    normal = NormalDist(sigma=1 / E)
    importance, load = [0.0] * E, [0.0] * E
    for row in logits_TE.tolist():
        eta = sorted(row)[-k]
        total = sum(torch.tensor(row).exp().tolist())
        for e, logit in enumerate(row):
            importance[e] += torch.tensor(logit).exp().item() / total
            load[e] += 1 - normal.cdf(eta - logit)

    def squared_variation(values: list[float]) -> float:
        mean = sum(values) / E
        return sum((v - mean) ** 2 for v in values) / (E - 1) / mean**2

    wanted = (squared_variation(importance) + squared_variation(load)) / 2
    assert ours.item() == pytest.approx(wanted, rel=1e-4, abs=1e-7)


def test_importance_has_the_gradient_of_a_difference():
    logits_TE = torch.randn(12, 4, dtype=torch.float64)
    p_TE = logits_TE.softmax(dim=1).requires_grad_()
    choice_TK = p_TE.topk(2).indices

    def loss(p):
        return LOSSES["importance"](Choices(p, choice_TK, count(choice_TK, 4, None), None, 1))

    assert torch.autograd.gradcheck(loss, p_TE)


def test_global_over_two_ranks_is_the_loss_of_both_batches_at_once():
    """P of the whole is the mean of the ranks' P (as many tokens each) and f is everyone's, so the mean over ranks
    of E * sum f P_rank is E * sum f P; gradients of a mean are half of each rank's."""
    E, k, T = 6, 2, 40
    both_TE = (torch.randn(2 * T, E) * 1.5 + torch.linspace(1, 0, E)).requires_grad_()
    config = config_of(E, k, "global", 0.3, z_loss_weight=0.01)
    whole = router_loss([stats_of(both_TE, config)], config)
    (wanted_TE,) = torch.autograd.grad(whole, both_TE)
    ranks = [stats_of(part, config) for part in both_TE.split(T)]
    counts_E = ranks[0].choice_count_E + ranks[1].choice_count_E
    losses = [router_loss([stats], config, [counts_E]) for stats in ranks]
    mean = torch.stack(losses).mean()
    torch.testing.assert_close(mean, whole)
    torch.testing.assert_close(torch.autograd.grad(mean, both_TE)[0], wanted_TE)
    # each rank by itself is not it
    alone = torch.stack([router_loss([stats_of(part, config)], config) for part in both_TE.split(T)]).mean()
    assert (alone - whole).abs() > 1e-5


def test_global_of_two_layers_takes_each_layers_own_counts():
    E, config = 4, config_of(4, 1, "global", 0.5)
    layers = [torch.randn(16, E), torch.randn(16, E)]
    stats = [stats_of(logits_TE, config) for logits_TE in layers]
    counts = [torch.tensor([9.0, 3, 3, 1]), torch.tensor([0.0, 0, 16, 0])]
    wanted = sum(
        E * (n / 16 * logits.softmax(1).mean(0)).sum() for n, logits in zip(counts, layers, strict=True)
    )
    torch.testing.assert_close(router_loss(stats, config, counts), 0.5 * wanted / 2)


# --- whose coefficient is ours: the table of MOE.md ---


def shares(logits_TE: torch.Tensor, k: int) -> torch.Tensor:
    """f_E: assignments of a dense one-hot count over all of them."""
    p_TE = logits_TE.softmax(dim=1)
    return torch.zeros_like(p_TE).scatter(1, p_TE.topk(k).indices, 1.0).sum(0) / (len(p_TE) * k)


def switch(logits_TE: torch.Tensor, k: int) -> torch.Tensor:
    return logits_TE.shape[1] * (shares(logits_TE, k) * logits_TE.softmax(dim=1).mean(0)).sum()


def megablocks(layers: list[torch.Tensor], k: int, c: float) -> torch.Tensor:
    """c E / (L T k) * dot(counts, mean probabilities), all layers' vectors in one."""
    (T, E), L = layers[0].shape, len(layers)
    n = torch.cat([shares(logits, k) * T * k for logits in layers])
    P = torch.cat([logits.softmax(dim=1).mean(0) for logits in layers])
    return c * E / (L * T * k) * n.dot(P)


# Each system's whole term in the objective for its coefficient c, of L layers' logits.
SYSTEMS = {
    "Megatron-LM": lambda layers, k, c: sum(c * switch(logits, k) for logits in layers),
    "MegaBlocks": megablocks,
    "open_lm": lambda layers, k, c: 4 * megablocks(layers, k, c),
    "OLMo-core": lambda layers, k, c: c * sum(switch(logits, k) for logits in layers) / len(layers),
    "transformers": lambda layers, k, c: c * load_balancing_loss_func(tuple(layers), layers[0].shape[1], k),
    "DeepSpeed, k ≤ 2": lambda layers, k, c: c * sum(switch_first(logits) for logits in layers),
    "DeepSpeed, k > 2": lambda layers, k, c: c * sum(switch(logits, k) for logits in layers),
    "ST-MoE": lambda layers, k, c: c * sum(
        logits.shape[1] ** 2 * (logits.softmax(dim=1).mean(0) * shares(logits, 1)).mean() for logits in layers
    ),
    "Tutel, GShard": lambda layers, k, c: c * sum(
        (logits.softmax(dim=1).sum(0) * shares(logits, 1) * logits.shape[1]).sum() / len(logits)
        for logits in layers
    ),
    # with the logits on both sides of its comparison
    "Tutel, load and importance": lambda layers, k, c: c * sum(two_variations(logits, k) for logits in layers),
    "DeepSeek-V3": lambda layers, k, c: c * sum(
        torch.stack([switch(part, k) for part in logits.split(8)]).mean() for logits in layers
    ),
}  # fmt: skip


def switch_first(logits_TE: torch.Tensor) -> torch.Tensor:
    first_TE = torch.nn.functional.one_hot(logits_TE.argmax(dim=1), logits_TE.shape[1]).float()
    return logits_TE.shape[1] * (first_TE.mean(0) * logits_TE.softmax(dim=1).mean(0)).sum()


def two_variations(logits_TE: torch.Tensor, k: int) -> torch.Tensor:
    E = logits_TE.shape[1]
    eta_T1 = logits_TE.sort(dim=1, descending=True).values[:, k - 1 : k].detach()
    # the chosen threshold moves with the logits too
    eta_T1 = logits_TE.gather(1, (logits_TE == eta_T1).int().argmax(dim=1, keepdim=True))
    load_E = torch.distributions.Normal(0.0, 1 / E).cdf(logits_TE - eta_T1).sum(dim=0)
    importance_E = logits_TE.softmax(dim=1).sum(dim=0)
    return sum(v.var() / v.mean() ** 2 for v in (load_E, importance_E)) / 2


def documented() -> dict[str, tuple[str, str]]:
    """{system: (--moe-balance, weight)} as MOE.md's table gives them."""
    text = (ROOT / "MOE.md").read_text(encoding="utf-8")
    section = text.split("## Balancing losses: whose coefficient is ours")[1].split("\n## ")[0]
    rows = re.findall(r"^\| ([^|`]+) \|.*\| `(\w+)` \| `([^`]+)` \|", section, re.MULTILINE)
    return {system: (balance, weight) for system, balance, weight in rows}


def test_the_table_names_the_systems_tested_here():
    assert set(documented()) == set(SYSTEMS)


@pytest.mark.parametrize("system", SYSTEMS)
def test_the_documented_weight_gives_the_systems_term_and_gradient(system):
    balance, weight = documented()[system]
    k, E, T, c = (3 if system == "DeepSpeed, k > 2" else 2), 6, 24, 0.02
    layers = [(torch.randn(T, E) * 1.5).requires_grad_() for _ in range(3)]
    if system == "transformers":  # it pools layers before multiplying: the same only where they are alike
        layers = [layers[0]] * 3
    factors = {"c": c, "L": len(layers), "k": k, "accum": 4}
    value = 1.0
    for name in weight.split(" * "):
        value *= factors[name]
    sequences = 3 if balance == "sequence" else 1
    config = config_of(E, k, balance, value)
    ours = router_loss([stats_of(logits, config, sequences=sequences) for logits in layers], config)
    theirs = SYSTEMS[system](layers, k, c)
    torch.testing.assert_close(ours, theirs)
    gradients = [torch.autograd.grad(loss, layers) for loss in (ours, theirs)]
    for mine, yours in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, yours)


def test_megatrons_z_coefficient_times_layers():
    layers = [torch.randn(10, 4) for _ in range(3)]
    config = MoEConfig(num_experts=4, balance=("none",), z_loss_weight=3 * 0.001)
    theirs = sum(0.001 * logits.logsumexp(dim=1).square().mean() for logits in layers)
    torch.testing.assert_close(router_loss([stats_of(x, config) for x in layers], config), theirs)


# --- the bias ---


@given(st.lists(st.integers(0, 50), min_size=1, max_size=9), st.sampled_from([0.0, 1e-6, 1e-3, 0.1]))
def test_bias_update(counts, rate):
    count_E = torch.tensor(counts, dtype=torch.float64)
    bias_E = torch.linspace(-1, 1, len(counts), dtype=torch.float64)
    before_E = bias_E.clone()
    update_bias_(bias_E, count_E, rate)
    moved_E = bias_E - before_E
    assert moved_E.mean().abs() < 1e-12
    assert moved_E.max() - moved_E.min() <= 2 * rate + 1e-12
    # the idler of two experts never loses against the busier
    for busy in range(len(counts)):
        for idle in range(len(counts)):
            if counts[idle] < counts[busy]:
                assert moved_E[idle] >= moved_E[busy] - 1e-12
    if rate and counts:
        assert (moved_E.abs().max() > 0) == (len(set(counts)) > 1)


def test_bias_updates_even_out_the_loads():
    logits_TE = torch.randn(400, 8) + torch.linspace(2, -2, 8)
    config = MoEConfig(num_experts=8, top_k=2, balance=("bias",))
    bias_E = torch.zeros(8)
    spread = []
    for _ in range(400):
        routing = top_k(logits_TE, config, Context(bias_E=bias_E))
        spread.append(float(routing.count_E.max() / routing.count_E.float().mean()))
        update_bias_(bias_E, routing.count_E, 2e-3)
    assert spread[0] > 1.8
    assert spread[-1] < 1.15
