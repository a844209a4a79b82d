"""Damage in whole shards, done by plain writes to their files: no damaged row is given, and it is named, skipped and
counted, or mended."""

import json
import os
import re
import shlex

import numpy as np
import pytest

from open_lm.config import DataConfig
from open_lm.data import ranges, verified
from open_lm.data.inspect import verify_shard
from open_lm.data.loader import TrainData, ValData
from open_lm.data.manifest import read_manifest
from open_lm.data.reader import Reader
from open_lm.data.remote import Cache, Patience
from open_lm.data.shards import open_shard
from open_lm.main import main
from open_lm.tokenize.shard_writer import write_shards

LENGTH, VOCAB, ROWS, SHARDS = 33, 1000, 20, 3
SHARD = "shard_00000001.tar"
STRIDE = {"u16": 1024, "u32": 1024}
BAD = 5  # the row that is damaged


@pytest.fixture
def tokens_NL():
    return np.random.default_rng(0).integers(0, VOCAB, (SHARDS * ROWS, LENGTH))


@pytest.fixture(params=["u16", "u32"])
def key(request) -> str:
    return request.param


@pytest.fixture
def source(tmp_path, tokens_NL, key):
    """3 shards of 20 rows: the folder."""
    write_shards(tmp_path / "source", tokens_NL, ROWS, key)
    return tmp_path / "source"


def flip(path, offset: int) -> None:
    """One bit, in the place: times are those of before, as when a disk does it."""
    times = os.stat(path)
    with open(path, "r+b") as file:
        file.seek(offset)
        (byte,) = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ 4]))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def flip_row(folder, row: int = BAD, offset: int = 520) -> None:
    flip(folder / SHARD, row * 1024 + offset)


def swap(folder) -> None:
    """Rows 5 and 6, headers and all."""
    content = bytearray((folder / SHARD).read_bytes())
    five, six = content[5 * 1024 : 6 * 1024], content[6 * 1024 : 7 * 1024]
    content[5 * 1024 : 7 * 1024] = six + five
    (folder / SHARD).write_bytes(content)


def take_row_of_another_shard(folder) -> None:
    content = bytearray((folder / SHARD).read_bytes())
    other = (folder / "shard_00000002.tar").read_bytes()
    content[5 * 1024 : 6 * 1024] = other[5 * 1024 : 6 * 1024]
    (folder / SHARD).write_bytes(content)


DAMAGES = {
    "the first token": (lambda f: flip_row(f, offset=512), r"sample 00000001_00000005\.\w+: the digest of its bytes"),
    "a row": (flip_row, r"sample 00000001_00000005\.\w+: the digest of its bytes is not the one in its header"),
    "the name": (lambda f: flip_row(f, offset=3), "sample number 5 has a damaged header, or none"),
    "the number": (lambda f: flip_row(f, offset=16), "sample number 5 has a damaged header, or none"),
    "its digest": (lambda f: flip_row(f, offset=265 + 9), "sample number 5 has a damaged header, or none"),
    "the shard's digest": (lambda f: flip_row(f, offset=297 + 9), "sample number 5 has a damaged header, or none"),
    "two rows swapped": (swap, r"in the place of sample number 5, .* is 00000001_00000006\.\w+ of"),
    "another shard's": (take_row_of_another_shard, r"sample 00000002_00000005\.\w+ is of a shard with the digest"),
}  # fmt: skip


@pytest.fixture(params=DAMAGES)
def damage(request, source) -> str:
    """Done; what is said of it."""
    spoil, message = DAMAGES[request.param]
    spoil(source)
    return message


def read(folder, rows, length: int = LENGTH, **options):
    """Of the second shard."""
    data = ValData(str(folder / "manifest.jsonl"), "auto", length - 1, VOCAB, **options)
    return data.reader.read([(0, 1, i) for i in rows], 0, "crop", 0)


def test_a_damaged_row_is_an_error_with_its_name(source, damage, caplog):
    with pytest.raises(
        ValueError,
        match=rf"^shard {source}/{SHARD}: {damage}.*, also from the disk: copy or write the shard again, or its "
        r"manifest, .*data\.index\) \(--ignore-parse-errors skips such samples\)$",
    ):
        read(source, range(ROWS))
    assert len(caplog.messages) == 1
    assert re.search(f"{SHARD}: {damage}.*: it is read once more, from the disk", caplog.text)


def test_it_is_skipped_and_counted_by_the_policy(source, damage, tokens_NL):
    rows = read(source, range(ROWS), ignore_parse_errors=True)
    good = sorted(set(range(ROWS)) - {5, 6} if "in the place" in damage else set(range(ROWS)) - {5})
    assert np.flatnonzero(rows.good_B).tolist() == good
    np.testing.assert_array_equal(rows.tokens_BL[good], tokens_NL[ROWS : 2 * ROWS][good])
    assert not rows.tokens_BL[BAD].any()
    assert len(rows.bad) == ROWS - len(good)
    assert re.match(f"shard {source}/{SHARD}: {damage}", rows.bad[0])


