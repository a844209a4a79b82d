"""What happens to samples that cannot be used: named, counted, limited; never silently short."""

import json
import os

import numpy as np
import pytest

from open_lm.config import DataConfig
from open_lm.data.loader import TrainData

SEQ_LEN, SAMPLES = 4, 12


def open_data(folder, key="json", ignore=True, **changes):
    config = DataConfig(
        dataset_manifest=(str(folder / "manifest.jsonl"),), data_key=key, workers=0, disable_buffer=True,
        ignore_parse_errors=ignore, **changes,
    )  # fmt: skip
    return TrainData(config, SEQ_LEN, 1000, 0, 1, global_batch=SAMPLES, seed=0)


@pytest.mark.parametrize("length", [0, 300, 512 * 9, 512 * 9 + 100, 512 * 10 + 4])
def test_of_a_tar_that_is_cut_short_what_is_missing_is_counted_and_named(write_source, tmp_path, length):
    write_source(tmp_path, [SAMPLES])
    os.truncate(tmp_path / "shard_00000000.tar", length)
    with pytest.raises(ValueError, match="shard_00000000.tar"):
        list(open_data(tmp_path, ignore=False).batches(0, 1))
    (batch,) = open_data(tmp_path).batches(0, 1)
    whole = length // 1024 if length != 512 * 10 + 4 else 4  # a header and a block each
    assert batch.n_bad == SAMPLES - whole == len(batch.bad)
    good = sorted(
        row[0] for row, target in zip(batch.tokens_BS.tolist(), batch.targets_BS.tolist()) if target[0] >= 0
    )
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
