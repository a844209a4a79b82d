"""Ranks from what torchrun and srun leave in the environment, and the command under srun."""

import os
import shlex
import subprocess
import sys

import pytest
import torch

from open_lm.config.distributed import DistributedConfig
from open_lm.main import main
from open_lm.parallel.launch import Ranks, claimed_rank, find_ranks

PLAIN = DistributedConfig()
# the second of 2 hosts with 4 tasks each
SRUN = {
    "SLURM_JOB_ID": "1234567",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_JOB_NODELIST": "gpu[007-008]",
}
TORCHRUN = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}


def test_srun() -> None:
    ranks = find_ranks(PLAIN, SRUN)
    assert ranks == Ranks(5, 1, 8, 4, "tcp://gpu007:24567")
    assert claimed_rank(SRUN) == 5
    own = find_ranks(PLAIN, SRUN | {"MASTER_ADDR": "there", "MASTER_PORT": "123", "WORLD_SIZE": "8"})
    assert own.url == "tcp://there:123"
    assert find_ranks(DistributedConfig(dist_url="file:///shared/x"), SRUN).url == "file:///shared/x"
    ports = {find_ranks(PLAIN, SRUN | {"SLURM_STEP_ID": str(step)}).url for step in range(50)}
    assert len(ports) == 50, "two steps of one job meet at one port"


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("gpu7", "gpu7"),
        ("gpu7,gpu9", "gpu7"),
        ("gpu[007-010,012],login1", "gpu007"),
        ("gpu[12,14]", "gpu12"),
        ("rack[1-2]n[03-04].local", "rack1n03.local"),
    ],
)
def test_the_first_host_of_a_list(hosts, first) -> None:
    assert find_ranks(PLAIN, SRUN | {"SLURM_JOB_NODELIST": hosts}).url == f"tcp://{first}:24567"
    only_launcher = {k: v for k, v in SRUN.items() if k != "SLURM_JOB_NODELIST"}
    url = find_ranks(PLAIN, only_launcher | {"SLURM_LAUNCH_NODE_IPADDR": "10.0.0.1"}).url
    assert url == "tcp://10.0.0.1:24567"


@pytest.mark.parametrize(
    ("per_node", "preset", "each"),
    [
        ("4(x2)", None, 4),
        ("4,4", None, 4),
        ("8", None, 8),
        ("5,3", None, None),
        ("", None, None),
        ("4(x2)", 4, 4),
        ("4(x2)", 3, 3),
        ("4(x2)", 6, None),
        ("2,4(x2)", 4, 2),
    ],
)
def test_ranks_of_each_host(per_node, preset, each) -> None:
    config = DistributedConfig(preset_world_size=preset)
    ranks = find_ranks(config, SRUN | {"SLURM_STEP_TASKS_PER_NODE": per_node})
    assert ranks.local_world_size == each
    assert ranks.world_size == (preset or 8)
    assert ranks.is_needed == (preset is None or preset > 5)


def test_torchrun_wins_over_srun() -> None:
    assert find_ranks(PLAIN, TORCHRUN) == Ranks(3, 1, 4, 2)
    assert find_ranks(PLAIN, SRUN | TORCHRUN) == Ranks(3, 1, 4, 2)
    assert claimed_rank(SRUN | TORCHRUN) == 3


@pytest.mark.parametrize("step", [None, "4294967291", "4294967290"], ids=["none", "batch", "interactive"])
def test_python_in_a_batch_script_runs_alone(step) -> None:
    batch = {k: v for k, v in SRUN.items() if k != "SLURM_STEP_ID"} | {"SLURM_PROCID": "0"}
    batch |= {"SLURM_STEP_ID": step} if step else {}
    ranks = find_ranks(PLAIN, batch)
    assert (ranks.rank, ranks.world_size) == (0, 1)
    assert "SLURM_NTASKS=8" in ranks.note
    assert find_ranks(PLAIN, batch | {"SLURM_NTASKS": "1"}) == find_ranks(PLAIN, {}) == Ranks()


@pytest.mark.parametrize(
    ("preset", "environment", "message"),
    [
        (2, TORCHRUN, "--preset-world-size 2 is for srun, but RANK=3"),
        (2, {}, "--preset-world-size 2 is for srun"),
        (9, SRUN, "--preset-world-size 9 > SLURM_NTASKS=8"),
        (None, SRUN | {"WORLD_SIZE": "4"}, "WORLD_SIZE=4, but SLURM_NTASKS=8"),
        (None, {"WORLD_SIZE": "2"}, "WORLD_SIZE=2, but RANK is not set"),
        (None, {"RANK": "1"}, "RANK=1, but WORLD_SIZE is not set"),
        (None, TORCHRUN | {"RANK": "4"}, "RANK=4, but WORLD_SIZE=4"),
        (None, TORCHRUN | {"LOCAL_RANK": "x"}, "LOCAL_RANK='x'"),
        (None, {k: v for k, v in SRUN.items() if k != "SLURM_JOB_NODELIST"}, "set MASTER_ADDR"),
    ],
)
def test_contradictions_are_refused(preset, environment, message) -> None:
    with pytest.raises(ValueError, match=message):
        find_ranks(DistributedConfig(preset_world_size=preset), environment)


def flags(tmp_path, name: str, extra: str = "") -> list[str]:
    return shlex.split(
        "--model open_lm_test_tiny --dataset-type synthetic --train-num-samples 256 --epochs 1 --precision fp32 "
        f"--warmup 1 --lr 1e-3 --global-batch-size 8 --workers 0 --logs {tmp_path} --name {name} {extra}"
    )


def srun_task(arguments: list[str], **variables: str) -> subprocess.Popen:
    """The real command, with these variables and none of a launcher that runs the tests."""
    launchers = ("SLURM_", "TORCHELASTIC_", "MASTER_")
    clean = {k: v for k, v in os.environ.items() if not k.startswith(launchers) and k not in TORCHRUN}
    return subprocess.Popen(
        [sys.executable, "-m", "open_lm.main", *arguments],
        env=clean | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def weights(tmp_path, name: str) -> dict[str, torch.Tensor]:
    return torch.load(tmp_path / name / "checkpoints/epoch_1.pt", weights_only=True)["state_dict"]


def test_srun_runs_the_command_on_its_first_tasks(tmp_path, monkeypatch, capfd) -> None:
    job = {
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_STEP_ID": "3",
        "SLURM_NTASKS": "3",
        "SLURM_STEP_TASKS_PER_NODE": "3",
        "SLURM_JOB_NODELIST": "localhost",
    }
    arguments = flags(tmp_path, "srun", "--preset-world-size 2 --fsdp --fsdp-hybrid")
    tasks = [srun_task(arguments, SLURM_PROCID=str(i), SLURM_LOCALID=str(i), **job) for i in range(3)]
    # the batch script's own Python: one process, though three tasks are promised
    for name in (*TORCHRUN, "SLURM_STEP_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_NTASKS", "3")
    main(flags(tmp_path, "alone"))
    assert "SLURM_NTASKS=3, but srun did not start this process" in "".join(capfd.readouterr())

    printed = [task.communicate(timeout=120) for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0, 0], printed
    assert printed[2][0] == "rank 2 is not needed with --preset-world-size 2: it ends\n"
    assert "2 ranks on cpu" in "".join(printed[0])
    assert "--fsdp-hybrid: sharded over 2 ranks, nothing replicated" in "".join(printed[0])
    expected = weights(tmp_path, "alone")
    for name, weight in weights(tmp_path, "srun").items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-5, atol=1e-5)
