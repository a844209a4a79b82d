"""Ranks, devices and the named axes of the device mesh; everything is the identity with one process."""

import os
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.rendezvous import rendezvous

from open_lm.config.distributed import DistributedConfig
from open_lm.parallel.launch import Ranks, count_restarts, find_ranks
from open_lm.parallel.meeting import JOIN_SECONDS, meet
from open_lm.parallel.watch import StopAsked, Watch, has_agent_store, open_store

T = TypeVar("T")


# What each --dist-backend makes: gloo carries what lies in host memory in any case.
BACKENDS = {"nccl": "cpu:gloo,cuda:nccl", "gloo": "gloo"}
# NCCL's last collectives are kept, and written when one times out.
FLIGHT_RECORDER = {
    "TORCH_FR_BUFFER_SIZE": "2000",
    "TORCH_NCCL_TRACE_BUFFER_SIZE": "2000",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
}


@dataclass(frozen=True)
class World:
    """Who this process is."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    mesh: DeviceMesh | None
    """One axis, `shard`, over all ranks; with --fsdp-hybrid on several hosts (`replicate`, `shard`): hosts and
    the ranks of each. None without a process group."""
    notes: tuple[str, ...] = ()
    """What the user should hear of how the ranks were found."""
    watch: Watch = field(default_factory=Watch)
    """Hears signals and notices hangs."""
    attempts: dist.Store | None = None
    """What torchrun keeps through its restarts of the ranks; None without torchrun."""
    restarts: int = 0
    """How often torchrun has started the ranks anew (--max-restarts), on whichever node."""

    @property
    def is_first(self) -> bool:
        """True on the one rank that writes files and the console."""
        return self.rank == 0


def start(config: DistributedConfig) -> World:
    """Join the ranks of torchrun or srun: nccl on GPUs, gloo on CPUs.

    One process makes a group only for --fsdp or --force-distributed, and then needs no port. Raises ValueError
    on flags that do not fit the environment, ConnectionError if not all ranks are there in JOIN_SECONDS.
    """
    ranks = find_ranks(config)
    device = _device(ranks.local_rank, config.no_set_device_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    notes = [ranks.note] if ranks.note else []
    mesh = store = None
    restarts = count_restarts()
    if ranks.world_size > 1 or config.force_distributed or config.fsdp:
        axes = _axes(config, ranks)
        name = _backend(config, device)
        if ranks.world_size > 1:
            store, attempt = meet(ranks)
            restarts = attempt - 1
        _init_group(name, store, config, ranks, device)
        mesh = init_device_mesh(device.type, tuple(axes.values()), mesh_dim_names=tuple(axes))
        if hybrid := _hybrid_flag(config):
            nodes = axes.get("replicate")
            over = f"replicated over {nodes} nodes" if nodes else "nothing replicated: there is one node"
            notes.append(f"{hybrid}: sharded over {axes['shard']} ranks, {over}")
    if config.fsdp_cpu_offload and device.type == "cpu":
        notes.append("--fsdp-cpu-offload does nothing: there is no GPU to take memory from")
    watch = Watch()
    watch.start(
        ranks.rank,
        ranks.world_size,
        open_store(store),
        config.stop_signals,
        config.hang_timeout,
    )
    attempts = open_attempts(ranks, store)
    return World(
        ranks.rank, ranks.local_rank, ranks.world_size, device, mesh, tuple(notes), watch, attempts, restarts
    )  # fmt: skip


def open_attempts(ranks: Ranks, store: dist.Store | None) -> dist.Store | None:
    """torchrun's own store, below the ranks', which it gives them anew with every attempt."""
    if not has_agent_store():
        return None
    if store is None:  # one rank, which has not met anybody
        store, _, _ = next(rendezvous("env://", ranks.rank, ranks.world_size))
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    return dist.PrefixStore("open_lm/attempts", store)


def set_begun(world: World) -> None:
    """An attempt has passed all that could be refused: what torchrun starts after it goes on from its states."""
    if world.attempts is not None and world.rank == 0:
        world.attempts.set("begun", "1")


def has_begun(world: World) -> bool:
    """Whether an earlier attempt has; True where nobody knows."""
    return world.attempts is None or world.attempts.check(["begun"])


def _device(local_rank: int, no_set_device_rank: bool) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    index = 0 if no_set_device_rank else local_rank
    if index >= torch.cuda.device_count():
        raise ValueError(
            f"LOCAL_RANK={local_rank}, but this host shows {torch.cuda.device_count()} GPUs: start fewer ranks on "
            "it, or give --no-set-device-rank if each process sees only its own GPU"
        )
    return torch.device("cuda", index)


def _hybrid_flag(config: DistributedConfig) -> str | None:
    if config.fsdp_hybrid_o2:
        return "--fsdp-hybrid-o2"
    return "--fsdp-hybrid" if config.fsdp_hybrid else None


def _axes(config: DistributedConfig, ranks: Ranks) -> dict[str, int]:
    """The mesh's axes and their sizes. Raises ValueError where --fsdp-hybrid cannot tell one host from another."""
    flag = _hybrid_flag(config)
    if flag is None:
        return {"shard": ranks.world_size}
    each = ranks.local_world_size
    if each is None or ranks.world_size % each:
        raise ValueError(
            f"{flag} shards within a node, but the {ranks.world_size} ranks are not equally many on all nodes, or "
            "neither LOCAL_WORLD_SIZE nor SLURM_STEP_TASKS_PER_NODE says how many: launch with torchrun or srun"
        )
    if ranks.rank % each != ranks.local_rank:
        raise ValueError(
            f"{flag} shards within a node, but rank {ranks.rank} is number {ranks.local_rank} of the {each} ranks "
            "on its node: a node's ranks must follow each other (srun --distribution=block)"
        )
    if each == ranks.world_size:
        return {"shard": ranks.world_size}
    return {"replicate": ranks.world_size // each, "shard": each}


def _backend(config: DistributedConfig, device: torch.device) -> str:
    """Of BACKENDS. ValueError where it does not fit the flags or the device."""
    name = config.dist_backend or ("nccl" if device.type == "cuda" else "gloo")
    if name not in BACKENDS:
        raise ValueError(f"--dist-backend {name}: expected {' or '.join(BACKENDS)}")
    if name == "nccl" and device.type != "cuda":
        raise ValueError("--dist-backend nccl, but there is no GPU: use gloo, or leave it out")
    if name == "gloo" and device.type == "cuda" and config.fsdp_cpu_offload:
        raise ValueError(
            "--fsdp-cpu-offload with --dist-backend gloo on a GPU crashes torch 2.11: leave --dist-backend out"
        )
    return name


def _init_group(
    name: str, store: dist.Store | None, config: DistributedConfig, ranks: Ranks, device: torch.device
) -> None:
    """Makes the group; without a store, of one process by itself."""
    if name == "nccl":
        for variable, value in FLIGHT_RECORDER.items():
            os.environ.setdefault(variable, value)
    dist.init_process_group(
        BACKENDS[name],
        store=store or dist.HashStore(),
        rank=ranks.rank,
        world_size=ranks.world_size,
        timeout=timedelta(seconds=config.collective_timeout),
        device_id=device if name == "nccl" else None,
    )


def record_collectives(folder: str) -> None:
    """Lets NCCL's flight recorder write to the run's folder: debug/nccl_trace_rank_N, on a time-out."""
    for variable in (
        "TORCH_FR_DUMP_TEMP_FILE",
        "TORCH_NCCL_DEBUG_INFO_TEMP_FILE",
    ):  # torch 2.11's name, and newer
        os.environ.setdefault(variable, os.path.join(folder, "debug", "nccl_trace_rank_"))


def agreed_name(name: str) -> str:
    """Rank 0's `name`; under torchrun that of the job's first start: a restart is the same run."""
    return broadcast_object(_first_name(name) if this_rank() == 0 else name)


def _first_name(name: str) -> str:
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return name
    try:
        store, _, _ = next(rendezvous("env://", 0, 1, timeout=timedelta(seconds=JOIN_SECONDS)))
        return store.compare_set("open_lm/run name", "", name).decode()
    except (RuntimeError, ValueError):
        return name


def agree_to_stop(world: World) -> None:
    """Raises StopAsked on all ranks if any has heard a signal. Collective: one number, on the CPU."""
    if sum_over_ranks_(torch.tensor(int(world.watch.asked()))).item():
        raise StopAsked


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
