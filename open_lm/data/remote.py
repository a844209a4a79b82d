"""Files behind URLs: local paths, whatever fsspec knows (s3:// through s3fs), and `pipe:COMMAND`.

Remote files are fetched whole into a cache folder which all processes of a user on this host share. S3 is set
up by the usual AWS_* variables, AWS_ENDPOINT_URL among them; FSSPEC_S3_ANON=true reads public buckets without
keys.
"""

import fcntl
import functools
import getpass
import hashlib
import os
import secrets
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

PIPE = "pipe:"
CACHE_BYTES = 8 * 2**30
ABANDONED_SECONDS = 3600  # a partial download that nobody has written to for so long has lost its process


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
    """Where fetched files lie. Above `limit_bytes` (or half the free space) the least recently opened go."""

    folder: Path = field(default_factory=default_folder)
    limit_bytes: int = CACHE_BYTES
    run: str = field(default_factory=run_identity)


def is_local(url: str) -> bool:
    """Whether the URL is a path of this machine."""
    return url.startswith("file://") or not (url.startswith(PIPE) or "://" in url)


def read_bytes(url: str) -> bytes:
    """The whole content of a small local or remote file. FileNotFoundError or OSError name the URL."""
    if is_local(url):
        with open_local(url) as fd, os.fdopen(os.dup(fd), "rb") as file:
            return file.read()
    with remote_errors(url):
        file_system, path = find_file_system(url)
        return file_system.cat_file(path)


@contextmanager
def open_local(url: str) -> Iterator[int]:
    fd = open_file(url, None)
    try:
        yield fd
    finally:
        os.close(fd)


def open_file(url: str, cache: Cache | None) -> int:
    """A read-only file descriptor of the file, fetched into the cache if it is remote and not there yet.

    It stays valid when the cache evicts the file. Several processes may ask at once: one of them fetches.
    Errors (FileNotFoundError, OSError with the command's stderr or the server's answer) name the URL.
    """
    if is_local(url):
        try:
            return os.open(url.removeprefix("file://"), os.O_RDONLY)
        except FileNotFoundError:
            raise FileNotFoundError(f"{url}: no such file") from None
    assert cache is not None
    make_private_folder(cache.folder)
    write, version = (run_command, cache.run) if url.startswith(PIPE) else find_remote(url)
    name = hashlib.sha256(f"{url}\n{version}".encode()).hexdigest()[:40]
    path = cache.folder / f"{name}.tar"
    with suppress(FileNotFoundError):
        return open_cached(path)
    with locked(cache.folder / f"{name[:2]}.lock"):
        with suppress(FileNotFoundError):
            return open_cached(path)
        partial = cache.folder / f"{name}.{os.getpid()}.partial"
        try:
            write(url, partial)
            fd = os.open(partial, os.O_RDONLY)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    evict(cache)
    return fd


def open_cached(path: Path) -> int:
    fd = os.open(path, os.O_RDONLY)
    with suppress(FileNotFoundError):  # evicted in this moment: the descriptor is good all the same
        os.utime(path)
    return fd


def make_private_folder(folder: Path) -> None:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise PermissionError(
            f"the shard cache {folder} belongs to another user: set TMPDIR to another folder"
        )


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds an exclusive lock on the file; the system releases it if the process dies."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def evict(cache: Cache) -> None:
    """Removes least recently opened files above the cache's limit, and downloads that dead processes left."""
    entries = []
    for path in cache.folder.iterdir():
        with suppress(FileNotFoundError):  # other processes evict too
            stat = path.stat()
            if path.suffix == ".partial" and time.time() - stat.st_mtime > ABANDONED_SECONDS:
                path.unlink()
            elif path.suffix == ".tar":
                entries.append((stat.st_mtime_ns, stat.st_size, path))
    total = sum(size for _, size, _ in entries)
    limit = min(cache.limit_bytes, (shutil.disk_usage(cache.folder).free + total) // 2)
    for _, size, path in sorted(entries)[:-1]:
        if total <= limit:
            break
        path.unlink(missing_ok=True)
        total -= size


def run_command(url: str, path: Path) -> None:
    """Writes what `pipe:COMMAND` prints to `path`."""
    command = url.removeprefix(PIPE)
    with open(path, "wb") as file:
        done = subprocess.run(
            command, shell=True, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.PIPE
        )
    if done.returncode != 0:
        stderr = done.stderr.decode(errors="replace").strip()[-2000:]
        raise OSError(f"{url}: the command ended with exit status {done.returncode}: {stderr}")


def find_remote(url: str):
    """How to fetch the file, and what identifies its present version."""
    with remote_errors(url):
        file_system, path = find_file_system(url)
        information = file_system.info(path)
    size = information.get("size")
    version = [str(information.get(name)) for name in ("ETag", "LastModified", "mtime", "size")]

    def download(url: str, partial: Path) -> None:
        with remote_errors(url):
            file_system.get_file(path, str(partial))
        fetched = partial.stat().st_size
        if size is not None and fetched != size:
            raise OSError(f"{url}: {fetched:,} bytes came of {size:,}")

    return download, "\n".join(version)


def find_file_system(url: str):
    import fsspec.core

    return fsspec.core.url_to_fs(url)


@contextmanager
def remote_errors(url: str) -> Iterator[None]:
    """Whatever a file system raises becomes a FileNotFoundError, ImportError or OSError naming the URL."""
    try:
        yield
    except FileNotFoundError:
        raise FileNotFoundError(f"{url}: no such file") from None
    except ImportError as error:
        package = "s3fs" if url.startswith("s3://") else "the package that fsspec names"
        raise ImportError(f"{url}: {error} (pip install {package})") from error
    except Exception as error:
        hint = ""
        if "Credentials" in type(error).__name__:
            hint = " (set AWS_PROFILE or AWS_ACCESS_KEY_ID; FSSPEC_S3_ANON=true reads a public bucket)"
        raise OSError(f"{url}: cannot be read: {type(error).__name__}: {error}{hint}") from error
