"""Every combination of router, balance, capacity, structure and backend agrees with `dense.py`, or says why not.

The product of the lists below, at T = 16 and d = 16, in training and evaluation: output, losses, counts, and the
gradients of every weight and of the input, to 1e-5 in fp32; then a sample of all flags at once. What is refused is
held against a table of rules written here.
"""

import itertools
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import fields

import pytest
import torch

from open_lm.config.moe import MoEConfig
from open_lm.moe.layer import MoE, Tokens
from open_lm.moe.stats import RouterStats, router_loss

from . import dense as definition

B, S, D, E = 4, 4, 16, 4
BACKENDS = ("reference", "grouped_mm")
PADDED = "padded"  # stands beside the flags: some of the tokens are padding, one sequence is nothing else
ELSEWHERE_E = torch.tensor([3.0, 0.0, 5.0, 1.0])  # what other micro-batches have counted

ROUTERS: dict[str, dict] = {
    "top_k": {},
    "top_k, k=1": {"top_k": 1},
    "top_k, DeepSeek-V3": {"score": "sigmoid", "normalize_weights": True, "weight_scale": 2.5, "num_groups": 2},
    "top_k, Megatron": {"score_order": "after"},
} | {
    name: {"router": name}
    for name in ("expert_choice", "expert_choice_causal", "sinkhorn", "threshold", "coordinate_descent",
                 "quantile", "hash", "uniform")
}  # fmt: skip
BALANCES: list[dict] = [
    {},
    {"balance": ("none",)},
    *({"balance": (name,)} for name in ("aux", "sequence", "global", "first_choice", "importance", "bias")),
    {"balance": ("sequence", "bias"), "loss_weight": 0.5},
    {"balance": ("aux", "importance"), "loss_weight": (1.0, 0.5)},
    {"balance": ("global", "first_choice"), "loss_weight": (0.5, 2.0)},
]
CAPACITIES: list[dict] = [
    {"capacity_factor": 0.0},
    {"capacity_factor": 0.5},
    {"capacity_factor": 1.25, "pad_to_capacity": True},
    {"capacity_factor": 0.0, "eval_capacity_factor": 0.5},
    {"capacity_factor": 0.5, "drop_policy": "choice", "capacity_per": "sequence"},
    {"capacity_factor": 0.5, "drop_policy": "probs", "min_capacity": 5},
    {"capacity_factor": 0.7, "drop_policy": "random", "capacity_rounding": "up"},
]
STRUCTURES: list[dict] = [
    {},
    {"ffn_type": "swiglu", "expert_bias": True, "output_bias": False},
    {"shared_hidden_dim": 3, "ffn_type": "geglu", PADDED: True},
    {"shared_hidden_dim": 3, "shared_mix": "olmo", "residual": True},
    {"shared_hidden_dim": 3, "shared_mix": "gate", "ffn_type": "relu_squared", "expert_bias": True},
    {"straight_through": True, "z_loss_weight": 0.1, PADDED: True},
]
# Values of all flags for the sample of everything at once.
VALUES: dict[str, list] = {
    "router": ["top_k"] * 3 + list(definition.RULES),
    "top_k": [1, 2, 2, 3],
    "score": ["softmax", "softmax", "sigmoid"],
    "score_order": ["before", "before", "after"],
    "normalize_weights": [False, False, True],
    "normalize_after_drops": [False, False, True],
    "weight_scale": [1.0, 1.0, 2.5],
    "num_groups": [1, 1, 1, 2],
    "top_groups": [1, 1, 1, 1, 2],
    "jitter": [0.0, 0.0, 0.3],
    "noise": ["none", "none", "rsample", "second_expert"],
    "threshold": [0.2, 0.2, (0.3,), 0.6],
    "eval_threshold": [None, None, None, 0.9],
    "straight_through": [False, False, True],
    "balance": [None, None, ("none",)] + [
        tuple(names) for n in (1, 2, 3)
        for names in itertools.combinations(("aux", "sequence", "global", "first_choice", "importance", "bias"), n)
    ],
    "loss_weight": [0.1, 0.1, 0.1, 1.0, (1.0,), (0.5, 1.0), (0.5, 1.0, 2.0)],
    "z_loss_weight": [0.0, 0.0, 0.1],
    "capacity_factor": [0.0, 0.5, 0.7, 1.25],
    "eval_capacity_factor": [None, None, 0.0, 0.6],
    "min_capacity": [0, 0, 0, 3],
    "capacity_rounding": ["down", "down", "up"],
    "capacity_per": ["batch", "batch", "sequence"],
    "drop_policy": ["position", "position", "choice", "probs", "random"],
    "pad_to_capacity": [False, False, True],
    "ffn_type": ["gelu", "gelu_exact", "relu", "relu_squared", "silu", "swiglu", "geglu", "geglu_tanh", "reglu",
                 "bilinear"],
    "expert_bias": [False, True],
    "output_bias": [True, False],
    "shared_hidden_dim": [0, 3],
    "shared_mix": ["sum", "sum", "sum", "olmo", "gate"],
    "residual": [False, True],
    PADDED: [False, True],
}  # fmt: skip
# Flags with no say in what one layer computes, or given by the test itself.
ELSEWHERE = {"freq", "layers", "layer_pattern", "first_dense", "num_experts", "bias_rate", "hidden_dim", "dim",
             "dense_before", "dense_after", "init", "backend", "recompute"}  # fmt: skip