def test_rows_that_are_not_read_are_not_looked_at(source, damage, tokens_NL):
    rows = [*range(5), *range(7, ROWS)]
    np.testing.assert_array_equal(read(source, rows).tokens_BL, tokens_NL[ROWS : 2 * ROWS][rows])


@pytest.mark.parametrize("length", [1, 7, LENGTH - 1])
def test_of_windows_the_whole_row_is_verified(source, damage, length, tokens_NL):
    with pytest.raises(ValueError, match=f"{SHARD}: {damage}"):
        read(source, [BAD], length)
    rows = [*range(5), *range(7, ROWS)] * 5
    for row_L, i in zip(read(source, rows, length).tokens_BL, rows, strict=True):
        windows = np.lib.stride_tricks.sliding_window_view(tokens_NL[ROWS + i], length)
        assert (windows == row_L).all(axis=1).any()


@pytest.mark.parametrize("row", [0, ROWS - 1])
def test_headers_that_are_looked_at_first_go_by_the_policy_too(source, row):
    """The first one and the last one tell at once whether the manifest is the tar's."""
    flip_row(source, row, offset=3)
    with pytest.raises(ValueError, match=rf"{SHARD}: the manifest promises sequence {row} .* there is no member"):
        read(source, range(ROWS))
    rows = read(source, range(ROWS), ignore_parse_errors=True)
    assert np.flatnonzero(~rows.good_B).tolist() == [row]


@pytest.mark.parametrize("missing", ["row_digests", "first_offset"])
def test_what_the_manifest_does_not_say(source, missing, tokens_NL):
    """Where rows lie is found, and that they have digests is not looked for."""
    lines = [json.loads(line) for line in (source / "manifest.jsonl").read_text().splitlines()]
    lines = [{key: value for key, value in line.items() if key != missing} for line in lines]
    (source / "manifest.jsonl").write_text("\n".join(map(json.dumps, lines)))
    flip_row(source)
    if missing == "row_digests":
        different = read(source, range(ROWS)).tokens_BL != tokens_NL[ROWS : 2 * ROWS]
        assert np.argwhere(different).tolist() == [[BAD, 4 if lines[0]["data_key"] == "u16" else 2]]
    else:
        with pytest.raises(ValueError, match="the digest of its bytes"):
            read(source, range(ROWS))


def test_another_version_of_the_shard_is_not_read(source, tokens_NL, key):
    manifest = (source / "manifest.jsonl").read_bytes()
    write_shards(source, tokens_NL[::-1], ROWS, key)
    (source / "manifest.jsonl").write_bytes(manifest)
    with pytest.raises(ValueError, match=rf"{SHARD}: sample 00000001_00000007\.\w+ is of a shard with the digest"):
        read(source, [7])


def test_damage_in_memory_alone_is_mended(source, tokens_NL, monkeypatch, caplog):
    """As if the disk had the right bytes: what is forgotten, whole pages, is put there."""
    right, forgotten = (source / SHARD).read_bytes(), []
    flip_row(source)

    def forget(fd, offset, length, advice):
        assert advice == os.POSIX_FADV_DONTNEED
        forgotten.append((offset, offset + length))
        (source / SHARD).write_bytes(right)

    monkeypatch.setattr(os, "posix_fadvise", forget)
    np.testing.assert_array_equal(read(source, range(ROWS)).tokens_BL, tokens_NL[ROWS : 2 * ROWS])
    ((begin, end),) = forgotten
    assert begin % 4096 == end % 4096 == 0
    assert begin <= BAD * 1024 < (BAD + 1) * 1024 <= end
    assert len(caplog.messages) == 1


def test_verify_names_each_damage_once(source, damage):
    finding = verify_shard(read_manifest(str(source / "manifest.jsonl")).shards[1], "auto", VOCAB)
    assert any(re.search(damage, text) for text in finding.damages)
    assert not any("also from the disk" in text for text in finding.damages)


RUN = (
    "--model open_lm_test_tiny --precision fp32 --global-batch-size 4 --train-num-samples 320 --epochs 1 --lr 1e-3 "
    "--warmup 2 --log-every-n-steps 1 --workers 1 --name run"
)


@pytest.fixture
def corpus(tmp_path):
    """24 rows of which two are damaged; a run of 5 steps of 4 meets one at least."""
    write_shards(tmp_path / "corpus", np.random.default_rng(0).integers(0, 16, (24, 17)), 8, "u16")
    flip_row(tmp_path / "corpus", 2)
    for row in range(6):
        flip_row(tmp_path / "corpus", row, offset=512)
    return tmp_path / "corpus"


def train(corpus, extra: str = "") -> None:
    main(shlex.split(f"{RUN} --dataset-manifest {corpus}/manifest.jsonl --logs {corpus.parent} {extra}"))
