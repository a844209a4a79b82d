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
    kept_TE = drop(place_TE, chosen.weight_TE.detach(), real_T, config, batch)
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
    """K highest scores, or logits where the softmax comes after the selection (Megatron judges groups so, too).

    Bias, noise and groups matter for the selection alone, noise for what is counted too.
    """
    score_TE = logits_TE.sigmoid() if config.score == "sigmoid" else softmax(logits_TE)
    key_TE = (logits_TE if config.score_order == "after" else score_TE).detach()
    if config.noise != "none" and batch.training:
        first_TE = places(key_TE) == 0
        gumbel_TE = -torch.log(-torch.log(batch.draw(logits_TE)))
        key_TE = logits_TE.detach() + gumbel_TE
        if config.noise == "second_expert":
            key_TE = torch.where(first_TE, math.inf, key_TE)
    counted_TE = first(places(key_TE), config.top_k)
    if bias_E is not None:
        key_TE = key_TE + bias_E
    if config.num_groups > 1:
        key_TE = torch.where(in_best_groups(key_TE, config), key_TE, -math.inf)
    place_TE = first(places(key_TE), config.top_k)
    if config.score_order == "after":
        weight_TE = softmax(torch.where(place_TE >= 0, logits_TE, -math.inf))
    else:
        weight_TE = torch.where(place_TE >= 0, score_TE, 0.0)
    probability_TE = score_TE / score_TE.sum(1, keepdim=True)
    return Chosen(place_TE, finish(weight_TE, place_TE, config), probability_TE, counted_TE)


def expert_choice(logits_TE, config, batch, real_T, bias_E) -> Chosen:
    """Each expert takes the tokens of highest probability, of the batch or of each sequence; at least one."""
    S = batch.x_BSD.shape[1]
    window = S if config.capacity_per == "sequence" else len(real_T)
    groups = [range(start, start + window) for start in range(0, len(real_T), window)]
    return experts_choose(logits_TE, config, batch, real_T, groups)


def expert_choice_causal(logits_TE, config, batch, real_T, bias_E) -> Chosen:
    """Each expert takes the sequences of highest probability at each position."""
    S = batch.x_BSD.shape[1]
    groups = [range(position, len(real_T), S) for position in range(S)]
    return experts_choose(logits_TE, config, batch, real_T, groups)


def experts_choose(logits_TE, config, batch, real_T, groups) -> Chosen:
    p_TE = softmax(logits_TE)
    taken_TE = torch.full(p_TE.shape, -1)
    p, real = p_TE.tolist(), real_T.tolist()
    for group in groups:
        places_of_expert = max(capacity(len(group), config, batch.training), 1)
        for expert in range(p_TE.shape[1]):
            there = [t for t in group if real[t]]
            for t in sorted(there, key=lambda t: -p[t][expert])[:places_of_expert]:
                taken_TE[t, expert] = 0
    return Chosen(taken_TE, p_TE * config.weight_scale, p_TE, None)


def sinkhorn(logits_TE, config, batch, real_T, bias_E) -> Chosen:
    """In training, K highest of the matrix whose rows sum to 1/T and columns to 1/E; else K highest logits."""
    key_TE = logits_TE.detach().double()
    if batch.training:
        share_TE = key_TE.exp() * real_T[:, None]
        for _ in range(8):
            share_TE = share_TE / share_TE.sum(1, keepdim=True).clamp(min=1e-30)
            share_TE = share_TE / share_TE.sum(0).clamp(min=1e-30)
        key_TE = share_TE
    place_TE = first(places(key_TE), config.top_k)
    score_TE = logits_TE.sigmoid() if config.top_k == 1 else softmax(logits_TE)
    return Chosen(place_TE, finish(score_TE, place_TE, config), softmax(logits_TE), None)


