"""What of a run's tensors each rank saves, the host memory that it is copied to, and the way back."""

import contextlib
import logging
import secrets
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner, HuggingFaceStorageReader
from torch.distributed.tensor import DTensor

from open_lm.averaging import Average
from open_lm.checkpoint.state import Shards
from open_lm.model import Transformer
from open_lm.parallel.gather import gather, gather_objects, on_first_rank, spread_
from open_lm.parallel.mesh import broadcast_object, this_rank

ALIGNMENT = 64  # bytes
Parts = dict[str, tuple[tuple[int, ...], Tensor]]  # key → offsets in the whole tensor, this rank's part
logger = logging.getLogger("open_lm")


def tensors_of(model: Transformer) -> dict[str, Tensor]:
    """What a checkpoint fills, by name: the parameters, tied ones once, and the buffers."""
    return dict(model.named_parameters()) | dict(model.named_buffers())


def tensors_to_save(
    model: Transformer, optimizer: torch.optim.Optimizer, averages: Sequence[Average]
) -> dict[str, Tensor]:
    """{key: tensor, sharded or not}; every rank's random state is its own, all else is the same on all ranks."""
    return _tensors(model, lambda parameter: optimizer.state.get(parameter, {}), averages)


def tensors_to_expect(
    model: Transformer, optimizer: torch.optim.Optimizer, averages: Sequence[Average]
) -> dict[str, Tensor]:
    """As `tensors_to_save` after the first step; where AdamW has no state yet, tensors of its sizes."""

    def expected(parameter: Tensor) -> Mapping[str, Tensor]:
        step = torch.zeros((), device=parameter.device)
        return optimizer.state.get(parameter) or {"step": step, "exp_avg": parameter, "exp_avg_sq": parameter}

    return _tensors(model, expected, averages)


def _tensors(
    model: Transformer, state_of: Callable[[Tensor], Mapping[str, Tensor]], averages: Sequence[Average]
) -> dict[str, Tensor]:
    tensors = {f"model/{name}": tensor for name, tensor in tensors_of(model).items()}
    for name, parameter in model.named_parameters():
        tensors |= {f"optimizer/{name}/{key}": value for key, value in state_of(parameter).items()}
    for average in averages:
        tensors |= {f"average/{average.name}/{name}": tensor for name, tensor in average.weights.items()}
    return {key: tensor.detach() for key, tensor in tensors.items()} | random_state()


def random_state() -> dict[str, Tensor]:
    """The state of this rank's torch generators."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return {f"random/{this_rank()}/{device}": state for device, state in states.items()}


def whole_bytes(tensors: Mapping[str, Tensor], prefix: str = "") -> int:
    """Of all ranks together."""
    return sum(t.numel() * t.element_size() for key, t in tensors.items() if key.startswith(prefix))


def local(tensor: Tensor) -> Tensor:
    """The part that this rank holds, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def sees_folder_of_first_rank(folder: Path) -> bool:
    """Whether what rank 0 writes into `folder` is there for every rank. Collective."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return True
    probe = folder / broadcast_object(f".shared_{secrets.token_hex(8)}")

    def touch() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()

    try:
        on_first_rank(touch)
        return all(gather_objects(probe.exists()))
    finally:
        if this_rank() == 0:
            with contextlib.suppress(OSError):
                probe.unlink()


def share(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those that this rank is to save: its shards, and its share of what several ranks hold alike.

    Every rank finds the same division by itself.
    """
    rank, ranks = this_rank(), dist.get_world_size() if dist.is_initialized() else 1
    loads, mine = [0] * ranks, {}
    for number, (key, tensor) in enumerate(tensors.items()):
        if key.startswith("random/"):
            mine[key] = tensor
        elif isinstance(tensor, DTensor):
            replica, replicas = 0, 1
            place = tensor.device_mesh.get_coordinate() or ()
            for size, at, placement in zip(tensor.device_mesh.shape, place, tensor.placements, strict=True):
                if placement.is_replicate():
                    replica, replicas = replica * size + at, replicas * size
            if number % replicas == replica:
                mine[key] = tensor
        else:
            owner = loads.index(min(loads))
            loads[owner] += tensor.nbytes
            if owner == rank:
                mine[key] = tensor
    return mine


