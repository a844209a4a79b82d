import json
import subprocess
import sys

import boto3
import pytest

from open_lm.tokenize import lock
from open_lm.tokenize.folder import Folder
from open_lm.tokenize.lock import OWNER, describe_process, find_start, is_dead, locked
from open_lm.tokenize.pipeline import tokenize
from tests.tokenize.conftest import TEXTS, digests, write_lines
from tests.tokenize.test_pipeline import config


@pytest.fixture
def inputs(tmp_path):
    return write_lines(tmp_path / "in.jsonl", TEXTS)


@pytest.fixture(autouse=True)
def settle(monkeypatch):
    monkeypatch.setattr(lock, "SETTLE_SECONDS", 0.01)


def test_two_runs_with_one_work_folder(inputs, tmp_path, tokenizer):
    work = tmp_path / "work"
    with locked(Folder(str(work))), pytest.raises(ValueError, match=r"--work .*work: another run is writing"):
        tokenize(config(inputs, tmp_path / "out", tokenizer, work=str(work)))
    assert digests(tmp_path / "out") == {}
    tokenize(config(inputs, tmp_path / "out", tokenizer, work=str(work)))


@pytest.mark.parametrize("flag", ["--output", "--work"])
def test_two_runs_in_one_remote_folder(inputs, tmp_path, tokenizer, bucket, flag):
    places = {
        "--output": {"output": "s3://bucket/x"},
        "--work": {"output": tmp_path / "a", "work": "s3://bucket/x"},
    }
    made = {"inputs": inputs, "tokenizer": tokenizer, **places[flag]}
    with locked(Folder("s3://bucket/x")):
        owner = json.loads(Folder("s3://bucket/x").read(OWNER))
        with pytest.raises(
            ValueError, match=rf"{flag} s3://bucket/x: another run .*process {owner['pid']} on "
        ):
            tokenize(config(**made))
        assert Folder("s3://bucket/x").names() == {OWNER}
    assert Folder("s3://bucket/x").names() == set()
    tokenize(config(**made))
    assert OWNER not in Folder("s3://bucket/x").names()


def test_an_owner_elsewhere_stays_until_it_is_said_to_be_dead(inputs, tokenizer, bucket):
    folder = Folder("s3://bucket/x")
    folder.write(
        OWNER, json.dumps(describe_process() | {"host": "far", "pid": 7, "machine": "other"}).encode()
    )
    with pytest.raises(ValueError, match=r"process 7 on far, since 20.*--take-over"):
        tokenize(config(inputs, "s3://bucket/x", tokenizer))
    tokenize(config(inputs, "s3://bucket/x", tokenizer, take_over=True))
    assert OWNER not in folder.names()


def test_a_dead_owner_of_this_host_is_replaced(inputs, tokenizer, bucket):
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    owner = describe_process() | {"pid": child.pid, "started": find_start(child.pid)}
    assert not is_dead(owner)
    child.communicate(b"\n")
    assert is_dead(owner)
    assert is_dead(describe_process() | {"started": "1"}), "another process that has its number now"
    assert not is_dead(owner | {"machine": "a container"})
    Folder("s3://bucket/x").write(OWNER, json.dumps(owner).encode())
    tokenize(config(inputs, "s3://bucket/x", tokenizer))


def test_of_two_that_begin_at_once_one_has_it(bucket, monkeypatch):
    folder, other = Folder("s3://bucket/x"), describe_process() | {"pid": 1}
    monkeypatch.setattr(lock.time, "sleep", lambda seconds: folder.write(OWNER, json.dumps(other).encode()))
    with pytest.raises(ValueError, match=r"another run is writing there \(process 1 on"), locked(folder):
        pass
    assert json.loads(folder.read(OWNER)) == other


def test_a_file_is_no_folder(inputs, tmp_path, tokenizer, bucket):
    there = write_lines(tmp_path / "there/x", ["a"])
    bucket(there.parent)
    for output in (there, there / "below", "s3://bucket/x"):
        with pytest.raises(ValueError, match=rf"--output {output} is.* a file.*: name a folder"):
            tokenize(config(inputs, output, tokenizer))


def test_a_folder_that_a_console_made_is_empty(inputs, tokenizer, bucket):
    client = boto3.client("s3")
    client.put_object(Bucket="bucket", Key="x/", Body=b"")
    client.close()
    tokenize(config(inputs, "s3://bucket/x", tokenizer))
