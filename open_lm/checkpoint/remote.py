"""A run's folder behind a URL (s3:// or whatever fsspec knows, a path too). One process: rank 0's.

Complete or absent there as here: of a checkpoint the companions come first and epoch_N.pt last. Where its
names are taken (epoch_latest.pt, an interval that was cut short), all files are put under NAME.tmp first and
renamed then, so that there is a complete one at any moment.
"""

import heapq
import os
import tempfile
import warnings
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from open_lm.checkpoint.files import (
    LATEST,
    PARTS,
    group,
    paths_of,
    prepare,
    replace,
    saved_averages,
    step_of,
    temporary,
)
from open_lm.data.remote import is_local
from open_lm.data.retry import remote_errors

# Protocols whose PUT is whole or nothing; elsewhere a file is written under another name and renamed.
OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss"}
TEMPORARY = ".tmp"  # whole, and waiting for the rest of its checkpoint
PARTIAL = ".partial"  # being written
CHECKPOINTS = "checkpoints/"


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

    def put_together(self, files: Sequence[tuple[Path, str]]) -> bool:
        """Copies files that make sense only together, the last one last; False if one changed meanwhile.

        Then nothing complete has been replaced: try again.
        """
        before = [signature(local) for local, _ in files]
        there = self.sizes()
        staged = TEMPORARY if any(name in there for _, name in files) else ""
        for i, (local, name) in enumerate(files):
            if i == len(files) - 1 and [signature(local) for local, _ in files] != before:
                return False
            self.put(local, name + staged)
        if [signature(local) for local, _ in files] != before:
            return False
        if staged:
            for _, name in files:
                with self._at(name) as (file_system, path):
                    file_system.mv(path + staged, path)
        return True

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
        """Removes all of a checkpoint's files, epoch_N.pt first, and what was left of their copying."""
        names = {}
        for name in self.sizes():
            if name.startswith(CHECKPOINTS):
                bare = name.removeprefix(CHECKPOINTS).removesuffix(PARTIAL).removesuffix(TEMPORARY)
                names.setdefault(bare, []).append(name)
        for bare in reversed(group(names).get(label, [])):
            for name in names[bare]:
                self.delete(name)

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


def newest(remote: RemoteFolder, folder: Path, than: int) -> Path | None:
    """Fetches the complete checkpoint of the highest step above `than` into the run's `folder`; its epoch file.

    None: there is none. What `bring` says holds here too.
    """
    there = remote.sizes()
    labels = _labels(there).keys()
    numbers = sorted(labels - {LATEST}, key=int, reverse=True)
    candidates = (numbers, labels & {LATEST})
    steps = (_steps(remote, there, each) for each in candidates)
    for step, label in heapq.merge(*steps, key=lambda pair: pair[0], reverse=True):
        if step <= than:
            return None
        if path := bring(remote, folder, label):
            return path
    return None


def bring(remote: RemoteFolder, folder: Path, label: str) -> Path | None:
    """Fetches all files of a checkpoint into the run's `folder`, complete or not at all; its epoch file.

    None, with a warning: it is not complete there. The run's other files (logs, results) come along, so that
    they go on here: those that are missing, and logs that are longer there.
    """
    there = remote.sizes()
    names = sorted(_labels(there).get(label, ()), key=lambda name: name.startswith("epoch_"))  # renamed last
    parts = [name.removesuffix(f"_{label}.pt") for name in names]
    sources = _sources(there, label, parts)
    paths = {part: folder / CHECKPOINTS / f"{part}_{label}.pt" for part in sources}
    prepare(folder / CHECKPOINTS)
    for part, name in sources.items():
        remote.get(name, temporary(paths[part]))
    epoch = folder / CHECKPOINTS / f"epoch_{label}.pt"
    needed = paths_of(epoch, saved_averages(temporary(epoch))).values()
    steps = {path.name: step_of(temporary(path)) for path in needed}
    if len(set(steps.values())) != 1 or None in steps.values():
        for path in paths.values():
            temporary(path).unlink(missing_ok=True)
        warnings.warn(
            f"{remote.url}/{CHECKPOINTS}epoch_{label}.pt is passed over: its files must be of one step, but "
            f"have {steps}",
            stacklevel=3,
        )
        return None
    for name, size in there.items():
        local = folder / name
        missing = not local.exists()
        shorter = local.suffix in (".jsonl", ".log") and not missing and local.stat().st_size < size
        if (missing or shorter) and not name.endswith((TEMPORARY, PARTIAL)) and not group([local.name]):
            _get(remote, name, local)
    replace(paths)
    return paths["epoch"]


def fetch(url: str, folder: Path, *, whole: bool) -> Path:
    """Fetches the checkpoint file at `url` into `folder`; with `whole`, its companions too."""
    parent, _, name = url.rpartition("/")
    remote, names = RemoteFolder(parent), {name}
    if whole:
        label = paths_of(Path(name))["epoch"].stem.removeprefix("epoch_")
        names |= set(group(remote.sizes()).get(label, ()))
    for each in names:
        _get(remote, each, folder / each)
    return folder / name


def _get(remote: RemoteFolder, name: str, local: Path) -> None:
    local.parent.mkdir(parents=True, exist_ok=True)
    remote.get(name, temporary(local))
    os.replace(temporary(local), local)


def _labels(there: Iterable[str]) -> dict[str, set[str]]:
    """{label: names of its files}, finished or waiting to be renamed."""
    inside = (name for name in there if name.startswith(CHECKPOINTS))
    groups = group(name.removeprefix(CHECKPOINTS).removesuffix(TEMPORARY) for name in inside)
    return {label: set(names) for label, names in groups.items()}


def _steps(remote: RemoteFolder, there: Collection[str], labels: Iterable[str]) -> Iterator[tuple[int, str]]:
    """(Step, label) of the checkpoints whose epoch and stats are there; lazily, as each is a download."""
    for label in labels:
        names = _sources(there, label)
        if "epoch" in names and "stats" in names:
            with tempfile.TemporaryDirectory() as folder:
                remote.get(names["stats"], Path(folder, "stats.pt"))
                step = step_of(Path(folder, "stats.pt"))
            if step is not None:
                yield step, label


def _sources(there: Collection[str], label: str, parts: Iterable[str] = PARTS) -> dict[str, str]:
    """{part: its name there}. A waiting epoch_N.pt.tmp says that all of its checkpoint had been put."""
    waiting = f"{CHECKPOINTS}epoch_{label}.pt{TEMPORARY}" in there
    names = {}
    for part in parts:
        name = f"{CHECKPOINTS}{part}_{label}.pt"
        if waiting and name + TEMPORARY in there:
            names[part] = name + TEMPORARY
        elif name in there:
            names[part] = name
    return names
