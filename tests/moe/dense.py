"""The MoE layer's definition, dense: every expert on every token, times a mask of weights.

Written from the papers and the flags' help texts, with nothing of open_lm/moe: comparisons, loops and masks over
all T x E pairs. Slow and easy to believe; `test_product.py` holds the layer against it.

Shapes: B sequences, S positions, T = B * S tokens, D width, E experts, F expert width, K choices.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from open_lm.config.moe import MoEConfig


class Batch(NamedTuple):
    """What a layer is called on, and how random numbers are drawn in training."""

    x_BSD: Tensor
    real_BS: Tensor | None = None
    ids_BS: Tensor | None = None
    training: bool = True
    draw: Callable[[Tensor], Tensor] = torch.rand_like  # U(0, 1), of its argument's shape
    jitter_TD: Tensor | None = None  # what the router's input is multiplied with
    elsewhere_E: Tensor | int = 0  # what other micro-batches and ranks have counted, for --moe-balance global


class Chosen(NamedTuple):
    """Which experts the tokens chose, before anything is dropped."""

    place_TE: Tensor  # int: 0 for a token's first choice, 1 for its second, … ; -1: not chosen
    weight_TE: Tensor  # what a chosen expert's output is multiplied with
    probability_TE: Tensor  # sums to one over experts
    counted_TE: Tensor | None  # int as place_TE: what the balancing losses count; None: there are no losses


class Output(NamedTuple):
    """What the layer must agree with."""

    y_BSD: Tensor
    loss: Tensor
    count_E: Tensor  # assignments before drops
    counted_E: Tensor  # choices by the scores alone
    dropped: int


def dense(config: MoEConfig, weights: dict[str, Tensor], batch: Batch) -> Output:
    """The whole layer. `weights` are its parameters and buffers by name."""
    B, S, D = batch.x_BSD.shape
    x_TD = batch.x_BSD.reshape(B * S, D)
    real_T = torch.ones(B * S, dtype=torch.bool) if batch.real_BS is None else batch.real_BS.reshape(-1)
    seen_TD = x_TD if batch.jitter_TD is None else x_TD * batch.jitter_TD
    logits_TE = seen_TD @ weights["router.layer.weight"].T

    chosen = RULES[config.router](logits_TE, config, batch, real_T, weights.get("router.bias_E"))
    place_TE = chosen.place_TE.masked_fill(~real_T[:, None], -1)
    kept_TE = drop(place_TE, chosen.weight_TE.detach(), config, batch)
    weight_TE = torch.where(kept_TE, chosen.weight_TE, 0.0)
    if config.normalize_after_drops:
        weight_TE = weight_TE / weight_TE.sum(1, keepdim=True).clamp(min=torch.finfo(torch.float32).eps)

    x_TED = x_TD[:, None, :].expand(-1, place_TE.shape[1], -1)
    if config.straight_through:
        x_TED = x_TED * (1 + weight_TE - weight_TE.detach())[:, :, None]
    y_TD = (weight_TE[:, :, None] * every_expert(x_TED, weights, config)).sum(1)
    y_TD = add_dense_parts(x_TD, y_TD, weights, config)

    counted_TE = place_TE if chosen.counted_TE is None else chosen.counted_TE
    counted_TE = counted_TE.masked_fill(~real_T[:, None], -1)
    loss = config.z_loss_weight * logits_TE.logsumexp(1)[real_T].square().sum() / max(int(real_T.sum()), 1)
    if chosen.counted_TE is not None:
        for name, weight in loss_weights(config).items():
            loss = loss + weight * LOSSES[name](chosen.probability_TE, counted_TE, real_T, batch)
    counts = [(places >= 0).sum(0) for places in (place_TE, counted_TE)]
    return Output(y_TD.view(B, S, D), loss, *counts, int((place_TE >= 0).sum() - kept_TE.sum()))


# --- routers: (logits, config, batch, real_T, bias_E) -> Chosen


def top_k(logits_TE, config, batch, real_T, bias_E) -> Chosen:
    """K highest scores; the bias, noise and groups matter for the selection alone."""
    score_TE = logits_TE.sigmoid() if config.score == "sigmoid" else softmax(logits_TE)
    key_TE = score_TE.detach() if bias_E is None else score_TE.detach() + bias_E
    if config.noise != "none" and batch.training:
        first_TE = places(key_TE) == 0
        gumbel_TE = -torch.log(-torch.log(batch.draw(logits_TE)))
        key_TE = logits_TE.detach() + gumbel_TE
        if config.noise == "second_expert":
            key_TE = torch.where(first_TE, math.inf, key_TE)
    if config.num_groups > 1:
        key_TE = torch.where(in_best_groups(key_TE, config), key_TE, -math.inf)
    place_TE = first(places(key_TE), config.top_k)
    if config.score_order == "after":
        weight_TE = softmax(torch.where(place_TE >= 0, logits_TE, -math.inf))
    else:
        weight_TE = torch.where(place_TE >= 0, score_TE, 0.0)
    if config.normalize_weights:
        weight_TE = weight_TE / weight_TE.sum(1, keepdim=True)
    probability_TE = score_TE / score_TE.sum(1, keepdim=True)
    counted_TE = first(places(score_TE.detach()), config.top_k)
    return Chosen(place_TE, weight_TE * config.weight_scale, probability_TE, counted_TE)


RULES = {"top_k": top_k}


def softmax(logits_TE: Tensor) -> Tensor:
    power_TE = (logits_TE - logits_TE.detach().amax(1, keepdim=True)).exp()
    return power_TE / power_TE.sum(1, keepdim=True)


def places(key_TE: Tensor) -> Tensor:
    """How many experts a token prefers to this one: 0 for the best."""
    return (key_TE[:, None, :] > key_TE[:, :, None]).sum(2)


def first(place_TE: Tensor, k: int) -> Tensor:
    """Only the first k places; -1 for the others."""
    return place_TE.masked_fill(place_TE >= k, -1)


def in_best_groups(key_TE: Tensor, config: MoEConfig) -> Tensor:
    """bool: experts of the top_groups groups whose best k/top_groups keys have the largest sum."""
    T, E = key_TE.shape
    key_TGX = key_TE.view(T, config.num_groups, E // config.num_groups)
    best = key_TGX.sort(2, descending=True).values[:, :, : config.top_k // config.top_groups]
    return (places(best.sum(2)) < config.top_groups).repeat_interleave(E // config.num_groups, 1)


# --- capacity


def capacity(tokens: int, config: MoEConfig, training: bool) -> int:
    """Places of an expert among so many tokens; 0: no limit, also where the formula gives 0."""
    factor = config.capacity_factor
    if not training and config.eval_capacity_factor is not None:
        factor = config.eval_capacity_factor
    if factor == 0:
        return 0
    share = factor * (config.top_k * tokens / config.num_experts)
    whole = int(share) if config.capacity_rounding == "down" else math.ceil(share)
    return min(tokens, max(whole, config.min_capacity))


def drop(place_TE: Tensor, weight_TE: Tensor, config: MoEConfig, batch: Batch) -> Tensor:
    """kept_TE, bool: each expert serves its candidates in the policy's order until it is full."""
    B, S, _ = batch.x_BSD.shape
    T = B * S
    window = S if config.capacity_per == "sequence" else T
    limit = capacity(window, config, batch.training)
    if not limit or config.router in ("expert_choice", "expert_choice_causal"):
        return place_TE >= 0
    policy = config.drop_policy
    chance = batch.draw(weight_TE).tolist() if policy == "random" and batch.training else None
    place, weight = place_TE.tolist(), weight_TE.tolist()
    order: Callable[[int, int], float | tuple[float, ...]] = {
        "position": lambda t, e: t,
        "choice": lambda t, e: (place[t][e], t),
        "probs": lambda t, e: (-weight[t][e], t),
        "random": lambda t, e: (-chance[t][e], t) if chance else (place[t][e], t),
    }[policy]
    kept = [[False] * len(place[0]) for _ in range(T)]
    for expert in range(len(place[0])):
        for start in range(0, T, window):
            queue = [t for t in range(start, start + window) if place[t][expert] >= 0]
            for t in sorted(queue, key=lambda t: order(t, expert))[:limit]:  # noqa: B023
                kept[t][expert] = True
    return torch.tensor(kept)