SELF_BALANCED = {"expert_choice", "expert_choice_causal", "sinkhorn", "quantile", "hash", "uniform"}
EXPERTS_CHOOSE = {"expert_choice", "expert_choice_causal"}
SUM_TO_ONE = {"threshold", "coordinate_descent"}


def names(c: MoEConfig) -> set[str]:
    """The methods of --moe-balance."""
    default = set() if c.router in SELF_BALANCED else {"aux"}
    return set(c.balance or default) - {"none"}


def never_drops(c: MoEConfig) -> bool:
    return c.capacity_factor == 0 and not c.eval_capacity_factor


# What is refused, and the words that the sentence has.
REFUSALS: list[tuple[tuple[str, ...], Callable[[MoEConfig], bool]]] = [
    (("--moe-balance", "--moe-router"), lambda c: c.router in SELF_BALANCED and bool(names(c))),
    (("--moe-balance bias", "--moe-router"), lambda c: "bias" in names(c) and c.router != "top_k"),
    (("--moe-balance bias", "--moe-score-order after"), lambda c: "bias" in names(c) and c.score_order == "after"),
    (("--moe-balance bias", "--moe-noise"), lambda c: "bias" in names(c) and c.noise != "none"),
    (("--moe-loss-weight", "--moe-balance"), lambda c: c.loss_weight != 0.1 and not names(c) - {"bias"}),
    (
        ("--moe-loss-weight", "--moe-balance"),
        lambda c: isinstance(c.loss_weight, tuple) and len(c.loss_weight) != len(names(c) - {"bias"}),
    ),
    (("--moe-score sigmoid", "--moe-router"), lambda c: c.score == "sigmoid" and c.router != "top_k"),
    (("--moe-score-order", "--moe-router"), lambda c: c.score_order == "after" and c.router != "top_k"),
    (("--moe-num-groups", "--moe-router"), lambda c: c.num_groups > 1 and c.router != "top_k"),
    (("--moe-noise", "--moe-router"), lambda c: c.noise != "none" and c.router != "top_k"),
    (("--moe-score", "--moe-score-order"), lambda c: c.score == "sigmoid" and c.score_order == "after"),
    (("--moe-score-order after", "--moe-top-k 1"), lambda c: c.score_order == "after" and c.top_k == 1),
    (("--moe-noise second_expert", "--moe-top-k 1"), lambda c: c.noise == "second_expert" and c.top_k == 1),
    (("--moe-normalize-weights", "--moe-top-k 1"), lambda c: c.normalize_weights and c.top_k == 1),
    (("--moe-normalize-after-drops", "--moe-top-k 1"), lambda c: c.normalize_after_drops and c.top_k == 1),
    (("--moe-router", "--moe-top-k 1"), lambda c: c.router in SUM_TO_ONE and c.top_k == 1),
    (
        ("--moe-normalize", "--moe-router"),
        lambda c: c.router in EXPERTS_CHOOSE and (c.normalize_weights or c.normalize_after_drops),
    ),
    (
        ("--moe-normalize-weights", "--moe-normalize-after-drops"),
        lambda c: c.normalize_weights and c.normalize_after_drops,
    ),
    (
        ("--moe-weight-scale", "--moe-normalize-after-drops"),
        lambda c: c.weight_scale != 1 and c.normalize_after_drops,
    ),
    (
        ("--moe-top-groups", "--moe-num-groups"),
        lambda c: c.top_groups > 1 and c.top_groups >= c.num_groups,
    ),
    # 4 experts in 2 groups, of which one: 2 experts for 3 choices
    (("--moe-top-k 3", "--moe-top-groups", "--moe-num-groups"), lambda c: c.num_groups > 1 and c.top_k == 3),
    (("--moe-threshold", "choices after the first"),
     lambda c: isinstance(c.threshold, tuple) and len(c.threshold) != c.top_k - 1),
    (("--moe-threshold", "--moe-router"), lambda c: c.threshold != 0.2 and c.router not in SUM_TO_ONE),
    (("--moe-eval-threshold", "--moe-router"),
     lambda c: c.eval_threshold is not None and c.router not in SUM_TO_ONE),
    (("--moe-capacity-factor", "--moe-router"), lambda c: c.router in EXPERTS_CHOOSE and c.capacity_factor == 0),
    (("--moe-eval-capacity-factor", "--moe-router"),
     lambda c: c.router in EXPERTS_CHOOSE and c.eval_capacity_factor == 0),
    (("--moe-drop-policy", "--moe-router"), lambda c: c.router in EXPERTS_CHOOSE and c.drop_policy != "position"),
    (
        ("--moe-capacity-per", "--moe-router"),
        lambda c: c.router == "expert_choice_causal" and c.capacity_per == "sequence",
    ),
    (("--moe-pad-to-capacity", "--moe-router"), lambda c: c.router == "expert_choice_causal" and c.pad_to_capacity),
    (("--moe-drop-policy", "--moe-capacity-factor 0"), lambda c: never_drops(c) and c.drop_policy != "position"),
    (("--moe-pad-to-capacity", "--moe-capacity-factor 0"), lambda c: never_drops(c) and c.pad_to_capacity),
    (("--moe-min-capacity", "--moe-capacity-factor 0"), lambda c: never_drops(c) and c.min_capacity > 0),
    (("--moe-capacity-per", "--moe-capacity-factor 0"), lambda c: never_drops(c) and c.capacity_per != "batch"),
    (("--moe-capacity-rounding", "--moe-capacity-factor 0"),
     lambda c: never_drops(c) and c.capacity_rounding != "down"),
    (("--moe-shared-mix", "--moe-shared-hidden-dim"), lambda c: c.shared_mix != "sum" and not c.shared_hidden_dim),
    (("--moe-jitter", "--moe-router hash"), lambda c: c.router == "hash" and c.jitter > 0),
    (("--moe-z-loss-weight", "--moe-router hash"), lambda c: c.router == "hash" and c.z_loss_weight > 0),
    (("--moe-straight-through", "--moe-router hash"), lambda c: c.router == "hash" and c.straight_through),
]  # fmt: skip


