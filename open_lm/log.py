"""What a run tells: console and out.log, log.jsonl, TensorBoard, wandb.

A run's folder LOGS/NAME holds out.log (text), log.jsonl (every metric, one JSON object a line), params.txt
(every flag), checkpoints/ and tensorboard/. Metric names are open_lm's: `train/loss`, `valid/loss`, …
"""

import json
import logging
import math
import netrc
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

logger = logging.getLogger("open_lm")


class Log:
    """A run's outputs on one rank. Every rank has one; only those that log write anything."""

    def __init__(self, folder: Path, *, rank: int, local: bool = False, debug: bool = False) -> None:
        """`local`: this rank writes a text log of its own, out-RANK.log. Only rank 0 writes metrics."""
        self.folder = folder
        self.is_main = rank == 0
        self.console = Console()
        self._jsonl: TextIO | None = None
        self._sinks: list[tuple[str, Callable[[dict[str, float], int], None], Callable[[], None]]] = []
        self._bar: Progress | None = None
        logger.handlers.clear()
        logger.propagate = False
        logger.setLevel(logging.DEBUG if debug else logging.INFO)
        if self.is_main:
            logger.addHandler(self._console_handler())
            folder.mkdir(parents=True, exist_ok=True)
            self._jsonl = open(folder / "log.jsonl", "a", encoding="utf-8")  # noqa: SIM115
        if self.is_main or local:
            folder.mkdir(parents=True, exist_ok=True)
            handler = logging.FileHandler(folder / (f"out-{rank}.log" if local else "out.log"))
            handler.setFormatter(logging.Formatter("%(asctime)s | %(levelname)s | %(message)s"))
            logger.addHandler(handler)
        if not logger.handlers:
            logger.addHandler(logging.NullHandler())

    def _console_handler(self) -> logging.Handler:
        """Lines above the bar on a terminal; elsewhere lines as they are, never wrapped."""
        if self.console.is_terminal:
            return RichHandler(
                console=self.console, show_path=False, show_level=False, log_time_format="%H:%M:%S",
                omit_repeated_times=False,
            )  # fmt: skip
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
        return handler

    def describe(self, flags: Mapping[str, Any], **facts: Any) -> None:
        """Writes params.txt and the run's first line in log.jsonl."""
        if not self.is_main:
            return
        lines = [f"{name}: {value}\n" for name, value in flags.items()]
        (self.folder / "params.txt").write_text("".join(lines), encoding="utf-8")
        self._write_json(
            {"run": {"name": self.folder.name, "commit": commit(), **facts, "flags": dict(flags)}}
        )

    def add_tensorboard(self) -> None:
        """Metrics go to LOGS/NAME/tensorboard too."""
        if self.is_main:
            self._add_sink("tensorboard", lambda: _tensorboard(self.folder / "tensorboard"))

    def add_wandb(self, project: str, notes: str, flags: Mapping[str, Any]) -> None:
        """Metrics go to wandb too; to LOGS/NAME/wandb alone (`wandb sync` sends it) where there is no key."""
        if self.is_main:
            self._add_sink("wandb", lambda: _wandb(self.folder, project, notes, flags))

    def metrics(self, entry: dict[str, Any], step: int) -> None:
        """Writes a line of metrics, its numbers to every sink; a failing sink is dropped with a warning."""
        if not self.is_main:
            return
        self._write_json({"step": step, "time": time.time(), **entry})
        numbers = _flatten(entry)
        for sink in list(self._sinks):
            name, write, _ = sink
            try:
                write(numbers, step)
            except Exception as error:  # a dead server must not stop a run
                logger.warning("%s failed and gets no more metrics: %s", name, error)
                self._sinks.remove(sink)

    def progress(self, total_steps: int, start_step: int) -> Callable[[int, str | None], None]:
        """`update(step, text)` of a live bar on a terminal (None keeps its text); a no-op elsewhere."""
        if not (self.is_main and self.console.is_terminal):
            return lambda step, text: None
        self._bar = Progress(
            TextColumn("[bold]train"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[text]}"),
            TextColumn("ETA"), TimeRemainingColumn(), console=self.console, transient=True,
        )  # fmt: skip
        self._bar.start()
        bar = self._bar
        task = bar.add_task("train", total=total_steps, completed=start_step, text="")
        return lambda step, text: (
            bar.update(task, completed=step) if text is None else bar.update(task, completed=step, text=text)
        )

    def end_progress(self) -> None:
        """Takes the bar off the terminal."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def close(self) -> None:
        """Flushes and closes everything; a sink that cannot be closed is only warned of."""
        self.end_progress()
        for name, _, close in self._sinks:
            try:
                close()
            except Exception as error:
                logger.warning("%s could not be closed: %s", name, error)
        self._sinks.clear()
        if self._jsonl is not None:
            self._jsonl.close()
            self._jsonl = None
        for handler in list(logger.handlers):
            handler.close()
            logger.removeHandler(handler)

    def _write_json(self, entry: dict[str, Any]) -> None:
        assert self._jsonl is not None
        self._jsonl.write(json.dumps(_jsonable(entry)) + "\n")
        self._jsonl.flush()

    def _add_sink(self, name: str, start: Callable[[], tuple[Callable, Callable]]) -> None:
        try:
            write, close = start()
        except ImportError as error:
            raise ValueError(f"--report-to {name}: {error}. Install it: pip install {name}") from error
        except Exception as error:
            logger.warning("%s could not be started, the run goes on without it: %s", name, error)
            return
        self._sinks.append((name, write, close))


def _tensorboard(folder: Path) -> tuple[Callable, Callable]:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder))

    def write(numbers: dict[str, float], step: int) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)

    return write, writer.close


def _wandb(folder: Path, project: str, notes: str, flags: Mapping[str, Any]) -> tuple[Callable, Callable]:
    import wandb

    mode: Any = os.environ.get("WANDB_MODE") or ("online" if _has_wandb_key() else "offline")
    run = wandb.init(
        project=project,
        name=folder.name,
        notes=notes or None,
        config=dict(flags),
        dir=str(folder),
        mode=mode,
        settings=wandb.Settings(silent=True),
    )
    return (lambda numbers, step: run.log(numbers, step=step)), run.finish


def _has_wandb_key() -> bool:
    """Whether `wandb login` has been run, or its variable is set."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _flatten(entry: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a metrics line; router statistics as `router/layer_2/entropy`."""
    numbers: dict[str, float] = {k: v for k, v in entry.items() if isinstance(v, int | float)}
    for layer in entry.get("router", []):
        prefix = f"router/layer_{layer['layer']}"
        for name, value in layer.items():
            if name == "share":
                numbers |= {f"{prefix}/share_{i}": share for i, share in enumerate(value)}
            elif name != "layer":
                numbers[f"{prefix}/{name}"] = value
    return numbers


def _jsonable(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become strings, so that any reader takes the file."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {k: _jsonable(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(v) for v in value]
    return value


def commit() -> str | None:
    """The commit of the source tree that runs, with `+` where it was changed; None outside a checkout."""
    try:
        head = _git("rev-parse", "--short", "HEAD")
        return head and head + ("+" if _git("status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(*command: str) -> str:
    git = ["git", "-C", str(Path(__file__).parent), *command]
    return subprocess.run(git, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
