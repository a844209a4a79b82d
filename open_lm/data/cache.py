"""A folder of fetched files with a size limit, shared by all processes of a user on this host.

A name stands for one content, for ever, so a file in the cache is never checked again. Locks are flock's: the
system releases those of a dead process, and its partial files, which it had locked too, are then removed.
"""

import errno
import fcntl
import functools
import getpass
import logging
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from io import BufferedRandom
from pathlib import Path

from open_lm.config.data import DataConfig
from open_lm.config.redact import redact
from open_lm.data.retry import Patience

logger = logging.getLogger(__name__)

GIB = 2**30
FULL = (errno.ENOSPC, errno.EDQUOT)


def default_folder() -> Path:
    """TMPDIR/open_lm-shards-USER."""
    return Path(tempfile.gettempdir(), f"open_lm-shards-{getpass.getuser()}")


@functools.cache
def run_identity() -> str:
    """The same for the ranks that one torchrun started on this host, different for every other run.

    What a `pipe:` command printed has no version to compare, so it is shared within a run and never beyond.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        port = os.environ.get("MASTER_PORT", "")
        return f"{os.environ['TORCHELASTIC_RUN_ID']}/{port}/{os.getppid()}"
    return secrets.token_hex(16)


@dataclass(frozen=True)
class Cache:
    """Where fetched files lie, and the patience in fetching them.

    Above `limit_bytes` (or half the free space) the least recently opened go; 0 keeps only what is open.
    """

    folder: Path = field(default_factory=default_folder)
    limit_bytes: int = 8 * GIB
    run: str = field(default_factory=run_identity)
    patience: Patience = field(default_factory=Patience)


def find_cache(config: DataConfig) -> Cache:
    """The cache that the flags describe."""
    folder = default_folder() if config.data_cache is None else Path(config.data_cache).expanduser()
    patience = Patience(config.data_retries, config.data_timeout)
    return Cache(folder, int(config.data_cache_gib * GIB), patience=patience)


def path_in(cache: Cache, name: str) -> Path:
    """Where the file of this name is, if it is there."""
    return cache.folder / f"{name}.tar"


def open_cached(path: Path) -> int:
    """A descriptor of a cached file, which thereby is the most recently used. FileNotFoundError."""
    fd = os.open(path, os.O_RDONLY)
    with suppress(FileNotFoundError):  # evicted in this moment: the descriptor is good all the same
        os.utime(path)
    return fd


def open_or_write(
    cache: Cache, name: str, url: str, write: Callable[[BufferedRandom], None], size: int | None = None
) -> int:
    """A descriptor of the file of this name, which `write` writes if it is not there: by one process of several.

    It stays valid when the file is evicted. `size`: its bytes, if known: room is made before. OSError says what
    to do where the disk is full; nothing partial stays, whatever `write` raises.
    """
    path = path_in(cache, name)
    with suppress(FileNotFoundError):
        return open_cached(path)
    with locked(cache.folder / f"{name[:3]}.lock"):
        with suppress(FileNotFoundError):
            return open_cached(path)
        make_room(cache, size or 0)
        try:
            fd = write_file(path, write)
        except OSError as error:
            if error.errno not in FULL:
                raise
            make_room(cache, cache.limit_bytes)
            try:
                fd = write_file(path, write)
            except OSError as again:
                if again.errno not in FULL:
                    raise
                raise OSError(again.errno, describe_full(cache, url, size)) from None
    if cache.limit_bytes:
        make_room(cache, 0, keep=path)
    else:
        path.unlink(missing_ok=True)
    return fd


def write_file(path: Path, write: Callable[[BufferedRandom], None]) -> int:
    """Writes the file beside its place and renames it; returns a descriptor for reading."""
    partial = path.with_name(f"{path.stem}.{secrets.token_hex(4)}.partial")
    try:
        with open(partial, "w+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # says that its process lives
            write(file)
            file.flush()
            fd = os.open(partial, os.O_RDONLY)
            os.replace(partial, path)
            return fd
    finally:
        partial.unlink(missing_ok=True)


def describe_full(cache: Cache, url: str, size: int | None) -> str:
    free = shutil.disk_usage(cache.folder).free / GIB
    needed = "" if size is None else f" of {size / GIB:.2f} GiB"
    return (
        f"{redact(url)}: no space is left in the shard cache {cache.folder} for this file{needed} ({free:.2f} GiB "
        "are free, after eviction of what it held): give --data-cache a folder on a larger disk"
    )


def make_private_folder(folder: Path) -> None:
    """Makes the folder, readable by this user alone; PermissionError if it is another's."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise PermissionError(
            f"the shard cache {folder} belongs to another user: give --data-cache another folder"
        )


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds an exclusive lock on the file; the system releases it if the process dies."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(
                file, fcntl.LOCK_UN
            )  # a child forked meanwhile has the same lock: closing is not enough


def make_room(cache: Cache, needed_bytes: int, keep: Path | None = None) -> None:
    """Removes what dead processes left, then the least recently opened until `needed_bytes` more fit."""
    with locked(cache.folder / "room.lock"):
        entries, total = [], 0
        for path in cache.folder.iterdir():
            with suppress(FileNotFoundError):  # another process renames and unlinks its own
                stat = path.stat()
                if path.suffix == ".partial" and is_abandoned(path):
                    path.unlink()
                    logger.info("removed %s, which a dead process left in the shard cache", path.name)
                elif path.suffix in (".tar", ".partial"):
                    total += stat.st_size
                    if path.suffix == ".tar" and path != keep:
                        entries.append((stat.st_mtime_ns, stat.st_size, path))
        limit = min(cache.limit_bytes, (shutil.disk_usage(cache.folder).free + total) // 2)
        for _, size, path in sorted(entries):
            if total + needed_bytes <= limit:
                break
            path.unlink(missing_ok=True)
            total -= size


def is_abandoned(partial: Path) -> bool:
    """Whether no process writes the file any more."""
    with open(partial, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        # Between its creation and its lock a file is free, too, and empty.
        return os.fstat(file.fileno()).st_size > 0 or time.time() - os.path.getmtime(partial) > 60
