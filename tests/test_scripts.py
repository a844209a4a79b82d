"""scripts/: the shell parses them, our own parser takes their commands, Kubernetes' fields are there."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml
from torch.distributed.run import get_args_parser

from open_lm.config.check import check
from open_lm.config.parse import parse
from open_lm.config.resolve import resolve_model

SCRIPTS = Path(__file__).parents[1] / "scripts"


def check_command(words: list[str]) -> None:
    """A launcher's words, then ours behind `open_lm.main`."""
    run, given = parse(words[words.index("open_lm.main") + 1 :])
    check(run, given)
    config = resolve_model(run.model, run.moe, given)
    assert config.moe.enabled
    assert run.checkpoint.resume == "latest", "what is started again must go on"
    assert run.log.name, "a name with a date would be another run's"


def check_torchrun(words: list[str]) -> None:
    """torchrun's own parser, too. Behind `--`, as it does."""
    options = get_args_parser().parse_args(
        [w for w in words[1:] if w != "--"][: words.index("open_lm.main") - 1]
    )
    assert options.training_script == "open_lm.main"
    assert (options.nnodes, options.nproc_per_node, options.max_restarts) == ("2", "8", 3)
    assert (options.rdzv_backend, bool(options.rdzv_endpoint), bool(options.rdzv_id)) == ("c10d", True, True)


@pytest.mark.parametrize("name", ["slurm.sh", "torchrun.sh"])
def test_shell(name: str) -> None:
    subprocess.run(["bash", "-n", SCRIPTS / name], check=True)
    text = (SCRIPTS / name).read_text().replace("\\\n", " ")
    (command,) = [line for line in text.splitlines() if "open_lm.main" in line and not line.startswith("#")]
    words = shlex.split(command.replace("&", ""))
    check_command(words)
    if name == "torchrun.sh":
        check_torchrun(words)


@pytest.mark.parametrize("status", [0, 1, 3])
def test_slurm_saves_and_comes_back(tmp_path, status) -> None:
    """With `srun` and `scontrol` of our own: USR1 to the script reaches the ranks, and the job is queued again,
    unless they fail. 3: saved, but not all of it is copied."""
    text = (SCRIPTS / "slurm.sh").read_text()
    options = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", text, re.MULTILINE))
    assert "requeue" in options
    assert options["signal"].startswith("B:USR1@")
    (tmp_path / "srun").write_text(
        f'#!/bin/bash\ntrap "echo saved; exit {status}" USR1\nsleep 0.3\n'  # until the script has its own trap
        "touch started\nwhile :; do sleep 0.1; done\n"
    )
    (tmp_path / "scontrol").write_text('#!/bin/bash\necho "$@" > requeued\n')
    for name in ("srun", "scontrol"):
        (tmp_path / name).chmod(0o755)
    script = f"PATH={tmp_path}:$PATH SLURM_JOB_ID=7 exec bash {SCRIPTS / 'slurm.sh'}"
    with subprocess.Popen(["bash", "-c", script], cwd=tmp_path, stdout=subprocess.PIPE, text=True) as job:
        while not (tmp_path / "started").exists():
            assert job.poll() is None
        job.send_signal(10)
        output, _ = job.communicate(timeout=30)
    assert job.returncode == status
    assert "saved" in output
    if status == 1:
        assert not (tmp_path / "requeued").exists()
        return
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"


def test_kubernetes() -> None:
    """The fields that a JobSet (jobset.x-k8s.io/v1alpha2), a Job and a Pod require."""
    (manifest,) = yaml.safe_load_all((SCRIPTS / "kubernetes.yaml").read_text())
    assert manifest["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
    assert manifest["kind"] == "JobSet"
    name = manifest["metadata"]["name"]
    (group,) = manifest["spec"]["replicatedJobs"]
    assert group["replicas"] == 1
    job = group["template"]["spec"]
    assert job["completionMode"] == "Indexed"
    assert job["parallelism"] == job["completions"] == 2
    pod = job["template"]["spec"]
    assert pod["restartPolicy"] in ("Never", "OnFailure"), "a Job takes no other"
    (container,) = pod["containers"]
    assert {"name", "image", "command"} <= set(container)
    assert all(isinstance(word, str) for word in container["command"])
    volumes = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 8
    words = container["command"]
    check_torchrun(words)
    check_command(words)
    (endpoint,) = [w for w in words if w.startswith("--rdzv-endpoint=")]
    host = f"{name}-{group['name']}-0-0.{name}"  # JobSet's name of the first pod
    assert endpoint == f"--rdzv-endpoint={host}:29400"
    assert len(f"{name}-{group['name']}-0-0") <= 63
