"""Checkpoints small enough to make and compare by the dozen: real files, a step and a byte or two of weights."""

from collections.abc import Callable
from pathlib import Path

import pytest

from open_lm.checkpoint import files
from open_lm.checkpoint.remote import RemoteFolder


class KilledError(BaseException):
    """As a kill: nothing that catches Exception sees it."""


@pytest.fixture
def write_checkpoint() -> Callable:
    """`write_checkpoint(run_folder, label, step)`: as `checkpoint.save` leaves it on disk."""

    def write(folder: Path, label: str, step: int, parts=(*files.PARTS[:2], "ema_0.9_1", "epoch")) -> None:
        paths = {part: folder / f"checkpoints/{part}_{label}.pt" for part in parts}
        averages = [part for part in parts if part not in files.PARTS]
        files.prepare(folder / "checkpoints")
        for path in paths.values():
            files.write(files.temporary(path), {"step": step, "averagers": averages})
        files.replace(paths)

    return write


@pytest.fixture(params=["path", "file", "s3"])
def remote(request, tmp_path) -> RemoteFolder:
    """An empty place for a run, of each kind."""
    if request.param == "s3":
        request.getfixturevalue("bucket")
        return RemoteFolder("s3://bucket/some/where/run")
    prefix = "file://" if request.param == "file" else ""
    return RemoteFolder(f"{prefix}{tmp_path}/remote/run")


@pytest.fixture
def kill_at() -> Callable:
    """`kill_at(count, (object, name), …)`: the count-th call of any of these dies, half done if it is a copy.

    Returns the list of calls made.
    """
    patch = pytest.MonkeyPatch()

    def install(count: int, *functions: tuple) -> list[str]:
        calls: list[str] = []

        def wrap(owner, name):
            real = getattr(owner, name)

            def call(*arguments, **options):
                calls.append(name)
                if len(calls) > count:
                    if name == "put_file" and "://" not in arguments[1] and arguments[1].startswith("/"):
                        half = Path(arguments[0]).read_bytes()[:100]
                        Path(arguments[1]).write_bytes(half)
                    raise KilledError
                return real(*arguments, **options)

            patch.setattr(owner, name, call)

        for owner, name in functions:
            wrap(owner, name)
        return calls

    install.undo = patch.undo
    install.error = KilledError
    yield install
    patch.undo()
