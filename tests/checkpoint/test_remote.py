"""A run's folder behind a URL: complete or absent there, whenever the process dies."""

import socket
from pathlib import Path

import pytest

from open_lm.checkpoint import files
from open_lm.checkpoint.remote import RemoteFolder, fetch, newest, signature

PARTS = ("optimizer", "stats", "ema_0.9_1", "epoch")


def put(remote: RemoteFolder, folder: Path, label: str) -> bool:
    names = [f"checkpoints/{part}_{label}.pt" for part in PARTS]
    return remote.put_together([(folder / name, name) for name in names])


def steps(folder: Path, label: str) -> set[int]:
    return {files.step_of(folder / f"checkpoints/{part}_{label}.pt") for part in PARTS}


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
def test_killed_while_it_replaces_a_checkpoint(kind, request, tmp_path, write_checkpoint, kill_at) -> None:
    """Dead at any call: what is there is one whole checkpoint, the old or the new."""
    if kind == "s3":
        request.getfixturevalue("bucket")
    found, done = [], False
    for count in range(20) if kind == "path" else (3, 6, 8):
        root = f"s3://bucket/{count}" if kind == "s3" else f"{tmp_path}/{count}"
        remote, here, there = RemoteFolder(root), tmp_path / "here", tmp_path / f"fresh_{count}"
        write_checkpoint(here, "latest", 5)
        assert put(remote, here, "latest")
        write_checkpoint(here, "latest", 7)
        calls = kill_at(count, *((remote._place[0], name) for name in ("put_file", "mv")))
        try:
            put(remote, here, "latest")
            done = True
        except kill_at.error:
            done = False
        kill_at.undo()
        path = newest(RemoteFolder(root), there, than=-1)
        assert path == there / "checkpoints/epoch_latest.pt"
        (step,) = steps(there, "latest")
        found.append(step)
        assert put(RemoteFolder(root), here, "latest"), "what was left over is no obstacle"
        newest(RemoteFolder(root), there, than=step)
        assert steps(there, "latest") == {7}
        if done:
            assert len(calls) == count == (12 if kind == "path" else 8)
            break
    assert done
    assert found == sorted(found)
    assert {5, 7} == set(found)


def test_a_new_number_is_absent_until_it_is_whole(remote, tmp_path, write_checkpoint, kill_at) -> None:
    write_checkpoint(tmp_path / "here", "1", 3)
    for count in range(4):
        kill_at(count, (remote, "put"))
        with pytest.raises(kill_at.error):
            put(remote, tmp_path / "here", "1")
        kill_at.undo()
        assert newest(remote, tmp_path / "there", than=-1) is None
    assert not (tmp_path / "there").exists(), "nothing is made where there is nothing to fetch"


def test_files_that_change_while_they_are_copied(remote, tmp_path, write_checkpoint, monkeypatch) -> None:
    """The loop replaces epoch_latest.pt whenever it likes: the copy is of one step, or not made."""
    here = tmp_path / "here"
    write_checkpoint(here, "latest", 1)
    assert put(remote, here, "latest")
    write_checkpoint(here, "latest", 2)
    real, done = remote.put, []

    def replaced_meanwhile(local, name):
        real(local, name)
        if len(done) == 1:
            write_checkpoint(here, "latest", 3)
        done.append(name)

    monkeypatch.setattr(remote, "put", replaced_meanwhile)
    assert not put(remote, here, "latest")
    newest(remote, tmp_path / "there", than=-1)
    assert steps(tmp_path / "there", "latest") == {1}
    assert put(remote, here, "latest")
    newest(remote, tmp_path / "there", than=-1)
    assert steps(tmp_path / "there", "latest") == {3}


def test_the_newest_is_by_step_and_complete(remote, tmp_path, write_checkpoint) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    for label, step in (("9", 90), ("10", 100), ("11", 110), ("latest", 105)):
        write_checkpoint(here, label, step)
        put(remote, here, label)
    (here / "checkpoints/optimizer_11.pt").write_bytes(b"cut")
    remote.put(here / "checkpoints/optimizer_11.pt", "checkpoints/optimizer_11.pt")
    (here / "log.jsonl").write_text("1\n2\n")
    (here / "out.log").write_text("short")
    (here / "checkpoints/results.jsonl").write_text("a result\n")
    for name in ("log.jsonl", "out.log", "checkpoints/results.jsonl"):
        remote.put(here / name, name)
    there.mkdir()
    (there / "out.log").write_text("longer here")
    (there / "log.jsonl").write_text("1\n")
    with pytest.warns(UserWarning, match=r"epoch_11.pt is passed over: .*'optimizer_11.pt': None"):
        assert newest(remote, there, than=-1) == there / "checkpoints/epoch_latest.pt"
    assert (there / "log.jsonl").read_text() == "1\n2\n"
    assert (there / "out.log").read_text() == "longer here"
    assert {p.name for p in (there / "checkpoints").iterdir()} == {
        "results.jsonl",
        *(f"{part}_latest.pt" for part in PARTS),
    }
    for name in ("epoch_latest.pt", "ema_0.9_1_latest.pt"):
        theirs, ours = (folder / "checkpoints" / name for folder in (here, there))
        assert theirs.read_bytes() == ours.read_bytes()
    with pytest.warns(UserWarning, match="epoch_11.pt is passed over"):
        assert newest(remote, there, than=105) is None
    assert newest(remote, there, than=110) is None


def test_one_checkpoint_by_its_url(remote, tmp_path, write_checkpoint) -> None:
    write_checkpoint(tmp_path / "here", "3", 30)
    put(remote, tmp_path / "here", "3")
    url = f"{remote.url}/checkpoints/epoch_3.pt"
    assert fetch(url, tmp_path / "alone", whole=False) == tmp_path / "alone/epoch_3.pt"
    assert [p.name for p in (tmp_path / "alone").iterdir()] == ["epoch_3.pt"]
    fetch(url, tmp_path / "whole", whole=True)
    assert {p.name for p in (tmp_path / "whole").iterdir()} == {f"{part}_3.pt" for part in PARTS}
    with pytest.raises(FileNotFoundError, match=r"epoch_4\.pt"):
        fetch(url.replace("_3", "_4"), tmp_path / "whole", whole=True)


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
    write_checkpoint(tmp_path, "10", 30)
    (folder / "results.jsonl").touch()
    (folder / "epoch_2_mine.pt").touch()
    files.alias(folder / "epoch_2.pt", files.LATEST)
    assert steps(tmp_path, "latest") == {20}
    assert files.latest(folder) == folder / "epoch_10.pt"
    files.delete(folder, "10")
    assert files.latest(folder) == folder / "epoch_2.pt", "at the same step the number wins"
    write_checkpoint(tmp_path, "latest", 25)
    assert steps(tmp_path, "2") == {20}, "what replaces one label leaves the other alone"
    assert files.latest(folder) == folder / "epoch_latest.pt"
    files.delete(folder, "2")
    assert {p.name for p in folder.iterdir()} == {
        "results.jsonl", "epoch_2_mine.pt", *(f"{part}_latest.pt" for part in PARTS),
    }  # fmt: skip


def test_signature_sees_a_file_replaced_by_one_of_its_size_and_time(tmp_path) -> None:
    (tmp_path / "a").touch()
    (tmp_path / "b").touch()
    assert signature(tmp_path / "a") != signature(tmp_path / "b")
    assert signature(tmp_path / "c") is None
