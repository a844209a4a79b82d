"""Rows of shards that are not in the cache yet: few bytes, the same rows, the same errors, through faults."""

import json
import re
import threading
import time
from dataclasses import replace
from pathlib import Path

import boto3
import numpy as np
import pytest

from open_lm.config import DataConfig
from open_lm.data import digests, ranges, reader
from open_lm.data.loader import TrainData, ValData
from open_lm.data.remote import Cache, Patience
from open_lm.tokenize.shard_writer import add_checksums_, write_shards

SHARDS, SEQUENCES, LENGTH, VOCAB = 8, 400, 65, 1000
BATCH = 64  # a sequence of each lane: of all shards
MANIFEST = "s3://bucket/manifest.jsonl"


@pytest.fixture(autouse=True)
def fetches_end(monkeypatch):
    """Before the server does."""
    monkeypatch.setattr(ranges, "IDLE_SECONDS", 0.1)
    before = set(threading.enumerate())  # other tests' threads may be left
    yield
    names = {"ranges", "whole shards", "read-ahead"}
    for thread in [
        thread for thread in threading.enumerate() if thread.name in names and thread not in before
    ]:
        thread.join(30)


@pytest.fixture
def there(tmp_path) -> Path:
    """8 shards of 400 sequences."""
    tokens_NL = np.random.default_rng(0).integers(0, VOCAB, (SHARDS * SEQUENCES, LENGTH))
    write_shards(tmp_path / "there", tokens_NL, SEQUENCES, key="u16")
    return tmp_path / "there"


@pytest.fixture
def s3(faults, bucket, there):
    bucket(there)
    return faults


def make_cache(tmp_path, **options) -> Cache:
    return Cache(tmp_path / "cache", patience=Patience(3, 10, first_wait_seconds=0.001), **options)


def make_data(manifest, cache, **options) -> TrainData:
    config = DataConfig(dataset_manifest=(str(manifest),), workers=0, multiple_data_passes=True, **options)
    return TrainData(config, LENGTH - 1, VOCAB, 0, 1, BATCH, 5, cache)


def read(data, steps=range(1)) -> list:
    return [data.items[step] for step in steps]  # without reading ahead


def bytes_asked(requests) -> int:
    """Of requests with a range; all of them have one."""
    found = [re.fullmatch(r"bytes=(\d+)-(\d+)", request.range) for request in requests]
    return sum(int(match[2]) - int(match[1]) + 1 for match in found)


@pytest.fixture
def held(monkeypatch, fetches_end):
    """No remote shard comes whole until `held.clear()`."""
    waiting = [True]
    open_shard = reader.open_shard

    def hold(shard, *arguments, **options):
        while waiting and shard.url.startswith("s3:"):
            time.sleep(0.01)
        return open_shard(shard, *arguments, **options)

    monkeypatch.setattr(reader, "open_shard", hold)
    monkeypatch.setattr(
        reader, "REQUEST_BYTES", 2**13
    )  # of so small shards more rows than else may come by ranges
    yield waiting
    waiting.clear()


def wait_for_shards(data) -> None:
    """Until every shard that was begun is there."""
    for shard in data.reader.open_shards.readers.values():
        if isinstance(shard, ranges.RangedShard):
            shard.whole.exception(30)


def test_the_first_batch_needs_few_bytes_and_all_rows_are_the_local_ones(s3, there, tmp_path, held):
    expected = read(make_data(there / "manifest.jsonl", None), range(40))
    data = make_data(MANIFEST, make_cache(tmp_path))
    s3.requests.clear()
    first = read(data)
    requests = s3.asked(".tar")
    assert len({request.path for request in requests}) == SHARDS
    row = 512 + 2 * LENGTH
    assert BATCH * row <= bytes_asked(requests) <= BATCH * (row + ranges.MERGE_BYTES)
    size = sum(path.stat().st_size for path in there.glob("*.tar"))
    assert size > 5 * bytes_asked(requests)
    second = read(data, range(1, 2))
    held.clear()
    wait_for_shards(data)
    whole = len(s3.asked(".tar"))
    rest = read(data, range(2, 40))
    assert len(s3.asked(".tar")) == whole
    assert whole - len(requests) <= SHARDS + BATCH
    for ours, local in zip([*first, *second, *rest], expected, strict=True):
        np.testing.assert_array_equal(ours.tokens_BL, local.tokens_BL)
        assert ours.good_B.all()


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_the_local_ones_with_reading_ahead(s3, there, tmp_path, workers):
    batches = []
    for manifest, n in ((there / "manifest.jsonl", 0), (MANIFEST, workers)):
        data = make_data(manifest, make_cache(tmp_path))
        data.config = DataConfig(**(vars(data.config) | {"workers": n}))
        batches.append([batch.tokens_BS.numpy() for batch in data.batches(0, 60)])
    np.testing.assert_array_equal(*batches)
    assert len(list((tmp_path / "cache").glob("*.tar"))) == SHARDS


