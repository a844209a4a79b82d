"""Files behind URLs: local paths, s3:// (read by `s3`, else through s3fs), whatever fsspec knows, `pipe:COMMAND`.

Remote files are fetched whole, in parts, into the cache: a sequence may be anywhere in a shard, and with 64
shards read at a time each is read for long. Until one is there, `ranges` reads single rows. S3 is set up by the
usual AWS_* variables, AWS_ENDPOINT_URL among them; FSSPEC_S3_ANON=true reads public buckets without keys.
"""

import functools
import glob
import hashlib
import logging
import os
import re
import select
import signal
import subprocess
import tempfile
from contextlib import suppress
from io import BufferedRandom
from typing import Any, NamedTuple

from open_lm.config.redact import redact
from open_lm.data import s3
from open_lm.data.cache import Cache, Expected, make_private_folder, open_or_write
from open_lm.data.patterns import expand, hint
from open_lm.data.retry import LastingError, Patience, retry

__all__ = ["PIPE", "Cache", "Patience", "is_local", "open_file", "read_bytes"]

logger = logging.getLogger(__name__)

PIPE = "pipe:"
PART_BYTES = 16 * 2**20
REFETCHES = 2  # of a whole file that came, and is not what it should be
REMEDY = ": put the right file there, or write the manifest anew (python -m open_lm.data.index)"
# What the commands of cloud stores and curl print about what will not change; 126 and 127 are the shell's.
LASTING_OUTPUT = re.compile(
    r"\((401|403|404)\)|error: 40[134]\b|AccessDenied|Forbidden|NoSuch(Key|Bucket)|Unable to locate credentials"
    r"|No such file|Permission denied|No URLs matched"
)
LASTING_CODES = (126, 127)


class WrongFile(OSError):
    """What the server has is not what the manifest says, however often it is fetched."""


def is_local(url: str) -> bool:
    """Whether the URL is a path of this machine."""
    return url.startswith("file://") or not (url.startswith(PIPE) or "://" in url)


def read_bytes(url: str, patience: Patience | None = None) -> bytes:
    """The whole content of a small local or remote file, or what a command prints. FileNotFoundError or OSError
    name the URL."""
    if is_local(url):
        with os.fdopen(open_local(url), "rb") as file:
            return file.read()
    patience = patience or Patience()

    def read() -> bytes:
        if url.startswith(PIPE):
            with tempfile.TemporaryFile() as file:
                run_command(url, file, patience)
                file.seek(0)
                return file.read()
        file_system, path = find_reader(url, patience)
        return file_system.cat_file(path)

    return retry(url, "the command" if url.startswith(PIPE) else "reading it", read, patience)


def open_local(url: str) -> int:
    path = url.removeprefix("file://")
    if os.path.isdir(path):
        raise IsADirectoryError(f"{redact(url)} is a folder, a file is needed")
    try:
        return os.open(path, os.O_RDONLY)
    except PermissionError:
        raise PermissionError(f"{redact(url)}: permission denied: let this user read it") from None
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{redact(url)}: no such file: check its name, and what this host has"
        ) from None


def list_matching(pattern: str, patience: Patience | None = None) -> list[str]:
    """Local paths or URLs of a pattern: `::` and braces, then *, ? and [] where no file has that very name.

    FileNotFoundError where one matches nothing; a name without * is not looked up.
    """
    found: list[str] = []
    for url in expand(pattern):
        path = url.removeprefix("file://")
        if is_local(url) and not glob.has_magic(path) and hint(pattern) and not os.path.exists(path):
            raise FileNotFoundError(f"{redact(url)}: no such file{hint(pattern)}")
        if url.startswith(PIPE) or not glob.has_magic(path) or (is_local(url) and os.path.exists(path)):
            found.append(url)
            continue
        matching = sorted(glob.glob(path, recursive=True) if is_local(url) else list_remote(url, patience))
        if not matching:
            raise FileNotFoundError(f"{redact(url)}: nothing matches{hint(pattern)}")
        found += matching
    return found


def list_remote(pattern: str, patience: Patience | None) -> list[str]:
    patience = patience or Patience()

    def find() -> list[str]:
        file_system, path = find_file_system(pattern, patience)
        file_system.invalidate_cache()
        return [file_system.unstrip_protocol(name) for name in file_system.glob(path)]

    return retry(pattern, "listing it", find, patience)


