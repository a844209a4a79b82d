import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import replace

import boto3
import numpy as np
import pytest

from open_lm.data.index import IndexConfig, write_manifest
from open_lm.data.inspect import InspectConfig, inspect, verify_shard
from open_lm.data.manifest import read_manifest
from open_lm.data.remote import Cache, Patience, find_remote, open_file
from open_lm.tokenize.inputs import list_files
from open_lm.tokenize.shard_writer import write_shards


def run(module, *arguments):
    command = [sys.executable, "-m", f"open_lm.data.{module}", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.fixture
def folder(tmp_path):
    """60 sequences of 5 ids, 3 … 302 in order, in two u16 shards."""
    write_shards(tmp_path / "a", np.arange(3, 303).reshape(60, 5), 40, key="u16")
    return tmp_path / "a"


@pytest.mark.parametrize("key", ["u16", "u32", "json.gz"])
def test_an_index_is_what_the_writer_said(tmp_path, key):
    lines = write_shards(tmp_path / "a", np.arange(300).reshape(60, 5), 25, key)
    written = (tmp_path / "a" / "manifest.jsonl").read_text()
    pattern = f"{tmp_path}/a/shard_0000000{{0..2}}.tar"
    with pytest.raises(ValueError, match=r"manifest\.jsonl exists: --overwrite"):
        write_manifest(IndexConfig((pattern,)))
    found = write_manifest(IndexConfig((pattern,), overwrite=True, processes=2))
    assert found == lines
    assert (tmp_path / "a" / "manifest.jsonl").read_text() == written
    elsewhere = str(tmp_path / "all.jsonl")
    write_manifest(IndexConfig((pattern,), output=elsewhere, processes=1))
    assert read_manifest(elsewhere).shards == read_manifest(f"{tmp_path}/a/manifest.jsonl").shards


def test_an_index_on_s3_is_read_back_and_inspected(bucket, folder):
    (folder / "manifest.jsonl").unlink()
    bucket(folder)
    done = run("index", "s3://bucket/shard_0000000{0..1}.tar", "--processes", 1)
    assert (done.returncode, done.stderr) == (0, "")
    shards = read_manifest("s3://bucket/manifest.jsonl").shards
    assert [shard.num_sequences for shard in shards] == [40, 20]
    assert shards[1].sha256 == hashlib.sha256((folder / "shard_00000001.tar").read_bytes()).hexdigest()
    done = run("inspect", "s3://bucket/manifest.jsonl", "--verify", "--vocab-size", 303, "--processes", 1)
    assert (done.returncode, done.stderr) == (0, "")
    assert "60 sequences in 2 shards, 300 tokens" in done.stdout
    assert "read 300 tokens, ids 3 … 302; 0 damages in 0 shards" in done.stdout


def test_what_is_verified_is_what_is_there_now(bucket, folder, tmp_path, monkeypatch):
    """Not what the cache holds of before."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    bucket(folder)
    config = InspectConfig(("s3://bucket/manifest.jsonl",), verify=True, vocab_size=303, processes=1)
    assert inspect(config) == []
    shards = read_manifest("s3://bucket/manifest.jsonl").shards
    for shard in shards:
        os.close(open_file(shard.url, Cache(), shard.bytes, shard.sha256))
    boto3.client("s3").delete_object(Bucket="bucket", Key="shard_00000001.tar")
    (damage,) = inspect(config)
    assert damage.startswith("s3://bucket/shard_00000001.tar: no such file")


def test_a_manifest_is_needed():
    done = run("inspect")
    assert done.returncode == 1
    assert "no manifest is given" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_index_needs_whole_tars(folder, tmp_path):
    os.truncate(folder / "shard_00000001.tar", 5000)
    done = run(
        "index", f"{folder}/shard_0000000{{0..1}}.tar", "--overwrite", "--output", tmp_path / "m.jsonl"
    )
    assert done.returncode == 1
    assert "shard_00000001.tar" in done.stderr
    assert "cut short" in done.stderr
    assert not (tmp_path / "m.jsonl").exists()


def test_counts_mix_and_a_decoded_sample_are_shown(folder, tmp_path, capsys):
    from tokenizers import Tokenizer, models

    words = {f"w{i}": i for i in range(303)}
    Tokenizer(models.WordLevel(words, unk_token="w0")).save(str(folder / "tokenizer.json"))
    (folder / "info.json").write_text(json.dumps({"tokenizer": "tokenizer.json", "vocab_size": 303}))
    write_shards(tmp_path / "b", np.zeros((10, 5), int), 40)
    manifests = (f"{folder}/manifest.jsonl", f"{tmp_path}/b/manifest.jsonl")
    assert inspect(InspectConfig(manifests, train_data_mix_weights=(3, 1), verify=True, processes=1)) == []
    printed = capsys.readouterr().out
    assert "60 sequences in 2 shards, 300 tokens, 0.000 GB, u16; 75.00% of the mix" in printed
    assert "'w3 w4 w5 w6 w7'" in printed
    assert "10 sequences in 1 shards, 50 tokens" in printed
    with pytest.raises(ValueError, match="1 weights for 2 sources"):
        inspect(InspectConfig(manifests, train_data_mix_weights=(3,)))


def flip(path, offset):
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: flip(f / "shard_00000001.tar", 512 + 1024 * 7), "says sha256"),
        (lambda f: os.truncate(f / "shard_00000001.tar", 9000), "the tar has 9,000"),
        (lambda f: (f / "shard_00000001.tar").unlink(), "no such file"),
        (lambda f: shutil.copy(f / "shard_00000000.tar", f / "shard_00000001.tar"), "bytes, the tar has"),
        (
            lambda f: (f / "info.json").write_text('{"vocab_size": 302}'),
            "ids 203 … 302 in a vocabulary of 302",
        ),
    ],
)
def test_damage_is_found_and_named(folder, damage, message):
    damage(folder)
    damages = inspect(InspectConfig((f"{folder}/manifest.jsonl",), verify=True, processes=1))
    assert len(damages) == 1 + ("sha256" in message)  # and the row's own digest
    assert all("00000001_00000007.u16: the digest" in damage for damage in damages[1:])
    assert "shard_00000001.tar" in damages[0]
    assert message in damages[0]


def test_counts_of_tokens_are_compared(folder):
    path = folder / "manifest.jsonl"
    path.write_text(path.read_text().replace('"tokens": 100', '"tokens": 99'))
    assert inspect(InspectConfig((str(path),), verify=True, processes=1)) == [
        f"shard {folder}/shard_00000001.tar: the manifest says 99 tokens, the tar has 100"
    ]


def test_damage_is_an_exit_status(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "whole")
    flip(folder / "shard_00000001.tar", 512)
    manifests = (tmp_path / "whole" / "manifest.jsonl", folder / "manifest.jsonl", tmp_path / "none.jsonl")
    done = run("inspect", *manifests, "--verify", "--processes", 1)
    assert done.returncode == 1
    first, second, third = done.stderr.splitlines()
    assert f"{folder}/shard_00000001.tar" in first
    assert f"{folder}/shard_00000001.tar: sample 00000001_00000000.u16: the digest of its bytes" in second
    assert "none.jsonl: no such file" in third
    assert run("inspect", manifests[0], "--verify", "--processes", 1).returncode == 0


def test_rows_without_their_digests_are_not_indexed(folder, tmp_path):
    """A tar whose rows say what they should hold, and do not; it is no use to write a new sha256 of it."""
    flip(folder / "shard_00000001.tar", 512 + 1024 * 7)
    with pytest.raises(
        ValueError, match=r"shard_00000001\.tar: sample 00000001_00000007\.u16: .*the tar is damaged"
    ):
        write_manifest(IndexConfig((f"{folder}/*.tar",), overwrite=True, processes=1))


def test_an_index_knows_which_rows_carry_digests(folder, tmp_path):
    """Rows written by others, or put together of several shards, carry none that say which shard they are of."""
    with tarfile.open(tmp_path / "plain.tar", "w") as tar:
        for row in range(6):
            member = tarfile.TarInfo(f"00000000_{row:08d}.u16")
            member.size = 10
            tar.addfile(member, io.BytesIO(bytes(10)))
    two = [(folder / f"shard_0000000{i}.tar").read_bytes() for i in range(2)]
    (tmp_path / "both.tar").write_bytes(two[0][: 1024 * 40] + two[1])
    (tmp_path / "ours.tar").write_bytes(two[1])
    lines = write_manifest(IndexConfig((f"{tmp_path}/*.tar",), processes=1))
    written = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    assert [(line["shard"], line["num_sequences"], line.get("row_digests")) for line in lines] == [
        ("both", 60, None),
        ("ours", 20, written[1]["row_digests"]),
        ("plain", 6, None),
    ]


def test_tokens_of_lists_are_counted(write_shard, tmp_path, capfd):
    write_shard(tmp_path / "a.tar", [[1, 2, 3], [4, 5]])
    write_shard(tmp_path / "b.tar", [[1, 2, 3], [4, 5, 6]], "txt")
    write_shard(tmp_path / "c.tar", [[1, 2, 3], b"no gzip"])
    lines = write_manifest(IndexConfig((f"{tmp_path}/*.tar",), processes=1))
    assert [(line.get("tokens"), line.get("sequence_tokens")) for line in lines] == [
        (5, None),
        (6, 3),
        (None, None),
    ]
    assert "c.tar: sample c/000001.json.gz cannot be read" in capfd.readouterr().err


def test_every_unreadable_sample_is_counted(write_shard, tmp_path):
    samples = [[1, 2, 3], b"no gzip", b"nor this", [4, 5], b"3", b"4", b"5"]
    write_shard(tmp_path / "a.tar", samples)
    (tmp_path / "manifest.jsonl").write_text('{"shard": "a", "num_sequences": 7, "sequence_tokens": 3}')
    finding = verify_shard(read_manifest(f"{tmp_path}/manifest.jsonl").shards[0], "auto", None)
    assert (finding.tokens, finding.lowest, finding.highest) == (5, 1, 5)
    assert len(finding.damages) == 5
    assert "sample a/000001.json.gz cannot be read" in finding.damages[0]
    assert "5 samples cannot be read in all" in finding.damages[3]
    assert "1 samples have not the 3 tokens" in finding.damages[4]


def test_a_folder_is_no_manifest_and_no_tar(folder):
    done = run("inspect", folder)
    assert done.returncode == 1
    assert done.stderr == f"{folder} is a folder: name its manifest, e.g. {folder}/manifest.jsonl\n"
    done = run("index", folder)
    assert done.returncode == 1
    assert done.stderr.endswith(f"error: {folder} is a folder: name its tars, e.g. '{folder}/*.tar'\n")


def test_quoted_globs_are_expanded(folder, tmp_path, capsys):
    lines = (folder / "manifest.jsonl").read_text()
    write_manifest(IndexConfig((f"{folder}/sh*_0000000?.tar",), overwrite=True, processes=1))
    assert (folder / "manifest.jsonl").read_text() == lines
    shutil.copytree(folder, tmp_path / "b")
    capsys.readouterr()
    assert inspect(InspectConfig((f"{tmp_path}/[ab]/m*.jsonl",))) == []
    assert capsys.readouterr().out.count("60 sequences in 2 shards") == 2
    with pytest.raises(FileNotFoundError, match=r"none\*: nothing matches"):
        inspect(InspectConfig((f"{tmp_path}/none*",)))
    with pytest.raises(ValueError, match=r"shard_00000001\.tar is named twice"):
        write_manifest(IndexConfig((f"{folder}/*.tar", f"{folder}/shard_00000001.tar"), overwrite=True))


def test_quoted_globs_of_urls_are_expanded(bucket, folder, capsys):
    (folder / "manifest.jsonl").unlink()
    bucket(folder)
    write_manifest(IndexConfig(("s3://bucket/*.tar",), processes=1))
    assert inspect(InspectConfig(("s3://bucket/*.jsonl",))) == []
    assert "60 sequences in 2 shards" in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"{}", b"\xff\xfe", b""])
def test_what_is_no_tokenizer_is_said(folder, tmp_path, content):
    (tmp_path / "odd.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"--tokenizer .*odd\.json: no tokenizer\.json"):
        inspect(InspectConfig((f"{folder}/manifest.jsonl",), tokenizer=f"{tmp_path}/odd.json"))
    with pytest.raises(FileNotFoundError, match=r"none\.json: no such file"):
        inspect(InspectConfig((f"{folder}/manifest.jsonl",), tokenizer=f"{tmp_path}/none.json"))


@pytest.mark.parametrize("where", [1024 * 3 + 130, 1024 * 3 + 3])
def test_a_damaged_header_loses_no_row_in_an_index(folder, where):
    """Of a size, and of a name."""
    flip(folder / "shard_00000000.tar", where)
    with pytest.raises(
        ValueError, match=r"shard_00000000\.tar: cannot be read as a tar: the header at byte 3,072 is"
    ):
        write_manifest(IndexConfig((f"{folder}/*.tar",), overwrite=True, processes=1))


def test_rows_with_digests_that_are_not_alike_are_not_indexed(folder, tmp_path):
    ours = (folder / "shard_00000000.tar").read_bytes()
    with tarfile.open(tmp_path / "other.tar", "w") as tar:
        member = tarfile.TarInfo("other.u16")
        member.size = 2000
        tar.addfile(member, io.BytesIO(bytes(2000)))
    (tmp_path / "mixed.tar").write_bytes((tmp_path / "other.tar").read_bytes()[:2560] + ours)
    with pytest.raises(ValueError, match=r"mixed\.tar: the row at byte 3,072, of 10 bytes, carries a digest"):
        write_manifest(IndexConfig((f"{tmp_path}/mixed.tar",), processes=1))


def without(folder, *fields):
    path = folder / "manifest.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text(
        "".join(json.dumps({k: v for k, v in line.items() if k not in fields}) + "\n" for line in lines)
    )


@pytest.mark.parametrize(
    "offset", [512 + 1024 * 7, 1024 * 7 + 3, 1024 * 7 + 300], ids=["row", "name", "gname"]
)
def test_digests_that_the_manifest_does_not_repeat_are_compared(folder, offset):
    without(folder, "row_digests", "sha256")
    assert inspect(InspectConfig((f"{folder}/manifest.jsonl",), verify=True, processes=1)) == []
    flip(folder / "shard_00000001.tar", offset)
    damages = inspect(InspectConfig((f"{folder}/manifest.jsonl",), verify=True, processes=1))
    assert any(
        "shard_00000001.tar: sample" in damage and ("digest" in damage or "header" in damage)
        for damage in damages
    )


def test_rows_of_several_shards_are_compared_with_their_own_digests(folder, tmp_path):
    two = [(folder / f"shard_0000000{i}.tar").read_bytes() for i in range(2)]
    (tmp_path / "both.tar").write_bytes(two[0][: 1024 * 40] + two[1])
    write_manifest(IndexConfig((f"{tmp_path}/both.tar",), processes=1))
    without(tmp_path, "sha256")
    config = InspectConfig((f"{tmp_path}/manifest.jsonl",), verify=True, processes=1)
    assert inspect(config) == []
    flip(tmp_path / "both.tar", 512 + 1024 * 47)
    (damage,) = inspect(config)
    assert damage.endswith(
        "both.tar: sample 00000001_00000007.u16: the digest of its bytes is not the one in its header"
    )


def test_sizes_of_local_shards_are_compared_without_verify(folder, capsys):
    config = InspectConfig((f"{folder}/manifest.jsonl",))
    assert inspect(config) == []
    os.truncate(folder / "shard_00000001.tar", 9000)
    (damage,) = inspect(config)
    assert re.fullmatch(
        r"shard .*shard_00000001\.tar: the manifest says [\d,]+ bytes, the tar has 9,000", damage
    )
    (folder / "shard_00000001.tar").unlink()
    (damage,) = inspect(config)
    assert damage.endswith("shard_00000001.tar: No such file or directory")


def test_an_index_tries_again(faults, bucket, folder, tmp_path, monkeypatch):
    (folder / "manifest.jsonl").unlink()
    bucket(folder)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    faults.add("manifest.jsonl", "503", method="HEAD")
    faults.add("manifest.jsonl", "503", method="PUT")
    config = IndexConfig(("s3://bucket/shard_0000000{0..1}.tar",), processes=1)
    assert [line["num_sequences"] for line in write_manifest(config)] == [40, 20]
    faults.add("manifest.jsonl", "403", method="PUT")
    with pytest.raises(
        PermissionError, match=r"s3://bucket/manifest\.jsonl: cannot be written, access is denied"
    ):
        write_manifest(replace(config, overwrite=True))
    faults.add("manifest.jsonl", *["503"] * 3, method="PUT")
    with pytest.raises(OSError, match=r"writing it failed 2 times .*--data-retries 1"):
        write_manifest(replace(config, overwrite=True, data_retries=1))


def test_a_denied_info_json_is_none(faults, bucket, folder, tmp_path, monkeypatch, capsys):
    bucket(folder)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for verify in (False, True):
        faults.add("info.json", "403", "403")
        assert inspect(InspectConfig(("s3://bucket/manifest.jsonl",), verify=verify, processes=1)) == []
        assert "60 sequences in 2 shards" in capsys.readouterr().out


def test_names_with_colons(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    os.rename("shard_00000001.tar", "shard::1.tar")
    assert len(write_manifest(IndexConfig(("shard::1.tar",), processes=1, output="a::b.jsonl"))) == 1
    assert inspect(InspectConfig(("a::b.jsonl",))) == []
    for act in (
        lambda: write_manifest(IndexConfig(("shard::2.tar",))),
        lambda: inspect(InspectConfig(("c::d.jsonl",))),
        lambda: list_files("c::d.jsonl", 0, Patience()),
    ):
        with pytest.raises(FileNotFoundError, match=r"no such file.*`:\[:\]`"):
            act()


@pytest.mark.parametrize("url", ["s3://bkt", "s3://bkt/", "s3://"])
def test_a_bucket_is_no_object(url):
    with pytest.raises(OSError, match=f"^{url}: no object is named"):
        find_remote(url, Patience(0))
