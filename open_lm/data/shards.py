"""Tar shards of tokenized sequences, with random access to their samples."""

import ast
import gzip
import hashlib
import json
import logging
import mmap
import os
import posixpath
import tarfile
import time
import weakref
from typing import NamedTuple

import numpy as np

from open_lm.config.redact import redact
from open_lm.data.binary import (
    BLOCK_BYTES,
    CUT_SHORT,
    DTYPES,
    BinaryShard,
    Layout,
    UnreadableSample,
    check_layout,
    found_layout,
    promised_layout,
)
from open_lm.data.manifest import Shard, Source, is_manifest, read_manifest
from open_lm.data.patterns import expand
from open_lm.data.remote import Cache, WrongFile, is_local, open_file
from open_lm.data.retry import Stopped
from open_lm.data.tars import DamagedHeader, Member, list_members, scan_members
from open_lm.data.verified import VerifiedShard

logger = logging.getLogger(__name__)


AUTO = "auto"
EMPTY_BYTES = 20 * BLOCK_BYTES  # of a tar without members


def decode_json(data: bytes) -> list:
    """A JSON list of token ids."""
    return json.loads(data)


def decode_txt(data: bytes) -> list:
    """A JSON or Python list of token ids."""
    try:
        return json.loads(data)
    except ValueError:
        return ast.literal_eval(data.decode())


def decode_u16(data: bytes) -> list:
    """Little-endian 16-bit token ids."""
    return np.frombuffer(data, DTYPES["u16"]).tolist()


def decode_u32(data: bytes) -> list:
    """Little-endian 32-bit token ids."""
    return np.frombuffer(data, DTYPES["u32"]).tolist()


DECODERS = {
    "json": decode_json, "json.gz": decode_json, "txt": decode_txt, "txt.gz": decode_txt,
    "u16": decode_u16, "u32": decode_u32, "u16.gz": decode_u16, "u32.gz": decode_u32,
}  # fmt: skip


class Index(NamedTuple):
    """Where the sequences of a tar lie: byte offsets and sizes, whether each is gzipped; the key they have."""

    key: str
    offset_N: np.ndarray
    size_N: np.ndarray
    gzipped_N: np.ndarray
    is_ended: bool  # by tar's end mark; without it the file may have been cut at a member's end
    endings: tuple[str, ...]  # of the other members


class ShardReader:
    """The sequences of one open tar, in its order: `len(reader)`, `reader[i]` → int64 array of token ids.

    UnreadableSample (a ValueError) names the shard and the sample. `close()`, or the reader's end, releases
    the file.
    """

    def __init__(self, url: str, fd: int, index: Index):
        self.url = url
        self.index = index
        self.decode = DECODERS.get(index.key, decode_json)  # no key, no member
        self.fd = fd
        self.close = weakref.finalize(self, os.close, fd)

    def __len__(self) -> int:
        return len(self.index.offset_N)

    def __getitem__(self, i: int) -> np.ndarray:
        if i >= len(self):
            raise UnreadableSample(
                f"shard {redact(self.url)}: sample number {i} cannot be read: the tar "
                f"is cut short after {len(self):,} "
                "sequences: copy or write it again"
            )
        size = int(self.index.size_N[i])
        data = os.pread(self.fd, size, int(self.index.offset_N[i]))
        try:
            if len(data) != size:
                raise ValueError(f"{len(data)} bytes of {size}")
            decoded = self.decode(gzip.decompress(data) if self.index.gzipped_N[i] else data)
            if not isinstance(decoded, list | tuple):
                raise ValueError(f"a {type(decoded).__name__}, not a list")
            tokens = np.array(decoded) if decoded else np.zeros(0, np.int64)
            if tokens.ndim != 1 or tokens.dtype != np.int64:
                raise ValueError(f"not a flat list of whole numbers (numpy: {tokens.ndim}-d {tokens.dtype})")
        except Exception as error:  # decoders of foreign bytes may raise anything
            place = f"shard {redact(self.url)}: sample {self.name(i)}"
            raise UnreadableSample(f"{place} cannot be read: {type(error).__name__}: {error}") from error
        return tokens

    def name(self, i: int) -> str:
        """The sample's member name (searched in the tar: for messages)."""
        with os.fdopen(os.dup(self.fd), "rb") as file:
            file.seek(0)
            offset = int(self.index.offset_N[i])
            return next(
                (m.name for m in tarfile.open(fileobj=file) if m.offset_data == offset), f"number {i}"
            )


