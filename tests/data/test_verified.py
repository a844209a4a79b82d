"""Damage in whole shards, done by plain writes to their files: no damaged row is given, and it is named, skipped
and counted, or mended."""

import errno
import json
import os
import re
import shlex
import threading
from pathlib import Path

import numpy as np
import pytest

from open_lm.data.errors import DataError
from open_lm.data.inspect import verify_shard
from open_lm.data.loader import ValData
from open_lm.data.manifest import read_manifest
from open_lm.data.reader import SequenceReader
from open_lm.data.remote import Cache, Patience
from open_lm.main import main, show
from open_lm.tokenize.shard_writer import write_shards

LENGTH, VOCAB, ROWS, SHARDS = 33, 1000, 20, 3
SHARD = "shard_00000001.tar"
STRIDE = 1024  # of either key
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
    flip(folder / SHARD, row * STRIDE + offset)


def swap(folder) -> None:
    """Rows 5 and 6, headers and all."""
    content = bytearray((folder / SHARD).read_bytes())
    five, six = content[5 * STRIDE : 6 * STRIDE], content[6 * STRIDE : 7 * STRIDE]
    content[5 * STRIDE : 7 * STRIDE] = six + five
    (folder / SHARD).write_bytes(content)


def take_row_of_another_shard(folder) -> None:
    content = bytearray((folder / SHARD).read_bytes())
    other = (folder / "shard_00000002.tar").read_bytes()
    content[5 * STRIDE : 6 * STRIDE] = other[5 * STRIDE : 6 * STRIDE]
    (folder / SHARD).write_bytes(content)


