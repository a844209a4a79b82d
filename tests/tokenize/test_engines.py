"""The command as a process: killed, started again, on both engines."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.tokenize.conftest import TEXTS, digests, write_lines


def command(inputs: Path, output: Path, tokenizer: Path, *flags: str) -> list[str]:
    words = [sys.executable, "-m", "open_lm.tokenize", "--inputs", str(inputs), "--output", str(output)]
    words += ["--tokenizer", str(tokenizer), "--seq-len", "32", "--unit-megabytes", "0.05"]
    words += ["--bucket-megabytes", "0.2", "--held-out-share", "0.1", "--sequences-per-shard", "400"]
    return [*words, "--processes", "2", *flags]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tokenizer) -> tuple[Path, Path, float]:
    """Inputs, the output of an uninterrupted run, its seconds."""
    folder = tmp_path_factory.mktemp("whole")
    texts = [f"{i} {text}" for i in range(20) for text in TEXTS]
    inputs = write_lines(folder / "in.jsonl", texts)
    started = time.monotonic()
    subprocess.run(command(inputs, folder / "out", tokenizer), check=True, capture_output=True)
    return inputs, folder / "out", time.monotonic() - started


@pytest.mark.slow
def test_sigkill_at_random_moments(whole, tmp_path, tokenizer):
    inputs, expected, seconds = whole
    rng, kills = random.Random(0), 0
    words = command(inputs, tmp_path / "out", tokenizer)
    for alone in (False, True, False, True):  # the whole group, or the parent and never its workers
        process = subprocess.Popen(
            words, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            process.wait(seconds * rng.uniform(0.2, 0.8))
        except subprocess.TimeoutExpired:
            (os.kill if alone else os.killpg)(process.pid, signal.SIGKILL)
            kills += 1
        process.wait()
    assert kills
    subprocess.run(words, check=True, capture_output=True)
    assert digests(tmp_path / "out") == digests(expected)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_no_worker_outlives_the_command(whole, tmp_path, tokenizer, number):
    """It would go on writing into folders that another run may own by then."""
    inputs = whole[0]
    process = subprocess.Popen(
        command(inputs, tmp_path / "out", tokenizer), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    while not list((tmp_path / "out" / "work").glob("unit_*")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    workers = [n for n in children if "spawn_main" in Path(f"/proc/{n}/cmdline").read_text()]
    assert len(workers) == 2
    process.send_signal(number)
    process.wait()
    deadline = time.monotonic() + 5
    while any(Path(f"/proc/{number}").exists() for number in workers):
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.slow
def test_ray_gives_the_same_bytes(whole, tmp_path, tokenizer):
    pytest.importorskip("ray")
    inputs, expected, _ = whole
    words = command(inputs, tmp_path / "out", tokenizer, "--engine", "ray")
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert digests(tmp_path / "out") == digests(expected)


@pytest.mark.slow
def test_errors_come_through_either_engine_in_one_line(whole, tmp_path, tokenizer):
    inputs = tmp_path / "bad.jsonl"
    inputs.write_text(whole[0].read_text() + "{\n")
    engines = ["local"]
    try:
        import ray  # noqa: F401

        engines.append("ray")
    except ImportError:
        pass
    for engine in engines:
        done = subprocess.run(
            command(inputs, tmp_path / engine, tokenizer, "--engine", engine), capture_output=True, text=True
        )
        assert done.returncode == 1
        last = done.stderr.strip().splitlines()[-1]
        assert last.startswith(f"open_lm.tokenize: error: {inputs}:4001: not JSON")


def test_ray_that_is_not_installed_names_the_command(whole, tmp_path, tokenizer):
    code = "import sys; sys.modules['ray'] = None; from open_lm.tokenize.__main__ import main; main()"
    words = command(whole[0], tmp_path / "out", tokenizer, "--engine", "ray")
    done = subprocess.run([sys.executable, "-c", code, *words[3:]], capture_output=True, text=True)
    assert done.returncode == 1
    assert "--engine ray" in done.stderr
    assert "(pip install ray)" in done.stderr
