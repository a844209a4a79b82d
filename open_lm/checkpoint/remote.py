"""A run's folder behind a URL (s3:// or whatever fsspec knows, a path too). One process: rank 0's.

A state is complete or absent there as here: digests.json is put last and removed first. Files of weights follow
their state, each whole or not at all.
"""

import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from open_lm.checkpoint.files import (
    group,
    places,
)
from open_lm.checkpoint.state import CONTENT, DIGESTS
from open_lm.data.remote import is_local
from open_lm.data.retry import remote_errors

# Protocols whose PUT is whole or nothing; elsewhere a file is written under another name and renamed.
OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss"}
TEMPORARY = ".tmp"  # of files here that are being written
PARTIAL = ".partial"  # being written
CHECKPOINTS = "checkpoints/"
STATE = re.compile(r"checkpoints/step_(\d+)/(.+)")


class RemoteFolder:
    """A URL's files by their paths relative to it. Errors are OSError or ImportError and name the URL."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")

    @cached_property
    def _place(self) -> tuple[Any, str]:
        """The file system, this object's own and without a memory of what lies there, and the folder's path."""
        import fsspec.core

        with remote_errors(self.url):
            file_system, root = fsspec.core.url_to_fs(
                self.url, skip_instance_cache=True, use_listings_cache=False
            )
        return file_system, root.rstrip("/")

    @property
    def is_object_store(self) -> bool:
        protocol = self._place[0].protocol
        return bool(
            OBJECT_STORES & {protocol} if isinstance(protocol, str) else OBJECT_STORES & set(protocol)
        )

    @contextmanager
    def _at(self, name: str) -> Iterator[tuple[Any, str]]:
        file_system, root = self._place
        with _failures(f"{self.url}/{name}"):
            yield file_system, f"{root}/{name}"

    def sizes(self) -> dict[str, int]:
        """{path: bytes} of everything in the folder; {} where there is none."""
        with self._at("") as (file_system, path):
            try:
                found = file_system.find(path.rstrip("/"), detail=True)
            except FileNotFoundError:
                return {}
            return {
                str(PurePosixPath(name).relative_to(path)): entry["size"] or 0
                for name, entry in found.items()
            }

    def modified(self, name: str) -> float | None:
        """Seconds since 1970, where the file system says."""
        with self._at(name) as (file_system, path):
            try:
                return file_system.modified(path).timestamp()
            except NotImplementedError:
                return None

    def put(self, local: Path, name: str) -> None:
        """Copies a file there, complete or not at all."""
        with self._at(name) as (file_system, path):
            if self.is_object_store:
                file_system.put_file(str(local), path)
                return
            file_system.makedirs(str(PurePosixPath(path).parent), exist_ok=True)
            file_system.put_file(str(local), path + PARTIAL)
            file_system.mv(path + PARTIAL, path)

    def put_state(self, files: Sequence[tuple[Path, str]]) -> bool:
        """Copies a state's files, of which the last is digests.json; False if one changed meanwhile.

        Then it is absent there: try again.
        """
        before = [signature(local) for local, _ in files]
        *_, (_, complete) = files
        self.delete(complete)
        for local, name in files[:-1]:
            self.put(local, name)
        if None in before or [signature(local) for local, _ in files] != before:
            return False
        self.put(*files[-1])
        return True

    def read(self, name: str, last: int | None = None) -> bytes:
        """A small file's content, or its `last` bytes."""
        with self._at(name) as (file_system, path):
            return file_system.cat_file(path, start=None if last is None else -last)

    def read_json(self, name: str) -> Any:
        """A small file's content; None if it is missing or damaged."""
        with suppress(FileNotFoundError, ValueError):
            return json.loads(self.read(name))
        return None

    def states(self) -> dict[int, list[str]]:
        """{step: its files' names} of the states there that are complete, the newest first."""
        found: dict[int, list[str]] = {}
        for name in self.sizes():
            if match := STATE.fullmatch(name):
                found.setdefault(int(match[1]), []).append(name)
        complete = {s: names for s, names in found.items() if f"{CHECKPOINTS}step_{s}/{DIGESTS}" in names}
        return dict(sorted(complete.items(), reverse=True))

    def delete_state(self, step: int) -> None:
        """Removes a state, or what is left of one."""
        folder = f"{CHECKPOINTS}step_{step}/"
        self.delete(folder + DIGESTS)
        for name in self.sizes():
            if name.startswith(folder):
                self.delete(name)
        if not self.is_object_store:
            with suppress(OSError), self._at(folder.rstrip("/")) as (file_system, path):
                file_system.rmdir(path)

    def get(self, name: str, local: Path) -> None:
        """Fetches a file; it keeps its time, so that it is known to be the same as there."""
        with self._at(name) as (file_system, path):
            size, modified = file_system.info(path).get("size"), self.modified(name)
            file_system.get_file(path, str(local))
            if size is not None and local.stat().st_size != size:
                raise OSError(f"{local.stat().st_size:,} bytes came of {size:,}")
            if modified is not None:
                os.utime(local, (modified, modified))

    def delete(self, name: str) -> None:
        """Removes a file, if it is there."""
        with self._at(name) as (file_system, path):
            try:
                file_system.rm_file(path)
            except FileNotFoundError:
                return

    def delete_checkpoint(self, label: str) -> None:
        """Removes a checkpoint: epoch_N.pt first, its averages, its states, and what was left of their copying."""
        names: dict[str, list[str]] = {}
        for name in self.sizes():
            if name.startswith(CHECKPOINTS):
                bare = name.removeprefix(CHECKPOINTS).removesuffix(PARTIAL)
                names.setdefault(bare, []).append(name)
        for bare in reversed(group(names).get(label, [])):
            for name in names[bare]:
                self.delete(name)
        for step in list(self.states())[1:]:  # never the newest
            content = self.read_json(f"{CHECKPOINTS}step_{step}/{CONTENT}") or {}
            if label in content.get("labels", ()):
                self.delete_state(step)

    def set_aside(self, step: int) -> str | None:
        """Moves what lies after `step` into abandoned_after_step_S, as `files.set_aside` does here; where that is,
        None if there was nothing. A state's digests.json goes first: what is left of a killed move is no state."""
        names = self.sizes()
        found = {n for n in names if (m := STATE.fullmatch(n)) and int(m[1]) > step}
        contents = (self.read_json(name) or {} for name in found if name.endswith(f"/{CONTENT}"))
        labels = {label for content in contents for label in content.get("labels", ())}
        weights = group(n.removeprefix(CHECKPOINTS) for n in names if n.startswith(CHECKPOINTS))
        found |= {CHECKPOINTS + n for label in labels for n in weights.get(label, ())}
        used = {name.split("/")[1] for name in names if name.startswith(CHECKPOINTS)}
        place = next(name for name in places(step) if name not in used)
        for name in sorted(found, key=lambda n: (not n.endswith(DIGESTS), n.endswith(CONTENT), n)):
            target = f"{CHECKPOINTS}{place}/{name.removeprefix(CHECKPOINTS)}"
            with self._at(name) as (file_system, path), self._at(target) as (_, there):
                if not self.is_object_store:
                    file_system.makedirs(str(PurePosixPath(there).parent), exist_ok=True)
                file_system.mv(path, there)
        for number in {int(m[1]) for name in found if (m := STATE.fullmatch(name))}:
            if not self.is_object_store:
                with suppress(OSError), self._at(f"{CHECKPOINTS}step_{number}") as (file_system, path):
                    file_system.rmdir(path)
        return f"{self.url}/{CHECKPOINTS}{place}" if found else None

    def check_writable(self, folder: Path) -> None:
        """Puts an empty file there and removes it. ValueError: that fails, or the URL lies inside `folder`."""
        if is_local(self.url):
            place = Path(self.url.removeprefix("file://")).resolve()
            if place == folder.resolve() or place.is_relative_to(folder.resolve()):
                raise ValueError(f"--remote-sync: {self.url} lies in the run's own folder {folder}")
        probe = ".write_test"
        try:
            with self._at(probe) as (file_system, path):
                if not self.is_object_store:
                    file_system.makedirs(str(PurePosixPath(path).parent), exist_ok=True)
                file_system.pipe_file(path, b"")
            self.delete(probe)
        except OSError as error:
            raise ValueError(f"--remote-sync: {error}") from error


@contextmanager
def _failures(url: str) -> Iterator[None]:
    """Whatever a file system raises becomes an OSError or ImportError that names the URL."""
    try:
        yield
    except ImportError:
        raise
    except FileNotFoundError as error:  # of the server: a bucket may be what is missing
        raise FileNotFoundError(f"{url}: {error or 'no such file'}") from error
    except Exception as error:
        if isinstance(error, OSError) and url in str(error):
            raise
        hint = ""
        if "Credentials" in type(error).__name__:
            hint = " (set AWS_PROFILE or AWS_ACCESS_KEY_ID)"
        raise OSError(f"{url}: {type(error).__name__}: {error}{hint}") from error


def signature(path: Path) -> tuple[int, int, int] | None:
    """What changes when a file does; None if it is not there."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_size, status.st_mtime_ns, status.st_ino