DAMAGES = {
    "the first token": (lambda f: flip_row(f, offset=512), r"sample 00000001_00000005\.\w+: the digest"),
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


def read(folder, rows, length: int = LENGTH, vocab_size: int = VOCAB, **options):
    """Of the second shard."""
    data = ValData(str(folder / "manifest.jsonl"), "auto", length - 1, vocab_size, **options)
    return data.reader.read([(0, 1, i) for i in rows], 0, "crop", 0)


@pytest.mark.parametrize("vocab_size", [VOCAB, 2**17])  # batches of 16 and of 32 bits, whatever the shard has
def test_a_damaged_row_is_an_error_with_its_name(source, damage, vocab_size, caplog):
    with pytest.raises(
        ValueError,
        match=rf"^shard {source}/{SHARD}: {damage}.*, also from the disk: "
        r"(copy the shard again, or remove it and run open_lm\.tokenize again|put the manifest's own shard .*) "
        r"\(--ignore-parse-errors skips such samples\)$",
    ):
        read(source, range(ROWS), vocab_size=vocab_size)
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


@pytest.mark.parametrize("vocab_size", [VOCAB, 2**17])
@pytest.mark.parametrize("length", [1, 7, LENGTH - 1])
def test_of_windows_the_whole_row_is_verified(source, damage, length, vocab_size, tokens_NL):
    with pytest.raises(ValueError, match=f"{SHARD}: {damage}"):
        read(source, [BAD], length, vocab_size)
    rows = [*range(5), *range(7, ROWS)] * 5
    for row_L, i in zip(read(source, rows, length, vocab_size).tokens_BL, rows, strict=True):
        windows = np.lib.stride_tricks.sliding_window_view(tokens_NL[ROWS + i], length)
        assert (windows == row_L).all(axis=1).any()


@pytest.mark.parametrize("row", [0, ROWS - 1])
def test_headers_that_are_looked_at_first_go_by_the_policy_too(source, row):
    """The first one and the last one tell at once whether the manifest is the tar's; not if they are damaged."""
    flip_row(source, row, offset=3)
    with pytest.raises(
        ValueError, match=rf"{SHARD}: sample number {row} has a damaged header, .*, also from the disk"
    ):
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
    with pytest.raises(
        ValueError, match=rf"{SHARD}: sample 00000001_00000007\.\w+ is of a shard with the digest"
    ):
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
    assert begin <= BAD * STRIDE < (BAD + 1) * STRIDE <= end
    assert len(caplog.messages) == 1


def test_verify_names_each_damage_once(source, damage):
    finding = verify_shard(read_manifest(str(source / "manifest.jsonl")).shards[1], "auto", VOCAB)
    assert any(re.search(damage, text) for text in finding.damages)
    assert not any("also from the disk" in text for text in finding.damages)


RUN = (
    "--model open_lm_test_tiny --precision fp32 --global-batch-size 4 --train-num-samples 320 --epochs 1 --lr 1e-3 "
    "--warmup 2 --log-every-n-steps 1 --name run"
)


@pytest.fixture
def command(tmp_path) -> str:
    """Of a run that reads all of 24 rows, two of which are damaged."""
    write_shards(tmp_path / "corpus", np.random.default_rng(0).integers(0, 16, (24, 17)), 8, "u16")
    flip_row(tmp_path / "corpus", 2)
    flip_row(tmp_path / "corpus", 6, offset=3)
    return f"{RUN} --dataset-manifest {tmp_path}/corpus/manifest.jsonl --logs {tmp_path} --max-steps 6"


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_over_a_damaged_shard_ends_in_a_line(command, tmp_path, workers):
    with pytest.raises(DataError) as caught:
        main(shlex.split(f"{command} --workers {workers}"))
    assert re.fullmatch(
        rf"open_lm\.main: error: shard {tmp_path}/corpus/{SHARD}: sample (00000001_00000002\.u16|number 6)[:\s].*",
        show(caught.value),
    )


def test_or_goes_on_without_its_rows_up_to_the_limit(command, tmp_path):
    skip = f"{command} --workers 0 --ignore-parse-errors --bad-sample-limit"
    main(shlex.split(f"{skip} 2"))
    entries = map(json.loads, (tmp_path / "run/log.jsonl").read_text().splitlines())
    assert [entry["train/bad_samples"] for entry in entries if "train/loss" in entry][-1] == 2
    text = (tmp_path / "run/out.log").read_text()
    assert (
        len(re.findall(rf"{SHARD}: sample (00000001_00000002\.u16|number 6).*, also .*: ignored", text)) == 2
    )
    with pytest.raises(DataError, match=rf"--bad-sample-limit 1: .*; the last one: shard .*{SHARD}: sample"):
        main(shlex.split(f"{skip} 1".replace("--name run", "--name again")))


def test_evaluation_names_what_it_ignores_and_keeps_the_limit(command, tmp_path):
    write_shards(tmp_path / "good", np.random.default_rng(0).integers(0, 16, (24, 17)), 8, "u16")
    good = command.replace(f"{tmp_path}/corpus", f"{tmp_path}/good")
    evaluated = f"{good} --workers 0 --val-data {tmp_path}/corpus/manifest.jsonl --ignore-parse-errors"
    main(shlex.split(f"{evaluated} --bad-sample-limit 2"))
    text = (tmp_path / "run/out.log").read_text()
    assert (
        len(re.findall(rf"{SHARD}: sample (00000001_00000002\.u16|number 6).*, also .*: ignored", text)) == 2
    )
    with pytest.raises(
        DataError, match=rf"--bad-sample-limit 1: --val-data {tmp_path}/corpus/.* has 2 bad samples"
    ):
        main(shlex.split(f"{evaluated} --bad-sample-limit 1".replace("--name run", "--name again")))


def test_a_batch_of_which_nothing_is_left_says_why(command, tmp_path):
    for row in range(8):
        for shard in range(3):
            flip(tmp_path / f"corpus/shard_{shard:08d}.tar", row * STRIDE + 530)
    with pytest.raises(
        DataError, match=r"all its samples are bad; the first: shard .*\.tar: sample .*, also from"
    ):
        main(shlex.split(f"{command} --workers 0 --ignore-parse-errors"))


URL = f"s3://bucket/{SHARD}"


@pytest.fixture
def s3(faults, bucket, source):
    bucket(source)
    return faults


class Remote:
    """The source on the server, read through a cache."""

    def __init__(self, folder, limit_bytes: int = 2**30):
        self.cache = Cache(folder, limit_bytes, patience=Patience(1, 10, first_wait_seconds=0.001))
        self.reader = self.new()

    def new(self, **options) -> SequenceReader:
        """Its second shard is open, and whole."""
        data = ValData("s3://bucket/manifest.jsonl", "auto", LENGTH - 1, VOCAB, cache=self.cache, **options)
        data.reader.read([(0, 1, 0)])
        data.reader.settle()
        return data.reader

    @property
    def copy(self) -> Path:
        """What the open reader reads, whether it has a name or not."""
        return Path(f"/proc/self/fd/{self.reader.open_shards.readers[URL].fd}")

    def flip_row(self, row: int = BAD, offset: int = 520) -> None:
        os.chmod(self.copy, 0o600)
        flip(self.copy, row * STRIDE + offset)


def read_shard(reader: SequenceReader):
    return reader.read([(0, 1, i) for i in range(ROWS)])


@pytest.mark.parametrize("limit_bytes", [2**30, 0])
@pytest.mark.parametrize("offset", [3, 520])
def test_a_damaged_copy_is_fetched_again(s3, tmp_path, tokens_NL, caplog, limit_bytes, offset):
    remote = Remote(tmp_path / "cache", limit_bytes)
    s3.requests.clear()
    for row in (BAD, BAD + 9):
        remote.flip_row(row, offset)
    rows = read_shard(remote.reader)
    np.testing.assert_array_equal(rows.tokens_BL, tokens_NL[ROWS : 2 * ROWS])
    assert rows.good_B.all()
    assert len(s3.asked(SHARD)) == len(s3.asked("")) == 1
    assert len([record for record in caplog.records if record.name == "open_lm.data.verified"]) == 1
    assert re.search(
        f"{URL}: sample .*: it is read once more, after the shard was fetched again", caplog.text
    )
    held = [path.read_bytes() for path in remote.cache.folder.glob("*.tar")]
    assert ((tmp_path / "source" / SHARD).read_bytes() in held) == bool(limit_bytes)


@pytest.mark.parametrize("row", [0, BAD, ROWS - 1])
@pytest.mark.parametrize("offset", [3, 520])
def test_one_that_is_damaged_before_it_is_opened_too(s3, tmp_path, tokens_NL, row, offset):
    remote = Remote(tmp_path / "cache")
    remote.flip_row(row, offset)
    s3.requests.clear()
    reader = remote.new()
    np.testing.assert_array_equal(read_shard(reader).tokens_BL, tokens_NL[ROWS : 2 * ROWS])
    assert len(s3.asked(SHARD)) == 1


def test_a_copy_that_is_cut_short_while_it_is_open_is_fetched_again(s3, tmp_path, tokens_NL):
    remote = Remote(tmp_path / "cache")
    os.chmod(remote.copy, 0o600)
    os.truncate(remote.copy, 3000)
    s3.requests.clear()
    rows = read_shard(remote.reader)
    np.testing.assert_array_equal(rows.tokens_BL, tokens_NL[ROWS : 2 * ROWS])
    assert len(s3.asked(SHARD)) == 1


def failing(code: int, times: int):
    """os.preadv, of which so many calls fail after the third."""
    calls = []

    def preadv(*arguments):
        calls.append(arguments)
        if 3 < len(calls) <= 3 + times:
            raise OSError(code, os.strerror(code))
        return original(*arguments)

    original = os.preadv
    return preadv


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE])
def test_a_copy_that_cannot_be_read_is_fetched_again(s3, tmp_path, tokens_NL, monkeypatch, code):
    remote = Remote(tmp_path / "cache")
    monkeypatch.setattr(os, "preadv", failing(code, 2))  # the row is looked at twice before it is fetched
    s3.requests.clear()
    np.testing.assert_array_equal(read_shard(remote.reader).tokens_BL, tokens_NL[ROWS : 2 * ROWS])
    assert len(s3.asked(SHARD)) == 1


