import hashlib
import os
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from open_lm.data import remote
from open_lm.data.index import IndexConfig, write_manifest
from open_lm.data.loader import ValData
from open_lm.data.manifest import read_manifest
from open_lm.data.remote import Cache, Patience, open_file, read_bytes
from open_lm.data.shards import find_source, open_shard
from open_lm.tokenize.shard_writer import write_shards


def test_manifests_and_shards_come_from_s3(bucket, write_source, tmp_path, cache):
    write_source(tmp_path / "data", [2, 3])
    bucket(tmp_path / "data")
    source = read_manifest("s3://bucket/manifest.jsonl")
    assert source._replace(name="") == find_source("s3://bucket/manifest.jsonl", "json", cache)._replace(
        name=""
    )
    assert [shard.url for shard in source.shards] == [f"s3://bucket/shard_0000000{n}.tar" for n in (0, 1)]
    reader = open_shard(source.shards[1].url, "json", cache, 3)
    assert [reader[i].tolist() for i in range(3)] == [[2 + i] * 5 for i in range(3)]
    reader.close()
    assert len(list(cache.folder.glob("*.tar"))) == 1
    write_source(tmp_path / "data", [2, 3], first=10)
    bucket(tmp_path / "data")  # the same names: the cache must not serve what was there before
    reader = open_shard(source.shards[1].url, "json", cache, 3)
    assert reader[0].tolist() == [12] * 5
    reader.close()


def test_what_s3_lacks_is_named(bucket, tmp_path, cache, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"s3://bucket/a\.jsonl: no such file"):
        read_manifest("s3://bucket/a.jsonl")
    with pytest.raises(FileNotFoundError, match=r"s3://bucket/a\.tar: no such file"):
        open_shard("s3://bucket/a.tar", "json", cache)
    with pytest.raises(OSError, match=r"nothing://a\.tar: cannot be read: .*[Pp]rotocol"):
        open_shard("nothing://a.tar", "json", cache)


def test_commands_are_shards(write_shard, tmp_path, cache):
    for number in (0, 1):
        write_shard(tmp_path / f"{number}.tar", [[number] * 3])
    source = find_source(f"pipe:cat {tmp_path}/{{0..1}}.tar", "json", cache)
    readers = [open_shard(shard.url, "json", cache, 1) for shard in source.shards]
    assert [reader[0].tolist() for reader in readers] == [[0] * 3, [1] * 3]
    for reader in readers:
        reader.close()


def test_a_failing_command_is_shown_and_leaves_nothing(tmp_path, cache):
    with pytest.raises(OSError, match=r"pipe:echo … \[\w{8}\]: .* exit status 3: no keys"):
        open_shard("pipe:echo half; echo no keys >&2; exit 3", "json", cache)
    assert {path.suffix for path in cache.folder.iterdir()} == {".lock"}


def test_what_a_command_printed_is_forgotten_with_the_run(write_shard, tmp_path):
    path = write_shard(tmp_path / "a.tar", [[1]])
    for run, token in (("first", 1), ("first", 1), ("second", 2)):
        reader = open_shard(f"pipe:cat {path}", "json", Cache(tmp_path / "cache", run=run))
        assert reader[0].tolist() == [token]
        reader.close()
        write_shard(tmp_path / "a.tar", [[2]])


def test_a_command_is_tried_again_unless_it_cannot_succeed(tmp_path, cache, caplog):
    log = tmp_path / "log"
    url = f"pipe:echo tried >> {log}; test $(wc -l < {log}) -ge 3 && echo -n whole"
    fd = open_file(url, cache)
    assert os.read(fd, 9) == b"whole"
    os.close(fd)
    assert log.read_text() == "tried\n" * 3
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2
    for command in ("nosuchcommand", "echo 'An error occurred (404) when calling' >&2; exit 1"):
        log.unlink()
        with pytest.raises(OSError, match="ended with exit status") as error:
            open_file(f"pipe:echo tried >> {log}; {command}", cache)
        assert log.read_text() == "tried\n"
        assert "attempt" not in str(error.value)


def test_a_command_that_says_nothing_is_ended(tmp_path):
    cache = Cache(tmp_path / "cache", patience=Patience(1, 0.2, first_wait_seconds=0.01))
    pids = tmp_path / "pids"
    with pytest.raises(OSError, match=r"failed 2 times .* printed nothing for 0.2 s"):
        open_file(f"pipe:echo $$ >> {pids}; echo some; sleep 60", cache)
    for pid in pids.read_text().split():
        assert not Path("/proc", pid).exists()
    assert not list(cache.folder.glob("*.partial"))


def test_what_a_command_prints_is_checked(tmp_path, cache):
    log, sha256 = tmp_path / "log", hashlib.sha256(b"whole").hexdigest()
    url = f"pipe:echo tried >> {log}; printf whole | head -c $(wc -l < {log} | sed s/2/5/)"
    fd = open_file(url, cache, 5, sha256)
    assert os.read(fd, 9) == b"whole"
    os.close(fd)
    os.close(open_file(url, cache, 5, sha256))  # cached, by its digest
    os.close(open_file("pipe:false", cache, 5, sha256))
    assert log.read_text() == "tried\n" * 2


def test_a_file_system_without_ranges_is_read_whole(tmp_path, cache, monkeypatch):
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe("/a.tar", b"x" * 100)
    found = remote.find_remote("memory://a.tar", cache.patience)
    for has_parts in (True, False):
        with open(tmp_path / "a", "w+b") as file:
            remote.download("memory://a.tar", found._replace(has_parts=has_parts), file, cache.patience)
            file.flush()
            assert (tmp_path / "a").read_bytes() == b"x" * 100
    memory.rm("/a.tar")


def test_names_of_objects_may_hold_colons(bucket, tmp_path, cache):
    """Which fsspec takes for a chain of file systems; a chain is still one."""
    tokens_NL = np.arange(60).reshape(20, 3)
    write_shards(tmp_path / "there" / "a::b", tokens_NL, 10, key="u16")
    (tmp_path / "there" / "a::b" / "shard_00000001.tar").rename(tmp_path / "there" / "a::b" / "c::d.tar")
    manifest = tmp_path / "there" / "a::b" / "manifest.jsonl"
    manifest.write_text(manifest.read_text().replace("shard_00000001", "c::d"))
    bucket(tmp_path / "there")
    url = "s3://bucket/a::b/manifest.jsonl"
    for given in (cache, replace(cache, limit_bytes=0)):  # by ranges, whole
        data = ValData(url, "auto", 2, 100, cache=given)
        np.testing.assert_array_equal(data.reader.read([(0, 0, 3), (0, 1, 9)]).tokens_BL, tokens_NL[[3, 19]])
    pattern = "s3://bucket/a:[:]b/*.tar"
    lines = write_manifest(IndexConfig((pattern,), output="s3://bucket/a::b/again::.jsonl", processes=1))
    assert {line["shard"] for line in lines} == {"shard_00000000", "c::d"}
    assert set(read_manifest("s3://bucket/a::b/again::.jsonl").shards) == set(read_manifest(url).shards)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("b", "zipped")
    assert read_bytes(f"zip://b::file://{tmp_path}/a.zip") == b"zipped"
