"""Items that are steps or numbers of batches, and their loading by forked workers.

Workers never change the order, and every step can be the first. They run numpy and the standard library alone,
never CUDA, torch.distributed or torch's threads.

Legend: B sequences of this rank's batch, S sequence length, L = S + 1 tokens of a stored sequence.
"""

import logging
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from open_lm.data.errors import keep_traceback
from open_lm.data.manifest import Shard
from open_lm.data.masks import IGNORED, NO_MASKS, Masks, divide
from open_lm.data.order import Order
from open_lm.data.read_ahead import ReadAhead, read_ahead
from open_lm.data.reader import Rows, SequenceReader
from open_lm.data.synthetic import draw_tokens

PREFETCHED = 4  # batches a worker is ahead


class Batch(NamedTuple):
    """Inputs and targets, int64; targets are -100 where there is nothing to learn.

    `n_bad` sequences are wholly ignored: shorter than S + 1 tokens or, with --ignore-parse-errors,
    unreadable; `bad` says of each which it is and what is wrong.
    """

    tokens_BS: torch.Tensor
    targets_BS: torch.Tensor
    n_bad: int
    bad: tuple[str, ...] = ()


def make_batch(rows: Rows, masks: Masks = NO_MASKS) -> Batch:
    """Inputs are all tokens but the last, targets all but the first that are neither masked nor bad."""
    if (
        masks == NO_MASKS
    ):  # as `divide`, but in one block: the allocator keeps it for the next batch (measured)
        sequences, length = rows.tokens_BL.shape
        both_2BS = np.empty((2, sequences, length - 1), dtype=np.int64)
        both_2BS[0] = rows.tokens_BL[:, :-1]
        both_2BS[1] = rows.tokens_BL[:, 1:]
        inputs_BS, targets_BS = torch.from_numpy(both_2BS)
    else:
        inputs_BS, targets_BS = divide(torch.from_numpy(rows.tokens_BL.astype(np.int64)), masks)
    n_bad = int(np.count_nonzero(~rows.good_B))
    if n_bad:
        targets_BS[torch.from_numpy(~rows.good_B)] = IGNORED
    return Batch(inputs_BS, targets_BS, n_bad, rows.bad)


class Steps(Dataset):
    """Item t: this rank's rows of step t, or the error that reading them gave."""

    def __init__(self, order: Order, reader: SequenceReader, first: int, end: int):
        self.order = order
        self.reader = reader
        self.slots = (first, end)

    def shards(self, step: int) -> list[Shard]:
        places = self.order.slots(step, *self.slots)
        return [self.reader.sources[source].shards[shard] for source, shard, _ in places]

    def settle(self) -> None:
        """Makes sure of the rows that were read."""
        self.reader.settle()

    def __getitem__(self, step: int) -> Rows | Exception:
        try:
            places = self.order.slots(step, *self.slots)
            return self.reader.read(places, self.order.seed, "crop", step, first=self.slots[0])
        except (ValueError, OSError, ImportError) as error:
            return keep_traceback(error) if get_worker_info() else error


class SyntheticSteps(Dataset):
    """Item t: this rank's rows of step t."""

    def __init__(self, seed: int, first: int, end: int, length: int, vocab_size: int):
        self.seed = seed
        self.slots = (first, end)
        self.shape = (length, vocab_size)

    def __getitem__(self, step: int) -> Rows:
        tokens_BL = draw_tokens(self.seed, step, *self.slots, *self.shape)
        return Rows(tokens_BL, np.ones(len(tokens_BL), dtype=bool))


class Stretches(Dataset):
    """Item b: rows of the b-th `batch` of the first `total` sequences of a reader's one source, in stored order,
    or the error that reading them gave."""

    def __init__(self, reader: SequenceReader, batch: int, total: int):
        self.reader = reader
        self.batch = batch
        self.total = total
        self.end_N = np.cumsum([shard.num_sequences for shard in reader.sources[0].shards])

    def shards(self, number: int) -> list[Shard]:
        end = min((number + 1) * self.batch, self.total)
        first, last = (self.place(i)[1] for i in (number * self.batch, end - 1))
        return list(self.reader.sources[0].shards[first : last + 1])

    def settle(self) -> None:
        """Makes sure of the rows that were read."""
        self.reader.settle()

    def place(self, sequence: int) -> tuple[int, int, int]:
        shard = int(self.end_N.searchsorted(sequence, side="right"))
        return 0, shard, sequence - (int(self.end_N[shard - 1]) if shard else 0)

    def __getitem__(self, number: int) -> Rows | Exception:
        first = number * self.batch
        try:
            return self.reader.read(
                [self.place(i) for i in range(first, min(first + self.batch, self.total))]
            )
        except (ValueError, OSError, ImportError) as error:
            return keep_traceback(error) if get_worker_info() else error


def pass_on(item):
    """Arrays travel as they are: no shared memory, of which containers have little."""
    return item


def log_plainly(worker: int) -> None:
    """In a forked worker: files are opened anew, and a handler that draws on a terminal gives way to a plain one,
    as both have locks that a thread may have held at the fork. Every line is where it would be without workers."""
    logger = logging.getLogger("open_lm")
    for handler in list(logger.handlers):
        if isinstance(handler, logging.FileHandler):
            new = type(handler)(handler.baseFilename)
            new.setFormatter(handler.formatter)
        elif type(handler).__module__.startswith("logging"):
            continue
        else:
            new = logging.StreamHandler(sys.stderr)
            new.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
        new.setLevel(handler.level)
        new.filters = handler.filters
        logger.removeHandler(handler)
        logger.addHandler(new)


def next_rows(rows_of_items: Iterator, workers: int) -> Rows | Exception | None:
    """The next item; None at the end. OSError: a worker process has died."""
    try:
        return next(rows_of_items, None)
    except RuntimeError as error:
        if not re.match(r"DataLoader worker .*(exited unexpectedly|is killed by signal)", str(error)):
            raise
        raise OSError(
            f"a process that reads the data has died ({error}), as where memory runs out: --workers {workers} of "
            "each rank hold batches in memory: take fewer, and look at the system's log"
        ) from None


def load(items: Dataset, numbers: Sequence[int], workers: int, masks: Masks) -> Iterator[Batch]:
    """The masked batches of these items in this order, read by `workers` processes (0: by this one).

    An error comes up in its place in the order, as itself. The processes end with the iterator.
    """
    items = read_ahead(items, numbers)
    with warnings.catch_warnings():
        # torch warns of more workers than cores, Python 3.12 of forking beside threads (see the file's top).
        warnings.simplefilter("ignore")
        rows_of_items = iter(
            DataLoader(
                items,
                batch_size=None,
                sampler=numbers,
                num_workers=workers,
                collate_fn=pass_on,
                prefetch_factor=PREFETCHED if workers else None,
                multiprocessing_context="fork" if workers else None,
                worker_init_fn=log_plainly,
                generator=torch.Generator(),  # else it draws a number from torch's global generator
            )
        )
    try:
        while (rows := next_rows(rows_of_items, workers)) is not None:
            if isinstance(rows, Exception):
                raise rows
            yield make_batch(rows, masks)
    finally:
        if isinstance(items, ReadAhead):
            items.close()
        del rows_of_items  # ends the workers now, however long the error's traceback holds this frame
