"""`Sync`: one thread that copies a run's folder to a URL while the run goes on. Rank 0 alone has one."""

import logging
import os
import threading
from pathlib import Path

from open_lm.checkpoint.files import ABANDONED, LEAVING, delete, group
from open_lm.checkpoint.remote import CHECKPOINTS, STATE, TEMPORARY, RemoteFolder, signature
from open_lm.checkpoint.seal import LENGTH, digest_in, read_digest
from open_lm.checkpoint.state import CONTENT, DIGESTS

FIRST_RETRY_SECONDS = 2.0  # doubled with every failure in a row
COMPARED_BYTES = 16 << 20  # the largest file that is fetched to be compared
GIVE_UP = 3  # failures in a row after which the rest waits for the next try: it is the server, not a file
LAST_ATTEMPTS = 3  # at the end of a run
LAST_SECONDS = 1800.0  # the longest that a run waits for its last copy
logger = logging.getLogger("open_lm")


class Sync:
    """Copies what is new in `folder`: every `every_seconds`, at `wake()`, and a last time at `close()`.

    A failure is a warning and tried again. `written` holds the labels of the run's checkpoints, oldest first:
    those before the newest that is complete there are deleted, there and here (None: nothing is deleted), but for
    every `keep_every`-th.
    """

    def __init__(
        self,
        folder: Path,
        remote: RemoteFolder,
        *,
        every_seconds: float,
        written: list[str] | None = None,
        keep_every: int | None = None,
    ) -> None:
        self.folder = folder
        self.remote = remote
        self.every_seconds = every_seconds
        self.written, self.keep_every = written, keep_every
        self._copied: dict[str, tuple | None] | None = None  # what each file was like when it was copied
        self._failed: dict[str, Exception] = {}
        self._looked = False  # whether what an earlier process left there has been looked for
        self._closing = False
        self._wake = threading.Event()
        # a daemon: a server that never answers must not keep the process alive
        self._thread = threading.Thread(target=self._run, name="remote-sync", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """Copies now."""
        self._wake.set()

    def close(self, seconds: float = LAST_SECONDS) -> bool:
        """Waits for a last copy, at most `seconds`; says what is not copied. True if everything is."""
        self._closing = True
        self._wake.set()
        self._thread.join(min(seconds, 2))
        if self._thread.is_alive():
            logger.info("waiting for the last copy to %s, at most %.0f s", self.remote.url, seconds)
            self._thread.join(max(seconds - 2, 0))
        missing = list(self._failed)
        if self._thread.is_alive():
            copied = dict(self._copied or {})
            missing = [name for name, path in self._files().items() if copied.get(name) != signature(path)]
        if missing:
            names = ", ".join(missing[:20]) + (f" and {len(missing) - 20} more" if len(missing) > 20 else "")
            logger.warning("not copied to %s: %s (they are in %s)", self.remote.url, names, self.folder)
        return not missing

    def _run(self) -> None:
        failures = last_attempts = 0
        while True:
            self._wake.clear()
            closing = self._closing  # before the files are listed: then the last copy misses none
            self._failed = self._copy()
            failures = failures + 1 if self._failed else 0
            last_attempts += closing
            if closing and (not failures or last_attempts == LAST_ATTEMPTS):
                return
            seconds = self.every_seconds
            if failures:
                seconds = min(seconds, FIRST_RETRY_SECONDS * 2 ** (last_attempts or failures - 1))
                name, error = next(iter(self._failed.items()))
                logger.warning(
                    "%d files could not be copied to %s, next try in %.0f s; %s: %s",
                    len(self._failed), self.remote.url, seconds, name, error,
                )  # fmt: skip
            self._wake.wait(seconds)

    def _copy(self) -> dict[str, Exception]:
        """Copies what has changed; {name: error} of what could not be."""
        failed: dict[str, Exception] = {}
        try:
            files = self._files()
            if self._copied is None:
                self._copied = self._compare(files)
            states, weights = _states(files), _weights(files)
            in_sets = {name for names in (*states, *weights) for name in names}
            in_sets |= {name for name in files if STATE.fullmatch(name)}  # states that are not complete
            loose = [[name] for name in files if name not in in_sets and not group([Path(name).name])]
            error, in_a_row = OSError(), 0
            # of checkpoints the newest first: a slow link must not fall behind
            for names in [*loose, *states, *weights]:
                now = {name: signature(files[name]) for name in names}
                if all(self._copied.get(name) == now[name] for name in names):
                    continue
                try:
                    if in_a_row < GIVE_UP:
                        self._put(names, files)
                        self._copied |= now
                        in_a_row = 0
                        continue
                except Exception as caught:
                    error, in_a_row = caught, in_a_row + 1
                failed |= {name: error for name in names if signature(files[name]) is not None}
            self._delete_gone(files, states)
            self._delete_before(failed)
        except Exception as error:  # also ImportError, or a folder that cannot be listed
            failed["(all)"] = error
        return failed

    def _put(self, names: list[str], files: dict[str, Path]) -> None:
        """Copies a file; files of weights, epoch_N.pt last; or a state."""
        if not names[-1].endswith(f"/{DIGESTS}"):
            for name in names:
                self.remote.put(files[name], name)
            if group([Path(names[-1]).name]):
                logger.info("copied to %s/%s", self.remote.url, names[-1])
        elif self.remote.put_state([(files[name], name) for name in names]):
            logger.info("copied to %s/%s", self.remote.url, names[-1].rpartition("/")[0])
        else:  # a newer one has taken its place meanwhile
            self.wake()

    def _delete_gone(self, files: dict[str, Path], states: list[list[str]]) -> None:
        """Deletes there the states that were deleted here: those that this object copied, and at first those
        between intervals that an earlier process left."""
        copied, newest = self._copied or {}, max((_step(names[-1]) for names in states), default=-1)
        gone = {_step(name) for name in copied if STATE.fullmatch(name) and name not in files}
        here = {_step(name) for name in files if STATE.fullmatch(name)}
        if not self._looked:
            for step in self.remote.states():
                content = self.remote.read_json(f"{CHECKPOINTS}step_{step}/{CONTENT}") or {}
                if step < newest and step not in here and content.get("labels") == []:
                    gone.add(step)
            self._looked = True
        for step in gone - here:
            if step < newest:
                self.remote.delete_state(step)
                self._copied = {
                    n: s for n, s in copied.items() if not (STATE.fullmatch(n) and _step(n) == step)
                }
                copied = self._copied

    def _delete_before(self, failed: dict[str, Exception]) -> None:
        """Deletes the checkpoints before the newest that is complete here and there."""
        copied = self._copied or {}
        for label in reversed(list(self.written or ())):
            name = f"{CHECKPOINTS}epoch_{label}.pt"
            if name in copied and name not in failed and copied[name] == signature(self.folder / name):
                delete_before(self.folder, self.written or [], label, self.remote, self.keep_every)
                return

    def _files(self) -> dict[str, Path]:
        """{path relative to the folder: path}, without temporary files and symbolic links."""
        files = {}
        for parent, _, names in os.walk(self.folder):
            for name in sorted(names):
                path = Path(parent, name)
                relative = path.relative_to(self.folder)
                unfinished = any(part.endswith(TEMPORARY) for part in relative.parts) or name.startswith(".")
                # what was abandoned here was moved there too
                unfinished |= name == LEAVING or relative.as_posix().startswith(CHECKPOINTS + ABANDONED)
                if not unfinished and path.is_file() and not path.is_symlink():
                    files[path.relative_to(self.folder).as_posix()] = path
        return files

    def _compare(self, files: dict[str, Path]) -> dict[str, tuple | None]:
        """The files that are there already, as their content says: states by their digests.json, files of weights
        by the digests in them, small others byte by byte; the rest is copied again."""
        there, copied = self.remote.sizes(), {}
        for name, path in files.items():
            now = signature(path)
            if now is None or there.get(name) != now[0]:
                continue
            if match := STATE.fullmatch(name):
                if match[2] != DIGESTS:  # as its digests.json
                    copied[name] = now
                    continue
                same = self.remote.read(name) == path.read_bytes()
            elif group([path.name]):
                same = (digest := read_digest(path)) is not None and digest == digest_in(
                    self.remote.read(name, last=LENGTH)
                )
            else:
                same = now[0] <= COMPARED_BYTES and self.remote.read(name) == path.read_bytes()
            if same:
                copied[name] = now
        return copied


def _step(name: str) -> int:
    match = STATE.fullmatch(name)
    assert match
    return int(match[1])


def _states(files: dict[str, Path]) -> list[list[str]]:
    """Names of each complete state's files, digests.json last; the newest state first."""
    found: dict[int, list[str]] = {}
    for name in files:
        if STATE.fullmatch(name):
            found.setdefault(_step(name), []).append(name)
    ordered = (
        sorted(found[step], key=lambda name: name.endswith(f"/{DIGESTS}")) for step in sorted(found)[::-1]
    )
    return [names for names in ordered if names[-1].endswith(f"/{DIGESTS}")]


def _weights(files: dict[str, Path]) -> list[list[str]]:
    """Names of each label's files, epoch_N.pt last; the newest first."""
    labels = group(name.removeprefix(CHECKPOINTS) for name in files if name.startswith(CHECKPOINTS))
    sets = [[CHECKPOINTS + name for name in names] for names in labels.values()]
    complete = [names for names in sets if names[-1].startswith(CHECKPOINTS + "epoch_")]
    return sorted(complete, key=lambda names: (signature(files[names[-1]]) or (0, 0))[1], reverse=True)


def delete_before(
    folder: Path,
    written: list[str],
    label: str,
    remote: RemoteFolder | None = None,
    keep_every: int | None = None,
) -> None:
    """Deletes the checkpoints that stand before `label` in `written`, whole and epoch_N.pt first, and forgets them;
    every `keep_every`-th is only forgotten."""
    for old in written[: written.index(label)]:
        if keep_every and int(old) % keep_every == 0:
            written.remove(old)
            continue
        if remote is not None:
            remote.delete_checkpoint(old)
        try:
            delete(folder / CHECKPOINTS, old)
        except OSError as error:
            logger.warning("checkpoint %s could not be deleted: %s", old, error)
        written.remove(old)
        logger.info("deleted the checkpoint before epoch_%s.pt: epoch_%s.pt", label, old)
