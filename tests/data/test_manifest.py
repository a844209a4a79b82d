import hashlib

import pytest

from open_lm.data.manifest import Shard, read_manifest
from open_lm.data.shards import find_source, open_shard


def test_open_lms_manifests_are_read(tmp_path):
    content = (
        b'{"shard": "shard_00000000", "num_sequences": 8192, "more": 1}\n\n'
        b'{"shard": "b.tar", "num_chunks": 7}\r\n'
        b'{"shard": "/c/d", "num_sequences": 0}\n'
        b'{"shard": "s3://other/e.tar", "num_sequences": 3}'  # no last newline
    )
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_bytes(content)
    source = read_manifest(str(manifest))
    assert source.shards == (
        Shard(f"{tmp_path}/shard_00000000.tar", 8192),
        Shard(f"{tmp_path}/b.tar", 7),
        Shard("/c/d.tar", 0),
        Shard("s3://other/e.tar", 3),
    )
    assert source.sequences == 8202
    assert source.sha256 == hashlib.sha256(content).hexdigest()


def test_shards_lie_beside_the_manifest(tmp_path, monkeypatch):
    (tmp_path / "m.jsonl").write_text('{"shard": "a", "num_sequences": 1}')
    monkeypatch.chdir(tmp_path)
    assert read_manifest("m.jsonl").shards == (Shard("a.tar", 1),)
    assert read_manifest("file://" + str(tmp_path / "m.jsonl")).shards == (
        Shard(f"file://{tmp_path}/a.tar", 1),
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"m\.jsonl:2: not JSON"),
        ("[1]", r"m\.jsonl:2: a line must be"),
        ('{"num_sequences": 1}', r"m\.jsonl:2: a line must be"),
        ('{"shard": "b"}', r"m\.jsonl:2: num_sequences must be a whole number, not None"),
        ('{"shard": "b", "num_sequences": -1}', r"m\.jsonl:2: .*-1"),
        ('{"shard": "b", "num_sequences": 1.5}', r"m\.jsonl:2: .*1\.5"),
        ('{"shard": "b", "num_sequences": true}', r"m\.jsonl:2: .*True"),
        ('{"shard": "a.tar", "num_sequences": 1}', r"m\.jsonl:2: shard .*a\.tar is listed twice"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    (tmp_path / "m.jsonl").write_text('{"shard": "a", "num_sequences": 1}\n' + line)
    with pytest.raises(ValueError, match=message):
        read_manifest(str(tmp_path / "m.jsonl"))


@pytest.mark.parametrize("content", ["", "\n", '{"shard": "a", "num_sequences": 0}\n'])
def test_an_empty_manifest_is_refused(tmp_path, content):
    (tmp_path / "m.jsonl").write_text(content)
    with pytest.raises(ValueError, match="lists no sequences"):
        read_manifest(str(tmp_path / "m.jsonl"))


def test_a_missing_manifest_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.jsonl: no such file"):
        read_manifest(str(tmp_path / "nowhere.jsonl"))


def test_a_command_may_print_the_manifest(write_source, tmp_path, cache):
    path = write_source(tmp_path, [2, 3])
    url = f"pipe:cat '{path}' | cat"
    source = read_manifest(url)
    assert source.sha256 == read_manifest(path).sha256
    assert source.shards[1].url == f"pipe:cat '{tmp_path}/shard_00000001.tar' | cat"
    assert find_source(url, "json", cache).shards == source.shards
    reader = open_shard(source.shards[1], "json", cache)
    assert reader[2].tolist() == [4] * 5
    reader.close()


def test_what_a_piped_manifest_lists_must_be_a_name(tmp_path):
    (tmp_path / "m.jsonl").write_text('{"shard": "a", "num_sequences": 1}')
    with pytest.raises(ValueError, match=r"the command names no \.jsonl file"):
        read_manifest(f"pipe:cat {tmp_path}/m*")
    (tmp_path / "m.jsonl").write_text('{"shard": "a; touch b", "num_sequences": 1}')
    with pytest.raises(ValueError, match=r"'a; touch b\.tar' cannot stand in a command"):
        read_manifest(f"pipe:cat {tmp_path}/m.jsonl")
    with pytest.raises(OSError, match=r"pipe:cat .*/none\.jsonl: .*No such file"):
        read_manifest(f"pipe:cat {tmp_path}/none.jsonl")
