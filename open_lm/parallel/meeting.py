"""How the ranks of one attempt find one another, and nobody of an earlier attempt."""

import os
import time
from datetime import timedelta
from uuid import uuid4

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from open_lm.parallel.launch import Ranks

JOIN_SECONDS = 600  # the longest that the first rank to come waits for the last
FIRST_PAUSE, LONGEST_PAUSE = 0.01, 0.5  # seconds between looks into the store


def meet(ranks: Ranks) -> tuple[dist.Store, int]:
    """(the store of this attempt's ranks, the attempt's number from 1), once all of them are there.

    Raises ConnectionError after JOIN_SECONDS.
    """
    deadline = time.monotonic() + JOIN_SECONDS
    try:
        patience = timedelta(seconds=JOIN_SECONDS)
        store, _, _ = next(rendezvous(ranks.url, ranks.rank, ranks.world_size, timeout=patience))
        attempt = (
            _gather(store, ranks.world_size, deadline) if ranks.rank == 0 else _come(store, ranks, deadline)
        )
    except (RuntimeError, ValueError) as error:
        where = ranks.url
        if where.startswith("env://"):
            address, port = (os.environ.get(name, "(not set)") for name in ("MASTER_ADDR", "MASTER_PORT"))
            where = f"MASTER_ADDR={address} MASTER_PORT={port}"
        raise ConnectionError(
            f"the {ranks.world_size} ranks did not meet at {where}: is that the address of rank 0's host, is the "
            f"port free, was every rank started? ({(str(error) or type(error).__name__).splitlines()[0]})"
        ) from error
    # gloo's and NCCL's addresses, too, must not be those of an earlier attempt
    return dist.PrefixStore(f"open_lm/attempt {attempt}", store), attempt


# torchrun's store outlives an attempt, and its count of restarts differs between nodes: one that it starts again
# only because another node's ranks died does not count. So rank 0 numbers the attempts, in the store, and offers
# its number to every rank that has come, by a name that the rank has drawn: nobody answers earlier attempts.


def _gather(store: dist.Store, world_size: int, deadline: float) -> int:
    """By rank 0: the number of this attempt, when every other rank has taken it."""
    attempt = store.add("open_lm/attempts", 1)
    missing, offered, pause = set(range(1, world_size)), {}, FIRST_PAUSE
    while missing:
        for rank in sorted(missing):
            if not store.check([f"open_lm/came/{rank}"]):
                continue
            name = store.get(f"open_lm/came/{rank}").decode()
            if offered.get(rank) != name:
                store.set(f"open_lm/offer/{name}", str(attempt))
                offered[rank] = name
            if store.check([f"open_lm/taken/{attempt}/{rank}"]):
                missing.remove(rank)
        if missing:
            some = ", ".join(map(str, sorted(missing)[:8]))
            pause = _wait(pause, deadline, f"{len(missing)} have not come: {some}")
    store.set(f"open_lm/complete/{attempt}", "1")
    return attempt


def _come(store: dist.Store, ranks: Ranks, deadline: float) -> int:
    """By another rank: the attempt's number, when all have taken it."""
    name, pause = uuid4().hex, FIRST_PAUSE
    store.set(f"open_lm/came/{ranks.rank}", name)
    while True:
        if store.check([f"open_lm/offer/{name}"]):
            attempt = int(store.get(f"open_lm/offer/{name}"))
            store.set(f"open_lm/taken/{attempt}/{ranks.rank}", "1")
            if store.check([f"open_lm/complete/{attempt}"]):
                return attempt
        pause = _wait(pause, deadline, "rank 0 has not gathered all")


def _wait(pause: float, deadline: float, what: str) -> float:
    """Sleeps; the next pause. RuntimeError after the deadline."""
    if time.monotonic() > deadline:
        raise RuntimeError(f"{what}, in {JOIN_SECONDS} s")
    time.sleep(pause)
    return min(2 * pause, LONGEST_PAUSE)