# --- experts and what stands beside them


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": lambda h: h / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3))),
    "gelu_exact": lambda h: h / 2 * (1 + torch.erf(h / math.sqrt(2))),
    "relu": lambda h: h.clamp(min=0),
    "relu_squared": lambda h: h.clamp(min=0) ** 2,
    "silu": lambda h: h * h.sigmoid(),
}
GATED = {"swiglu": "silu", "geglu": "gelu_exact", "geglu_tanh": "gelu", "reglu": "relu", "bilinear": None}


def between(kind: str, gate: Tensor, value: Tensor | None) -> Tensor:
    """What is between an expert's products."""
    if kind in ACTIVATIONS:
        assert value is None
        return ACTIVATIONS[kind](gate)
    assert value is not None
    name = GATED[kind]
    return (gate if name is None else ACTIVATIONS[name](gate)) * value


def every_expert(x_TED: Tensor, weights: dict[str, Tensor], config: MoEConfig) -> Tensor:
    """y_TED: expert e's output for token t, all of them."""

    def product(a_TEX: Tensor, matrix: str, bias: str) -> Tensor | None:
        if (w_EXY := weights.get(f"experts.mlp.{matrix}")) is None:
            return None
        y_TEY = torch.einsum("tex,exy->tey", a_TEX, w_EXY)
        b_EY = weights.get(f"experts.mlp.{bias}")
        assert (b_EY is not None) == config.expert_bias
        return y_TEY if b_EY is None else y_TEY + b_EY

    gate_TEF = product(x_TED, "w1", "b1")
    assert gate_TEF is not None
    y_TED = product(between(config.ffn_type, gate_TEF, product(x_TED, "v1", "c1")), "w2", "b2")
    assert y_TED is not None
    return y_TED