def open_shard(
    url: str | Shard,
    key: str = AUTO,
    cache: Cache | None = None,
    num_sequences: int | None = None,
    cut_short: bool = False,
) -> ShardReader | BinaryShard:
    """Opens a local, remote or `pipe:` tar whose samples' members end in `.key` or `.key.gz`; auto: the one known
    ending that they have.

    A Shard whose manifest says where its sequences lie opens at once; the members of others are searched.
    ValueError, naming the shard: no such member, no tar, cut short, or not what its manifest says. With
    `cut_short` the part of a tar that is there will do: its other sequences are UnreadableSample.
    """
    shard, counted = (url, url.num_sequences) if isinstance(url, Shard) else (Shard(url, 0), num_sequences)
    key = find_key(shard, key)
    layout = promised_layout(shard)
    cache = cache or Cache()
    try:
        fd = open_file(shard.url, cache, shard.bytes, shard.sha256)
    except WrongFile as error:
        if not cut_short or layout is None or shard.row_digests is None:
            raise
        # which of its rows are good, each tells by itself
        logger.warning("%s; --ignore-parse-errors: its good samples are read", error)
        fd = open_file(shard.url, cache)
    try:
        if layout is not None:
            # A row with a digest is verified when it is read, and a copy in the cache is then mended.
            can_wait = shard.row_digests is not None and (cut_short or not is_local(shard.url))
            check_layout(fd, shard, layout, cut_short, damaged=can_wait)
            return open_rows(shard, fd, layout, cache, cut_short)
        index = index_tar(fd, shard.url, key, cut_short and counted is not None)
        check_count(shard.url, index, key, counted, cut_short)
    except BaseException:
        os.close(fd)
        raise
    if index.is_ended and (layout := find_layout(index)):
        return open_rows(shard, fd, layout, cache, cut_short)
    return ShardReader(shard.url, fd, index)


def open_rows(shard: Shard, fd: int, layout: Layout, cache: Cache, cut_short: bool) -> BinaryShard:
    """The rows of an open tar, verified by their digests if the manifest says that they carry them."""
    if shard.row_digests is None:
        return BinaryShard(shard.url, fd, layout)
    return VerifiedShard(shard, fd, layout, cache, takes_any=cut_short)


def find_layout(index: Index) -> Layout | None:
    """The layout of a tar whose members are binary, not gzipped and alike; else None."""
    if index.key not in DTYPES or index.gzipped_N.any():
        return None
    return found_layout(index.key, index.offset_N, index.size_N)


def find_key(shard: Shard, key: str) -> str:
    """What --data-key means for this shard. ValueError if there is no such key or the manifest has another."""
    if key != AUTO and key not in DECODERS:
        raise ValueError(f"--data-key {key}: must be one of {', '.join((AUTO, *DECODERS))}")
    if shard.data_key is None:
        return key
    if shard.data_key not in DECODERS:
        raise ValueError(
            f"shard {redact(shard.url)}: the manifest says data_key {shard.data_key!r}, "
            f"must be one of {', '.join(DECODERS)}"
        )
    if key != AUTO and shard.data_key.removesuffix(".gz") != key.removesuffix(".gz"):
        raise ValueError(
            f"--data-key {key}: the manifest says {shard.data_key} of shard {redact(shard.url)}: leave the flag out"
        )
    return shard.data_key if key == AUTO else key


def check_count(url: str, index: Index, key: str, num_sequences: int | None, cut_short: bool = False) -> None:
    """ValueError unless a tar has as many sequences as its manifest says, or, without one, its end mark."""
    count = len(index.offset_N)
    if cut_short and not index.is_ended and num_sequences is not None and count <= num_sequences:
        return
    if count == 0 and num_sequences != 0:
        endings = ", ".join(index.endings) or "no members at all"
        known = f"any of {', '.join('.' + known for known in DECODERS)}" if key == AUTO else f".{key}"
        raise ValueError(f"shard {redact(url)}: no member ends in {known} (it has {endings}): see --data-key")
    if num_sequences is None and not index.is_ended:
        raise ValueError(
            f"shard {redact(url)}: the tar has no end mark after {count:,} sequences: {CUT_SHORT}"
        )
    if num_sequences is not None and num_sequences != count:
        raise ValueError(
            f"shard {redact(url)}: the manifest says {num_sequences:,} sequences, the tar holds {count:,}"
            + ("" if index.is_ended else f": {CUT_SHORT}")
        )


