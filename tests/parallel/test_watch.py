"""Signals of this process, who is named when ranks hang, and an interruptible wait."""

import os
import signal
import subprocess
import sys
import time

import pytest

from open_lm.data.waiting import LEFT, waiting
from open_lm.parallel.hang import describe, find_hanging
from open_lm.parallel.watch import Watch

WAITS = "  File “torch/distributed/x.py”\n    work.wait()\n  File “mesh.py”, in all_reduce\n"
WORKS = "  File “train.py”, in step\n  File “layer.py”, in forward\n"


def at(phase: str, step: int, stack: str = WORKS) -> dict:
    return {"phase": phase, "step": step, "seconds": 9.0, "stack": stack}


@pytest.mark.parametrize(
    ("answers", "hanging"),
    [
        ({0: at("agreeing", 7, WAITS), 1: at("waiting for data", 7)}, [1]),
        ({0: at("updating", 6), 1: at("agreeing", 7, WAITS)}, [0]),
        ({0: at("forward", 7, WAITS), 1: at("forward", 7)}, [1]),
        ({0: at("forward", 7, WAITS), 1: at("forward", 7, WAITS)}, [0, 1]),
        ({0: at("agreeing", 7, WAITS), 1: at("agreeing", 7, WAITS), 3: at("forward", 7)}, [2]),
        ({0: at("waiting for data", 8), 1: at("evaluating", 7)}, [1]),
    ],
)
def test_who_hangs(answers: dict[int, dict], hanging: list[int]) -> None:
    world_size = max(answers) + 1
    assert find_hanging(answers, world_size) == hanging
    text = describe(answers, world_size)
    assert text.startswith(f"rank {hanging[0]} hangs")
    assert all(f"rank {rank} hangs" not in text for rank in answers if rank not in hanging)


def test_a_signal_is_heard_while_the_main_thread_does_not_run_python(capfd) -> None:
    watch, before = Watch(), signal.getsignal(signal.SIGUSR1)
    watch.start(0, 1, None, ("USR1",), 0)
    try:
        assert not watch.asked()
        os.kill(os.getpid(), signal.SIGUSR1)
        deadline = time.monotonic() + 10
        while not watch.asked() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert watch.asked()
        assert watch.why() == "SIGUSR1 to rank 0"
    finally:
        watch.close()
    assert signal.getsignal(signal.SIGUSR1) is before
    assert "SIGUSR1: the run saves and ends" in capfd.readouterr().err


SCRIPT = """
import os, signal, sys, time
from open_lm.parallel import watch
watch.SAME_SIGNAL_SECONDS = 0.5
w = watch.Watch()
w.start(0, 1, None, ("TERM",), float(sys.argv[1]))
if sys.argv[1] == "0":
    for _ in range(3):  # the first two are one: torchrun passes on what Slurm has sent already
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1 if _ == 0 else 1)
    print("alive")
else:
    w.at("updating", 5)
    def here_it_hangs():
        time.sleep(60)
    here_it_hangs()
"""


def run_script(argument: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", SCRIPT, argument]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_a_second_signal_ends_at_once() -> None:
    done = run_script("0")
    assert done.returncode == 128 + signal.SIGTERM
    assert "SIGTERM again: ends at once" in done.stderr
    assert "alive" not in done.stdout


def test_one_process_that_hangs_shows_where() -> None:
    done = run_script("1")
    assert done.returncode == 1
    assert "rank 0 hangs: no progress for" in done.stderr
    assert "step 5, updating" in done.stderr
    assert "here_it_hangs" in done.stderr


def test_waiting_gives_items_in_order_and_errors_in_their_place() -> None:
    def items():
        yield from range(5)
        raise ValueError("the sixth")

    seen = []
    with pytest.raises(ValueError, match="the sixth"):
        seen.extend(waiting(items(), lambda: False))
    assert seen == list(range(5))
    assert list(waiting([], lambda: False)) == []


def test_a_wait_can_be_left() -> None:
    closed = []

    def items():
        try:
            yield 1
            time.sleep(0.5)
            yield 2
        finally:
            closed.append(True)

    leaves = iter([False, True, True, True, True, True, True, True])
    source = waiting(items(), lambda: next(leaves))
    assert next(source) == 1
    assert next(source) is LEFT
    source.close()
    deadline = time.monotonic() + 5
    while not closed and time.monotonic() < deadline:
        time.sleep(0.01)
    assert closed, "the source is closed, its workers end"


LATE = """
import atexit, os, shlex, signal, sys
import open_lm.main
honest = open_lm.main.mesh.stop
def stop():
    os.kill(os.getpid(), signal.SIGTERM)
    honest()
    os.kill(os.getpid(), signal.SIGTERM)
open_lm.main.mesh.stop = stop
atexit.register(lambda: os.kill(os.getpid(), signal.SIGTERM))
open_lm.main.command()
"""


def test_a_signal_after_the_last_save_changes_no_exit_status(tmp_path) -> None:
    flags = (
        "--model open_lm_test_tiny --dataset-type synthetic --precision fp32 --global-batch-size 8 --workers 0 "
        f"--train-num-samples 128 --epochs 1 --warmup 1 --lr 1e-2 --name run --logs {tmp_path}"
    )
    done = subprocess.run(
        [sys.executable, "-c", LATE, *flags.split()], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "run/checkpoints/epoch_1.pt").exists()
