"""Which settings of a mixture of experts contradict each other, and which see later tokens."""

import math
from collections.abc import Collection
from dataclasses import fields, replace

from open_lm.config.moe import SELF_BALANCED, MoEConfig
from open_lm.config.moe_layers import check_placement, flag
from open_lm.config.moe_types import check_types

# Routers in which experts choose tokens: they fill each expert to its capacity and drop nothing.
EXPERTS_CHOOSE = ("expert_choice", "expert_choice_causal")
# Routers that remove choices of a small weight, and whose weights sum to one.
REMOVING = ("threshold", "coordinate_descent")
OF_CAPACITY = ("drop_policy", "pad_to_capacity", "min_capacity", "capacity_per", "capacity_rounding")
POSITIVE = ("num_groups", "top_groups", "weight_scale", "hidden_dim",
            "dim")  # fmt: skip
NOT_NEGATIVE = ("freq", "first_dense", "capacity_factor", "eval_capacity_factor", "min_capacity", "bias_rate",
                "z_loss_weight", "shared_hidden_dim")  # fmt: skip


def check_moe(
    moe: MoEConfig,
    given: Collection[str] = (),
    n_layers: int | None = None,
    routers: Collection[str] = (),
) -> None:
    """Raises ValueError on the first contradiction, naming the flags, their values and what to do.

    `given` are the names ("moe_top_k") of flags given by hand, `n_layers` the model's depth; without it, the
    placement of layers is not looked at (a layer by itself). `routers` are names of further routers.
    """
    check_types(moe, routers)
    for name in POSITIVE:
        if (value := getattr(moe, name)) is not None and not 0 < value < math.inf:
            raise ValueError(f"{flag(name)} {value}: expected more than 0")
    for name in ("threshold", "eval_threshold"):
        _check_threshold(moe, name)
    for name in NOT_NEGATIVE:
        if (value := getattr(moe, name)) is not None and not 0 <= value < math.inf:
            raise ValueError(f"{flag(name)} {value}: expected 0 or more")
    if moe.top_k < 1:
        raise ValueError(f"--moe-top-k {moe.top_k}: expected at least 1")
    for experts in moe.num_experts if isinstance(moe.num_experts, tuple) else (moe.num_experts,):
        if experts is not None:
            _check_experts(moe, experts)
    if n_layers is not None and not check_placement(moe, given, n_layers):
        return
    if not 0 <= moe.jitter < 1:
        raise ValueError(f"--moe-jitter {moe.jitter}: expected 0 <= jitter < 1")
    _check_needed(moe, given)
    _check_scores(moe)
    _check_balance(moe)
    _check_capacity(moe)
    if moe.shared_mix != "sum" and not moe.shared_hidden_dim:
        raise ValueError(
            f"--moe-shared-mix {moe.shared_mix} without a shared expert: add --moe-shared-hidden-dim"
        )


