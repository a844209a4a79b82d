"""`Saver`: the loop waits until a state is copied to host memory; a thread writes it."""

import logging
import shutil
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from open_lm.averaging import Average
from open_lm.checkpoint import files, recover, state
from open_lm.checkpoint.average import facts_of
from open_lm.checkpoint.child import consolidate
from open_lm.checkpoint.tensors import (
    Parts,
    Staging,
    collect_on_first_rank,
    local,
    padded,
    plan,
    sees_folder_of_first_rank,
    share,
    tensors_to_expect,
    tensors_to_save,
    whole_bytes,
)
from open_lm.model import Transformer
from open_lm.parallel.mesh import this_rank
from open_lm.parallel.plan import reshard_, unwrap

# From this size on another process makes epoch_N.pt: torch.save holds Python's lock while it writes a tensor.
LARGE_BYTES = 1 << 30
HEADER_BYTES, RECORD_BYTES = 200, 400  # of a tensor in a shard, and in epoch_N.pt, beside its name twice
BLOCK_BYTES, DIGEST_BYTES = 4096, 200  # of a file
FLUSH_SECONDS = 1800.0  # the longest that a run which has failed waits for its save
logger = logging.getLogger("open_lm")


@dataclass
class Save:
    """One save, as it goes on."""

    step: int
    path: Path
    """What it is called: epoch_N.pt, or step_S between intervals."""
    labels: tuple[str, ...]
    size: int
    """Bytes of the state, over all ranks."""
    stall_seconds: float = 0.0
    """What the loop lost: waiting for the save before, then for the copy; the device, before the next update."""
    write_seconds: float = 0.0
    """Until the state, and epoch_N.pt, were complete."""
    error: Exception | None = None
    is_complete: bool = False
    """Whether the state is on disk, whatever came of its epoch_N.pt."""
    done: threading.Event = field(default_factory=threading.Event)


