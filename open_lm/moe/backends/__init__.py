"""How the experts are computed: functions (x_TD, Routing, ExpertMLP) -> y_TD that agree to rounding."""

from collections.abc import Callable

import torch
from torch import Tensor

from open_lm.moe.backends.grouped_mm import grouped_mm
from open_lm.moe.backends.megablocks import load, megablocks
from open_lm.moe.backends.reference import reference
from open_lm.moe.backends.triton import load as load_triton
from open_lm.moe.backends.triton import triton

BACKENDS: dict[str, Callable[..., Tensor]] = {
    function.__name__: function for function in (reference, grouped_mm, triton, megablocks)
}


def select(name: str) -> Callable[..., Tensor]:
    """The backend called `name`; `auto` is grouped_mm, which runs on every device.

    Raises ValueError where it cannot run: `triton` and `megablocks` without a GPU or their packages.
    """
    if name == "triton":
        load_triton()
    if name == "megablocks":
        load()
        # the compiler would try to look into its kernels
        return torch.compiler.disable(megablocks)  # type: ignore[return-value]
    return BACKENDS["grouped_mm" if name == "auto" else name]
