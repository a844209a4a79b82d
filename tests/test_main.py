"""The command as users run it: train, resume, evaluate, and what it refuses; on one process and on two ranks."""

import contextlib
import io
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from open_lm.config import DistributedConfig
from open_lm.data.errors import DataError
from open_lm.main import agree, main, show
from open_lm.parallel import mesh
from open_lm.tokenize.shard_writer import write_shards

MOE = "--moe-freq 2 --moe-num-experts 4"
# One batch is 8 sequences of 16 tokens; an interval is 5 steps, the run is 20.
RUN = (
    "--model open_lm_test_tiny --data-key json --precision fp32 --global-batch-size 8 --train-num-samples 640 \
 --epochs 4 --lr 1e-2 --warmup 2 --log-every-n-steps 1 --grad-clip-norm 1 --workers 0 --wd 0.1"
)


def flags(sources: list[str], logs: Path, extra: str = "", name: str = "run") -> list[str]:
    data = f"--dataset-manifest {sources[0]} {sources[1]} --train-data-mix-weights .725 .275"
    return shlex.split(f"{RUN} {data} --logs {logs} --name {name} {extra}")


def weights(logs: Path, number: int, name: str = "run") -> dict[str, torch.Tensor]:
    return torch.load(logs / name / f"checkpoints/epoch_{number}.pt", weights_only=True)["state_dict"]


def lines(logs: Path, name: str = "run", key: str = "train/loss") -> list[dict]:
    entries = map(json.loads, (logs / name / "log.jsonl").read_text().splitlines())
    return [entry for entry in entries if key in entry]


def torchrun(ranks: int, arguments: list[str]) -> subprocess.CompletedProcess:
    # `--`: on some Pythons torchrun's own parser takes our --logs for its --logs-specs (MOE.md says so)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, "-m", "--", "open_lm.main", *arguments],
        env=environment, capture_output=True, text=True, timeout=240,
    )  # fmt: skip


DROPOUT = f"{MOE} --dropout 0.2 --attn-dropout 0.1 --accum-freq 2"


@pytest.mark.parametrize("moe", ["", MOE, DROPOUT], ids=["dense", "moe", "dropout"])
def test_six_steps_equal_three_and_three(sources, tmp_path, moe) -> None:
    main(flags(sources, tmp_path / "once", f"{moe} --max-steps 6"))
    main(flags(sources, tmp_path / "twice", f"{moe} --max-steps 3"))
    start = torch.load(tmp_path / "twice/run/checkpoints/epoch_1.pt", weights_only=True)
    assert start["step"] == 3
    main(flags(sources, tmp_path / "twice", f"{moe} --max-steps 6 --resume latest"))
    once, twice = weights(tmp_path / "once", 2), weights(tmp_path / "twice", 2)
    assert once.keys() == twice.keys()
    assert all(torch.equal(once[name], twice[name]) for name in once)
    assert not torch.equal(start["state_dict"]["output.weight"], once["output.weight"])
    (one,), (two,) = (
        (tmp_path / f"{run}/run/checkpoints/step_6").glob("*.safetensors") for run in ("once", "twice")
    )
    first, second = load_file(one), load_file(two)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
    losses = [[(e["step"], e["train/loss"]) for e in lines(tmp_path / run)] for run in ("once", "twice")]
    assert losses[0] == losses[1]