class Saver:
    """Saves of one run, one at a time. Made, and `save` called, by all ranks together.

    `keep`: how many states between intervals stay. `on_complete(labels)` is called on rank 0, by the thread.
    `timeout_seconds`: of the ranks' waiting for one another in it.
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        averages: Sequence[Average] = (),
        keep: int = 2,
        in_background: bool = True,
        on_complete: Callable[[tuple[str, ...]], None] = lambda labels: None,
        timeout_seconds: float = 1800.0,
    ) -> None:
        self.folder = Path(folder)
        self.model, self.optimizer, self.averages = model, optimizer, averages
        self.keep, self.on_complete, self.in_background = keep, on_complete, in_background
        bare = unwrap(model)
        self.staging = Staging(next(p.device for p in bare.parameters()))
        self.is_shared = sees_folder_of_first_rank(self.folder)
        self._group = None
        if in_background and dist.is_initialized():
            self._group = dist.new_group(timeout=timedelta(seconds=timeout_seconds), backend="gloo")
        self._waited = 0.0
        self._running: Save | None = None
        self._thread: threading.Thread | None = None
        self._gave_up = False
        self._large = True  # what an earlier process left: unknown
        self._finished: list[Save] = []
        if in_background and self.is_shared:
            reshard_(model)
            mine = share(tensors_to_expect(bare, optimizer, averages))
            self.staging.reserve(sum(padded(local(tensor).nbytes) for tensor in mine.values()))

    def save(self, content: dict[str, Any], *, number: int = 0, labels: Sequence[str] = ()) -> Save:
        """Begins to save the state and, for each label, epoch_LABEL.pt. Waits for the save before. Collective.

        `content` (plain JSON; "step" is required; "name" and "tokens" go into every file) comes back from
        `load_training_state`. ValueError if it is not plain.
        """
        self.wait()
        begin = time.perf_counter()
        step, waited = content["step"], self._waited
        self._waited = 0.0
        reshard_(self.model)
        bare = unwrap(self.model)
        tensors = tensors_to_save(bare, self.optimizer, self.averages)
        document = self._document(content, bare, number, labels)
        path = self.folder / f"epoch_{labels[0]}.pt" if labels else state.state_folder(self.folder, step)
        save = Save(step, path, tuple(labels), whole_bytes(tensors))
        mine = share(tensors) if self.is_shared else collect_on_first_rank(tensors)
        parts = plan(mine, self.staging.copy(mine))
        extra = whole_bytes(tensors, "model/") + whole_bytes(tensors, "average/") if labels else 0
        needed = save.size + extra + overhead(tensors, document, 1 + len(self.averages) if labels else 0)
        save.stall_seconds = waited + time.perf_counter() - begin
        self._running = save

        def run() -> None:
            started = time.perf_counter()
            try:
                if self.staging.device.type == "cuda":
                    torch.cuda.set_device(self.staging.device)  # a thread begins on the first
                self.staging.wait()
                self._write(save, document, parts, extra, needed)
                save.stall_seconds += self.staging.held_seconds()
            except Exception as error:
                save.error = error
            save.write_seconds = time.perf_counter() - started
            save.done.set()

        if self.in_background:
            # a daemon: one that hangs with a rank that is gone must not keep the process alive
            self._thread = threading.Thread(target=run, name="checkpoint", daemon=True)
            self._thread.start()
        else:
            run()
        return save

    def before_update(self) -> None:
        """Call it before the weights, moments, biases or averages of a save change: a GPU that still copies them
        finishes first."""
        self.staging.hold()

    def wait(self, seconds: float | None = None) -> None:
        """Waits for the save that is being written, if there is one; counts as its successor's stall."""
        begin = time.perf_counter()
        if self._running is not None and not self._running.done.wait(seconds):
            self._gave_up = True
            self._running.error = OSError(f"step {self._running.step} was not written within {seconds} s")
            self._running.done.set()
        self._collect()
        self._waited += time.perf_counter() - begin

    def close(self, seconds: float | None = None) -> Exception | None:
        """`wait`, and leaves the group, which must not outlive the run's: it would abort the process at its end.

        Without a limit, what could not be made of complete states is tried once more: the error that is left, the
        same on all ranks. Collective then.
        """
        self.wait(seconds)
        error = None
        if seconds is None:
            error = self._gather(self._make_owed(sys.maxsize)[1] if this_rank() == 0 else None)[0]
            for save in self._finished:
                if save.is_complete:
                    save.error = error
        self._group = None
        return error

    def finished(self) -> list[Save]:
        """The saves that have ended since the last call; waits for none."""
        if self._running is not None and self._running.done.is_set():
            self._collect()
        finished, self._finished = self._finished, []
        return finished

    def _collect(self) -> None:
        if self._running is not None:
            if self._thread is not None and not self._gave_up:
                self._thread.join()  # one that still runs when Python ends would abort the process
            self._finished.append(self._running)
            self._running = None

    def _document(
        self, content: dict[str, Any], bare: Transformer, number: int, labels: Sequence[str]
    ) -> dict[str, Any]:
        """state.json. A copy, as the loop goes on."""
        names = {id(tensor): name for name, tensor in bare.named_parameters()}
        held = bare.state_dict(keep_vars=True)
        of_parameter = {parameter: name for name, parameter in bare.named_parameters()}
        document = {
            "epoch": number,
            "name": content.get("name", ""),
            "step": content["step"],
            "tokens": content.get("tokens"),
            "labels": list(labels),
            "world_size": dist.get_world_size() if dist.is_initialized() else 1,
            "torch": torch.__version__,
            "model_config": asdict(bare.config),
            "weights": {name: names.get(id(tensor), name) for name, tensor in held.items()},
            "averages": {average.name: facts_of(average) for average in self.averages},
            "param_groups": [
                {k: v for k, v in group.items() if k not in ("params", "param_names")}
                | {"params": [of_parameter[p] for p in group["params"]]}
                for group in self.optimizer.param_groups
            ],
            "state": content,
        }
        try:
            return state.json.loads(state.json.dumps(document))
        except TypeError as error:
            raise ValueError(f"what is saved with a checkpoint must be plain JSON: {error}") from error

    # ---- by the thread, on all ranks

    def _write(self, save: Save, document: dict[str, Any], parts: Parts, extra: int, needed: int) -> None:
        folder = state.state_folder(self.folder, save.step)
        waiting = state.temporary_folder(folder)
        rank, entries = this_rank(), {}

        def begin() -> None:
            files.prepare(self.folder)
            check_space(self.folder, needed, save.step)
            waiting.mkdir()
            if save.labels:
                state.owe(waiting)

        def shard() -> None:
            name = f"shard-{rank + 1:05}-model-00001-of-00001.safetensors"  # as torch names them
            if parts:
                entries[name] = state.write_shard(waiting / name, parts)

        def end() -> None:
            listed = {name: entry for each in everyone for name, entry in each.items()}
            listed[state.CONTENT] = state.write_json(waiting / state.CONTENT, document)
            state.write_json(waiting / state.DIGESTS, {"files": listed})
            state.commit(folder)

        try:
            self._agree(begin if rank == 0 else None)
            self._agree(shard)
            everyone = self._gather(entries)
            self._agree(end if rank == 0 else None)
            save.is_complete = True
        except BaseException:
            if rank == 0:
                shutil.rmtree(waiting, ignore_errors=True)
            raise

        def finish() -> None:
            if save.labels:
                self._large = extra > LARGE_BYTES
            made, error = self._make_owed(save.step, save.step)
            files.tidy(self.folder, save.step, self.keep)  # whatever came of that: a full disk has room again
            self.on_complete(made)
            if error is not None:
                raise error

        self._agree(finish if rank == 0 else None)  # all ranks know whether it was saved

    def _make_owed(self, until: int, written: int | None = None) -> tuple[tuple[str, ...], Exception | None]:
        """The labels of the epoch_N.pt made that states up to a step still owed; the first error."""
        return recover.make_owed(
            self.folder,
            until,
            lambda folder, label: consolidate(folder, label, large=self._large),
            written,
        )

    def _gather(self, value: Any) -> list[Any]:
        """Every rank's value."""
        if not dist.is_initialized():
            return [value]
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, value, group=self._group)
        return everyone

    def _agree(self, action: Callable[[], None] | None) -> None:
        """Runs it; the first rank's error is raised on all."""
        error = None
        try:
            if action is not None:
                action()
        except Exception as caught:
            error = caught
        errors = [e for e in self._gather(error) if e is not None]
        if errors:
            raise error or errors[0]


def overhead(tensors: Mapping[str, Tensor], document: Mapping[str, Any], files_of_weights: int) -> int:
    """Bytes that a save takes beside its tensors', a little more at most than it does: state.json, the shards'
    headers, other ranks' random states, digests.json, the zips' records, and what files are rounded up to."""
    ranks = document["world_size"]
    headers = sum(
        (2 * len(key) + HEADER_BYTES) * (ranks if isinstance(t, DTensor) else 1) for key, t in tensors.items()
    )
    random = sum(t.nbytes for key, t in tensors.items() if key.startswith("random/")) * (ranks - 1)
    records = sum(2 * len(name) + RECORD_BYTES for name in document["weights"]) + len(
        str(document["model_config"])
    )
    n_files = ranks + 2 + files_of_weights
    text = len(state.json.dumps(document, indent=1))
    return headers + random + text + records * files_of_weights + (BLOCK_BYTES + DIGEST_BYTES) * n_files


def check_space(folder: Path, needed: int, step: int) -> None:
    """Raises OSError with both numbers where a save does not fit on the disk."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            28,
            f"the checkpoint of step {step} needs {needed:,} bytes, and {folder} has {free:,} bytes free: nothing "
            "was written, earlier checkpoints are unchanged",
        )