def test_neighbours_are_one_request(s3, there, tmp_path, held):
    data = ValData(MANIFEST, "auto", LENGTH - 1, VOCAB, cache=make_cache(tmp_path), workers=0)
    rows = data.reader.read([(0, 3, i) for i in range(40)])
    assert len(s3.asked(".tar")) == 1
    local = ValData(str(there / "manifest.jsonl"), "auto", LENGTH - 1, VOCAB)
    np.testing.assert_array_equal(rows.tokens_BL, local.reader.read([(0, 3, i) for i in range(40)]).tokens_BL)


def test_faults_are_tried_again(s3, there, tmp_path, held, caplog):
    injected = ("503", "reset", "truncate", "short", "500", "429")
    for number, fault in enumerate(injected):
        s3.add(f"shard_{number:08d}.tar", fault)
    (rows,) = read(make_data(MANIFEST, make_cache(tmp_path)))
    (local,) = read(make_data(there / "manifest.jsonl", None))
    np.testing.assert_array_equal(rows.tokens_BL, local.tokens_BL)
    assert not any(s3.faults.values())
    warnings = [record.getMessage() for record in caplog.records if record.name == "open_lm.data.retry"]
    assert len(warnings) == len(injected)
    assert all("reading bytes" in text for text in warnings)


def read_row(data):
    """One of shard 2: one request."""
    return data.reader.read([(0, 2, 5)])


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_errors_are_those_of_whole_shards(s3, there, tmp_path, method):
    data = make_data(MANIFEST, make_cache(tmp_path))
    s3.add("shard_00000002.tar", "403", method=method)
    url = "s3://bucket/shard_00000002.tar"
    with pytest.raises(PermissionError, match=f"^{url}: cannot be read, access is denied"):
        read_row(data)
    assert len(s3.asked("shard_00000002.tar", method)) == 1
    s3.add("shard_00000002.tar", *["503"] * 4, method=method)
    with pytest.raises(OSError, match=f"^{url}: (looking it up|reading bytes .*) failed 4 times"):
        read_row(data)


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_a_shard_that_is_not_there_is_said_at_once(s3, there, tmp_path, method):
    s3.add("shard_00000002.tar", "404", method=method)
    with pytest.raises(FileNotFoundError, match=r"^s3://bucket/shard_00000002\.tar: no such file"):
        read_row(make_data(MANIFEST, make_cache(tmp_path)))
    assert len(s3.asked("shard_00000002.tar", method)) == 1


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_a_whole_shard_that_is_not_there_is_said_at_once(s3, there, tmp_path, method):
    drop(there, "row_digests")
    boto3.client("s3").upload_file(str(there / "manifest.jsonl"), "bucket", "manifest.jsonl")
    s3.add("shard_00000002.tar", "404", method=method)
    with pytest.raises(FileNotFoundError, match=r"^s3://bucket/shard_00000002\.tar: no such file"):
        read_row(make_data(MANIFEST, make_cache(tmp_path)))
    assert len(s3.asked("shard_00000002.tar", method)) == 1


def drop(there, field: str) -> None:
    """From every line of the manifest."""
    lines = [json.loads(line) for line in (there / "manifest.jsonl").read_text().splitlines()]
    lines = [{key: value for key, value in line.items() if key != field} for line in lines]
    (there / "manifest.jsonl").write_text("\n".join(map(json.dumps, lines)))


@pytest.mark.parametrize("has_digests", [True, False])
def test_a_shard_replaced_meanwhile_is_noticed(s3, bucket, there, tmp_path, held, has_digests):
    if not has_digests:
        drop(there, "sha256")
        bucket(there)
    data = make_data(MANIFEST, make_cache(tmp_path))
    read(data)
    manifest = (there / "manifest.jsonl").read_bytes()
    write_shards(there, np.ones((SHARDS * SEQUENCES, LENGTH), int), SEQUENCES, key="u16")
    (there / "manifest.jsonl").write_bytes(manifest)
    bucket(there)
    held.clear()
    wait_for_shards(data)
    (error,) = read(data, range(1, 2))
    assert isinstance(error, OSError)
    expected = (
        "its sha256 is .*, the manifest says"
        if has_digests
        else "is not the one in it: .* replaced meanwhile"
    )
    assert re.match(rf"shard s3://bucket/shard_0000000\d\.tar: .*{expected}", str(error))


