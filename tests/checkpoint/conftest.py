"""Checkpoints small enough to make and compare by the dozen: real files, a step and a byte or two of weights."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from open_lm.checkpoint import files, state
from open_lm.checkpoint.remote import RemoteFolder


class KilledError(BaseException):
    """As a kill: nothing that catches Exception sees it."""


@pytest.fixture
def write_checkpoint() -> Callable:
    """`write_checkpoint(run_folder, label, step)`: as a save leaves it on disk; between intervals with label None.

    `value` of the weights is the step's else. `kept` is how many states between intervals stay.
    """

    def write(
        folder: Path, label: str | None, step: int, *others: str, kept: int = 2, value: float | None = None
    ) -> None:
        checkpoints = folder / "checkpoints"
        files.prepare(checkpoints)
        target = state.state_folder(checkpoints, step)
        waiting = state.temporary_folder(target)
        waiting.mkdir()
        weights = torch.full((2, 3), float(step) if value is None else value)
        tensors = {"model/w": weights, "average/ema_0.9_1/w": weights}
        parts = {key: ((0,) * tensor.ndim, tensor) for key, tensor in tensors.items()}
        content = {
            "epoch": 1, "name": "run", "step": step, "tokens": step, "labels": [label, *others] if label else [],
            "model_config": {}, "weights": {"w": "w"}, "averages": {"ema_0.9_1": {"steps": step}},
            "state": {}, "world_size": 1,
        }  # fmt: skip
        name = "shard-00001-model-00001-of-00001.safetensors"
        entries = {name: state.write_shard(waiting / name, parts)}
        entries[state.CONTENT] = state.write_json(waiting / state.CONTENT, content)
        state.write_json(waiting / state.DIGESTS, {"files": entries})
        state.commit(target)
        if label:
            epoch = files.consolidate(target, label)
            for other in others:
                files.alias(epoch, other)
        files.tidy(checkpoints, step, kept)

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
