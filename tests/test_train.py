"""The loop's own promises: a step that is not finite changes nothing on any rank; sums over ranks are exact."""

import io
import json
import os
import shlex
import tarfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import open_lm.model
import open_lm.train
from open_lm.checkpoint.state import Shards
from open_lm.config import DataConfig, ModelFlags, MoEConfig
from open_lm.config.resolve import resolve_model
from open_lm.data.loader import TrainData
from open_lm.main import main
from open_lm.metrics import Progress, Skips
from open_lm.model import build

MOE = MoEConfig(freq=2, num_experts=4, capacity_factor=0)
DATA = DataConfig(dataset_type="synthetic", workers=0)

FLAGS = (
    "--model open_lm_test_tiny --dataset-type synthetic --precision fp32 --global-batch-size 8 --warmup 1 \
 --lr 1e-2 --train-num-samples 128 --epochs 5 --log-every-n-steps 1 --moe-freq 2 --moe-num-experts 4 --name run \
 --workers 0"
)


def poison(rank: int, *steps: int) -> None:
    """Makes the loss of some steps NaN, on one rank."""
    honest, calls = open_lm.model.linear_cross_entropy, []

    def linear_cross_entropy(*arguments, **options):
        loss = honest(*arguments, **options)
        calls.append(0)
        if len(calls) in steps and int(os.environ.get("RANK", "0")) == rank:
            nan = float("nan")
            return loss._replace(objective_sum=loss.objective_sum * nan, nll_BS=loss.nll_BS * nan)
        return loss

    open_lm.model.linear_cross_entropy = linear_cross_entropy


def run_poisoned(logs: str, layout: str) -> None:
    poison(1, 3)
    main(shlex.split(f"{FLAGS} --logs {logs} {layout}"))


def read(logs: Path) -> tuple[list[dict], list[dict], list[dict]]:
    """Training lines, and per interval the weights and the moments that were saved."""
    entries = [json.loads(line) for line in (logs / "run/log.jsonl").read_text().splitlines()]
    folder = logs / "run/checkpoints"
    epochs = [torch.load(folder / f"epoch_{n}.pt", weights_only=True) for n in range(1, 6)]
    states = [Shards(folder / f"step_{epoch['step']}") for epoch in epochs]
    moments = [{name: s.whole(key) for name, key in s.named("optimizer/").items()} for s in states]
    return [e for e in entries if "train/loss" in e], epochs, moments


def check_skipped(logs: Path) -> None:
    training, epochs, moments = read(logs)
    assert [e["train/skipped_updates"] for e in training] == [0, 0, 1, 1, 1]
    assert training[2]["train/loss"] == "nan"
    weights = [e["state_dict"] for e in epochs]
    for name in weights[0]:
        assert torch.equal(weights[1][name], weights[2][name]), name
        assert weights[4][name].isfinite().all()
    assert len(moments[1]) > len(weights[0])
    for name, value in moments[1].items():
        assert torch.equal(value, moments[2][name]), name
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
    (path,) = (tmp_path / "run/checkpoints").glob("step_*/state.json")
    assert json.loads(path.read_text())["state"]["loss_scale"]["value"] == 2.0 ** (40 - skipped[-1])


def test_a_run_that_stays_not_finite_ends(tmp_path) -> None:
    with pytest.raises(RuntimeError, match="not finite 3 times in a row"):
        main(shlex.split(f"{FLAGS} --logs {tmp_path} --lr 1e30 --max-skipped-updates 3"))


@pytest.mark.parametrize("limit", [5, 6])
def test_a_row_ends_the_run_at_the_step_that_makes_it_full(tmp_path, monkeypatch, limit) -> None:
    """Steps 3 to 7, and hardly any log line."""
    monkeypatch.setattr(open_lm.model, "linear_cross_entropy", open_lm.model.linear_cross_entropy)
    poison(0, *range(3, 8))
    flags = f"{FLAGS} --logs {tmp_path} --epochs 1 --train-num-samples 1536 --log-every-n-steps 100"
    line = shlex.split(f"{flags} --max-skipped-updates {limit}")
    if limit == 5:
        with pytest.raises(RuntimeError, match=r"step 7: .*not finite 5 times in a row"):
            main(line)
    else:
        main(line)
    assert (tmp_path / "run/debug").exists() == (limit == 5)


