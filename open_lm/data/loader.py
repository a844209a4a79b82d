"""Batches of tokens for one rank: training data in the order of `order.py`, held-out data once through."""

import logging
import os
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from fractions import Fraction

from torch.utils.data import Dataset

from open_lm.config import DataConfig
from open_lm.config.redact import redact
from open_lm.data.batches import Batch, Steps, Stretches, SyntheticSteps, load
from open_lm.data.cache import GIB, find_cache
from open_lm.data.changes import changes_since, describe_source
from open_lm.data.manifest import Source, is_manifest, read_information, read_manifest
from open_lm.data.masks import NO_MASKS, Masks, find_masks
from open_lm.data.order import Change, Order, upsample_weights
from open_lm.data.reader import SequenceReader
from open_lm.data.remote import Cache, is_local
from open_lm.data.shards import find_source, open_shard
from open_lm.data.source_order import LANES

logger = logging.getLogger(__name__)


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
        stop: threading.Event | None = None,
    ):
        """`stop`, once it is set, ends the search for the sources, which may open every shard: Stopped."""
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
        self.slots = slots
        self.factors = config.upsampling_factors
        self.history: tuple[Change, ...] = ()
        self.sources: list[Source] = []
        if config.dataset_type == "synthetic":
            self.items: Dataset = SyntheticSteps(seed, *slots, seq_len + 1, vocab_size)
            return
        cache = cache or find_cache(config)
        self.sources = find_sources(config, until(cache, stop))
        for source in self.sources:
            check_vocabulary(source.name, vocab_size, cache)
        if rank == 0:
            warn_of_small_cache(self.sources, cache)
        self.reader = SequenceReader(
            self.sources,
            key=config.data_key,
            cache=cache,
            seq_len=seq_len,
            vocab_size=vocab_size,
            ignore_parse_errors=config.ignore_parse_errors,
        )
        self.arrange(())

    def arrange(self, history: Sequence[Change]) -> None:
        """Puts the data in the order that they have after these changes."""
        self.history = tuple(history)
        if not self.sources:
            return
        lengths = [[shard.num_sequences for shard in source.shards] for source in self.sources]
        weights: Sequence[float | Fraction] | None = self.config.train_data_mix_weights
        if self.factors:
            weights = upsample_weights(self.factors, [source.sequences for source in self.sources])
        self.order = Order(
            lengths,
            weights,
            self.global_batch,
            self.seed,
            shuffle=not self.config.disable_buffer,
            resampled=self.config.dataset_resampled,
            history=history,
        )
        self.reader.expect(
            sum(len(source.eras) for source in self.order.sources)
        )  # each append has its lanes
        self.items = Steps(self.order, self.reader, *self.slots)

    def resume(self, saved: dict, step: int) -> list[str]:
        """Goes on at `step` where the run whose fingerprint was `saved` stood; what differs from it, if anything.

        With --append-data a source that has grown at its end does not differ. Where batch, weights or seed differ,
        or sources grew, every source goes on behind the sequences that it has given. Where they are other sources,
        the order is that of a new run: sequences may come again or not at all.
        """
        differences, history = changes_since(
            saved, self.fingerprint(), self.sources, step, self.config.append_data
        )
        self.arrange(history)
        return differences

    def batches(self, start_step: int, end_step: int) -> Iterator[Batch]:
        """This rank's batches of the steps start_step … end_step-1. Errors name the shard and the sample."""
        return load(self.items, range(start_step, end_step), self.config.workers, self.masks)

    def name_samples(self, step: int) -> list[str]:
        """This rank's sequences of a step: shard and number in it. Of synthetic data, nothing."""
        if self.order is None:
            return []
        places = self.order.slots(step, *self.slots)
        return [
            f"{redact(self.sources[source].shards[shard].url)}: {sequence}"
            for source, shard, sequence in places
        ]

    def check_enough(self, end_step: int) -> None:
        """ValueError if a source is used up before `end_step` and may be neither read again nor resampled."""
        if self.order is None or self.config.multiple_data_passes or self.config.dataset_resampled:
            return
        needs = self.order.counts(end_step)
        factors = [max(Fraction(1), Fraction(factor)) for factor in self.factors or ["1"] * len(needs)]
        missing = [
            f"source {number} ({redact(source.name)}) holds {source.sequences:,} sequences"
            + (f", {source.sequences * factor:,g} at its factor of {factor}" if factor > 1 else "")
            + f", the run needs {need:,} by step {end_step:,}"
            for number, (source, factor, need) in enumerate(
                zip(self.sources, map(float, factors), needs, strict=True)
            )
            if need > source.sequences * factors[number]
        ]
        if missing:
            raise ValueError(
                f"{'; '.join(missing)}: give more data, --multiple-data-passes, --dataset-resampled, "
                "or a smaller --train-num-samples or --max-steps"
            )

    def fingerprint(self) -> dict:
        """What determines the order and the targets beside the step, wherever the files lie, as plain JSON.

        What is not given is not in it: checkpoints from before a flag resume.
        """
        given = {k: v for k, v in self.masks._asdict().items() if k != "after" or v is not None}
        optional = {
            "masks": given if self.masks != NO_MASKS else None,
            "factors": list(self.factors),
            "history": [change._asdict() for change in self.history],
        }
        return {key: value for key, value in optional.items() if value} | {
            "sources": [describe_source(source) for source in self.sources],
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
    given = config.dataset_manifest or config.train_data or ()
    for name, count in Counter(given).items():
        if count > 1:
            flag = "--dataset-manifest" if config.dataset_manifest else "--train-data"
            logger.warning(
                "%s %s is given %d times: each is a source of its own, with a weight of its own, so its sequences "
                "are used that often", flag, redact(name), count,
            )  # fmt: skip
    if config.dataset_manifest:
        sources = [read_manifest(url, cache.patience) for url in config.dataset_manifest]
        for source in sources:
            check_shards(source, config.data_key, cache, config.ignore_parse_errors)
        return sources
    if config.train_data:
        return [find_source(entry, config.data_key, cache) for entry in config.train_data]
    raise ValueError("no training data: give --dataset-manifest, --train-data or --dataset-type synthetic")


def until(cache: Cache, stop: threading.Event | None) -> Cache:
    """The cache whose patience ends when `stop` is set."""
    return replace(cache, patience=replace(cache.patience, stop=stop))


def check_shards(source: Source, key: str, cache: Cache, cut_short: bool) -> None:
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
            raise FileNotFoundError(f"{redact(shard.url)}, named by {redact(source.name)}, does not exist")
    if local:
        open_shard(local[0], key, cache, cut_short=cut_short).close()


def warn_of_small_cache(sources: Sequence[Source], cache: Cache) -> None:
    """Says where the remote shards that are read at a time, as far as their sizes are known, exceed the cache."""
    sizes = [
        sorted((shard.bytes or 0 for shard in source.shards if not is_local(shard.url)), reverse=True)[:LANES]
        for source in sources
    ]
    needed = sum(map(sum, sizes))
    if 0 < cache.limit_bytes < needed:
        logger.warning(
            "--data-cache-gib %.3g: up to %.3g GiB of remote shards are read at a time (%d of a source). What the "
            "cache drops stays on the disk while a process reads it, and is fetched again for others: a larger "
            "cache, or smaller shards, spare that", cache.limit_bytes / GIB, needed / GIB, LANES,
        )  # fmt: skip


def check_vocabulary(manifest: str, vocab_size: int, cache: Cache) -> None:
    """ValueError if info.json beside a manifest tells of a larger vocabulary than the model's. What it does not
    tell is met when the samples are read."""
    if not is_manifest(manifest):
        return
    try:
        said = read_information(manifest, cache.patience).get("vocab_size")
    except (ValueError, OSError) as error:  # it is not needed, and a server may hide what is not there
        logger.debug("no vocabulary size for %s: %s", redact(manifest), error)
        return
    if isinstance(said, int) and said > vocab_size:
        raise ValueError(
            f"{redact(manifest)}: its tokens are of a vocabulary of {said:,} ids "
            "(info.json beside it), the model's has "
            f"{vocab_size:,}: take a --model with vocab_size {said} or more, or tokenize with the model's tokenizer"
        )


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
        stop: threading.Event | None = None,
    ):
        limit = None if max_tokens is None else max(1, max_tokens // seq_len)
        cache = cache or Cache()
        source = find_source(entry, key, until(cache, stop), limit)
        if is_manifest(entry):
            check_shards(source, key, cache, ignore_parse_errors)
            check_vocabulary(entry, vocab_size, cache)
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
