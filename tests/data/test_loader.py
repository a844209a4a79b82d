import json
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from itertools import chain

import numpy as np
import pytest
import torch
from rich.console import Console

from open_lm import log as log_module
from open_lm.config import DataConfig
from open_lm.data.batches import load
from open_lm.data.loader import TrainData, ValData
from open_lm.data.masks import NO_MASKS
from open_lm.data.reader import Rows
from open_lm.data.retry import Stopped
from open_lm.log import Log

SEQ_LEN, VOCAB = 4, 1000


@pytest.fixture
def two_sources(write_source, tmp_path):
    """80 sequences of tokens 0 … 79 in 3 shards, 40 of 500 … 539 in one."""
    manifests = (write_source(tmp_path / "a", [50, 20, 10]), write_source(tmp_path / "b", [40], first=500))
    return DataConfig(
        dataset_manifest=manifests, train_data_mix_weights=(0.725, 0.275), data_key="json", workers=0
    )


def train_data(config, *, rank=0, world_size=1, global_batch=8, seed=3, vocab_size=VOCAB, **changes):
    config = DataConfig(**(config.__dict__ | changes))
    return TrainData(config, SEQ_LEN, vocab_size, rank, world_size, global_batch, seed)


def read(data, start, end):
    """The sequence ids (first tokens) of each batch."""
    return [batch.tokens_BS[:, 0].tolist() for batch in data.batches(start, end)]


def test_batches_are_inputs_and_shifted_targets(write_shard, tmp_path):
    path = write_shard(tmp_path / "a.tar", [[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]])
    config = DataConfig(train_data=(path,), data_key="json", disable_buffer=True, workers=0)
    (batch,) = train_data(config, global_batch=2).batches(0, 1)
    assert batch.tokens_BS.dtype == batch.targets_BS.dtype == torch.int64
    assert batch.tokens_BS.tolist() == [[1, 2, 3, 4], [6, 7, 8, 9]]
    assert batch.targets_BS.tolist() == [[2, 3, 4, 5], [7, 8, 9, 10]]
    assert batch.n_bad == 0


def test_the_global_order_is_the_same_for_any_ranks_and_workers(two_sources):
    expected = read(train_data(two_sources), 0, 9)
    ids = [i for batch in expected for i in batch]
    assert max(Counter(ids).values()) == 1
    for world_size, workers in ((1, 1), (1, 3), (2, 0), (4, 1), (8, 0)):
        ranks = [
            read(train_data(two_sources, rank=rank, world_size=world_size, workers=workers), 0, 9)
            for rank in range(world_size)
        ]
        assert [list(chain(*parts)) for parts in zip(*ranks, strict=True)] == expected
    assert read(train_data(two_sources, seed=4), 0, 9) != expected
    assert read(train_data(two_sources, disable_buffer=True), 0, 9) != expected


def test_every_step_can_be_the_first(two_sources):
    two_sources = DataConfig(**(two_sources.__dict__ | {"multiple_data_passes": True}))
    expected = read(train_data(two_sources), 0, 40)
    for start in range(40):
        assert read(train_data(two_sources), start, min(start + 3, 40)) == expected[start : start + 3]
    assert read(train_data(two_sources, workers=1), 17, 40) == expected[17:]
    assert read(train_data(two_sources), 40, 40) == []


def test_every_batch_holds_the_mix_and_every_sequence_comes_once_per_pass(two_sources):
    batches = read(train_data(two_sources, global_batch=40, multiple_data_passes=True), 0, 40)
    assert {sum(i < 500 for i in batch) for batch in batches} == {29}  # .725 * 40
    first = [i for batch in batches for i in batch if i < 500]
    second = [i for batch in batches for i in batch if i >= 500]
    assert sorted(first[:80]) == sorted(first[80:160]) == list(range(80))
    assert sorted(second[:40]) == list(range(500, 540))
    batches = read(train_data(two_sources, global_batch=8), 0, 10)
    assert {sum(i < 500 for i in batch) for batch in batches} == {5, 6}


def test_too_little_data_is_said_before_the_first_step(two_sources):
    data = train_data(two_sources)
    last = max(
        step for step in range(99) if data.order.counts(step)[0] <= 80 and data.order.counts(step)[1] <= 40
    )
    data.check_enough(last)
    with pytest.raises(
        ValueError, match=r"source 0 \(.*a/manifest\.jsonl\) holds 80 sequences, the run needs 8"
    ):
        data.check_enough(last + 1)
    with pytest.raises(
        ValueError, match=r"needs 5,\d{3} by step 1,000; source 1 .* needs 2,\d{3} .*--max-steps"
    ):
        data.check_enough(1000)
    train_data(two_sources, multiple_data_passes=True).check_enough(1000)
    resampled = train_data(two_sources, dataset_resampled=True)
    resampled.check_enough(1000)
    assert max(Counter(i for batch in read(resampled, 0, 50) for i in batch).values()) > 3


