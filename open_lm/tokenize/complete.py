"""Whether an output that has a manifest has everything else, as far as names and sizes tell."""

import hashlib
import json
from collections.abc import Iterator, Sequence

from open_lm.tokenize.folder import Folder
from open_lm.tokenize.plan import Plan
from open_lm.tokenize.vocabulary import TOKENIZER

MANIFEST = "manifest.jsonl"
INFO = "info.json"
BAD = "bad.jsonl"
HELD_OUT = "held_out"


def folder_of(part: str) -> str:
    """Where a part's files are, below the output."""
    return f"{HELD_OUT}/" if part == "held_out" else ""


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def find_damages(output: Folder, plan: Plan, parts: Sequence[str]) -> list[str]:
    """What is missing or has another size than its manifest says, one text each. Shards are not read."""
    sizes = output.sizes()
    return [damage for part in parts for damage in find_damages_of(output, plan, folder_of(part), sizes)]


def find_damages_of(output: Folder, plan: Plan, folder: str, sizes: dict[str, int]) -> Iterator[str]:
    missing = {folder + name for name in (MANIFEST, INFO, TOKENIZER)} - sizes.keys()
    yield from (f"{name} is missing" for name in sorted(missing))
    given = plan.record["tokenizer_sha256"]
    if given and folder + TOKENIZER not in missing and digest(output.read(folder + TOKENIZER)) != given:
        yield f"{folder}{TOKENIZER} is not the one of the plan"
    try:
        information = {} if folder + INFO in missing else json.loads(output.read(folder + INFO))
        content = b"" if folder + MANIFEST in missing else output.read(folder + MANIFEST)
        lines = [json.loads(line) for line in content.splitlines()]
        shards = [(f"{folder}{line['shard']}.tar", line["bytes"], line["num_sequences"]) for line in lines]
        if information and content and sum(shard[2] for shard in shards) != information["sequences"]:
            yield f"{folder}{MANIFEST} and {folder}{INFO} count different sequences"
        bad = sum(source["documents_bad"] for source in information.get("sources", ()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        yield f"{folder}{MANIFEST} or {folder}{INFO} is damaged ({type(error).__name__}: {error})"
        return
    for name, size, _ in shards:
        if name not in sizes:
            yield f"{name} is missing"
        elif sizes[name] != size:
            yield f"{name} has {sizes[name]:,} bytes, its manifest says {size:,}"
    if bad and not folder and BAD not in sizes:
        yield f"{BAD} is missing"
