"""What is to be done, written down before work starts: a run with another plan cannot go on in its folders."""

import hashlib
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from open_lm.data.remote import is_local
from open_lm.tokenize.folder import PARTIAL, Folder
from open_lm.tokenize.inputs import File, Unit, divide, list_files
from open_lm.tokenize.lock import OWNER
from open_lm.tokenize.settings import DECISIVE, TokenizeConfig, check
from open_lm.tokenize.split import Split
from open_lm.tokenize.vocabulary import count_ids, find_end_of_text, find_token, load_tokenizer, parse

FORMAT = 2  # raise when the same plan gives other bytes
PLAN = "plan.json"
EXPANSION = 4  # text in a byte of compressed input, roughly: for the number of buckets only
SHOWN = 10  # differences
FILE = re.compile(r"inputs\[\d+\]\.files\[\d+\]")  # url, bytes, version


@dataclass(frozen=True)
class Plan:
    """Everything that was found out at the door. `record` is plan.json: what decides the output's bytes."""

    files: tuple[File, ...]
    units: tuple[Unit, ...]
    split: Split
    tokenizer: bytes | None  # None: to be trained
    record: dict[str, Any]
    passed: tuple[str, ...]
    """Files in --inputs' folders that are none by their names."""

    @property
    def mark(self) -> str:
        """In the names of tasks, so that a late worker of another plan never writes what this one reads."""
        return hashlib.sha256(json.dumps(self.record, sort_keys=True).encode()).hexdigest()[:8]


def make_plan(config: TokenizeConfig) -> Plan:
    """Lists inputs and checks what can be checked before work. ValueError, FileNotFoundError, OSError."""
    check(config)
    tokenizer = None
    if config.tokenizer is not None:
        tokenizer = load_tokenizer(config.tokenizer, config.patience)
        parsed = parse(tokenizer, config.tokenizer)
        find_end_of_text(parsed, config.end_of_text)
        if config.pad_token is not None:
            find_token(parsed, config.pad_token, "--pad-token")
        count_ids(parsed)
    passed: list[str] = []
    ours = [config.output] if config.work is None else [config.output, config.work]
    files = [
        file
        for source, entry in enumerate(config.inputs)
        for file in list_files(entry, source, config.patience, ours, passed)
    ]
    unit_bytes = int(config.unit_megabytes * 1e6)
    units = [unit for file in files for unit in divide(file, unit_bytes, config.patience)]
    rates = config.sampling_rates or (1.0,) * len(config.inputs)
    sampled = sum(file.bytes * rates[file.source] * expansion(file.url) for file in files)
    buckets = max(1, math.ceil(sampled / (config.bucket_megabytes * 1e6)))
    held_out = math.ceil(buckets * config.held_out_share)
    split = Split(rates, config.held_out_share, config.seed, (buckets, held_out))
    record = {
        "format": FORMAT,
        **{name: getattr(config, name) for name in DECISIVE},
        "tokenizer_sha256": hashlib.sha256(tokenizer).hexdigest() if tokenizer is not None else None,
        "sampling_rates": list(rates),
        "inputs": [
            {"entry": entry, "files": [[f.url, f.bytes, f.version] for f in files if f.source == source]}
            for source, entry in enumerate(config.inputs)
        ],
    }
    return Plan(tuple(files), tuple(units), split, tokenizer, json.loads(json.dumps(record)), tuple(passed))


def expansion(url: str) -> int:
    return EXPANSION if url.endswith((".gz", ".zst", ".parquet")) else 1


def claim(folder: Folder, plan: Plan, flag: str) -> None:
    """Makes the folder this plan's. ValueError: it holds something else, or another plan, with the differences."""
    names = {name for name in folder.names() if not name.endswith(PARTIAL)} - {OWNER}
    if PLAN in names:
        there = json.loads(folder.read(PLAN))
        found = list(find_differences(there, plan.record))
        if found:
            more = f"\n  and {len(found) - SHOWN:,} more" if len(found) > SHOWN else ""
            raise ValueError(
                f"{flag} {folder.url} holds a run with another plan; name another folder, or remove it:\n  "
                + "\n  ".join(found[:SHOWN])
                + more
            )
        return
    if names:
        raise ValueError(f"{flag} {folder.url} holds other files (e.g. {min(names)}); name an empty folder")
    folder.make()
    folder.write(PLAN, (json.dumps(plan.record, indent=1) + "\n").encode())


def is_claimed(folder: Folder, plan: Plan) -> bool:
    """Whether the folder is this plan's already."""
    try:
        return json.loads(folder.read(PLAN)) == plan.record
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return False


def find_differences(there: Any, here: Any, place: str = "") -> Iterator[str]:
    """`place: X there, Y now`, for every leaf that differs."""
    if isinstance(there, dict) and isinstance(here, dict):
        for key in dict.fromkeys([*there, *here]):
            yield from find_differences(there.get(key), here.get(key), f"{place}.{key}" if place else key)
    elif FILE.fullmatch(place) and there[:2] == here[:2] and there != here:
        what = "modification time" if is_local(here[0]) else "version (its ETag, or its modification time)"
        yield f"{here[0]}: its {what} changed, from {there[2]} to {here[2]}"
    elif isinstance(there, list) and isinstance(here, list) and len(there) == len(here):
        for i, (a, b) in enumerate(zip(there, here, strict=True)):
            yield from find_differences(a, b, f"{place}[{i}]")
    elif isinstance(there, list) and isinstance(here, list):
        yield f"{place}: {len(there):,} there, {len(here):,} now"
    elif there != here:
        yield f"{place}: {there!r} there, {here!r} now"