def test_the_run_ends_with_the_weights_of_the_rows_begin(tmp_path, monkeypatch) -> None:
    """From step 3 on."""
    monkeypatch.setattr(open_lm.model, "linear_cross_entropy", open_lm.model.linear_cross_entropy)
    flags = f"{FLAGS} --epochs 1 --train-num-samples 1536 --log-every-n-steps 100 --max-skipped-updates 4"
    poison(0, *range(3, 99))
    with pytest.raises(RuntimeError, match=r"step 6: .*not finite 4 times in a row"):
        main(shlex.split(f"{flags} --logs {tmp_path}"))
    debug = tmp_path / "run/debug"
    state = json.loads((debug / "state.json").read_text())
    assert (state["step"], state["loss"], state["progress"]["skipped_in_a_row"]) == (6, "nan", 4)
    data = TrainData(DATA, seq_len=16, vocab_size=16, rank=0, world_size=1, global_batch=8, seed=0)
    (batch,) = data.batches(5, 6)
    assert torch.equal(load_file(debug / "batch_rank_0.safetensors")["tokens"], batch.tokens_BS)
    monkeypatch.undo()
    main(shlex.split(f"{flags} --logs {tmp_path} --name short --max-steps 2"))
    (saved,) = (tmp_path / "short/checkpoints").glob("epoch_*.pt")
    before = torch.load(saved, weights_only=True)["state_dict"]
    for name, value in load_file(debug / "weights.safetensors").items():
        assert torch.equal(value, before[name]), name


def logit_means(logs: str, layout: str) -> None:
    main(
        shlex.split(
            f"{FLAGS} --logs {logs} --epochs 2 --moe-capacity-factor 0 --moe-loss-weight 0 "
            f"--log-logit-mean {layout}"
        )
    )


def test_logit_mean_is_of_all_ranks_and_micro_batches(spawn, tmp_path) -> None:
    logit_means(str(tmp_path / "one"), "")
    spawn(2, logit_means, str(tmp_path / "two"), "--accum-freq 2")
    spawn(1, logit_means, str(tmp_path / "none"), "--no-log-logit-mean")
    one, two, none = (read_lines(tmp_path / name) for name in ("one", "two", "none"))
    model = build(resolve_model(ModelFlags(model="open_lm_test_tiny"), MOE, ()), "cpu", seed=0)
    data = TrainData(DATA, seq_len=16, vocab_size=16, rank=0, world_size=1, global_batch=8, seed=0)
    with torch.no_grad():
        expected = model(next(data.batches(0, 1)).tokens_BS).logits_BSV.mean().item()
    assert one[0]["train/logit_mean"] == pytest.approx(expected, rel=1e-4)
    for a, b in zip(one, two, strict=True):
        assert b["train/logit_mean"] == pytest.approx(a["train/logit_mean"], rel=1e-3, abs=1e-6)
    assert all("train/logit_mean" not in entry for entry in none)


def read_lines(logs: Path) -> list[dict]:
    entries = [json.loads(line) for line in (logs / "run/log.jsonl").read_text().splitlines()]
    return [e for e in entries if "train/loss" in e]


def test_the_formula_of_mfu_is_said_once_on_a_gpu(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("open_lm.main.device_name", lambda device: "a GPU")
    monkeypatch.setattr("open_lm.main.says_mfu", lambda device: True)
    logit_means(str(tmp_path), "")
    assert capsys.readouterr().out.count("MFU = tokens/s/GPU") == 1


def train_in_stored_order(manifest: str, logs: str) -> None:
    flags = FLAGS.replace("--dataset-type synthetic", f"--dataset-manifest {manifest} --data-key json")
    main(shlex.split(f"{flags} --disable-buffer --epochs 1 --logs {logs}"))


def test_bad_samples_of_every_rank_are_counted(spawn, tmp_path) -> None:
    """One batch of 8 in stored order: the last two, which are the second rank's, are too short."""
    with tarfile.open(tmp_path / "shard_00000000.tar", "w") as tar:
        for sample in range(8):
            data = json.dumps([0] * (5 if sample > 5 else 17)).encode()
            member = tarfile.TarInfo(f"{sample:08d}.json")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_text(json.dumps({"shard": "shard_00000000", "num_sequences": 8}))
    spawn(2, train_in_stored_order, str(manifest), str(tmp_path / "logs"))
    (line,) = read_lines(tmp_path / "logs")
    assert line["train/bad_samples"] == 2
    text = (tmp_path / "logs/run/out.log").read_text()
    for sample in (6, 7):  # by the second rank; the first one's log names them
        assert f"shard_00000000.tar: sample 0000000{sample}.json has 5 tokens, 17 are needed: ignored" in text


def test_randomness_is_of_seed_step_and_rank() -> None:
    def draw(*of: int) -> tuple[float, ...]:
        open_lm.train.seed_randomness_(*of)
        return tuple(torch.rand(4).tolist())

    assert draw(0, 5, 1) == draw(0, 5, 1)
    assert len({draw(seed, step, rank) for seed in (0, 1) for step in (0, 1, 5, 10) for rank in (0, 1)}) == 16
    assert draw(1, 10, 0) != draw(11, 0, 0)


def test_a_row_of_skips_from_before_a_resume_counts_if_it_goes_on():
    good, bad = torch.tensor(True), torch.tensor(False)
    for next_step, row in ((good, 0), (bad, 4)):
        progress = Progress(skipped_updates=3, skipped_in_a_row=3)
        skips = Skips(progress, torch.device("cpu"))
        skips.add_(next_step, next_step)
        skips.read(progress)
        assert progress.skipped_in_a_row == row
