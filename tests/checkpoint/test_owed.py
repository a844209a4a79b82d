"""An epoch_N.pt that could not be made when its state was saved: made later, or said, and never lost."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from open_lm.checkpoint import child, files, recover, state, sync
from open_lm.checkpoint.remote import RemoteFolder
from open_lm.checkpoint.saver import Saver
from open_lm.config.distributed import DistributedConfig
from open_lm.config.model import ModelConfig
from open_lm.config.optim import OptimConfig
from open_lm.optim import make_optimizer
from open_lm.parallel import mesh, plan

TINY = ModelConfig(dim=16, n_layers=1, n_heads=2, seq_len=8, vocab_size=32)


@pytest.fixture
def saver(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    alone = mesh.World(0, 0, 1, torch.device("cpu"), None)
    options = {"distributed": DistributedConfig(), "precision": "fp32", "seed": 1}
    model = plan.parallelize(TINY, world=alone, **options)
    made = Saver(
        tmp_path / "checkpoints", model=model, optimizer=make_optimizer(model, OptimConfig()), keep=1
    )
    yield made
    made.close(0)


def fill_(model: nn.Module, value: float) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)


def save(saver: Saver, step: int, *labels: str) -> Exception | None:
    """The weights are the step."""
    fill_(saver.model, step)
    saver.save({"step": step}, labels=labels)
    saver.wait()
    (done,) = saver.finished()
    assert done.is_complete
    return done.error


def fail_for(monkeypatch, *labels: str) -> None:
    def consolidate(folder: Path, label: str, *, large: bool) -> None:
        if label in labels:
            raise OSError(28, f"cannot write epoch_{label}.pt: No space left on device")
        child.consolidate(folder, label, large=False)

    monkeypatch.setattr("open_lm.checkpoint.saver.consolidate", consolidate)


def weight_of(path: Path) -> float:
    return float(torch.load(path, weights_only=True)["state_dict"]["norm.weight"][0])


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_the_next_save_makes_it_first(saver, monkeypatch) -> None:
    folder, told = saver.folder, []
    saver.on_complete = told.append
    fail_for(monkeypatch, "1")
    assert "epoch_1.pt" in str(save(saver, 2, "1", "latest"))
    for step in (3, 4, 5):  # states between intervals: of these one stays
        assert "epoch_1.pt" in str(save(saver, step)), "as long as it is missing"
    assert names(folder) == {"step_2", "step_5"}
    assert "epoch_1.pt" in str(save(saver, 6, "2", "latest"))
    assert names(folder) == {"step_2", "step_5", "step_6", "epoch_2.pt", "epoch_latest.pt"}
    fail_for(monkeypatch)
    assert save(saver, 7) is None
    assert weight_of(folder / "epoch_1.pt") == 2
    assert weight_of(folder / "epoch_latest.pt") == 6, "the older does not take the newer's label"
    assert told == [(), (), (), (), ("2", "latest"), ("1",)]
    (folder / "epoch_1.pt").unlink()  # by hand: it is not owed any more
    assert save(saver, 8) is None
    assert "step_2" not in names(folder)


def test_a_resume_makes_it(saver, monkeypatch) -> None:
    folder = saver.folder
    fail_for(monkeypatch, "1")
    save(saver, 2, "1")
    save(saver, 4, "2")

    def fail(*_: object) -> None:
        raise OSError("no")

    with monkeypatch.context() as patch:
        patch.setattr(recover.make_owed, "__defaults__", (fail, None))
        with pytest.warns(UserWarning, match="epoch_N.pt is still missing: no"):
            assert recover.latest(folder) == folder / "epoch_2.pt"
    with pytest.raises(recover.SaveError, match=r"has no epoch_1.pt.*its weights are in .*step_2"):
        recover.check_made(folder)
    assert recover.latest(folder) == folder / "epoch_2.pt"
    assert weight_of(folder / "epoch_1.pt") == 2
    recover.check_made(folder)


def test_a_resume_that_cannot_make_it_keeps_its_state(saver, monkeypatch) -> None:
    """Also the newest, killed between its state and its epoch_N.pt."""
    folder = saver.folder
    save(saver, 2, "1")
    (folder / "epoch_1.pt").unlink()

    def fail(*_: object) -> None:
        raise OSError("no")

    monkeypatch.setattr(recover, "consolidate", fail)
    with pytest.warns(UserWarning, match=r"epoch_1.pt could not be made of .*step_2: no"):
        assert recover.latest(folder) == folder / "step_2"
    fail_for(monkeypatch, "1")
    save(saver, 4, "2")
    assert "step_2" in names(folder)


def test_the_end_tries_again_and_says_what_is_missing(saver, monkeypatch) -> None:
    fail_for(monkeypatch, "1")
    save(saver, 2, "1")
    assert "epoch_1.pt" in str(saver.close())
    fail_for(monkeypatch)
    assert saver.close() is None
    assert weight_of(saver.folder / "epoch_1.pt") == 2


def test_a_damaged_state_is_not_made_a_file_of(saver, monkeypatch) -> None:
    fail_for(monkeypatch, "1")
    save(saver, 2, "1")
    (shard,) = (saver.folder / "step_2").glob("*.safetensors")
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    fail_for(monkeypatch)
    assert "is damaged" in str(save(saver, 4, "2"))
    assert names(saver.folder) == {"step_2", "step_4", "epoch_2.pt"}


def test_its_state_stays_there_too(saver, monkeypatch, tmp_path) -> None:
    remote = RemoteFolder(f"{tmp_path}/remote")
    fail_for(monkeypatch, "1")
    save(saver, 2, "1")
    (tmp_path / "run").mkdir()
    run = saver.folder.rename(tmp_path / "run/checkpoints").parent
    saver.folder = run / "checkpoints"
    copies = sync.Sync(run, remote, every_seconds=1000)
    save(saver, 4, "2")
    copies.wake()
    save(saver, 5)
    save(saver, 6)
    assert copies.close()
    assert list(remote.states()) == [6, 4, 2]
    assert sync.Sync(run, RemoteFolder(remote.url), every_seconds=1000).close()
    assert 2 in remote.states()
    assert not [name for name in remote.sizes() if state.OWED in name]


# ---- the process that makes it


def children() -> list[int]:
    """Of this process, by any of its threads."""
    tasks = Path("/proc/self/task").iterdir()
    return [int(pid) for task in tasks for pid in (task / "children").read_text().split()]


def wait_for(condition) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


@contextlib.contextmanager
def making(folder: Path, before: set[int]):
    """(pid of the process, its errors), while a thread waits for it."""
    errors: list[OSError] = []

    def make() -> None:
        try:
            child.consolidate(folder / "step_2", "1", large=True)
        except OSError as error:
            errors.append(error)

    thread = threading.Thread(target=make)
    thread.start()
    wait_for(lambda: set(children()) - before)
    (pid,) = set(children()) - before
    yield pid, errors
    thread.join(60)
    assert not thread.is_alive()


@pytest.fixture
def checkpoints(tmp_path, write_checkpoint) -> Path:
    """step_2 without its files of weights."""
    write_checkpoint(tmp_path, "1", 2)
    for path in (tmp_path / "checkpoints").glob("*.pt"):
        path.unlink()
    return tmp_path / "checkpoints"


def test_no_stop_signal_ends_it(checkpoints) -> None:
    """From its first moment on, to it or to its parent's group; and a later session's signals neither."""
    with making(checkpoints, set(children())) as (pid, errors):
        wait_for(lambda: not is_alive(pid) or os.getsid(pid) == pid)
        assert os.getpgid(pid) != os.getpgid(0)
        while is_alive(pid):
            for number in child.STOPS:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            time.sleep(0.05)
    assert not errors, errors
    assert files.step_of(checkpoints / "epoch_1.pt") == 2
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, []) & set(child.STOPS), "the parent hears them"


def test_the_signal_that_ended_it_is_said(checkpoints) -> None:
    os.mkfifo(checkpoints / "ema_0.9_1_1.pt.tmp")  # which it opens, and waits
    with making(checkpoints, set(children())) as (pid, errors):
        wait_for(lambda: os.getsid(pid) == pid)
        os.kill(pid, signal.SIGKILL)
    assert "epoch_1.pt could not be made of" in str(errors[0])
    assert "its process was ended by SIGKILL (9, as Linux does where memory runs out)" in str(errors[0])


PARENT = """
import sys
from pathlib import Path
from open_lm.checkpoint import child
child.consolidate(Path(sys.argv[1]), "1", large=True)
"""


@pytest.mark.parametrize("portable", [False, True])
def test_it_ends_with_its_parent(checkpoints, tmp_path, portable) -> None:
    os.mkfifo(checkpoints / "ema_0.9_1_1.pt.tmp")
    script = PARENT
    if portable:  # no signal comes from the system, as elsewhere than on Linux
        patch = "import open_lm.checkpoint.child as c; c.PR_SET_PDEATHSIG = 0; "
        script = script.replace(
            "child.consolidate", f"child.SCRIPT = {patch!r} + child.SCRIPT\nchild.consolidate"
        )
    with subprocess.Popen([sys.executable, "-c", script, str(checkpoints / "step_2")]) as parent:
        found = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
        wait_for(lambda: found.read_text().split())
        (pid,) = map(int, found.read_text().split())
        wait_for(lambda: ignores(pid, signal.SIGUSR2))
        time.sleep(0.3)
        assert is_alive(pid)
        parent.kill()
    wait_for(lambda: not is_alive(pid))


def ignores(pid: int, number: int) -> bool:
    (mask,) = re.findall(r"SigIgn:\s*([0-9a-f]+)", Path(f"/proc/{pid}/status").read_text())
    return bool(int(mask, 16) >> (number - 1) & 1)
