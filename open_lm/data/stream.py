"""A remote file as a seekable stream: read in parts, each with the retries of shards, nothing kept."""

import functools
import io
import os
import tempfile
from typing import BinaryIO

from open_lm.data.remote import Found, download_whole, find_remote, is_local, read_part
from open_lm.data.retry import Patience, retry

READ_BYTES = 8 * 2**20  # asked for at a time


def open_stream(url: str, patience: Patience | None = None) -> BinaryIO:
    """A file's bytes, seekable, read ahead if it is remote. FileNotFoundError, PermissionError, ImportError or
    OSError name the URL, here and from every read: what may pass was tried again with `patience` by then."""
    if is_local(url):
        return open(url.removeprefix("file://"), "rb")
    patience = patience or Patience()
    found = find_remote(url, patience)
    if found.has_parts:
        return io.BufferedReader(Parts(url, found, patience), READ_BYTES)
    file = tempfile.NamedTemporaryFile()  # a server that tells no size has no parts  # noqa: SIM115
    try:
        retry(url, "fetching it", functools.partial(download_whole, found, file), patience)  # pyright: ignore[reportArgumentType]
    except BaseException:
        file.close()
        raise
    file.seek(0)
    return file  # pyright: ignore[reportReturnType]


class Parts(io.RawIOBase):
    """The bytes of a file that was found; every read is one request, and whole."""

    def __init__(self, url: str, found: Found, patience: Patience) -> None:
        assert found.size is not None
        self.url, self.found, self.size, self.patience = url, found, found.size, patience
        self.position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.size}[whence]
        self.position = max(0, start + offset)
        return self.position

    def readinto(self, buffer) -> int:
        start = self.position
        end = min(start + len(buffer), self.size)
        if end <= start:
            return 0
        action = f"reading bytes {start:,} to {end:,} of {self.size:,}"
        part = functools.partial(read_part, self.found, start, end)
        buffer[: end - start] = retry(self.url, action, part, self.patience)
        self.position = end
        return end - start


class Watched:
    """A stream that remembers the error a read met: a library in between may make another one of it."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream = stream
        self.error: OSError | None = None

    def read(self, size: int = -1) -> bytes:
        try:
            return self.stream.read(size)
        except OSError as error:
            self.error = error
            raise

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self.stream.seek(offset, whence)

    def tell(self) -> int:
        return self.stream.tell()

    def flush(self) -> None:
        """There is nothing to flush."""

    def close(self) -> None:
        self.stream.close()

    @property
    def closed(self) -> bool:
        return self.stream.closed

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def writable(self) -> bool:
        return False