def test_a_whole_run_learns_saves_and_evaluates(sources, tmp_path) -> None:
    main(flags(sources, tmp_path, f"{MOE} --val-data {sources[2]} --report-to tensorboard"))
    run = tmp_path / "run"
    assert {p.name for p in (run / "checkpoints").iterdir()} == {
        *(f"epoch_{n}.pt" for n in (1, 2, 3, 4)),
        *(f"step_{n}" for n in (5, 10, 15, 20)),
        "results.jsonl",
    }
    training = lines(tmp_path)
    assert [entry["step"] for entry in training] == list(range(1, 21))
    assert [entry["tokens"] for entry in training] == [128 * n for n in range(1, 21)]
    assert training[-1]["train/loss"] < training[0]["train/loss"] - 0.2
    for name in ("load_balancing_loss", "data_time", "batch_time", "forward_time", "backward_time", "lr",
                 "optim_step_time", "sync_time", "samples_per_second", "samples_per_second_per_gpu", "tokens"):  # fmt: skip  # noqa: E501
        assert f"train/{name}" in training[-1], name
    (layer,) = training[-1]["router"]
    assert layer["layer"] == 0
    assert sum(layer["share"]) == pytest.approx(1)
    assert layer["fullest_over_mean"] == pytest.approx(4 * max(layer["share"]))
    validation = lines(tmp_path, key="valid/loss")
    assert [entry["step"] for entry in validation] == [5, 10, 15, 20]
    assert all(entry["valid/tokens"] == 37 * 16 for entry in validation)
    assert any(p.name.startswith("events") for p in (run / "tensorboard").iterdir())
    assert "moe_num_experts: 4" in (run / "params.txt").read_text()
    assert "saved" in (run / "out.log").read_text()

    # the same perplexity as training reported, from the checkpoint alone
    evaluate = (
        f"--val-data {sources[2]} --resume {run}/checkpoints/epoch_3.pt --precision fp32 --data-key json \
     --model open_lm_test_tiny {MOE} --global-batch-size 8 --logs {tmp_path} --name evaluation"
    )
    main(shlex.split(evaluate))
    (again,) = lines(tmp_path, "evaluation", "valid/loss")
    assert again["valid/loss"] == validation[2]["valid/loss"]
    assert again["valid/perplexity"] == validation[2]["valid/perplexity"]
    results = [json.loads(line) for line in (run / "checkpoints/results.jsonl").read_text().splitlines()]
    assert [r["step"] for r in results] == [5, 10, 15, 20, 15]


def refused(arguments: list[str], capsys) -> str:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_what_is_refused_before_any_work(sources, tmp_path, capsys) -> None:
    main(flags(sources, tmp_path, f"{MOE} --max-steps 2"))
    saved = tmp_path / "run/checkpoints/epoch_1.pt"
    evaluate = f"--val-data {sources[2]} --model open_lm_test_tiny --data-key json --logs {tmp_path} --name e"
    message = refused(
        shlex.split(f"{evaluate} --resume {saved} --moe-freq 2 --moe-num-experts 64 --precision fp32"), capsys
    )
    assert "--moe-num-experts 64" in message
    assert "trained with 4" in message
    assert str(saved) in message
    for extra, expected in {
        "--moe-freq 2 --moe-num-experts 4": "already holds a run",
        f"--name new --resume {tmp_path}/nothing.pt": "no such file",
        "--name new --epochs 100": "sequences",  # more than the sources hold
        "--resume latest --seed 5": "another order",
        "--resume latest --global-batch-size 16": "another order",
    }.items():
        message = refused(flags(sources, tmp_path, extra), capsys)
        assert message.startswith("open_lm.main: error: "), message
        assert expected in message
    assert not (tmp_path / "new").exists()


def test_too_little_data_counts_max_steps(sources, tmp_path, capsys) -> None:
    message = refused(flags(sources, tmp_path, "--epochs 100"), capsys)
    assert "200" in message  # what source a holds
    main(flags(sources, tmp_path, "--epochs 100 --max-steps 2"))


def test_resume_latest_in_an_empty_folder_starts_a_run(sources, tmp_path) -> None:
    main(flags(sources, tmp_path, "--resume latest --max-steps 1"))
    assert (tmp_path / "run/checkpoints/epoch_1.pt").exists()
    main(flags(sources, tmp_path, "--resume latest --max-steps 1"))
    assert len(lines(tmp_path)) == 1


def test_pretrained_starts_a_new_run(sources, tmp_path) -> None:
    main(flags(sources, tmp_path, "--max-steps 5"))
    path = tmp_path / "run/checkpoints/epoch_1.pt"
    main(flags(sources, tmp_path, f"--max-steps 1 --lr 0 --pretrained {path}", name="tuned"))
    old, new = weights(tmp_path, 1), weights(tmp_path, 1, "tuned")
    assert all(torch.equal(old[name], new[name]) for name in old)
    assert lines(tmp_path, "tuned")[0]["step"] == 1


def test_accumulation_equals_the_large_batch(sources, tmp_path) -> None:
    for accumulate in (1, 4):
        extra = f"--accum-freq {accumulate} --max-steps 3 --moe-capacity-factor 0 --moe-loss-weight 0 {MOE}"
        main(flags(sources, tmp_path, extra + " --lr 1e-3 --eps 1e-6", name=f"accumulate_{accumulate}"))
    one, four = lines(tmp_path, "accumulate_1"), lines(tmp_path, "accumulate_4")
    for a, b in zip(one, four, strict=True):
        assert a["train/loss"] == pytest.approx(b["train/loss"], rel=1e-6)
        assert a["train/grad_norm"] == pytest.approx(b["train/grad_norm"], rel=1e-5)
        assert a["router"][0]["share"] == pytest.approx(b["router"][0]["share"])


