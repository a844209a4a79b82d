"""Averages of weights: arithmetic, sharding, swapped in and out, in a run's files and on its command line."""

import json
import os
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from open_lm import checkpoint
from open_lm.averaging import Average, averaged, averaged_loss
from open_lm.checkpoint import files
from open_lm.config.averaging import parse_averagers
from open_lm.config.distributed import DistributedConfig
from open_lm.config.model import ModelConfig
from open_lm.config.moe import MoEConfig
from open_lm.data.batches import Batch
from open_lm.main import main
from open_lm.parallel import mesh, plan
from open_lm.report.runs import read_run

TIED = ModelConfig(
    dim=32, n_layers=2, n_heads=2, seq_len=16, vocab_size=64, weight_tying=True,
    moe=MoEConfig(freq=2, num_experts=3, top_k=2, capacity_factor=0),
)  # fmt: skip
ALONE = mesh.World(0, 0, 1, torch.device("cpu"), None)
LAYOUTS = {"ddp": DistributedConfig(), "fsdp": DistributedConfig(fsdp=True)}


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def make(world=ALONE, distributed=LAYOUTS["ddp"], precision="fp32", seed=1):
    return plan.parallelize(TIED, world=world, distributed=distributed, precision=precision, seed=seed)


def batch_of(sequences: int = 4, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, TIED.vocab_size, (sequences, TIED.seq_len + 1), generator=generator)
    targets = tokens[:, 1:].clone()
    targets[0, :5] = -100
    return Batch(tokens[:, :-1], targets, 0)


def steps(model, averages, count: int, start: int = 0) -> None:
    """Weights that change by the same numbers whatever the sharding."""
    for step in range(start, start + count):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1 + 0.1 * ((step * 7) % 5 - 2))
        for average in averages:
            average.step_()


def averages_of(model, names: str) -> list[Average]:
    return [Average(averager, model) for averager in parse_averagers(names)]


