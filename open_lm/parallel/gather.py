"""Whole tensors on rank 0 from shards on all ranks, and back; and what rank 0 does for all."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from open_lm.parallel.mesh import broadcast_object, this_rank

T = TypeVar("T")


def on_first_rank(function: Callable[[], T]) -> T | None:
    """Runs it on rank 0 and returns its result there (None elsewhere); its exception is raised on every rank."""
    result, error = None, None
    if this_rank() == 0:
        try:
            result = function()
        except Exception as e:
            error = e
    error = broadcast_object(error)
    if error is not None:
        raise error
    return result


def whole(tensor: DTensor) -> Tensor:
    """All of a sharded tensor, on every rank, on the mesh's device: shards in host memory travel from there."""
    device_mesh, local = tensor.device_mesh, tensor.to_local()
    moved = DTensor.from_local(
        local.to(device_mesh.device_type),
        device_mesh,
        tensor.placements,
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )
    return moved.full_tensor()


def gather(tensor: Tensor) -> Tensor:
    """All of a tensor, sharded or not, on the CPU of rank 0; on other ranks a tensor without elements."""
    tensor = tensor.detach()
    if isinstance(tensor, DTensor):
        tensor = whole(tensor)
    if this_rank():
        return tensor.new_empty(0)
    tensor = tensor.cpu()
    # a view would keep, and torch.save would write, the whole storage behind it
    return tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor


@torch.no_grad()
def spread_(target: Tensor, source: Tensor | None) -> None:
    """Fills `target`, sharded or not, on all ranks from `source`, which only rank 0 has."""
    if isinstance(target, DTensor):
        local, device = target.to_local(), target.device_mesh.device_type  # offloaded shards are not there
        if source is None:
            source = torch.empty(target.shape, dtype=local.dtype, device=device)
        source = source.to(device=device, dtype=local.dtype)
        local.copy_(distribute_tensor(source, target.device_mesh, target.placements).to_local())
        return
    if source is not None:
        target.copy_(source)
    if dist.is_initialized():
        dist.broadcast(target, src=0)


def gather_objects(value: T) -> list[T]:
    """Every rank's `value`, in the order of ranks, on every rank."""
    if not dist.is_initialized():
        return [value]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, value)
    return everyone


def gather_alike(tensor: Tensor) -> Tensor | None:
    """Every rank's tensor, all of one shape, stacked in the order of ranks on the CPU of rank 0; else None."""
    if not dist.is_initialized():
        return tensor.cpu()[None]
    first = this_rank() == 0
    everyone = [torch.empty_like(tensor) for _ in range(dist.get_world_size())] if first else None
    dist.gather(tensor.contiguous(), everyone, dst=0)
    return torch.stack([part.cpu() for part in everyone]) if everyone else None
