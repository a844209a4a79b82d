"""From a ModelConfig to a model that is ready to train: initialise → precision → compile → FSDP2 or DDP."""

import os
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from inspect import signature
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.nn.parallel import DistributedDataParallel
from torch.utils._triton import has_triton

from open_lm.config.distributed import DistributedConfig
from open_lm.config.model import ModelConfig
from open_lm.config.optim import PrecisionName
from open_lm.model import Transformer, build
from open_lm.moe.router import Router
from open_lm.nn.init import initialize_
from open_lm.parallel.mesh import World

AUTOCAST = {"amp": torch.float16, "amp_bf16": torch.bfloat16, "amp_bfloat16": torch.bfloat16}
WHOLE_MODEL = {"bf16": torch.bfloat16}  # dtype of parameters, gradients and moments where it is not fp32


def parallelize(
    config: ModelConfig,
    *,
    world: World,
    distributed: DistributedConfig,
    precision: PrecisionName,
    seed: int,
    grad_checkpointing: bool = False,
    torchcompile: bool = False,
    meta: bool = True,
) -> nn.Module:
    """The initialised model on `world.device`: sharded with --fsdp, else in DDP if there are several ranks.

    With `meta`, one block at a time is materialised, initialised and sharded, so that at most one exists
    whole; without, the whole model is. The numbers depend on `seed` alone. Raises ValueError on flags that
    contradict each other.
    """
    sharding: dict[str, Any] = {
        "mesh": world.mesh,
        "mp_policy": _mixed_precision(distributed, precision),
        "offload_policy": _offload(distributed, world.device),
    }
    model = build(config)
    model.grad_checkpointing = grad_checkpointing
    dtype = WHOLE_MODEL.get(precision)
    # one graph of all blocks fuses what is between two, but leaves no place for collectives, recomputation, casts
    as_one = world.world_size == 1 and not (distributed.fsdp or grad_checkpointing or precision == "fp16")

    if not meta:
        _materialize_(model, "", config, seed, world.device, dtype)
    for name, block in model.layers.named_children():
        if meta:
            _materialize_(block, f"layers.{name}.", config, seed, world.device, dtype)
        if torchcompile and not as_one:
            # not block.compile(): FSDP's hooks must stay outside of the graph
            block.forward = torch.compile(block.forward)
        if distributed.fsdp:
            in_block: dict[str, Any] = sharding | {"reshard_after_forward": not distributed.fsdp_hybrid_o2}
            if dtype is not None or sharding["mp_policy"].param_dtype is not None:
                _shard_routers_(block, in_block)
            fully_shard(block, **in_block)
    if meta:
        for name, child in model.named_children():
            if child is not model.layers:
                _materialize_(child, f"{name}.", config, seed, world.device, dtype)
    model.tie_weights_()  # materialising one module at a time has parted them
    assert not any(p.is_meta for p in model.parameters())

    if distributed.fsdp:
        fully_shard(model, **sharding)
        return model
    if precision == "fp16":
        for unit in (*model.layers, *(child for child in model.children() if child is not model.layers)):
            _cast_in_forward_(unit, torch.float16)
    if torchcompile and as_one:
        model.body = torch.compile(model.body)
    if world.world_size == 1:
        return model
    options: dict[str, Any] = {
        "static_graph": distributed.ddp_static_graph,
        "gradient_as_bucket_view": True,
        _buffers_flag(): False,  # the only buffers, the routers' biases, are computed alike on all ranks
    }
    return DistributedDataParallel(model, **options)


def _buffers_flag() -> str:
    """DDP's option to broadcast buffers before each forward pass, which torch has renamed."""
    new = "forward_sync_buffers"
    return new if new in signature(DistributedDataParallel).parameters else "broadcast_buffers"


def _mixed_precision(distributed: DistributedConfig, precision: PrecisionName) -> MixedPrecisionPolicy:
    """The dtypes in which FSDP gathers parameters and reduces gradients; master weights keep their own.

    Inputs of blocks stay as they are: the positions' table must remain fp32.
    """
    asked = [f for f in ("fsdp_amp", "fsdp_pure_bf16") if getattr(distributed, f)]
    flags = " ".join("--" + f.replace("_", "-") for f in asked)
    if asked and not distributed.fsdp:
        raise ValueError(f"{flags} without --fsdp: add --fsdp, or drop it")
    if len(asked) > 1:
        raise ValueError(f"{flags}: give one of the two (gradients are reduced in fp32 or in bf16)")
    if asked and precision in ("fp16", "amp"):
        raise ValueError(
            f"--precision {precision} is fp16, {flags} is bf16: use amp_bfloat16 or drop {flags}"
        )
    if precision == "fp16":
        return MixedPrecisionPolicy(torch.float16, torch.float32, cast_forward_inputs=False)
    if distributed.fsdp_amp:
        return MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    if distributed.fsdp_pure_bf16:
        return MixedPrecisionPolicy(torch.bfloat16, torch.bfloat16, cast_forward_inputs=False)
    return MixedPrecisionPolicy()


