"""Writes deepspeed.json beside this file: what DeepSpeed's gating functions and its residual MoE give on a CPU.

    pip install deepspeed==0.19.8    (with DS_BUILD_OPS=0 in the environment)
    DS_BUILD_OPS=0 python make_deepspeed.py

Shapes: T tokens, E experts, C places of an expert, D model width.
"""

import json
import os
import tempfile
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.moe import sharded_moe
from deepspeed.moe.layer import MoE

T, E, D, WIDTH = 24, 6, 8, 5


def measure(gating, logits_TE, **options) -> dict:
    """One call: weights, places and counts, and the gradient of sum(slope * weight) + l_aux by the logits."""
    given_TE = logits_TE.clone().requires_grad_()
    loss, combine_TEC, mask_TEC, count_E = gating(given_TE * 1, **options)  # * 1: top2gating writes into it
    weight_TE = combine_TEC.sum(dim=2)
    slope_TE = torch.cos(torch.arange(weight_TE.numel()).float()).view_as(weight_TE)
    ((slope_TE * weight_TE).sum() + loss).backward()
    return {
        "logits": logits_TE.tolist(),
        "options": options,
        "function": gating.__name__,
        "l_aux": loss.item(),
        "exp_counts": count_E.tolist(),
        "weight": weight_TE.tolist(),
        "slots": mask_TEC.nonzero().tolist(),
        "gradient": given_TE.grad.tolist(),
    }


def gating_cases() -> list[dict]:
    generator = torch.Generator().manual_seed(5)

    def logits():
        # expert 0 is popular, so that places run out
        return torch.randn(T, E, generator=generator) * 1.5 + torch.tensor([1.5, 0.5, 0, 0, 0, -0.5])

    uniform_TE = torch.rand(T, E, generator=generator)
    gumbel_TE = -(-uniform_TE.log()).log()
    device = torch.device("cpu")
    sharded_moe.exp_selection_uniform_map[device] = lambda shape: uniform_TE
    sharded_moe.gumbel_map[device] = lambda shape: gumbel_TE
    top1, top2, topk = sharded_moe.top1gating, sharded_moe.top2gating, sharded_moe.topkgating
    calls = [
        (top1, {"capacity_factor": 1.0, "min_capacity": 0, "use_rts": True}),
        (top1, {"capacity_factor": 0.55, "min_capacity": 0, "use_rts": True}),
        (top1, {"capacity_factor": 0.5, "min_capacity": 4, "use_rts": True}),
        (top1, {"capacity_factor": 0.5, "min_capacity": 4, "use_rts": True, "noisy_gate_policy": "RSample"}),
        (top1, {"capacity_factor": 1.0, "min_capacity": 4, "use_rts": False, "drop_tokens": False}),
    ]
    for factor, least in ((0.5, 0), (0.45, 4), (1.0, 4), (1.25, 0)):
        for sampled in (False, True):
            calls.append((top2, {"capacity_factor": factor, "min_capacity": least,
                                 "top2_2nd_expert_sampling": sampled}))  # fmt: skip
    calls.append((top2, {"capacity_factor": 1.0, "min_capacity": 4, "drop_tokens": False,
                         "top2_2nd_expert_sampling": False}))  # fmt: skip
    for policy in ("probs", "position"):
        for k, factor, least in ((2, 0.5, 0), (3, 0.75, 0), (3, 0.2, 4), (4, 1.1, 1)):
            calls.append((topk, {"k": k, "capacity_factor": factor, "min_capacity": least,
                                 "drop_policy": policy}))  # fmt: skip
    calls.append((topk, {"k": 3, "capacity_factor": 1.0, "min_capacity": 0, "drop_tokens": False}))
    return [
        measure(gating, logits(), **options) | {"uniform": uniform_TE.tolist()} for gating, options in calls
    ]


def literal_tables() -> list[dict]:
    """The logits of DeepSpeed's own test of topkgating (tests/unit/v1/moe/test_moe.py), on rank 0."""
    four = [[0.11, 0.2, 0.1, 0.3], [0.3, 0.4, 0.11, 0.1], [0.11, 0.1, 0.6, 0.5], [0.1, 0.11, 0.7, 0.8]]
    six = [
        [0.5858, 0.4801, 0.6269, 0.5397, 0.9722, 0.7034],
        [0.5445, 0.6332, 0.4519, 0.6308, 0.0519, 0.6450],
        [0.4874, 0.8110, 0.7467, 0.8474, 0.0277, 0.3068],
        [0.8570, 0.6714, 0.5310, 0.3274, 0.4836, 0.9892],
    ]
    descending = [
        [0.95, 0.85, 0.9, 0.8],
        [0.7, 0.65, 0.75, 0.6],
        [0.5, 0.55, 0.45, 0.4],
        [0.35, 0.3, 0.25, 0.2],
    ]
    calls = [(four, {"k": 2, "drop_policy": policy}) for policy in ("probs", "position")]
    calls += [(six, {"k": 3, "drop_policy": policy}) for policy in ("probs", "position")]
    calls += [(descending, {"k": 2, "drop_tokens": False})]
    return [
        measure(sharded_moe.topkgating, torch.tensor(logits), capacity_factor=1, min_capacity=1, **options)
        for logits, options in calls
    ]


class Expert(torch.nn.Module):
    """Two linear maps with biases and an exact GELU between them."""

    def __init__(self):
        super().__init__()
        self.up, self.down = torch.nn.Linear(D, WIDTH), torch.nn.Linear(WIDTH, D)

    def forward(self, x):
        return self.down(torch.nn.functional.gelu(self.up(x)))


def residual_layer(folder: str) -> dict:
    """deepspeed.moe.layer.MoE with use_residual, on one process of gloo: output, gradients, weights."""
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=0, world_size=1)
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
    torch.manual_seed(3)
    layer = MoE(D, Expert(), num_experts=3, k=2, capacity_factor=0.8, min_capacity=0, use_residual=True,
                top2_2nd_expert_sampling=False)  # fmt: skip
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=D**-0.5)
    layer.set_deepspeed_parallelism()
    x = torch.randn(2, 6, D, requires_grad=True)
    y, loss, counts = layer(x)
    slope = torch.cos(torch.arange(y.numel()).float()).view_as(y)
    ((slope * y).sum() + loss).backward()
    dist.destroy_process_group()
    return {
        "x": x.tolist(),
        "y": y.tolist(),
        "l_aux": loss.item(),
        "exp_counts": counts.tolist(),
        "x_gradient": x.grad.tolist(),
        "weights": {name: parameter.tolist() for name, parameter in layer.named_parameters()},
        "gradients": {name: parameter.grad.tolist() for name, parameter in layer.named_parameters()},
    }


def shorten(found):
    """`found` with its floats at the nine digits that tell one float32 from another."""
    if isinstance(found, dict):
        return {name: shorten(value) for name, value in found.items()}
    if isinstance(found, list):
        return [shorten(value) for value in found]
    return float(f"{found:.9g}") if isinstance(found, float) else found


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        found = {
            "deepspeed": deepspeed.__version__,
            "cases": gating_cases(),
            "tables": literal_tables(),
            "residual": residual_layer(folder),
        }
    Path(__file__).with_name("deepspeed.json").write_text(json.dumps(shorten(found)) + "\n")
