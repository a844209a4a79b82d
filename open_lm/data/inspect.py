"""What is in the data, and whether it is whole.

    python -m open_lm.data.inspect a/manifest.jsonl s3://bucket/b/manifest.jsonl --verify

prints each source's counts, its share of the mix and a decoded sample; --verify reads every sample and compares
every checksum and every row's digest. Exit status 1 if anything is damaged: each damage is one line that names the
shard.
"""

import functools
import os
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import tyro

from open_lm.config.redact import redact
from open_lm.data.binary import DTYPES, BinaryShard, UnreadableSample
from open_lm.data.digests import find_faults, find_own_faults
from open_lm.data.index import hash_file, refuse_digests
from open_lm.data.manifest import Shard, Source, locate_beside, read_information, read_manifest
from open_lm.data.order import normalize_weights
from open_lm.data.remote import Cache, Patience, is_local, list_matching, read_bytes
from open_lm.data.shards import AUTO, open_shard

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SHOWN_CHARACTERS = 400
NAMED_SAMPLES = 3  # damaged samples of a shard that are named; the others are counted


@dataclass(frozen=True)
class InspectConfig:
    """Show what manifests hold and, with --verify, whether all of it is there and readable."""

    manifests: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Manifests: local paths or URLs, with {00..99} brace ranges, * and ?, one per source."""

    train_data_mix_weights: tuple[float, ...] | None = None
    """Weights of the sources, as in training."""

    tokenizer: str | None = None
    """tokenizer.json that decodes a sample, or its folder. Default: the one that info.json beside the manifest
    names."""

    data_key: str = AUTO
    """As in training."""

    vocab_size: int | None = None
    """Ids must be below it. Default: what info.json beside the manifest says."""

    verify: bool = False
    """Read everything: sizes, checksums, every sample, ids in the vocabulary."""

    processes: int = os.cpu_count() or 1
    """Shards read at a time."""

    data_retries: int = 6
    """As in training."""

    data_timeout: float = 30.0
    """As in training."""

    @property
    def patience(self) -> Patience:
        """With remote files."""
        return Patience(self.data_retries, self.data_timeout)


class Finding(NamedTuple):
    """What reading a shard showed: its tokens, smallest and largest id, and what is damaged."""

    tokens: int = 0
    lowest: int = 0
    highest: int = 0
    damages: tuple[str, ...] = ()


def verify_shard(shard: Shard, key: str, vocab_size: int | None, patience: Patience | None = None) -> Finding:
    """Reads every sample of a shard and compares what its manifest says of it. Damage is returned, not raised."""
    with tempfile.TemporaryDirectory(prefix="open_lm-verify-") as folder:
        try:  # not from the cache: what is there now is asked for
            unverified = shard._replace(row_digests=None)  # all faults are found below, at once
            reader = open_shard(unverified, key, Cache(Path(folder), 0, patience=patience or Patience()))
        except (ValueError, OSError, ImportError) as error:
            return Finding(damages=(str(error),))
    damages, tokens, lowest, highest, unreadable, odd, odd_rows = [], 0, [], [], [], 0, []
    try:
        if shard.bytes not in (None, length := os.fstat(reader.fd).st_size):
            damages.append(
                f"shard {redact(shard.url)}: the manifest says {shard.bytes:,} bytes, the tar has {length:,}"
            )
        if shard.sha256 not in (None, found := hash_file(reader.fd) if shard.sha256 else None):
            damages.append(
                f"shard {redact(shard.url)}: the manifest says sha256 {shard.sha256}, the tar has {found}"
            )
        if isinstance(reader, BinaryShard):
            known = shard.row_digests
            faults = (
                find_faults(reader.fd, reader.layout, known)
                if known
                else find_own_faults(reader.fd, reader.layout)
            )
            odd_rows = [f"shard {redact(shard.url)}: {fault}" for fault in faults]
        elif reader.index.key in DTYPES:
            try:
                refuse_digests(reader.fd, shard.url, reader.index)
            except ValueError as error:
                damages.append(redact(str(error)))
        for number in range(len(reader)):
            try:
                tokens_L = reader[number]
            except UnreadableSample as error:
                unreadable.append(str(error))
                continue
            tokens += len(tokens_L)
            if len(tokens_L):
                lowest.append(int(tokens_L.min()))
                highest.append(int(tokens_L.max()))
            odd += shard.sequence_tokens not in (None, len(tokens_L))
    except OSError as error:
        damages.append(f"shard {redact(shard.url)}: {error}")
    finally:
        reader.close()
    damages += name_samples(shard, unreadable, "cannot be read")
    damages += name_samples(shard, odd_rows, "are not what their digests say")
    if not unreadable and not odd and shard.tokens not in (None, tokens):
        damages.append(
            f"shard {redact(shard.url)}: the manifest says {shard.tokens:,} tokens, the tar has {tokens:,}"
        )
    if odd:
        damages.append(
            f"shard {redact(shard.url)}: {odd:,} samples have not the "
            f"{shard.sequence_tokens} tokens that the manifest says"
        )
    low, high = min(lowest, default=0), max(highest, default=0)
    if vocab_size is not None and not -vocab_size <= low <= high < vocab_size:
        damages.append(
            f"shard {redact(shard.url)}: token ids {low:,} … {high:,} in a vocabulary of {vocab_size:,}"
        )
    return Finding(tokens, low, high, tuple(damages))


def name_samples(shard: Shard, damages: list[str], what: str) -> list[str]:
    """The first of a shard's damages, and their number if there are more."""
    if len(damages) <= NAMED_SAMPLES:
        return damages
    return [*damages[:NAMED_SAMPLES], f"shard {redact(shard.url)}: {len(damages):,} samples {what} in all"]


