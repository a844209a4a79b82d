"""What a run finds when it is started again: an evaluation that is owed, a damaged checkpoint, other flags."""

import json
import shlex
from pathlib import Path

import pytest

from open_lm.main import main


def run(sources: list[str], logs: Path, extra: str = "") -> None:
    main(
        shlex.split(
            f"--model open_lm_test_tiny --precision fp32 --data-key json --dataset-manifest {sources[0]} "
            f"--train-num-samples 256 --global-batch-size 8 --epochs 2 --warmup 1 --lr 1e-2 --workers 0 "
            f"--logs {logs} --name run {extra}"
        )
    )


def results(logs: Path) -> list[dict]:
    path = logs / "run/checkpoints/results.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture
def trained(sources, tmp_path) -> Path:
    """A run of two intervals of two steps, without any evaluation."""
    run(sources, tmp_path)
    return tmp_path


def test_an_owed_evaluation_is_made_up(sources, trained, capsys) -> None:
    evaluated = f"--resume latest --val-data {sources[2]}"
    run(sources, trained, evaluated)
    (line,) = results(trained)
    assert line["step"] == 4
    assert "step 4 has a checkpoint but no evaluation" in capsys.readouterr().out
    run(sources, trained, evaluated)  # nothing is owed any more
    assert results(trained) == [line]
    run(sources, trained, f"{evaluated} {sources[0]}")  # another entry
    assert [r["val_data"] for r in results(trained)[1:]] == [[sources[2]], [sources[0]]]


def test_one_killed_before_the_last_interval_is_made_up_too(sources, tmp_path) -> None:
    run(sources, tmp_path, "--max-steps 2")
    run(sources, tmp_path, f"--resume latest --val-data {sources[2]}")
    assert [r["step"] for r in results(tmp_path)] == [2, 4]


def test_a_checkpoint_that_is_passed_over_is_said(sources, trained, capsys) -> None:
    (trained / "run/checkpoints/optimizer_2.pt").write_text("garbage")
    run(sources, trained, "--resume latest")
    out = capsys.readouterr().out
    assert "epoch_2.pt is passed over" in out
    assert "resumed" in out
    assert "epoch_2.pt is passed over" in (trained / "run/out.log").read_text()


def test_a_fine_tuning_run_is_started_again_by_the_same_command(sources, trained, tmp_path, capsys) -> None:
    first = trained / "run/checkpoints/epoch_2.pt"
    same = f"--pretrained {first} --resume latest --name tuned"
    run(sources, tmp_path, f"{same} --max-steps 2")
    assert f"weights from {first}" in capsys.readouterr().out
    run(sources, tmp_path, same)
    out = capsys.readouterr().out
    assert "weights from" not in out
    assert f"resumed {tmp_path}/tuned/checkpoints/epoch_1.pt at step 2" in out
    soup = f"--average {first} {first} --resume latest --name soup"
    run(sources, tmp_path, f"{soup} --max-steps 2")
    assert "weights: 0.5 * " in capsys.readouterr().out
    run(sources, tmp_path, soup)
    assert f"resumed {tmp_path}/soup/checkpoints/epoch_1.pt at step 2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("--resume latest --train-num-samples 512", "--train-num-samples 512, but"),
        ("--logs /dev/null/logs", "--logs /dev/null/logs: /dev/null/logs/run cannot be made"),
    ],
)
def test_what_is_refused(sources, trained, capsys, extra, message) -> None:
    before = (trained / "run/checkpoints/epoch_1.pt").read_bytes()
    with pytest.raises(SystemExit) as stop:
        run(sources, trained, extra)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert (trained / "run/checkpoints/epoch_1.pt").read_bytes() == before
