"""Tar shards written by the standard library, an S3 server, and a shard cache of the test's own."""

import gzip
import io
import json
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from open_lm.data.remote import Cache

ENCODERS = {
    "json": lambda tokens: json.dumps(tokens).encode(),
    "json.gz": lambda tokens: gzip.compress(json.dumps(tokens).encode()),
    "txt": lambda tokens: str(tokens).encode(),
}


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


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
def bucket(monkeypatch: pytest.MonkeyPatch):
    """`s3://bucket` on a real HTTP server: `upload(folder)` copies a folder's files to its root."""
    import boto3
    import s3fs
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    client = boto3.client("s3")
    client.create_bucket(Bucket="bucket")

    def upload(folder: Path) -> None:
        for path in folder.iterdir():
            client.put_object(Bucket="bucket", Key=path.name, Body=path.read_bytes())

    yield upload
    client.close()
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()
