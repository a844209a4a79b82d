"""step_S/: all of a run's state after step S, complete or absent. One process.

Shards (safetensors: weights, moments, averages, random state), state.json, and digests.json, which is written
last: the size and sha256 of every other file. Written in step_S.tmp and renamed; nothing in it is a pickle.
"""

import concurrent.futures
import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CONTENT, DIGESTS = "state.json", "digests.json"
NAME = re.compile(r"step_(\d+)")
TEMPORARY = ".tmp"
OWED = ".owed"  # in a state whose epoch_N.pt is not made yet; not copied anywhere
SHARD = ".safetensors"
FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")  # of a state: of no other folder, not hidden
LABEL = re.compile(r"[0-9]+|latest")
AVERAGE = re.compile(r"(?:ema|poly)(?:_[0-9.eE+-]+)*")
KINDS = {  # of what state.json holds
    "epoch": int, "name": str, "step": int, "tokens": int | None, "labels": list, "world_size": int,
    "model_config": dict | None, "weights": dict, "averages": dict, "state": dict,
}  # fmt: skip
BLOCK = 1 << 24  # bytes hashed and written at a time, outside of Python's lock
SHARDING_INFO = "DCP_SHARDING_INFO"  # where torch.distributed.checkpoint says which part of a tensor this is
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.int64: "I64", torch.int32: "I32",
    torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_verified: set[tuple] = set()  # what this process has read already, as it was


def state_folder(checkpoints: Path, step: int) -> Path:
    """Where the state after `step` lies."""
    return checkpoints / f"step_{step}"


def temporary_folder(folder: Path) -> Path:
    """Where a state is written before it takes its place."""
    return folder.with_name(folder.name + TEMPORARY)


def is_state(path: Path) -> bool:
    """Whether the path is named as a state is."""
    return NAME.fullmatch(path.name) is not None


def states(checkpoints: Path) -> list[Path]:
    """The states that were written to their end, the newest first."""
    found = (path for path in checkpoints.glob("step_*") if is_state(path) and has_digests(path))
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")), reverse=True)


def finish_renames(checkpoints: Path) -> None:
    """Lets a state that was complete when its save was killed take its place."""
    for waiting in checkpoints.glob(f"step_*{TEMPORARY}"):
        folder = waiting.with_name(waiting.name.removesuffix(TEMPORARY))
        if is_state(folder) and not (folder / DIGESTS).is_file():
            with contextlib.suppress(ValueError):  # not complete
                verify(waiting)
                commit(folder)


def commit(folder: Path) -> None:
    """Renames step_S.tmp, which is complete, to step_S; one that stands there is replaced."""
    waiting = temporary_folder(folder)
    sync_folder(waiting)
    delete(folder)  # killed here: `finish_renames`
    try:
        os.rename(waiting, folder)
    except FileNotFoundError:
        if not (folder / DIGESTS).is_file():  # else another process was quicker
            raise
    sync_folder(folder.parent)


def owe(folder: Path) -> None:
    """Notes that the epoch_N.pt of a state's labels are still to be made: till then it must stay."""
    (folder / OWED).touch()


def settle(folder: Path) -> None:
    """They are made."""
    (folder / OWED).unlink(missing_ok=True)


def is_owed(folder: Path) -> bool:
    """Whether a state's epoch_N.pt are still to be made."""
    return (folder / OWED).exists()


def delete(folder: Path) -> None:
    """Removes a state, digests.json first: what is left of a killed removal is no state."""
    (folder / DIGESTS).unlink(missing_ok=True)
    if folder.exists():
        shutil.rmtree(folder)


