"""A run's folder behind a URL: complete or absent there, whenever the process dies."""

import socket
from pathlib import Path

import pytest

from open_lm.checkpoint import files, recover, state
from open_lm.checkpoint.bring import bring_named, fetch, newest
from open_lm.checkpoint.remote import RemoteFolder, signature

SHARD = "shard-00001-model-00001-of-00001.safetensors"


def put(remote: RemoteFolder, folder: Path, step: int) -> bool:
    names = [f"checkpoints/step_{step}/{name}" for name in (SHARD, state.CONTENT, state.DIGESTS)]
    return remote.put_state([(folder / name, name) for name in names])


def put_weights(remote: RemoteFolder, folder: Path, label: str) -> None:
    for part in ("ema_0.9_1", "epoch"):
        remote.put(folder / f"checkpoints/{part}_{label}.pt", f"checkpoints/{part}_{label}.pt")


def step_in(folder: Path, label: str) -> int:
    """Of the files of weights and their state, which are all there."""
    checkpoints = folder / "checkpoints"
    steps = {files.step_of(checkpoints / f"{part}_{label}.pt") for part in ("ema_0.9_1", "epoch")}
    (step,) = steps
    state.verify(checkpoints / f"step_{step}")
    return step


def test_files_come_back_as_they_were(remote, tmp_path) -> None:
    assert remote.sizes() == {}
    remote.check_writable(tmp_path / "run")
    (tmp_path / "a").write_bytes(b"1234")
    remote.put(tmp_path / "a", "sub/a")
    remote.put(tmp_path / "a", "b")
    assert remote.sizes() == {"sub/a": 4, "b": 4}
    remote.get("sub/a", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == b"1234"
    assert (tmp_path / "back").stat().st_mtime == pytest.approx(remote.modified("sub/a"), abs=1e-5)
    remote.delete("b")
    remote.delete("b")
    assert remote.sizes() == {"sub/a": 4}


@pytest.mark.parametrize("kind", ["path", "s3"])
def test_killed_at_any_call(kind, request, tmp_path, write_checkpoint, kill_at) -> None:
    """Dead at any call: what is there is a whole checkpoint, the one before or the new."""
    if kind == "s3":
        request.getfixturevalue("bucket")
    here, found, done = tmp_path / "here", [], False
    write_checkpoint(here, "1", 5)
    write_checkpoint(here, "2", 7)
    for count in range(20):
        root = f"s3://bucket/{count}" if kind == "s3" else f"{tmp_path}/{count}"
        remote, there = RemoteFolder(root), tmp_path / f"fresh_{count}"
        assert put(remote, here, 5)
        calls = kill_at(count, *((remote._place[0], name) for name in ("put_file", "mv")))
        try:
            put(remote, here, 7)
            done = True
        except kill_at.error:
            done = False
        kill_at.undo()
        path = newest(RemoteFolder(root), there, than=-1)
        label = {5: "1", 7: "2"}[files.step_of(path)]
        assert path == there / f"checkpoints/epoch_{label}.pt"
        found.append(step_in(there, label))
        assert put(RemoteFolder(root), here, 7), "what was left over is no obstacle"
        newest(RemoteFolder(root), there, than=found[-1])
        assert step_in(there, "2") == 7
        if done:
            assert len(calls) == count == (6 if kind == "path" else 3)
            break
    assert done
    assert found == [5] * (len(found) - 1) + [7]


def test_a_state_that_changes_while_it_is_copied(remote, tmp_path, write_checkpoint, monkeypatch) -> None:
    """A run that was resumed earlier writes the step again: the copy is of one save, or absent."""
    here = tmp_path / "here"
    write_checkpoint(here, "1", 1)
    write_checkpoint(here, "2", 2)
    assert put(remote, here, 1)
    assert put(remote, here, 2)
    real, done = remote.put, []

    def replaced_meanwhile(local, name):
        real(local, name)
        if not done:
            write_checkpoint(here, "2", 2)
        done.append(name)

    monkeypatch.setattr(remote, "put", replaced_meanwhile)
    assert not put(remote, here, 2)
    assert list(remote.states()) == [1]
    assert put(remote, here, 2)
    assert list(remote.states()) == [2, 1]


def test_the_newest_is_by_step_and_complete(remote, tmp_path, write_checkpoint) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    for label, step in (("9", 90), ("10", 100), ("11", 110), ("latest", 105), ("12", 120)):
        write_checkpoint(here, label, step)
        put(remote, here, step)
        put_weights(remote, here, label)
    for step, damaged in ((110, b"cut"), (120, None)):
        shard = here / f"checkpoints/step_{step}/{SHARD}"
        data = bytearray(shard.read_bytes())
        data[-1] ^= 1
        shard.write_bytes(damaged or data)
        remote.put(shard, f"checkpoints/step_{step}/{SHARD}")
    (here / "log.jsonl").write_text("1\n2\n")
    (here / "out.log").write_text("short")
    (here / "checkpoints/results.jsonl").write_text("a result\n")
    for name in ("log.jsonl", "out.log", "checkpoints/results.jsonl"):
        remote.put(here / name, name)
    there.mkdir()
    (there / "out.log").write_text("longer here")
    (there / "log.jsonl").write_text("1\n")
    with pytest.warns(
        UserWarning, match=rf"step_1[12]0 is passed over: .*{remote.url}.*{SHARD} is damaged"
    ) as caught:
        assert newest(remote, there, than=-1) == there / "checkpoints/epoch_latest.pt"
    assert len(caught) == 2
    assert (there / "log.jsonl").read_text() == "1\n2\n"
    assert (there / "out.log").read_text() == "longer here"
    assert {p.name for p in (there / "checkpoints").iterdir()} == {
        "results.jsonl", "step_105", "epoch_latest.pt", "ema_0.9_1_latest.pt",
    }  # fmt: skip
    assert step_in(there, "latest") == 105
    with pytest.warns(UserWarning, match="is passed over"):
        assert newest(remote, there, than=105) is None
    assert newest(remote, there, than=120) is None


def test_one_checkpoint_by_its_url(remote, tmp_path, write_checkpoint) -> None:
    write_checkpoint(tmp_path / "here", "3", 30)
    put(remote, tmp_path / "here", 30)
    put_weights(remote, tmp_path / "here", "3")
    url = f"{remote.url}/checkpoints/epoch_3.pt"
    expected = {
        "alone": ({}, {"epoch_3.pt"}),
        "averages": ({"averages": True}, {"epoch_3.pt", "ema_0.9_1_3.pt"}),
        "whole": ({"resumes": True}, {"epoch_3.pt", "step_30"}),
    }
    for name, (options, files_there) in expected.items():
        assert fetch(url, tmp_path / name, **{"resumes": False} | options) == tmp_path / name / "epoch_3.pt"
        assert {p.name for p in (tmp_path / name).iterdir()} == files_there
    state.verify(tmp_path / "whole/step_30")
    of_state = fetch(f"{remote.url}/checkpoints/step_30", tmp_path / "state", resumes=True)
    assert of_state == tmp_path / "state/step_30"
    state.verify(of_state)
    with pytest.raises(FileNotFoundError, match=r"epoch_4\.pt"):
        fetch(url.replace("_3", "_4"), tmp_path / "whole", resumes=True)
    for name in ("step_30", "epoch_3.pt"):
        assert bring_named(remote, tmp_path / "run", name) == tmp_path / "run/checkpoints/epoch_3.pt"
    remote.delete_state(30)
    assert bring_named(remote, tmp_path / "run", "epoch_3.pt") is None
    assert remote.states() == {}


def test_what_cannot_be_written_to_is_said(bucket, tmp_path, monkeypatch) -> None:
    run = tmp_path / "logs/run"
    for url, expected in {
        "s3://no-such-bucket/x": r"s3://no-such-bucket/x/.*bucket does not exist",
        f"{tmp_path}/logs/run": "lies in the run's own folder",
        f"file://{tmp_path}/logs/run/remote": "lies in the run's own folder",
        "nothing://x": "nothing://x.*[Pp]rotocol",
        f"{tmp_path}/a_file/x": "a_file/x.*NotADirectory|a_file/x.*FileExists",
    }.items():
        (tmp_path / "a_file").touch()
        with pytest.raises(ValueError, match=f"--remote-sync: .*{expected}"):
            RemoteFolder(url).check_writable(run)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ValueError, match=r"NoCredentials.*set AWS_PROFILE or AWS_ACCESS_KEY_ID"):
        RemoteFolder("s3://bucket/x").check_writable(run)


