"""A run's saves: when, of what, and what is said about them."""

import time
from bisect import insort
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from open_lm import checkpoint
from open_lm.averaging import Average
from open_lm.checkpoint.saver import FLUSH_SECONDS
from open_lm.checkpoint.sync import Sync, delete_before
from open_lm.config.checkpoint import CheckpointConfig
from open_lm.config.parse import flag_values
from open_lm.job import Job
from open_lm.log import Log, logger
from open_lm.metrics import Progress
from open_lm.optim import LossScale
from open_lm.parallel.mesh import broadcast_object
from open_lm.parallel.watch import StopAsked


class Saves:
    """Saves `job`'s state at the ends of intervals, between them, and when asked. All ranks call alike.

    `written` are the labels of the run's checkpoints so far, for --delete-previous-checkpoint.
    """

    def __init__(
        self,
        job: Job,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        progress: Progress,
        log: Log,
        *,
        loss_scale: LossScale | None,
        averages: Sequence[Average],
        sync: Sync | None,
        written: list[str],
    ) -> None:
        self.job, self.progress, self.log = job, progress, log
        self.loss_scale, self.sync, self.written = loss_scale, sync, written
        self.options = job.run.checkpoint
        self.due = Due(self.options, progress)
        self.saved_step = progress.step if job.start and job.start.state is not None else -1
        self.failed: Exception | None = None  # the last save, and there is no state of it
        self.lost: dict[str, Exception] = {}  # intervals of which there is none
        self.saver = checkpoint.Saver(
            job.folder / "checkpoints",
            model=model,
            optimizer=optimizer,
            averages=averages,
            keep=self.options.keep_last_states,
            on_complete=self._complete,
            timeout_seconds=job.run.distributed.collective_timeout,
        )

    def __enter__(self) -> "Saves":
        return self

    def __exit__(self, kind: type | None, *_: Any) -> None:
        """`close`, whatever ends the run: a run that was stopped has not failed, unless its save has."""
        self.close(failed=kind is not None and not issubclass(kind, StopAsked))

    def end_interval(self, n: int, last: bool, evaluates: bool = False) -> None:
        """What --save-frequency and --save-most-recent say of interval n, which is complete or the run's `last`;
        its state alone where they say nothing and it is evaluated now: a crash or a stop in there loses nothing."""
        every = self.options.save_frequency
        keep = last or (every and n % every == 0)
        labels = [str(n)] * bool(keep) + [checkpoint.LATEST] * self.options.save_most_recent
        if labels:
            self._save(labels, n)
            return
        self.if_due()
        if evaluates and self.progress.step != self.saved_step:
            self.save_state("it is evaluated now")

    def if_due(self, update: Callable[[], None] = lambda: None) -> None:
        """After a step: saves where a --save-every flag says so, and logs the saves that have ended.

        `update` brings the progress up to date before it is saved.
        """
        if reason := self.due.reason(self.progress):
            update()
            self.save_state(reason)
        else:
            self._report()

    def save_state(self, reason: str) -> None:
        """Saves the state of the present step, unless it is saved; for people, `reason` says why."""
        if self.progress.step == self.saved_step:
            self.saver.wait()  # all ranks then know whether it was
            self._report()
        if self.progress.step == 0 or (self.progress.step == self.saved_step and self.failed is None):
            logger.info("step %d: nothing new to save (%s)", self.progress.step, reason)
            return
        logger.info("saving step %d: %s", self.progress.step, reason)
        self._save([], self.job.schedule.interval_of(self.progress.step - 1) if self.job.schedule else 0)

    def close(self, failed: bool = False) -> None:
        """Waits until the last save is on disk. Raises its error, or that of an interval which has no epoch_N.pt,
        unless the run has `failed` anyway: SaveError where the disk is to blame."""
        self.job.world.watch.at("saving")
        owed = self.saver.close(FLUSH_SECONDS if failed else None)
        self._report(last=True)
        if failed:
            return
        if self.failed is not None:
            raise _at_the_end(f"step {self.saved_step} could not be saved", self.failed)
        if owed is not None:
            raise _at_the_end("the run is saved, but an epoch_N.pt is missing", owed)
        for n, error in self.lost.items():
            raise _at_the_end(f"the run is saved, but interval {n} has no epoch_{n}.pt", error)

    def _save(self, labels: list[str], n: int) -> None:
        self.job.world.watch.at("saving")
        self.saver.wait()  # then `written` is up to date
        self._report()
        assert self.job.train_data is not None
        progress = self.progress
        content = {
            "name": self.job.folder.name,
            "step": progress.step,
            "tokens": progress.tokens,
            "progress": progress.to_dict(),
            "loss_scale": self.loss_scale.state_dict() if self.loss_scale else None,
            "data": self.job.train_data.fingerprint(),
            "flags": flag_values(self.job.run),
            "written": list(self.written),
        }
        self.saver.save(content, number=n, labels=labels)
        self.saved_step = progress.step
        self.due.saved(progress)

    def _report(self, last: bool = False) -> None:
        """Logs the saves that have ended; `last`: no other will follow."""
        for save in self.saver.finished():
            self.failed = None if save.is_complete else save.error
            for label in save.labels:
                if self.failed is None:
                    self.lost.pop(label, None)
                elif label != checkpoint.LATEST and self._stays(label):
                    self.lost[label] = self.failed
            if save.error is not None:
                what, then = f"step {save.step} could not be saved", "; training goes on"
                if save.is_complete:
                    what = f"step_{save.step} is complete, but an epoch_N.pt is missing"
                    then += ", the next save tries again"
                logger.warning("%s: %s%s", what, save.error, "" if last else then)
                continue
            logger.info(
                "saved %s at step %d: %s bytes in %.1f s, the loop waited %.2f s",
                save.path, save.step, f"{save.size:,}", save.write_seconds, save.stall_seconds,
            )  # fmt: skip
            entry = {
                "checkpoint/step": save.step,
                "checkpoint/bytes": save.size,
                "checkpoint/write_seconds": save.write_seconds,
                "checkpoint/stall_seconds": save.stall_seconds,
            }
            self.log.metrics(entry, self.progress.step)

    def _stays(self, label: str) -> bool:
        """Whether the next interval's checkpoint does not delete this one's."""
        options = self.options
        every = options.keep_every if options.delete_previous_checkpoint else 1
        return bool(every) and int(label) % every == 0

    def _complete(self, labels: tuple[str, ...]) -> None:
        """By the thread of rank 0, when all of a checkpoint is on disk."""
        options = self.options
        for label in labels:
            if label == checkpoint.LATEST or not options.delete_previous_checkpoint:
                continue
            if label in self.written:  # written again: it was cut short
                self.written.remove(label)
            insort(self.written, label, key=int)  # one that could be made only now is older than others
            if self.sync is None:
                delete_before(self.job.folder, self.written, self.written[-1], keep_every=options.keep_every)
        if self.sync is not None:
            self.sync.wake()


def _at_the_end(what: str, error: Exception) -> Exception:
    """What ends a run whose checkpoints are not all there."""
    return checkpoint.SaveError(f"{what}: {error}") if isinstance(error, OSError | ValueError) else error


class Due:
    """Whether --save-every-steps, -tokens or -minutes asks for a save after a step; the same on all ranks."""

    def __init__(self, options: CheckpointConfig, progress: Progress) -> None:
        self.options = options
        self.saved(progress)

    def saved(self, progress: Progress) -> None:
        """A save began."""
        self._time = time.monotonic()
        self._tokens = progress.tokens  # after the step before

    def reason(self, progress: Progress) -> str | None:
        """Which flag; None for none. Collective with --save-every-minutes."""
        options, before = self.options, self._tokens
        self._tokens = progress.tokens
        if options.save_every_steps and progress.step % options.save_every_steps == 0:
            return f"--save-every-steps {options.save_every_steps}"
        every = options.save_every_tokens
        if every and progress.tokens // every > before // every:
            return f"--save-every-tokens {every}"
        minutes = options.save_every_minutes
        if minutes and broadcast_object(time.monotonic() - self._time >= 60 * minutes):
            return f"--save-every-minutes {minutes:g}"
        return None
