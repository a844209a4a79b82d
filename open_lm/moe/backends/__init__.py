"""How the experts are computed: functions (x_TD, Routing, ExpertMLP) -> y_TD that agree to rounding."""

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from open_lm.moe.backends.grouped_mm import compute_dtype, grouped_mm
from open_lm.moe.backends.megablocks import load, megablocks
from open_lm.moe.backends.reference import reference
from open_lm.moe.backends.triton import load as load_triton
from open_lm.moe.backends.triton import triton
from open_lm.moe.routing import Routing

if TYPE_CHECKING:
    from open_lm.moe.experts import ExpertMLP

BACKENDS: dict[str, Callable[..., Tensor]] = {
    function.__name__: function for function in (reference, grouped_mm, triton, megablocks)
}


@torch.compiler.assume_constant_result
def resolve(name: str) -> str:
    """What `auto` stands for on this machine, and any other name for itself: triton where it was measured to be the
    fastest (a Hopper GPU, 16 bits), else grouped_mm, which runs on every device.
    """
    return fastest() if name == "auto" else name


@cache
def fastest() -> str:
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        return "grouped_mm"
    try:
        load_triton()
    except ValueError:
        return "grouped_mm"
    return "triton"


def auto(x_TD: Tensor, routing: Routing, mlp: "ExpertMLP") -> Tensor:
    """y_TD by `triton`'s kernels, or for tokens on a CPU or of 32 bits by `grouped_mm`."""
    narrow = compute_dtype(x_TD).itemsize == 2
    return (triton if x_TD.is_cuda and narrow else grouped_mm)(x_TD, routing, mlp)


def select(name: str) -> Callable[..., Tensor]:
    """The backend called `name`; `auto` is what `resolve` says.

    Raises ValueError where it cannot run: `triton` and `megablocks` without a GPU or their packages.
    """
    if name == "triton":
        load_triton()
    if name == "megablocks":
        load()
        # the compiler would try to look into its kernels
        return torch.compiler.disable(megablocks)  # type: ignore[return-value]
    if name == "auto" and resolve(name) == "triton":
        return auto
    return BACKENDS[resolve(name)]
