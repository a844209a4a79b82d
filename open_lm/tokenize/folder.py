"""A folder, local or behind a URL (whatever fsspec knows), whose files are complete or absent."""

import os
import posixpath
import secrets
from contextlib import suppress
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from open_lm.data.remote import is_local
from open_lm.data.retry import remote_errors

# Protocols whose PUT is whole or nothing; elsewhere a file is written under another name and renamed.
OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss"}
PARTIAL = ".partial"


class Folder:
    """Files by their names relative to `url`. Errors are OSError or ImportError and name the URL."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/") or "/"
        self.path = Path(self.url.removeprefix("file://")) if is_local(url) else None

    @cached_property
    def _place(self) -> tuple[Any, str]:
        with remote_errors(self.url):
            import fsspec.core

            file_system, root = fsspec.core.url_to_fs(self.url, use_listings_cache=False)
        return file_system, root.rstrip("/")

    def locate(self, name: str) -> str:
        """URL of a file."""
        return posixpath.join(self.url, name)

    def read(self, name: str, start: int = 0, size: int | None = None) -> bytes:
        """Bytes of a file from `start` on, `size` of them or all. OSError if there are fewer."""
        if self.path is not None:
            with open(self.path / name, "rb") as file:
                file.seek(start)
                data = file.read(-1 if size is None else size)
        else:
            file_system, root = self._place
            with remote_errors(self.locate(name)):
                end = None if size is None else start + size
                data = file_system.cat_file(f"{root}/{name}", start=start, end=end) if size != 0 else b""
        if size is not None and len(data) != size:
            raise OSError(f"{self.locate(name)}: {len(data):,} bytes at {start:,} instead of {size:,}")
        return data

    def write(self, name: str, data: bytes | memoryview) -> None:
        """Writes a file that appears whole or not at all. Local: its folder must exist."""
        partial = f"{name}.{secrets.token_hex(4)}{PARTIAL}"
        if self.path is not None:
            try:
                (self.path / partial).write_bytes(data)
                os.replace(self.path / partial, self.path / name)
            except OSError as error:  # of a full disk the system does not say which file met it
                raise OSError(error.errno, error.strerror, str(self.path / name)) from None
            finally:
                (self.path / partial).unlink(missing_ok=True)
            return
        file_system, root = self._place
        protocols = (
            {file_system.protocol} if isinstance(file_system.protocol, str) else set(file_system.protocol)
        )
        with remote_errors(self.locate(name)):
            if protocols & OBJECT_STORES:
                file_system.pipe_file(f"{root}/{name}", bytes(data))
            else:
                file_system.makedirs(posixpath.dirname(f"{root}/{name}"), exist_ok=True)
                file_system.pipe_file(f"{root}/{partial}", bytes(data))
                file_system.mv(f"{root}/{partial}", f"{root}/{name}")

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
        file_system, root = self._place
        with remote_errors(self.url):
            found = {
                posixpath.relpath(path, root): int(information.get("size") or 0)
                for path, information in file_system.find(root, detail=True).items()
            }
        found.pop(".", None)  # what a console creates to show an empty folder
        return found

    def is_file(self) -> bool:
        """Whether the URL is a remote file's own."""
        file_system, root = self._place
        with remote_errors(self.url):
            return file_system.isfile(root)

    def delete(self, names: set[str]) -> None:
        """Removes these files."""
        if self.path is not None:
            for name in names:
                (self.path / name).unlink(missing_ok=True)
            return
        file_system, root = self._place
        with remote_errors(self.url):
            if names:
                file_system.rm([f"{root}/{name}" for name in sorted(names)])

    def remove_empty(self) -> None:
        """Removes a local folder if nothing is in it."""
        if self.path is not None:
            with suppress(OSError):
                self.path.rmdir()


@lru_cache(8)
def open_folder(url: str) -> Folder:
    """The folder, with one connection per process."""
    return Folder(url)