def replace_shard(there, bucket, number: int) -> None:
    """By another one of the same form that says it is the same; the manifest stays."""
    path = there / f"shard_{number:08d}.tar"
    content = bytearray(path.read_bytes())
    row_B = np.frombuffer(content, np.uint8)[: 512 + 2 * LENGTH]  # the first sequence, with digests that fit
    row_B[512:514] = 0
    shard_digest = digests.find_shard_digest(row_B[:512].tobytes())
    digests.add_digests_(row_B[None, :512], row_B[None, 512:], shard_digest)
    add_checksums_(row_B[None, :512])
    path.write_bytes(content)
    bucket(there)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_that_ends_before_the_shards_have_come_is_sure_of_them(s3, bucket, there, tmp_path, workers):
    replace_shard(there, bucket, 3)
    cache = make_cache(tmp_path)
    data = make_data(MANIFEST, cache)
    data.config = replace(data.config, workers=workers)
    with pytest.raises(OSError, match=r"shard_00000003\.tar: its sha256 is .*, the manifest says"):
        list(data.batches(0, 2))
    few = 3 * SEQUENCES + 8
    held_out = ValData(MANIFEST, "auto", LENGTH - 1, VOCAB, few * (LENGTH - 1), cache=cache)
    with pytest.raises(OSError, match=r"shard_00000003\.tar: its sha256 is .*, the manifest says"):
        list(held_out.batches(BATCH, 0, 1))


def test_readers_that_were_closed_are_made_sure_of_too(s3, bucket, there, tmp_path, held):
    replace_shard(there, bucket, 3)
    data = make_data(MANIFEST, make_cache(tmp_path))
    data.reader.open_shards.limit = 2
    for shard in (3, 4, 5, 6):
        data.reader.read([(0, shard, 0)])
    assert not any("shard_00000003" in url for url in data.reader.open_shards.readers)
    held.clear()
    with pytest.raises(OSError, match=r"shard_00000003\.tar: its sha256 is .*, the manifest says"):
        data.reader.settle()


def test_a_fetch_that_failed_in_the_background_is_tried_again(s3, there, tmp_path, monkeypatch, caplog):
    open_shard, failures = reader.open_shard, []

    def fail_once(shard, *arguments, **options):
        if shard.url.endswith("2.tar") and not failures:
            failures.append(shard)
            raise OSError("an outage that is over")
        return open_shard(shard, *arguments, **options)

    monkeypatch.setattr(reader, "open_shard", fail_once)
    data = make_data(MANIFEST, make_cache(tmp_path))
    rows = read(data, range(6))
    data.reader.settle()
    for one, local in zip(rows, read(make_data(there / "manifest.jsonl", None), range(6)), strict=True):
        np.testing.assert_array_equal(one.tokens_BL, local.tokens_BL)
    assert failures
    assert "an outage that is over; fetched once more" in caplog.text


SHARD_2 = "shard_00000002.tar"


def test_damaged_ranges_are_read_again(s3, there, tmp_path, held, caplog):
    s3.add(SHARD_2, "flip", "flip")
    data = make_data(MANIFEST, make_cache(tmp_path))
    rows = data.reader.read([(0, 2, i) for i in (5, 300)])
    local = make_data(there / "manifest.jsonl", None).reader.read([(0, 2, i) for i in (5, 300)])
    np.testing.assert_array_equal(rows.tokens_BL, local.tokens_BL)
    assert (
        len(re.findall(r"shard_00000002\.tar: sample number (5|300) has .*, fetch 1 of 3", caplog.text)) == 2
    )
    assert len(s3.asked(SHARD_2)) >= 4


@pytest.mark.parametrize("workers", [0, 2])
def test_ranges_that_are_always_damaged_end_the_run_before_a_wrong_row(s3, there, tmp_path, workers):
    s3.add(SHARD_2, *["flip"] * 200)
    data = make_data(MANIFEST, make_cache(tmp_path))
    data.config = replace(data.config, workers=workers)
    batches = data.batches(0, 2)
    with pytest.raises(
        OSError, match=rf"shard s3://bucket/{SHARD_2}: sample .*, after 3 fetches: .*data\.index"
    ):
        next(batches)


def damaged_at(offset: int):
    def damage(data: bytes, start: int) -> bytes:
        return data if not start <= offset < start + len(data) else flipped(data, offset - start)

    return damage


def flipped(data: bytes, offset: int) -> bytes:
    return data[:offset] + bytes([data[offset] ^ 1]) + data[offset + 1 :]


ROW = 1024  # bytes from one row's header to the next


FIELDS = (
    0,
    16,
    124,
    150,
    157,
    257,
    270,
    300,
    345,
    511,
    512,
    512 + 2 * LENGTH - 1,
)  # of a header; of the data


