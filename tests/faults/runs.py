"""Real runs of the command on this machine's CPU: started, killed, looked at from outside."""

import hashlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tests.conftest import free_port, write_source

ROOT = Path(__file__).parents[2]
MOE = "--moe-freq 2 --moe-num-experts 4"
# The same numbers wherever the tokens are: no dropping by a micro-batch's capacity, no loss of a rank's own counts
ANYWHERE = f"{MOE} --moe-capacity-factor 0 --moe-balance global"
# 8 sequences of 16 tokens a step
BASE = (
    "--model open_lm_test_tiny --precision fp32 --global-batch-size 8 --lr 1e-3 --eps 1e-6 --warmup 2 "
    "--log-every-n-steps 1 --grad-clip-norm 1 --wd 0.1 --name run"
)
SYNTHETIC = "--dataset-type synthetic --workers 0"
STEP_TOKENS = 128


class Fault(NamedTuple):
    """One line of the table."""

    number: int
    text: str
    expected: str
    run: Callable[[Path, bool], str]
    """(an empty folder, whether to be quick) → what was seen. AssertionError where that is not what is expected."""


FAULTS: dict[int, Fault] = {}


def fault(number: int, text: str, expected: str) -> Callable:
    """Puts a function into the table."""

    def add(run: Callable[[Path, bool], str]) -> Callable[[Path, bool], str]:
        FAULTS[number] = Fault(number, text, expected, run)
        return run

    return add


