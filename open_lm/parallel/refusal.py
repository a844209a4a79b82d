"""What is refused before any work: one message, exit status 2, on all ranks."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from open_lm.config.redact import redact
from open_lm.parallel import mesh
from open_lm.parallel.gather import gather_objects
from open_lm.parallel.launch import claimed_rank

T = TypeVar("T")


@contextmanager
def refusing(every_rank: bool = False) -> Iterator[None]:
    """Turns an error in flags or files, met before any work, into one message and exit status 2.

    All ranks meet the same error and rank 0 shows it, or, with `every_rank`, each shows its own.
    """
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        rank = claimed_rank()
        if rank == 0 or every_rank:
            where = f"[rank {rank}] " if rank else ""
            print(f"open_lm.main: error: {where}{redact(str(error))}", file=sys.stderr, flush=True)
        raise SystemExit(2) from error


def agree(prepare: Callable[[], T]) -> T:
    """`prepare()` on every rank; if it fails on any, all end with status 2 and rank 0 prints the first error.

    A file may be missing on one host alone; the other ranks must not wait for that rank.
    """
    result, error = None, None
    try:
        result = prepare()
    except (ValueError, OSError, ImportError) as caught:
        error = caught
    errors = gather_objects(None if error is None else str(error))
    first = next((rank for rank, message in enumerate(errors) if message is not None), None)
    if first is not None:
        if mesh.this_rank() == 0:
            where = f"[rank {first}] " if first else ""
            print(f"open_lm.main: error: {where}{redact(str(errors[first]))}", file=sys.stderr, flush=True)
        raise SystemExit(2) from ValueError(errors[first])
    return result  # pyright: ignore[reportReturnType]
