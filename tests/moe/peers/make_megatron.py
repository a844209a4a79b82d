"""Writes megatron.json beside this file: what the pure functions of Megatron-core's moe_utils give on a CPU.

    pip install --no-deps megatron-core==0.16.1
    python make_megatron.py

Shapes: T tokens, B sequences, S positions, E experts.
"""

import json
import tempfile
from pathlib import Path

import megatron.core
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.moe import moe_utils

T, E, B = 24, 8, 3
GENERATOR = torch.Generator().manual_seed(11)


def draw(*shape: int, scale: float = 1.5) -> torch.Tensor:
    return torch.randn(*shape, generator=GENERATOR) * scale


def slope_of(weight_TE: torch.Tensor) -> torch.Tensor:
    return torch.cos(torch.arange(weight_TE.numel()).float()).view_as(weight_TE)


def routing(bias: bool = False, **options) -> dict:
    """topk_routing_with_score_function, the loss's counts and scores, and gradients by the logits."""
    logits_TE = draw(T, E).requires_grad_()
    bias_E = draw(E, scale=0.2) if bias else None
    weight_TE, map_TE = moe_utils.topk_routing_with_score_function(logits_TE, expert_bias=bias_E, **options)
    (slope_of(weight_TE) * weight_TE).sum().backward()
    gradient = logits_TE.grad.tolist()
    logits_TE.grad = None
    score = options.get("score_function", "softmax")
    loss_map_TE, p_TE = moe_utils.compute_routing_scores_for_aux_loss(logits_TE, options["topk"], score)
    loss = moe_utils.switch_load_balancing_loss_func(
        p_TE, loss_map_TE.sum(dim=0), T, options["topk"], E, moe_aux_loss_coeff=1.0
    )
    loss.backward()
    loss_gradient = logits_TE.grad.tolist()
    logits_TE.grad = None
    # per sequence, as its router does: sequences stand beside the experts. Its tokens come position by position,
    # ours sequence by sequence.
    k, S = options["topk"], T // B
    p_S, map_S = (
        v.view(B, S, E).transpose(0, 1).reshape(S, B * E)
        for v in moe_utils.compute_routing_scores_for_aux_loss(logits_TE, k, score)[::-1]
    )
    per_sequence = moe_utils.switch_load_balancing_loss_func(p_S, map_S.sum(dim=0), S, k, E, 1.0) / B
    per_sequence.backward()
    return {
        "options": options,
        "logits": logits_TE.tolist(),
        "bias": None if bias_E is None else bias_E.tolist(),
        "weight": weight_TE.tolist(),
        "count": map_TE.sum(dim=0).tolist(),
        "gradient": gradient,
        "aux": loss.item(),
        "aux_gradient": loss_gradient,
        "sequence": per_sequence.item(),
        "sequence_gradient": logits_TE.grad.tolist(),
    }


def drops(policy: str, factor: float, k: int, tokens: int) -> dict:
    logits_TE = draw(tokens, E) + torch.linspace(1, 0, E)
    weight_TE, map_TE = moe_utils.topk_routing_with_score_function(logits_TE, k, use_pre_softmax=True)
    kept_TE, kept_map_TE = moe_utils.apply_router_token_dropping(
        weight_TE, map_TE, k, factor, drop_policy=policy
    )
    return {
        "policy": policy,
        "factor": factor,
        "k": k,
        "logits": logits_TE.tolist(),
        "weight": kept_TE.tolist(),
        "map": kept_map_TE.int().tolist(),
    }


def z_losses() -> dict:
    logits_TE = draw(T, E).requires_grad_()
    loss = moe_utils.z_loss_func(logits_TE, 1.0)
    loss.backward()
    padding_T = torch.arange(T) % 5 == 0
    return {
        "logits": logits_TE.tolist(),
        "loss": loss.item(),
        "gradient": logits_TE.grad.tolist(),
        "padding": padding_T.tolist(),
        "padded_loss": moe_utils.z_loss_func(logits_TE, 1.0, padding_mask=padding_T).item(),
    }


def bias_update(folder: str) -> dict:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    count_E, bias_E = torch.tensor([9.0, 1, 4, 4, 0, 6, 5, 11]), draw(E, scale=0.01)
    updated_E = moe_utils.get_updated_expert_bias(count_E.clone(), bias_E, 1e-3)
    dist.destroy_process_group()
    return {"count": count_E.tolist(), "bias": bias_E.tolist(), "updated": updated_E.tolist(), "rate": 1e-3}


def shorten(found):
    """`found` with its floats at the nine digits that tell one float32 from another."""
    if isinstance(found, dict):
        return {name: shorten(value) for name, value in found.items()}
    if isinstance(found, list):
        return [shorten(value) for value in found]
    return float(f"{found:.9g}") if isinstance(found, float) else found


if __name__ == "__main__":
    sigmoid = {"score_function": "sigmoid"}
    groups = {"num_groups": 4, "group_topk": 2}
    found = {
        "megatron-core": megatron.core.__version__,
        "routing": [
            routing(topk=2, use_pre_softmax=False),
            routing(topk=2, use_pre_softmax=True),
            routing(topk=1, use_pre_softmax=True),
            routing(topk=3, use_pre_softmax=False, scaling_factor=2.5),
            routing(topk=4, use_pre_softmax=True, **groups),
            routing(topk=4, use_pre_softmax=False, **groups),
            routing(topk=1, **sigmoid),
            routing(topk=3, **sigmoid),
            routing(topk=3, bias=True, **sigmoid),
            routing(topk=4, bias=True, scaling_factor=2.5, **groups, **sigmoid),
        ],
        "drops": [
            drops("probs", factor, k, tokens)
            for factor, k, tokens in ((0.5, 2, 24), (0.7, 3, 25), (1.0, 1, 24), (1.1, 4, 40))
        ]
        + [drops("position", factor, k, tokens) for factor, k, tokens in ((0.5, 2, 12), (0.8, 2, 14))],
        "capacities": [
            {"tokens": n, "factor": f, "k": k, "min": least,
             "capacity": moe_utils.get_capacity(n * k, E, f, least or None)}
            for n, k in ((16, 1), (25, 2), (100, 3), (2049, 8))
            for f in (0.3, 0.5, 1.0, 1.1, 1.25)
            for least in (0, 4)
        ],
        "z": z_losses(),
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        found["bias"] = bias_update(folder)
    Path(__file__).with_name("megatron.json").write_text(json.dumps(shorten(found)) + "\n")