class Ranks:
    """The processes of a run: each rank by itself, or under torchrun where that is a part of what is tested."""

    def __init__(
        self,
        folder: Path,
        flags: str,
        *,
        ranks: int = 1,
        faults: str = "",
        torchrun: str | None = None,
        agents: int = 1,
        environment: dict[str, str] | None = None,
    ) -> None:
        """`faults`: of inject.py. `torchrun`: its flags; None: without it. `agents`: as on so many nodes."""
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        module = "tests.faults.inject" if faults else "open_lm.main"
        arguments = shlex.split(f"{BASE} --logs {folder} {flags}")
        common = {
            "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "FAULTS": faults, "FAULT_FOLDER": str(folder),
            "PYTHONUNBUFFERED": "1",
        } | (environment or {})  # fmt: skip
        self.output = folder / f"output_{len(list(folder.glob('output_*')))}"
        self.started = time.monotonic()
        self.processes = []
        port = free_port()
        with open(self.output, "w") as output:
            if torchrun is not None:
                nodes = f"--nnodes {agents} --rdzv-backend c10d --rdzv-endpoint localhost:{port} --rdzv-id {folder}"
                where = ["--standalone"] if agents == 1 else nodes.split()
                command = [sys.executable, "-m", "torch.distributed.run", *where, "--nproc-per-node"]
                command += [str(ranks // agents), *shlex.split(torchrun), "-m", "--", module, *arguments]
                commands = [(command, {})] * agents
            else:
                commands = [
                    (
                        [sys.executable, "-m", module, *arguments],
                        {
                            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks),
                            "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                        } if ranks > 1 else {},
                    )
                    for rank in range(ranks)
                ]  # fmt: skip
            for command, own in commands:
                environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
                self.processes.append(
                    subprocess.Popen(
                        command, cwd=ROOT, env=environment | common | own, stdout=output, stderr=output,
                        start_new_session=True,
                    )
                )  # fmt: skip

    def wait(self, seconds: float = 180) -> list[int]:
        """Every process's exit status. AssertionError, once all are killed, if one does not end."""
        deadline = time.monotonic() + seconds
        try:
            return [p.wait(max(0.1, deadline - time.monotonic())) for p in self.processes]
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"not ended after {seconds:.0f} s:\n{self.text()[-3000:]}") from None

    def ends(self, *codes: int, seconds: float = 180) -> "Ranks":
        """Waits; AssertionError unless the exit statuses are these."""
        seen = self.wait(seconds)
        assert tuple(seen) == codes, f"exit statuses {seen}, expected {list(codes)}:\n{self.text()[-3000:]}"
        return self

    def kill(self, number: int = signal.SIGKILL) -> None:
        """To every process of the run, torchrun's ranks and data workers too."""
        for process in self.processes:
            try:
                os.killpg(process.pid, number)
            except ProcessLookupError:
                continue
            if number == signal.SIGKILL:
                process.wait()

    def signal(self, rank: int, number: int) -> None:
        self.processes[rank].send_signal(number)

    def text(self) -> str:
        return self.output.read_text(errors="replace")

    def until(self, condition: Callable[[], Any], seconds: float = 120) -> Any:
        """Waits for a true value. AssertionError where the run ends before, or nothing comes."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            ended = all(p.poll() is not None for p in self.processes)
            if value := condition():
                return value
            assert not ended, f"ended too early:\n{self.text()[-3000:]}"
            time.sleep(0.02)
        self.kill()
        raise AssertionError(f"nothing seen in {seconds:.0f} s:\n{self.text()[-3000:]}")

    def until_step(self, step: int) -> None:
        self.until(lambda: last_step(self.folder) >= step)


def run(folder: Path, flags: str, **options: Any) -> Ranks:
    """A run that ends with status 0 on every rank."""
    ranks = Ranks(folder, flags, **options)
    return ranks.ends(*[0] * len(ranks.processes))


def lines(folder: Path, name: str = "run") -> list[dict]:
    """The training lines of log.jsonl; a last line that is being written is left out."""
    path = folder / name / "log.jsonl"
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return [line for line in found if "train/loss" in line]


def last_step(folder: Path) -> int:
    return max((line["step"] for line in lines(folder)[-1:]), default=0)


def losses(folder: Path) -> dict[int, float]:
    """{step: loss}, of steps done twice the later."""
    return {line["step"]: line["train/loss"] for line in lines(folder)}


def newest_epoch(folder: Path) -> Path:
    files = [f for f in folder.glob("run/checkpoints/epoch_*.pt") if re.fullmatch(r"epoch_\d+", f.stem)]
    return max(files, key=lambda f: int(f.stem.removeprefix("epoch_")))


def hash_of(file: Path) -> str:
    """Of the weights in epoch_N.pt."""
    digest = hashlib.sha256()
    for name, tensor in sorted(torch.load(file, weights_only=True)["state_dict"].items()):
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]


def files_of_newest(folder: Path) -> list[Path]:
    """What the newest checkpoint's state is read from: step_S/ and its files, or companions of epoch_N.pt."""
    steps = [p for p in folder.glob("run/checkpoints/step_*") if p.is_dir()]
    if steps:
        newest = max(steps, key=lambda p: int(p.name.removeprefix("step_")))
        return sorted(f for f in newest.rglob("*") if f.is_file())
    number = newest_epoch(folder).stem.removeprefix("epoch_")
    return sorted(folder.glob(f"run/checkpoints/*_{number}.pt"))


def resumed_step(ranks: Ranks) -> int:
    """The step that the log says the run went on from; 0 if from none."""
    found = re.findall(r"resumed .* at step (\d+)", ranks.text())
    return int(found[-1]) if found else 0


def source(folder: Path, samples: int = 200) -> str:
    """Flags of a small source on disk, made once."""
    manifest = folder / "data" / "manifest.jsonl"
    if not manifest.exists():
        write_source(folder / "data", [samples // 2, samples - samples // 2], 16, 16, seed=1)
    return f"--dataset-manifest {manifest} --data-key json --multiple-data-passes"


def held_out(folder: Path) -> str:
    manifest = folder / "held_out" / "manifest.jsonl"
    if not manifest.exists():
        write_source(folder / "held_out", [37], 16, 16, seed=2)
    return str(manifest)


def steps(interval: int, total: int) -> str:
    """Flags of a run of so many steps with a checkpoint after each interval."""
    return f"--train-num-samples {interval * STEP_TOKENS} --epochs {total // interval}"
