import multiprocessing
import os
import time

import pytest

from open_lm.data.manifest import read_manifest
from open_lm.data.remote import Cache, open_file
from open_lm.data.shards import find_source, open_shard


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
    with pytest.raises(OSError, match=r"pipe:echo half; echo no keys >&2; exit 3: .* exit status 3: no keys"):
        open_shard("pipe:echo half; echo no keys >&2; exit 3", "json", cache)
    assert {path.suffix for path in cache.folder.iterdir()} == {".lock"}


def test_what_a_command_printed_is_forgotten_with_the_run(write_shard, tmp_path):
    path = write_shard(tmp_path / "a.tar", [[1]])
    for run, token in (("first", 1), ("first", 1), ("second", 2)):
        reader = open_shard(f"pipe:cat {path}", "json", Cache(tmp_path / "cache", run=run))
        assert reader[0].tolist() == [token]
        reader.close()
        write_shard(tmp_path / "a.tar", [[2]])


def read_first(url: str, cache: Cache, results) -> None:
    reader = open_shard(url, "json", cache)
    results.put(reader[0].tolist())
    reader.close()


def test_processes_that_race_fetch_once(write_shard, tmp_path, cache):
    path, log = write_shard(tmp_path / "a.tar", [[7]]), tmp_path / "log"
    url = f"pipe:echo fetched >> {log}; sleep 0.3; cat {path}"
    fork = multiprocessing.get_context("fork")
    results = fork.SimpleQueue()
    processes = [fork.Process(target=read_first, args=(url, cache, results)) for _ in range(5)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0] * 5
    assert [results.get() for _ in processes] == [[7]] * 5
    results.close()
    assert log.read_text() == "fetched\n"


def test_the_cache_is_bounded_and_open_files_survive_eviction(tmp_path):
    cache = Cache(tmp_path / "cache", limit_bytes=2500)
    first = open_file("pipe:printf %01000d 1", cache)
    for number in range(2, 6):
        os.close(open_file(f"pipe:printf %01000d {number}", cache))
        os.utime(max(cache.folder.glob("*.tar"), key=lambda path: path.stat().st_mtime_ns), (number, number))
    assert sum(path.stat().st_size for path in cache.folder.glob("*.tar")) == 2000
    assert os.read(first, 2000) == b"1".zfill(1000)
    os.close(first)
    os.close(open_file("pipe:printf %01000d 1", cache))  # fetched again
    assert sum(path.stat().st_size for path in cache.folder.glob("*.tar")) == 2000


def test_what_was_opened_last_is_kept(tmp_path):
    cache, log = Cache(tmp_path / "cache", limit_bytes=250), tmp_path / "log"
    for name in "abacab":  # c evicts b
        os.close(open_file(f"pipe:echo -n {name} >> {log}; printf %0100d 0", cache))
        time.sleep(0.01)
    assert log.read_text() == "abcb"


def test_downloads_of_dead_processes_are_removed(tmp_path):
    cache = Cache(tmp_path)
    for age, name in ((0, "new.1.partial"), (4000, "old.1.partial")):
        (tmp_path / name).write_bytes(b"x")
        stamp = (tmp_path / name).stat().st_mtime - age
        os.utime(tmp_path / name, (stamp, stamp))
    os.close(open_file("pipe:echo", cache))
    assert [path.name for path in tmp_path.glob("*.partial")] == ["new.1.partial"]