def whole(tensors) -> dict[str, torch.Tensor]:
    tensors = {name: t.detach() for name, t in dict(tensors).items()}
    return {n: (t.full_tensor() if isinstance(t, DTensor) else t).clone() for n, t in tensors.items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


# ---- arithmetic


def test_ema_is_torchs() -> None:
    model = make()
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    theirs.update_parameters(model)  # its first only copies
    (ours,) = averages_of(model, "ema_0.9")
    for step in range(7):
        steps(model, [ours], 1, step)
        theirs.update_parameters(model)
    assert same(ours.weights, whole(theirs.module.named_parameters()))
    assert "output.weight" not in ours.weights  # tied: once


@pytest.mark.parametrize(("name", "eta", "freq"), [("poly", 0, 1), ("poly_8", 8, 1), ("poly_2.5_3", 2.5, 3)])
def test_poly_is_the_papers(name, eta, freq) -> None:
    model = make()
    (ours,) = averages_of(model, name)
    expected = {n: p.detach().double() for n, p in model.named_parameters()}
    means, t = {n: torch.zeros_like(p) for n, p in expected.items()}, 0
    for step in range(10):
        steps(model, [ours], 1, step)
        if (step + 1) % freq:
            continue
        t += 1
        for n, p in model.named_parameters():
            expected[n] = (1 - (eta + 1) / (eta + t)) * expected[n] + (eta + 1) / (
                eta + t
            ) * p.detach().double()
            means[n] += p.detach()
    assert ours.counters() == {"step_counter": t + 1, "update_counter": 10 % freq + 1}
    for n, weights in ours.weights.items():
        torch.testing.assert_close(weights.double(), expected[n], rtol=1e-5, atol=1e-6)
        if eta == 0:
            torch.testing.assert_close(weights.double(), means[n] / t, rtol=1e-5, atol=1e-6)


def test_the_first_update_is_at_step_freq() -> None:
    model = make()
    (average,) = averages_of(model, "ema_0.5_3")
    before = whole(average.weights)
    steps(model, [average], 2)
    assert same(before, average.weights)
    steps(model, [average], 1, 2)
    assert not same(before, average.weights)


def test_constant_weights_stay_themselves() -> None:
    """With mul and add the rounding of gamma would move the average by 3e-4 in the end."""
    model = make()
    (average,) = averages_of(model, "ema_0.9999")
    before = whole(average.weights)
    for _ in range(2000):
        average.step_()
    assert same(before, average.weights)


def test_bf16_weights_have_an_average_in_fp32() -> None:
    model = make(precision="bf16")
    (average,) = averages_of(model, "ema_0.999")
    assert {w.dtype for w in average.weights.values()} == {torch.float32}
    before = average.weights["norm.weight"].clone()
    with torch.no_grad():
        model.norm.weight.add_(1)
    average.step_()
    torch.testing.assert_close(
        average.weights["norm.weight"] - before, torch.full_like(before, 1e-3), rtol=1e-2, atol=0
    )
    own = whole(model.named_parameters())
    with averaged(model, average):
        assert torch.equal(model.norm.weight.float(), average.weights["norm.weight"].bfloat16().float())
    assert same(own, whole(model.named_parameters()))


# ---- swapped in and out


@pytest.mark.filterwarnings("ignore")  # of torch.compile's own
@pytest.mark.parametrize("compiled", [False, True])
@torch.no_grad()
def test_averaged_weights_compute_and_own_come_back(compiled) -> None:
    model, other = make(), make(seed=2)
    if compiled:
        for block in model.layers:
            block.forward = torch.compile(block.forward, backend="eager")
    (average,) = averages_of(model, "poly")
    steps(model, [average], 3)
    own, tokens = whole(model.named_parameters()), batch_of().tokens_BS
    before = model(tokens).logits_BSV
    for name, parameter in other.named_parameters():
        parameter.copy_(average.weights[name])

    def fail() -> None:
        with averaged(model, average):
            torch.testing.assert_close(model(tokens).logits_BSV, other(tokens).logits_BSV)
            raise KeyError

    with pytest.raises(KeyError):  # an error in an evaluation must not leave the averaged weights there
        fail()
    assert same(own, whole(model.named_parameters()))
    assert torch.equal(model(tokens).logits_BSV, before)
    assert not torch.allclose(before, other(tokens).logits_BSV)


def test_averaged_loss_is_the_mean_over_tokens() -> None:
    model, other, batch = make(), make(seed=2), batch_of()
    (average,) = averages_of(model, "poly")
    steps(model, [average], 3)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            parameter.copy_(average.weights[name])
        expected = cross_entropy(other(batch.tokens_BS).logits_BSV.flatten(0, 1), batch.targets_BS.flatten())
    for micro in (1, 3, 4):
        found = averaged_loss(model, average, batch, micro_sequences=micro, precision="fp32", world=ALONE)
        assert found == pytest.approx(expected.item(), rel=1e-6)


# ---- several ranks


def on_ranks(folder: str) -> dict[str, tuple]:
    """Of each layout: averages, loss of one, logits after it; saves a checkpoint."""
    world = mesh.start(DistributedConfig())
    return {
        layout: average_in(world, layout, f"{folder}/{layout}")
        for layout in LAYOUTS
        if layout == "ddp" or world.mesh
    }


def average_in(world: mesh.World, layout: str, folder: str) -> tuple:
    model = make(world, LAYOUTS[layout])
    optimizer = torch.optim.AdamW(model.parameters())
    averages = averages_of(model, "ema_0.9,poly_1_2")
    steps(model, averages, 5)
    own = whole(plan.unwrap(model).named_parameters())
    batch = batch_of()
    part = slice(world.rank * 4 // world.world_size, (world.rank + 1) * 4 // world.world_size)
    batch = Batch(batch.tokens_BS[part], batch.targets_BS[part], 0)
    loss = averaged_loss(model, averages[0], batch, micro_sequences=1, precision="fp32", world=world)
    assert same(own, whole(plan.unwrap(model).named_parameters()))
    # what a forward pass leaves gathered is not what the next one computes with
    logits = model(batch_of().tokens_BS).logits_BSV.detach()
    checkpoint.save(folder, 1, model=model, optimizer=optimizer, state={"step": 5}, averages=averages)
    return [{n: t.numpy() for n, t in whole(a.weights).items()} for a in averages], loss, logits.numpy()


def load_on_ranks(path: str, folder: str) -> None:
    world = mesh.start(DistributedConfig())
    for layout, distributed in LAYOUTS.items():
        model, into = make(world, distributed, seed=2), f"{folder}/{layout}"
        averages = averages_of(model, "ema_0.9,poly_1_2")
        assert checkpoint.load_averages(path, averages, model) == []
        optimizer = torch.optim.AdamW(model.parameters())
        checkpoint.save(into, 1, model=model, optimizer=optimizer, state={"step": 5}, averages=averages)
        checkpoint.load_soup([path, f"{into}/epoch_1.pt", f"{into}/poly_1_2_1.pt"], [0.5, 2, -1], model)
        checkpoint.save(into, 2, model=model, optimizer=optimizer, state={"step": 6})


def test_ranks_average_load_and_add_up_as_one_process(spawn, tmp_path) -> None:
    expected, loss, logits = on_ranks(str(tmp_path / "one"))["ddp"]
    for rank in spawn(2, on_ranks, str(tmp_path / "two")):
        for averages, other_loss, other_logits in (rank["ddp"], rank["fsdp"]):
            for ours, theirs in zip(averages, expected, strict=True):
                assert ours.keys() == theirs.keys()
                assert all(np.array_equal(ours[name], theirs[name]) for name in ours)
            assert other_loss == pytest.approx(loss, rel=1e-6)
            np.testing.assert_allclose(other_logits, logits, rtol=1e-4, atol=1e-5)
    # saved by 2 ranks, loaded by 3, saved again
    spawn(3, load_on_ranks, str(tmp_path / "two/fsdp/epoch_1.pt"), str(tmp_path / "three"))
    for name in ("ema_0.9_1.pt", "poly_1_2_1.pt"):
        first, *others = (
            read(tmp_path / f / name) for f in ("one/ddp", "two/ddp", "two/fsdp", "three/ddp", "three/fsdp")
        )
        weights = first.pop("av_model_sd")
        for other in others:
            assert same(weights, other.pop("av_model_sd"))
            assert first == other
    for layout in LAYOUTS:
        three = tmp_path / "three" / layout
        parts = [tmp_path / "two/fsdp/epoch_1.pt", three / "epoch_1.pt", three / "poly_1_2_1.pt"]
        check_soup(read(three / "epoch_2.pt")["state_dict"], parts, [0.5, 2, -1])


def read(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def check_soup(found: dict[str, torch.Tensor], paths: list[Path], coefficients: list[float]) -> None:
    contents = [read(path) for path in paths]
    weights = [content.get("state_dict", content.get("av_model_sd")) for content in contents]
    for name, tensor in found.items():
        terms = [np.float32(c) * w[name].numpy() for c, w in zip(coefficients, weights, strict=True)]
        np.testing.assert_allclose(tensor.numpy(), sum(terms), rtol=1e-6, atol=1e-7)


# ---- files


def save(folder: Path, names: str = "ema_0.9,poly_1_2", number: int = 1, step: int = 5) -> tuple:
    model = make()
    averages = averages_of(model, names)
    steps(model, averages, step)
    optimizer = torch.optim.AdamW(model.parameters())
    path = checkpoint.save(
        folder, number, model=model, optimizer=optimizer, state={"step": step}, averages=averages
    )
    return path, averages


def test_files_have_open_lms_names_and_keys(tmp_path) -> None:
    path, (ema, _) = save(tmp_path, number=7)
    assert {p.name for p in tmp_path.iterdir()} == {
        "epoch_7.pt", "step_5", "ema_0.9_7.pt", "poly_1_2_7.pt",
    }  # fmt: skip
    assert checkpoint.averages_of_state(path) == ("ema_0.9", "poly_1_2")
    again = averages_of(make(seed=2), "ema_0.9,poly_1_2")
    assert checkpoint.load_averages(tmp_path / "step_5", again, make()) == []
    assert [(a.steps, same(a.weights, b.weights)) for a, b in zip(again, (ema, again[1]), strict=True)] == [
        (5, True),
        (5, True),
    ]
    poly = read(tmp_path / "poly_1_2_7.pt")
    assert (poly["method"], poly["eta"], poly["gamma"], poly["freq"]) == ("poly", 1, None, 2)
    assert (poly["step_counter"], poly["update_counter"], poly["step"]) == (3, 2, 5)
    weights = read(tmp_path / "ema_0.9_7.pt")["av_model_sd"]
    assert same({name: weights[name] for name in ema.weights}, ema.weights)
    assert weights.keys() == read(path)["state_dict"].keys()
    other = make(seed=2)
    rest = checkpoint.load_weights(tmp_path / "ema_0.9_7.pt", other)
    assert same(whole(other.named_parameters()), ema.weights)
    assert rest["step"] == 5
    assert checkpoint.read_model_config(tmp_path / "ema_0.9_7.pt") == checkpoint.read_model_config(path)


def test_open_lms_averages_load(tmp_path) -> None:
    path, (ema,) = save(tmp_path, "ema_0.9_2")
    expected = whole(ema.weights)
    theirs = read(tmp_path / "ema_0.9_2_1.pt")
    theirs = {key: theirs[key] for key in ("update_counter", "step_counter", "freq", "av_model_sd", "method")}
    theirs |= {"eta": None, "gamma": 0.9, "suffix_steps": None, "power": None, "start": None}
    theirs["av_model_sd"] = {f"_orig_mod.{name}": w for name, w in theirs["av_model_sd"].items()}
    torch.save(theirs, tmp_path / "ema_0.9_2_1.pt")
    model = make(seed=2)
    (average,) = averages_of(model, "ema_0.9_2")
    assert checkpoint.load_averages(path, [average], model) == []
    assert same(expected, average.weights)
    assert average.steps == 5


def test_files_that_do_not_belong_are_refused(tmp_path) -> None:
    path, _ = save(tmp_path)
    model = make(seed=2)
    averages = averages_of(model, "ema_0.9,poly_1_3")
    before = [whole(a.weights) for a in averages]
    assert checkpoint.load_averages(path, averages[1:], model) == ["poly_1_3"]
    shutil.copy(tmp_path / "poly_1_2_1.pt", tmp_path / "poly_1_3_1.pt")
    with pytest.raises(ValueError, match="another average than its name says"):
        checkpoint.load_averages(path, averages[1:], model)
    shutil.copy(path, tmp_path / "poly_1_3_1.pt")
    with pytest.raises(ValueError, match="not an average's file"):
        checkpoint.load_averages(path, averages[1:], model)
    save(tmp_path / "later", step=6)
    shutil.copy(tmp_path / "later/ema_0.9_1.pt", tmp_path / "ema_0.9_1.pt")
    with pytest.raises(ValueError, match=r"'epoch_1.pt': 5, 'ema_0.9_1.pt': 6"):
        checkpoint.load_averages(path, averages[:1], model)
    assert all(same(b, a.weights) for b, a in zip(before, averages, strict=True))
    assert checkpoint.load_averages(tmp_path / "step_5", averages, model) == ["poly_1_3"]
    assert averages[0].steps == 5


@pytest.mark.parametrize("renames", range(3))
def test_killed_between_renames(tmp_path, monkeypatch, renames) -> None:
    save(tmp_path, "ema_0.5", step=3)  # of other averages, and replaced
    done, replace = [], os.replace

    def kill(source, target):
        if len(done) == renames:
            raise KeyboardInterrupt
        done.append(target)
        replace(source, target)

    monkeypatch.setattr(files.os, "replace", kill)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path)
    monkeypatch.undo()
    path = checkpoint.latest(tmp_path)
    assert path == tmp_path / "epoch_1.pt"
    assert checkpoint.read_state(path)["step"] == 5
    assert not list(tmp_path.glob("*.tmp"))


def test_weights_that_cannot_be_written_are_made_later(tmp_path, monkeypatch) -> None:
    """The state is complete by then, and nothing unfinished is left."""
    write = files.write

    def fail(path, content):
        if path.name.startswith("poly"):
            raise OSError(28, "disk full")
        write(path, content)

    monkeypatch.setattr(files, "write", fail)
    with pytest.raises(OSError, match="disk full"):
        save(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["step_5"]
    with pytest.warns(UserWarning, match="disk full"):
        assert checkpoint.latest(tmp_path) == tmp_path / "step_5"
    monkeypatch.undo()
    assert checkpoint.latest(tmp_path) == tmp_path / "epoch_1.pt"
    assert (tmp_path / "poly_1_2_1.pt").exists()


# ---- the command line

RUN = (
    "--model open_lm_test_tiny --data-key json --precision fp32 --global-batch-size 8 --train-num-samples 640 \
 --epochs 4 --lr 1e-2 --warmup 2 --log-every-n-steps 1 --workers 0"  # 5 steps an interval, 20 in all
)


def command(sources: list[str], logs: Path, extra: str = "", name: str = "run") -> None:
    main(shlex.split(f"{RUN} --dataset-manifest {sources[0]} --logs {logs} --name {name} {extra}"))


def evaluation(sources: list[str], logs: Path, extra: str, name: str = "evaluation") -> None:
    main(
        shlex.split(
            f"--model open_lm_test_tiny --data-key json --precision fp32 --global-batch-size 8 --workers 0 \
 --val-data {sources[2]} --logs {logs} --name {name} {extra}"
        )
    )


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_six_steps_equal_three_and_three(sources, tmp_path) -> None:
    extra = "--averagers ema_0.9_2,poly_1 --epochs 2"
    command(sources, tmp_path / "once", f"{extra} --max-steps 6")
    command(sources, tmp_path / "twice", f"{extra} --max-steps 3")
    command(sources, tmp_path / "twice", f"{extra} --max-steps 6 --resume latest")
    for name in ("epoch_2.pt", "ema_0.9_2_2.pt", "poly_1_2.pt"):
        once, twice = (read(tmp_path / run / "run/checkpoints" / name) for run in ("once", "twice"))
        key = "state_dict" if "epoch" in name else "av_model_sd"
        assert same(once.pop(key), twice.pop(key))
        assert once == twice
    assert not same(read(tmp_path / "once/run/checkpoints/ema_0.9_2_2.pt")["av_model_sd"],
                    read(tmp_path / "once/run/checkpoints/epoch_2.pt")["state_dict"])  # fmt: skip


def test_a_run_evaluates_its_averages_and_so_do_their_files(sources, tmp_path) -> None:
    command(sources, tmp_path, f"--averagers ema_0.8_2,none,poly_2 --val-data {sources[2]} --epochs 2")
    folder = tmp_path / "run/checkpoints"
    results = lines(folder / "results.jsonl")
    assert [(r["step"], r["average"]) for r in results] == [
        (step, name) for step in (5, 10) for name in ("none", "ema_0.8_2", "poly_2")
    ]
    raw, ema, poly = results[3:]
    assert len({raw["loss"], ema["loss"], poly["loss"]}) == 3
    logged = [e for e in lines(tmp_path / "run/log.jsonl") if e.get("step") == 10 and "average" in e]
    assert logged[0]["valid/loss"] == raw["loss"]
    assert "valid/loss" not in logged[1]  # another curve
    assert logged[1]["valid/ema_0.8_2/loss"] == ema["loss"]
    assert logged[2]["valid/poly_2/perplexity"] == poly["perplexity"]

    evaluation(sources, tmp_path, f"--resume {folder}/epoch_2.pt --averagers poly_2,ema_0.8_2")
    assert [(r["step"], r["average"]) for r in lines(folder / "results.jsonl")[6:]] == [
        (10, "poly_2"),
        (10, "ema_0.8_2"),
    ]
    evaluation(sources, tmp_path, f"--resume {folder}/epoch_2.pt --averagers none,ema_0.8_2")
    again = lines(folder / "results.jsonl")[8:]
    assert [r["average"] for r in again] == ["none", "ema_0.8_2"]
    assert again[0]["loss"] == raw["loss"]
    assert again[1]["loss"] == ema["loss"]
    # the file by itself is a model like any other
    evaluation(sources, tmp_path, f"--pretrained {folder}/ema_0.8_2_2.pt")
    (alone,) = lines(folder / "results.jsonl")[10:]
    assert alone["loss"] == ema["loss"]
    command(sources, tmp_path, f"--pretrained {folder}/ema_0.8_2_2.pt --lr 0 --max-steps 1", name="tuned")
    assert same(
        read(tmp_path / "tuned/checkpoints/epoch_1.pt")["state_dict"],
        read(folder / "ema_0.8_2_2.pt")["av_model_sd"],
    )


def test_training_is_the_same_with_averages(sources, tmp_path) -> None:
    command(sources, tmp_path, f"--max-steps 7 --val-data {sources[2]}", name="without")
    extra = "--averagers ema_0.9,poly --log-avg-model-training-loss 2 --accum-freq 1"
    command(sources, tmp_path, f"--max-steps 7 --val-data {sources[2]} {extra}", name="with")
    a, b = (read(tmp_path / name / "checkpoints/epoch_2.pt")["state_dict"] for name in ("without", "with"))
    assert same(a, b)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_loss_of_an_average_that_is_the_weights_is_the_loss(sources, tmp_path, precision) -> None:
    extra = (
        f"--averagers ema_0,ema_0.9 --log-avg-model-training-loss 3 --accum-freq 2 --precision {precision}"
    )
    command(sources, tmp_path, f"{extra} --max-steps 7 --save-frequency 0")
    log = lines(tmp_path / "run/log.jsonl")
    losses = {e["step"]: e["train/loss"] for e in log if "train/loss" in e}
    found = {e["step"]: e for e in log if "train/ema_0_loss" in e}
    assert list(found) == [3, 6]
    for step, entry in found.items():
        assert entry["train/ema_0_loss"] == pytest.approx(losses[step], rel=1e-6)
        assert entry["train/ema_0.9_loss"] != pytest.approx(losses[step], rel=1e-4)


def test_skipped_updates_count_as_steps(sources, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(
        "open_lm.main.LossScale", lambda: __import__("open_lm.optim").optim.LossScale(2.0**40)
    )
    command(sources, tmp_path, "--precision fp16 --averagers ema_0.9_4 --epochs 2")
    saved = read(tmp_path / "run/checkpoints/ema_0.9_4_2.pt")
    assert (saved["step_counter"], saved["update_counter"]) == (3, 3)
    state = checkpoint.read_state(tmp_path / "run/checkpoints/epoch_2.pt")
    assert state["progress"]["skipped_updates"] > 3
    assert all(w.isfinite().all() for w in saved["av_model_sd"].values())


def test_averagers_may_come_and_go(sources, tmp_path, capsys) -> None:
    command(sources, tmp_path, "--averagers ema_0.9 --max-steps 5")
    command(sources, tmp_path, "--averagers poly --max-steps 10 --resume latest")
    folder = tmp_path / "run/checkpoints"
    assert not (folder / "ema_0.9_2.pt").exists()
    assert read(folder / "poly_2.pt")["step_counter"] == 6
    said = capsys.readouterr().out
    assert f"--averagers poly: {folder}/epoch_1.pt was saved without it" in said
    assert "weights of step 5" in said
    assert f"{folder}/epoch_1.pt holds the average ema_0.9: without --averagers ema_0.9 it ends here" in said
    for extra, expected in {
        f"--resume {folder}/epoch_2.pt --averagers ema_0.9": "--averagers ema_0.9",
        f"--pretrained {folder}/poly_2.pt --averagers poly": "not named epoch_N.pt",
    }.items():
        with pytest.raises(SystemExit) as stop:
            evaluation(sources, tmp_path, extra)
        assert stop.value.code == 2
        assert expected in capsys.readouterr().err


def test_soups_are_evaluated_and_trained_on(sources, tmp_path, capsys) -> None:
    command(sources, tmp_path, f"--epochs 2 --val-data {sources[2]}")
    folder = tmp_path / "run/checkpoints"
    paths = [folder / "epoch_1.pt", folder / "epoch_2.pt"]
    both = f"--average {paths[0]} {paths[1]}"
    evaluation(sources, tmp_path, f"{both} --average-coefficients 0 1")
    evaluation(sources, tmp_path, both)
    _, trained, last, middle = lines(folder / "results.jsonl")
    assert last["loss"] == trained["loss"]
    assert middle["loss"] not in (trained["loss"], last["loss"])
    assert {e.step for e in read_run(tmp_path / "run").evaluations} == {5, 10}  # a sum is not the run's
    assert (last["average"], middle["average"]) == ("soup", "soup")  # not the first checkpoint's result
    assert middle["soup"] == [[str(path), 0.5] for path in paths]
    extra = f"{both} --average-coefficients .3 .8 --lr 0 --max-steps 1"
    command(sources, tmp_path, extra, name="soup")
    check_soup(read(tmp_path / "soup/checkpoints/epoch_1.pt")["state_dict"], paths, [0.3, 0.8])
    out = capsys.readouterr().out
    assert f"weights: 0.3 * {paths[0]} + 0.8 * {paths[1]}" in out
    assert "sum to 1.1, not 1" in out
    with pytest.raises(SystemExit):
        command(sources, tmp_path, extra, name="soup")
    assert "already holds a run" in capsys.readouterr().err

    command(sources, tmp_path, "--max-steps 1 --moe-freq 2 --moe-num-experts 2", name="moe")
    command(sources, tmp_path, "--max-steps 1 --model-norm rms_norm", name="rms")
    for other, expected in {"moe": "moe_freq: 0 and 2", "rms": "default_layer_norm and rms_norm"}.items():
        with pytest.raises(SystemExit) as stop:
            evaluation(sources, tmp_path, f"--average {paths[0]} {tmp_path}/{other}/checkpoints/epoch_1.pt")
        assert stop.value.code == 2
        message = capsys.readouterr().err
        assert "not of one architecture" in message
        assert expected in message


def on_rank(arguments: list[str]) -> None:
    main(arguments)


def measured(folder: Path) -> list[dict]:
    """Without the lines of saves, which come when these are done."""
    return [e for e in lines(folder / "log.jsonl")[1:] if "checkpoint/step" not in e]


def test_a_sharded_run_is_that_of_one_process(spawn, sources, tmp_path) -> None:
    extra = (
        f"{RUN} --dataset-manifest {sources[0]} --val-data {sources[2]} --lr 1e-3 --eps 1e-6 --accum-freq 2 \
 --averagers ema_0.8_2,poly --log-avg-model-training-loss 2 --epochs 2 --moe-freq 2 --moe-num-experts 4 \
 --moe-capacity-factor 0 --moe-loss-weight 0 --logs {tmp_path}"
    )
    main(shlex.split(f"{extra} --name one --global-val-batch-size 4"))
    spawn(2, on_rank, shlex.split(f"{extra} --name two --global-val-batch-size 8 --fsdp"))
    seen = set()
    for one, two in zip(*(measured(tmp_path / n) for n in ("one", "two")), strict=True):
        keys = [key for key in one if key.endswith("loss") and "balancing" not in key]
        seen |= set(keys)
        for key in keys:
            assert two[key] == pytest.approx(one[key], rel=1e-5), key
    assert {
        "valid/loss",
        "valid/ema_0.8_2/loss",
        "valid/poly/loss",
        "train/ema_0.8_2_loss",
        "train/poly_loss",
    } <= seen
    for name in ("ema_0.8_2_2.pt", "poly_2.pt"):
        one, two = (read(tmp_path / n / "checkpoints" / name)["av_model_sd"] for n in ("one", "two"))
        for key, weights in one.items():
            torch.testing.assert_close(two[key], weights, rtol=1e-3, atol=1e-5)


def test_a_soup_of_remote_checkpoints(sources, tmp_path, bucket) -> None:
    command(sources, tmp_path, f"--epochs 2 --val-data {sources[2]}")
    folder = tmp_path / "run/checkpoints"
    bucket(folder)
    evaluation(sources, tmp_path, f"--average {folder}/epoch_1.pt {folder}/epoch_2.pt")
    evaluation(sources, tmp_path, "--average s3://bucket/epoch_1.pt s3://bucket/epoch_2.pt", name="remote")
    *_, here = lines(folder / "results.jsonl")
    (there,) = lines(tmp_path / "remote/checkpoints/results.jsonl")
    assert there["loss"] == here["loss"]
    assert there["soup"] == [["s3://bucket/epoch_1.pt", 0.5], ["s3://bucket/epoch_2.pt", 0.5]]
