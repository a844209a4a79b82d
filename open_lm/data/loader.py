"""Batches of tokens for one rank: training data in the order of `order.py`, held-out data once through.

A data loader's item is a step (or a number of a batch), so workers never change the order, and every step
can be the first. Workers are forked: they run numpy and the standard library alone, never CUDA,
torch.distributed or torch's threads.

Legend: B sequences of this rank's batch, S sequence length, L = S + 1 tokens of a stored sequence.
"""

import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from open_lm.config import DataConfig
from open_lm.data.cache import find_cache
from open_lm.data.manifest import Shard, Source, read_manifest
from open_lm.data.masks import IGNORED, NO_MASKS, Masks, divide, find_masks
from open_lm.data.order import LANES, Order
from open_lm.data.read_ahead import ReadAhead, read_ahead
from open_lm.data.reader import Rows, SequenceReader
from open_lm.data.remote import Cache, is_local
from open_lm.data.shards import find_source, open_shard
from open_lm.data.synthetic import draw_tokens

PREFETCHED = 4  # batches a worker is ahead


class Batch(NamedTuple):
    """Inputs and targets, int64; targets are -100 where there is nothing to learn.

    `n_bad` sequences are wholly ignored: shorter than S + 1 tokens or, with --ignore-parse-errors,
    unreadable.
    """

    tokens_BS: torch.Tensor
    targets_BS: torch.Tensor
    n_bad: int


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
    return Batch(inputs_BS, targets_BS, n_bad)


class Steps(Dataset):
    """Item t: this rank's rows of step t, or the error that reading them gave."""

    def __init__(self, order: Order, reader: SequenceReader, first: int, end: int):
        self.order = order
        self.reader = reader
        self.slots = (first, end)

    def shards(self, step: int) -> list[Shard]:
        places = self.order.slots(step, *self.slots)
        return [self.reader.sources[source].shards[shard] for source, shard, _ in places]

    def __getitem__(self, step: int) -> Rows | Exception:
        try:
            places = self.order.slots(step, *self.slots)
            return self.reader.read(places, self.order.seed, "crop", step, first=self.slots[0])
        except (ValueError, OSError, ImportError) as error:
            return error


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
            return error


def pass_on(item):
    """Arrays travel as they are: no shared memory, of which containers have little."""
    return item


def log_plainly(worker: int) -> None:
    """In a forked worker: a handler that draws on a terminal has locks that a thread may have held at the fork."""
    logger = logging.getLogger("open_lm")
    drawing = [handler for handler in logger.handlers if not type(handler).__module__.startswith("logging")]
    for handler in drawing:
        logger.removeHandler(handler)
        logger.addHandler(logging.StreamHandler(sys.stderr))


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
        for rows in rows_of_items:
            if isinstance(rows, Exception):
                raise rows
            yield make_batch(rows, masks)
    finally:
        if isinstance(items, ReadAhead):
            items.close()
        del rows_of_items  # ends the workers now, however long the error's traceback holds this frame


class TrainData:
    """This rank's share of the training data: B/W slots from rank*B/W on of every global batch of B sequences.

    ValueError: no data or two kinds of it, weights or masks that do not fit, a batch that the W ranks cannot
    share, and what manifests and shards give; FileNotFoundError and OSError where they cannot be read.
    """

    def __init__(
        self,
        config: DataConfig,
        seq_len: int,
        vocab_size: int,
        rank: int,
        world_size: int,
        global_batch: int,
        seed: int,
        cache: Cache | None = None,
        end_of_text: int | None = None,
    ):
        if global_batch % world_size:
            raise ValueError(
                f"the global batch of {global_batch} sequences cannot be shared by {world_size} ranks"
            )
        share = global_batch // world_size
        slots = (rank * share, (rank + 1) * share)
        self.config = config
        self.global_batch = global_batch
        self.seed = seed
        self.masks = find_masks(config, vocab_size, end_of_text)
        self.order: Order | None = None
        self.sources: list[Source] = []
        if config.dataset_type == "synthetic":
            self.items: Dataset = SyntheticSteps(seed, *slots, seq_len + 1, vocab_size)
            return
        cache = cache or find_cache(config)
        self.sources = find_sources(config, cache)
        lengths = [[shard.num_sequences for shard in source.shards] for source in self.sources]
        shuffle = not config.disable_buffer
        weights = config.train_data_mix_weights
        self.order = Order(lengths, weights, global_batch, seed, shuffle, config.dataset_resampled)
        reader = SequenceReader(
            self.sources,
            key=config.data_key,
            cache=cache,
            seq_len=seq_len,
            vocab_size=vocab_size,
            ignore_parse_errors=config.ignore_parse_errors,
        )
        self.items = Steps(self.order, reader, *slots)

    def batches(self, start_step: int, end_step: int) -> Iterator[Batch]:
        """This rank's batches of the steps start_step … end_step-1. Errors name the shard and the sample."""
        return load(self.items, range(start_step, end_step), self.config.workers, self.masks)

    def check_enough(self, end_step: int) -> None:
        """ValueError if a source is used up before `end_step` and may be neither read again nor resampled."""
        if self.order is None or self.config.multiple_data_passes or self.config.dataset_resampled:
            return
        needs = self.order.counts(end_step)
        missing = [
            f"source {number} ({source.name}) holds {source.sequences:,} sequences, "
            f"the run needs {need:,} by step {end_step:,}"
            for number, (source, need) in enumerate(zip(self.sources, needs, strict=True))
            if need > source.sequences
        ]
        if missing:
            raise ValueError(
                f"{'; '.join(missing)}: give more data, --multiple-data-passes, --dataset-resampled, "
                "or a smaller --train-num-samples or --max-steps"
            )

    def fingerprint(self) -> dict:
        """What determines the order and the targets beside the step, wherever the files lie, as plain JSON.

        Without a mask it is what it was before there were masks: old checkpoints resume.
        """
        given = {k: v for k, v in self.masks._asdict().items() if k != "after" or v is not None}
        masks = {"masks": given} if self.masks != NO_MASKS else {}
        return masks | {
            "sources": [{"sha256": source.sha256, "sequences": source.sequences} for source in self.sources],
            "weights": [str(weight) for weight in self.order.weights] if self.order else [],
            "global_batch": self.global_batch,
            "seed": self.seed,
            "shuffle": not self.config.disable_buffer,
            "resampled": self.config.dataset_resampled,
            "synthetic": self.order is None,
            "lanes": LANES,
        }


