"""The cache: bounded, shared by processes that race, clean after those that die."""

import errno
import hashlib
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from open_lm.data import cache as cache_module
from open_lm.data import remote
from open_lm.data.loader import warn_of_small_cache
from open_lm.data.manifest import Shard, Source
from open_lm.data.remote import Cache, Patience, open_file

HUNDRED = cache_module.Expected(100)
FORK = multiprocessing.get_context("fork")


def sizes(cache: Cache) -> list[int]:
    return [path.stat().st_size for path in cache.folder.glob("*.tar")]


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


def read_all(urls: list[str], cache: Cache, results) -> None:
    for url in urls:
        fd = open_file(url, cache)
        results.put((url, os.read(fd, 2000)))
        os.close(fd)


def race(processes: int, urls: list[str], cache: Cache) -> list[tuple[str, bytes]]:
    results = FORK.SimpleQueue()
    readers = [
        FORK.Process(target=read_all, args=(urls[i:] + urls[:i], cache, results)) for i in range(processes)
    ]
    for reader in readers:
        reader.start()
    read = [results.get() for _ in range(processes * len(urls))]
    for reader in readers:
        reader.join(30)
    assert [reader.exitcode for reader in readers] == [0] * processes
    results.close()
    return read


def test_processes_that_race_fetch_once(tmp_path):
    cache, log = Cache(tmp_path / "cache"), tmp_path / "log"
    read = race(5, [f"pipe:echo fetched >> {log}; sleep 0.3; printf 7"], cache)
    assert [content for _, content in read] == [b"7"] * 5
    assert log.read_text() == "fetched\n"


def test_processes_read_right_while_others_evict(tmp_path):
    cache = Cache(tmp_path / "cache", limit_bytes=2500)
    for url, content in race(4, [f"pipe:printf %01000d {number}" for number in range(8)], cache):
        assert content == url.split()[-1].encode().zfill(1000)
    assert sum(sizes(cache)) <= 2500
    assert not list(cache.folder.glob("*.partial"))


def test_room_is_made_before_a_file_of_known_size(tmp_path):
    cache = Cache(tmp_path, limit_bytes=250)
    for name in ("a", "b"):
        os.close(cache_module.open_or_write(cache, name, name, lambda file: file.write(b"x" * 100), HUNDRED))
    met = []
    os.close(cache_module.open_or_write(cache, "c", "c", lambda file: met.append(sum(sizes(cache))), HUNDRED))
    assert met == [100]


def test_without_a_cache_only_what_is_open_stays(tmp_path):
    cache = Cache(tmp_path / "cache", limit_bytes=0)
    fd = open_file("pipe:printf 7", cache)
    assert sizes(cache) == []
    assert os.read(fd, 2) == b"7"
    os.close(fd)


def test_what_a_dead_process_left_is_removed(tmp_path):
    cache = Cache(tmp_path / "cache")
    fetching = FORK.Process(target=open_file, args=("pipe:head -c 100000 /dev/zero; sleep 20", cache))
    fetching.start()
    while not (partial := list(cache.folder.glob("*.partial"))) or not partial[0].stat().st_size:
        time.sleep(0.01)
    os.close(open_file("pipe:printf 1", cache))
    assert partial[0].exists()  # its process lives
    assert fetching.pid is not None
    os.kill(fetching.pid, signal.SIGKILL)
    fetching.join(30)
    os.close(open_file("pipe:printf 2", cache))
    assert not partial[0].exists()


def test_a_full_disk_empties_the_cache_and_then_is_named(tmp_path):
    cache = Cache(tmp_path)
    os.close(open_file("pipe:printf 1", cache))
    met = []

    def write(file) -> None:
        met.append(len(sizes(cache)))
        if len(met) < tries:
            raise OSError(errno.ENOSPC, "No space left on device")

    tries = 2
    os.close(cache_module.open_or_write(cache, "a", "s3://bucket/a", write))
    assert met == [1, 0]
    tries = 9
    with pytest.raises(
        OSError, match=r"s3://bucket/b: no space is left in the shard cache .* --data-cache"
    ) as e:
        cache_module.open_or_write(cache, "b", "s3://bucket/b", write)
    assert e.value.errno == errno.ENOSPC
    assert len(met) == 4
    assert not list(tmp_path.glob("*.partial"))


def test_the_disk_filled_by_a_download_is_not_waited_for(tmp_path, monkeypatch):
    def fill(url, file, patience) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(remote, "run_command", fill)
    with pytest.raises(OSError, match=r"no space is left .* are free"):
        open_file("pipe:printf 1", Cache(tmp_path, patience=Patience(first_wait_seconds=600)))


def test_another_users_folder_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises(PermissionError, match="another user: give --data-cache"):
        open_file("pipe:printf 1", Cache(tmp_path))


def test_the_flags_describe_the_cache(tmp_path):
    from open_lm.config import DataConfig

    config = DataConfig(data_cache=str(tmp_path), data_cache_gib=0.5, data_retries=2, data_timeout=3)
    cache = cache_module.find_cache(config)
    assert (cache.folder, cache.limit_bytes) == (Path(tmp_path), 2**29)
    assert (cache.patience.retries, cache.patience.timeout_seconds) == (2, 3)
    assert cache_module.find_cache(DataConfig()).folder == cache_module.default_folder()


