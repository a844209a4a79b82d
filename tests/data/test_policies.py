"""What happens to samples that cannot be used: named, counted, limited; never silently short."""

import json
import multiprocessing
import os
import shlex
import signal
import threading

import numpy as np
import pytest
import torch

from open_lm.config import DataConfig
from open_lm.data.errors import DataError
from open_lm.data.loader import TrainData
from open_lm.data.manifest import Shard
from open_lm.data.reader import OpenShards
from open_lm.data.remote import Cache, Patience
from open_lm.main import main
from open_lm.tokenize.shard_writer import write_shards

SEQ_LEN, SAMPLES = 4, 12


def open_data(folder, key="json", ignore=True, **changes):
    config = DataConfig(
        dataset_manifest=(str(folder / "manifest.jsonl"),), data_key=key, workers=0, disable_buffer=True,
        ignore_parse_errors=ignore, **changes,
    )  # fmt: skip
    return TrainData(config, SEQ_LEN, 1000, 0, 1, global_batch=SAMPLES, seed=0)


@pytest.mark.parametrize(
    ("length", "whole"), [(0, 0), (300, 0), (512 * 9, 4), (512 * 9 + 100, 5), (512 * 10 + 4, 5)]
)
def test_of_a_tar_that_is_cut_short_what_is_missing_is_counted_and_named(
    write_source, tmp_path, length, whole
):
    write_source(tmp_path, [SAMPLES])
    os.truncate(tmp_path / "shard_00000000.tar", length)
    with pytest.raises(ValueError, match=r"shard_00000000\.tar"):
        list(open_data(tmp_path, ignore=False).batches(0, 1))
    (batch,) = open_data(tmp_path).batches(0, 1)
    assert batch.n_bad == SAMPLES - whole == len(batch.bad)
    good = sorted(batch.tokens_BS[batch.targets_BS[:, 0] >= 0, 0].tolist())
    assert good == list(range(whole))
    assert all("shard_00000000.tar: sample number" in text and "cut short" in text for text in batch.bad)


@pytest.mark.parametrize("length", [0, 1024 * 5, 1024 * 5 + 516])
def test_of_a_binary_tar_too(write_shard, tmp_path, length):
    samples = [np.full(5, i, dtype="<u2").tobytes() for i in range(SAMPLES)]
    write_shard(tmp_path / "shard_00000000.tar", samples, "u16")
    size = (tmp_path / "shard_00000000.tar").stat().st_size
    line = {"shard": "shard_00000000", "num_sequences": SAMPLES, "bytes": size, "data_key": "u16",
            "sequence_tokens": 5, "first_offset": 512, "stride": 1024}  # fmt: skip
    (tmp_path / "manifest.jsonl").write_text(json.dumps(line))
    os.truncate(tmp_path / "shard_00000000.tar", length)
    with pytest.raises(ValueError, match="cut short"):
        list(open_data(tmp_path, "u16", ignore=False).batches(0, 1))
    (batch,) = open_data(tmp_path, "u16").batches(0, 1)
    assert batch.n_bad == SAMPLES - length // 1024


def test_a_whole_tar_with_fewer_sequences_than_its_manifest_says_is_always_an_error(write_source, tmp_path):
    manifest = tmp_path / "manifest.jsonl"
    write_source(tmp_path, [SAMPLES])
    manifest.write_text(manifest.read_text().replace(str(SAMPLES), str(SAMPLES + 1)))
    with pytest.raises(ValueError, match="the manifest says 13 sequences, the tar holds 12"):
        open_data(tmp_path)


RUN = (
    "--model open_lm_test_tiny --data-key json --precision fp32 --global-batch-size 8 --train-num-samples 640 \
--epochs 2 --lr 1e-3 --warmup 2 --log-every-n-steps 1 --workers 0 --multiple-data-passes --name run"
)


def train(manifest, logs, extra=""):
    main(shlex.split(f"{RUN} --dataset-manifest {manifest} --logs {logs} {extra}"))


@pytest.fixture
def with_short_samples(write_shard, tmp_path):
    """32 samples; numbers 0, 8, 16, 24 are too short: 5 steps see 4 or more of them, 10 steps 8 or more."""
    samples = [[i % 16] * (5 if i % 8 == 0 else 17) for i in range(32)]
    write_shard(tmp_path / "data/shard_00000000.tar", samples)
    manifest = tmp_path / "data/manifest.jsonl"
    manifest.write_text(json.dumps({"shard": "shard_00000000", "num_sequences": 32}))
    return manifest


