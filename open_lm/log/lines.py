"""log.jsonl read back: its lines, and which of them still count after a run was resumed."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Line = dict[str, Any]


def read_lines(path: Path) -> list[Line]:
    """JSON objects of a .jsonl, [] where there is none. Raises ValueError on a line that is not JSON.

    A line that was cut off because its run died is left out: the last one, or the last before a new start.
    """
    lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
    read = []
    for number, line in enumerate(lines, 1):
        try:
            read += [json.loads(line)] if line.strip() else []
        except ValueError as error:
            if number < len(lines) and not lines[number].startswith(('{"run":', '{"resumed":')):
                raise ValueError(f"{path}:{number} is not JSON: {error}") from error
    return read


def supersede(lines: Sequence[Line]) -> tuple[list[Line], list[Line]]:
    """(lines that count, lines of steps that a resumed run did again), each in order.

    `{"resumed": N}` says that the run went on after step N, so what came before of later steps is superseded.
    """
    current: list[Line] = []
    superseded: list[Line] = []
    for line in lines:
        if "resumed" in line:
            superseded += [x for x in current if x.get("step", 0) > line["resumed"]]
            current = [x for x in current if x.get("step", 0) <= line["resumed"]]
        current.append(line)
    return current, superseded
