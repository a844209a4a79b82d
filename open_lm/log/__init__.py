"""What a run tells: console and out.log, log.jsonl, TensorBoard, wandb.

A run's folder LOGS/NAME holds out.log (text), log.jsonl (every metric, one JSON object a line), params.txt
(every flag), config.yaml (the given flags, for --config), checkpoints/, and what is asked for of tensorboard/,
wandb/ and code/. Metric names are open_lm's: `train/loss`, `valid/loss`, …
"""

import json
import logging
import math
import sys
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from open_lm.config.redact import Redacting, redacted
from open_lm.log.heat import ShareHistory
from open_lm.log.lines import read_lines, supersede
from open_lm.log.record import commit, keep_flags
from open_lm.log.sinks import CLOSE_SECONDS, Record, Sink, TensorBoard, Wandb

__all__ = ["Log", "commit", "jsonable", "logger"]

logger = logging.getLogger("open_lm")

PICTURE_LINES = 50  # log lines between two pictures of the experts' shares


class OutLog(logging.FileHandler):
    """out.log. Where its disk is full its lines are missing, which is said once, and nothing else is lost."""

    failed = False

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not self.failed and sys.stderr is not None:
            self.failed = True
            print(f"{self.baseFilename} misses lines from here on: {error}", file=sys.stderr, flush=True)

    def close(self) -> None:
        with suppress(OSError):  # of what is still to be written
            super().close()


