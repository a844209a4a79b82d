"""The text log, strict JSON, and how a run's end is told."""

import json
import logging
import shlex

import pytest

from open_lm.config.check import check
from open_lm.config.parse import parse
from open_lm.log import Log, OutLog
from open_lm.main import main
from open_lm.parallel.refusal import refusing

RUN = "--model open_lm_test_tiny --dataset-type synthetic --precision fp32 --global-batch-size 8 --epochs 4 \
 --train-num-samples 640 --lr 1e-2 --warmup 2 --log-every-n-steps 1 --workers 0 --max-steps 4"


def test_log_jsonl_is_strict_json(tmp_path) -> None:
    log = Log(tmp_path, rank=0)
    log.metrics({"tokens": 3, "train/loss": float("nan"), "deep": [{"a": float("-inf")}]}, 1)
    log.close()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    (line,) = (tmp_path / "log.jsonl").read_text().splitlines()
    read = json.loads(line, parse_constant=refuse)
    assert (read["train/loss"], read["deep"][0]["a"]) == ("nan", "-inf")


def test_debug_says_more(tmp_path) -> None:
    for name, flag in (("quiet", ""), ("debug", "--debug")):
        main(shlex.split(f"{RUN} --logs {tmp_path} --name {name} {flag}"))
    quiet, debug = ((tmp_path / name / "out.log").read_text() for name in ("quiet", "debug"))
    assert "DEBUG" not in quiet
    assert "DEBUG | main.py" in debug
    assert "output.weight: (16, 16) torch.float32" in debug
    assert "'train/loss': " in debug
    assert not logging.getLogger("open_lm").handlers


def test_report_to_is_checked_before_any_work(monkeypatch) -> None:
    def refused(value: str) -> str:
        with pytest.raises(ValueError) as error:
            check(*parse(shlex.split(f"{RUN} --report-to '{value}'")))
        return str(error.value)

    assert "--report-to wandb,tensorbord: expected wandb, tensorboard, all" in refused("wandb,tensorbord")
    assert "expected" in refused("all,x")
    for value, targets in (("all", 2), ("wandb, tensorboard", 2), ("wandb", 1), ("", 0)):
        run, given = parse(shlex.split(f"{RUN} --report-to '{value}'"))
        check(run, given)
        assert len(run.log.targets) == targets
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "wandb is missing; install it: pip install wandb" in refused("wandb")


def test_what_ends_a_run_is_in_its_logs_without_secrets(tmp_path, monkeypatch) -> None:
    def fail(*_, **__) -> None:
        raise RuntimeError("lost https://me:hunter2@store.example/x")

    monkeypatch.setattr("open_lm.main.train", fail)
    with pytest.raises(RuntimeError, match="lost"):
        main(shlex.split(f"{RUN} --logs {tmp_path} --name run"))
    reason = "RuntimeError: lost https://store.example/x"
    assert f"ERROR | the run ends by an error: {reason}" in (tmp_path / "run/out.log").read_text()
    failed = json.loads((tmp_path / "run/log.jsonl").read_text().splitlines()[-1])
    assert failed.pop("time") > 0
    assert failed == {"failed": reason}


def test_what_is_refused_while_the_log_is_open_is_in_it(tmp_path, monkeypatch) -> None:
    def refuse(*_, **__) -> None:
        with refusing():
            raise ValueError("this file is damaged")

    monkeypatch.setattr("open_lm.main.train", refuse)
    with pytest.raises(SystemExit):
        main(shlex.split(f"{RUN} --logs {tmp_path} --name run"))
    assert "the run ends by an error: this file is damaged" in (tmp_path / "run/out.log").read_text()
    assert '{"failed": "this file is damaged"' in (tmp_path / "run/log.jsonl").read_text()


def test_a_full_disk_costs_lines_of_out_log_and_nothing_else(capsys) -> None:
    handler = OutLog("/dev/full")
    for number in range(3):
        handler.handle(logging.LogRecord("open_lm", logging.INFO, __file__, 1, "line %d", (number,), None))
    handler.close()
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith("/dev/full misses lines from here on: [Errno 28] No space left on device")
