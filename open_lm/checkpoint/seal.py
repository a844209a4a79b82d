"""A file of weights, written and read. A digest ends it: the sha256 of all before it, as the comment of its zip.

It goes where the file goes (another folder, another name, a URL), and takes its place together with it. torch,
open_lm and zip's tools read such files as they read others. A file of torch's own has none, and loads as it is.
"""

import errno
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch

MARK = b"open_lm sha256 "
LENGTH = len(MARK) + 64  # of the comment: the digest in hexadecimal
NO_COMMENT = b"\0\0"  # how torch.save ends a file: the comment's length
_whole: set[tuple] = set()  # what this process has read already, as it was


class Sealed:
    """What torch.save writes to in place of a file."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._digest, self._held = file, hashlib.sha256(), b""

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        if len(view) < len(NO_COMMENT):
            view = memoryview(self._held + bytes(view))
            self._held = b""
        self._put(self._held)
        end = max(len(view) - len(NO_COMMENT), 0)
        self._put(view[:end])
        self._held = bytes(view[end:])
        return len(data)

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        """Adds the digest; the file itself stays open."""
        if self._held != NO_COMMENT:
            raise RuntimeError("torch.save has written another format: its end is not that of a zip")
        self._put(LENGTH.to_bytes(2, "little") + MARK)
        self._file.write(self._digest.hexdigest().encode())

    def _put(self, data: Any) -> None:
        if len(data):
            self._file.write(data)
            self._digest.update(data)


def digest_in(ending: bytes) -> str | None:
    """The digest that a file's last LENGTH bytes hold; None if they hold none."""
    return ending[len(MARK) :].decode("ascii", "replace") if ending.startswith(MARK) else None


def read_digest(path: Path) -> str | None:
    """The digest in a file; None if it holds none."""
    with open(path, "rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - LENGTH))
        return digest_in(file.read())


def damage(path: Path) -> str | None:
    """How a sealed file is not what was written; None if it is, or if there is no such file, or no seal.

    Reads every byte, once per process as long as the file stays as it is.
    """
    if not path.is_file() or (expected := read_digest(path)) is None:
        return None
    status = path.stat()
    known = (str(path), status.st_size, status.st_mtime_ns, status.st_ino)
    if known in _whole:
        return None
    digest, left = hashlib.sha256(), status.st_size - 64
    with open(path, "rb") as file:
        while left > 0 and (block := file.read(min(left, 1 << 22))):
            digest.update(block)
            left -= len(block)
    if digest.hexdigest() != expected:
        return f"{path} is damaged: its sha256 is not the one that it was written with"
    _whole.add(known)
    return None


def write(path: Path, content: dict[str, Any]) -> None:
    """To disk (fsync), sealed, and read once: that it cannot be loaded must not be found out when it is needed.

    Raises OSError naming the file.
    """
    try:
        with open(path, "wb") as file:
            sealed: Any = Sealed(file)
            torch.save(content, sealed)
            sealed.close()
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as e:
        cause = next((c for c in _causes(e) if isinstance(c, OSError)), None)
        code = cause.errno if cause and cause.errno else errno.EIO
        reason = cause.strerror if cause else str(e)
        raise OSError(code, f"cannot write {path}: {reason}; earlier checkpoints are unchanged") from e
    read(path)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The exception and those it came from: torch.save hides the OSError of a full disk behind its own."""
    at: BaseException | None = error
    while at is not None:
        yield at
        at = at.__cause__ or at.__context__


def read(path: Path) -> dict[str, Any]:
    """A file's dict, its tensors mapped from disk.

    Raises FileNotFoundError, or ValueError if it is no checkpoint or holds more than plain data.
    """
    if not path.is_file():
        raise FileNotFoundError(errno.ENOENT, f"no checkpoint file {path}")
    with open(path, "rb") as file:
        is_zip = file.read(4) == b"PK\x03\x04"
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception as e:
        raise ValueError(
            f"{path} cannot be loaded: it is damaged, no checkpoint, or holds more than plain values and "
            f"tensors, which is refused because loading that could run code ({type(e).__name__})"
        ) from e
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not the dict of a checkpoint")
    return content


def read_whole(path: Path) -> dict[str, Any]:
    """`read` of a file whose every byte is what was written, where it is sealed (ours are).

    ValueError naming it where it is not.
    """
    if found := damage(path):
        raise ValueError(found)
    return read(path)
