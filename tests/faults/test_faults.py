"""The faults of `make faults` that take seconds, with fewer repetitions."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults import checkpoints, data, numbers, processes
from tests.faults.runs import FAULTS, ROOT, SYNTHETIC, Ranks, newest_epoch, run, steps

GROUPS = (checkpoints, data, numbers, processes)
QUICK = (14, 15, 16, 17, 18, 20, 21, 22, 23, 25, 27)
SLOW = (1, 3, 4, 5, 6)  # some ten seconds; what is in neither is in `make faults` alone


@pytest.mark.parametrize(
    "number", [*QUICK, *(pytest.param(n, marks=pytest.mark.slow) for n in SLOW)], ids=lambda n: f"fault_{n}"
)
def test_fault(number: int, tmp_path: Path) -> None:
    assert FAULTS[number].run(tmp_path, True)


@pytest.mark.slow
def test_torchrun_starts_a_dead_rank_again(tmp_path: Path) -> None:
    assert processes.restart(tmp_path, True)


@pytest.mark.slow
def test_torchrun_does_not_get_through_what_is_refused(tmp_path: Path) -> None:
    """Each of its attempts is refused, also the second, although a run is there that it could go on with."""
    flags = f"{SYNTHETIC} {steps(3, 9)}"
    run(tmp_path, f"{flags} --max-steps 3")
    refused = Ranks(tmp_path, flags, ranks=2, torchrun="--max-restarts 1")
    assert refused.wait() == [1]
    assert refused.text().count("already holds a run") == 2, refused.text()[-3000:]
    assert newest_epoch(tmp_path).name == "epoch_1.pt"


def test_every_fault_is_in_the_table() -> None:
    assert sorted(FAULTS) == list(range(1, 28))
    command = [sys.executable, "-m", "tests.faults", "--only", "28"]
    refused = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert refused.returncode == 2
    assert "there is no fault 28" in refused.stderr