QUICK = Cache(Path("unused"), patience=Patience(1, 10, first_wait_seconds=0.1))


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE])
def test_a_local_row_that_cannot_be_read_for_a_moment(source, tokens_NL, monkeypatch, code):
    monkeypatch.setattr(os, "preadv", failing(code, 3))
    rows = read(source, range(ROWS), cache=QUICK)
    np.testing.assert_array_equal(rows.tokens_BL, tokens_NL[ROWS : 2 * ROWS])


def test_a_disk_that_fails_is_named_with_the_sample(source, monkeypatch):
    monkeypatch.setattr(os, "preadv", failing(errno.EIO, 10**9))
    with pytest.raises(
        ValueError, match=f"{SHARD}: sample number 3 cannot be read: Input/output error, also from"
    ):
        read(source, range(ROWS), cache=QUICK)
    monkeypatch.undo()
    monkeypatch.setattr(os, "preadv", failing(errno.EIO, 10**9))
    rows = read(source, range(ROWS), cache=QUICK, ignore_parse_errors=True)
    assert np.flatnonzero(rows.good_B).tolist() == [0, 1, 2]


def test_a_shard_that_is_written_over_in_its_place_is_waited_for(source, tokens_NL):
    data = ValData(str(source / "manifest.jsonl"), "auto", LENGTH - 1, VOCAB, cache=QUICK)
    data.reader.read([(0, 1, 0)])
    content = (source / SHARD).read_bytes()
    os.truncate(source / SHARD, 0)
    timer = threading.Timer(0.05, lambda: (source / SHARD).write_bytes(content))
    timer.start()
    np.testing.assert_array_equal(read_shard(data.reader).tokens_BL, tokens_NL[ROWS : 2 * ROWS])
    timer.join()


