"""What a run finds when it is started again: an evaluation that is owed, a damaged checkpoint, other flags."""

import contextlib
import json
import re
import shlex
import shutil
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from open_lm import checkpoint
from open_lm.checkpoint import files, state
from open_lm.log.owner import Owner
from open_lm.main import main, show
from open_lm.parallel.watch import StopAsked


def arguments(sources: list[str], logs: Path, extra: str = "") -> list[str]:
    return shlex.split(
        f"--model open_lm_test_tiny --precision fp32 --data-key json --dataset-manifest {sources[0]} "
        f"--train-num-samples 256 --global-batch-size 8 --epochs 2 --warmup 1 --lr 1e-2 --workers 0 "
        f"--logs {logs} --name run {extra}"
    )


def run(sources: list[str], logs: Path, extra: str = "") -> None:
    main(arguments(sources, logs, extra))


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
    (shard,) = (trained / "run/checkpoints/step_4").glob("*.safetensors")
    data = bytearray(shard.read_bytes())
    data[-9] ^= 4
    shard.write_bytes(data)
    run(sources, trained, "--resume latest")
    out = capsys.readouterr().out
    assert f"step_4 is passed over: {shard} is damaged" in out
    assert "epoch_1.pt at step 2" in out
    assert "step_4 is passed over" in (trained / "run/out.log").read_text()