def open_file(url: str, cache: Cache | None, size: int | None = None, sha256: str | None = None) -> int:
    """A read-only file descriptor of the file, fetched into the cache if it is remote and not there yet.

    It stays valid when the cache evicts the file. Several processes may ask at once: one of them fetches.
    `size` in bytes and `sha256` (hexadecimal), where known, are checked of what is fetched and of what the cache
    holds, not of local files: what differs is fetched again. Errors (FileNotFoundError,
    PermissionError, ImportError, OSError with the command's stderr or the server's answer) name the URL,
    what was expected and what came.
    """
    if is_local(url):
        return open_local(url)
    assert cache is not None
    make_private_folder(cache.folder)
    found = None
    if sha256 is None and not url.startswith(PIPE):
        found = find_remote(url, cache.patience)
    name = name_in_cache(url, cache, sha256, found)
    expected = Expected(size, sha256)
    return open_or_write(
        cache,
        name,
        url,
        lambda file: fetch(url, file, cache.patience, expected, found),
        Expected(size if found is None else found.size, sha256),
    )


def name_in_cache(url: str, cache: Cache, sha256: str | None, found: "Found | None") -> str:
    """What the file is called in the cache: after its digest, else its version, else its run."""
    version = None if found is None else found.version
    identity = sha256 or f"{url}\n{cache.run if version is None else version}"
    return hashlib.sha256(identity.encode()).hexdigest()[:40]


class Found(NamedTuple):
    """A remote file and what identifies its present version."""

    file_system: Any
    path: str
    size: int | None
    version: str
    has_parts: bool


def fetch(
    url: str, file: BufferedRandom, patience: Patience, expected: Expected, found: Found | None
) -> None:
    """Writes the file, and again if it is not what is expected, up to 1 + REFETCHES times. Then OSError."""
    for attempt in range(1, REFETCHES + 2):
        if url.startswith(PIPE):
            retry(url, "the command", lambda: run_command(url, file, patience), patience)
            difference = None
        else:
            found = found or find_remote(url, patience)
            download(url, found, file, patience)
            difference = None if expected.sha256 else find_change(url, found, patience)
            found = None
        difference = difference or find_difference(file, expected)
        if difference is None:
            return
        logger.warning("%s: %s, fetch %d of %d", redact(url), difference, attempt, REFETCHES + 1)
    raise WrongFile(
        f"shard {redact(url)}: {difference}, after {REFETCHES + 1} fetches: the file is damaged, or it was "
        f"replaced and the manifest was not{REMEDY}"
    )


def find_difference(file: BufferedRandom, expected: Expected) -> str | None:
    """What is not as expected, for people."""
    file.flush()
    length = file.seek(0, os.SEEK_END)
    if expected.size is not None and length != expected.size:
        return f"it has {length:,} bytes, the manifest says {expected.size:,}"
    if expected.sha256 is not None:
        file.seek(0)
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        if sha256 != expected.sha256:
            return f"its sha256 is {sha256}, the manifest says {expected.sha256}"
    return None


def find_change(url: str, found: Found, patience: Patience) -> str | None:
    """Whether a file that came in several parts is another one by now."""
    if found.size is None or found.size <= PART_BYTES:
        return None
    after = find_remote(url, patience)
    return None if after.version == found.version else "it was replaced while it was fetched"


def find_remote(url: str, patience: Patience) -> Found:
    """Where the file is, its size and version."""

    def find() -> Found:
        file_system, path = find_reader(url, patience)
        information = file_system.info(path)
        version = [
            str(information.get(name)) for name in ("ETag", "LastModified", "Last-Modified", "mtime", "size")
        ]
        size = information.get("size")
        has_parts = size is not None and information.get("partial", True)
        return Found(file_system, path, size, "\n".join(version), has_parts)

    return retry(url, "looking it up", find, patience)


def download(url: str, found: Found, file: BufferedRandom, patience: Patience) -> None:
    """Writes the remote file, part by part: what came stays when the connection breaks."""
    file.seek(0)
    file.truncate()
    if not found.has_parts:
        retry(url, "fetching it", lambda: download_whole(found, file), patience)
        return
    for start in range(0, found.size or 0, PART_BYTES):
        end = min(start + PART_BYTES, found.size or 0)
        action = f"fetching bytes {start:,} to {end:,} of {found.size:,}"
        file.write(retry(url, action, functools.partial(read_part, found, start, end), patience))


