"""What networks and object stores do, done by a proxy before an S3 server: results and numbers of requests."""

import hashlib
import os
import time
from dataclasses import replace

import boto3
import fsspec.config
import pytest

from open_lm.data import remote
from open_lm.data.manifest import read_manifest
from open_lm.data.remote import Cache, Patience, open_file, read_bytes

CONTENT = bytes(range(250)) * 400  # 100,000 bytes
SHA256 = hashlib.sha256(CONTENT).hexdigest()
PARTS = 4
URL = "s3://bucket/a.tar"


@pytest.fixture
def s3(faults, bucket, tmp_path, monkeypatch):
    """The proxy; URL holds CONTENT, which is fetched in 4 parts."""
    monkeypatch.setattr(remote, "PART_BYTES", len(CONTENT) // PARTS)
    folder = tmp_path / "there"
    folder.mkdir()
    (folder / "a.tar").write_bytes(CONTENT)
    bucket(folder)
    client = boto3.client("s3")
    client.put_object_acl(Bucket="bucket", Key="a.tar", ACL="public-read")  # for http
    client.close()
    faults.requests.clear()
    return faults


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path / "cache", patience=Patience(3, 10, first_wait_seconds=0.001))


def read(url: str, cache: Cache, *expected) -> bytes:
    fd = open_file(url, cache, *expected)
    content = os.pread(fd, 2 * len(CONTENT), 0)
    os.close(fd)
    return content


def notice_stalls(cache: Cache) -> Cache:
    return replace(cache, patience=replace(cache.patience, timeout_seconds=1))


@pytest.fixture(params=["s3", "s3fs", "http"])
def scheme(request, monkeypatch) -> str:
    if request.param == "s3fs":
        monkeypatch.setitem(fsspec.config.conf, "s3", {"default_block_size": 2**20})  # an option of its own
    return request.param


def url_of(s3, scheme: str) -> str:
    return f"{s3.url}/bucket/a.tar" if scheme == "http" else URL


PASSING = [("503",) * 3, ("500",), ("429",), ("reset",), ("truncate",), ("short",), ("refuse",), ("stall",), ("slow",),  # noqa: E501
           ("", "reset", "", "stall", "503")]  # fmt: skip


@pytest.mark.parametrize("injected", PASSING, ids="-".join)
def test_faults_that_pass_cost_only_their_part(s3, cache, injected, scheme, caplog):
    if "stall" in injected:
        cache = notice_stalls(cache)
    s3.add("a.tar", *injected)
    started = time.monotonic()
    assert read(url_of(s3, scheme), cache, None, SHA256) == CONTENT
    failures = [fault for fault in injected if fault not in ("", "slow")]
    requests = s3.asked("a.tar")
    assert len(requests) == PARTS + len(failures)
    assert len({request.range for request in requests}) == PARTS
    warnings = [record.getMessage() for record in caplog.records if record.name == "open_lm.data.retry"]
    # aiohttp itself repeats a request that was not answered on a connection it had used before
    assert len(warnings) == len(failures) or injected == ("refuse",)
    assert all("/a.tar: fetching bytes" in text and "of 4" in text for text in warnings)
    assert time.monotonic() - started < 30  # 60 s and more for a stall without time limits of our own


@pytest.mark.parametrize(("status", "kind"), [("403", PermissionError), ("404", FileNotFoundError)])
def test_denied_and_missing_fail_at_once(s3, cache, status, kind, scheme, caplog):
    url = url_of(s3, scheme)
    s3.add("a.tar", *[status] * 9)
    with pytest.raises(kind, match=rf"^{url}: (cannot be read, access is denied|no such file)"):
        open_file(url, cache)
    assert len(s3.asked("a.tar")) == 1
    s3.add("a.tar", *[status] * 9, method="HEAD")
    with pytest.raises(kind, match=rf"^{url}: (cannot be read, access is denied|no such file)"):
        open_file(url, cache)
    assert len(s3.asked("a.tar", "HEAD")) == 2
    assert "attempt" not in caplog.text


