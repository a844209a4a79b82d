"""Ranks and how the model is spread over them."""

from dataclasses import dataclass
from typing import Literal

BackendName = Literal["nccl", "gloo"]
StopSignal = Literal["TERM", "INT", "USR1", "USR2", "HUP", "XCPU"]


@dataclass(frozen=True)
class DistributedConfig:
    """Distribution. Launch with torchrun or srun; several ranks without --fsdp means DDP."""

    fsdp: bool = False
    """Shard parameters, gradients and optimizer state over the ranks (FSDP2, one unit per block)."""

    fsdp_amp: bool = False
    """FSDP: gather parameters in bf16, reduce gradients in fp32."""

    fsdp_pure_bf16: bool = False
    """FSDP: gather parameters and reduce gradients in bf16; weights and moments stay in fp32 (in bf16 only under
    --precision bf16)."""

    ddp_static_graph: bool = False
    """DDP: static_graph=True."""

    dist_url: str = "env://"
    """Where ranks meet: env:// (torchrun's or srun's variables), tcp://HOST:PORT of rank 0, or file:///PATH of a
    new file that all hosts see."""

    dist_backend: BackendName | None = None
    """Default: nccl on GPUs, gloo on CPUs. With nccl, gloo carries what lies in host memory."""

    no_set_device_rank: bool = False
    """Use device cuda:0 on every rank (when CUDA_VISIBLE_DEVICES shows one GPU to each process)."""

    force_distributed: bool = False
    """Make a process group even for one process."""

    fsdp_hybrid: bool = False
    """FSDP: shard within a node, replicate over nodes; gather parameters again in the backward pass."""

    fsdp_hybrid_o2: bool = False
    """As --fsdp-hybrid, but keep gathered parameters from the forward to the backward pass (ZeRO-2)."""

    fsdp_cpu_offload: bool = False
    """FSDP: keep parameters, gradients and optimizer state in host memory; the optimizer steps on the CPU. Works
    with --accum-freq."""

    preset_world_size: int | None = None
    """Under srun: use only the first N tasks; the others end at once."""

    collective_timeout: float = 1800.0
    """Seconds that a collective may wait for the other ranks before it fails."""

    hang_timeout: float = 600.0
    """Seconds without progress on a rank (a batch, a pass, an update) after which the job ends: the rank that hangs
    is named, its stack and every rank's own are shown, and all end with status 1. Six times as long to start, to
    compile (the first step, the first evaluation) and to save. 0: never."""

    stop_signals: tuple[StopSignal, ...] = ("TERM", "INT", "USR1", "USR2")
    """Signals that end the run in good order: sent to any one rank, all ranks save the same step and end with
    status 0. A second one, two seconds later or more, ends that rank at once."""
