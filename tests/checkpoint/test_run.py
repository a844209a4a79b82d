"""The checkpoint flags by their command: remote copies, epoch_latest.pt, deletion, pretrained state."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import boto3
import pytest
import torch

from open_lm.checkpoint import sync
from open_lm.main import main

# One batch is 8 sequences of 16 tokens; an interval is 3 steps, the run is 12.
RUN = (
    "--model open_lm_test_tiny --data-key json --precision fp32 --global-batch-size 8 --train-num-samples 384 \
 --epochs 4 --lr 1e-2 --warmup 2 --log-every-n-steps 1 --workers 0 --wd 0.1 --moe-freq 2 --moe-num-experts 4"
)
S3 = "--remote-sync s3://bucket/runs"


def flags(sources: list[str], logs: Path, extra: str = "", name: str = "run") -> list[str]:
    data = f"--dataset-manifest {sources[0]} {sources[1]} --train-data-mix-weights .725 .275"
    return shlex.split(f"{RUN} {data} --logs {logs} --name {name} {extra}")


def weights(folder: Path, label: int | str) -> dict[str, torch.Tensor]:
    return torch.load(folder / f"checkpoints/epoch_{label}.pt", weights_only=True)["state_dict"]


def equal(one: Path, other: Path, label: int | str = 4) -> bool:
    a, b = weights(one, label), weights(other, label)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def steps(folder: Path) -> list[int]:
    entries = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [entry["step"] for entry in entries if "train/loss" in entry]


def labels(names) -> set[str]:
    return {Path(name).stem.removeprefix("epoch_") for name in names if Path(name).name.startswith("epoch_")}


def local(folder: Path) -> set[str]:
    return labels(path.name for path in (folder / "checkpoints").iterdir())


def keys() -> set[str]:
    client = boto3.client("s3")
    names = {entry["Key"] for entry in client.list_objects_v2(Bucket="bucket").get("Contents", [])}
    client.close()
    return names


def refused(arguments: list[str], capsys) -> str:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    return capsys.readouterr().err


@pytest.fixture(scope="module")
def whole(sources, tmp_path_factory) -> Path:
    """The folder of an uninterrupted run."""
    logs = tmp_path_factory.mktemp("whole")
    main(flags(sources, logs))
    return logs / "run"


def torchrun(arguments: list[str]) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [*command, "-m", "--", "open_lm.main", *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240,
    )  # fmt: skip


def test_two_ranks_copy_to_s3_and_one_goes_on_from_there(sources, tmp_path, bucket) -> None:
    done = torchrun(
        flags(
            sources,
            tmp_path,
            f"{S3} --max-steps 5 --val-data {sources[2]} --fsdp --workers 2 --averagers poly_8_1",
        )
    )
    assert done.returncode == 0, done.stdout + done.stderr
    run, kept = tmp_path / "run", tmp_path / "kept/run"
    there = {f"runs/run/{path.relative_to(run).as_posix()}" for path in run.rglob("*") if path.is_file()}
    assert keys() == there - {"runs/run/.owner.json"}
    shutil.move(run, kept)
    average = "--averagers poly_8_1"
    main(flags(sources, tmp_path, f"{S3} --resume latest {average}"))
    main(flags(sources, tmp_path / "kept", f"--resume latest {average}"))
    assert equal(run, kept)
    assert (run / "checkpoints/poly_8_1_2.pt").exists()
    a, b = (
        torch.load(each / "checkpoints/poly_8_1_4.pt", weights_only=True)["av_model_sd"]
        for each in (run, kept)
    )
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert "resumed s3://bucket/runs/run/checkpoints/epoch_2.pt at step 5" in (run / "out.log").read_text()
    assert steps(run) == steps(kept) == list(range(1, 13))
    assert len((run / "checkpoints/results.jsonl").read_text().splitlines()) == 4, "of weights and average"
    assert "step 3/12" in (run / "out.log").read_text()
    assert labels(keys()) == {"1", "2", "3", "4"}

    # two ranks, of which only the first has, or fetches, any file
    shutil.rmtree(run)
    done = torchrun(
        flags(
            sources,
            tmp_path,
            "--resume s3://bucket/runs/run/checkpoints/epoch_1.pt --max-steps 4 --averagers poly_8_1",
        )
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "resumed s3://bucket/runs/run/checkpoints/epoch_1.pt at step 3" in done.stdout
    assert steps(run) == [4]


def train_where_this_rank_sees_files_of_its_own(sources: list[str], folder: str, extra: str) -> None:
    own = Path(folder, f"host_{os.environ['RANK']}")
    own.mkdir(exist_ok=True)
    os.chdir(own)
    main(flags(sources, Path("logs"), extra))


@pytest.mark.parametrize("layout", ["", "--fsdp"], ids=["ddp", "fsdp"])
def test_only_the_first_host_needs_the_files(sources, tmp_path, spawn, layout) -> None:
    """Without a disk that all see, the first rank gathers and writes it all."""
    for extra in ("--max-steps 2", "--max-steps 4 --resume latest"):
        spawn(2, train_where_this_rank_sees_files_of_its_own, sources, str(tmp_path), f"{extra} {layout}")
    assert len(list((tmp_path / "host_0/logs/run/checkpoints/step_4").glob("*.safetensors"))) == 1
    assert steps(tmp_path / "host_0/logs/run") == [1, 2, 3, 4]
    assert not (tmp_path / "host_1/logs").exists()


def test_the_newer_of_here_and_there(sources, tmp_path, whole, bucket) -> None:
    main(flags(sources, tmp_path, f"{S3} --max-steps 3"))
    main(flags(sources, tmp_path, "--resume latest --max-steps 6"))
    main(flags(sources, tmp_path, f"{S3} --resume latest --max-steps 9"))
    run = tmp_path / "run"
    assert steps(run) == list(range(1, 10)), "what was newer here was gone on from"
    assert labels(keys()) == {"1", "2", "3"}
    (run / "checkpoints/epoch_3.pt").unlink()
    shutil.rmtree(run / "checkpoints/step_9")
    main(flags(sources, tmp_path, f"{S3} --resume latest"))
    assert steps(run) == list(range(1, 13)), "and what was newer there"
    assert equal(run, whole)


def test_going_back_abandons_what_is_there_too(sources, tmp_path, bucket) -> None:
    main(flags(sources, tmp_path, f"{S3} --max-steps 9"))
    first = "runs/run/checkpoints/abandoned_after_step_3"
    shutil.rmtree(tmp_path / "run")  # a host that has nothing
    start = "s3://bucket/runs/run/checkpoints/epoch_1.pt"
    main(flags(sources, tmp_path, f"{S3} --resume {start} --lr 1e-3 --max-steps 4"))
    assert {"step_9/digests.json", "step_6/state.json", "epoch_2.pt", "epoch_3.pt"} <= {
        name.removeprefix(f"{first}/") for name in keys() if name.startswith(first)
    }
    shutil.rmtree(tmp_path / "run")
    main(flags(sources, tmp_path, f"{S3} --resume latest --lr 1e-3 --max-steps 5"))
    assert "at step 4" in (tmp_path / "run/out.log").read_text()
    assert steps(tmp_path / "run")[-2:] == [4, 5]
    assert not list(tmp_path.glob("run/checkpoints/abandoned*")), "not fetched"


def test_urls_to_start_and_evaluate_from(sources, tmp_path, whole, bucket, capsys, monkeypatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    bucket(whole / "checkpoints")
    url = "s3://bucket/epoch_2.pt"
    main(flags(sources, tmp_path, f"--resume {url}"))
    assert equal(tmp_path / "run", whole)
    main(flags(sources, tmp_path, f"--pretrained {url} --lr 0 --max-steps 1", name="tuned"))
    assert all(
        torch.equal(a, b)
        for a, b in zip(weights(tmp_path / "tuned", 1).values(), weights(whole, 2).values(), strict=True)
    )
    evaluate = f"--val-data {sources[2]} --model open_lm_test_tiny --data-key json --precision fp32"
    main(shlex.split(f"{evaluate} --pretrained {url} --logs {tmp_path} --name eval --global-batch-size 8"))
    (line,) = (tmp_path / "eval/checkpoints/results.jsonl").read_text().splitlines()
    assert json.loads(line)["checkpoint_path"] == url
    assert not [path for path in (tmp_path / "temporary").iterdir() if path.name.startswith("open_lm-start")]
    message = refused(flags(sources, tmp_path, "--resume s3://bucket/epoch_9.pt", name="none"), capsys)
    assert "s3://bucket/epoch_9.pt" in message


def test_what_remote_sync_refuses(sources, tmp_path, bucket, capsys) -> None:
    for extra, expected in {
        "--remote-sync s3://no-such-bucket/x": "s3://no-such-bucket/x/run",
        f"--remote-sync {tmp_path}": "run's own folder",
        f"{S3} --remote-sync-frequency 0": "--remote-sync-frequency 0",
    }.items():
        assert expected in refused(flags(sources, tmp_path, extra), capsys)
        assert not (tmp_path / "run").exists(), "the same command, mended, must start"
    main(flags(sources, tmp_path, f"{S3} --max-steps 1"))
    shutil.rmtree(tmp_path / "run")
    message = refused(flags(sources, tmp_path, S3), capsys)
    assert "s3://bucket/runs/run already holds a run" in message


def test_a_server_that_dies_does_not_stop_training(sources, tmp_path, whole, bucket, monkeypatch) -> None:
    monkeypatch.setattr(sync, "FIRST_RETRY_SECONDS", 0.1)
    monkeypatch.setattr(sync, "LAST_ATTEMPTS", 1)
    monkeypatch.setattr("s3fs.S3FileSystem.retries", 1)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    real, calls = sync.Sync.wake, []

    def wake(self):
        calls.append(None)
        if len(calls) == 2:
            bucket.stop()
        real(self)

    monkeypatch.setattr(sync.Sync, "wake", wake)
    with pytest.raises(SystemExit) as stop:
        main(flags(sources, tmp_path, S3))
    assert stop.value.code == 3
    assert equal(tmp_path / "run", whole)
    log = (tmp_path / "run/out.log").read_text()
    assert "could not be copied to s3://bucket/runs/run" in log
    assert "not copied to s3://bucket/runs/run: " in log
    assert "checkpoints/epoch_4.pt" in log.splitlines()[-1]


def test_a_path_is_a_remote_too(sources, tmp_path, whole) -> None:
    extra = f"--remote-sync {tmp_path}/mirror --remote-sync-protocol fsspec --report-to tensorboard"
    main(flags(sources, tmp_path / "logs", extra))
    for path in (tmp_path / "logs/run").rglob("*"):
        copy = tmp_path / "mirror" / path.relative_to(tmp_path / "logs")
        if path.is_file() and path.name not in ("out.log", ".owner.json"):
            assert copy.read_bytes() == path.read_bytes(), path


def test_the_most_recent(sources, tmp_path, whole) -> None:
    extra = "--save-frequency 2 --save-most-recent"
    run = tmp_path / "run"
    main(flags(sources, tmp_path, f"{extra} --max-steps 3"))
    assert local(run) == {"1", "latest"}, "the last is kept by its number too"
    (run / "checkpoints/epoch_1.pt").unlink()  # as if it had gone on, and been killed in the second interval
    main(flags(sources, tmp_path, f"{extra} --resume latest --max-steps 7"))
    assert steps(run) == list(range(1, 8))
    latest = torch.load(run / "checkpoints/epoch_latest.pt", weights_only=True)
    assert (latest["epoch"], latest["step"]) == (3, 7)
    main(flags(sources, tmp_path, f"{extra} --resume latest"))
    assert equal(run, whole)
    assert equal(run, whole, 2)
    assert {path.name for path in (run / "checkpoints").iterdir()} == {
        *(f"epoch_{n}.pt" for n in (1, 2, 3, 4, "latest")),
        *(f"step_{n}" for n in (3, 6, 7, 12)),
    }


def test_only_the_last_and_the_most_recent(sources, tmp_path, whole, bucket) -> None:
    main(flags(sources, tmp_path, f"--save-frequency 0 --save-most-recent {S3}"))
    assert local(tmp_path / "run") == labels(keys()) == {"4", "latest"}
    assert equal(tmp_path / "run", whole)
    main(flags(sources, tmp_path, "--save-frequency 0", name="last"))
    assert local(tmp_path / "last") == {"4"}


@pytest.mark.parametrize("extra", ["", S3], ids=["here", "here and there"])
def test_the_previous_is_deleted(sources, tmp_path, whole, bucket, extra) -> None:
    delete = f"--delete-previous-checkpoint --val-data {sources[2]} {extra}"
    run = tmp_path / "run"
    main(flags(sources, tmp_path, f"--max-steps 6 {extra}"))
    main(flags(sources, tmp_path, f"{delete} --resume latest"))
    assert local(run) == {"1", "4"}, "the first was there before the flag was given"
    assert equal(run, whole)
    assert (
        len((run / "checkpoints/results.jsonl").read_text().splitlines()) == 3
    )  # steps 6, made up for, 9 and 12
    if extra:
        assert labels(keys()) == {"1", "4"}
        assert "runs/run/checkpoints/results.jsonl" in keys()
    main(flags(sources, tmp_path, f"{delete} --max-steps 7", name="alone"))
    main(flags(sources, tmp_path, f"{delete} --max-steps 8 --resume latest", name="alone"))
    assert local(tmp_path / "alone") == {"3"}, "cut short, and written again"


def test_pretrained_state(sources, tmp_path, whole, capsys) -> None:
    path = whole / "checkpoints/epoch_2.pt"
    main(flags(sources, tmp_path, f"--pretrained {path} --load-pretrained-state"))
    assert steps(tmp_path / "run") == list(range(7, 13))
    assert equal(tmp_path / "run", whole)
    shutil.copy(path, tmp_path / "epoch_2.pt")
    for extra, expected in {
        "--load-pretrained-state": "--load-pretrained-state needs --pretrained",
        f"--load-pretrained-state --pretrained {tmp_path}/epoch_2.pt": "step_6, its state, is missing",
        f"--load-pretrained-state --pretrained {path} --seed 3": "in another order",
    }.items():
        message = refused(flags(sources, tmp_path, extra, name="other"), capsys)
        assert expected in message
        assert message.startswith("open_lm.main: error: --load-pretrained-state") or "order" in expected
        assert not (tmp_path / "other").exists()
