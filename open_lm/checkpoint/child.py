"""epoch_N.pt made in a process of its own, which nothing but its end or its parent's stops half-way."""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from open_lm.checkpoint import files

STOPS = [
    getattr(signal, name)
    for name in ("SIGHUP", "SIGINT", "SIGQUIT", "SIGTERM", "SIGUSR1", "SIGUSR2")
    if hasattr(signal, name)
]
PR_SET_PDEATHSIG = 1  # Linux: the signal that a process gets when its parent ends
WATCH_SECONDS = 0.5
SCRIPT = (
    "import sys; from open_lm.checkpoint.child import work; work(sys.argv[1], sys.argv[2], int(sys.argv[3]))"
)


def consolidate(folder: Path, label: str, *, large: bool) -> None:
    """`files.consolidate`, in a process of its own where it is large. Raises OSError with its message, or with the
    signal that ended it."""
    if not large:
        files.consolidate(folder, label)
        return
    environment = environment_without_ranks(os.environ) | {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", SCRIPT, str(folder), label, str(os.getpid())]
    with stops_blocked():
        # a session of its own: what is sent to the whole job, whose saves are waited for, must not end it
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
    _, said = process.communicate()
    if process.returncode:
        why = [said.strip()[-2000:] or f"its process ended with status {process.returncode}"]
        if process.returncode < 0:
            why = [
                f"its process was ended by {name_of(-process.returncode)}",
                *said.strip().splitlines()[-1:],
            ]
        raise OSError(f"epoch_{label}.pt could not be made of {folder}: {': '.join(why)}")


def name_of(number: int) -> str:
    """A signal, for people."""
    try:
        name = signal.Signals(number).name
    except ValueError:
        name = "signal"
    hint = ", as Linux does where memory runs out" if name == "SIGKILL" else ""
    return f"{name} ({number}{hint})"


@contextlib.contextmanager
def stops_blocked() -> Iterator[None]:
    """What this thread starts meanwhile begins, and stays, deaf to them: else there is no moment early enough."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def work(folder: str, label: str, parent: int) -> None:
    """What the process does."""
    import torch

    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)
    end_with(parent)
    torch.set_num_threads(1)
    try:
        files.consolidate(Path(folder), label)
    except (OSError, ValueError) as error:
        sys.exit(str(error))


def end_with(parent: int) -> None:
    """Ends this process when its parent ends, however that does: the run that goes on writes the same files."""
    with contextlib.suppress(Exception):  # Linux alone
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(WATCH_SECONDS)
        os._exit(1)

    if os.getppid() != parent:  # it has ended before
        os._exit(1)
    threading.Thread(target=watch, daemon=True).start()


def environment_without_ranks(environment: Mapping[str, str]) -> dict[str, str]:
    """Without what would make a process believe to be one of the run's; finds the same open_lm."""
    ranks = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    package = str(Path(__file__).parents[2])
    paths = [package, *filter(None, [environment.get("PYTHONPATH")])]
    return {k: v for k, v in environment.items() if k not in ranks} | {"PYTHONPATH": os.pathsep.join(paths)}
