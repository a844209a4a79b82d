"""Errors of data that end a run in its middle: shown as one line, as a traceback would say nothing of them."""

from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


class DataError(ValueError):
    """What the data are, or are not: the message names the shard and the sample, and says what to do."""


def of_data(batches: Iterable[T]) -> Iterator[T]:
    """The batches. What reading them raises of files, servers and samples becomes a DataError; anything else, an
    error of the program, stays what it is."""
    try:
        yield from batches
    except (ValueError, OSError, ImportError) as error:
        raise DataError(str(error)) from error