@pytest.mark.parametrize("fault", ["503", "reset", "stall"])
def test_faults_that_last_end_with_the_name(s3, cache, fault):
    cache = notice_stalls(cache)
    s3.add("a.tar", "", *[fault] * 9)
    with pytest.raises(OSError, match=r"^s3://bucket/a\.tar: fetching bytes 25,000 to 50,000 of 100,000 failed 4 "
                       r"times in [\d.]+ s \(--data-retries 3, --data-timeout 1\), at last with \w+"):  # fmt: skip
        open_file(URL, cache)
    assert len(s3.asked("a.tar")) == 1 + 4
    assert {path.suffix for path in cache.folder.iterdir()} == {".lock"}


def test_manifests_and_look_ups_are_tried_again(s3, cache, bucket, tmp_path):
    (tmp_path / "there" / "m.jsonl").write_text('{"shard": "a", "num_sequences": 1}')
    bucket(tmp_path / "there")
    s3.add("m.jsonl", "503", "503", "503", "reset")
    with pytest.raises(OSError, match=r"^s3://bucket/m\.jsonl: reading it failed 4 times"):
        read_manifest("s3://bucket/m.jsonl", cache.patience)
    assert read_manifest("s3://bucket/m.jsonl", cache.patience).shards[0].url == URL
    assert len(s3.asked("m.jsonl")) == 5
    s3.add("a.tar", "503", "503", method="HEAD")
    assert read(URL, cache) == CONTENT
    assert len(s3.asked("a.tar", "HEAD")) == 3 + 1  # one more: in several parts, it must not have changed


def test_a_server_that_is_gone_is_named(s3, cache):
    s3.close()
    with pytest.raises(OSError, match=r"^s3://bucket/a\.tar: looking it up failed 4 times"):
        open_file(URL, cache)
    with pytest.raises(OSError, match=r"^s3://bucket/m\.jsonl: reading it failed 4 times"):
        read_bytes("s3://bucket/m.jsonl", cache.patience)


def test_a_wrong_checksum_is_fetched_again(s3, cache, caplog):
    s3.add("a.tar", "", "flip")
    assert read(URL, cache, len(CONTENT), SHA256) == CONTENT
    assert len(s3.asked("a.tar")) == 2 * PARTS
    assert "its sha256 is" in caplog.text
    before = len(s3.requests)
    assert read(URL, cache, len(CONTENT), SHA256) == CONTENT
    assert len(s3.requests) == before  # neither fetched, looked up nor hashed again
    with pytest.raises(
        OSError, match=f"shard {URL}: its sha256 is {SHA256}, the manifest says {'0' * 64}, after 3"
    ):
        open_file(URL, cache, len(CONTENT), "0" * 64)
    with pytest.raises(
        OSError, match=f"shard {URL}: it has 100,000 bytes, the manifest says 99,999, after 3 fetches"
    ):
        open_file(URL, cache, 99_999)


def test_a_file_replaced_between_two_parts_is_fetched_again(s3, cache, bucket, tmp_path, monkeypatch):
    other, read_part = bytes(100_000), remote.read_part

    def replace_then_read(found, start, end):
        if start and not replaced:
            replaced.append(start)
            (tmp_path / "there" / "a.tar").write_bytes(other)
            bucket(tmp_path / "there")
        return read_part(found, start, end)

    replaced: list[int] = []
    monkeypatch.setattr(remote, "read_part", replace_then_read)
    assert read(URL, cache) == other


def test_a_server_without_ranges_is_read_right(s3, cache, monkeypatch):
    monkeypatch.setattr(remote, "PART_BYTES", 60_000)
    s3.ignores_ranges = True
    assert read(f"{s3.url}/bucket/a.tar", cache, None, SHA256) == CONTENT
