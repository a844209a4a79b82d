"""A folder has one owner, and none once that is dead."""

import json
import os
import signal
import socket
import subprocess
import sys

import pytest

from open_lm.log.owner import NAME, Owner, refuse_owned

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
    refuse_owned(tmp_path)  # nobody was here yet
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        expected = f"{tmp_path} is in use by process {holder.pid} on {socket.gethostname()} since"
        for attempt in (refuse_owned, Owner):
            with pytest.raises(ValueError, match=expected):
                attempt(tmp_path)
        holder.send_signal(signal.SIGKILL)  # its forked child lives on, and must not hold the lock
        holder.wait()
        owner = Owner(tmp_path)
        assert json.loads((tmp_path / NAME).read_text())["pid"] == os.getpid()
        owner.release()
        os.killpg(holder.pid, signal.SIGKILL)
    refuse_owned(tmp_path)
