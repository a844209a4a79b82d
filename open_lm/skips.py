"""What a step left out: updates that were skipped, samples that could not be used. Counted, named, limited."""

from collections.abc import Sequence

from open_lm.data.errors import DataError
from open_lm.log import logger
from open_lm.metrics import Progress, Skips
from open_lm.optim import LossSpikes
from open_lm.parallel.gather import gather_objects

SCALE_STEPS = 16  # updates in a row that finding a fp16 loss scale may cost
NAMED_SAMPLES = 20  # bad samples that the log names


def keep_statistics(progress: Progress, skips: Skips, spikes: LossSpikes | None) -> None:
    """Brings into `progress`, which is saved, what the device has counted."""
    skips.read(progress)
    if spikes:
        progress.accepted_losses = spikes.read()


class BadSamples:
    """Names the first bad samples of all ranks in the log, each once; ends a run that has too many."""

    def __init__(self, limit: int | None) -> None:
        self.limit = limit
        self.named: set[str] = set()

    def add_(self, n_bad: int, mine: Sequence[str], step: int, total: int) -> None:
        """Of `step` (from 1): the number over all ranks, and this rank's own; `total` is the run's so far.
        Collective where something is to be named.

        DataError, on all ranks, when the run has more than the limit.
        """
        too_many = self.limit is not None and total > self.limit
        if not n_bad or (len(self.named) >= NAMED_SAMPLES and not too_many):
            return
        samples = [sample for of_rank in gather_objects(list(mine)) for sample in of_rank]
        for sample in samples:
            if sample not in self.named and len(self.named) < NAMED_SAMPLES:
                self.named.add(sample)
                logger.warning("step %d: %s: ignored", step, sample)
                if len(self.named) == NAMED_SAMPLES:
                    logger.warning("further bad samples are only counted")
        if too_many:
            raise DataError(
                f"--bad-sample-limit {self.limit}: step {step} brings the run's bad samples to "
                f"{total}; the last one: {samples[-1] if samples else 'unnamed'}"
            )


def look_at(skips: Skips, progress: Progress, finding_scale: bool) -> None:
    """Brings `progress` up to date; warns of new skips, but for the few by which fp16 finds its scale."""
    before, spikes_before = progress.skipped_updates, progress.skipped_spikes
    skips.read(progress)
    if progress.skipped_spikes > spikes_before:
        logger.warning(
            "step %d: the loss was a spike in %d of the last steps: these updates were skipped on all ranks "
            "(%d so far)",
            progress.step, progress.skipped_spikes - spikes_before, progress.skipped_spikes,
        )  # fmt: skip
    if progress.skipped_updates > before and not (finding_scale and progress.skipped_in_a_row <= SCALE_STEPS):
        logger.warning(
            "step %d: loss or gradient was not finite in %d of the last steps: these updates were skipped on all "
            "ranks (%d so far)",
            progress.step, progress.skipped_updates - before, progress.skipped_updates,
        )  # fmt: skip
