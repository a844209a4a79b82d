"""Routers: how tokens choose experts, each a function (logits_TE, MoEConfig, Context) -> Routing in `ROUTERS`.

To add one, write the function, add it here, and its name to `RouterName` in open_lm/config/moe.py.
"""

from collections.abc import Callable

from torch import Tensor

from open_lm.config.moe import MoEConfig
from open_lm.moe.routers.top_k import top_k
from open_lm.moe.routing import Context, Routing

Router = Callable[[Tensor, MoEConfig, Context], Routing]

# --moe-router → function
ROUTERS: dict[str, Router] = {function.__name__: function for function in (top_k,)}