def mlp(x_TD: Tensor, weights: dict[str, Tensor], name: str, kind: str) -> Tensor:
    """A dense network of the experts' kind."""

    def linear(a: Tensor, layer: str) -> Tensor | None:
        weight = weights.get(f"{name}.{layer}.weight")
        return None if weight is None else F.linear(a, weight, weights.get(f"{name}.{layer}.bias"))

    gate_TF = linear(x_TD, "w1")
    assert gate_TF is not None
    y_TD = linear(between(kind, gate_TF, linear(x_TD, "v1")), "w2")
    assert y_TD is not None
    return y_TD


def add_dense_parts(x_TD: Tensor, y_TD: Tensor, weights: dict[str, Tensor], config: MoEConfig) -> Tensor:
    """The output bias, the shared expert and the residual MLP."""
    if config.output_bias:
        y_TD = y_TD + weights["experts.bias"]
    if config.shared_hidden_dim:
        shared_TD = mlp(x_TD, weights, "mixing.shared", config.ffn_type)
        if config.shared_mix == "olmo":
            y_TD = (shared_TD + config.top_k * y_TD) / (config.top_k + 1)
        elif config.shared_mix == "gate":
            y_TD = y_TD + torch.sigmoid(x_TD @ weights["mixing.gate.weight"].T) * shared_TD
        else:
            y_TD = y_TD + shared_TD
    if config.residual:
        c_T2 = softmax(x_TD @ weights["mixing.coefficient.weight"].T + weights["mixing.coefficient.bias"])
        y_TD = c_T2[:, 0, None] * y_TD + c_T2[:, 1, None] * mlp(x_TD, weights, "mixing.mlp", config.ffn_type)
    return y_TD


# --- balancing losses: (p_TE, counted_TE, real_T, batch) -> scalar


def loss_weights(config: MoEConfig) -> dict[str, float]:
    """Each loss of --moe-balance and its weight."""
    names = [name for name in (config.balance or ("aux",)) if name not in ("none", "bias")]
    if isinstance(config.loss_weight, tuple):
        return dict(zip(names, config.loss_weight, strict=True))
    return dict.fromkeys(names, config.loss_weight)


def switch(n_E: Tensor, p_TE: Tensor) -> Tensor:
    """E * sum_e f_e P_e: the shares of n choices times the mean probabilities of T tokens (Switch, eq. 4)."""
    if len(p_TE) == 0:
        return p_TE.sum()
    return p_TE.shape[1] * (n_E / n_E.sum() * p_TE.mean(0)).sum()


def aux(p_TE: Tensor, counted_TE: Tensor, real_T: Tensor, batch: Batch) -> Tensor:
    """Of all real tokens and all their choices."""
    return switch((counted_TE >= 0).sum(0), p_TE[real_T])


def global_(p_TE: Tensor, counted_TE: Tensor, real_T: Tensor, batch: Batch) -> Tensor:
    """With what others have counted, too."""
    return switch((counted_TE >= 0).sum(0) + batch.elsewhere_E, p_TE[real_T])


def first_choice(p_TE: Tensor, counted_TE: Tensor, real_T: Tensor, batch: Batch) -> Tensor:
    """Of first choices alone."""
    return switch((counted_TE == 0).sum(0), p_TE[real_T])


def sequence(p_TE: Tensor, counted_TE: Tensor, real_T: Tensor, batch: Batch) -> Tensor:
    """Of each sequence, averaged over tokens."""
    B = len(batch.x_BSD)
    total = p_TE.sum() * 0
    for p, counted, real in zip(p_TE.chunk(B), counted_TE.chunk(B), real_T.chunk(B), strict=True):
        total = total + switch((counted >= 0).sum(0), p[real]) * real.sum()
    return total / max(int(real_T.sum()), 1)


def importance(p_TE: Tensor, counted_TE: Tensor, real_T: Tensor, batch: Batch) -> Tensor:
    """Mean of two squared coefficients of variation over experts: of the sums of probabilities, and of the
    expected loads if scores had normal noise of deviation 1/E (Shazeer et al., appendix A; Tutel)."""
    E = p_TE.shape[1]
    p_TE, chosen_TE = p_TE[real_T], counted_TE[real_T] >= 0
    last_T = torch.where(chosen_TE, p_TE, math.inf).amin(1, keepdim=True)
    load_TE = 0.5 * (1 + torch.erf((p_TE - last_T) * E / math.sqrt(2)))

    def cv2(v_E: Tensor) -> Tensor:
        return ((v_E - v_E.mean()) ** 2).sum() / (E - 1) / (v_E.mean() ** 2 + 1e-10)

    return (cv2(p_TE.sum(0)) + cv2(load_TE.sum(0))) / 2


LOSSES = {"aux": aux, "global": global_, "first_choice": first_choice, "sequence": sequence,
          "importance": importance}  # fmt: skip
