"""moe/curves.py: a backend that learns something else is told from one that does not."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "moe"))
import curves


@pytest.mark.parametrize(("worse", "status"), [(0.01, 0), (0.2, 1)])
def test_a_backend_is_measured_by_the_noise_of_another_seed(worse, status, monkeypatch, tmp_path, capsys):
    def run(config, model, backend, seed, logs):
        noise = 0.05 if seed == 2 else 0.0
        return {"commit": "c"}, [10.0 - 0.1 * i + noise + worse * (backend == "triton") for i in range(30)]

    monkeypatch.setattr(curves, "run", run)
    record = tmp_path / "record.jsonl"
    config = curves.Curves(models=("41m",), backends=("reference", "triton"), record=record)
    assert curves.main(config) == status
    (line,) = [json.loads(text) for text in record.read_text().splitlines()]
    assert line["noise"] == pytest.approx(0.05)
    assert line["difference"] == {"triton": pytest.approx(worse)}
    assert len(line["losses"]["triton"]) == 30
    assert "41m" in capsys.readouterr().out


def test_it_runs_the_ordinary_command(tmp_path):
    record = tmp_path / "record.jsonl"
    config = curves.Curves(
        models=("open_lm_test_tiny",), backends=("reference", "grouped_mm"), steps=6, every=2, batch_size=2,
        precision="fp32", record=record,
    )  # fmt: skip
    assert curves.main(config) == 0
    line = json.loads(record.read_text())
    assert line["losses"]["grouped_mm"] == pytest.approx(line["losses"]["reference"], abs=1e-5)
    assert line["noise"] > 1e-3
