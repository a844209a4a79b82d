"""Where metrics go besides log.jsonl, each behind a thread of its own: no server, no disk stops or slows a run."""

import logging
import netrc
import os
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from queue import Full, Queue
from typing import Any, NamedTuple, Protocol
from urllib.parse import urlsplit

import numpy as np

logger = logging.getLogger("open_lm")

MAX_WAITING = 10_000  # records that a sink may be behind
INIT_SECONDS = 30.0  # for wandb's server to answer; then the run is logged offline
FINISH_SECONDS = 30.0  # for wandb to send what is left at the end
CLOSE_SECONDS = 75.0  # after which a sink is left behind, whatever it does


class Record(NamedTuple):
    """What a step says: numbers and pictures (height, width, 3) by name."""

    step: int
    numbers: Mapping[str, float]
    pictures: Mapping[str, np.ndarray]


class Writer(Protocol):
    """What a sink's thread works with; it may raise and it may hang."""

    def write(self, record: Record) -> None: ...

    def close(self, failed: bool) -> None: ...


class Sink:
    """Hands records to a writer, in order, in a daemon thread. An error ends the sink with one warning."""

    def __init__(self, name: str, start: Callable[[], Writer]) -> None:
        self.name = name
        self._waiting: Queue[Record | bool] = Queue(MAX_WAITING)
        self._broken = False
        self._lost = 0
        self._thread = threading.Thread(target=self._work, args=(start,), name=name, daemon=True)
        self._thread.start()

    def put(self, record: Record) -> None:
        """Never waits. Where the sink is MAX_WAITING records behind, the record is lost to it."""
        if self._broken:
            return
        try:
            self._waiting.put_nowait(record)
        except Full:
            self._lost += 1
            if self._lost == 1:
                logger.warning("%s is %d records behind: it misses some", self.name, MAX_WAITING)

    def finish(self, failed: bool) -> None:
        """Lets the thread end once it has written everything. Never waits."""
        if self._broken:
            return
        try:
            self._waiting.put_nowait(failed)
        except Full:
            self._lost += 1

    def wait(self, deadline: float) -> None:
        """Waits for the thread's end, until `deadline` (time.monotonic) at most."""
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            logger.warning("%s does not end: it is left behind, log.jsonl has everything", self.name)
        elif self._lost:
            logger.warning("%s missed %d records; log.jsonl has them", self.name, self._lost)

    def _work(self, start: Callable[[], Writer]) -> None:
        doing = "could not be started, the run goes on without it"
        try:
            writer = start()
            doing = "failed and gets no more metrics"
            while not isinstance(record := self._waiting.get(), bool):
                writer.write(record)
            doing = "could not be closed"
            writer.close(record)
        except Exception as error:
            self._broken = True
            logger.warning("%s %s: %s", self.name, doing, error)


class TensorBoard:
    """LOGS/NAME/tensorboard. With `step`, what an earlier try wrote for later steps is no longer shown."""

    def __init__(self, folder: Path, step: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge = None if step is None else step + 1
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=purge)

    def write(self, record: Record) -> None:
        for name, value in record.numbers.items():
            self._writer.add_scalar(name, value, record.step)
        for name, picture in record.pictures.items():
            self._writer.add_image(name, picture, record.step, dataformats="HWC")

    def close(self, failed: bool) -> None:
        self._writer.close()


class Wandb:
    """wandb, under one run id for the folder's whole life, so that a resumed run goes on in its own curves.

    Every row holds `step` and `tokens`; curves are drawn over tokens unless the page is told otherwise. wandb
    counts rows by itself, so that steps done again after a resume are kept, not refused. Without a key, or
    where no server answers in time, the run is in LOGS/NAME/wandb alone.
    """

    def __init__(self, folder: Path, project: str, notes: str, flags: Mapping[str, Any]) -> None:
        import wandb

        self._picture = wandb.Image
        self._tokens = 0.0
        mode = os.environ.get("WANDB_MODE") or ("online" if has_wandb_key() else "offline")
        limits: dict[str, Any] = {"init_timeout": INIT_SECONDS, "finish_timeout": FINISH_SECONDS}
        limits = {name: limits[name] for name in limits if name in wandb.Settings.model_fields}

        own_id = run_id(folder)

        def start(mode: str, id: str) -> Any:
            settings = wandb.Settings(silent=True, console="off", **limits)
            return wandb.init(
                project=project, name=folder.name, notes=notes or None, config=dict(flags), dir=str(folder),
                id=id, resume="allow", mode=mode, settings=settings,  # pyright: ignore
            )  # fmt: skip

        try:
            self._run = start(mode, own_id)
        except Exception as error:  # no answer, a wrong key, …
            if mode == "offline":
                raise
            reason = str(error).splitlines()[0]
            logger.warning("wandb cannot be reached, the run is logged offline (%s)", reason)
            self._run = start("offline", secrets.token_hex(4))  # wandb takes the run's own for in use still
        if not self._run.offline:
            logger.info("wandb: %s", self._run.url)
        elif not self._run.disabled:
            path = Path(self._run.dir).parent
            logger.info("wandb is offline; to send the run: wandb sync --id %s %s", own_id, path)
        for name in ("train/*", "valid/*", "router/*"):
            self._run.define_metric(name, step_metric="tokens")

    def write(self, record: Record) -> None:
        self._tokens = record.numbers.get("tokens", self._tokens)
        pictures = {name: self._picture(picture) for name, picture in record.pictures.items()}
        self._run.log({"step": record.step, "tokens": self._tokens, **record.numbers, **pictures})

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


def run_id(folder: Path) -> str:
    """The id of the folder's wandb run, chosen once and kept in wandb/run_id; $WANDB_RUN_ID where it is set."""
    path = folder / "wandb" / "run_id"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(secrets.token_hex(4), encoding="utf-8")
    return os.environ.get("WANDB_RUN_ID") or path.read_text(encoding="utf-8").strip()


def has_wandb_key() -> bool:
    """Whether `wandb login` has been run for the server in use, or its variable is set."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    server = os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai"
    try:
        return netrc.netrc().authenticators(urlsplit(server).hostname or "") is not None
    except (OSError, netrc.NetrcParseError):
        return False
