"""Tiny models, and `spawn`, which runs a function of a test file on several gloo ranks, and an S3 server."""

import gzip
import inspect
import io
import json
import os
import pickle
import socket
import subprocess
import sys
import tarfile
import tempfile
import urllib.request
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

if "PYTEST_XDIST_WORKER" in os.environ:  # as many processes as cores: threads would only wait for one another
    os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)
if not torch.cuda.is_available():
    os.environ.setdefault(
        "TRITON_INTERPRET", "1"
    )  # looked at where triton is imported, by whatever test is first


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture
def spawn() -> Callable:
    """`spawn(world_size, fn, *arguments, timeout=120)` → [fn's result on rank 0, on rank 1, …].

    `fn` is a top-level function of the test file. Each rank is a fresh process with torchrun's variables
    (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT), so `open_lm.parallel.mesh.start` works in it.
    Arguments and results travel by pickle. A failing rank fails the test with its traceback.
    """

    def run(world_size: int, fn: Callable, *arguments, timeout: float = 120) -> list:
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "arguments.pickle").write_bytes(pickle.dumps(arguments))
            port = free_port()
            ranks = []
            for rank in range(world_size):
                environment = os.environ | {
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(world_size),
                    "LOCAL_WORLD_SIZE": str(world_size),
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port),
                    "OMP_NUM_THREADS": "1",
                }
                command = [sys.executable, str(Path(__file__).with_name("run_rank.py"))]
                command += [inspect.getfile(fn), fn.__name__, folder]
                log = open(Path(folder, f"rank_{rank}.log"), "w+")  # noqa: SIM115
                ranks.append((subprocess.Popen(command, env=environment, stdout=log, stderr=log), log))
            codes = []
            for process, _ in ranks:
                try:
                    codes.append(process.wait(timeout))
                except subprocess.TimeoutExpired:
                    codes.append(None)
            for process, _ in ranks:
                process.kill()
                process.wait()
            printed = ""
            for rank, (_, log) in enumerate(ranks):
                log.seek(0)
                printed += f"--- rank {rank}, exit {codes[rank]}\n{log.read()[-4000:]}\n"
                log.close()
            if any(code != 0 for code in codes):
                pytest.fail(printed)
            return [pickle.loads(Path(folder, f"result_{r}.pickle").read_bytes()) for r in range(world_size)]

    return run


def write_source(folder: Path, shards: list[int], seq_len: int, vocab_size: int, seed: int) -> str:
    """A source as open_lm's users have it: shard_*.tar of json.gz samples and manifest.jsonl; returns the latter.

    Texts of a first-order Markov chain, so that there is something to learn.
    """
    rng = np.random.default_rng(seed)
    transition = rng.dirichlet(np.full(vocab_size, 0.1), size=vocab_size)
    folder.mkdir(parents=True)
    lines = []
    for i, count in enumerate(shards):
        with tarfile.open(folder / f"shard_{i:08d}.tar", "w") as tar:
            for j in range(count):
                tokens = [int(rng.integers(vocab_size))]
                for _ in range(seq_len):
                    tokens.append(int(rng.choice(vocab_size, p=transition[tokens[-1]])))
                data = gzip.compress(json.dumps(tokens).encode())
                member = tarfile.TarInfo(f"{i:04d}_{j:06d}.json.gz")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
        lines.append(json.dumps({"shard": f"shard_{i:08d}", "num_sequences": count}))
    (folder / "manifest.jsonl").write_text("\n".join(lines))
    return str(folder / "manifest.jsonl")


@pytest.fixture(scope="session")
def sources(tmp_path_factory) -> list[str]:
    """Two training manifests and one held-out, for open_lm_test_tiny (16 tokens of 16 ids)."""
    folder = tmp_path_factory.mktemp("sources")
    return [
        write_source(folder / "a", [70, 50, 80], 16, 16, seed=1),
        write_source(folder / "b", [60, 40], 16, 16, seed=2),
        write_source(folder / "held_out", [37], 16, 16, seed=1),
    ]


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch):
    """`s3://bucket` on a real HTTP server: `upload(folder)` copies a folder's files to its root; `upload.stop()`
    ends the server."""
    import boto3
    import s3fs
    from moto.server import ThreadedMotoServer

    from open_lm.data import s3

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    urllib.request.urlopen(f"http://{host}:{port}/moto-api/reset", data=b"").close()  # moto keeps its buckets
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    s3.forget()
    client = boto3.client("s3")
    client.create_bucket(Bucket="bucket")

    def upload(folder: Path) -> None:
        for path in filter(Path.is_file, folder.rglob("*")):
            name = path.relative_to(folder).as_posix()
            client.put_object(Bucket="bucket", Key=name, Body=path.read_bytes())

    upload.stop = server.stop
    yield upload
    client.close()
    s3fs.S3FileSystem.clear_instance_cache()
    s3.forget()
    server.stop()