def combinations(router: dict) -> Iterator[dict]:
    for balance, capacity, structure in itertools.product(BALANCES, CAPACITIES, STRUCTURES):
        yield router | balance | capacity | structure


def sample(seed: int, accepted: int) -> Iterator[dict]:
    """All flags drawn at random. Most draws are refused, so when half are, flags but a few keep their defaults."""
    rng = random.Random(seed)
    defaults = {f.name: f.default for f in fields(MoEConfig)} | {PADDED: False}
    while accepted:
        chance = rng.choice([0.15, 0.3, 0.6])
        case = {
            name: rng.choice(v) if rng.random() < chance else defaults[name] for name, v in VALUES.items()
        }
        accepted -= not broken_rules(configure(case, "reference"))
        yield case


def configure(case: dict, backend: str) -> MoEConfig:
    flags = {name: value for name, value in case.items() if name != PADDED}
    return MoEConfig(dim=D, hidden_dim=5, num_experts=E, backend=backend, **flags)  # type: ignore[arg-type]


def broken_rules(config: MoEConfig) -> list[tuple[str, ...]]:
    return [words for words, refused in REFUSALS if refused(config)]


def draw(like: torch.Tensor) -> torch.Tensor:
    """Numbers in (0, 1) that look random and depend on nothing but the number in their place.

    So two implementations draw the same, in whatever order they hold their rows.
    """
    return (like.detach().double() * 1000).sin().mul(0.4999).add(0.5).to(like.dtype)


