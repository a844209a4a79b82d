"""The thread that copies a run's folder: what it copies, what it outlives, and that it never holds anything up."""

import logging
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from open_lm.checkpoint import files, recover, sync
from open_lm.checkpoint.bring import newest
from open_lm.checkpoint.remote import RemoteFolder
from open_lm.checkpoint.sync import Sync, delete_before


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(sync, "FIRST_RETRY_SECONDS", 0.05)


def wait_for(condition) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def count_puts(remote: RemoteFolder) -> list[str]:
    real, calls = remote.put, []
    remote.put = lambda local, name: (calls.append(name), real(local, name))[1]
    return calls


def labels(folder: Path) -> set[str]:
    return {path.stem.removeprefix("epoch_") for path in (folder / "checkpoints").glob("epoch_*.pt")}


def test_what_is_copied_and_that_it_is_copied_once(remote, tmp_path, write_checkpoint) -> None:
    run = tmp_path / "run"
    write_checkpoint(run, "1", 10)
    (run / "log.jsonl").write_text("1\n")
    (run / "tensorboard").mkdir()
    (run / "tensorboard/events").write_text("e")
    (run / "out.log").touch()
    (run / "checkpoints/epoch_2.pt.tmp").touch()
    (run / "checkpoints/step_3.tmp").mkdir()
    (run / "checkpoints/step_3.tmp/half.json").touch()
    (run / "link").symlink_to(run / "log.jsonl")
    calls = count_puts(remote)
    copies = Sync(run, remote, every_seconds=0.1)
    wait_for(lambda: any(name.endswith("epoch_1.pt") for name in remote.sizes()))
    with open(run / "log.jsonl", "a") as log:
        log.write("2\n")
    write_checkpoint(run, "2", 20)
    copies.wake()
    assert copies.close()
    whole = [path for path in run.rglob("*.*") if path.is_file() and "step_3" not in str(path)]
    expected = {path.relative_to(run).as_posix(): path.stat().st_size for path in whole}
    expected |= {"tensorboard/events": 1}
    assert "checkpoints/step_20/digests.json" in expected
    assert remote.sizes() == expected
    assert sorted(calls) == sorted([*expected, "log.jsonl"]), "each once, and what had changed once more"
    assert calls.index("checkpoints/epoch_2.pt") > calls.index("checkpoints/step_20/digests.json")

    again = RemoteFolder(remote.url)
    calls = count_puts(again)
    assert Sync(run, again, every_seconds=100).close()
    assert calls == [], "a process that is started again finds them there"
    fetched = tmp_path / "elsewhere"
    newest(again, fetched, than=-1)
    assert Sync(fetched, again, every_seconds=100).close()
    assert {Path(name).name for name in calls} <= {"epoch_2.pt", "ema_0.9_1_2.pt"}, "made anew of the state"


def test_a_copy_of_the_same_size_and_a_later_time_is_known_by_its_content(
    remote, tmp_path, write_checkpoint
) -> None:
    """A run was gone back to and came to the same step, with other weights: all files keep their sizes."""
    run, other = tmp_path / "run", tmp_path / "other/run"
    for folder, value in ((run, 1.0), (other, 2.0)):
        write_checkpoint(folder, "1", 10, value=value)
        (folder / "log.jsonl").write_text(f"{value}\n")
    for path in run.rglob("*.*"):
        if path.is_file():
            os.utime(path, (0, 0))
    assert Sync(other, remote, every_seconds=100).close()
    before = remote.sizes()
    assert Sync(run, RemoteFolder(remote.url), every_seconds=100).close()
    assert remote.sizes() == before
    for path in filter(Path.is_file, run.rglob("*.*")):
        assert remote.read(path.relative_to(run).as_posix()) == path.read_bytes(), path


def test_a_server_that_fails_for_a_while(tmp_path, write_checkpoint, caplog, monkeypatch) -> None:
    run, remote = tmp_path / "run", RemoteFolder(f"{tmp_path}/remote")
    write_checkpoint(run, "1", 10)
    (run / "out.log").write_text("a")
    attempts = []

    def fail(local, name, real=remote.put):
        attempts.append(time.monotonic())
        if len(attempts) < 12:
            raise OSError("no server")
        real(local, name)

    monkeypatch.setattr(remote, "put", fail)
    with caplog.at_level(logging.INFO, "open_lm"):
        copies = Sync(run, remote, every_seconds=1000)
        wait_for(lambda: "checkpoints/epoch_1.pt" in remote.sizes())
        assert copies.close()
    assert any("could not be copied" in message and "no server" in message for message in caplog.messages)
    waits = [b - a for a, b in zip(attempts, attempts[3:], strict=False)]
    assert max(waits[:9]) > 0.19, "longer after each failure"


