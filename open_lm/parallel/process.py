"""This process as others see it: its arguments in `ps`, its last words in torchrun's report."""

import ctypes
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from torch.distributed.elastic.multiprocessing.errors import ErrorHandler

from open_lm.config.redact import redact


class Recorder(ErrorHandler):
    """torch's, which keeps the exception that ended a rank for torchrun's report; without secrets.

    `show` makes the text of it that the report holds.
    """

    def __init__(self, show: Callable[[BaseException], str]) -> None:
        self.show = show

    def record_exception(self, e: BaseException) -> None:
        path = self._get_error_file_path()
        if path is None:
            return
        extra = {"py_callstack": self.show(e), "timestamp": str(int(time.time()))}
        message = redact(f"{type(e).__name__}: {e}")
        with suppress(OSError), open(path, "w", encoding="utf-8") as file:
            json.dump({"message": {"message": message, "extraInfo": extra}}, file)


def hide_arguments(arguments: Sequence[str]) -> None:
    """Overwrites secrets in the command line that `ps` shows, on Linux. The launcher's own (torchrun's) still shows
    them: keys belong into the environment or ~/.aws."""
    if not sys.platform.startswith("linux") or all(redact(text) == text for text in arguments):
        return
    with suppress(OSError, ValueError, IndexError):
        with open("/proc/self/stat", encoding="utf-8") as file:
            numbers = file.read().rpartition(")")[2].split()
        start, end = int(numbers[45]), int(numbers[46])  # arg_start, arg_end
        with open("/proc/self/cmdline", "rb") as file:
            shown = file.read()
        if not 0 < len(shown) <= end - start:
            return
        hidden = b"\0".join(_same_length(part) for part in shown.split(b"\0"))
        ctypes.memmove(start, hidden, len(hidden))


def _same_length(argument: bytes) -> bytes:
    """The argument redacted, in as many bytes."""
    text = os.fsdecode(argument)
    clean = redact(text)
    if clean == text:
        return argument
    return os.fsencode(clean).ljust(len(argument))[: len(argument)]
