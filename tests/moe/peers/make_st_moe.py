"""Writes st_moe.json: what st-moe-pytorch's whole layer gives for the inputs of `case` (tests/moe/peers/inputs.py).

    pip install st-moe-pytorch==0.1.8     # with it CoLT5-attention 0.11.2, einops, beartype, local-attention
    python tests/moe/peers/make_st_moe.py

Stored and not run live: it would bring six packages of changing versions into every test run.
"""

import json
import sys
from pathlib import Path
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).parent))
from inputs import ST_MOE, StMoECase, st_moe_inputs


def run(case: StMoECase) -> dict:
    from st_moe_pytorch import MoE

    given = st_moe_inputs(case)
    layer = MoE(
        dim=case.dim,
        num_experts=case.experts,
        gating_top_n=case.k,
        expert_hidden_mult=4,
        threshold_train=case.threshold,
        threshold_eval=case.threshold,
        capacity_factor_train=case.factor,
        capacity_factor_eval=case.factor,
        differentiable_topk=case.differentiable,
        balance_loss_coef=1e-2,
        router_z_loss_coef=1e-3,
        is_distributed=False,
    ).train(case.training)
    layer.gate.to_gates.weight.data.copy_(given["gate"])
    for expert, network in enumerate(layer.experts.experts):
        into, between, out = network.net
        into.weight.data.copy_(given["in"][expert])
        into.bias.data.copy_(given["in_bias"][expert])
        between.mult_bias.data.copy_(given["between"][expert])
        out.weight.data.copy_(given["out"][expert])
        out.bias.data.copy_(given["out_bias"][expert])

    x = given["x"].requires_grad_()
    # (K, B, S) there; in evaluation all draws are 1/2
    draw = (
        given["draw"].movedim(-1, 0) if case.training else torch.full_like(given["draw"], 0.5).movedim(-1, 0)
    )
    with mock.patch.object(torch.Tensor, "uniform_", lambda self, *_: self.copy_(draw)):
        y, total, balance, z = layer(x)
    objective = (y * given["slope"]).sum() + total.sum()
    objective.backward()
    last = layer.experts.experts[-1].net[-1]
    return {
        "y": y.tolist(),
        "total": total.item(),
        "balance": balance.item(),
        "z": z.item(),
        "gradient_of_x": x.grad.tolist(),
        "gradient_of_gate": layer.gate.to_gates.weight.grad.tolist(),
        "gradient_of_last_out": last.weight.grad.tolist(),
    }


def rounded(value):
    if isinstance(value, list):
        return [rounded(each) for each in value]
    return float(f"{value:.8g}")


if __name__ == "__main__":
    results = {name: {k: rounded(v) for k, v in run(case).items()} for name, case in ST_MOE.items()}
    lines = ",\n".join(f" {json.dumps(name)}: {json.dumps(result)}" for name, result in results.items())
    Path(__file__).with_name("st_moe.json").write_text("{\n" + lines + "\n}\n")