def test_a_cache_smaller_than_what_is_read_at_a_time_is_said(caplog):
    shards = tuple(Shard(f"s3://bucket/{n}.tar", 10, bytes=2**20) for n in range(100))
    local = tuple(Shard(f"/data/{n}.tar", 10, bytes=2**30) for n in range(100))
    sources = [Source("a", shards, ""), Source("b", local, "")]
    warn_of_small_cache(sources, Cache(limit_bytes=64 * 2**20))
    warn_of_small_cache(sources, Cache(limit_bytes=0))
    assert not caplog.records
    warn_of_small_cache(sources, Cache(limit_bytes=63 * 2**20))
    assert "up to 0.0625 GiB of remote shards are read at a time (64 of a source)" in caplog.text


def cached(cache: Cache) -> Path:
    (path,) = cache.folder.glob("*.tar")
    return path


def keep_times(path: Path, change) -> None:
    """As of blocks that a crash of the host, or the disk, lost."""
    stat = path.stat()
    change(path)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.parametrize("knows", [True, False])
@pytest.mark.parametrize("length", [0, 40])
def test_a_cached_file_that_became_shorter_is_fetched_again(tmp_path, caplog, knows, length):
    cache, log = Cache(tmp_path / "cache"), tmp_path / "log"
    url = f"pipe:echo x >> {log}; printf %0100d 7"
    expected = (100, hashlib.sha256(b"7".zfill(100)).hexdigest()) if knows else ()
    os.close(open_file(url, cache, *expected))
    keep_times(cached(cache), lambda path: os.truncate(path, length))
    fd = open_file(url, cache, *expected)
    assert os.read(fd, 200) == b"7".zfill(100)
    os.close(fd)
    assert log.read_text() == "x\nx\n"
    assert f"its copy in the shard cache, {cached(cache)}, is damaged: it has {length} bytes" in caplog.text
    os.close(open_file(url, cache, *expected))
    assert log.read_text() == "x\nx\n"


@pytest.mark.parametrize("noticed_by", ["time", "restart"])
def test_a_cached_file_with_other_bytes_is_fetched_again(tmp_path, caplog, monkeypatch, noticed_by):
    cache, log = Cache(tmp_path / "cache"), tmp_path / "log"
    url, sha256 = f"pipe:echo x >> {log}; printf %0100d 7", hashlib.sha256(b"7".zfill(100)).hexdigest()
    os.close(open_file(url, cache, 100, sha256))
    path = cached(cache)
    if noticed_by == "restart":
        keep_times(path, lambda path: path.write_bytes(bytes(100)))
        monkeypatch.setattr(cache_module, "boot_identity", lambda: "another")
    else:
        path.write_bytes(bytes(100))
    fd = open_file(url, cache, 100, sha256)
    assert os.read(fd, 200) == b"7".zfill(100)
    os.close(fd)
    assert log.read_text() == "x\nx\n"
    assert f"{path}, is damaged: its sha256 is" in caplog.text


def test_a_whole_file_is_verified_once_of_a_start_of_the_host(tmp_path, monkeypatch):
    cache, sha256 = Cache(tmp_path / "cache"), hashlib.sha256(b"7").hexdigest()
    os.close(open_file("pipe:printf 7", cache, 1, sha256))
    read = []
    check = cache_module.check_cached
    monkeypatch.setattr(cache_module, "check_cached", lambda *known: read.append(check(*known)))
    os.close(open_file("pipe:printf 7", cache, 1, sha256))
    assert read == []
    for boot in ("another", "third"):
        monkeypatch.setattr(cache_module, "boot_identity", lambda boot=boot: boot)
        os.close(open_file("pipe:exit 1", cache, 1, sha256))
        os.close(open_file("pipe:exit 1", cache, 1, sha256))
    assert len(read) == 2


def test_files_are_on_the_disk_before_they_have_their_names(tmp_path, monkeypatch):
    cache, synced, fsync = Cache(tmp_path / "cache"), [], os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda fd: synced.append((os.fstat(fd).st_size, sizes(cache))) or fsync(fd)
    )
    os.close(open_file("pipe:printf 7", cache))
    assert synced == [(1, [])]


def test_the_proof_goes_with_its_file(tmp_path):
    cache = Cache(tmp_path / "cache", limit_bytes=150)
    for number in range(3):
        os.close(open_file(f"pipe:printf %0100d {number}", cache))
    assert [path.stem for path in cache.folder.glob("*.proof")] == [cached(cache).stem]
    cache_module.remove(cached(cache))
    os.close(open_file("pipe:printf 7", Cache(cache.folder, limit_bytes=0)))
    assert not list(cache.folder.glob("*.proof"))


def test_a_folder_that_is_none_is_said_with_its_flag(tmp_path):
    from open_lm.config import DataConfig

    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "in it", "/proc/none"):
        with pytest.raises(ValueError, match=f"^--data-cache {folder}: no file can be written there"):
            cache_module.check_folder(DataConfig(data_cache=str(folder)))
    cache_module.check_folder(DataConfig(data_cache=str(tmp_path / "new")))
    assert list((tmp_path / "new").iterdir()) == []
    cache_module.check_folder(DataConfig())
