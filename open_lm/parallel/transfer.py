"""Copies from host memory to a GPU for which neither of the two waits."""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

IN_FLIGHT = 8
"""Copies of one shape between the host and the GPU; the next one waits for the first of them."""


class _Place(NamedTuple):
    buffer: Tensor
    """Pinned."""
    copied: torch.cuda.Event
    """When the GPU has read it."""


class Staging:
    """Pinned memory through which tensors go to a GPU, allocated once per shape.

    With `x.pin_memory()` for each, a trace of 41m on an H100 shows the GPU idle for 6 to 8 of a step's 73 ms
    between two copies: allocating pinned memory may wait until the GPU has nothing left to do.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.places: dict[tuple[torch.Size, torch.dtype], list[_Place]] = {}

    def send(self, x: Tensor) -> Tensor:
        """A contiguous copy of x on the GPU; x may be changed at once."""
        places = self.places.setdefault((x.shape, x.dtype), [])
        if len(places) < IN_FLIGHT:
            place = _Place(torch.empty(x.shape, dtype=x.dtype, pin_memory=True), torch.cuda.Event())
        else:
            place = places.pop(0)
            place.copied.synchronize()
        places.append(place)
        place.buffer.copy_(x)
        y = place.buffer.to(self.device, non_blocking=True)
        place.copied.record(torch.cuda.current_stream(self.device))
        return y


@cache
def _staging(device: torch.device) -> Staging:
    return Staging(device)


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """x on `device`: itself on a CPU, else a copy that does not wait."""
    return x if device.type != "cuda" else _staging(device).send(x)
