"""The --moe flags as users type them: each trains, is said, resumes bitwise, is evaluated."""

import io
import json
import shlex
import tarfile
from pathlib import Path

import pytest
import torch

from open_lm.config.moe import RouterName
from open_lm.main import main
from open_lm.moe.routers import ROUTERS
from open_lm.report import write_report

RUN = "--model open_lm_test_tiny --dataset-type synthetic --precision fp32 --global-batch-size 8 --warmup 1 \
 --lr 1e-2 --train-num-samples 384 --epochs 2 --log-every-n-steps 1 --workers 0 --name run --moe-num-experts 4"
STATIC = "--moe-freq 1 --moe-capacity-factor 0"


def train(logs: Path, extra: str) -> list[dict]:
    """Six steps of 128 tokens unless `extra` says otherwise; the training lines."""
    main(shlex.split(f"{RUN} --logs {logs} {extra}"))
    entries = [json.loads(line) for line in (logs / "run/log.jsonl").read_text().splitlines()]
    return [entry for entry in entries if "train/loss" in entry]


def weights(logs: Path, number: int) -> dict[str, torch.Tensor]:
    return torch.load(logs / f"run/checkpoints/epoch_{number}.pt", weights_only=True)["state_dict"]


def text(logs: Path, name: str = "run") -> str:
    return (logs / name / "out.log").read_text()


def evaluate(logs: Path, held_out: str, extra: str = "", number: int = 2) -> dict:
    main(
        shlex.split(
            f"--model open_lm_test_tiny --precision fp32 --data-key json --workers 0 --logs {logs} "
            f"--name evaluation --val-data {held_out} --resume {logs}/run/checkpoints/epoch_{number}.pt {extra}"
        )
    )
    lines = [json.loads(line) for line in (logs / "evaluation/log.jsonl").read_text().splitlines()]
    return [line for line in lines if "valid/loss" in line][-1]


