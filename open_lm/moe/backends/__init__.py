"""How the experts are computed: functions (x_TD, Routing, ExpertMLP) -> y_TD that agree to rounding."""

from collections.abc import Callable

from torch import Tensor

from open_lm.moe.backends.grouped_mm import grouped_mm
from open_lm.moe.backends.reference import reference

BACKENDS: dict[str, Callable[..., Tensor]] = {
    function.__name__: function for function in (reference, grouped_mm)
}


def select(name: str) -> Callable[..., Tensor]:
    """The backend called `name`; `auto` is grouped_mm, which runs on every device."""
    return BACKENDS["grouped_mm" if name == "auto" else name]