@pytest.mark.parametrize("precision", ["amp", "amp_bf16", "bf16", "fp16"])
def test_precisions_train_and_resume(sources, tmp_path, precision) -> None:
    extra = f"{MOE} --precision {precision}"
    main(flags(sources, tmp_path, f"{extra} --max-steps 4"))
    main(flags(sources, tmp_path, f"{extra} --resume latest"))
    training = lines(tmp_path)
    assert [entry["step"] for entry in training] == list(range(1, 21))
    assert training[-1]["train/loss"] < training[0]["train/loss"] - 0.2
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    assert weights(tmp_path, 4)["output.weight"].dtype == dtype


@pytest.mark.parametrize(
    "layout", ["", "--fsdp", "--fsdp --fsdp-amp --precision amp_bf16"], ids=["ddp", "fsdp", "fsdp-amp"]
)
def test_two_ranks(sources, tmp_path, layout) -> None:
    """Two ranks train as one process does, and what they save resumes and evaluates on one."""
    extra = f"{MOE} --moe-capacity-factor 0 --moe-loss-weight 0 --lr 1e-3 --eps 1e-6 {layout} --max-steps 5"
    done = torchrun(2, flags(sources, tmp_path, f"{extra} --val-data {sources[2]}", name="two"))
    assert done.returncode == 0, done.stdout + done.stderr
    one = f"{extra} --val-data {sources[2]} --global-val-batch-size 4"
    main(flags(sources, tmp_path, one, name="one"))
    close = 5e-3 if "amp" in layout else 1e-5
    for a, b in zip(lines(tmp_path, "one"), lines(tmp_path, "two"), strict=True):
        assert a["train/loss"] == pytest.approx(b["train/loss"], rel=close)
        assert a["train/grad_norm"] == pytest.approx(b["train/grad_norm"], rel=20 * close)
        assert a["tokens"] == b["tokens"]
        assert sum(b["router"][0]["share"]) == pytest.approx(1)
    a, b = lines(tmp_path, "one", "valid/loss")[0], lines(tmp_path, "two", "valid/loss")[0]
    assert a["valid/loss"] == pytest.approx(b["valid/loss"], rel=close)
    assert a["valid/tokens"] == b["valid/tokens"]
    main(flags(sources, tmp_path, f"{extra} --resume latest --max-steps 7", name="two"))
    assert lines(tmp_path, "two")[-1]["step"] == 7


def test_two_ranks_refuse_with_one_message(sources, tmp_path) -> None:
    done = torchrun(2, flags(sources, tmp_path, "--moe-top-k 4 --moe-num-experts 2"))
    assert done.returncode != 0
    assert done.stderr.count("--moe-top-k 4 > --moe-num-experts 2") == 1
    assert "open_lm/main.py" not in done.stderr  # no traceback of ours above it


@pytest.mark.parametrize("where", ["training", "evaluation"])
def test_damaged_data_end_two_ranks_with_one_line(sources, tmp_path, where) -> None:
    """Status 1, as of any failure in mid-run: 2 would say that nothing was begun."""
    tokens_NL = np.random.default_rng(0).integers(0, 16, (64, 17))
    tokens_NL[40, 7] = 60_000
    write_shards(tmp_path / "data", tokens_NL, 64)
    damaged = tmp_path / "data" / "manifest.jsonl"
    data = f"--dataset-manifest {damaged if where == 'training' else sources[0]}"
    data += f" --val-data {damaged}" if where == "evaluation" else ""
    run = f"{RUN} {data} --multiple-data-passes --max-steps 20 --workers 1 --logs {tmp_path}/logs --name run"
    done = torchrun(2, shlex.split(run))
    text = done.stdout + done.stderr
    assert done.returncode == 1
    name = "shard_00000000.tar: sample 00000000_00000040.json.gz has token id 60000"
    assert f"open_lm.main: error: shard {tmp_path}/data/{name}" in text
    assert "exitcode  : 1" in text
    assert "open_lm/main.py" not in text  # no traceback of ours
    (failed,) = lines(tmp_path / "logs", key="failed")
    assert name in failed["failed"]