def test_a_dead_server_is_said(monkeypatch, tmp_path) -> None:
    with socket.socket() as taken:  # bound, but nobody listens
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{taken.getsockname()[1]}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(name, "test")
        with pytest.raises(ValueError, match="--remote-sync: s3://bucket/x/"):
            RemoteFolder("s3://bucket/x").check_writable(tmp_path / "run")


def test_a_second_label_and_the_removal_of_one(tmp_path, write_checkpoint) -> None:
    folder = tmp_path / "checkpoints"
    write_checkpoint(tmp_path, "2", 20)
    (folder / "results.jsonl").touch()
    (folder / "epoch_2_mine.pt").touch()
    files.alias(folder / "epoch_2.pt", files.LATEST)
    assert step_in(tmp_path, "latest") == 20
    write_checkpoint(tmp_path, "10", 30)
    assert recover.latest(folder) == folder / "epoch_10.pt"
    files.delete(folder, "10")
    assert recover.latest(folder) == folder / "epoch_2.pt", "at the same step the number wins"
    files.delete(folder, "2")
    assert step_in(tmp_path, "latest") == 20, "the state stays as long as a file is of it"
    write_checkpoint(tmp_path, "latest", 25)
    assert recover.latest(folder) == folder / "epoch_latest.pt"
    assert {p.name for p in folder.iterdir()} == {
        "results.jsonl", "epoch_2_mine.pt", "epoch_latest.pt", "ema_0.9_1_latest.pt", "step_25",
    }  # fmt: skip


def test_signature_sees_a_file_replaced_by_one_of_its_size_and_time(tmp_path) -> None:
    (tmp_path / "a").touch()
    (tmp_path / "b").touch()
    assert signature(tmp_path / "a") != signature(tmp_path / "b")
    assert signature(tmp_path / "c") is None