def test_too_many_bad_samples_end_the_run_also_across_a_resume(with_short_samples, tmp_path):
    limit = "--ignore-parse-errors --bad-sample-limit 7"
    train(with_short_samples, tmp_path, f"{limit} --max-steps 5")
    text = (tmp_path / "run/out.log").read_text()
    assert text.count("has 5 tokens, 17 are needed: ignored") == 4  # each once, though passes go on
    with pytest.raises(DataError) as error:
        train(with_short_samples, tmp_path, f"{limit} --resume latest")
    assert "--bad-sample-limit 7: step 7 brings the run's bad samples to 8; the last one: shard" in str(
        error.value
    )
    assert "shard_00000000.tar: sample shard_00000000/0000" in str(error.value)


def train_rank(manifest, logs):
    with pytest.raises(DataError, match=r"bad samples to .*; the last one: shard .* has 5 tokens"):
        train(manifest, logs, "--ignore-parse-errors --bad-sample-limit 2")


def test_ranks_end_together(spawn, with_short_samples, tmp_path):
    spawn(2, train_rank, str(with_short_samples), str(tmp_path))


def test_changed_data_go_on_with_the_flag_and_a_warning(with_short_samples, tmp_path, capsys):
    train(with_short_samples, tmp_path, "--max-steps 5")
    with_short_samples.write_text(with_short_samples.read_text().replace("}", ', "x": 1}'))
    with pytest.raises(SystemExit):
        train(with_short_samples, tmp_path, "--resume latest --max-steps 6 --global-batch-size 4")
    message = capsys.readouterr().err
    train(with_short_samples, tmp_path, "--resume latest --max-steps 6 --seed 5 --resume-changed")
    for text in (message, (tmp_path / "run/out.log").read_text()):
        assert "source 0 (" in text
        assert "the first shard that differs is number 0" in text
    assert "--global-batch-size: 8 there, 4 here" in message
    assert "--seed: 0 there, 5 here" in (tmp_path / "run/out.log").read_text()


def test_a_limit_needs_its_policy(with_short_samples, tmp_path, capsys):
    with pytest.raises(SystemExit):
        train(with_short_samples, tmp_path, "--bad-sample-limit 3")
    assert "--bad-sample-limit 3: expected 0 or more, with --ignore-parse-errors" in capsys.readouterr().err


def test_a_run_goes_on_with_appended_data(write_shard, with_short_samples, tmp_path):
    train(with_short_samples, tmp_path, "--max-steps 3")
    write_shard(tmp_path / "data/shard_00000001.tar", [[7] * 17] * 24)
    with open(with_short_samples, "a") as file:
        file.write("\n" + json.dumps({"shard": "shard_00000001", "num_sequences": 24}) + "\n")
    train(with_short_samples, tmp_path, "--max-steps 5 --resume latest --append-data")
    train(with_short_samples, tmp_path, "--max-steps 7 --resume latest")
    progress = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [line["train/bad_samples"] for line in progress if "train/loss" in line][-1] == 4  # one whole pass


def test_a_shard_that_vanishes_is_looked_for_again(write_shard, tmp_path, caplog):
    path = tmp_path / "a.tar"
    write_shard(path, [[1] * 17])
    away = path.rename(tmp_path / "away.tar")
    threading.Timer(0.1, away.rename, (path,)).start()
    cache = Cache(tmp_path / "cache", patience=Patience(first_wait_seconds=0.5))
    assert len(OpenShards("auto", cache).get(Shard(str(path), 1))) == 1
    assert "a.tar: no such file; it is looked for again in" in caplog.text

    path.unlink()
    cache = Cache(tmp_path / "cache", patience=Patience(first_wait_seconds=0.01))
    with pytest.raises(FileNotFoundError, match=r"a\.tar: no such file"):
        OpenShards("auto", cache).get(Shard(str(path), 1))


def test_a_worker_that_dies_is_named(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.1)
    write_shards(tmp_path, np.arange(600).reshape(200, 3), 100, key="u16")
    config = DataConfig(dataset_manifest=(f"{tmp_path}/manifest.jsonl",), workers=1)
    batches = TrainData(config, 2, 1000, 0, 1, 4, 0).batches(0, 50)
    next(batches)
    (child,) = multiprocessing.active_children()
    os.kill(child.pid, signal.SIGKILL)
    with pytest.raises(OSError, match=r"a process that reads the data has died .*--workers 1 of each rank"):
        list(batches)