def find_sources(config: DataConfig, cache: Cache) -> list[Source]:
    """The sources that the flags name. ValueError unless exactly one of the two flags is given."""
    if config.train_data and config.dataset_manifest:
        raise ValueError("--train-data and --dataset-manifest are both given: give one of them")
    if config.dataset_manifest:
        sources = [read_manifest(url, cache.patience) for url in config.dataset_manifest]
        for source in sources:
            check_shards(source, config.data_key, cache)
        return sources
    if config.train_data:
        return [find_source(entry, config.data_key, cache) for entry in config.train_data]
    raise ValueError("no training data: give --dataset-manifest, --train-data or --dataset-type synthetic")


def check_shards(source: Source, key: str, cache: Cache) -> None:
    """Of a local source: every tar is there, and the first opens and holds what the manifest says.

    Raises FileNotFoundError or ValueError. Remote tars are met when they are read.
    """
    local = [shard for shard in source.shards if is_local(shard.url)]
    listed: dict[str, set[str]] = {}
    for shard in local:
        folder, name = os.path.split(shard.url.removeprefix("file://"))
        if folder not in listed:
            listed[folder] = set(os.listdir(folder or "."))
        if name not in listed[folder]:
            raise FileNotFoundError(f"{shard.url}, named by {source.name}, does not exist")
    if local:
        open_shard(local[0], key, cache).close()


class ValData:
    """One --val-data entry (a manifest or a pattern of tars), each sequence once, in stored order.

    At most max_tokens // seq_len sequences, but at least one. Errors as for TrainData.
    """

    def __init__(
        self,
        entry: str,
        key: str,
        seq_len: int,
        vocab_size: int,
        max_tokens: int | None = None,
        ignore_parse_errors: bool = False,
        workers: int = 0,
        cache: Cache | None = None,
        masks: Masks = NO_MASKS,
        name: str | None = None,
    ):
        limit = None if max_tokens is None else max(1, max_tokens // seq_len)
        cache = cache or Cache()
        source = find_source(entry, key, cache, limit)
        if entry.endswith(".jsonl"):
            check_shards(source, key, cache)
        self.entry = entry
        self.name = name
        self.workers = workers
        self.masks = masks
        self.sequences = source.sequences if limit is None else min(source.sequences, limit)
        """Sequences that one evaluation reads."""
        self.reader = SequenceReader(
            [source],
            key=key,
            cache=cache,
            seq_len=seq_len,
            vocab_size=vocab_size,
            ignore_parse_errors=ignore_parse_errors,
        )

    def batches(self, batch_sequences: int, rank: int = 0, world_size: int = 1) -> Iterator[Batch | None]:
        """Batches rank, rank + world_size, … of `batch_sequences` each; only the last of all may be smaller.

        Every rank gets equally many items: None where there is no batch left for it.
        """
        total = -(-self.sequences // batch_sequences)
        numbers = range(rank, total, world_size)
        items = Stretches(self.reader, batch_sequences, self.sequences)
        yield from load(items, numbers, min(self.workers, len(numbers)), self.masks)
        yield from [None] * (-(-total // world_size) - len(numbers))