def _check_experts(moe: MoEConfig, experts: int) -> None:
    if experts < 1:
        raise ValueError(f"--moe-num-experts {experts}: expected at least 1")
    if moe.top_k > experts:
        raise ValueError(
            f"--moe-top-k {moe.top_k} > --moe-num-experts {experts}: a token cannot go to more experts than "
            "there are"
        )
    if experts % moe.num_groups:
        raise ValueError(
            f"--moe-num-experts {experts} is not divisible into --moe-num-groups {moe.num_groups}"
        )
    if moe.top_groups > moe.num_groups:
        raise ValueError(
            f"--moe-top-groups {moe.top_groups} > --moe-num-groups {moe.num_groups}: a token cannot use more "
            "groups than there are"
        )
    if moe.top_groups == moe.num_groups > 1:
        raise ValueError(
            f"--moe-top-groups {moe.top_groups} of --moe-num-groups {moe.num_groups}: a token may use every group, "
            "so the groups limit nothing; lower --moe-top-groups, or drop both"
        )
    if moe.num_groups > 1 and (usable := experts // moe.num_groups * moe.top_groups) < moe.top_k:
        raise ValueError(
            f"--moe-top-k {moe.top_k}, but --moe-top-groups {moe.top_groups} of --moe-num-groups "
            f"{moe.num_groups} leave a token only {usable} of {experts} experts: raise --moe-top-groups"
        )
    if moe.num_groups > 1 and moe.top_k % moe.top_groups:
        raise ValueError(
            f"--moe-top-k {moe.top_k} is not divisible by --moe-top-groups {moe.top_groups}: a group is judged "
            "by its best k/top_groups scores"
        )


def _check_needed(moe: MoEConfig, given: Collection[str]) -> None:
    """Refuses numbers that nothing would read."""
    for name, needed in _idle(moe).items():
        value, default = getattr(moe, name), getattr(MoEConfig, name)
        if value != default or f"moe_{name}" in given:
            raise ValueError(f"{flag(name)} {value} needs {needed}: add it, or drop {flag(name)}")


def _idle(moe: MoEConfig) -> dict[str, str]:
    """The fields that nothing reads, by name, and what would."""
    needs = {
        "threshold": ("--moe-router threshold or coordinate_descent", moe.router in REMOVING),
        "eval_threshold": ("--moe-router threshold or coordinate_descent", moe.router in REMOVING),
        "bias_rate": ("--moe-balance bias", "bias" in moe.balances),
        "top_groups": ("--moe-num-groups", moe.num_groups > 1),
        "loss_weight": ("a loss in --moe-balance", bool(set(moe.balances) - {"bias"})),
        "recompute": ("--moe-backend triton", moe.backend == "triton"),
    }
    return {name: needed for name, (needed, there) in needs.items() if not there}


def without_idle(moe: MoEConfig, given: Collection[str]) -> MoEConfig:
    """`moe` with defaults for what nothing reads: a checkpoint's loss weight where a flag switches the loss off.

    What is `given` stays, so that `check_moe` refuses it.
    """
    idle = {*_idle(moe), *(OF_CAPACITY if dropless(moe) else ())}
    return replace(moe, **{name: getattr(MoEConfig, name) for name in idle if f"moe_{name}" not in given})


def dropless(moe: MoEConfig) -> bool:
    """Whether nothing is dropped, in training and evaluation."""
    return not moe.capacity_factor and not moe.eval_capacity_factor


def _check_threshold(moe: MoEConfig, name: str) -> None:
    value = getattr(moe, name)
    each = value if isinstance(value, tuple) else () if value is None else (value,)
    for number in each:
        if not 0 < number < math.inf:
            raise ValueError(f"{flag(name)} {number}: expected more than 0")
    if isinstance(value, tuple) and len(value) != moe.top_k - 1:
        raise ValueError(
            f"{flag(name)} {' '.join(map(str, value))}: {len(value)} numbers for the {moe.top_k - 1} choices after "
            f"the first (--moe-top-k {moe.top_k}); give one for all, or one each"
        )


def _check_scores(moe: MoEConfig) -> None:
    if moe.score == "sigmoid" and moe.score_order == "after":
        raise ValueError(
            "--moe-score sigmoid --moe-score-order after: a sigmoid does not depend on what was chosen; drop "
            "--moe-score-order"
        )
    only_top_k = {
        "--moe-score sigmoid": moe.score == "sigmoid",
        "--moe-score-order after": moe.score_order == "after",
        "--moe-num-groups": moe.num_groups > 1,
        f"--moe-noise {moe.noise}": moe.noise != "none",
    }
    if moe.router != "top_k" and (wrong := [name for name, on in only_top_k.items() if on]):
        raise ValueError(f"{', '.join(wrong)} belong to --moe-router top_k, not {moe.router}: drop one")
    if moe.noise == "second_expert" and moe.top_k < 2:
        raise ValueError(f"--moe-noise second_expert with --moe-top-k {moe.top_k}: there is no second expert")
    if moe.router in REMOVING and moe.top_k == 1:
        raise ValueError(
            f"--moe-router {moe.router} with --moe-top-k 1: the one weight is 1 and the router would "
            "not learn from the output; use --moe-top-k 2 or more, or --moe-router top_k"
        )
    to_one = {
        "--moe-normalize-weights": moe.normalize_weights,
        "--moe-normalize-after-drops": moe.normalize_after_drops,
        "--moe-score-order after": moe.score_order == "after",
    }
    if moe.top_k == 1 and (wrong := [name for name, on in to_one.items() if on]):
        raise ValueError(
            f"{wrong[0]} with --moe-top-k 1 makes every weight 1: the router would not learn from the output; drop "
            f"{wrong[0]}"
        )
    if moe.router in EXPERTS_CHOOSE:
        for name in ("normalize_weights", "normalize_after_drops"):
            if getattr(moe, name):
                raise ValueError(
                    f"{flag(name)} with --moe-router {moe.router}: a token may get no expert at all, its weights "
                    "are not a distribution; drop it"
                )
    if moe.normalize_after_drops and moe.normalize_weights:
        raise ValueError("--moe-normalize-weights and --moe-normalize-after-drops are both given: use one")
    if moe.noise != "none" and "bias" in moe.balances:
        raise ValueError(
            f"--moe-noise {moe.noise} with --moe-balance bias: noise selects by logits, the bias is a shift of "
            "scores; use another method of --moe-balance, or no noise"
        )
    if moe.normalize_after_drops and moe.weight_scale != 1:
        raise ValueError(
            f"--moe-weight-scale {moe.weight_scale} with --moe-normalize-after-drops, which makes the weights sum "
            "to one whatever their scale: drop one"
        )
    if moe.router == "hash":
        for name in ("jitter", "z_loss_weight", "straight_through"):
            if value := getattr(moe, name):
                raise ValueError(
                    f"{flag(name)} {value} with --moe-router hash, whose experts and weights do not depend on the "
                    f"router's logits: drop {flag(name)}"
                )


def _check_balance(moe: MoEConfig) -> None:
    names = moe.balance or ()
    shown = f"--moe-balance {' '.join(names)}"
    if moe.balance == ():
        raise ValueError("--moe-balance has no value: name a method, or none")
    if "none" in names and len(names) > 1:
        raise ValueError(f"{shown}: none stands alone")
    if len(set(names)) != len(names):
        raise ValueError(f"{shown}: a method is named twice")
    if moe.router in SELF_BALANCED and (useless := [name for name in names if name != "none"]):
        raise ValueError(
            f"--moe-balance {' '.join(useless)} with --moe-router {moe.router}, whose loads do not follow from the "
            "router's probabilities alone: there is nothing to balance; use --moe-balance none"
        )
    if "bias" in names and moe.router != "top_k":
        raise ValueError(
            f"--moe-balance bias with --moe-router {moe.router}: the bias acts on top-k's scores; use "
            "--moe-router top_k, or another method"
        )
    if "bias" in names and moe.score_order == "after":
        raise ValueError(
            "--moe-balance bias with --moe-score-order after: the bias is added to scores before the selection; "
            "use --moe-score-order before"
        )
    losses = [name for name in moe.balances if name != "bias"]
    weights = moe.loss_weight if isinstance(moe.loss_weight, tuple) else (moe.loss_weight,) * len(losses)
    if len(weights) != len(losses):
        raise ValueError(
            f"--moe-loss-weight {' '.join(map(str, weights))}: {len(weights)} weights for the {len(losses)} losses "
            f"of --moe-balance ({' '.join(losses) or 'none'}); give one for all, or one each (bias takes none)"
        )
    for weight in weights:
        if not 0 <= weight < math.inf:
            raise ValueError(f"--moe-loss-weight {weight}: expected 0 or more")


def _check_capacity(moe: MoEConfig) -> None:
    for name in OF_CAPACITY:
        value = getattr(moe, name)
        if dropless(moe) and value != getattr(MoEConfig, name):
            raise ValueError(
                f"{flag(name)} {value} with --moe-capacity-factor 0 (dropless): there is no capacity; drop one"
            )
    if moe.router in EXPERTS_CHOOSE:
        for name in ("capacity_factor", "eval_capacity_factor"):
            if getattr(moe, name) == 0:
                raise ValueError(
                    f"{flag(name)} 0 with --moe-router {moe.router}: each expert takes factor * k * T / E "
                    f"tokens, it cannot take none; give {flag(name)} (Zhou et al.: k * factor = 2)"
                )
        if moe.drop_policy != "position":
            raise ValueError(
                f"--moe-drop-policy {moe.drop_policy} with --moe-router {moe.router}: experts choose, nothing is "
                "dropped"
            )
    if moe.router == "expert_choice_causal" and moe.capacity_per == "sequence":
        raise ValueError(
            "--moe-router expert_choice_causal chooses over the batch at one position: --moe-capacity-per batch"
        )
    if moe.router == "expert_choice_causal" and moe.pad_to_capacity:
        raise ValueError(
            "--moe-pad-to-capacity with --moe-router expert_choice_causal, whose experts take a fixed number of "
            "tokens at each position already: drop --moe-pad-to-capacity"
        )


def sees_later_tokens(moe: MoEConfig) -> list[str]:
    """Why a token's output depends on tokens after it in its own sequence: a sentence for each reason."""
    reasons = []
    always, training = "in training and evaluation", "in training; evaluation is causal"
    routers = {"expert_choice": always, "quantile": always, "sinkhorn": training}
    if moe.router in routers:
        reasons.append(f"--moe-router {moe.router} sees later tokens {routers[moe.router]}")
    if moe.router in EXPERTS_CHOOSE:
        return reasons
    # who is dropped may depend on later tokens: on their weights (all the same with hash), on their first choices
    # or on chance (where they choose at all)
    by_weight = moe.drop_policy == "probs" and moe.router != "hash"
    by_chance = moe.drop_policy == "random" and moe.router != "uniform"
    by_choice = moe.drop_policy in ("choice", "random") and moe.top_k > 1 and moe.router != "uniform"
    in_training = bool(moe.capacity_factor) and (by_weight or by_chance or by_choice)
    factor = moe.capacity_factor if moe.eval_capacity_factor is None else moe.eval_capacity_factor
    in_evaluation = bool(factor) and (by_weight or by_choice)
    if in_training or in_evaluation:
        when = always if in_training and in_evaluation else training if in_training else "in evaluation alone"
        reasons.append(f"--moe-drop-policy {moe.drop_policy} sees later tokens {when}: they may take a place")
    return reasons


assert {*POSITIVE, *NOT_NEGATIVE} <= {f.name for f in fields(MoEConfig)}
