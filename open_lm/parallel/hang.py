"""Which rank hangs, and where: what ranks tell each other when one of them has made no progress for too long."""

import faulthandler
import json
import logging
import os
import re
import sys
import threading
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch

from open_lm.config.redact import redact
from open_lm.parallel.store import BoundedStore

logger = logging.getLogger("open_lm")

ANSWER_SECONDS = 10.0  # that ranks have to say where they are
# In the order in which a step goes through them; "compiling" is the first step, before its end
PHASES = ("starting", "waiting for data", "agreeing", "compiling", "forward", "backward", "summing", "updating",
          "saving", "evaluating")  # fmt: skip
COLLECTIVE = re.compile(
    r"torch/distributed/|torch/nn/parallel/|in (all_reduce|sum_over_ranks_|barrier|broadcast\w*|gather\w*)\b"
)


class State(NamedTuple):
    """What a rank does."""

    phase: str
    step: int
    since: float
    """time.monotonic() of its last progress."""


def report_hang(
    rank: int,
    world_size: int,
    state: State,
    main: threading.Thread,
    store: BoundedStore | None,
    folder: str | None,
    silent_holder: int | None = None,
) -> None:
    """Shows this rank's stacks; then the lowest rank that answers names the one that hangs and shows its stack.

    The rank that is furthest behind hangs: others wait for it in a collective. Of those that are equally far it
    is the one whose stack is not in a collective, and above all one that does not answer.
    """
    show_stacks(rank, state)
    frame = sys._current_frames().get(main.ident or 0)
    stack = redact("".join(traceback.format_stack(frame))) if frame else "(no stack)\n"
    seconds = time.monotonic() - state.since
    mine = {"phase": state.phase, "step": state.step, "seconds": seconds, "stack": stack}
    answers = {rank: mine}
    if store is not None:
        with suppress(Exception):
            store.set(f"hung/{rank}", json.dumps(mine))
            answers |= collect(store, world_size, rank)
    write_flight_recorder(rank, folder)
    if rank == min(answers):
        text = describe(answers, world_size, silent_holder)
        logger.error("%s", text)
        write_error(text)
        if not any(isinstance(handler, logging.StreamHandler) for handler in logger.handlers):
            os.write(2, (text + "\n").encode())
        if store is not None:
            with suppress(Exception):
                store.set("hang told", "1")
    elif store is not None:
        with suppress(Exception):  # so that the report is the last that is shown
            deadline = time.monotonic() + ANSWER_SECONDS
            while time.monotonic() < deadline and not store.check(["hang told"]):
                time.sleep(0.05)


def show_stacks(rank: int, state: State) -> None:
    with suppress(OSError, ValueError, AttributeError):
        os.write(2, f"[rank {rank}] in step {state.step}, {state.phase}; its stacks:\n".encode())
        faulthandler.dump_traceback(file=2, all_threads=True)


def collect(store: BoundedStore, world_size: int, rank: int) -> dict[int, dict]:
    """What the other ranks answer in ANSWER_SECONDS."""
    answers: dict[int, dict] = {}
    deadline = time.monotonic() + ANSWER_SECONDS
    missing = [other for other in range(world_size) if other != rank]
    while missing and time.monotonic() < deadline:
        for other in [other for other in missing if store.check([f"hung/{other}"])]:
            answers[other] = json.loads(store.get(f"hung/{other}"))
            missing.remove(other)
        time.sleep(0.05)
    return answers


def find_hanging(answers: dict[int, dict], world_size: int) -> list[int]:
    """The ranks that do not answer; else those furthest behind; of these, those outside of a collective, if any."""
    silent = [rank for rank in range(world_size) if rank not in answers]
    if silent:
        return silent

    def place(rank: int) -> tuple[int, int]:
        phase = answers[rank]["phase"]
        return answers[rank]["step"], PHASES.index(phase) if phase in PHASES else 0

    first = min(map(place, answers))
    behind = [rank for rank in sorted(answers) if place(rank) == first]
    alone = [rank for rank in behind if not COLLECTIVE.search(last_frames(answers[rank]["stack"]))]
    return alone or behind


def last_frames(stack: str, count: int = 8) -> str:
    """The innermost frames of a formatted stack."""
    return "".join(re.split(r"(?m)^(?=  File )", stack)[-count:])


def describe(answers: dict[int, dict], world_size: int, silent_holder: int | None = None) -> str:
    """The report, for people. `silent_holder`: the rank that holds the store by which ranks answer, if that is
    silent itself."""
    hanging = find_hanging(answers, world_size)
    lines = []
    if silent_holder is not None:
        hanging = []
        lines.append(
            f"rank {silent_holder} hangs: the store that it holds does not answer (it is frozen, or its machine "
            "is), so other ranks than this one cannot be asked"
        )
    for rank in hanging:
        if rank not in answers:
            lines.append(f"rank {rank} hangs: it does not answer (frozen, or its machine is)")
            continue
        where = answers[rank]
        lines.append(
            f"rank {rank} hangs: no progress for {where['seconds']:.0f} s (--hang-timeout) in step "
            f"{where['step']}, {where['phase']}; its stack:\n{where['stack'].rstrip()}"
        )
    others = {rank: each for rank, each in sorted(answers.items()) if rank not in hanging}
    if others:
        shown = [f"rank {r}: step {w['step']}, {w['phase']}" for r, w in list(others.items())[:8]]
        who = "the others wait" if silent_holder is None else "this one waits"
        lines.append(f"{who}: " + "; ".join(shown) + ("; …" if len(others) > 8 else ""))
    return "\n".join(lines)


def write_flight_recorder(rank: int, folder: str | None) -> None:
    """NCCL's last collectives, as torch's flight recorder holds them, as debug/collectives_rank_N.json."""
    record = getattr(getattr(torch._C, "_distributed_c10d", None), "_dump_nccl_trace_json", None)
    if record is None or folder is None or not torch.cuda.is_available():
        return
    with suppress(Exception):
        path = Path(folder, "debug", f"collectives_rank_{rank}.json")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(record(True, False))


def write_error(text: str) -> None:
    """Where torchrun looks for what it prints last."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        extra = {"py_callstack": text, "timestamp": str(int(time.time()))}
        with suppress(OSError), open(path, "w", encoding="utf-8") as file:
            json.dump({"message": {"message": text, "extraInfo": extra}}, file)