def test_damaged_weights_are_refused_by_all_that_start_from_them(sources, trained, capsys) -> None:
    """--pretrained, evaluation and --average; `latest` makes the file anew of its state."""
    epoch = trained / "run/checkpoints/epoch_2.pt"
    data = bytearray(epoch.read_bytes())
    data[len(data) // 2] ^= 1
    epoch.write_bytes(data)
    evaluate = f"--model open_lm_test_tiny --precision fp32 --data-key json --val-data {sources[2]} --name e"
    for command in (
        arguments(sources, trained / "other", f"--pretrained {epoch}"),
        arguments(sources, trained / "other", f"--average {epoch} {epoch}"),
        shlex.split(f"{evaluate} --global-batch-size 8 --logs {trained} --resume {epoch}"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(command)
        assert stop.value.code == 2
        assert f"{epoch} is damaged: its sha256" in capsys.readouterr().err
    run(sources, trained, "--resume latest")
    assert f"{epoch} is damaged: its sha256 is not the one that it was written with: made anew of step_4" in (
        capsys.readouterr().out
    )
    checkpoint.read_model_config(epoch)


def test_what_an_older_version_wrote_is_refused(sources, trained, capsys) -> None:
    folder = trained / "run/checkpoints"
    for step in (2, 4):
        shutil.rmtree(folder / f"step_{step}")
    for part in ("optimizer", "stats"):
        torch.save({"step": 4}, folder / f"{part}_2.pt")
    for start in ("latest", folder / "epoch_2.pt"):
        with pytest.raises(SystemExit):
            run(sources, trained, f"--resume {start}")
        message = capsys.readouterr().err
        assert "older version" in message
        assert "--pretrained" in message


def test_states_between_intervals(sources, tmp_path, capsys) -> None:
    """Six steps are three, killed, and the rest, from a state that no epoch_N.pt belongs to; bitwise."""
    whole = "--epochs 3 --train-num-samples 1024 --max-steps 6"
    run(sources, tmp_path / "once", whole)
    run(sources, tmp_path, f"{whole} --save-every-steps 1")
    folder = tmp_path / "run/checkpoints"
    assert {path.name for path in folder.iterdir()} == {"epoch_1.pt", "step_6", "step_5", "step_4"}
    out = capsys.readouterr().out
    assert "saving step 5: --save-every-steps 1" in out
    shutil.rmtree(folder / "step_6")
    (folder / "epoch_1.pt").unlink()
    run(sources, tmp_path, f"{whole} --resume {folder / 'step_4'}")
    run(sources, tmp_path, f"{whole} --resume latest")
    out = capsys.readouterr().out
    assert f"resumed {folder}/step_4 at step 4" in out
    assert f"resumed {folder}/epoch_1.pt at step 6" in out
    assert tensors(folder / "step_6") == tensors(tmp_path / "once/run/checkpoints/step_6")
    lines = list(map(json.loads, (tmp_path / "run/log.jsonl").read_text().splitlines()))
    saves = [line for line in lines if "checkpoint/stall_seconds" in line]
    assert [line["checkpoint/step"] for line in saves] == [1, 2, 3, 4, 5, 6, 6]
    assert all(0 < line["checkpoint/stall_seconds"] < 5 for line in saves)
    assert all(line["checkpoint/bytes"] > 300_000 for line in saves)
    evaluate = f"--model open_lm_test_tiny --precision fp32 --data-key json --val-data {sources[2]} --name e"
    for path in (folder / "step_6", folder / "epoch_1.pt"):
        main(shlex.split(f"{evaluate} --global-batch-size 8 --logs {tmp_path} --resume {path}"))
    first, second = results(tmp_path)
    assert first["loss"] == second["loss"]


def tensors(folder: Path) -> dict[str, bytes]:
    return {
        name: tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        for path in folder.glob("*.safetensors")
        for name, tensor in load_file(path).items()
    }


def test_saves_by_tokens_and_minutes(sources, tmp_path, monkeypatch) -> None:
    long = "--epochs 1 --train-num-samples 4096 --keep-last-states 9"
    run(sources, tmp_path, f"{long} --save-every-tokens 300 --max-steps 9")
    assert steps(tmp_path) == {3, 5, 8, 9}, "after 384, 640, 1,024 tokens of 128 a step, and the last"
    clock = iter(range(10_000))
    monkeypatch.setattr("open_lm.saves.time", SimpleNamespace(monotonic=lambda: next(clock) * 10.0))
    run(sources, tmp_path / "minutes", f"{long} --save-every-minutes 0.5 --max-steps 9")
    assert steps(tmp_path / "minutes") == {3, 6, 9}


def steps(logs: Path) -> set[int]:
    return {int(path.name.removeprefix("step_")) for path in (logs / "run/checkpoints").glob("step_*")}


def test_a_run_whose_last_save_fails_ends_with_an_error(sources, tmp_path, monkeypatch, capsys) -> None:
    """A full disk, by what the file system says: a warning while there is a next save, an error at the end."""
    real = shutil.disk_usage
    monkeypatch.setattr("shutil.disk_usage", lambda path: real(path)._replace(free=7))
    with pytest.raises(
        OSError, match=r"step 4 needs [0-9,]+ bytes, and .*checkpoints has 7 bytes free"
    ) as end:
        run(sources, tmp_path)
    shown = show(end.value)
    assert re.fullmatch(r"open_lm.main: error: step 4 could not be saved: .*earlier checkpoints.*", shown), (
        shown
    )
    assert "step 2 could not be saved" in (tmp_path / "run/out.log").read_text()
    assert list((tmp_path / "run/checkpoints").iterdir()) == []
    calls = iter(range(100))
    monkeypatch.setattr(
        "shutil.disk_usage", lambda path: real(path)._replace(free=7 if next(calls) else 1 << 40)
    )
    with pytest.raises(OSError, match="step 4 needs"):
        run(sources, tmp_path, "--resume latest")
    assert steps(tmp_path) == {2}
    monkeypatch.undo()
    run(sources, tmp_path, "--resume latest")
    assert "epoch_1.pt at step 2" in capsys.readouterr().out
    assert steps(tmp_path) == {2, 4}


def test_a_last_save_that_fails_promises_no_other(sources, tmp_path, monkeypatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("no space")

    monkeypatch.setattr("open_lm.checkpoint.saver.consolidate", fail)
    with pytest.raises(OSError, match="no space"):
        run(sources, tmp_path)
    log = (tmp_path / "run/out.log").read_text()
    said = "is complete, but an epoch_N.pt is missing: no space"
    assert f"step_2 {said}; training goes on, the next save tries again\n" in log
    assert f"step_4 {said}\n" in log
    assert "could not be saved" not in log
    assert steps(tmp_path) == {2, 4}


def test_an_interval_without_its_weights_is_not_a_success(sources, tmp_path, monkeypatch) -> None:
    """Its save failed altogether, or its epoch_N.pt: the last one's success hides neither."""
    real, calls = shutil.disk_usage, iter(range(100))
    with monkeypatch.context() as patch:
        patch.setattr(
            "shutil.disk_usage", lambda path: real(path)._replace(free=1 << 40 if next(calls) else 7)
        )
        with pytest.raises(checkpoint.SaveError, match=r"interval 1 has no epoch_1.pt: .*step 2 needs"):
            run(sources, tmp_path / "none")

    def fail(folder: Path, label: str, *, large: bool) -> None:
        if label == "1":
            raise OSError(f"no space for epoch_{label}.pt")
        files.consolidate(folder, label)

    with monkeypatch.context() as patch:
        patch.setattr("open_lm.checkpoint.saver.consolidate", fail)
        with pytest.raises(checkpoint.SaveError, match=r"epoch_N.pt is missing: no space for epoch_1.pt"):
            run(sources, tmp_path)
        failing = partial(fail, large=False)
        patch.setattr("open_lm.checkpoint.recover.make_owed.__defaults__", (failing, None))
        with pytest.raises(checkpoint.SaveError, match=r"has no epoch_1.pt.*step_2"):  # nothing left to do
            run(sources, tmp_path, "--resume latest")
    assert steps(tmp_path) == {2, 4}
    run(sources, tmp_path, "--resume latest")
    assert (tmp_path / "run/checkpoints/epoch_1.pt").is_file()


def test_an_exception_waits_for_the_save(sources, tmp_path, monkeypatch) -> None:
    """An evaluation that crashes right after a save began loses nothing."""
    real = state.write_shard
    monkeypatch.setattr(state, "write_shard", lambda *a: (time.sleep(1), real(*a))[1])

    def crash(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("open_lm.main.evaluate_all", crash)
    with pytest.raises(ZeroDivisionError):
        run(sources, tmp_path, f"--val-data {sources[2]}")
    assert steps(tmp_path) == {2}
    checkpoint.read_state(tmp_path / "run/checkpoints/epoch_1.pt")


def stop(*_: object, **__: object) -> None:
    raise StopAsked


def crash(*_: object, **__: object) -> None:
    raise ZeroDivisionError


@pytest.mark.parametrize("end", [crash, stop])
def test_what_ends_an_evaluation_loses_nothing(sources, tmp_path, monkeypatch, capsys, end) -> None:
    """--save-frequency leaves the interval out: its state is saved nevertheless, as it is evaluated."""
    monkeypatch.setattr("open_lm.main.evaluate_all", end)
    flags = f"--save-frequency 10 --val-data {sources[2]}"
    with pytest.raises(ZeroDivisionError) if end is crash else contextlib.nullcontext():
        run(sources, tmp_path, flags)
    assert steps(tmp_path) == {2}
    assert not list(tmp_path.glob("run/checkpoints/epoch_*")), "--save-frequency has asked for none"
    monkeypatch.undo()
    run(sources, tmp_path, f"{flags} --resume latest")
    assert "step 2 has a checkpoint but no evaluation" in capsys.readouterr().out
    assert [r["step"] for r in results(tmp_path)] == [2, 4]


def test_a_folder_is_owned_before_anything_in_it_is_touched(sources, trained, capsys, monkeypatch) -> None:
    """Two starts at once: the second fetches, renames and deletes nothing."""
    before = set(trained.rglob("*"))
    monkeypatch.setattr("open_lm.job.find_start", crash)
    holder = Owner(trained / "run")
    try:
        with pytest.raises(SystemExit):
            run(sources, trained, "--resume latest")
    finally:
        holder.release()
    assert "is in use by process" in capsys.readouterr().err
    assert set(trained.rglob("*")) == before
    monkeypatch.setattr("open_lm.job.find_start", lambda run, folder, _: Owner(folder))
    with pytest.raises(SystemExit):  # while it looks for its start it holds the folder
        run(sources, trained, "--resume latest")
    assert "is in use by process" in capsys.readouterr().err


def test_every_nth_is_kept(sources, tmp_path) -> None:
    extra = "--train-num-samples 128 --epochs 7 --delete-previous-checkpoint --keep-every 3"
    run(sources, tmp_path, f"{extra} --max-steps 5")
    run(sources, tmp_path, f"{extra} --resume latest")
    names = {path.name for path in (tmp_path / "run/checkpoints").iterdir()}
    assert names == {f"{name}" for n in (3, 6, 7) for name in (f"epoch_{n}.pt", f"step_{n}")}


def test_going_back_to_an_older_checkpoint_abandons_what_came_after(sources, trained, capsys) -> None:
    """Moved, and said; `latest` is then the newest of the new branch, though its step is lower."""
    folder = trained / "run/checkpoints"
    extra = "--epochs 3 --train-num-samples 256 --save-every-steps 1 --keep-last-states 1 --lr 1e-3"
    before = tensors(folder / "step_4")
    run(sources, trained, f"{extra} --resume {folder / 'epoch_1.pt'} --max-steps 3")
    aside = folder / "abandoned_after_step_2"
    assert (
        f"what this run had saved after step 2 is abandoned, and was moved to {aside}"
        in capsys.readouterr().out
    )
    assert {path.name for path in aside.iterdir()} == {"epoch_2.pt", "step_4"}
    assert tensors(aside / "step_4") == before
    assert steps(trained) == {2, 3}
    run(sources, trained, f"{extra} --resume latest --max-steps 5")
    assert "resumed" in (out := capsys.readouterr().out)
    assert "epoch_2.pt at step 3" in out
    assert steps(trained) >= {2, 5}
    run(sources, trained, f"{extra} --resume {folder / 'epoch_1.pt'} --max-steps 3")
    assert (folder / "abandoned_after_step_2_2/step_5/digests.json").is_file()
    assert not (folder / "leaving.json").exists()
    run(sources, trained, f"{extra} --resume latest --max-steps 4")
    assert "is abandoned" not in capsys.readouterr().out.rpartition("resumed")[2]


def test_what_is_saved_beside_the_weights(sources, trained) -> None:
    content = json.loads((trained / "run/checkpoints/step_4/state.json").read_text())
    saved = content["state"]
    assert saved["progress"]["step"] == 4
    assert saved["flags"]["epochs"] == 2
    assert len(saved["data"]["sources"][0]["sha256"]) == 64, "the manifest's fingerprint"
    assert content["param_groups"][0]["betas"] == [0.9, 0.95]


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


def test_other_flags_than_before_are_said(sources, trained, capsys) -> None:
    run(sources, trained, "--resume latest --workers 1 --epochs 2 --log-every-n-steps 1")
    assert "other flags" not in capsys.readouterr().out
    run(sources, trained, "--resume latest --lr 3e-3 --wd 0.3 --warmup 2 --epochs 3")
    out = capsys.readouterr().out
    (line,) = [line for line in out.splitlines() if "other flags" in line]
    changes = "--epochs 2 -> 3, --lr 0.01 -> 0.003, --wd 0.2 -> 0.3, --warmup 1 -> 2"
    assert line.endswith(f"epoch_2.pt was saved with other flags: {changes}"), line


def test_no_argument_of_a_command_is_left(sources, tmp_path) -> None:
    tar = Path(sources[0]).parent / "shard_00000000.tar"
    secret, command = "hunter22x", f"pipe:true -s -u alice:hunter22x; cat {tar}; : /hunter22x"
    line = (
        "--model open_lm_test_tiny --precision fp32 --data-key json --global-batch-size 4 --warmup 1 --lr 1e-2 "
        f"--workers 0 --train-num-samples 64 --epochs 1 --multiple-data-passes --logs {tmp_path} --name run"
    )
    flags = [*shlex.split(line), "--train-data", command, "--val-data", command]
    main(flags)
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert not [path for path in files if secret.encode() in path.read_bytes()]
    text = (tmp_path / "run/out.log").read_text()
    assert "loss" in next(each for each in text.splitlines() if "| perplexity" in each)
    assert "pipe:true … shard_00000000.tar [" in (tmp_path / "run/params.txt").read_text()
    (old,) = (tmp_path / "run/checkpoints").glob("step_*/state.json")
    description = json.loads(old.read_text())["state"]["data"]["sources"][0]
    assert "hunter" not in description["first"] + description["last"]