@pytest.mark.parametrize(
    "extra",
    [
        "--moe-freq 1 --moe-expert-bias --moe-init scaled --no-moe-output-bias --moe-balance global",
        "--moe-freq 1 --moe-balance sequence importance --moe-loss-weight .1 .01 --moe-jitter .01 "
        "--moe-noise rsample --moe-drop-policy random",
        "--moe-freq 1 --moe-num-experts 2 4 --moe-balance first_choice --moe-drop-policy choice",
        "--moe-layers 1 --moe-top-k 1 --moe-residual",
        "--moe-layer-pattern [0]+[1] --moe-ffn-type swiglu --moe-shared-mix gate --moe-shared-hidden-dim 8",
        "--moe-freq 1 --moe-first-dense 1 --moe-straight-through --moe-normalize-after-drops --moe-dense-after "
        "--moe-dense-before",
        "--moe-freq 1 --moe-normalize-weights --moe-num-groups 2 --moe-weight-scale 2.5 "
        "--moe-capacity-per sequence --moe-score sigmoid",
    ],
    ids=lambda extra: extra.split("--moe-")[-1].split()[0],
)
def test_each_flag_trains_resumes_bitwise_and_is_evaluated(sources, tmp_path, extra) -> None:
    once = train(tmp_path / "once", extra)
    train(tmp_path / "twice", f"{extra} --max-steps 3")
    twice = train(tmp_path / "twice", f"{extra} --resume latest")
    assert [line["step"] for line in twice] == [1, 2, 3, 4, 5, 6]
    assert [line["train/loss"] for line in once] == [line["train/loss"] for line in twice]
    one, two = weights(tmp_path / "once", 2), weights(tmp_path / "twice", 2)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert all(line["train/router_loss"] > 0 for line in once)
    for line in once:
        sizes = [len(layer["share"]) for layer in line["router"]]
        one_layer = any(
            flag in extra for flag in ("--moe-layers", "--moe-layer-pattern", "--moe-first-dense")
        )
        assert [layer["layer"] for layer in line["router"]] == ([1] if one_layer else [0, 1])
        assert sizes == ([2, 4] if "experts 2 4" in extra else [4] * len(sizes))
    result = evaluate(tmp_path / "twice", sources[2])
    assert 0 < result["valid/loss"] < 4
    write_report([tmp_path / "twice/run"], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "Router losses, weighted" in page
    assert ("log 4: undecided" in page) == ("experts 2 4" not in extra)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_bias_resumes_bitwise_and_is_evaluated(sources, tmp_path, precision) -> None:
    extra = f"{STATIC} --moe-balance bias --moe-bias-rate .01 --averagers ema_0.5_1 --precision {precision}"
    once = train(tmp_path / "once", extra)
    train(tmp_path / "twice", f"{extra} --max-steps 3")
    half = weights(tmp_path / "twice", 1)
    train(tmp_path / "twice", f"{extra} --resume latest")
    one, two = weights(tmp_path / "once", 2), weights(tmp_path / "twice", 2)
    assert all(torch.equal(one[name], two[name]) for name in one)
    names = [name for name in one if name.endswith("router.bias_E")]
    assert len(names) == 2
    ema = torch.load(tmp_path / "twice/run/checkpoints/ema_0.5_1_2.pt", weights_only=True)["av_model_sd"]
    for number, name in enumerate(names):
        assert one[name].dtype == one[name.replace("bias_E", "layer.weight")].dtype == torch.float32
        assert one[name].abs().max() > 0
        assert not torch.equal(one[name], half[name])
        assert torch.equal(ema[name], one[name])
        assert not torch.equal(
            ema[name.replace("bias_E", "layer.weight")], one[name.replace("bias_E", "layer.weight")]
        )
        assert once[-1]["router"][number]["largest_bias"] == one[name].abs().max().item()
        assert abs(one[name].mean()) < 1e-6
    if precision != "fp32":
        return
    assert once[-1]["train/router_loss"] == 0
    own = evaluate(tmp_path / "twice", sources[2])
    assert own["valid/loss"] == evaluate(tmp_path / "once", sources[2])["valid/loss"]
    path = tmp_path / "twice/run/checkpoints/epoch_2.pt"
    saved = torch.load(path, weights_only=True)
    for name in names:
        saved["state_dict"][name] *= -20
    torch.save(saved, path)
    assert evaluate(tmp_path / "twice", sources[2])["valid/loss"] != own["valid/loss"]
    write_report([tmp_path / "once/run"], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "Largest bias of an expert" in page
    assert "<th>largest bias</th>" in page


def test_a_checkpoint_without_biases_starts_them_at_zero(sources, tmp_path, capsys) -> None:
    train(tmp_path / "aux", f"{STATIC} --moe-loss-weight .01")
    start = tmp_path / "aux/run/checkpoints/epoch_2.pt"
    train(tmp_path / "tuned", f"{STATIC} --moe-balance bias --pretrained {start}")
    assert "was trained without --moe-balance bias: the routers' biases start at 0" in text(
        tmp_path / "tuned"
    )
    biases = [w for name, w in weights(tmp_path / "tuned", 1).items() if "bias_E" in name]
    # three steps of 1e-3, recentred
    assert all(0 < bias.abs().max() <= 3 * 1.5 * 1e-3 + 1e-6 for bias in biases)
    train(tmp_path / "aux", f"{STATIC} --moe-balance bias --resume latest --epochs 3")
    assert "biases start at 0" in text(tmp_path / "aux")


def test_a_checkpoint_with_biases_does_not_lose_them(sources, tmp_path, capsys) -> None:
    train(tmp_path / "bias", f"{STATIC} --moe-balance bias --moe-bias-rate .01")
    start = tmp_path / "bias/run/checkpoints/epoch_2.pt"
    with pytest.raises(SystemExit) as stop:
        train(tmp_path / "tuned", f"{STATIC} --moe-balance aux --pretrained {start}")
    assert stop.value.code == 2
    assert "Add bias to --moe-balance; with --moe-bias-rate 0 the biases stay" in capsys.readouterr().err
    train(tmp_path / "kept", f"{STATIC} --moe-balance aux bias --moe-bias-rate 0 --pretrained {start}")
    before, after = weights(tmp_path / "bias", 2), weights(tmp_path / "kept", 2)
    names = [name for name in before if "bias_E" in name]
    assert names
    assert all(torch.equal(before[name], after[name]) for name in names)
    soup = f"--average {start} {tmp_path}/kept/run/checkpoints/epoch_2.pt --average-coefficients .25 .75"
    train(tmp_path / "soup", f"{STATIC} --moe-balance bias --moe-bias-rate 0 {soup}")
    assert all(torch.allclose(before[n], weights(tmp_path / "soup", 2)[n]) for n in names)


def test_noise_depends_on_the_step_alone(tmp_path) -> None:
    """What is drawn between two steps, as for an average's loss, changes nothing."""
    extra = f"{STATIC} --moe-noise second_expert --moe-jitter .05 --averagers ema_0.5_1"
    train(tmp_path / "plain", extra)
    train(tmp_path / "logged", f"{extra} --log-avg-model-training-loss 1")
    one, two = weights(tmp_path / "plain", 2), weights(tmp_path / "logged", 2)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_what_is_said_at_the_start(sources, tmp_path, capsys) -> None:
    train(tmp_path, "--moe-freq 1 --moe-drop-policy probs --moe-eval-capacity-factor 0 --max-steps 3")
    said = capsys.readouterr().out
    for line in (
        "--moe-drop-policy probs sees later tokens in training; evaluation is causal",
        "--moe-backend auto: grouped_mm",
    ):
        assert line in said
        assert line in text(tmp_path)
    assert evaluate(tmp_path, sources[2], number=1)["valid/dropped_share"] == 0
    assert "sees later tokens in training; evaluation is causal" in text(tmp_path, "evaluation")
    other = "--moe-freq 1 --moe-num-experts 4 --moe-eval-capacity-factor .5 --moe-backend reference"
    evaluate(tmp_path, sources[2], other, number=1)
    evaluation = text(tmp_path, "evaluation")
    assert "sees later tokens in training and evaluation" in evaluation
    assert "| dropped " in evaluation
    train(tmp_path / "plain", "--moe-freq 1 --moe-backend reference --max-steps 1")
    assert "sees later" not in text(tmp_path / "plain")
    assert "--moe-backend auto" not in text(tmp_path / "plain")


def write_samples(folder: Path, filler: int) -> Path:
    """64 samples of which every second is too short to train on and consists of `filler`; their manifest."""
    folder.mkdir()
    with tarfile.open(folder / "shard_00000000.tar", "w") as tar:
        for sample in range(64):
            ids = [filler] * 9 if sample % 2 else [(sample * 7 + 3 * i) % 13 for i in range(17)]
            data = json.dumps(ids).encode()
            member = tarfile.TarInfo(f"{sample:08d}.json")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    manifest = folder / "manifest.jsonl"
    manifest.write_text(json.dumps({"shard": "shard_00000000", "num_sequences": 64}))
    return manifest


def test_short_samples_are_not_routed(tmp_path) -> None:
    """What stands in samples that are not trained on changes nothing, though experts are full."""
    entries = []
    for filler in (1, 14):
        logs = tmp_path / f"logs_{filler}"
        manifest = write_samples(tmp_path / f"data_{filler}", filler)
        data = f"--dataset-manifest {manifest} --data-key json --val-data {manifest}"
        run = RUN.replace("--dataset-type synthetic", data)
        extra = "--moe-freq 1 --moe-capacity-factor .5 --max-steps 3"
        main(
            shlex.split(f"{run} --logs {logs} {extra} --averagers ema_0.5_1 --log-avg-model-training-loss 1")
        )
        entries.append([json.loads(line) for line in (logs / "run/log.jsonl").read_text().splitlines()])
    seen = (
        "train/loss",
        "train/router_loss",
        "train/ema_0.5_1_loss",
        "router",
        "valid/loss",
        "valid/dropped_share",
    )
    one, two = ([{k: line[k] for k in seen if k in line} for line in lines] for lines in entries)
    assert one == two
    training = [line for line in entries[0] if "train/loss" in line]
    assert [line["train/bad_samples"] > 0 for line in training] == [True] * 3
    assert all(layer["dropped_share"] > 0.3 for line in training for layer in line["router"])
    assert any(line.get("valid/dropped_share", 0) > 0.3 for line in one)


@pytest.mark.parametrize("router", [name for name in RouterName.__args__ if name in ROUTERS])
def test_every_router_trains_and_is_evaluated(sources, tmp_path, router) -> None:
    training = train(tmp_path, f"--moe-freq 1 --moe-router {router} --moe-top-k 2")
    assert len(training) == 6
    assert all(len(layer["share"]) == 4 for layer in training[-1]["router"])
    assert 0 < evaluate(tmp_path, sources[2])["valid/loss"] < 4
