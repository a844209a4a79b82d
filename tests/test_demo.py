"""The demo in small: every command it prints runs, the numbers reach the table and the report."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from open_lm.config.check import check
from open_lm.config.parse import parse

ROOT = Path(__file__).parents[1]


def load_demo():
    """moe/demo.py as a module: `moe` is no package."""
    spec = importlib.util.spec_from_file_location("demo", ROOT / "moe" / "demo.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["demo"] = module
    spec.loader.exec_module(module)
    return module


def test_both_models_get_the_same_flags_but_for_the_experts(tmp_path):
    demo = load_demo()
    settings = demo.Demo(logs=tmp_path)
    runs = {}
    for name in demo.RUNS:
        run, given = parse(demo.train_flags(settings, tmp_path, name))
        assert not check(run, given)
        runs[name] = run
        run, given = parse(demo.evaluate_flags(settings, tmp_path, name))
        assert not check(run, given)
        assert run.checkpoint.resume == str(tmp_path / name / "checkpoints" / "epoch_1.pt")
    assert runs["dense"].optim == runs["moe"].optim
    assert runs["dense"].data == runs["moe"].data
    assert runs["dense"].model == runs["moe"].model
    assert (runs["moe"].moe.freq, runs["moe"].moe.num_experts, runs["moe"].moe.top_k) == (2, 8, 2)
    assert runs["dense"].moe.freq == 0
    assert runs["moe"].data.train_num_samples == settings.steps * 8 * 256


def test_finds_a_free_folder(tmp_path):
    demo = load_demo()
    assert demo.free_folder(tmp_path / "demo") == tmp_path / "demo"
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo-2").mkdir()
    assert demo.free_folder(tmp_path / "demo") == tmp_path / "demo-3"


@pytest.mark.slow
def test_runs_to_the_end_and_fails_when_nothing_was_learned(tmp_path):
    command = [sys.executable, str(ROOT / "moe" / "demo.py"), "--steps", "2", "--seq-len", "32"]
    command += ["--global-batch-size", "64", "--megabytes-per-source", "3", "--record", "record.jsonl"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "not below half of the unigram" in done.stderr
    logs = tmp_path / "logs" / "demo"
    page = (logs / "report.html").read_text(encoding="utf-8")
    for name in ("dense", "moe"):
        lines = (logs / name / "checkpoints" / "results.jsonl").read_text().splitlines()
        entries = [json.loads(line) for line in lines]
        assert [Path(e["val_data"][0]).parts[-3] for e in entries] == ["prose", "code"]
        for entry in entries:
            assert f"{entry['perplexity']:,.1f}" in done.stdout
            assert f"{entry['perplexity']:,.1f}" in page
    unigram = json.loads((tmp_path / "corpus" / "corpus.json").read_text())["held_out_unigram_perplexity"]
    assert all(f"{value:,.1f}" in page for value in unigram.values())
    recorded = [json.loads(line) for line in (tmp_path / "record.jsonl").read_text().splitlines()]
    assert [r["run"] for r in recorded] == ["dense", "moe"]
    assert all(r["perplexity"].keys() == r["unigram"].keys() == {"both", "prose", "code"} for r in recorded)
    assert all(r["tokens"] == 2 * 64 * 32 for r in recorded)
