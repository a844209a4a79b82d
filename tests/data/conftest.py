"""Tar shards written by the standard library, and a shard cache of the test's own."""

import gzip
import importlib.util
import io
import json
import os
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from open_lm.data.remote import Cache, Patience

ENCODERS = {
    "json": lambda tokens: json.dumps(tokens).encode(),
    "json.gz": lambda tokens: gzip.compress(json.dumps(tokens).encode()),
    "txt": lambda tokens: str(tokens).encode(),
}


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache", patience=Patience(first_wait_seconds=0.01))


@pytest.fixture
def write_shard() -> Callable:
    """`write_shard(path, samples, ending="json.gz")`: a sample is a list of tokens, or a member's raw bytes."""

    def write(path: Path, samples: Sequence[list[int] | bytes], ending: str = "json.gz") -> str:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, "w") as tar:
            for number, sample in enumerate(samples):
                content = sample if isinstance(sample, bytes) else ENCODERS[ending](sample)
                member = tarfile.TarInfo(f"{path.stem}/{number:06d}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
        return str(path)

    return write


@pytest.fixture
def write_source(write_shard: Callable) -> Callable:
    """`write_source(folder, shard_lengths, first=0, length=5)` → the manifest's path; sequence i of the source is
    `length` times the token first + i."""

    def write(folder: Path, shard_lengths: Sequence[int], first: int = 0, length: int = 5) -> str:
        lines, token = [], first
        for number, n in enumerate(shard_lengths):
            write_shard(folder / f"shard_{number:08d}.tar", [[token + i] * length for i in range(n)])
            lines.append(json.dumps({"shard": f"shard_{number:08d}", "num_sequences": n}))
            token += n
        manifest = folder / "manifest.jsonl"
        manifest.write_text("\n".join(lines))
        return str(manifest)

    return write


@pytest.fixture
def faults(bucket, monkeypatch: pytest.MonkeyPatch) -> Iterator:
    """A proxy before the server of `bucket`: what s3fs asks for goes through it from now on."""
    spec = importlib.util.spec_from_file_location("faults", Path(__file__).with_name("faults.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    proxy = module.FaultProxy(os.environ["AWS_ENDPOINT_URL"])
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    yield proxy
    proxy.close()
