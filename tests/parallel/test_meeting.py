"""Ranks of one attempt find one another in a store that keeps what earlier attempts have left."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from open_lm.parallel import meeting
from open_lm.parallel.launch import Ranks


@pytest.fixture
def store():
    return dist.HashStore()


def soon(seconds=10.0):
    return time.monotonic() + seconds


def meet(store, world_size=3, order=(0, 1, 2), apart=0.0):
    """The attempt's number by each rank, started in this order."""
    with ThreadPoolExecutor(world_size) as pool:
        found = {}
        for rank in order:
            ranks = Ranks(rank=rank, local_rank=0, world_size=world_size)
            come = (
                (lambda: meeting._gather(store, world_size, soon()))
                if rank == 0
                else (lambda ranks=ranks: meeting._come(store, ranks, soon()))
            )
            found[rank] = pool.submit(come)
            time.sleep(apart)
        return [found[rank].result(timeout=20) for rank in range(world_size)]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_every_attempt_has_a_number_of_its_own(store, order):
    """Whoever comes first, and although nobody is told how often torchrun has started the others."""
    for attempt in (1, 2, 3):
        assert meet(store, order=order, apart=0.05) == [attempt] * 3


def test_who_died_while_waiting_is_not_counted(store):
    """Rank 1 came and died, rank 0 gave up: the next rank 0 meets the next rank 1, not what the first one left."""
    dead = Ranks(rank=1, local_rank=0, world_size=2)
    with pytest.raises(RuntimeError, match="rank 0 has not gathered all"):
        meeting._come(store, dead, soon(0.1))
    with pytest.raises(RuntimeError, match="1 have not come: 1"):
        meeting._gather(store, 2, soon(0.1))
    found = []
    first = threading.Thread(target=lambda: found.append(meeting._gather(store, 2, soon())))
    first.start()
    time.sleep(0.2)
    assert first.is_alive(), "an old rank 1 must not do"
    assert meeting._come(store, Ranks(rank=1, local_rank=0, world_size=2), soon()) == 2
    first.join(10)
    assert found == [2]


def test_a_rank_that_waits_is_met_by_the_next_rank_0(store):
    """Rank 0 dies after it has offered its number, before all were there."""
    with ThreadPoolExecutor(1) as pool:
        waits = pool.submit(meeting._come, store, Ranks(rank=1, local_rank=0, world_size=3), soon())
        with pytest.raises(RuntimeError, match="1 have not come: 2"):
            meeting._gather(store, 3, soon(0.3))
        with ThreadPoolExecutor(2) as others:
            second = others.submit(meeting._come, store, Ranks(rank=2, local_rank=0, world_size=3), soon())
            zeroth = others.submit(meeting._gather, store, 3, soon())
            assert [f.result(timeout=20) for f in (zeroth, waits, second)] == [2, 2, 2]
