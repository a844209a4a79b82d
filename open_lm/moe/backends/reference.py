"""The definition of the expert computation, one expert after the other: slow on a GPU, easy to believe.

Shapes: T tokens, D model width, E experts, F expert width, R rows (assignments).
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from open_lm.moe.routing import Routing

if TYPE_CHECKING:
    from open_lm.moe.experts import ExpertMLP


def reference(x_TD: Tensor, routing: Routing, mlp: "ExpertMLP") -> Tensor:
    """y_TD: each token's sum of weight * expert(x) over its kept rows; any dtype, one host sync."""
    outputs, start = [], 0
    for expert, count in enumerate(routing.count_E.tolist()):
        rows = slice(start, start + count)
        x_RD = x_TD[routing.token_R[rows]]
        if routing.input_weight_R is not None:
            x_RD = (x_RD * routing.input_weight_R[rows, None]).to(x_RD.dtype)
        gate_RF = x_RD @ mlp.w1[expert]
        value_RF = None if mlp.v1 is None else x_RD @ mlp.v1[expert]
        if mlp.b1 is not None:
            gate_RF = gate_RF + mlp.b1[expert].to(gate_RF.dtype)
        if value_RF is not None and mlp.c1 is not None:
            value_RF = value_RF + mlp.c1[expert].to(value_RF.dtype)
        y_RD = mlp.activate(gate_RF, value_RF) @ mlp.w2[expert]
        outputs.append(y_RD if mlp.b2 is None else y_RD + mlp.b2[expert].to(y_RD.dtype))
        start += count
    y_RD = torch.cat(outputs)
    wide = torch.promote_types(y_RD.dtype, routing.weight_R.dtype)
    weighted_RD = y_RD.to(wide) * routing.weight_R[:start, None]
    sum_TD = torch.zeros(x_TD.shape, dtype=wide, device=x_TD.device)
    return sum_TD.index_add(0, routing.token_R[:start], weighted_RD).to(y_RD.dtype)
