"""`open_lm.main` with a fault in it: FAULTS="nan:3:1;slow:0.05" python -m tests.faults.inject FLAGS…

Steps count from 0; a fault with a rank is on that rank alone.
"""

import builtins
import hashlib
import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import torch

import open_lm.data.batches
import open_lm.eval.perplexity
import open_lm.main
import open_lm.model
import open_lm.train

RANK = int(os.environ.get("RANK", "0"))
INTO = Path(os.environ.get("FAULT_FOLDER", "."))


def before_step(action: Callable[[int, torch.nn.Module], None]) -> None:
    """`action(step, model)` before every step's forward pass."""
    honest = open_lm.train.accumulate_gradients

    def accumulate_gradients(model, batch, **options):
        action(options["world"].watch.state.step, model)
        return honest(model, batch, **options)

    open_lm.train.accumulate_gradients = accumulate_gradients


def slow(seconds: str) -> None:
    before_step(lambda step, model: time.sleep(float(seconds)))


def sleep(at: str, rank: str) -> None:
    def injected_sleep(step: int, model: object) -> None:
        if (step, RANK) == (int(at), int(rank)):
            time.sleep(3600)

    before_step(injected_sleep)


def fail(at: str, rank: str) -> None:
    def injected_failure(step: int, model: object) -> None:
        if (step, RANK) == (int(at), int(rank)):
            raise RuntimeError("injected: this rank fails first")

    before_step(injected_failure)


def change_loss(steps: set[int], rank: int, factor: float) -> None:
    honest, current = open_lm.model.linear_cross_entropy, [0]
    before_step(lambda step, model: current.__setitem__(0, step))

    def linear_cross_entropy(*arguments, **options):
        loss = honest(*arguments, **options)
        if current[0] not in steps or rank not in (RANK, -1):
            return loss
        return loss._replace(objective_sum=loss.objective_sum * factor, nll_BS=loss.nll_BS * factor)

    open_lm.model.linear_cross_entropy = linear_cross_entropy


def nan(first: str, end: str, rank: str) -> None:
    change_loss(set(range(int(first), int(end))), int(rank), float("nan"))


def spike(*steps: str) -> None:
    change_loss(set(map(int, steps)), -1, 3.0)


def record_state() -> None:
    """state_R.jsonl: after each step the hash of this rank's weights and of Adam's moments."""
    honest = open_lm.train.update_

    def update_(optimizer, accepted):
        honest(optimizer, accepted)
        digest = hashlib.sha256()
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                tensors = [parameter, *(optimizer.state[parameter][k] for k in ("exp_avg", "exp_avg_sq"))]
                for tensor in tensors:
                    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
                    digest.update(local.detach().cpu().contiguous().numpy().tobytes())
        with open(INTO / f"state_{RANK}.jsonl", "a") as file:
            file.write(json.dumps(digest.hexdigest()) + "\n")

    open_lm.train.update_ = update_


def record_tokens() -> None:
    """tokens_R.jsonl: {"step", "tokens"} of this rank, in their order."""
    honest = open_lm.train.accumulate_gradients

    def accumulate_gradients(model, batch, **options):
        with open(INTO / f"tokens_{RANK}.jsonl", "a") as file:
            line = {"step": options["world"].watch.state.step, "tokens": batch.tokens_BS.tolist()}
            file.write(json.dumps(line) + "\n")
        return honest(model, batch, **options)

    open_lm.train.accumulate_gradients = accumulate_gradients


def stall_data(at: str, rank: str) -> None:
    """Reading a step's data takes an hour."""
    kinds = (open_lm.data.batches.Steps, open_lm.data.batches.SyntheticSteps)
    for kind in kinds:

        def read(self, step, honest=kind.__getitem__):
            if step >= int(at) and int(rank) in (RANK, -1):
                time.sleep(3600)
            return honest(self, step)

        kind.__getitem__ = read


def slow_evaluation(seconds: str) -> None:
    """Every batch; evaluating_R appears with the first."""
    honest = open_lm.eval.perplexity.Losses.add

    def add(self, nll_BS):
        (INTO / f"evaluating_{RANK}").touch()
        time.sleep(float(seconds))
        return honest(self, nll_BS)

    open_lm.eval.perplexity.Losses.add = add


def fail_in_evaluation() -> None:
    def add(self, nll_BS):
        raise RuntimeError("injected: evaluation fails")

    open_lm.eval.perplexity.Losses.add = add


def touch_files(action: Callable[[int, str], None]) -> None:
    """`action(number, name)` before every operation that ends, moves or removes a file under checkpoints/."""
    number = [0]
    for name in ("fsync", "replace", "rename", "link", "unlink"):
        honest = getattr(os, name)

        def touch(*arguments, honest=honest, name=name, **options):
            first = arguments[0]
            path = os.readlink(f"/proc/self/fd/{first}") if isinstance(first, int) else os.fspath(first)
            if "/checkpoints" in str(path):
                number[0] += 1
                action(number[0], f"{name} {Path(str(path)).name}")
            return honest(*arguments, **options)

        setattr(os, name, touch)


def kill_at_file(number: str, rank: str = "0") -> None:
    """SIGKILL at the rank's n-th touch of a file; `touched` lists them."""

    def action(count: int, name: str) -> None:
        with open(INTO / "touched", "a") as file:
            file.write(f"{number} {count} {name}\n")
        if count == int(number):
            os.kill(os.getpid(), signal.SIGKILL)

    if int(rank) == RANK:
        touch_files(action)


def fill_disk_in(name: str, left: str) -> None:
    """Nearly fills the disk when a file under checkpoints/ whose name begins so is first opened for writing. What
    looks for space before a save is told that there is enough of it."""
    honest_open, honest_usage = builtins.open, shutil.disk_usage
    filler = INTO / "filler"

    def usage(path):
        return honest_usage(path)._replace(free=1 << 40)

    def opened(file, mode="r", *arguments, **options):
        path = str(file)
        if (
            "w" in mode
            and "/checkpoints/" in path
            and Path(path).name.startswith(name)
            and not filler.exists()
        ):
            with honest_open(filler, "wb") as full:
                full.write(b"\0" * (honest_usage(INTO).free - int(left)))
        return honest_open(file, mode, *arguments, **options)

    shutil.disk_usage, builtins.open = usage, opened


def slow_files(seconds: str) -> None:
    """Every touch takes long; `touching` appears with the first."""

    def action(count: int, name: str) -> None:
        (INTO / "touching").touch()
        time.sleep(float(seconds))

    touch_files(action)


def measure() -> None:
    """usage.jsonl: resident MiB, open files and threads before every 50th step."""

    def action(step: int, model: object) -> None:
        if step % 50 == 0:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            line = {
                "step": step,
                "mib": pages * os.sysconf("SC_PAGE_SIZE") / 2**20,
                "files": len(os.listdir("/proc/self/fd")),
                "threads": len(os.listdir("/proc/self/task")),
            }
            with open(INTO / f"usage_{RANK}.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")

    before_step(action)


FAULTS = {f.__name__: f for f in (slow, sleep, fail, nan, spike, record_state, record_tokens, stall_data,
                                  slow_evaluation, fail_in_evaluation, kill_at_file, slow_files, fill_disk_in,
                                  measure)}  # fmt: skip

if __name__ == "__main__":
    for fault in filter(None, os.environ.get("FAULTS", "").split(";")):
        name, *parameters = fault.split(":")
        FAULTS[name](*parameters)
    open_lm.main.command()
