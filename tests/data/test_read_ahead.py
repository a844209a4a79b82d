"""Shards are in the cache before they are needed: few at a time, in the order of need, by threads that end."""

import json
import threading
import time
from pathlib import Path

import pytest

from open_lm.config import DataConfig
from open_lm.data import read_ahead
from open_lm.data.loader import TrainData
from open_lm.data.manifest import Shard
from open_lm.data.read_ahead import Fetcher, ReadAhead
from open_lm.data.remote import Cache, Patience


def wait_until(holds) -> None:
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def running() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "read-ahead"]


@pytest.fixture
def shards(tmp_path):
    """100 shards of 1,000 bytes; a line in `log` for each that is fetched."""
    log = tmp_path / "log"
    return [Shard(f"pipe:echo {n} >> {log}; printf %01000d {n}", 1) for n in range(100)], log


def fetched(log) -> list[int]:
    return [int(line) for line in log.read_text().split()] if log.exists() else []


def test_a_bounded_number_is_fetched_in_the_order_of_need(shards, tmp_path):
    listed, log = shards
    fetcher = Fetcher(lambda number: [listed[number]], range(100), Cache(tmp_path / "cache"))
    ahead = read_ahead.AHEAD_SHARDS
    wait_until(lambda: len(fetched(log)) == 1 + ahead)
    time.sleep(0.2)
    assert sorted(fetched(log)) == list(range(1 + ahead))
    fetcher.reach(10)
    wait_until(lambda: len(fetched(log)) == 11 + ahead)
    time.sleep(0.2)
    assert sorted(fetched(log)) == list(range(11 + ahead))
    fetcher.reach(99)
    wait_until(lambda: len(fetched(log)) == 100)
    fetcher.close()
    for thread in fetcher.threads:
        thread.join(20)
        assert not thread.is_alive()


def test_half_the_cache_at_most_is_read_ahead(shards, tmp_path):
    listed, log = shards
    known = [shard._replace(bytes=1000) for shard in listed]
    fetcher = Fetcher(
        lambda number: [known[number]], range(100), Cache(tmp_path / "cache", limit_bytes=10_000)
    )
    wait_until(lambda: len(fetched(log)) == 6)
    time.sleep(0.3)
    assert sorted(fetched(log)) == list(range(6))  # the item's own, and 5 ahead
    fetcher.close()


def test_what_an_item_needs_comes_from_the_cache(shards, tmp_path):
    listed, log = shards

    class Items:
        def __getitem__(self, number: int) -> int:
            return number

        def shards(self, number: int) -> list[Shard]:
            return [listed[number // 10]]

        def settle(self) -> None:
            pass

    before = running()
    items = ReadAhead(Items(), range(0, 40, 2), Cache(tmp_path / "cache"))
    assert not set(running()) - set(before)  # nothing begins in the process that only forks
    assert [items[number] for number in range(0, 40, 2)] == list(range(0, 40, 2))
    wait_until(lambda: len(fetched(log)) == 4)
    items.close()
    wait_until(lambda: not set(running()) - set(before))
    assert sorted(fetched(log)) == [0, 1, 2, 3]


def piped(manifest: str, log) -> str:
    """A manifest whose shards are commands that print those of another."""
    folder, lines = manifest.rpartition("/")[0], []
    for line in Path(manifest).read_text().splitlines():
        entry = json.loads(line)
        url = f"pipe:echo {entry['shard'][-2:]} >> {log}; : :// ; cat {folder}/{entry['shard']}.tar"
        lines.append(json.dumps(entry | {"shard": url}))
    path = f"{folder}/piped.jsonl"
    Path(path).write_text("\n".join(lines))
    return path


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_the_same_and_errors_come_in_their_place(write_source, tmp_path, workers, cache):
    manifest = write_source(tmp_path / "data", [4] * 20)
    log = tmp_path / "log"

    def read(path: str) -> list:
        config = DataConfig(dataset_manifest=(path,), data_key="json", workers=workers, disable_buffer=True)
        data = TrainData(config, 4, 1000, 0, 1, 4, 3, Cache(tmp_path / f"cache{workers}", patience=QUICK))
        batches = []
        try:
            batches.extend(batch.tokens_BS[:, 0].tolist() for batch in data.batches(0, 20))
        except OSError as error:
            batches.append(str(error))
        return batches

    QUICK = Patience(1, first_wait_seconds=0.01)
    expected = read(manifest)
    path = piped(manifest, log)
    assert read(path) == expected
    assert len(fetched(log)) == 20  # each once, by whichever process or thread
    (tmp_path / "data" / "shard_00000007.tar").unlink()
    met = read(piped(manifest, tmp_path / "log2"))
    assert "shard_00000007.tar" in met[-1]
    first = next(i for i, batch in enumerate(expected) if any(28 <= token < 32 for token in batch))
    assert met[:-1] == expected[:first]
    wait_until(lambda: not running())
