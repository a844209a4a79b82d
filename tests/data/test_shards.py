import gzip
import io
import json
import mmap
import os
import signal
import tarfile
import threading
from dataclasses import replace

import numpy as np
import pytest
import webdataset

from open_lm.data import shards
from open_lm.data.binary import UnreadableSample
from open_lm.data.retry import Stopped
from open_lm.data.shards import find_source, index_tar, list_members, open_shard, scan_members

SAMPLES = [[1, 2, 3], [], list(range(2049)), [50431] * 5]


@pytest.mark.parametrize(
    ("ending", "key"), [("json", "json"), ("json.gz", "json"), ("json.gz", "json.gz"), ("txt", "txt")]
)
def test_samples_are_read_in_any_order(write_shard, tmp_path, cache, ending, key):
    reader = open_shard(write_shard(tmp_path / "a.tar", SAMPLES, ending), key, cache)
    assert len(reader) == len(SAMPLES)
    for i in (3, 0, 2, 1, 3):
        assert reader[i].dtype == np.int64
        assert reader[i].tolist() == SAMPLES[i]
    reader.close()


def test_txt_may_be_a_python_tuple(write_shard, tmp_path, cache):
    reader = open_shard(write_shard(tmp_path / "a.tar", [b"(1, 2)", b" [3,]\n"], "txt"), "txt", cache)
    assert [tokens.tolist() for tokens in (reader[0], reader[1])] == [[1, 2], [3]]
    reader.close()


def write_tar(path, tar_format, names, mtime=0):
    with tarfile.open(path, "w", format=tar_format) as tar:
        for number, name in enumerate(names):
            content = json.dumps([number] * (number * 50)).encode()
            member = tarfile.TarInfo(name)
            member.mtime = mtime
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        folder = tarfile.TarInfo("folder.json")
        folder.type = tarfile.DIRTYPE if tar_format == tarfile.GNU_FORMAT else tarfile.REGTYPE
        tar.addfile(folder)


def write_webdataset(path, names):
    with webdataset.TarWriter(str(path)) as writer:
        for number, _ in enumerate(names):
            writer.write(
                {"__key__": f"{number:09d}", "json.gz": [number] * (number * 50), "txt": "no tokens"}
            )


PLAIN = [f"{number:09d}.json" for number in range(20)]
ODD = ["a/b.json", "./c.meta.json", "d" * 300 + ".json", "ü.json", "x" * 99 + "/" + "y" * 90 + ".json"]


@pytest.mark.parametrize(
    ("write", "is_plain"),
    [
        (lambda path: write_tar(path, tarfile.USTAR_FORMAT, PLAIN), True),
        (lambda path: write_tar(path, tarfile.PAX_FORMAT, PLAIN, mtime=1.5), True),
        (lambda path: write_webdataset(path, PLAIN), True),
        (lambda path: write_tar(path, tarfile.GNU_FORMAT, PLAIN + ODD), False),
        (lambda path: write_tar(path, tarfile.PAX_FORMAT, PLAIN + ODD), False),
    ],
)
def test_the_fast_index_is_that_of_the_standard_library(tmp_path, write, is_plain):
    path = tmp_path / "a.tar"
    write(path)
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        found, end = scan_members(data)
        if is_plain:
            assert (found, end) == list_members(file.fileno(), path.stat().st_size)
        else:
            assert found is None
        index = index_tar(file.fileno(), str(path), "json")
        assert index.is_ended
    with tarfile.open(path) as tar:
        names = [
            m for m in tar if m.isreg() and m.name.rpartition("/")[2].partition(".")[2] in ("json", "json.gz")
        ]
        assert index.offset_N.tolist() == [m.offset_data for m in names]
        assert index.size_N.tolist() == [m.size for m in names]
        assert index.gzipped_N.tolist() == [m.name.endswith("gz") for m in names]


def test_what_webdataset_writes_is_read(tmp_path, cache):
    write_webdataset(tmp_path / "a.tar", PLAIN)
    reader = open_shard(str(tmp_path / "a.tar"), "json", cache)
    assert [reader[i].tolist() for i in range(20)] == [[i] * (i * 50) for i in range(20)]
    reader.close()