def collect_on_first_rank(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All of it whole on rank 0, where the other ranks' disks are not its own; {} elsewhere. Collective."""
    random = {k: t for states in gather_objects(random_state()) for k, t in states.items()}
    whole = {key: gather(tensor) for key, tensor in tensors.items() if key not in random}
    return {} if this_rank() else whole | random


class Staging:
    """Host memory for this rank's part of a save, page-locked where there is a GPU, and kept for the next.

    A GPU copies beside its work, from a snapshot in its own memory where there is room for one: that takes
    milliseconds, however long the way to the host. Where there is none, nothing that is copied may change before
    `hold`.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._copied: torch.cuda.Event | None = None
        self._held: tuple[torch.cuda.Event, torch.cuda.Event] | None = None
        self._snapshot: dict[str, Tensor] | None = None
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._release: Callable[[], Any] | None = None

    def reserve(self, size: int) -> None:
        """Makes room for `size` bytes; on a GPU that takes seconds, so before training."""
        if size <= len(self._memory):
            return
        if self._release is not None:
            self._release()
            self._release = None
        self._memory = torch.empty(size, dtype=torch.uint8)
        if self.device.type == "cuda":
            runtime: Any = torch.cuda.cudart()
            address = self._memory.data_ptr()
            if int(runtime.cudaHostRegister(address, size, 1)) == 0:
                self._release = weakref.finalize(self._memory, runtime.cudaHostUnregister, address)
            else:
                logger.warning(
                    "%s bytes of host memory could not be page-locked: saves are slower", f"{size:,}"
                )

    def copy(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This rank's parts, in host memory when `wait` returns."""
        parts = {key: local(tensor) for key, tensor in tensors.items()}
        size = sum(padded(part.nbytes) for part in parts.values())
        self.reserve(size)
        copies, start = {}, 0
        if self._stream is not None:
            if has_room(self.device, size):
                parts = self._snapshot = {key: part.clone() for key, part in parts.items()}
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):  # of None: nothing
            for key, part in parts.items():
                room = self._memory[start : start + part.nbytes]
                copies[key] = room.view(part.dtype).view(part.shape)
                copies[key].copy_(part, non_blocking=True)
                start += padded(part.nbytes)
        if self._stream is not None:
            self._held = None
            self._copied = torch.cuda.Event()
            self._copied.record(self._stream)
        return copies

    def hold(self) -> None:
        """What the device does from now on waits until everything is copied; the host does not."""
        if self._copied is None or self._held is not None or self._snapshot is not None:
            return
        stream = torch.cuda.current_stream(self.device)
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record(stream)
        stream.wait_event(self._copied)
        after.record(stream)
        self._held = before, after

    def wait(self) -> None:
        """Until the copies are there. By any thread."""
        if self._copied is not None:
            self._copied.synchronize()
            self._snapshot = None

    def held_seconds(self) -> float:
        """How long `hold` made the device wait."""
        if self._held is None:
            return 0.0
        before, after = self._held
        after.synchronize()
        return before.elapsed_time(after) / 1000


def has_room(device: torch.device, size: int) -> bool:
    """Whether the GPU has `size` bytes, and a quarter more for fragments, beside all that training has had: what
    torch keeps for it is not counted as free."""
    return torch.cuda.mem_get_info(device)[0] >= size + size // 4


def padded(size: int) -> int:
    """The next multiple of ALIGNMENT."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def plan(tensors: Mapping[str, Tensor], copies: Mapping[str, Tensor]) -> Parts:
    """`copies` of this rank's parts with their offsets, as torch's planner finds them; empty parts are left out."""
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(dict(tensors), is_coordinator=True)
    parts: Parts = {}
    for item in planner.create_local_plan().items:
        copy = copies[item.index.fqn]
        assert item.tensor_data is not None
        assert item.tensor_data.chunk.sizes == copy.shape
        if copy.numel():
            parts[item.index.fqn] = tuple(item.tensor_data.chunk.offsets), copy
    return parts


@torch.no_grad()
def restore_(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fills `tensors`, sharded or not, from a state that any number of ranks saved. Collective.

    Each rank reads what it holds; where only rank 0 sees the folder, rank 0 reads all and sends it.
    """
    if dist.is_initialized() and all(gather_objects(folder.is_dir())) and dist.get_world_size() > 1:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch about itself
            dcp.load(dict(tensors), storage_reader=HuggingFaceStorageReader(str(folder)))
        return
    shards = on_first_rank(lambda: Shards(folder))
    for key, tensor in tensors.items():
        spread_(tensor, shards.whole(key) if shards else None)