def index_tar(fd: int, url: str, key: str, cut_short: bool = False) -> Index:
    """Finds the members that end in `.key` or `.key.gz` (auto: in the one known ending that there is).

    ValueError names the shard if it is no whole tar, or has several known endings.
    """
    length = os.fstat(fd).st_size
    try:
        if length == 0 and cut_short:
            none = np.zeros(0, np.int64)
            return Index(key, none, none, none.astype(bool), False, ())
        if length == 0:
            raise ValueError("it is empty")
        with mmap.mmap(fd, length, access=mmap.ACCESS_READ) as data:
            try:
                members, end = scan_members(data)
                if members is None:
                    members, end = list_members(fd, length)
            except DamagedHeader as error:
                if not cut_short or not error.members:
                    raise
                members, end = error.members, error.offset
            is_ended = data[end : end + BLOCK_BYTES] == bytes(BLOCK_BYTES)
            if not members and length > EMPTY_BYTES:
                raise ValueError("its first header is empty: the tar is damaged, or it is none")
        past = next((member for member in members if member.offset + member.size > length), None)
        if past is not None and cut_short:
            members, is_ended = members[: members.index(past)], False
        elif past is not None:
            raise ValueError(f"in {past.name.decode(errors='replace')} {CUT_SHORT}")
    except (ValueError, tarfile.TarError, OverflowError, MemoryError) as error:
        raise ValueError(f"shard {redact(url)}: cannot be read as a tar: {error}") from error
    members_of: dict[str, list[Member]] = {}
    for member in members:
        ending = member.name.rpartition(b"/")[2].partition(b".")[2].decode(errors="replace").lower()
        members_of.setdefault(ending, []).append(member)
    if key == AUTO:
        known = sorted({ending.removesuffix(".gz") for ending in members_of if ending in DECODERS})
        if len(known) > 1:
            raise ValueError(
                f"shard {redact(url)}: its members end in {', '.join(known)}: name one of them, --data-key"
            )
        key = known[0] if known else AUTO
    wanted = {key: key.endswith(".gz"), f"{key}.gz": True}
    found = sorted(
        (member.offset, member.size, wanted[ending])
        for ending in wanted.keys() & members_of.keys()
        for member in members_of[ending]
    )
    others = sorted(f".{ending}" for ending in members_of.keys() - wanted.keys())[:5]
    offset_N, size_N, gzipped_N = np.array(found, dtype=np.int64).reshape(-1, 3).T
    return Index(key, offset_N, size_N, gzipped_N.astype(bool), is_ended, tuple(others))


def find_source(entry: str, key: str, cache: Cache, max_sequences: int | None = None) -> Source:
    """The source of a --train-data or --val-data entry: a manifest (.jsonl), or a pattern of tars.

    The tars are opened to count their sequences, up to `max_sequences`. ValueError if there are none; Stopped.
    """
    if is_manifest(entry):
        return read_manifest(entry, cache.patience)
    started = time.monotonic()
    shards, total = [], 0
    for url in expand(entry):
        if cache.patience.stop is not None and cache.patience.stop.is_set():
            raise Stopped(f"{entry}: the count of its sequences was stopped, after {len(shards):,} shards")
        if os.path.isdir(url):
            raise ValueError(
                f"{redact(url)} is a folder: name its tars, e.g. {url.rstrip('/')}/shard_{{00000000..00000007}}.tar"
            )
        reader = open_shard(url, key, cache)
        reader.close()
        shards.append(Shard(url, len(reader)))
        total += len(reader)
        if max_sequences is not None and total >= max_sequences:
            break
    if total == 0:
        raise ValueError(f"{redact(entry)!r} names no shard")
    seconds = time.monotonic() - started
    logger.info(
        "%s: counted %s sequences in %d shards in %.1f s; a manifest avoids it",
        redact(entry),
        f"{total:,}",
        len(shards),
        seconds,
    )
    listing = "".join(f"{posixpath.basename(shard.url)}\t{shard.num_sequences}\n" for shard in shards)
    return Source(entry, tuple(shards), hashlib.sha256(listing.encode()).hexdigest(), listing.encode())