def test_contradictions_are_refused(two_sources):
    with pytest.raises(ValueError, match="global batch of 8 sequences cannot be shared by 3 ranks"):
        train_data(two_sources, world_size=3)
    with pytest.raises(ValueError, match="both given"):
        train_data(two_sources, train_data=("a.tar",))
    with pytest.raises(ValueError, match="no training data"):
        train_data(two_sources, dataset_manifest=None)
    with pytest.raises(ValueError, match="1 weights for 2 sources"):
        train_data(two_sources, train_data_mix_weights=(1.0,))


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_samples_go_by_the_policy(write_shard, tmp_path, workers):
    samples = [[1] * 5, [2] * 4, b"\x1f\x8bbroken", list(range(10, 30)), [5] * 5, [6] * 5]
    path = write_shard(tmp_path / "a.tar", samples)
    config = DataConfig(train_data=(path,), data_key="json", workers=workers)
    with pytest.raises(ValueError, match=r"^shard .*a\.tar: sample a/000002\.json\.gz cannot be read"):
        list(train_data(config, global_batch=2).batches(0, 3))
    assert not multiprocessing.active_children()

    def crops():
        data = train_data(config, global_batch=2, ignore_parse_errors=True, multiple_data_passes=True)
        batches = list(data.batches(0, 30))
        assert sum(batch.n_bad for batch in batches) == 2 * 10
        for batch in batches:
            for tokens, targets in zip(batch.tokens_BS, batch.targets_BS, strict=True):
                if targets[0] == -100:
                    assert (tokens == 0).all()
                    assert (targets == -100).all()
                else:
                    assert (tokens[1:] == targets[:-1]).all()
        return [i for batch in batches for i in batch.tokens_BS[:, 0].tolist() if i >= 10]

    assert len(crops()) == 10
    assert len(set(crops())) > 3  # another window in every pass,
    assert crops() == crops()  # the same in every run


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("token", [1000, -1001, 2**40])
def test_a_token_outside_the_vocabulary_is_named(write_shard, tmp_path, workers, token):
    path = write_shard(tmp_path / "a.tar", [[1] * 5, [999, 0, 2, token, 3], [3] * 5])
    config = DataConfig(train_data=(path,), data_key="json", workers=workers, ignore_parse_errors=True)
    with pytest.raises(
        ValueError, match=rf"a\.tar: sample a/000001\.json\.gz has token id {token}, .* has 1000"
    ):
        list(train_data(config, global_batch=3).batches(0, 1))


def test_a_window_of_a_longer_sequence_is_the_same_for_any_ranks(write_shard, tmp_path):
    path = write_shard(tmp_path / "a.tar", [list(range(500))] * 8)
    config = DataConfig(train_data=(path,), data_key="json", workers=0)
    (whole,) = read(train_data(config), 0, 1)
    halves = [read(train_data(config, rank=rank, world_size=2), 0, 1)[0] for rank in (0, 1)]
    assert halves[0] + halves[1] == whole
    assert len(set(whole)) > 4


def test_a_manifest_that_promises_too_much_is_an_error(write_source, tmp_path):
    manifest = write_source(tmp_path, [5, 5])
    config = DataConfig(dataset_manifest=(manifest,), data_key="json")

    def promise(*counts):
        lines = [{"shard": f"shard_{i:08d}", "num_sequences": n} for i, n in enumerate(counts)]
        (tmp_path / "manifest.jsonl").write_text("\n".join(map(json.dumps, lines)))

    message = r"shard_0000000{}\.tar: the manifest says 6 sequences, the tar holds 5"
    promise(6, 5)  # the first shard is opened at the start …
    with pytest.raises(ValueError, match=message.format(0)):
        train_data(config, global_batch=2)
    promise(5, 6)  # … the others when they are read
    with pytest.raises(ValueError, match=message.format(1)):
        list(train_data(config, global_batch=2).batches(0, 5))


def test_workers_end_with_the_iteration_and_leave_torchs_generator_alone(two_sources):
    state = torch.get_rng_state()
    for _ in train_data(two_sources, workers=3).batches(0, 9):
        assert len(multiprocessing.active_children()) == 3
        break
    assert not multiprocessing.active_children()
    assert torch.equal(torch.get_rng_state(), state)


