"""Ranks, sums and broadcasts on gloo; the identity without a group."""

import os

import pytest
import torch
import torch.distributed as dist

from open_lm.config.distributed import DistributedConfig
from open_lm.parallel import mesh

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


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