class Tally:
    """How many combinations agreed and were refused, and what was wrong."""

    def __init__(self) -> None:
        self.ran = self.refused = 0
        self.wrong: list[str] = []
        self.start = time.monotonic()

    def report(self, name: str) -> None:
        seconds = time.monotonic() - self.start
        print(f"\n{name}: {self.ran} combinations ran, {self.refused} were refused, {seconds:.1f} s", end=" ")
        assert self.ran
        assert not self.wrong, f"{len(self.wrong)} of {self.ran + self.refused}:\n" + "\n".join(
            self.wrong[:5]
        )


def compare(case: dict, tally: Tally) -> None:
    """Both backends in both modes against the definition, or the refusal against the table."""
    given = {name: value for name, value in case.items() if value != getattr(MoEConfig, name, None)}
    rules = broken_rules(configure(case, BACKENDS[0]))
    layers = []
    for backend in BACKENDS:
        try:
            layers.append(make_layer(configure(case, backend)))
        except ValueError as error:
            tally.refused += 1
            if not any(all(word in str(error) for word in words) for words in rules):
                tally.wrong.append(f"{given}: refused against the table: {error}")
        else:
            if rules:
                tally.wrong.append(f"{given}: accepted, but {rules}")
    if len(layers) < len(BACKENDS) or rules:
        return
    for training in (True, False):
        wanted = None
        for backend, layer in zip(BACKENDS, layers, strict=True):
            layer.train(training)
            if wanted is None:
                wanted = wanted_of(layer, case)
            found = found_of(layer, case)
            tally.ran += 1
            for name, value in wanted.items():
                error = (found[name] - value).abs().max()
                if not error <= 1e-5 * max(1.0, value.abs().max()):
                    mode = "training" if training else "evaluation"
                    tally.wrong.append(f"{given} {backend} {mode}: {name} differs by {error}")


INPUT_BSD = torch.randn(B, S, D, generator=torch.Generator().manual_seed(0))
SLOPE_BSD = torch.randn(B, S, D, generator=torch.Generator().manual_seed(1))
IDS_BS = torch.randint(0, 9, (B, S), generator=torch.Generator().manual_seed(2))
REAL_BS = torch.arange(S) < torch.tensor([4, 2, 0, 3])[:, None]
WEIGHTS = torch.randn(20_000, generator=torch.Generator().manual_seed(3))


def make_layer(config: MoEConfig) -> MoE:
    """A layer whose outputs, logits and gradients are all of order one."""
    layer = MoE(config)
    start = 0
    for name, parameter in layer.named_parameters():
        fan_in = {"w2": 5, "weight": D}.get(name.rsplit(".")[-1], 4)
        values = WEIGHTS[start : (start := start + parameter.numel())]
        parameter.data = (values / fan_in**0.5).view_as(parameter)
    if layer.router.bias_E is not None:
        layer.router.bias_E.copy_(torch.tensor([0.3, -0.2, 0.0, -0.1]))
    return layer


def found_of(layer: MoE, case: dict) -> dict[str, torch.Tensor]:
    x_BSD = INPUT_BSD.clone().requires_grad_()
    torch.manual_seed(4)
    y_BSD, stats = layer(x_BSD, Tokens(IDS_BS, REAL_BS if case.get(PADDED) else None))
    loss = loss_of(stats, layer.config)
    return measured(layer, x_BSD, y_BSD, loss, stats.count_E, stats.choice_count_E, stats.dropped)


