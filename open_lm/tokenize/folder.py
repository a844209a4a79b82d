"""A folder, local or behind a URL (whatever fsspec knows), whose files are complete or absent."""

import os
import posixpath
import secrets
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from open_lm.data.remote import find_file_system, is_local
from open_lm.data.retry import Patience, retry

T = TypeVar("T")

# Protocols whose PUT is whole or nothing; elsewhere a file is written under another name and renamed.
OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss"}
PARTIAL = ".partial"


class Folder:
    """Files by their names relative to `url`. Errors are OSError or ImportError and name the URL."""

    def __init__(self, url: str, patience: Patience = Patience()) -> None:  # noqa: B008, it is frozen
        self.url = url.rstrip("/") or "/"
        self.path = Path(self.url.removeprefix("file://")) if is_local(url) else None
        self.patience = patience

    def _remote(self, name: str, action: str, operation: Callable[[Any, str], T]) -> T:
        """What `operation` returns of the file system and the file's (or folder's) path in it: tried again."""

        def attempt() -> T:
            file_system, root = find_file_system(self.url, self.patience)
            return operation(file_system, f"{root.rstrip('/')}/{name}".rstrip("/"))

        return retry(self.locate(name) if name else self.url, action, attempt, self.patience)

    def locate(self, name: str) -> str:
        """URL of a file."""
        return posixpath.join(self.url, name)

    def read(self, name: str, start: int = 0, size: int | None = None) -> bytes:
        """Bytes of a file from `start` on, `size` of them or all. OSError if there are fewer."""
        if self.path is not None:
            with open(self.path / name, "rb") as file:
                file.seek(start)
                data = file.read(-1 if size is None else size)
            return self._check(name, data, start, size)

        def fetch(file_system: Any, path: str) -> bytes:
            end = None if size is None else start + size
            data = file_system.cat_file(path, start=start, end=end) if size != 0 else b""
            return self._check(name, data, start, size)

        return self._remote(name, "reading it", fetch)

    def _check(self, name: str, data: bytes, start: int, size: int | None) -> bytes:
        if size is not None and len(data) != size:
            raise OSError(f"{self.locate(name)}: {len(data):,} bytes at {start:,} instead of {size:,}")
        return data

    def write(self, name: str, data: bytes | memoryview) -> None:
        """Writes a file that appears whole or not at all. Local: its folder must exist."""
        ending = f".{secrets.token_hex(4)}{PARTIAL}"
        partial = name + ending
        if self.path is not None:
            try:
                (self.path / partial).write_bytes(data)
                os.replace(self.path / partial, self.path / name)
            except OSError as error:  # of a full disk the system does not say which file met it
                raise OSError(error.errno, error.strerror, str(self.path / name)) from None
            finally:
                (self.path / partial).unlink(missing_ok=True)
            return

        def put(file_system: Any, path: str) -> None:
            protocol = file_system.protocol
            if {protocol} & OBJECT_STORES if isinstance(protocol, str) else set(protocol) & OBJECT_STORES:
                file_system.pipe_file(path, bytes(data))
            else:
                file_system.makedirs(posixpath.dirname(path), exist_ok=True)
                file_system.pipe_file(f"{path}{ending}", bytes(data))
                file_system.mv(f"{path}{ending}", path)

        self._remote(name, "writing it", put)

    def make(self) -> None:
        """Creates the folder where file systems need that."""
        if self.path is not None:
            self.path.mkdir(parents=True, exist_ok=True)

    def names(self) -> set[str]:
        """Files here and below, relative; none if there is no such folder."""
        return set(self.sizes())

    def sizes(self) -> dict[str, int]:
        """As `names`, with their bytes."""
        if self.path is not None:
            files = (p for p in self.path.rglob("*") if p.is_file())
            return {p.relative_to(self.path).as_posix(): p.stat().st_size for p in files}

        def find(file_system: Any, root: str) -> dict[str, int]:
            file_system.invalidate_cache()
            files = file_system.find(root, detail=True)
            return {
                posixpath.relpath(path, root): int(about.get("size") or 0) for path, about in files.items()
            }

        found = self._remote("", "listing it", find)
        found.pop(".", None)  # what a console creates to show an empty folder
        return found

    def is_file(self) -> bool:
        """Whether the URL is a remote file's own."""
        return self._remote("", "looking it up", lambda file_system, path: file_system.isfile(path))

    def delete(self, names: set[str]) -> None:
        """Removes these files."""
        if self.path is not None:
            for name in names:
                (self.path / name).unlink(missing_ok=True)
            return

        def remove(file_system: Any, root: str) -> None:
            file_system.invalidate_cache()
            file_system.rm([f"{root}/{name}" for name in sorted(names)])

        if names:
            self._remote("", "removing files", remove)

    def remove_empty(self) -> None:
        """Removes a local folder if nothing is in it."""
        if self.path is not None:
            with suppress(OSError):
                self.path.rmdir()


@lru_cache(8)
def open_folder(url: str, patience: Patience) -> Folder:
    """The folder, once per process."""
    return Folder(url, patience)