class Log:
    """A run's outputs on one rank. Every rank has one; only those that log write anything."""

    def __init__(self, folder: Path, *, rank: int, local: bool = False, debug: bool = False) -> None:
        """`local`: this rank writes a text log of its own, out-RANK.log. Only rank 0 writes metrics."""
        self.folder = folder
        self.is_main, self._rank = rank == 0, rank
        self.console = Console()
        self._jsonl: TextIO | None = None
        self._sinks: list[Sink] = []
        self._shares: dict[int, ShareHistory] = {}
        self._step = self._pictured = 0
        self._disk_failed = False
        self._bar: Progress | None = None
        logger.handlers.clear()
        logger.propagate = False
        logger.setLevel(logging.DEBUG if debug else logging.INFO)
        where = "%(filename)s:%(lineno)d " if debug else ""
        if self.is_main:
            logger.addHandler(self._console_handler(where))
            folder.mkdir(parents=True, exist_ok=True)
            self._jsonl = open_jsonl(folder / "log.jsonl")
        if self.is_main or local:
            folder.mkdir(parents=True, exist_ok=True)
            handler = OutLog(folder / (f"out-{rank}.log" if local else "out.log"))
            handler.setFormatter(logging.Formatter(f"%(asctime)s | %(levelname)s | {where}%(message)s"))
            logger.addHandler(handler)
        if not logger.handlers:
            logger.addHandler(logging.NullHandler())
        for handler in logger.handlers:
            handler.addFilter(Redacting())

    def _console_handler(self, where: str) -> logging.Handler:
        """Lines above the bar on a terminal; elsewhere lines as they are, never wrapped."""
        if self.console.is_terminal:
            return RichHandler(
                console=self.console, show_path=bool(where), show_level=False, log_time_format="%H:%M:%S",
                omit_repeated_times=False,
            )  # fmt: skip
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(logging.Formatter(f"%(asctime)s {where}%(message)s", "%H:%M:%S"))
        return handler

    def describe(self, flags: Mapping[str, Any], config: str, **facts: Any) -> None:
        """Keeps the flags, as params.txt and as `config`, the text of config.yaml; and a line in log.jsonl."""
        if not self.is_main:
            return
        keep_flags(self.folder, "".join(f"{name}: {flags[name]}\n" for name in sorted(flags)), config)
        self._write_json(
            {"run": {"name": self.folder.name, "commit": commit(), **facts, "flags": dict(flags)}}
        )

    def begin(self, targets: Collection[str], flags: Mapping[str, Any], step: int | None = None) -> None:
        """Opens the sinks of --report-to. `step`: training goes on after it, so that lines of later steps, by
        an earlier try in this folder, no longer count; the experts' pictures go on from those that do."""
        if not self.is_main:
            return
        if step is not None:
            self._resume(step)
        notes, project = flags["wandb_notes"], flags["wandb_project_name"]
        starts: dict[str, Callable] = {
            "tensorboard": lambda: TensorBoard(self.folder, step),
            "wandb": lambda: Wandb(self.folder, project, notes, flags),
        }
        self._sinks += [Sink(name, starts[name]) for name in starts if name in targets]

    def metrics(self, entry: dict[str, Any], step: int) -> None:
        """Writes a line of metrics, its numbers to every sink, and now and then the experts' pictures."""
        if not self.is_main:
            return
        self._write_json({"step": step, "time": time.time(), **entry})
        logger.debug("step %d: %s", step, entry)
        self._step = step
        lines = self._add_shares(entry)
        due = lines >= self._pictured + PICTURE_LINES
        self._report(Record(step, flatten(entry), self._pictures() if due else {}))
        if due:
            self._pictured = lines

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

    def failure(self, reason: str) -> None:
        """The error that ends the run: in the text log, and as {"failed": reason} in log.jsonl."""
        self.end_progress()
        logger.error("the run ends by an error: %s", reason)
        if self._jsonl is not None:
            self._write_json({"failed": reason, "time": time.time()})

    def traceback(self, error: BaseException) -> str:
        """Where the error was raised: to this rank's text log alone, not to the console. The file's name; a rank
        without a log begins its own, and "" where that cannot be written."""
        texts = [handler for handler in logger.handlers if isinstance(handler, OutLog)]
        handler = texts[0] if texts else None
        try:
            if handler is None:
                self.folder.mkdir(parents=True, exist_ok=True)
                handler = OutLog(self.folder / f"out-{self._rank}.log")
                handler.setFormatter(logging.Formatter("%(asctime)s | %(levelname)s | %(message)s"))
                handler.addFilter(Redacting())
                logger.addHandler(handler)
        except OSError:
            return ""
        info = (type(error), error, error.__traceback__)
        handler.handle(logging.LogRecord("open_lm", logging.ERROR, "", 0, "where it was raised", (), info))
        return "" if handler.failed else handler.baseFilename

    def close_metrics(self, failed: bool = False) -> None:
        """Flushes and closes everything but the text log, in bounded time. `failed`: the run ends by an error."""
        self.end_progress()
        if self._sinks and (pictures := self._pictures()):
            self._report(Record(self._step, {}, pictures))
        deadline = time.monotonic() + CLOSE_SECONDS
        for sink in self._sinks:
            sink.finish(failed)
        for sink in self._sinks:
            sink.wait(deadline)
        self._sinks.clear()
        if self._jsonl is not None:
            try:
                self._jsonl.close()
            except OSError as error:
                logger.warning("log.jsonl could not be completed: %s", error)
            self._jsonl = None

    def close(self, failed: bool = False) -> None:
        """`close_metrics`, and the text log."""
        self.close_metrics(failed)
        for handler in list(logger.handlers):
            logger.removeHandler(handler)
            handler.close()

    def _resume(self, step: int) -> None:
        try:
            earlier = read_lines(self.folder / "log.jsonl")
        except ValueError as error:
            logger.warning("%s: the experts' pictures begin anew", error)
            earlier = []
        if step == 0 and not any("step" in line for line in earlier):
            return
        self._write_json({"resumed": step, "time": time.time()})
        for line in supersede([*earlier, {"resumed": step}])[0]:
            self._add_shares(line)

    def _report(self, record: Record) -> None:
        for sink in self._sinks:
            sink.put(record)

    def _add_shares(self, line: Mapping[str, Any]) -> int:
        """Adds a line's shares to each layer's history; returns how many lines that holds."""
        for layer in line.get("router", []):
            self._shares.setdefault(layer["layer"], ShareHistory()).add(layer["share"])
        return max((history.lines for history in self._shares.values()), default=0)

    def _pictures(self) -> dict[str, Any]:
        return {f"router/layer_{n}/shares": history.picture() for n, history in self._shares.items()}

    def _write_json(self, entry: dict[str, Any]) -> None:
        assert self._jsonl is not None
        try:
            self._jsonl.write(json.dumps(redacted(jsonable(entry))) + "\n")
            self._jsonl.flush()
        except OSError as error:  # a full disk: what could not be written is tried again with the next line
            if not self._disk_failed:
                logger.warning("log.jsonl cannot be written: %s", error)
            self._disk_failed = True


def open_jsonl(path: Path) -> TextIO:
    """Opens for appending; after a line that was cut off, on a new line."""
    cut_off = False
    if path.exists() and path.stat().st_size:
        with open(path, "rb") as file:
            file.seek(-1, 2)
            cut_off = file.read() != b"\n"
    file = open(path, "a", encoding="utf-8")  # noqa: SIM115
    file.write("\n" if cut_off else "")
    return file


def flatten(entry: Mapping[str, Any]) -> dict[str, float]:
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


def jsonable(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become strings, so that any reader takes the file."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {k: jsonable(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(v) for v in value]
    return value
