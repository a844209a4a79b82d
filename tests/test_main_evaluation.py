"""Evaluation as users run it: several --val-data, their names, intervals, results.jsonl, limits, masks."""

import json
import re
import shlex
from pathlib import Path

import pytest

from open_lm.main import main

RUN = (
    "--model open_lm_test_tiny --data-key json --precision fp32 --global-batch-size 8 --train-num-samples 640 \
 --epochs 4 --lr 1e-2 --warmup 2 --log-every-n-steps 100 --workers 0"
)


def train(sources: list[str], logs: Path, extra: str = "") -> None:
    main(shlex.split(f"{RUN} --dataset-manifest {sources[0]} --logs {logs} --name run {extra}"))


def evaluate(logs: Path, extra: str, name: str = "evaluation") -> None:
    start = "" if "--resume" in extra else f"--resume {logs}/run/checkpoints/epoch_1.pt"
    main(
        shlex.split(
            f"--model open_lm_test_tiny --data-key json --precision fp32 --workers 0 {start} \
     --logs {logs} --name {name} {extra}"
        )
    )


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def validation(logs: Path, name: str = "run") -> list[dict]:
    return [line for line in read(logs / name / "log.jsonl") if "val_data" in line]


def test_several_entries_do_not_overwrite_each_other(sources, tmp_path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    key = "--val-data-key json.gz json"
    train(
        sources,
        tmp_path,
        f"--max-steps 5 --val-data {sources[1]} {sources[2]} {key} --val-seq-ci --val-tok-ci --val-iter-ci 100 "
        "--report-to tensorboard",
    )
    lines = validation(tmp_path)
    assert [line["val_name"] for line in lines] == ["b", "held_out"]
    events = EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    for line, path in zip(lines, sources[1:], strict=True):
        prefix = f"valid/{line['val_name']}"
        assert line["val_data"] == path
        assert (line["step"], line["tokens"], line[f"{prefix}/train_tokens"]) == (5, 640, 640)
        assert not any(name.startswith("valid/") and not name.startswith(prefix + "/") for name in line)
        for kind in ("tokens", "sequences"):
            ends = [line[f"{prefix}/loss_{kind}_{end}_95"] for end in ("lower", "upper")]
            assert ends[0] < line[f"{prefix}/loss"] < ends[1]
        (event,) = events.Scalars(f"{prefix}/loss")
        assert (event.step, event.value) == (5, pytest.approx(line[f"{prefix}/loss"]))
    results = read(tmp_path / "run/checkpoints/results.jsonl")
    assert [r["val_data"] for r in results] == [[sources[1]], [sources[2]]]
    for result, line in zip(results, lines, strict=True):
        prefix = f"valid/{line['val_name']}/"
        metrics = {name.removeprefix(prefix): value for name, value in line.items() if prefix in name}
        assert result.items() >= metrics.items()
        assert result["tokens"] == 16 * result["sequences"] > 0
        assert result["checkpoint_path"].endswith("epoch_1.pt")
        assert result["model"] == "open_lm_test_tiny"
    text = (tmp_path / "run/out.log").read_text()
    assert f"held_out, {sources[2]}: loss {results[1]['loss']:.6f} | 95 % over sequences" in text


def test_names_given_and_one_entry(sources, tmp_path) -> None:
    train(sources, tmp_path, "--max-steps 5")
    evaluate(tmp_path, f"--val-data {sources[1]} {sources[2]} --val-data-name law poems")
    assert ["valid/law/loss" in line for line in validation(tmp_path, "evaluation")] == [True, False]
    evaluate(tmp_path, f"--val-data {sources[2]} --val-data-name poems", "one")
    (one,) = validation(tmp_path, "one")
    assert one["valid/loss"] == validation(tmp_path, "evaluation")[1]["valid/poems/loss"]
    assert one["val_name"] == "poems"


def test_limits_and_frequency(sources, tmp_path) -> None:
    """Of 4 intervals the 3rd and the last; 40 tokens are 2 sequences; 3 sequences at a time."""
    train(
        sources,
        tmp_path,
        f"--val-data {sources[2]} --val-frequency 3 --val-num-samples 40 --global-val-batch-size 3",
    )
    lines = validation(tmp_path)
    assert [line["step"] for line in lines] == [15, 20]
    assert [line["valid/tokens"] for line in lines] == [32, 32]


def test_pipe_with_a_cache_that_holds_one_shard(sources, tmp_path) -> None:
    """More held-out data than the cache: shards are fetched again when they are read."""
    train(sources, tmp_path, "--max-steps 5")
    evaluate(tmp_path, f"--val-data {sources[0]}", "local")
    cache = f"--data-cache {tmp_path / 'cache'} --data-cache-gib 1e-9"
    pattern = str(Path(sources[0]).with_name("shard_{00000000..00000002}.tar"))
    evaluate(tmp_path, f"--val-data 'pipe:echo ran >> {tmp_path}/ran; cat {pattern}' {cache}", "piped")
    local, piped = validation(tmp_path, "local")[0], validation(tmp_path, "piped")[0]
    assert piped["valid/sequences"] == local["valid/sequences"] == 200
    assert piped["valid/loss"] == local["valid/loss"]
    assert len((tmp_path / "ran").read_text().splitlines()) > 3
    assert len(list((tmp_path / "cache").glob("*.tar"))) == 1


def test_results_that_cannot_be_written_are_warned_of(sources, tmp_path) -> None:
    train(sources, tmp_path, "--max-steps 5")
    (tmp_path / "run/checkpoints/results.jsonl").mkdir()  # even root cannot append to a folder
    evaluate(tmp_path, f"--val-data {sources[2]}")
    text = (tmp_path / "evaluation/out.log").read_text()
    assert "results.jsonl could not be written (log.jsonl holds the metrics)" in text
    assert "valid/loss" in validation(tmp_path, "evaluation")[0]


def test_masks_act_in_training_and_evaluation_and_belong_to_the_run(sources, tmp_path, capsys) -> None:
    mask = "--target-mask-individual 3"
    train(sources, tmp_path, f"--max-steps 5 {mask} --val-data {sources[2]}")
    (line,) = validation(tmp_path)
    assert 0 < line["valid/tokens"] < 37 * 16
    assert line["tokens"] < 640
    for extra in ("", "--target-mask-individual 4", f"{mask} --target-mask-left 4"):
        with pytest.raises(SystemExit) as stop:
            train(sources, tmp_path, f"--resume latest {extra}")
        assert stop.value.code == 2
        assert "masks: {'left': None, 'individual': 3" in capsys.readouterr().err
    train(sources, tmp_path, "--resume latest --target-mask-individual -13 --max-steps 7")  # 16 - 13
    evaluate(tmp_path, f"--val-data {sources[2]}")
    assert validation(tmp_path, "evaluation")[0]["valid/tokens"] == 37 * 16
    for extra, says in (("--target-mask-left 16", "ids 0 … 15"), ("--target-mask-left -17", "ids 0 … 15")):
        with pytest.raises(SystemExit):
            evaluate(tmp_path, f"--val-data {sources[2]} {extra}", "refused")
        assert says in capsys.readouterr().err


def test_one_moe_flag_changes_what_the_checkpoint_says(sources, tmp_path, capsys) -> None:
    """MOE.md: the same weights without dropping; what is not given is the checkpoint's, MoE layers too."""
    experts = "--moe-freq 2 --moe-num-experts 4 --moe-capacity-factor 0.5"
    train(sources, tmp_path, f"{experts} --max-steps 5 --val-data {sources[2]}")
    (trained,) = validation(tmp_path)
    assert trained["valid/dropped_share"] > 0
    evaluate(tmp_path, f"--val-data {sources[2]} --moe-capacity-factor 0")
    (line,) = read(tmp_path / "run/checkpoints/results.jsonl")[1:]
    assert line["dropped_share"] == 0
    for extra, message in (
        ("--moe-num-experts 8", "--moe-num-experts 8, but .* was trained with 4"),
        ("--moe-top-k 1 --moe-backend megablocks", "--moe-top-k 1, but .* was trained with 2"),
        ("--moe-backend megablocks", "--moe-backend megablocks"),
    ):
        with pytest.raises(SystemExit) as end:
            evaluate(tmp_path, f"--val-data {sources[2]} {extra}", name="other")
        assert end.value.code == 2
        assert re.search(message, capsys.readouterr().err)