def verify_source(source: Source, config: InspectConfig, vocab_size: int | None) -> Iterator[Finding]:
    """`verify_shard` of each shard, in order, several at a time."""
    verify = functools.partial(
        verify_shard, key=config.data_key, vocab_size=vocab_size, patience=config.patience
    )
    processes = max(1, min(config.processes, len(source.shards)))
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        yield from pool.map(verify, source.shards)


def describe_source(source: Source, share: float) -> str:
    """A source's counts in one line, from its manifest."""
    known = [shard for shard in source.shards if shard.sequence_tokens is not None]
    tokens = sum(shard.num_sequences * (shard.sequence_tokens or 0) for shard in known)
    keys = sorted({shard.data_key for shard in source.shards if shard.data_key}) or ["data key not said"]
    size = sum(shard.bytes or 0 for shard in source.shards)
    said = f", {tokens:,} tokens" if len(known) == len(source.shards) else ""
    said += f", {size / 1e9:.3f} GB" if size else ""
    return (
        f"{redact(source.name)}: {source.sequences:,} sequences in {len(source.shards):,} shards{said}, "
        f"{', '.join(keys)}; {share:.2%} of the mix"
    )


def load_tokenizer(url: str) -> "Tokenizer":
    """ValueError, ImportError or OSError: none."""
    if os.path.isdir(url):
        url = os.path.join(url, "tokenizer.json")
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise ImportError(f"--tokenizer needs tokenizers: {error} (pip install tokenizers)") from error
    content = read_bytes(url)
    try:
        return Tokenizer.from_str(content.decode())
    except Exception as error:  # tokenizers raises Exception itself
        raise ValueError(f"--tokenizer {redact(url)}: no tokenizer.json: {error}") from None


def show_sample(source: Source, key: str, tokenizer: "Tokenizer | None") -> str:
    """The first sequence of a source: its length, its ids and, with a tokenizer, its text."""
    shard = next(shard for shard in source.shards if shard.num_sequences)
    reader = open_shard(shard, key)
    try:
        ids = reader[0].tolist()
    finally:
        reader.close()
    shown = f"  first sequence: {len(ids):,} tokens, {' '.join(map(str, ids[:16]))} …"
    if tokenizer is not None:
        text = tokenizer.decode(ids, skip_special_tokens=False)
        shown += f"\n  {text[:SHOWN_CHARACTERS]!r}"
    return shown


def look_beside(manifest: str, patience: Patience) -> dict:
    """info.json beside the manifest; empty also where access to it is denied, as S3 says of what is not there to
    those who may not list."""
    try:
        return read_information(manifest, patience)
    except PermissionError:
        return {}


def compare_sizes(source: Source) -> Iterator[str]:
    """Local shards that are not there, or have not the bytes that the manifest says."""
    for shard in source.shards:
        if is_local(shard.url):
            try:
                length = os.stat(shard.url.removeprefix("file://")).st_size
            except OSError as error:
                yield f"shard {shard.url}: {error.strerror}"
                continue
            if shard.bytes not in (None, length):
                yield f"shard {shard.url}: the manifest says {shard.bytes:,} bytes, the tar has {length:,}"


def inspect(config: InspectConfig) -> list[str]:
    """Prints what the manifests hold; returns the damages. ValueError for weights that do not fit."""
    if not config.manifests:
        raise ValueError("no manifest is given: name one or more, such as data/train/manifest.jsonl")
    patience = config.patience
    manifests = [url for pattern in config.manifests for url in list_matching(pattern, patience)]
    weights = normalize_weights(config.train_data_mix_weights, len(manifests))
    given = load_tokenizer(config.tokenizer) if config.tokenizer else None
    damages: list[str] = []
    for manifest, weight in zip(manifests, weights, strict=True):
        try:
            source = read_manifest(manifest, patience)
            information = look_beside(manifest, patience)
            print(describe_source(source, float(weight)))
            if not config.verify:
                damages += compare_sizes(source)
            named = information.get("tokenizer")
            beside = load_tokenizer(locate_beside(named, manifest)) if named and given is None else None
            print(show_sample(source, config.data_key, given or beside))
        except (ValueError, OSError) as error:
            damages.append(str(error))
            if not config.verify or not isinstance(error, ValueError):
                continue
        if config.verify:
            damages += verify(config, manifest)
    return damages


def verify(config: InspectConfig, manifest: str) -> list[str]:
    """Reads a source whole, prints what was found and returns the damages."""
    try:
        source = read_manifest(manifest, config.patience)
        vocab_size = config.vocab_size or look_beside(manifest, config.patience).get("vocab_size")
    except (ValueError, OSError) as error:
        return [str(error)]
    findings = list(verify_source(source, config, vocab_size))
    damages = [damage for finding in findings for damage in finding.damages]
    whole = [finding for finding in findings if finding.tokens]
    print(
        f"  read {sum(finding.tokens for finding in whole):,} tokens, ids "
        f"{min((finding.lowest for finding in whole), default=0):,} … "
        f"{max((finding.highest for finding in whole), default=0):,}; "
        f"{len(damages):,} damages in {sum(bool(finding.damages) for finding in findings):,} shards"
    )
    return damages


def main() -> None:
    config = tyro.cli(InspectConfig)
    try:
        damages = inspect(config)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"open_lm.data.inspect: error: {error}")
    for damage in dict.fromkeys(damages):
        print(damage, file=sys.stderr)
    sys.exit(bool(damages))


if __name__ == "__main__":
    main()