def test_one_that_is_mended_by_another_file_is_seen(source, tokens_NL):
    content = (source / SHARD).read_bytes()
    for row in (BAD, BAD + 1):
        flip_row(source, row)
    data = ValData(
        str(source / "manifest.jsonl"), "auto", LENGTH - 1, VOCAB, cache=QUICK, ignore_parse_errors=True
    )
    assert not data.reader.read([(0, 1, BAD)]).good_B.any()
    (source / "mended").write_bytes(content)
    os.replace(source / "mended", source / SHARD)
    rows = read_shard(data.reader)
    np.testing.assert_array_equal(rows.tokens_BL, tokens_NL[ROWS : 2 * ROWS])


def test_of_several_readers_one_fetches(s3, tmp_path, tokens_NL):
    remote = Remote(tmp_path / "cache")
    readers = [remote.reader, remote.new(), remote.new()]
    remote.flip_row()
    s3.requests.clear()
    for reader in readers:
        np.testing.assert_array_equal(read_shard(reader).tokens_BL, tokens_NL[ROWS : 2 * ROWS])
    assert len(s3.asked(SHARD)) == 1


def test_a_shard_that_is_damaged_there_is_fetched_again_once(s3, bucket, source, tmp_path, tokens_NL):
    """Its manifest has no sha256, which would tell at the fetch."""
    lines = [
        json.loads(line) | {"sha256": None} for line in (source / "manifest.jsonl").read_text().splitlines()
    ]
    (source / "manifest.jsonl").write_text("\n".join(map(json.dumps, lines)))
    for row in (BAD, BAD + 9):
        flip_row(source, row)
    bucket(source)
    remote = Remote(tmp_path / "cache")
    s3.requests.clear()
    rows = read_shard(remote.new(ignore_parse_errors=True))
    assert np.flatnonzero(~rows.good_B).tolist() == [BAD, BAD + 9]
    np.testing.assert_array_equal(rows.tokens_BL[rows.good_B], tokens_NL[ROWS : 2 * ROWS][rows.good_B])
    assert len(s3.asked(SHARD)) == 1
    with pytest.raises(
        ValueError, match=rf"^shard {URL}: sample .*, also after the shard was fetched again: copy the shard"
    ):
        read_shard(remote.reader)


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("cut", [False, True])
def test_what_the_server_has_goes_by_the_policy(bucket, faults, source, tmp_path, tokens_NL, cut, ranges):
    """Damage that was there before anything was fetched, which the sha256 or the row's own digest tells."""
    if cut:
        os.truncate(source / SHARD, 12 * STRIDE)
    else:
        flip_row(source)
    bucket(source)
    cache = Cache(tmp_path / "cache", 2**30 * ranges, patience=Patience(1, 10, first_wait_seconds=0.001))
    data = ValData(
        "s3://bucket/manifest.jsonl", "auto", LENGTH - 1, VOCAB, cache=cache, ignore_parse_errors=True
    )
    for _ in range(2):
        rows = read_shard(data.reader)
        assert np.flatnonzero(~rows.good_B).tolist() == (list(range(12, ROWS)) if cut else [BAD])
        np.testing.assert_array_equal(rows.tokens_BL[rows.good_B], tokens_NL[ROWS : 2 * ROWS][rows.good_B])
    data.reader.settle()
    with pytest.raises((OSError, ValueError), match=rf"{URL}: .*(after 3 fetches|the manifest says)"):
        read_shard(ValData("s3://bucket/manifest.jsonl", "auto", LENGTH - 1, VOCAB, cache=cache).reader)


def test_a_server_that_is_gone_is_named(s3, tmp_path):
    remote = Remote(tmp_path / "cache")
    remote.flip_row()
    s3.add(SHARD, *["503"] * 5)
    with pytest.raises(OSError, match=rf"^{URL}: fetching bytes .* failed 2 times"):
        read_shard(remote.reader)
