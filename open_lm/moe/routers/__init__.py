"""Routers: how tokens choose experts, each a function (logits_TE, MoEConfig, Context) -> Routing in `ROUTERS`.

To add one, write the function, add it here, and its name to `RouterName` in open_lm/config/moe.py.
"""

from collections.abc import Callable

from torch import Tensor

from open_lm.config.moe import MoEConfig
from open_lm.moe.routers.coordinate_descent import coordinate_descent
from open_lm.moe.routers.expert_choice import expert_choice
from open_lm.moe.routers.expert_choice_causal import expert_choice_causal
from open_lm.moe.routers.hash import hash
from open_lm.moe.routers.quantile import quantile
from open_lm.moe.routers.sinkhorn import sinkhorn
from open_lm.moe.routers.threshold import threshold
from open_lm.moe.routers.top_k import top_k
from open_lm.moe.routers.uniform import uniform
from open_lm.moe.routing import Context, Routing

Router = Callable[[Tensor, MoEConfig, Context], Routing]

# --moe-router → function
ROUTERS: dict[str, Router] = {
    function.__name__: function
    for function in (
        top_k,
        expert_choice,
        expert_choice_causal,
        sinkhorn,
        threshold,
        coordinate_descent,
        quantile,
        hash,
        uniform,
    )
}