def loss_of(stats: RouterStats, config: MoEConfig) -> torch.Tensor:
    if "global" not in config.losses:
        return stats.loss
    return router_loss([stats], config, [stats.choice_count_E + ELSEWHERE_E])


def wanted_of(layer: MoE, case: dict) -> dict[str, torch.Tensor]:
    x_BSD = INPUT_BSD.clone().requires_grad_()
    jitter = layer.config.jitter if layer.training else 0.0
    torch.manual_seed(4)
    batch = definition.Batch(
        x_BSD,
        REAL_BS if case.get(PADDED) else None,
        IDS_BS,
        layer.training,
        draw,
        torch.empty(B * S, D).uniform_(1 - jitter, 1 + jitter) if jitter else None,
        ELSEWHERE_E,
    )
    weights = dict(layer.named_parameters()) | dict(layer.named_buffers())
    output = definition.dense(layer.config, weights, batch)
    return measured(layer, x_BSD, *output)


def measured(layer, x_BSD, y_BSD, loss, count_E, counted_E, dropped) -> dict[str, torch.Tensor]:
    named = {"the input": x_BSD} | dict(layer.named_parameters())
    objective = (y_BSD * SLOPE_BSD).sum() + loss
    gradients = torch.autograd.grad(
        objective, list(named.values()), allow_unused=True, materialize_grads=True
    )
    return {f"the gradient of {name}": g for name, g in zip(named, gradients, strict=True)} | {
        "the output": y_BSD.detach(),
        "the loss": loss.detach(),
        "count": count_E.float(),
        "choice count": counted_E.float(),
        "dropped": torch.as_tensor(dropped, dtype=torch.float32),
    }


@pytest.fixture(autouse=True)
def same_draws(monkeypatch):
    """Both sides draw by `draw`; one thread, as the shapes are tiny."""
    monkeypatch.setattr(torch, "rand_like", draw)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("router", ROUTERS)
def test_product(router: str) -> None:
    tally = Tally()
    for case in combinations(ROUTERS[router]):
        compare(case, tally)
    tally.report(router)


@pytest.mark.parametrize("seed", range(4))
def test_sample_of_all_flags_at_once(seed: int) -> None:
    tally = Tally()
    for case in sample(seed, accepted=200):
        compare(case, tally)
    tally.report(f"sample {seed}")


def test_no_flag_is_forgotten() -> None:
    assert {f.name for f in fields(MoEConfig)} == (set(VALUES) | ELSEWHERE) - {PADDED}


def test_every_refusal_happens_in_the_sample() -> None:
    """A rule that nothing breaks would hold nothing."""
    met = {words for case in sample(0, accepted=200) for words in broken_rules(configure(case, "reference"))}
    assert met == {words for words, _ in REFUSALS}


def test_a_wrong_layer_is_seen() -> None:
    """Each flag that the definition knows changes what it gives, so that a layer deaf to it would fail."""
    on = {"top_k": 1, "score": "sigmoid", "score_order": "after", "normalize_weights": True, "weight_scale": 2.5,
          "normalize_after_drops": True, "num_groups": 2, "jitter": 0.3, "noise": "rsample",
          "straight_through": True, "balance": ("sequence",), "loss_weight": 1.0, "z_loss_weight": 0.1,
          "capacity_factor": 1.25, "min_capacity": 7, "capacity_rounding": "up", "capacity_per": "sequence",
          "drop_policy": "choice", "ffn_type": "relu", "expert_bias": True, "output_bias": False,
          "shared_hidden_dim": 3, "residual": True, PADDED: True}  # fmt: skip
    base = {"capacity_factor": 0.7}
    plain = wanted_of(make_layer(configure(base, "reference")), base)
    for flag, value in on.items():
        case = base | {flag: value}
        changed = wanted_of(make_layer(configure(case, "reference")), case)
        same = [name for name in plain if name in changed and torch.equal(plain[name], changed[name])]
        assert set(same) < set(plain), f"{flag} {value} changes nothing"