def _offload(distributed: DistributedConfig, device: torch.device) -> OffloadPolicy:
    """Where shards, their gradients and so the optimizer's moments lie: in pinned host memory, or on `device`."""
    offload = distributed.fsdp_cpu_offload and device.type != "cpu"
    return CPUOffloadPolicy() if offload else OffloadPolicy()


def _shard_routers_(block: nn.Module, sharding: dict[str, Any]) -> None:
    """Gathers the weights of the block's router in fp32, where the others are gathered in 16 bits.

    A unit by itself, as one unit has one dtype. It costs one more all-gather, of d x E numbers, per MoE layer and
    pass, and one more reduce-scatter; --torchcompile compiles the parts before and after the router apart.
    """
    in_fp32: dict[str, Any] = sharding | {"mp_policy": MixedPrecisionPolicy()}
    for module in block.modules():
        if isinstance(module, Router):
            fully_shard(module, **in_fp32)


def _materialize_(
    module: nn.Module,
    prefix: str,
    config: ModelConfig,
    seed: int,
    device: torch.device,
    dtype: torch.dtype | None,
) -> None:
    module.to_empty(device=device)
    initialize_(module, config, seed, prefix)
    if dtype is not None:
        for owner in _all_but_routers(module):
            for parameter in owner.parameters(recurse=False):
                parameter.data = parameter.data.to(dtype)


def _all_but_routers(module: nn.Module) -> Iterator[nn.Module]:
    """`module` and what is inside of it, as far as a run in 16 bits casts it. Routers stay in fp32: in 16 bits
    close scores would tie, and the choice between them be arbitrary."""
    if isinstance(module, Router):
        return
    yield module
    for child in module.children():
        yield from _all_but_routers(child)


def _cast_in_forward_(module: nn.Module, dtype: torch.dtype) -> None:
    """Lets `module` compute with casts of its parameters, but for routers'; gradients arrive in their own dtype.

    Inside of the module's forward, so that a recomputation (grad checkpointing) casts again.
    """
    forward = module.forward

    def forward_with_casts(*inputs: Any, **options: Any) -> Any:
        with _parameters_as(module, dtype):
            return forward(*inputs, **options)

    module.forward = forward_with_casts


@contextmanager
def _parameters_as(module: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    held = [
        (owner, name, parameter)
        for owner in _all_but_routers(module)
        for name, parameter in owner._parameters.items()
        if parameter is not None
    ]
    try:
        for owner, name, parameter in held:
            owner._parameters[name] = parameter.to(dtype)  # pyright: ignore[reportArgumentType]
        yield
    finally:
        for owner, name, parameter in held:
            owner._parameters[name] = parameter


def compute_dtype(distributed: DistributedConfig, precision: PrecisionName) -> torch.dtype:
    """The dtype of a forward pass's products."""
    gathered = _mixed_precision(distributed, precision).param_dtype
    return AUTOCAST.get(precision) or gathered or WHOLE_MODEL.get(precision, torch.float32)


def autocast(precision: PrecisionName, device: torch.device) -> AbstractContextManager:
    """The context for forward passes: fp16 or bf16 autocast for amp…, none for bf16, fp16 and fp32."""
    if precision not in AUTOCAST:
        return nullcontext()
    return torch.autocast(device.type, AUTOCAST[precision])


def compiles(asked: bool | None, device: torch.device, world_size: int) -> bool:
    """Whether training is compiled: as `asked`; None, no flag: on one GPU, where that was measured to be right and
    the fastest, if torch finds what it compiles with (Triton and a C compiler). There what torch cannot compile
    runs as it is written, with torch's warning; asked for, it is an error.
    """
    if asked is not None:
        return asked
    found = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    on = device.type == "cuda" and world_size == 1 and found is not None and has_triton()
    if on:  # else torch's compiler need not be imported, which takes seconds
        torch._dynamo.config.suppress_errors = True  # pyright: ignore[reportAttributeAccessIssue]
    return on


def compiled(on: bool) -> AbstractContextManager:
    """Without `on`, what --torchcompile compiled runs as it is written inside."""
    return nullcontext() if on else torch.compiler.set_stance("force_eager")


def unwrap(model: nn.Module) -> Transformer:
    """The Transformer inside DDP. Its parameters stay sharded under FSDP."""
    if isinstance(model, DistributedDataParallel):
        model = model.module
    assert isinstance(model, Transformer)
    return model


def routers(model: nn.Module) -> list[Router]:
    """Those of the MoE layers, lowest layer first."""
    return [module for module in unwrap(model).modules() if isinstance(module, Router)]


@contextmanager
def no_sync(model: nn.Module, on: bool = True) -> Iterator[None]:
    """Inside, with `on`, forward and backward only accumulate gradients on each rank; for all micro-batches
    but the last. FSDP then holds whole gradients instead of shards until the last one.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(not on)
        try:
            yield
        finally:
            model.set_requires_gradient_sync(True)
    elif isinstance(model, DistributedDataParallel) and on:
        with model.no_sync():
            yield
    else:
        yield


def reshard_(model: nn.Module) -> None:
    """Give parameters gathered by FSDP back, so that `parameters()` are the sharded ones.

    The root keeps its own gathered after a forward without backward (evaluation).
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
