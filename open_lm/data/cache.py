"""A folder of fetched files with a size limit, shared by all processes of a user on this host.

A name stands for one content, for ever. The proof beside a file says of which bytes it was verified, when; where
that is not this file any more, or of before the host was started, it is verified anew, and fetched if it is
damaged. Locks are flock's: the system releases those of a dead process, and its partial files, which it had locked
too, are then removed.
"""

import errno
import fcntl
import functools
import getpass
import hashlib
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
from typing import NamedTuple

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


def check_folder(config: DataConfig) -> None:
    """Makes the folder of --data-cache, if it is given. ValueError: no file can be written there."""
    if config.data_cache is None:
        return
    folder = find_cache(config).folder
    try:
        make_private_folder(folder)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(
            f"--data-cache {config.data_cache}: no file can be written there ({error.strerror or error}): name a "
            "folder of a disk of this host"
        ) from None


def path_in(cache: Cache, name: str) -> Path:
    """Where the file of this name is, if it is there."""
    return cache.folder / f"{name}.tar"


class Expected(NamedTuple):
    """What is known of a file, by its manifest or its server."""

    size: int | None = None
    sha256: str | None = None


class DamagedFile(ValueError):
    """A file in the cache is not what was written there; says how."""


class Unproved(Exception):
    """A file in the cache has to be verified."""


def open_cached(path: Path, expected: Expected, verify: bool) -> int:
    """A descriptor of a cached file, which thereby is the most recently used. FileNotFoundError; DamagedFile;
    without `verify` also Unproved, instead of reading all of it."""
    try:
        fd = os.open(path, os.O_RDONLY)
    except PermissionError as error:
        raise DamagedFile(f"it cannot be read: {error.strerror}") from None
    try:
        stat = os.fstat(fd)
        proof = read_proof(path)
        if proof != make_proof(stat):
            if not verify:
                raise Unproved
            check_cached(fd, stat, proof, expected)
            prove(path, stat)
        elif expected.size not in (None, stat.st_size):
            raise DamagedFile(f"it has {stat.st_size:,} bytes, {expected.size:,} are expected")
        os.utime(fd, ns=(time.time_ns(), stat.st_mtime_ns))  # of access: that of change is in the proof
    except BaseException:
        os.close(fd)
        raise
    return fd


def check_cached(fd: int, stat: os.stat_result, proof: "Proof | None", expected: Expected) -> None:
    """DamagedFile unless the file is what is expected, as far as that is known."""
    size = expected.size if proof is None else proof.size
    if size not in (None, stat.st_size):
        raise DamagedFile(f"it has {stat.st_size:,} bytes, {size:,} were written")
    if expected.size not in (None, stat.st_size):
        raise DamagedFile(f"it has {stat.st_size:,} bytes, {expected.size:,} are expected")
    if expected.sha256 is not None:
        try:
            with os.fdopen(os.dup(fd), "rb") as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise DamagedFile(str(error)) from None
        if sha256 != expected.sha256:
            raise DamagedFile(f"its sha256 is {sha256}, the manifest says {expected.sha256}")
    elif proof is not None and proof.mtime_ns != stat.st_mtime_ns:
        raise DamagedFile("it was changed after it was written")


class Proof(NamedTuple):
    """Of which file a name's content was verified: its bytes, its time of change, and since which start of the
    host, as a crash may lose what was written before."""

    size: int
    mtime_ns: int
    boot: str


def make_proof(stat: os.stat_result) -> Proof:
    return Proof(stat.st_size, stat.st_mtime_ns, boot_identity())


@functools.cache
def boot_identity() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return "unknown"


def proof_of(path: Path) -> Path:
    return path.with_suffix(".proof")


def read_proof(path: Path) -> Proof | None:
    """None where there is none, or no whole one."""
    try:
        size, mtime_ns, boot = proof_of(path).read_text().split()
        return Proof(int(size), int(mtime_ns), boot)
    except (OSError, ValueError):
        return None


def prove(path: Path, stat: os.stat_result) -> None:
    proof_of(path).write_text(" ".join(map(str, make_proof(stat))))


def remove(path: Path) -> None:
    """A cached file and its proof."""
    path.unlink(missing_ok=True)
    proof_of(path).unlink(missing_ok=True)


def remove_open(cache: Cache, fd: int) -> None:
    """Removes the file that is open as `fd`, unless another process did, and may have fetched it anew."""
    opened = os.fstat(fd)
    for path in cache.folder.glob("*.tar"):
        with suppress(FileNotFoundError):
            if os.path.samestat(path.stat(), opened):
                remove(path)


def open_or_write(
    cache: Cache,
    name: str,
    url: str,
    write: Callable[[BufferedRandom], None],
    expected: Expected = Expected(),  # noqa: B008
) -> int:
    """A descriptor of the file of this name, which `write` writes if it is not there, or not as it was written or
    is `expected`: by one process of several.

    It stays valid when the file is evicted. Room for the size that is expected is made before. OSError says what
    to do where the disk is full; nothing partial stays, whatever `write` raises.
    """
    path, size = path_in(cache, name), expected.size
    with suppress(FileNotFoundError, Unproved, DamagedFile):
        return open_cached(path, expected, verify=False)
    with locked(cache.folder / f"{name[:3]}.lock"):
        try:
            return open_cached(path, expected, verify=True)
        except FileNotFoundError:
            pass
        except DamagedFile as error:
            logger.warning("%s: its copy in the shard cache, %s, is damaged: %s; it is fetched again",
                           redact(url), path, error)  # fmt: skip
            remove(path)
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
        remove(path)
    return fd


def write_file(path: Path, write: Callable[[BufferedRandom], None]) -> int:
    """Writes the file beside its place and renames it; returns a descriptor for reading."""
    partial = path.with_name(f"{path.stem}.{secrets.token_hex(4)}.partial")
    try:
        with open(partial, "w+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # says that its process lives
            write(file)
            file.flush()
            os.fsync(file.fileno())  # a name must not outlive, in a crash of the host, what it stands for
            prove(path, os.fstat(file.fileno()))
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
                        entries.append((stat.st_atime_ns, stat.st_size, path))
        limit = min(cache.limit_bytes, (shutil.disk_usage(cache.folder).free + total) // 2)
        for _, size, path in sorted(entries):
            if total + needed_bytes <= limit:
                break
            remove(path)
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
