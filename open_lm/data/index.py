"""A manifest for tars that exist.

    python -m open_lm.data.index 's3://bucket/data/shard_{00000000..00000031}.tar'

counts the sequences and tokens of each tar, takes its size and sha256, finds the ending of its members and, if they
are binary and alike, where they lie and whether each carries a digest, and writes manifest.jsonl beside the tars.
Remote tars pass through the cache.
"""

import hashlib
import json
import os
import posixpath
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Annotated

import tyro

from open_lm.config.redact import redact
from open_lm.data.binary import BLOCK_BYTES, DTYPES, BinaryShard, UnreadableSample
from open_lm.data.digests import find_digests, find_shard_digest
from open_lm.data.manifest import Shard
from open_lm.data.remote import Cache, find_file_system, is_local, list_matching, open_file
from open_lm.data.retry import Patience, retry
from open_lm.data.shards import AUTO, Index, ShardReader, check_count, find_layout, index_tar, open_shard

FIELDS = (  # of a line, in their order
    "num_sequences", "tokens", "bytes", "sha256", "sequence_tokens", "data_key",
    "first_offset", "stride", "row_digests",
)  # fmt: skip


@dataclass(frozen=True)
class IndexConfig:
    """Write a manifest of existing tar shards: counts, sizes, sha256, data key."""

    tars: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Tars: local paths or URLs, with {00..99} brace ranges, * and ?."""

    output: str | None = None
    """Manifest to write, a path or a URL. Default: manifest.jsonl beside the first tar."""

    data_key: str = AUTO
    """Ending of the members that hold the tokens. Default: the one known ending that there is."""

    processes: int = os.cpu_count() or 1
    """Tars read at a time."""

    overwrite: bool = False
    """Replace a manifest that is there already."""

    data_retries: int = 6
    """As in training."""

    data_timeout: float = 30.0
    """As in training."""

    @property
    def patience(self) -> Patience:
        """With remote files."""
        return Patience(self.data_retries, self.data_timeout)


def describe_tar(url: str, key: str = AUTO, cache: Cache | None = None) -> dict:
    """The manifest line of a tar, but for the name. Errors as of `open_shard`, they name the tar; ValueError also
    where a row is not what its own digest says."""
    fd = open_file(url, cache or Cache())
    try:
        index = index_tar(fd, url, key)
        check_count(url, index, key, None)
        layout = find_layout(index)
        if layout is None and index.key in DTYPES:
            refuse_digests(fd, url, index)
        line: dict = {"num_sequences": len(index.offset_N), "bytes": os.fstat(fd).st_size}
        line |= {"sha256": hash_file(fd)}
        try:
            row_digests = find_digests(fd, layout) if layout else None
        except ValueError as error:
            raise ValueError(f"shard {redact(url)}: {error}: the tar is damaged") from None
    except BaseException:
        os.close(fd)
        raise
    reader = BinaryShard(url, fd, layout) if layout else ShardReader(url, fd, index)
    line |= count_tokens(reader)
    reader.close()
    is_gzipped = index.gzipped_N.any() and index.gzipped_N.all() and not index.key.endswith(".gz")
    line |= {"data_key": f"{index.key}.gz" if is_gzipped else index.key}
    if layout:
        line |= {"first_offset": layout.first_offset, "stride": layout.stride}
        line |= {"row_digests": row_digests} if row_digests else {}
        fields = {name: line[name] for name in Shard._fields if name in line}
        shard = Shard(url, **fields)
        open_shard(shard, key, cache).close()  # what is written must open
    return {name: line[name] for name in FIELDS if name in line}


def refuse_digests(fd: int, url: str, index: Index) -> None:
    """ValueError if a row carries a digest: rows with digests are alike, and these are not."""
    for offset, size in zip(index.offset_N.tolist(), index.size_N.tolist(), strict=True):
        if find_shard_digest(os.pread(fd, BLOCK_BYTES, offset - BLOCK_BYTES)) is not None:
            raise ValueError(
                f"shard {redact(url)}: the row at byte {offset:,}, of {size:,} bytes, carries a digest, as rows of "
                "tokenized shards do, which are all alike, and this tar's are not: it is damaged, or was put "
                "together of several: write the shards anew"
            )


def count_tokens(reader: ShardReader | BinaryShard) -> dict:
    """The tokens of all sequences, and of each if they are equally long; nothing, and a warning, where a sample
    cannot be read."""
    if isinstance(reader, BinaryShard):
        lengths = Counter({reader.sequence_tokens: len(reader)})
    else:
        try:
            lengths = Counter(len(reader[i]) for i in range(len(reader)))
        except UnreadableSample as error:
            print(f"warning: {error}; the shard's tokens are not counted", file=sys.stderr, flush=True)
            return {}
    counts = {"tokens": sum(length * count for length, count in lengths.items())}
    return counts | ({"sequence_tokens": next(iter(lengths))} if len(lengths) == 1 else {})


def hash_file(fd: int) -> str:
    """sha256 of an open file, in hex."""
    with os.fdopen(os.dup(fd), "rb") as file:
        file.seek(0)
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe_tars(urls: list[str], key: str, processes: int, patience: Patience) -> Iterator[dict]:
    """`describe_tar` of each, in order, several at a time."""
    with ProcessPoolExecutor(max(1, min(processes, len(urls))), get_context("spawn")) as pool:
        yield from pool.map(describe_tar, urls, [key] * len(urls), [Cache(patience=patience)] * len(urls))


def write_manifest(config: IndexConfig) -> list[dict]:
    """Writes the manifest and returns its lines. ValueError: no tars, a tar that is none, a manifest in the way."""
    patience = config.patience
    urls = [url for pattern in config.tars for url in list_matching(pattern, patience)]
    if not urls:
        raise ValueError("no tars: name at least one")
    for url in urls:
        if is_local(url) and os.path.isdir(url.removeprefix("file://")):
            raise ValueError(
                f"{redact(url)} is a folder: name its tars, e.g. '{posixpath.join(url, '*.tar')}'"
            )
    output = config.output or posixpath.join(posixpath.dirname(urls[0]), "manifest.jsonl")
    if not config.overwrite and exists(output, patience):
        raise ValueError(f"{output} exists: --overwrite replaces it, --output names another file")
    if twice := [url for url, count in Counter(urls).items() if count > 1]:
        raise ValueError(f"{twice[0]} is named twice")
    lines = []
    for url, described in zip(
        urls, describe_tars(urls, config.data_key, config.processes, patience), strict=True
    ):
        lines.append({"shard": name_shard(url, output)} | described)
        print(
            f"{redact(url)}: {described['num_sequences']:,} sequences, .{described['data_key']}", flush=True
        )
    write_text(output, "".join(json.dumps(line) + "\n" for line in lines), patience)
    return lines


def name_shard(url: str, manifest: str) -> str:
    """What a manifest calls a tar: its name without .tar if it lies beside it, otherwise where it lies."""
    folder, name = posixpath.split(url.removeprefix("file://"))
    if folder == posixpath.dirname(manifest.removeprefix("file://")) and name.endswith(".tar"):
        return name.removesuffix(".tar")
    if not url.endswith(".tar"):
        raise ValueError(f"{redact(url)}: a manifest can name files that end in .tar only")
    return os.path.abspath(url.removeprefix("file://")) if is_local(url) else url


def exists(url: str, patience: Patience) -> bool:
    if is_local(url):
        return os.path.exists(url.removeprefix("file://"))

    def look() -> bool:
        file_system, path = find_file_system(url, patience)
        file_system.invalidate_cache()
        return file_system.exists(path)

    return retry(url, "looking it up", look, patience)


def write_text(url: str, text: str, patience: Patience) -> None:
    """Writes a small local or remote file: whole or not at all."""
    if is_local(url):
        path = url.removeprefix("file://")
        with open(f"{path}.partial", "w") as file:
            file.write(text)
        os.replace(f"{path}.partial", path)
        return

    def write() -> None:
        file_system, path = find_file_system(url, patience)
        file_system.pipe_file(path, text.encode())

    retry(url, "writing it", write, patience, verb="written")


def main() -> None:
    config = tyro.cli(IndexConfig)
    try:
        lines = write_manifest(config)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"open_lm.data.index: error: {error}")
    print(f"{sum(line['num_sequences'] for line in lines):,} sequences in {len(lines):,} tars")


if __name__ == "__main__":
    main()