def test_a_flipped_bit_anywhere_in_a_row_is_seen(s3, there, tmp_path, held, monkeypatch):
    read_part, places = ranges.read_part, [(0, 2, 4), (0, 2, 5)]
    name = r"sample (number 5|00000002_00000005\.u16)"
    for offset in FIELDS:
        damage, seen = damaged_at(5 * ROW + offset), []

        def damaged(found, start, end, damage=damage, seen=seen):
            seen.append((start, end))
            return damage(read_part(found, start, end), start)

        monkeypatch.setattr(ranges, "read_part", damaged)
        data = make_data(MANIFEST, make_cache(tmp_path))
        with pytest.raises(OSError, match=rf"shard s3://bucket/{SHARD_2}: {name}.* 3 fetches"):
            data.reader.read(places)
        assert seen == [(4 * ROW, 5 * ROW + 512 + 2 * LENGTH)] * 3
    monkeypatch.setattr(ranges, "read_part", read_part)
    data.reader.read(places)


@pytest.mark.parametrize(
    ("shift", "shard", "message"),
    [
        (ROW, 2, r"in the place of sample number 5, .* is 00000002_00000006\.u16 of 130"),
        (-ROW, 2, r"in the place of sample number 5, .* is 00000002_00000004\.u16 of 130"),
        (2, 2, "sample number 5 has a damaged header, or none"),
        (
            0,
            3,
            r"sample 00000003_00000005\.u16 is of a shard with the digest \w+, the manifest's row_digests is \w+",
        ),
    ],
)
def test_rows_of_another_place_or_shard_are_seen(
    s3, bucket, there, tmp_path, held, monkeypatch, shift, shard, message
):
    read_part = ranges.read_part

    def elsewhere(found, start, end):
        found = found._replace(path=found.path.replace("2.tar", f"{shard}.tar"))
        return read_part(found, start + shift, end + shift)

    monkeypatch.setattr(ranges, "read_part", elsewhere)
    with pytest.raises(OSError, match=rf"shard s3://bucket/{SHARD_2}: {message}, after 3 fetches"):
        read_row(make_data(MANIFEST, make_cache(tmp_path)))


def test_another_version_of_the_shard_gives_no_row(s3, bucket, there, tmp_path, held):
    manifest = (there / "manifest.jsonl").read_bytes()
    write_shards(there, np.ones((SHARDS * SEQUENCES, LENGTH), int), SEQUENCES, key="u16")
    (there / "manifest.jsonl").write_bytes(manifest)
    bucket(there)
    with pytest.raises(
        OSError, match=rf"{SHARD_2}: sample 00000002_00000005\.u16 is of a shard with the digest"
    ):
        read_row(make_data(MANIFEST, make_cache(tmp_path)))


@pytest.mark.parametrize("missing", ["row_digests", "first_offset"])
def test_without_row_digests_rows_come_of_the_whole_shard(s3, bucket, there, tmp_path, missing):
    """Also one that was damaged on the way: it is fetched again before any row is read."""
    drop(there, missing)
    bucket(there)
    s3.add(SHARD_2, "flip")
    rows = read_row(make_data(MANIFEST, make_cache(tmp_path)))
    local = read_row(make_data(there / "manifest.jsonl", None))
    np.testing.assert_array_equal(rows.tokens_BL, local.tokens_BL)
    size = (there / SHARD_2).stat().st_size
    assert [request.range for request in s3.asked(SHARD_2)] == [f"bytes=0-{size - 1}"] * 2


def test_ids_outside_the_vocabulary_are_named(s3, bucket, there, tmp_path, held):
    tokens_NL = np.full((SHARDS * SEQUENCES, LENGTH), VOCAB)
    write_shards(there, tokens_NL, SEQUENCES, key="u16")
    bucket(there)
    (error,) = read(make_data(MANIFEST, make_cache(tmp_path)))
    (local,) = read(make_data(there / "manifest.jsonl", None))
    assert str(error) == str(local).replace(f"{there}/", "s3://bucket/")
    assert "has token id 1000" in str(error)


def test_without_a_cache_shards_come_whole(s3, there, tmp_path):
    (rows,) = read(make_data(MANIFEST, make_cache(tmp_path, limit_bytes=0)))
    (local,) = read(make_data(there / "manifest.jsonl", None))
    np.testing.assert_array_equal(rows.tokens_BL, local.tokens_BL)
    size = sum(path.stat().st_size for path in there.glob("*.tar"))
    assert bytes_asked(s3.asked(".tar")) == size


def test_threads_are_bounded_and_end(monkeypatch):
    monkeypatch.setattr(ranges, "IDLE_SECONDS", 0.05)
    threads = ranges.Threads(3, "test")
    futures = [threads.submit(lambda n=n: (time.sleep(0.01), n)[1]) for n in range(20)]
    assert threads.count == 3
    assert [future.result(10) for future in futures] == list(range(20))
    deadline = time.monotonic() + 10
    while threads.count:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert threads.submit(lambda: 7).result(10) == 7