def test_synthetic_data_and_tools_that_fail(sources, tmp_path, monkeypatch, capsys) -> None:
    import torch.utils.tensorboard

    def refuse(*arguments, **options):
        raise ConnectionError("no server")

    monkeypatch.setattr(torch.utils.tensorboard, "SummaryWriter", refuse)
    main(
        shlex.split(
            f"{RUN} --dataset-type synthetic --logs {tmp_path} --name run --report-to tensorboard --max-steps 2"
        )
    )
    assert len(lines(tmp_path)) == 2
    assert "tensorboard could not be started" in (tmp_path / "run/out.log").read_text()


def test_wandb_without_a_key_is_offline(tmp_path, monkeypatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # no netrc
    main(
        shlex.split(
            f"{RUN} --dataset-type synthetic --logs {tmp_path} --name run --report-to wandb --max-steps 2"
        )
    )
    assert list((tmp_path / "run").glob("wandb/offline-run-*/*.wandb"))


def test_default_name_and_log_local(tmp_path) -> None:
    main(shlex.split(f"{RUN} --dataset-type synthetic --logs {tmp_path} --log-local --max-steps 1"))
    (folder,) = tmp_path.iterdir()
    assert "model_open_lm_test_tiny-lr_0.01-b_8" in folder.name
    assert (folder / "out-0.log").exists()


def test_data_that_cannot_be_trained_on(sources, tmp_path, capsys) -> None:
    """Samples shorter than the model's sequence: an error, not a run on nothing."""
    model = {"hidden_dim": 16, "n_layers": 1, "n_heads": 2, "seq_len": 32, "vocab_size": 16}
    (tmp_path / "long.json").write_text(json.dumps(model))
    with pytest.raises(ValueError, match=r"not one token to train on.*bad; the first: .* has 17 tokens, 33"):
        main(flags(sources, tmp_path, f"--model {tmp_path / 'long.json'} --train-num-samples 1280"))
    assert "too short or unreadable" not in capsys.readouterr().err
    folder = tmp_path / "moved"
    folder.mkdir()
    (folder / "manifest.jsonl").write_text('{"shard": "shard_00000000", "num_sequences": 8}\n')
    one = shlex.split(
        f"{RUN} --dataset-manifest {folder}/manifest.jsonl --logs {tmp_path} --name m --max-steps 1"
    )
    assert "shard_00000000.tar, named by" in refused(one, capsys)
    assert not (tmp_path / "m").exists()


def test_resume_in_another_precision_is_refused(sources, tmp_path, capsys) -> None:
    main(flags(sources, tmp_path, "--precision bf16 --max-steps 1"))
    message = refused(flags(sources, tmp_path, "--precision fp32 --resume latest"), capsys)
    assert "--precision fp32" in message
    assert "trained with bf16" in message


def prepare_on_two_ranks() -> tuple[int, str]:
    """Exit status and stderr of a rank, where rank 1 alone cannot read a file."""
    world = mesh.start(DistributedConfig())

    def prepare() -> str:
        if world.rank == 1:
            raise FileNotFoundError("shard_00000003.tar is not on this host")
        return "job"

    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        try:
            agree(prepare)
        except SystemExit as stop:
            return stop.code, errors.getvalue()
    return 0, errors.getvalue()


def test_one_ranks_error_is_shown_and_ends_all(spawn) -> None:
    first, second = spawn(2, prepare_on_two_ranks)
    assert first == (2, "open_lm.main: error: [rank 1] shard_00000003.tar is not on this host\n")
    assert second == (2, "")


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("text", ["", "operands could not be broadcast"])
def test_an_error_of_the_program_among_the_data_keeps_its_traceback(
    sources, tmp_path, monkeypatch, capsys, text, workers
) -> None:
    def broken(*arguments, **options):
        raise ValueError(text)

    monkeypatch.setattr("open_lm.data.reader.SequenceReader.read", broken)
    run = f"{RUN} --dataset-manifest {sources[0]} --max-steps 2 --workers {workers} --logs {tmp_path} --name run"
    with pytest.raises(DataError) as caught:
        main(shlex.split(run))
    log = tmp_path / "run/out.log"
    assert show(caught.value) == f"open_lm.main: error: {text or 'ValueError'} (where it was raised: {log})"
    assert "in broken" in log.read_text()
    assert "Traceback" not in capsys.readouterr().out
