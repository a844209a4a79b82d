"""Tiny models, and `spawn`, which runs a function of a test file on several gloo ranks."""

import inspect
import os
import pickle
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

torch.set_num_threads(2)


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