def test_one_file_does_not_hold_up_the_others_and_a_server_is_not_asked_for_each(
    tmp_path, monkeypatch
) -> None:
    (tmp_path / "run").mkdir()
    for number in range(10, 30):
        (tmp_path / f"run/{number}").touch()
    remote = RemoteFolder(f"{tmp_path}/remote")
    real, dead, asked = remote.put, [], []

    def fail(local, name):
        asked.append(name)
        if dead or name == "12":
            raise OSError("no")
        real(local, name)

    monkeypatch.setattr(remote, "put", fail)
    monkeypatch.setattr(sync, "LAST_ATTEMPTS", 1)
    assert not Sync(tmp_path / "run", remote, every_seconds=1000).close()
    assert len(remote.sizes()) == 19
    dead.append(True)
    for path in (tmp_path / "run").iterdir():
        path.write_text("changed")
    asked.clear()
    assert not Sync(tmp_path / "run", remote, every_seconds=1000).close()
    assert len(asked) in (3, 6), "three in each pass"


def test_what_is_not_copied_at_the_end_is_named(tmp_path, write_checkpoint, caplog, monkeypatch) -> None:
    run, remote = tmp_path / "run", RemoteFolder(f"{tmp_path}/remote")
    write_checkpoint(run, "1", 10)
    (run / "out.log").write_text("a")
    real = remote.put

    def fail(local, name):
        if "step_10" in name:
            raise OSError("no server")
        real(local, name)

    monkeypatch.setattr(remote, "put", fail)
    assert not Sync(run, remote, every_seconds=1000).close()
    assert f"not copied to {tmp_path}/remote: " in caplog.messages[-1]
    assert "checkpoints/step_10/digests.json" in caplog.messages[-1]
    assert "out.log" not in caplog.messages[-1]
    assert not any("step_10" in name for name in remote.sizes())


def test_a_server_that_never_answers_holds_nothing_up(tmp_path, caplog, monkeypatch) -> None:
    run, remote, stuck = tmp_path / "run", RemoteFolder(f"{tmp_path}/remote"), threading.Event()
    run.mkdir()
    (run / "out.log").write_text("a")
    monkeypatch.setattr(remote, "put", lambda local, name: stuck.wait(60))
    begin = time.monotonic()
    with caplog.at_level(logging.INFO, "open_lm"):
        copies = Sync(run, remote, every_seconds=1)
        copies.wake()
        assert time.monotonic() - begin < 1
        assert not copies.close(seconds=2.5)
    assert time.monotonic() - begin < 10
    assert "waiting for the last copy" in caplog.messages[0]
    assert "not copied" in caplog.messages[-1]
    assert "out.log" in caplog.messages[-1]
    stuck.set()


STUCK = """
import socket, sys, threading
from pathlib import Path
from open_lm.checkpoint.remote import RemoteFolder
from open_lm.checkpoint.sync import Sync
silent = socket.socket(); silent.bind(("127.0.0.1", 0)); silent.listen(50)  # accepts, and never answers
import os
os.environ["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{silent.getsockname()[1]}"
copies = Sync(Path(sys.argv[1]), RemoteFolder("s3://bucket/x"), every_seconds=1)
print(copies.close(seconds=3))
"""


