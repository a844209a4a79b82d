"""moe/bench.py: it runs on a CPU, and its record's numbers agree with each other."""

import json
import math
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "moe" / "bench.py"


def test_table_and_records(tmp_path):
    output = tmp_path / "records.jsonl"
    command = [sys.executable, SCRIPT, "demo", "--device", "cpu", "--dtype", "fp32", "--tokens", "64"]
    printed = subprocess.run(
        [*command, "--repeats", "2", "--output", output], check=True, capture_output=True, text=True
    ).stdout
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["layer"] for row in rows] == ["dense", "reference", "grouped_mm"]
    assert len(printed.splitlines()) == 4
    for row in rows:
        seconds = row["milliseconds"] / 1e3
        assert math.isclose(row["tokens_per_second"], 64 / seconds)
        # Two matrices of 192 x 768, two experts a token, 2 FLOPs a multiply-add, backward twice the forward.
        assert math.isclose(row["tflops"], 64 * 2 * 2 * 192 * 768 * 2 * 3 / seconds / 1e12)


def test_the_blocks_at_the_peak():
    sys.path.insert(0, str(SCRIPT.parent))
    from bench import peak_of  # type: ignore

    events = [("alloc", 1, 3), ("alloc", 2, 4), ("free_requested", 1, 3), ("free_completed", 1, 3), ("alloc", 3, 2),
              ("alloc", 1, 5), ("free_completed", 2, 4), ("alloc", 4, 1)]  # fmt: skip
    assert peak_of([(action, address, size << 20) for action, address, size in events]) == [5, 4, 2]


def test_unknown_shape():
    result = subprocess.run([sys.executable, SCRIPT, "42m"], capture_output=True, text=True)
    assert result.returncode == 2
    assert "no shape '42m'" in result.stderr


def test_steps(tmp_path):
    record = tmp_path / "steps.jsonl"
    command = [
        sys.executable,
        SCRIPT,
        "steps",
        "--models",
        "test_tiny",
        "--experts",
        "1",
        "4",
        "--steps",
        "6",
    ]
    printed = subprocess.run(
        [*command, "--batch-size", "2", "--record", record], check=True, capture_output=True, text=True
    ).stdout
    dense, moe = (json.loads(line) for line in record.read_text().splitlines())
    assert printed.count("test_tiny") == 2
    assert (dense["experts"], moe["experts"]) == (1, 4)
    assert dense["parameters"] == dense["active_parameters"]
    assert moe["parameters"] > moe["active_parameters"]
    for row in (dense, moe):  # 2 sequences of 16 tokens a step
        assert math.isclose(row["tokens_per_second"], 32 / row["step_seconds"], rel_tol=0.5)
        assert row["data_seconds"] >= 0
