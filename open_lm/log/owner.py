"""One owner per run folder: a lock that the operating system drops when its process dies, however it dies."""

import errno
import fcntl
import json
import os
import socket
import time
from contextlib import suppress
from pathlib import Path

from open_lm.log.record import logger

NAME = ".owner.json"
NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}


class Owner:
    """Holds a run's folder for this process. Ranks have one owner: rank 0.

    The lock is flock's, on LOGS/NAME/.owner.json, which says who holds it. On NFS Linux makes it a lock of the
    server's, which other hosts see (not on mounts with nolock or local_lock=flock); where a file system has none,
    there is only a warning.
    """

    def __init__(self, folder: Path) -> None:
        """Raises ValueError, naming host and process, where another one holds it; OSError if it cannot be made."""
        self.folder = folder
        self._is_new = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        while True:
            self._file = os.open(folder / NAME, os.O_RDWR | os.O_CREAT, 0o644)
            _held.add(self._file)
            try:
                _lock(self._file, folder)
                if os.path.samestat(os.fstat(self._file), os.stat(folder / NAME)):
                    break
            except FileNotFoundError:  # its last owner has left nothing
                folder.mkdir(parents=True, exist_ok=True)
            except ValueError:
                self.release()
                raise
            self.release()
        os.ftruncate(self._file, 0)
        owner = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        }
        os.write(self._file, json.dumps(owner).encode())

    def release(self, leave_nothing: bool = False) -> None:
        """Lets others have it. The file stays, and says who was the last; with `leave_nothing` a folder that was
        made for this owner, and holds nothing else, goes."""
        if self._file not in _held:
            return
        if leave_nothing and self._is_new and os.listdir(self.folder) == [NAME]:
            with suppress(OSError):
                os.unlink(self.folder / NAME)
                os.rmdir(self.folder)
        _held.remove(self._file)
        os.close(self._file)


def _lock(file: int, folder: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in NO_LOCKS:
            logger.warning(
                "%s: its file system has no locks (%s): start no second run in it", folder, error.strerror
            )
            return
        raise ValueError(
            f"{folder} is in use by {_describe(file)}: wait for it, end it, or give another --name"
        ) from None


def _describe(file: int) -> str:
    try:
        owner = json.loads(os.pread(file, 4096, 0))
        return f"process {owner['pid']} on {owner['host']} since {owner['since']}"
    except (OSError, ValueError, KeyError):
        return "another process"


_held: set[int] = set()


def _close_in_child() -> None:
    """A forked process (a data worker that outlives its rank for a moment) must not hold the lock."""
    for file in _held:
        os.close(file)
    _held.clear()


os.register_at_fork(after_in_child=_close_in_child)