def test_a_tar_cut_anywhere_is_never_silently_short(write_shard, tmp_path, cache):
    write_shard(tmp_path / "a.tar", [[1] * 400] * 3, "json")
    whole = (tmp_path / "a.tar").read_bytes()
    size = 3 * (512 + 1536)  # members; then the end mark
    cut = str(tmp_path / "cut.tar")
    for length in sorted({*range(0, size, 256), size, size - 200, 2048 + 1, 2048 + 511}):
        with open(cut, "wb") as file:
            file.write(whole[:length])
        with pytest.raises(ValueError, match=r"shard .*cut\.tar: "):
            open_shard(cut, "json", cache)
    open_shard(
        cut, "json", cache, num_sequences=3
    ).close()  # nothing but the mark is missing: the manifest says so


def test_other_files_are_no_tars(tmp_path, cache):
    (tmp_path / "a.tar").write_bytes(os.urandom(5000))
    with pytest.raises(ValueError, match=r"a\.tar: cannot be read as a tar"):
        open_shard(str(tmp_path / "a.tar"), "json", cache)
    with pytest.raises(FileNotFoundError, match=r"b\.tar: no such file"):
        open_shard(str(tmp_path / "b.tar"), "json", cache)


def test_counts_and_endings_are_checked(write_shard, tmp_path, cache):
    path = write_shard(tmp_path / "a.tar", SAMPLES)
    with pytest.raises(ValueError, match=r"a\.tar: the manifest says 1,005 sequences, the tar holds 4"):
        open_shard(path, "json", cache, num_sequences=1005)
    with pytest.raises(
        ValueError, match=r"a\.tar: no member ends in \.txt \(it has \.json\.gz\): see --data-key"
    ):
        open_shard(path, "txt", cache)
    with pytest.raises(ValueError, match="--data-key jsn: must be one of auto, json"):
        open_shard(path, "jsn", cache)


@pytest.mark.parametrize(
    "content",
    [
        b"[1, 2",
        b"",
        b"\xff\xfe",
        b"[1.5]",
        b'["1"]',
        b"[[1]]",
        b"[[1], 2]",
        b'{"a": 1}',
        b"7",
        b"[18446744073709551615]",
    ],
)
def test_an_unreadable_sample_is_named(write_shard, tmp_path, cache, content):
    for ending, key in (("json", "json"), ("txt", "txt"), ("json.gz", "json")):
        damaged = gzip.compress(content)[:-1] if ending == "json.gz" else content
        path = write_shard(tmp_path / "a.tar", [[1], damaged], ending)
        reader = open_shard(path, key, cache)
        with pytest.raises(ValueError, match=rf"shard .*a\.tar: sample a/000001\.{ending} cannot be read"):
            reader[1]
        assert reader[0].tolist() == [1]
        reader.close()


def test_sources_of_tars_are_counted(write_shard, tmp_path, cache, caplog):
    for number, n in enumerate((3, 2, 4)):
        write_shard(tmp_path / f"s_{number}.tar", [[1]] * n)
    with caplog.at_level("INFO", logger=shards.__name__):
        source = find_source(f"{tmp_path}/s_{{0..2}}.tar", "json", cache)
    assert [shard.num_sequences for shard in source.shards] == [3, 2, 4]
    assert "counted 9 sequences in 3 shards" in caplog.text
    assert "a manifest avoids it" in caplog.text
    assert len(find_source(f"{tmp_path}/s_{{0..2}}.tar", "json", cache, max_sequences=4).shards) == 2
    assert source.sha256 != find_source(f"{tmp_path}/s_{{0..1}}.tar", "json", cache).sha256
    with pytest.raises(FileNotFoundError, match=r"s_3\.tar"):
        find_source(f"{tmp_path}/s_{{2..3}}.tar", "json", cache)
    with pytest.raises(ValueError, match="names no shard"):
        find_source("::", "json", cache)


