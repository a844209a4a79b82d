"""Patience with remote files: what is tried again, how long for, and what people are told, without secrets."""

import errno
import logging
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from open_lm.config.redact import redact

logger = logging.getLogger(__name__)
T = TypeVar("T")

HINTS = {
    "Credentials": " (set AWS_PROFILE or AWS_ACCESS_KEY_ID; FSSPEC_S3_ANON=true reads a public bucket)",
}
# Answers that pass although their status is 400; other 4xx do not, 5xx do.
PASSING_CODES = {"RequestTimeout", "Throttling", "ThrottlingException", "TooManyRequests", "SlowDown"}
PASSING_STATUSES = {408, 425, 429}
# Names, as the packages that define them (botocore, aiohttp, http.client) may be missing.
PASSING_CLASSES = {
    "HTTPClientError", "ConnectionError", "ResponseParserError", "CredentialRetrievalError", "HTTPException",
    "FlexibleChecksumError",  # S3's own checksum of an object, which it sends with the whole of it
    "IncompleteReadError",
}  # fmt: skip
LASTING_CLASSES = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
LOCAL_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EMFILE, errno.ENFILE}


@dataclass(frozen=True)
class Patience:
    """How often a remote operation is tried again, and how long a connection may say nothing.

    The wait before the n-th retry is half to all of `first_wait_seconds` 2^(n-1), `longest_wait_seconds` at most.
    """

    retries: int = 6
    timeout_seconds: float = 30
    first_wait_seconds: float = 1
    longest_wait_seconds: float = 60
    stop: threading.Event | None = None
    """Set: nobody wants the result any more."""

    def wait_seconds(self, retry: int) -> float:
        """Drawn anew for each process, so that a host's ranks do not come back all at once."""
        most = min(self.longest_wait_seconds, self.first_wait_seconds * 2 ** (retry - 1))
        return most * random.SystemRandom().uniform(0.5, 1)


class Stopped(OSError):
    """`Patience.stop` was set."""


class LastingError(OSError):
    """One that another attempt would meet again."""


def retry(url: str, action: str, operation: Callable[[], T], patience: Patience, verb: str = "read") -> T:
    """What `operation` returns, called up to 1 + patience.retries times; `action` says what it does, `verb` what
    the URL cannot be where it fails.

    Again: throttling, 5xx, resets, stalls, bodies that end early, names that do not resolve. At once: what is
    not there, not allowed, without credentials, or wrong in itself. Errors (FileNotFoundError, PermissionError,
    ImportError, OSError) name the URL, attempts, seconds and cause, and show no secrets.
    """
    started = time.monotonic()
    for attempt in range(1, patience.retries + 2):
        if patience.stop is not None and patience.stop.is_set():
            raise Stopped(f"{redact(url)}: no longer wanted")
        try:
            return operation()
        except Exception as error:
            seconds = time.monotonic() - started
            if not is_passing(error):
                raise explain(url, error, verb) from None
            if attempt > patience.retries:
                raise OSError(
                    f"{redact(url)}: {action} failed {attempt} times in {seconds:.1f} s (--data-retries "
                    f"{patience.retries}, --data-timeout {patience.timeout_seconds:g}), at last with "
                    f"{describe(error)}"
                ) from None
            wait = patience.wait_seconds(attempt)
            logger.warning(
                "%s: %s failed, attempt %d of %d, after %.1f s; the next in %.1f s: %s",
                redact(url), action, attempt, patience.retries + 1, seconds, wait, describe(error),
            )  # fmt: skip
        (patience.stop or threading.Event()).wait(wait)
    raise AssertionError("unreachable")


def is_passing(error: BaseException) -> bool:
    """Whether the same request may succeed later."""
    causes = list(walk_causes(error))
    for cause in causes:
        status, code = find_status(cause)
        if code in PASSING_CODES or status in PASSING_STATUSES or (status >= 500 and status != 501):
            return True
        if status >= 400:
            return False
    for cause in causes:
        if isinstance(cause, LASTING_CLASSES) or getattr(cause, "errno", None) in LOCAL_ERRNOS:
            return False
    names = {name.__name__ for name in type(error).__mro__}
    if isinstance(error, LastingError | Stopped | ImportError | ValueError | TypeError | NotImplementedError):
        return False
    of_network = type(error).__module__.startswith(("aiohttp.", "urllib3."))
    return isinstance(error, OSError | EOFError | TimeoutError) or of_network or bool(names & PASSING_CLASSES)


def walk_causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what it was raised from: fsspec says FileNotFoundError of a server's 503 too."""
    seen = []
    while error is not None and error not in seen:
        seen.append(error)
        yield error
        error = error.__cause__


def find_status(error: BaseException) -> tuple[int, str]:
    """HTTP status and S3's code of an answer; 0 and '' where it is none. botocore and aiohttp differ."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        return int(status or 0), str(response.get("Error", {}).get("Code", ""))
    status = getattr(error, "status", None)
    return (status if isinstance(status, int) else 0), ""


def explain(url: str, error: BaseException, verb: str = "read") -> Exception:
    """The FileNotFoundError, PermissionError, ImportError or OSError that names the URL."""
    if isinstance(error, Stopped):
        return error
    status = next((status for cause in walk_causes(error) if (status := find_status(cause)[0])), 0)
    if isinstance(error, PermissionError) or status in (401, 403):
        return PermissionError(f"{redact(url)}: cannot be {verb}, access is denied: {describe(error)}")
    if isinstance(error, FileNotFoundError):
        return FileNotFoundError(f"{redact(url)}: no such file: check its name, and what is there")
    if isinstance(error, ImportError):
        package = {"s3": "s3fs", "http": "aiohttp", "https": "aiohttp"}.get(url.partition(":")[0])
        return ImportError(
            f"{redact(url)}: {error} (pip install {package or 'the package that fsspec names'})"
        )
    if isinstance(error, LastingError):
        return LastingError(f"{redact(url)}: {redact(str(error))}")
    hint = next((text for name, text in HINTS.items() if name in type(error).__name__), "")
    explained = OSError(f"{redact(url)}: cannot be {verb}: {describe(error)}{hint}")
    explained.errno = getattr(error, "errno", None)
    return explained


def describe(error: BaseException) -> str:
    """Class and message, without secrets: of a server's own answer, which s3fs keeps as the cause."""
    told = next((cause for cause in walk_causes(error) if find_status(cause)[0]), error)
    return type(told).__name__ + (f": {redact(str(told))}" if str(told) else "")


@contextmanager
def remote_errors(url: str) -> Iterator[None]:
    """Whatever a file system raises becomes a FileNotFoundError, ImportError or OSError naming the URL."""
    try:
        yield
    except Exception as error:
        raise explain(url, error) from None
