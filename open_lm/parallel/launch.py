"""Who this process is among the ranks, as torchrun or srun tells it in the environment."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from open_lm.config.distributed import DistributedConfig

# Slurm numbers its steps from 0; a batch script has no number, or one from here on, as interactive shells do.
NO_STEP = 0xFFFFFFF0


@dataclass(frozen=True)
class Ranks:
    """What the launcher says."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int | None = 1
    """Ranks on each host; None if hosts have unlike numbers, or the launcher does not say."""
    url: str = "env://"
    """Where the ranks meet."""
    note: str | None = None

    @property
    def is_needed(self) -> bool:
        """False for the tasks of srun beyond --preset-world-size: they have nothing to do."""
        return self.rank < self.world_size


def find_ranks(config: DistributedConfig, environment: Mapping[str, str] = os.environ) -> Ranks:
    """torchrun's ranks (RANK is set), else srun's tasks, else one process.

    Raises ValueError on variables that contradict each other, and on --preset-world-size without srun.
    """
    preset = config.preset_world_size
    if "RANK" in environment:
        if preset is not None:
            raise ValueError(
                f"--preset-world-size {preset} is for srun, but RANK={environment['RANK']} is set: give torchrun "
                "--nnodes and --nproc-per-node instead"
            )
        return _of_torchrun(config, environment)
    if _is_task_of_srun(environment):
        return _of_srun(config, environment)
    if _number(environment, "WORLD_SIZE", 1) > 1:
        raise ValueError(
            f"WORLD_SIZE={environment['WORLD_SIZE']}, but RANK is not set: launch with torchrun or srun"
        )
    if preset is not None:
        raise ValueError(f"--preset-world-size {preset} is for srun, which did not start this process")
    tasks = _number(environment, "SLURM_NTASKS", 1)
    forgotten = f"SLURM_NTASKS={tasks}, but srun did not start this process: it runs alone"
    return Ranks(url=config.dist_url, note=forgotten if tasks > 1 else None)


def claimed_rank(environment: Mapping[str, str] = os.environ) -> int:
    """The rank to show in a message: no error whatever the environment holds."""
    claimed = environment.get("RANK", environment.get("SLURM_PROCID", "0"))
    return int(claimed) if claimed.isdigit() else 0


def count_restarts(environment: Mapping[str, str] = os.environ) -> int:
    """How often torchrun has started this job's ranks anew (--max-restarts)."""
    return _number(environment, "TORCHELASTIC_RESTART_COUNT", 0)


def _of_torchrun(config: DistributedConfig, environment: Mapping[str, str]) -> Ranks:
    if "WORLD_SIZE" not in environment:
        raise ValueError(f"RANK={environment['RANK']}, but WORLD_SIZE is not set: launch with torchrun")
    rank, world_size = _number(environment, "RANK"), _number(environment, "WORLD_SIZE")
    if not rank < world_size:
        raise ValueError(f"RANK={rank}, but WORLD_SIZE={world_size}: expected a smaller rank")
    local = "LOCAL_RANK" if "LOCAL_RANK" in environment else "SLURM_LOCALID"
    local_world_size = _number(environment, "LOCAL_WORLD_SIZE", 0) or None
    return Ranks(rank, _number(environment, local, 0), world_size, local_world_size, config.dist_url)


def _is_task_of_srun(environment: Mapping[str, str]) -> bool:
    """False in a batch script and in an interactive shell, where SLURM_PROCID and SLURM_NTASKS are set too."""
    step = environment.get("SLURM_STEP_ID", "")
    return "SLURM_PROCID" in environment and step.isdigit() and int(step) < NO_STEP


def _of_srun(config: DistributedConfig, environment: Mapping[str, str]) -> Ranks:
    rank, tasks = _number(environment, "SLURM_PROCID"), _number(environment, "SLURM_NTASKS")
    promised = _number(environment, "WORLD_SIZE", tasks)
    if promised != tasks:
        raise ValueError(f"WORLD_SIZE={promised}, but SLURM_NTASKS={tasks}: unset WORLD_SIZE")
    world_size = config.preset_world_size or tasks
    if world_size > tasks:
        raise ValueError(f"--preset-world-size {world_size} > SLURM_NTASKS={tasks}: give srun more tasks")
    per_node = environment.get("SLURM_STEP_TASKS_PER_NODE") or environment.get("SLURM_TASKS_PER_NODE", "")
    url = config.dist_url
    if url == "env://":
        url = f"tcp://{_first_host(environment)}:{_port(environment)}"
    return Ranks(rank, _number(environment, "SLURM_LOCALID"), world_size, _each(per_node, world_size), url)


def _number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environment.get(name, "" if default is None else str(default))
    if not text.isdigit():
        raise ValueError(f"{name}={text!r} in the environment: expected a number")
    return int(text)


def _each(tasks_per_node: str, world_size: int) -> int | None:
    """Ranks on each host, if they are as many on all: 4 for "4(x2),1" and 8 ranks."""
    left, used = world_size, set()
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", tasks_per_node):
        for _ in range(int(times or 1)):
            if left:
                used.add(min(int(count), left))
                left -= min(int(count), left)
    return used.pop() if len(used) == 1 and not left else None


def _first_host(environment: Mapping[str, str]) -> str:
    """Where rank 0 is: the first host of "gpu[003-010,012],login1", which is gpu003."""
    if "MASTER_ADDR" in environment:
        return environment["MASTER_ADDR"]
    hosts = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
    first = re.sub(r"\[(\w+)[^\]]*\]", r"\1", hosts).split(",")[0]
    found = first or environment.get("SLURM_LAUNCH_NODE_IPADDR")
    if not found:
        raise ValueError("srun's tasks have no SLURM_JOB_NODELIST to find rank 0 by: set MASTER_ADDR")
    return found


def _port(environment: Mapping[str, str]) -> int:
    """The same for all tasks of a step, another for other jobs and steps; below the ports that systems lend."""
    if "MASTER_PORT" in environment:
        return _number(environment, "MASTER_PORT")
    step = _number(environment, "SLURM_JOB_ID", 0) + 7919 * _number(environment, "SLURM_STEP_ID", 0)
    return 10000 + step % 20000
