"""The loop's own promises: a step that is not finite changes nothing on any rank; sums over ranks are exact."""

import json
import os
import shlex
from pathlib import Path

import pytest
import torch

import open_lm.model
import open_lm.train
from open_lm.main import main

FLAGS = (
    "--model open_lm_test_tiny --dataset-type synthetic --precision fp32 --global-batch-size 8 --warmup 1 \
 --lr 1e-2 --train-num-samples 128 --epochs 5 --log-every-n-steps 1 --moe-freq 2 --moe-num-experts 4 --name run \
 --workers 0"
)


def poison(step: int, rank: int) -> None:
    """Makes the loss of one step NaN, on one rank."""
    honest, calls = open_lm.model.linear_cross_entropy, []

    def linear_cross_entropy(*arguments, **options):
        loss = honest(*arguments, **options)
        calls.append(0)
        if len(calls) == step and int(os.environ.get("RANK", "0")) == rank:
            nan = float("nan")
            return loss._replace(objective_sum=loss.objective_sum * nan, nll_BS=loss.nll_BS * nan)
        return loss

    open_lm.model.linear_cross_entropy = linear_cross_entropy


def run_poisoned(logs: str, layout: str) -> None:
    poison(step=3, rank=1)
    main(shlex.split(f"{FLAGS} --logs {logs} {layout}"))


def read(logs: Path) -> tuple[list[dict], list[dict], list[dict]]:
    """Training lines, and per interval the weights and the moments that were saved."""
    entries = [json.loads(line) for line in (logs / "run/log.jsonl").read_text().splitlines()]
    saved = [
        [torch.load(logs / f"run/checkpoints/{kind}_{n}.pt", weights_only=True) for n in range(1, 6)]
        for kind in ("epoch", "optimizer")
    ]
    return [e for e in entries if "train/loss" in e], saved[0], saved[1]


def check_skipped(logs: Path) -> None:
    training, epochs, optimizers = read(logs)
    assert [e["train/skipped_updates"] for e in training] == [0, 0, 1, 1, 1]
    assert training[2]["train/loss"] == "nan"
    weights = [e["state_dict"] for e in epochs]
    moments = [o["optimizer"]["state"] for o in optimizers]
    for name in weights[0]:
        assert torch.equal(weights[1][name], weights[2][name]), name
        assert weights[4][name].isfinite().all()
        for key, value in moments[1][name].items():
            assert torch.equal(value, moments[2][name][key]), (name, key)
    assert not torch.equal(weights[2]["output.weight"], weights[3]["output.weight"])
    assert [e["step"] for e in epochs] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("layout", ["", "--fsdp"], ids=["ddp", "fsdp"])
def test_one_ranks_nan_skips_the_update_of_all(spawn, tmp_path, layout) -> None:
    spawn(2, run_poisoned, str(tmp_path), layout)
    check_skipped(tmp_path)
    assert "these updates were skipped on all ranks (1 so far)" in (tmp_path / "run/out.log").read_text()


def test_fp16_lowers_its_scale_until_gradients_fit(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("open_lm.main.LossScale", lambda: open_lm.train.LossScale(2.0**40))
    main(shlex.split(f"{FLAGS} --logs {tmp_path} --precision fp16 --epochs 60 --save-frequency 0"))
    entries = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    skipped = [e["train/skipped_updates"] for e in entries if "train/loss" in e]
    assert 5 < skipped[-1] < 50
    assert skipped[-1] == skipped[-5]
    stats = torch.load(tmp_path / "run/checkpoints/stats_60.pt", weights_only=True)
    assert stats["state"]["loss_scale"]["value"] == 2.0 ** (40 - skipped[-1])


def test_a_run_that_stays_not_finite_ends(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(open_lm.train, "MAX_SKIPS", 3)
    with pytest.raises(RuntimeError, match="not finite 3 times in a row"):
        main(shlex.split(f"{FLAGS} --logs {tmp_path} --lr 1e30"))