def put(header: bytes, **fields: bytes) -> bytes:
    """A header with other fields, and the checksum that it then has."""
    places = {"size": 124, "magic": 257}
    changed = bytearray(header)
    for name, value in fields.items():
        changed[places[name] : places[name] + len(value)] = value
    changed[148:156] = b"%06o\0 " % (sum(changed) - sum(changed[148:156]) + 8 * 32)
    return bytes(changed)


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_flipped_bit_of_any_size_loses_no_row(tmp_path, cache, tar_format):
    """In a digit of the second of three sizes: the third would not be met."""
    write_tar(tmp_path / "a.tar", tar_format, PLAIN if tar_format == tarfile.USTAR_FORMAT else PLAIN + ODD)
    whole = (tmp_path / "a.tar").read_bytes()
    with tarfile.open(tmp_path / "a.tar") as tar:
        offsets = [member.offset_data - 512 for member in tar if member.isreg()]
    for offset in (offsets[1], offsets[7], offsets[-1]):
        of_two = offset == offsets[-1] and tar_format == tarfile.GNU_FORMAT  # a long name has one before
        where = r"[\d,]+" if of_two else f"{offset:,}"
        for digit in range(127, 135):
            damaged = bytearray(whole)
            damaged[offset + digit] ^= 1
            (tmp_path / "b.tar").write_bytes(damaged)
            for expected in (None, 20):
                with pytest.raises(
                    ValueError, match=rf"b\.tar: cannot be read as a tar: the header at byte {where} is"
                ):
                    open_shard(str(tmp_path / "b.tar"), "json", cache, num_sequences=expected)


def test_the_part_before_a_damaged_header_is_read_where_bad_samples_are_ignored(write_shard, tmp_path, cache):
    path = write_shard(tmp_path / "a.tar", [[1], [2], [3]], "json")
    damaged = bytearray((tmp_path / "a.tar").read_bytes())
    damaged[2 * 1024 + 130] ^= 1
    (tmp_path / "a.tar").write_bytes(damaged)
    reader = open_shard(path, "json", cache, num_sequences=3, cut_short=True)
    assert [reader[i].tolist() for i in range(2)] == [[1], [2]]
    with pytest.raises(UnreadableSample, match="sample number 2"):
        reader[2]
    reader.close()


SIZES = {
    "negative": b"-0000001000\0", "letters": b"00000zz0000\0",
    "negative base 256": b"\xff" * 10 + b"\xfc\x00", "huge base 256": b"\x80" + b"\x7f" * 11,
    "blank": b"            ", "underscore": b"0000_002000\0", "plus": b"+0000002000\0",
}  # fmt: skip


@pytest.mark.parametrize("magic", [b"ustar\x0000", b"ustar  \0", b"\0" * 8])
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("kind", [b"0", b"x", b"L", b"g", b"5"])
def test_no_size_is_an_endless_tar(write_shard, tmp_path, cache, size, magic, kind):
    path = write_shard(tmp_path / "a.tar", [[1], [2], [3]], "json")
    whole = bytearray((tmp_path / "a.tar").read_bytes())
    whole[1024 + 156 : 1024 + 157] = kind
    whole[1024:1536] = put(bytes(whole[1024:1536]), size=size, magic=magic)
    (tmp_path / "a.tar").write_bytes(whole)
    signal.alarm(5)
    try:
        with pytest.raises(ValueError, match=r"a\.tar: "):
            open_shard(path, "json", cache)
    finally:
        signal.alarm(0)


def test_counting_ends_when_it_is_no_longer_wanted(write_shard, tmp_path, cache):
    stop = threading.Event()
    cache = replace(cache, patience=replace(cache.patience, stop=stop))
    for number in range(2):
        write_shard(tmp_path / f"{number}.tar", SAMPLES)
    assert find_source(f"{tmp_path}/{{0..1}}.tar", "json", cache).sequences == 8
    stop.set()
    with pytest.raises(Stopped, match="count of its sequences was stopped, after 0 shards"):
        find_source(f"{tmp_path}/{{0..1}}.tar", "json", cache)
