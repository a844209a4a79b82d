"""Ranks, sums and broadcasts on gloo; the identity without a group."""

import os
import socket

import pytest
import torch
import torch.distributed as dist

from open_lm.config.distributed import DistributedConfig
from open_lm.parallel import meeting, mesh
from open_lm.parallel.launch import Ranks

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

find_device = mesh._device


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    """These tests are of gloo and CPUs, wherever they run; test_gpu.py has the others."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(mesh, "_device", lambda *_: torch.device("cpu"))


def test_one_process_needs_no_group(monkeypatch):
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    world = mesh.start(DistributedConfig())
    assert (world.rank, world.local_rank, world.world_size, world.mesh) == (0, 0, 1, None)
    assert world.is_first
    assert not dist.is_initialized()
    assert mesh.sum_over_ranks_(torch.tensor(3.0)) == 3
    assert mesh.broadcast_object({"a": 1}) == {"a": 1}
    mesh.barrier()
    mesh.stop()


def describe(config):
    world = mesh.start(config)
    total = mesh.sum_over_ranks_(torch.tensor([world.rank + 1.0], dtype=torch.float64))
    word = mesh.broadcast_object(f"from {world.rank}")
    mesh.barrier()
    names = world.mesh.mesh_dim_names if world.mesh else None
    mesh.stop()
    return world.rank, world.world_size, names, total.item(), word, dist.is_initialized(), os.getpid()


def test_two_ranks(spawn):
    results = spawn(2, describe, DistributedConfig())
    assert [r[:6] for r in results] == [
        (0, 2, ("shard",), 3.0, "from 0", False),
        (1, 2, ("shard",), 3.0, "from 0", False),
    ]
    assert results[0][6] != results[1][6]


@pytest.mark.parametrize("flags", [{"fsdp": True}, {"force_distributed": True}])
def test_a_group_of_one_needs_no_launcher(monkeypatch, flags):
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    assert describe(DistributedConfig(**flags))[:6] == (0, 1, ("shard",), 1.0, "from 0", False)


def test_world_size_without_rank_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ValueError, match=r"WORLD_SIZE=2.*torchrun"):
        mesh.start(DistributedConfig())


@pytest.mark.parametrize("flag", ["fsdp_hybrid", "fsdp_hybrid_o2"])
def test_hybrid_on_one_node_says_so(monkeypatch, flag):
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    world = mesh.start(DistributedConfig(fsdp=True, **{flag: True}))
    mesh.stop()
    assert world.mesh.mesh_dim_names == ("shard",)
    flag = "--" + flag.replace("_", "-")
    assert world.notes == (f"{flag}: sharded over 1 ranks, nothing replicated: there is one node",)


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        (Ranks(0, 0, 6, 4), "the 6 ranks are not equally many"),
        (Ranks(0, 0, 8, None), "neither LOCAL_WORLD_SIZE nor"),
        (Ranks(1, 0, 8, 4), "rank 1 is number 0 of the 4 ranks on its node"),
    ],
)
def test_hybrid_needs_nodes_of_one_size(monkeypatch, ranks, message):
    monkeypatch.setattr(mesh, "find_ranks", lambda config: ranks)
    with pytest.raises(ValueError, match=message):
        mesh.start(DistributedConfig(fsdp=True, fsdp_hybrid=True))


def test_offload_without_a_gpu_says_so(monkeypatch):
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    world = mesh.start(DistributedConfig(fsdp=True, fsdp_cpu_offload=True))
    mesh.stop()
    assert world.notes == ("--fsdp-cpu-offload does nothing: there is no GPU to take memory from",)


@pytest.mark.parametrize("url", ["tcp", "file"])
def test_ranks_meet_where_dist_url_says(spawn, tmp_path, url):
    url = f"tcp://127.0.0.1:{free_port()}" if url == "tcp" else f"file://{tmp_path}/meet"
    results = spawn(2, describe_elsewhere, DistributedConfig(dist_url=url, dist_backend="gloo"))
    assert [r[:4] for r in results] == [(0, 2, ("shard",), 3.0), (1, 2, ("shard",), 3.0)]


def describe_elsewhere(config):
    del os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    return describe(config)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.mark.parametrize(
    ("backend", "message"),
    [("nccl", "there is no GPU"), ("mpi", "--dist-backend mpi: expected nccl or gloo")],
)
def test_backends_that_cannot_be(monkeypatch, backend, message):
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match=message):
        mesh.start(DistributedConfig(force_distributed=True, dist_backend=backend))


@pytest.mark.parametrize("rank", ["0", "1"])
@pytest.mark.parametrize("where", ["env", "tcp", "file"])
def test_ranks_that_do_not_meet_end_with_a_message(monkeypatch, tmp_path, where, rank):
    port = free_port()
    url = {"env": "env://", "tcp": f"tcp://127.0.0.1:{port}", "file": f"file://{tmp_path}/meet"}[where]
    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2"}
    for name, value in (environment | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(meeting, "JOIN_SECONDS", 1)
    expected = f"MASTER_PORT={port}" if where == "env" else url
    with pytest.raises(ConnectionError, match=f"the 2 ranks did not meet at .*{expected}: is that"):
        mesh.start(DistributedConfig(dist_url=url))
    assert not dist.is_initialized()


def test_env_without_an_address_is_refused(monkeypatch):
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConnectionError, match=r"MASTER_ADDR=\(not set\)"):
        mesh.start(DistributedConfig())


def test_devices_of_ranks(monkeypatch):
    assert find_device(0, False) == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert find_device(1, False) == torch.device("cuda:1")
    assert find_device(5, True) == torch.device("cuda:0")
    with pytest.raises(ValueError, match=r"LOCAL_RANK=2, but this host shows 2 GPUs.*--no-set-device-rank"):
        find_device(2, False)


def test_offload_over_gloo_on_a_gpu_is_refused():
    config = DistributedConfig(fsdp=True, fsdp_cpu_offload=True, dist_backend="gloo")
    with pytest.raises(ValueError, match="--fsdp-cpu-offload with --dist-backend gloo"):
        mesh._backend(config, torch.device("cuda"))
