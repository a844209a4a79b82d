"""Ranks, devices and the named axes of the device mesh; everything is the identity with one process."""

import os
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from open_lm.config.distributed import DistributedConfig

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """Who this process is."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    mesh: DeviceMesh | None
    """One axis, `shard`, over all ranks; None without a process group."""

    @property
    def is_first(self) -> bool:
        """True on the one rank that writes files and the console."""
        return self.rank == 0


def start(config: DistributedConfig) -> World:
    """Join torchrun's ranks (RANK, WORLD_SIZE, LOCAL_RANK): nccl on GPUs, gloo on CPUs.

    One process makes a group only for --fsdp or --force-distributed, and then needs no port.
    Raises ValueError if WORLD_SIZE promises ranks that the environment does not describe.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size > 1 and "RANK" not in os.environ:
        raise ValueError(f"WORLD_SIZE={world_size}, but RANK is not set: launch with torchrun")
    rank = int(os.environ.get("RANK", "0")) if world_size > 1 else 0
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = _device(local_rank, config.no_set_device_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    mesh = None
    if world_size > 1 or config.force_distributed or config.fsdp:
        _init_group(config, rank, world_size, device)
        mesh = init_device_mesh(device.type, (world_size,), mesh_dim_names=("shard",))
    return World(rank, local_rank, world_size, device, mesh)


def _device(local_rank: int, no_set_device_rank: bool) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    index = 0 if no_set_device_rank else local_rank
    if index >= torch.cuda.device_count():
        raise ValueError(
            f"LOCAL_RANK={local_rank}, but this host shows {torch.cuda.device_count()} GPUs: "
            "lower --nproc-per-node, or give --no-set-device-rank if each process sees only its own GPU"
        )
    return torch.device("cuda", index)


def _init_group(config: DistributedConfig, rank: int, world_size: int, device: torch.device) -> None:
    default = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        config.dist_backend or default,
        init_method=config.dist_url if world_size > 1 else None,
        store=dist.HashStore() if world_size == 1 else None,
        rank=rank,
        world_size=world_size,
        device_id=device if device.type == "cuda" else None,
    )


def stop() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def sum_over_ranks_(tensor: Tensor) -> Tensor:
    """Replace `tensor` on every rank by its sum over ranks, and return it."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def this_rank() -> int:
    """0 with one process."""
    return dist.get_rank() if dist.is_initialized() else 0


def barrier() -> None:
    """Wait until every rank is here."""
    if dist.is_initialized():
        dist.barrier()


def broadcast_object(value: T) -> T:
    """Rank 0's `value`, on every rank."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]