INTERRUPTED = """
import multiprocessing, sys
from open_lm.config import DataConfig
from open_lm.data.loader import TrainData
config = DataConfig(dataset_manifest=(sys.argv[1],), data_key="json", workers=2, multiple_data_passes=True)
try:
    for batch in TrainData(config, 4, 1000, 0, 1, 4, 0).batches(0, 10**9):
        print(*(child.pid for child in multiprocessing.active_children()), flush=True)
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


def test_ctrl_c_stops_everything_quietly(write_source, tmp_path):
    manifest = write_source(tmp_path, [9])
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "-c", INTERRUPTED, manifest],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    workers = [int(pid) for pid in process.stdout.readline().split()]
    os.killpg(process.pid, signal.SIGINT)
    printed, errors = process.communicate(timeout=60)
    assert printed.splitlines()[-1] == "interrupted"
    assert (process.returncode, errors) == (0, "")
    assert len(workers) == 2
    time.sleep(0.2)
    for pid in workers:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_fingerprints_tell_what_the_order_depends_on(two_sources, write_source, tmp_path):
    data = train_data(two_sources)
    assert json.loads(json.dumps(data.fingerprint())) == data.fingerprint()
    assert train_data(two_sources, rank=1, world_size=2, workers=2).fingerprint() == data.fingerprint()
    for changes in (
        {"seed": 4},
        {"global_batch": 16},
        {"disable_buffer": True},
        {"train_data_mix_weights": None},
    ):
        assert train_data(two_sources, **changes).fingerprint() != data.fingerprint()
    moved = (write_source(tmp_path / "c", [50, 20, 10]), two_sources.dataset_manifest[1])
    assert train_data(two_sources, dataset_manifest=moved).fingerprint() == data.fingerprint()
    write_source(tmp_path / "a", [50, 20, 11])
    assert train_data(two_sources).fingerprint() != data.fingerprint()


def test_synthetic_tokens_are_shared_like_data():
    config = DataConfig(dataset_type="synthetic", workers=0)
    (whole,) = train_data(config).batches(5, 6)
    halves = [next(train_data(config, rank=r, world_size=2).batches(5, 6)).tokens_BS for r in (0, 1)]
    assert torch.equal(torch.cat(halves), whole.tokens_BS)
    assert torch.equal(whole.tokens_BS[:, 1:], whole.targets_BS[:, :-1])
    assert (whole.tokens_BS.min() >= 0) & (whole.tokens_BS.max() < VOCAB)
    assert len(whole.tokens_BS.unique()) > 20
    train_data(config).check_enough(10**9)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_held_out_data_is_read_once(write_source, tmp_path, workers, world_size):
    manifest = write_source(tmp_path, [5, 3, 3])
    per_rank = []
    for rank in range(world_size):
        data = ValData(manifest, "json", SEQ_LEN, VOCAB, workers=workers)
        per_rank.append(list(data.batches(2, rank, world_size)))
    rounds = [batch for batches in zip(*per_rank, strict=True) for batch in batches]
    assert [batch is None for batch in rounds] == [False] * 6 + [True] * (len(rounds) - 6)
    assert len(rounds) == -(-6 // world_size) * world_size
    ids = [batch.tokens_BS[:, 0].tolist() for batch in rounds if batch is not None]
    assert ids == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10]]


@pytest.mark.parametrize(("max_tokens", "sequences"), [(None, 8), (1, 1), (12, 3), (15, 3), (10**9, 8)])
def test_held_out_data_may_be_limited(write_source, tmp_path, max_tokens, sequences):
    write_source(tmp_path, [5, 3])
    entries = (
        f"{tmp_path}/manifest.jsonl",
        f"{tmp_path}/shard_0000000{{0..1}}.tar",
        f"pipe:cat {tmp_path}/shard_0000000{{0..1}}.tar",
    )
    for entry in entries:
        data = ValData(entry, "json", SEQ_LEN, VOCAB, max_tokens)
        assert data.sequences == sequences
        ids = [i for batch in data.batches(4) if batch is not None for i in batch.tokens_BS[:, 0].tolist()]
        assert ids == list(range(sequences))


def test_held_out_samples_go_by_the_policy(write_shard, tmp_path):
    path = write_shard(tmp_path / "a.tar", [[1] * 5, [2] * 4, b"no gzip", [3, 4, 5, 6, 7, 8, 9]])
    with pytest.raises(ValueError, match=r"sample a/000002\.json\.gz"):
        list(ValData(path, "json", SEQ_LEN, VOCAB).batches(4))
    (batch,) = ValData(path, "json", SEQ_LEN, VOCAB, ignore_parse_errors=True).batches(4)
    assert batch is not None
    assert batch.n_bad == 2
    assert int((batch.targets_BS != -100).sum()) == 2 * SEQ_LEN
    assert batch.targets_BS[3].tolist() == [4, 5, 6, 7]


def test_training_streams_from_s3(bucket, write_source, tmp_path, two_sources):
    expected = read(train_data(two_sources), 0, 6)
    for source in two_sources.dataset_manifest:
        name = source.split("/")[-2]
        folder = tmp_path / name
        for path in sorted(folder.iterdir()):
            path.rename(folder / f"{name}_{path.name}")
        manifest = folder / f"{name}_manifest.jsonl"
        manifest.write_text(manifest.read_text().replace("shard_", f"{name}_shard_"))
        bucket(folder)
    manifests = ("s3://bucket/a_manifest.jsonl", "s3://bucket/b_manifest.jsonl")
    config = DataConfig(**(two_sources.__dict__ | {"dataset_manifest": manifests, "workers": 2}))
    halves = [read(train_data(config, rank=rank, world_size=2), 0, 6) for rank in (0, 1)]
    assert [a + b for a, b in zip(*halves, strict=True)] == expected


def test_a_vocabulary_that_cannot_fit_is_said_before_anything_is_read(two_sources, tmp_path):
    (tmp_path / "b" / "info.json").write_text('{"vocab_size": 1000}')
    train_data(two_sources)
    ValData(two_sources.dataset_manifest[1], "json", SEQ_LEN, VOCAB)
    (tmp_path / "b" / "info.json").write_text('{"vocab_size": 1001}')
    said = r"b/manifest\.jsonl: its tokens are of .* 1,001 ids .*, the model's has 1,000: take a --model"
    with pytest.raises(ValueError, match=said):
        train_data(two_sources)
    with pytest.raises(ValueError, match=said):
        ValData(two_sources.dataset_manifest[1], "json", SEQ_LEN, VOCAB)
    for odd in ("[]", "{", '{"vocab_size": "many"}'):
        (tmp_path / "b" / "info.json").write_text(odd)
        train_data(two_sources)


def test_a_source_that_is_given_twice_is_said_and_used_twice(two_sources, caplog):
    a, b = two_sources.dataset_manifest
    data = train_data(two_sources, dataset_manifest=(a, b, b), train_data_mix_weights=None)
    assert f"--dataset-manifest {b} is given 2 times" in caplog.text
    assert f"{a} is given" not in caplog.text
    assert len(data.sources) == 3


def test_a_folder_is_no_manifest(two_sources, tmp_path):
    with pytest.raises(
        IsADirectoryError, match=r"/a is a folder: name its manifest, e\.g\. .*/a/manifest\.jsonl"
    ):
        train_data(two_sources, dataset_manifest=(f"{tmp_path}/a",), train_data_mix_weights=None)


class Warner:
    def __getitem__(self, number):
        logging.getLogger("open_lm.data.retry").warning("s3://me:secret@bucket/%d: reading it failed", number)
        return Rows(np.zeros((1, 3), np.uint16), np.ones(1, bool))


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_what_workers_warn_of_is_once_on_the_console_and_once_in_the_log(
    tmp_path, capfd, monkeypatch, workers, terminal
):
    monkeypatch.setattr(
        log_module, "Console", lambda: Console(force_terminal=terminal, width=200, no_color=True)
    )
    log = Log(tmp_path, rank=0)
    try:
        list(load(Warner(), range(3), workers, NO_MASKS))
    finally:
        log.close()
        logging.getLogger("open_lm").propagate = True
    printed = capfd.readouterr()
    for number in range(3):
        line = f"{number}: reading it failed"
        assert (printed.out + printed.err).count(line) == 1
        assert (tmp_path / "out.log").read_text().count(line) == 1
    assert "secret" not in printed.out + printed.err + (tmp_path / "out.log").read_text()


def test_the_search_for_sources_ends_when_the_run_is_to_stop(write_shard, tmp_path):
    stop = threading.Event()
    stop.set()
    config = DataConfig(train_data=(write_shard(tmp_path / "a.tar", [[1] * 5]),), workers=0)
    with pytest.raises(Stopped, match=r"a\.tar: the count of its sequences was stopped"):
        TrainData(config, 4, 10, 0, 1, 1, 0, stop=stop)