def quantile(logits_TE, config, batch, real_T, bias_E) -> Chosen:
    """K highest of logit - price; prices in four steps let in the kT/E highest bidders of each expert."""
    s_TE, k = logits_TE.detach(), config.top_k
    price_E = torch.zeros(s_TE.shape[1])
    for _ in range(4 if k < s_TE.shape[1] else 0):
        rival_T1 = (s_TE - price_E).sort(1, descending=True).values[:, k, None]
        bids = (s_TE - rival_T1)[real_T].sort(0, descending=True).values
        if len(bids):
            price_E = bids[k * len(bids) // len(price_E)]
    place_TE = first(places(s_TE - price_E), k)
    p_TE = softmax(logits_TE)
    return Chosen(place_TE, finish(p_TE, place_TE, config), p_TE, None)


def threshold(logits_TE, config, batch, real_T, bias_E) -> Chosen:
    """K highest probabilities over their sum; a choice after the first stays if a draw is < gate / threshold."""
    p_TE = softmax(logits_TE)
    return second_thoughts(p_TE, p_TE, config, batch)


def coordinate_descent(logits_TE, config, batch, real_T, bias_E) -> Chosen:
    """`threshold` with gates that are shares in a smooth top-k, of entropy .1 and 9/8 K (CoLT5, section 3)."""
    p_TE = softmax(logits_TE)
    k = torch.tensor(min(config.top_k * 9 / 8, p_TE.shape[1]))
    b_TE = -p_TE
    for _ in range(20):
        a_T1 = 0.1 * (k.log() - ((p_TE + b_TE) / 0.1).exp().sum(1, keepdim=True).log())
        b_TE = -(p_TE + a_T1).clamp(min=0)
    return second_thoughts(p_TE, ((p_TE + a_T1 + b_TE) / 0.1).exp(), config, batch)


def second_thoughts(p_TE, value_TE, config, batch) -> Chosen:
    counted_TE = first(places(p_TE), config.top_k)
    gate_TE = torch.where(counted_TE >= 0, value_TE, 0.0)
    gate_TE = gate_TE / gate_TE.sum(1, keepdim=True).clamp(min=1e-9)
    limit = config.threshold
    if not batch.training and config.eval_threshold is not None:
        limit = config.eval_threshold
    limit = torch.tensor([1.0, *(limit if isinstance(limit, tuple) else [limit] * (config.top_k - 1))])
    draw_TE = batch.draw(gate_TE.detach()) if batch.training else 0.5
    stays_TE = (counted_TE == 0) | (draw_TE < gate_TE / limit[counted_TE.clamp(min=0)])
    place_TE = torch.where(stays_TE, counted_TE, -1)
    return Chosen(place_TE, gate_TE * config.weight_scale, p_TE, counted_TE)


def hash(logits_TE, config, batch, real_T, bias_E) -> Chosen:
    """K experts from a 32-bit hash of the token's id, or of its position; weight 1/K; nothing is learned."""

    def mix(n: int) -> int:
        n %= 2**32
        for _ in range(2):
            n = (n ^ n // 2**16) * 0x45D9F3B % 2**32
        return n ^ n // 2**16

    B, S, _ = batch.x_BSD.shape
    ids = [t % S for t in range(B * S)] if batch.ids_BS is None else batch.ids_BS.flatten().tolist()
    E = logits_TE.shape[1]
    key_TE = torch.tensor([[float(mix(mix(n) + e)) for e in range(E)] for n in ids], dtype=torch.float64)
    place_TE = first(places(key_TE), config.top_k)
    weight_TE = torch.full(logits_TE.shape, config.weight_scale / config.top_k)
    return Chosen(place_TE, weight_TE, softmax(logits_TE), None)


def uniform(logits_TE, config, batch, real_T, bias_E) -> Chosen:
    """Real token number n goes to experts nK, nK + 1, … nK + K - 1, modulo E."""
    T, E = logits_TE.shape
    place_TE, turn = torch.full((T, E), -1), 0
    for t in range(T):
        for choice in range(config.top_k if real_T[t] else 0):
            place_TE[t, turn % E] = choice
            turn += 1
    p_TE = softmax(logits_TE)
    return Chosen(place_TE, finish(p_TE, place_TE, config), p_TE, None)


RULES = {rule.__name__: rule for rule in (top_k, expert_choice, expert_choice_causal, sinkhorn, quantile, threshold,
                                          coordinate_descent, hash, uniform)}  # fmt: skip


def finish(score_TE: Tensor, place_TE: Tensor, config: MoEConfig) -> Tensor:
    """Scores of the chosen, summing to one if asked to, scaled."""
    weight_TE = torch.where(place_TE >= 0, score_TE, 0.0)
    if config.normalize_weights:
        weight_TE = weight_TE / weight_TE.sum(1, keepdim=True).clamp(min=1e-20)
    return weight_TE * config.weight_scale


def softmax(logits_TE: Tensor) -> Tensor:
    power_TE = (logits_TE - logits_TE.detach().amax(1, keepdim=True)).exp()
    return power_TE / power_TE.sum(1, keepdim=True)


def places(key_TE: Tensor) -> Tensor:
    """How many experts a token prefers to this one: 0 for the best; of equal ones, the first."""
    other_TEE, this_TEE = key_TE[:, None, :], key_TE[:, :, None]
    tied_TEE = (other_TEE == this_TEE) & BEFORE_EE[: key_TE.shape[1], : key_TE.shape[1]]
    return ((other_TEE > this_TEE) | tied_TEE).sum(2)


BEFORE_EE = torch.ones(64, 64, dtype=torch.bool).tril(-1)  # [this, other]: other < this


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


def drop(place_TE: Tensor, weight_TE: Tensor, real_T: Tensor, config: MoEConfig, batch: Batch) -> Tensor:
    """kept_TE, bool: each expert serves its candidates in the policy's order until it is full.

    Its capacity is that of the real tokens.
    """
    B, S, _ = batch.x_BSD.shape
    T = B * S
    window = S if config.capacity_per == "sequence" else T
    if not capacity(window, config, batch.training) or config.router in (
        "expert_choice",
        "expert_choice_causal",
    ):
        return place_TE >= 0
    policy = config.drop_policy
    chance = batch.draw(weight_TE).tolist() if policy == "random" and batch.training else None
    place, weight, real = place_TE.tolist(), weight_TE.tolist(), real_T.tolist()
    order: Callable[[int, int], float | tuple[float, ...]] = {
        "position": lambda t, e: t,
        "choice": lambda t, e: (place[t][e], t),
        "probs": lambda t, e: (-weight[t][e], t),
        "random": lambda t, e: (-chance[t][e], t) if chance else (place[t][e], t),
    }[policy]
    kept = [[False] * len(place[0]) for _ in range(T)]
    for expert in range(len(place[0])):
        for start in range(0, T, window):
            limit = capacity(sum(real[start : start + window]), config, batch.training) or window
            queue = [t for t in range(start, start + window) if place[t][expert] >= 0]
            for t in sorted(queue, key=lambda t: order(t, expert))[:limit]:
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
    expected loads if logits had normal noise of deviation 1/E (V-MoE, 2106.05974, appendix A)."""
    E = p_TE.shape[1]
    p_TE, chosen_TE = p_TE[real_T], counted_TE[real_T] >= 0
    last_T = torch.where(chosen_TE, p_TE.log(), math.inf).amin(1, keepdim=True)
    load_TE = 0.5 * (1 + torch.erf((p_TE.log() - last_T) * E / math.sqrt(2)))

    def cv2(v_E: Tensor) -> Tensor:
        return ((v_E - v_E.mean()) ** 2).sum() / (E - 1) / (v_E.mean() ** 2 + 1e-10)

    return (cv2(p_TE.sum(0)) + cv2(load_TE.sum(0))) / 2


LOSSES = {"aux": aux, "global": global_, "first_choice": first_choice, "sequence": sequence,
          "importance": importance}  # fmt: skip
