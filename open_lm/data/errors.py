"""Errors of data that end a run in its middle: shown as one line; where they were raised is in the text log."""

import traceback
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


class DataError(ValueError):
    """What the data are, or are not: the message names the shard and the sample, and says what to do."""

    written_to = ""
    """The file that holds the traceback."""


def of_data(batches: Iterable[T]) -> Iterator[T]:
    """The batches. What reading them raises of files, servers and samples becomes a DataError, which keeps its
    cause: it may be an error of the program after all."""
    try:
        yield from batches
    except (ValueError, OSError, ImportError) as error:
        raise DataError(str(error) or type(error).__name__) from error


def keep_traceback(error: Exception) -> Exception:
    """The error, with a note of where it was raised: it leaves its process, or its place, without its traceback."""
    error.add_note("first raised so:\n" + "".join(traceback.format_exception(error)).rstrip())
    return error
