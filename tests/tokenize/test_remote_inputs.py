"""Inputs behind a server that fails now and then: the same bytes, or an error that names the file."""

import gzip
import hashlib
import itertools
import json
import tarfile

import fsspec.config
import pytest

from open_lm.data import stream
from open_lm.data.retry import Patience
from open_lm.tokenize import lock
from open_lm.tokenize.folder import Folder
from open_lm.tokenize.pipeline import tokenize
from tests.tokenize.conftest import TEXTS, digests, write_lines
from tests.tokenize.test_pipeline import config

PART_BYTES = 2000


@pytest.fixture
def server(faults, bucket, tmp_path, monkeypatch):
    """The proxy before a bucket of the same documents in four formats, which are read in parts."""
    monkeypatch.setattr(lock, "SETTLE_SECONDS", 0.01)
    monkeypatch.setattr(stream, "READ_BYTES", PART_BYTES)
    monkeypatch.setattr(Patience, "wait_seconds", lambda patience, retry: 0.001)
    there = tmp_path / "there"
    plain = write_lines(there / "a.jsonl", TEXTS)
    (there / "a.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
    with tarfile.open(there / "a.tar", "w") as tar:
        tar.add(plain, "a.jsonl")
    try:
        from pyarrow import Table, parquet

        parquet.write_table(Table.from_pydict({"text": TEXTS}), there / "a.parquet", row_group_size=50)
    except ImportError:
        pass
    bucket(there)
    faults.there = there
    return faults


def digest(url, tmp_path, tokenizer, name="out", **changes):
    info = tokenize(config(url, tmp_path / name, tokenizer, unit_megabytes=1.0, **changes))["train"]
    assert info["documents"] == 200
    assert sum(source["documents_bad"] for source in info["sources"]) == 0
    return {k: v for k, v in digests(tmp_path / name).items() if k.endswith((".tar", "manifest.jsonl"))}


@pytest.mark.parametrize(
    ("file", "injected"),
    [
        *itertools.product(["a.jsonl.gz", "a.parquet"], ["503", "reset", "truncate"]),
        ("a.jsonl", "short"),
        ("a.tar", "429"),
    ],
)
def test_faults_that_pass_change_nothing(server, tmp_path, tokenizer, file, injected):
    if file == "a.parquet":
        pytest.importorskip("pyarrow")
    expected = digest(server.there / file, tmp_path, tokenizer, "local")
    server.add(file, "503", method="HEAD")
    server.add(file, *(["", injected] * 20))
    assert digest(f"s3://bucket/{file}", tmp_path, tokenizer, on_bad="skip") == expected
    assert len(server.asked(file)) >= 3
    assert len(server.asked(file)) < 100


@pytest.mark.parametrize("file", ["a.jsonl.gz", "a.parquet"])
def test_faults_that_last_are_no_bad_documents(server, tmp_path, tokenizer, file):
    if file == "a.parquet":
        pytest.importorskip("pyarrow")
    good = 4 if file == "a.parquet" else 1  # its metadata
    server.add(file, *[""] * good, *["503"] * 1000)
    with pytest.raises(
        OSError, match=rf"s3://bucket/{file}: reading bytes .* failed 3 times .*--data-retries 2"
    ):
        digest(f"s3://bucket/{file}", tmp_path, tokenizer, on_bad="skip", data_retries=2)
    assert len(server.asked(file)) == good + 3
    assert not (tmp_path / "out/manifest.jsonl").exists()
    server.faults.clear()
    digest(f"s3://bucket/{file}", tmp_path, tokenizer, on_bad="skip", data_retries=3)  # goes on


@pytest.mark.parametrize("file", ["a.jsonl.gz", "a.parquet"])
def test_what_is_denied_is_said_at_once(server, tmp_path, tokenizer, file):
    if file == "a.parquet":
        pytest.importorskip("pyarrow")
    server.add(file, "", "403")
    with pytest.raises(PermissionError, match=rf"s3://bucket/{file}: .*denied"):
        digest(f"s3://bucket/{file}", tmp_path, tokenizer, on_bad="skip")
    assert len(server.asked(file)) == 2


def test_the_listing_and_the_tokenizer_are_tried_again(server, bucket, tmp_path, tokenizer):
    bucket(tokenizer.parent)
    server.add("/bucket", "503", "reset")
    server.add("tokenizer.json", "truncate")
    tokenize(config("s3://bucket/*.gz", tmp_path / "out", "s3://bucket/tokenizer.json"))
    assert json.loads((tmp_path / "out/info.json").read_text())["documents"] == 200


def test_faults_of_output_and_work_that_pass_change_nothing(server, tmp_path, tokenizer):
    expected = digest(server.there / "a.jsonl", tmp_path, tokenizer, "local")
    for ending in (".ids", ".rows", ".json", ".tar", "manifest.jsonl"):
        server.add(ending, "503", "reset", "", "refuse", method="PUT")
    server.add("bucket", "503", "", "truncate")
    for ending in (".rows", ".ids"):
        server.add(ending, "truncate", "short", "503", "429", "500", "reset")
    made = config(server.there / "a.jsonl", "s3://bucket/out", tokenizer, unit_megabytes=1.0, data_retries=7)
    tokenize(made)
    folder = Folder("s3://bucket/out")
    found = {name: hashlib.sha256(folder.read(name)).hexdigest() for name in folder.names()}
    assert found.items() >= expected.items()
    assert "work/plan.json" not in found


def test_a_server_without_sizes_is_read_whole(server, tmp_path, tokenizer, monkeypatch):
    find = stream.find_remote
    monkeypatch.setitem(fsspec.config.conf, "s3", {"default_block_size": 2**20})  # which has s3fs read
    monkeypatch.setattr(stream, "find_remote", lambda *given: find(*given)._replace(has_parts=False))
    expected = digest(server.there / "a.jsonl.gz", tmp_path, tokenizer, "local")
    assert digest("s3://bucket/a.jsonl.gz", tmp_path, tokenizer) == expected
