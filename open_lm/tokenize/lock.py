"""One run at a time in a folder: a lock of the system on a local one, an object that names its owner elsewhere."""

import fcntl
import json
import os
import secrets
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from open_lm.tokenize.folder import Folder

OWNER = "owner.json"
SETTLE_SECONDS = 1.0  # longer than between another run's look for an owner and its own entry


@contextmanager
def locked(folder: Folder, flag: str = "--output", take_over: bool = False) -> Iterator[None]:
    """Holds a folder for this process. ValueError: another run has it, or it is a file.

    Of a local folder until the process dies. A remote one names its owner, whom a kill leaves behind: a dead
    process of this host is replaced, any other only with `take_over`.
    """
    with held_local(folder, flag) if folder.path is not None else held_remote(folder, flag, take_over):
        yield


@contextmanager
def held_local(folder: Folder, flag: str) -> Iterator[None]:
    assert folder.path is not None
    try:
        folder.make()
    except (FileExistsError, NotADirectoryError):
        raise ValueError(f"{flag} {folder.url} is, or is below, a file: name a folder") from None
    descriptor = os.open(folder.path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"{flag} {folder.url}: another run is writing there") from None
        yield
    finally:
        os.close(descriptor)


@contextmanager
def held_remote(folder: Folder, flag: str, take_over: bool) -> Iterator[None]:
    if folder.is_file():
        raise ValueError(f"{flag} {folder.url} is a file: name a folder")
    other = find_owner(folder)
    if other is not None and not take_over and not is_dead(other):
        raise ValueError(refuse(folder, flag, other))
    mine = describe_process()
    folder.write(OWNER, json.dumps(mine).encode())
    time.sleep(SETTLE_SECONDS)
    other = find_owner(folder)
    if other != mine:  # both looked before either wrote: the last one has it
        raise ValueError(refuse(folder, flag, other or {}))
    try:
        yield
    finally:
        with suppress(OSError):
            if find_owner(folder) == mine:
                folder.delete({OWNER})


def refuse(folder: Folder, flag: str, owner: dict) -> str:
    said = f"process {owner.get('pid', '?')} on {owner.get('host', '?')}, since {owner.get('since', '?')}"
    return (
        f"{flag} {folder.url}: another run is writing there ({said}); if that run is dead, "
        "--take-over goes on in its place"
    )


def find_owner(folder: Folder) -> dict | None:
    """Whom the folder names; None: nobody."""
    try:
        owner = json.loads(folder.read(OWNER))
    except FileNotFoundError:
        return None
    except ValueError:
        owner = None
    return owner if isinstance(owner, dict) else {}


def describe_process() -> dict:
    """This process, for people and for `is_dead`."""
    pid = os.getpid()
    return {
        "host": socket.gethostname(),
        "pid": pid,
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": name_machine(),
        "started": find_start(pid),
        "token": secrets.token_hex(8),
    }


def is_dead(owner: dict) -> bool:
    """Whether a process that was on this host, as far as its numbers mean the same here, is gone."""
    here = describe_process()
    pid = owner.get("pid")
    if not here["machine"] or owner.get("machine") != here["machine"] or owner.get("host") != here["host"]:
        return False
    return isinstance(pid, int) and find_start(pid) != owner.get("started")


def name_machine() -> str:
    """This start of this machine, and whose process numbers on it; '' if unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def find_start(pid: int) -> str:
    """When the process of this number started, in the system's ticks; '' if there is none."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if state == "Z" else fields[18]
    except OSError:
        return ""