def read_part(found: Found, start: int, end: int) -> bytes:
    data = found.file_system.cat_file(found.path, start=start, end=end)
    if len(data) == found.size:  # the server does not know ranges
        data = data[start:end]
    if len(data) != end - start:
        raise OSError(f"{len(data):,} bytes came of {end - start:,}")
    return data


def download_whole(found: Found, file: BufferedRandom) -> None:
    found.file_system.get_file(found.path, file.name)
    length = os.path.getsize(file.name)
    if found.size is not None and length != found.size:
        raise OSError(f"{length:,} bytes came of {found.size:,}")


def find_reader(url: str, patience: Patience) -> tuple[Any, str]:
    """What reads a file, with `info` and `cat_file` as fsspec's file systems have them, and the path in it."""
    if re.fullmatch(r"(s3a?|gs|gcs)://[^/]*/?", url):
        raise LastingError("no object is named: SCHEME://BUCKET/KEY")
    return s3.find_objects(url, patience.timeout_seconds) or find_file_system(url, patience)


def find_file_system(url: str, patience: Patience | None = None) -> tuple[Any, str]:
    """The file system, of which each process has one, and the path in it. It does not retry by itself.

    S3 and http keep the time limit of `patience`; other file systems have their own.
    """
    import fsspec.config
    import fsspec.core

    seconds = (patience or Patience()).timeout_seconds
    protocol, _, rest = url.partition("://")
    if protocol in ("s3", "s3a") and not rest.strip("/"):
        raise LastingError("no object is named, not even a bucket: SCHEME://BUCKET/KEY")
    options: dict[str, Any] = {}
    if protocol in ("s3", "s3a"):
        configured = fsspec.config.conf.get("s3", {}).get("config_kwargs", {})
        ours = {"connect_timeout": seconds, "read_timeout": seconds, "retries": {"total_max_attempts": 1},
                "max_pool_connections": s3.CONNECTIONS}  # fmt: skip
        options["config_kwargs"] = configured | ours
    elif protocol in ("http", "https"):
        import aiohttp

        limit = aiohttp.ClientTimeout(total=None, sock_connect=seconds, sock_read=seconds)
        options["client_kwargs"] = {"timeout": limit}
    if "::" in url and not is_chain(url):  # fsspec takes all for chains
        file_system, _ = fsspec.core.url_to_fs(url.partition("::")[0], **options)
        path = file_system._strip_protocol(url)
    else:
        file_system, path = fsspec.core.url_to_fs(url, **options)
    if hasattr(file_system, "retries"):  # s3fs's own attempts, which would multiply ours
        file_system.retries = 1
    return file_system, path


def is_chain(url: str) -> bool:
    """Whether `::` joins fsspec's file systems (simplecache::s3://…, zip://a.tar::s3://…) and is not a part of an
    object's name (s3://bucket/a::b.tar)."""
    first, _, rest = url.partition("::")
    return "://" not in first or "://" in rest


def run_command(url: str, file: BufferedRandom, patience: Patience) -> None:
    """Writes what `pipe:COMMAND` prints to the file.

    OSError with its exit status and stderr; TimeoutError when it has printed nothing for the time limit.
    """
    file.seek(0)
    file.truncate()
    with (
        tempfile.TemporaryFile() as messages,
        subprocess.Popen(
            url.removeprefix(PIPE),
            shell=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=messages,
            start_new_session=True,
        ) as process,
    ):
        assert process.stdout is not None
        try:
            while True:
                if not select.select([process.stdout], [], [], patience.timeout_seconds)[0]:
                    raise TimeoutError(f"the command printed nothing for {patience.timeout_seconds:g} s")
                data = os.read(process.stdout.fileno(), 2**20)
                if not data:
                    break
                file.write(data)
            code = process.wait(patience.timeout_seconds)
        except subprocess.TimeoutExpired:
            raise TimeoutError("the command closed its output and does not end") from None
        finally:
            if process.poll() is None:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        messages.seek(0)
        stderr = messages.read().decode(errors="replace").strip()[-2000:]
    if code != 0:
        lasting = code in LASTING_CODES or LASTING_OUTPUT.search(stderr)
        kind = LastingError if lasting else OSError
        raise kind(f"the command ended with exit status {code}: {stderr}")
