"""A folder has one owner, and none once that is dead."""

import json
import os
import signal
import socket
import subprocess
import sys

import pytest

from open_lm.log.owner import NAME, Owner

HOLD = """
import sys, time
from pathlib import Path
from open_lm.log.owner import Owner
import multiprocessing
owner = Owner(Path(sys.argv[1]))
multiprocessing.get_context("fork").Process(target=time.sleep, args=(30,), daemon=True).start()
print("held", flush=True)
time.sleep(30)
"""


def test_another_process_is_refused_until_the_first_is_dead(tmp_path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        expected = f"{tmp_path} is in use by process {holder.pid} on {socket.gethostname()} since"
        with pytest.raises(ValueError, match=expected):
            Owner(tmp_path)
        holder.send_signal(signal.SIGKILL)  # its forked child lives on, and must not hold the lock
        holder.wait()
        owner = Owner(tmp_path)
        assert json.loads((tmp_path / NAME).read_text())["pid"] == os.getpid()
        owner.release()
        os.killpg(holder.pid, signal.SIGKILL)
    Owner(tmp_path).release()


def test_what_was_made_for_an_owner_alone_goes(tmp_path) -> None:
    Owner(tmp_path / "new").release(leave_nothing=True)
    assert not (tmp_path / "new").exists()
    Owner(tmp_path / "kept").release()
    Owner(tmp_path / "kept").release(leave_nothing=True)
    assert (tmp_path / "kept" / NAME).exists(), "it was there before"