def remove_temporaries(checkpoints: Path) -> None:
    """Removes unfinished states, and what is left of removed ones."""
    for path in checkpoints.glob("step_*"):
        unfinished = path.name.endswith(TEMPORARY) and is_state(Path(path.name.removesuffix(TEMPORARY)))
        if unfinished or (is_state(path) and not (path / DIGESTS).exists()):
            shutil.rmtree(path, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Renames and new files survive a power cut once their folder is on disk; some network file systems cannot
    promise it."""
    descriptor = os.open(folder, os.O_RDONLY)
    with contextlib.suppress(OSError):
        os.fsync(descriptor)
    os.close(descriptor)


@contextlib.contextmanager
def naming(path: Path, size: int) -> Iterator[None]:
    """An OSError inside says which file of how many bytes could not be written."""
    try:
        yield
    except OSError as error:
        code = error.errno or errno.EIO
        raise OSError(
            code, f"cannot write {path} ({size:,} bytes): {error.strerror}; earlier checkpoints are unchanged"
        ) from error


def write_json(path: Path, content: Any) -> dict[str, Any]:
    """To disk (fsync); its entry in digests.json. OSError names the file."""
    data = json.dumps(content, indent=1).encode()
    with naming(path, len(data)), open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}


def write_shard(path: Path, parts: Mapping[str, tuple[tuple[int, ...], Tensor]]) -> dict[str, Any]:
    """{key: (offsets in the whole tensor, part on the CPU)} to disk (fsync); its entry in digests.json.

    The format of torch's HuggingFaceStorageWriter(save_distributed=True), which torch's reader reads. It is not
    used itself: it makes two further copies of all bytes, and one of them with Python's lock held, so that a loop
    beside it stands still. OSError names the file.
    """
    # the widest first, so that all are aligned in a file that is mapped
    ordered = sorted(parts.items(), key=lambda item: -item[1][1].element_size())
    info = {key: {"saved_offsets": list(offsets)} for key, (offsets, _) in ordered}
    header: dict[str, Any] = {
        "__metadata__": {SHARDING_INFO: json.dumps(info), "DCP_VERSION": "1.0", "format": "pt"}
    }
    end = 0
    for key, (_, part) in ordered:
        start, end = end, end + part.nbytes
        header[key] = {"dtype": DTYPES[part.dtype], "shape": list(part.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest, size = hashlib.sha256(), 8 + len(text) + end
    with naming(path, size), open(path, "wb", buffering=0) as file:
        for data in (len(text).to_bytes(8, "little"), text, *(_bytes(part) for _, (_, part) in ordered)):
            view = memoryview(data)
            while len(view):
                block = view[:BLOCK]
                written = file.write(block) or 0
                digest.update(block[:written])
                view = view[written:]
        os.fsync(file.fileno())
    return {"sha256": digest.hexdigest(), "bytes": size}


def _bytes(part: Tensor) -> memoryview:
    flat: Any = part.reshape(-1).view(torch.uint8).numpy()
    return memoryview(flat) if part.numel() else memoryview(b"")


def read_json(path: Path) -> Any:
    """ValueError naming the file where it is missing or damaged."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def has_digests(folder: Path) -> bool:
    """Whether a state was written to its end, or its folder does not say."""
    try:
        return (folder / DIGESTS).is_file()
    except OSError:
        return True  # `verify` says what is wrong


def read_digests(folder: Path) -> dict[str, tuple[str, int]]:
    """{name: (sha256, bytes)} of a state's files. ValueError as for `verify`, and where a name leads elsewhere."""
    entries = read_json(path := folder / DIGESTS)
    try:
        found = {name: (entry["sha256"], entry["bytes"]) for name, entry in entries["files"].items()}
    except (AttributeError, KeyError, TypeError):
        raise ValueError(f"{path} is damaged: it lists no files") from None
    for name, (sha256, size) in found.items():
        if not FILE_NAME.fullmatch(name) or not isinstance(sha256, str) or not isinstance(size, int):
            raise ValueError(f"{path} is damaged: {name!r} is no entry of a state's file")
    if CONTENT not in found:
        raise ValueError(f"{path} is damaged: it does not list {CONTENT}")
    return found


def check_content(path: Path) -> dict[str, Any]:
    """state.json. ValueError where it holds something else than every one does."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: it holds a {type(content).__name__}, not a state's facts")
    for key, kind in KINDS.items():
        if not isinstance(content.get(key, ...), kind):
            raise ValueError(f"{path} is damaged: its {key!r} is missing or of another kind")
    averages = content["averages"]
    names = [
        (LABEL, content["labels"]),
        (AVERAGE, averages),
        (re.compile(r"(?s).*"), content["weights"].values()),
    ]
    for pattern, values in names:
        for value in values:
            if not isinstance(value, str) or not pattern.fullmatch(value):
                raise ValueError(f"{path} is damaged: {value!r} is no name of what it holds")
    for name, facts in averages.items():
        if not isinstance(facts, dict) or not isinstance(facts.get("steps"), int):
            raise ValueError(f"{path} is damaged: of the average {name} it does not say its steps")
    return content


def read_content(folder: Path) -> dict[str, Any]:
    """state.json of a state; ValueError as for `verify`."""
    verify(folder)
    return read_json(folder / CONTENT)


def verify(folder: Path) -> None:
    """Raises ValueError naming the first file that is missing, cut short, not what was written, or one of tensors
    that is not this state's; or where the folder is named after another step.

    Reads every byte, once per process as long as the files stay as they are.
    """
    if not has_digests(folder):
        raise ValueError(f"{folder} is no complete state: {DIGESTS} is missing")
    digests = read_digests(folder)
    with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        for error in threads.map(lambda item: _damage(folder / item[0], *item[1]), digests.items()):
            if error:
                raise ValueError(error)
    # torch's reader takes every such file, and of two parts that overlap the later
    if others := sorted({path.name for path in folder.glob(f"*{SHARD}")} - digests.keys()):
        raise ValueError(
            f"{folder / others[0]} is not a file of this state ({DIGESTS} does not list it): remove it"
        )
    content, name = check_content(folder / CONTENT), folder.name.removesuffix(TEMPORARY)
    if (match := NAME.fullmatch(name)) and int(match[1]) != content["step"]:
        raise ValueError(f"{folder / CONTENT} is of step {content['step']}: the folder's name is not its own")
    weights = Shards(folder).named("model/")
    if absent := [key for key in content["weights"].values() if key not in weights]:
        raise ValueError(f"{folder} is damaged: no shard holds {absent[0]}")


def _damage(path: Path, sha256: str, size: int) -> str | None:
    """How a file is not what was written; None if it is."""
    try:
        status = path.stat()
        if status.st_size != size:
            return f"{path} is damaged: it has {status.st_size:,} bytes of {size:,}"
        known = (str(path), sha256, size, status.st_mtime_ns, status.st_ino)
        if known not in _verified:
            with open(path, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                    return f"{path} is damaged: its sha256 is not the one in {DIGESTS}"
            _verified.add(known)
    except FileNotFoundError:
        return f"{path} is missing"
    except OSError as error:
        return f"{path} cannot be read: {error.strerror}"
    return None


class Shards:
    """The tensors of a state by key, whole, whatever the number of files that they lie in; mapped, not read.

    ValueError naming the file that holds no tensors, or not the parts that it says.
    """

    def __init__(self, folder: Path) -> None:
        from safetensors import SafetensorError, safe_open

        self._parts: dict[str, list[tuple[Any, list[int], list[int]]]] = {}
        self.dtypes: dict[str, str] = {}
        for path in sorted(folder / name for name in read_digests(folder) if name.endswith(SHARD)):
            try:
                file = safe_open(str(path), framework="pt")
                info = json.loads((file.metadata() or {})[SHARDING_INFO])
                for key in file.keys():  # noqa: SIM118 - no dict
                    part, offsets = file.get_slice(key), info[key]["saved_offsets"]
                    shape, dtype = part.get_shape(), part.get_dtype()
                    others = [len(each[1]) for each in self._parts.get(key, ())]
                    if {len(shape), *others} != {len(offsets)} or any(
                        type(o) is not int or o < 0 for o in offsets
                    ):
                        raise ValueError(f"the offsets of {key} do not fit its shape")
                    if self.dtypes.setdefault(key, dtype) != dtype or dtype not in DTYPES.values():
                        raise ValueError(f"{key} is of another dtype ({dtype})")
                    self._parts.setdefault(key, []).append((file, offsets, shape))
            except (SafetensorError, LookupError, TypeError, ValueError, OSError, RecursionError) as error:
                what = f"{type(error).__name__}: {error}"
                raise ValueError(f"{path} is damaged: it is no shard of a state ({what})") from error

    def keys(self) -> set[str]:
        return set(self._parts)

    def shape(self, key: str) -> tuple[int, ...]:
        ends = [
            [o + n for o, n in zip(offsets, shape, strict=True)] for _, offsets, shape in self._parts[key]
        ]
        return tuple(max(sizes) for sizes in zip(*ends, strict=True))

    def dtype(self, key: str) -> torch.dtype:
        return next(dtype for dtype, name in DTYPES.items() if name == self.dtypes[key])

    def whole(self, key: str) -> Tensor:
        """One tensor, put together."""
        parts = self._parts[key]
        if len(parts) == 1:
            return parts[0][0].get_tensor(key)
        tensor = torch.empty(self.shape(key), dtype=self.dtype(key))
        for file, offsets, shape in parts:
            tensor[tuple(slice(o, o + n) for o, n in zip(offsets, shape, strict=True))] = file.get_tensor(key)
        return tensor

    def named(self, prefix: str) -> dict[str, str]:
        """{what follows the prefix: key} of the keys that begin with it."""
        return {key.removeprefix(prefix): key for key in self._parts if key.startswith(prefix)}