def test_the_process_ends_while_a_copy_hangs(tmp_path, monkeypatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    (tmp_path / "out.log").write_text("a")
    command = [sys.executable, "-c", STUCK, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "False\n"), done.stderr
    assert "Traceback" not in done.stderr


def test_deletes_what_is_older_than_the_newest_copied(remote, tmp_path, write_checkpoint) -> None:
    run, written = tmp_path / "run", []
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    (run / "checkpoints/results.jsonl").write_text("r")
    write_checkpoint(run, "7", 7)  # of another time: not `written`
    copies = Sync(run, remote, every_seconds=1000, written=written)
    for label in ("8", "9", "10"):
        write_checkpoint(run, label, int(label), "latest")
        written.append(label)
        copies.wake()
    assert copies.close()
    assert written == ["10"]
    assert labels(run) == {"7", "10", "latest"}
    there = {name for name in remote.sizes() if "results" not in name}
    assert {name for name in there if name.endswith(".pt")} == {
        f"checkpoints/{part}_{n}.pt" for part in ("epoch", "ema_0.9_1") for n in ("7", "10", "latest")
    }
    assert list(remote.states()) == [10, 7]
    assert (run / "checkpoints/results.jsonl").exists()
    assert "checkpoints/results.jsonl" in remote.sizes()


def test_deletes_nothing_that_is_not_copied(tmp_path, write_checkpoint, monkeypatch) -> None:
    run, remote, written = tmp_path / "run", RemoteFolder(f"{tmp_path}/remote"), ["1", "2"]
    write_checkpoint(run, "1", 1)
    assert Sync(run, remote, every_seconds=1000).close()
    write_checkpoint(run, "2", 2)
    real = remote.put

    def fail(local, name):
        if "epoch_2" in name:
            raise OSError("no server")
        real(local, name)

    monkeypatch.setattr(remote, "put", fail)
    assert not Sync(run, remote, every_seconds=1000, written=written).close()
    assert labels(run) == {"1", "2"}
    assert "checkpoints/epoch_1.pt" in remote.sizes()
    monkeypatch.setattr(remote, "put", real)
    assert Sync(run, remote, every_seconds=1000, written=written).close()
    assert labels(run) == labels(tmp_path / "remote") == {"2"}


def one_pass(run: Path, remote: RemoteFolder, written: list[str]) -> None:
    """What the thread does when it is woken, in this thread: a kill must come up here."""
    copies = Sync.__new__(Sync)
    copies.folder, copies.remote, copies.written = run, remote, written
    copies._copied, copies._wake, copies._looked, copies.keep_every = None, threading.Event(), False, None
    copies._copy()


def test_killed_anywhere_between_copy_and_deletion(tmp_path, write_checkpoint, kill_at) -> None:
    """A whole checkpoint here and there after each kill; the next start tidies up."""
    for count in range(60):
        run, remote = tmp_path / f"run_{count}", RemoteFolder(f"{tmp_path}/remote_{count}")
        write_checkpoint(run, "1", 1)
        one_pass(run, remote, ["1"])
        file_system = remote._place[0]
        calls = kill_at(
            count,
            (files, "replace"), (file_system, "put_file"), (file_system, "mv"), (file_system, "rm_file"),
            (Path, "unlink"),
        )  # fmt: skip
        try:
            write_checkpoint(run, "2", 2)
            one_pass(run, remote, ["1", "2"])
            done = True
        except kill_at.error:
            done = False
        kill_at.undo()
        here = recover.latest(run / "checkpoints")
        assert here is not None, count
        there = newest(RemoteFolder(remote.url), tmp_path / f"elsewhere_{count}", than=-1)
        assert there is not None, count
        # resumed: `written` as the checkpoint's state says, and the checkpoint itself
        label = here.stem.removeprefix("epoch_")
        one_pass(run, RemoteFolder(remote.url), ["1"] if label == "1" else ["1", "2"])
        assert labels(run) == labels(Path(remote.url)) == {label}
        left = {path.name.removesuffix(".partial") for path in Path(remote.url, "checkpoints").iterdir()}
        assert left == {f"epoch_{label}.pt", f"ema_0.9_1_{label}.pt", f"step_{label}"}
        if done:
            break
    assert done
    assert len(calls) > 15


def test_without_a_remote_the_older_go_at_once(tmp_path, write_checkpoint) -> None:
    written = ["1", "2", "3"]
    for label in ("1", "2", "3", "4"):
        write_checkpoint(tmp_path, label, int(label))
    delete_before(tmp_path, written, "3")
    assert labels(tmp_path) == {"3", "4"}
    assert written == ["3"]


def test_states_between_intervals_go_there_too(remote, tmp_path, write_checkpoint) -> None:
    run = tmp_path / "run"
    copies = Sync(run, remote, every_seconds=0.05)
    for step in range(1, 6):
        write_checkpoint(run, None, step)
        wait_for(lambda step=step: step in remote.states())
    wait_for(lambda: list(remote.states()) == [5, 4])
    assert copies.close()
    fetched = tmp_path / "elsewhere"
    assert newest(remote, fetched, than=-1) == fetched / "checkpoints/step_5"
    for step in (6, 7):
        write_checkpoint(fetched, None, step)
    assert Sync(fetched, RemoteFolder(remote.url), every_seconds=100).close()
    assert list(remote.states()) == [7, 6], "also those that another process had left"


def test_every_nth_stays(tmp_path, write_checkpoint) -> None:
    written = []
    for label in ("1", "2", "3", "4", "5"):
        write_checkpoint(tmp_path, label, int(label))
        written.append(label)
        delete_before(tmp_path, written, label, keep_every=2)
    assert labels(tmp_path) == {"2", "4", "5"}
    assert written == ["5"]
