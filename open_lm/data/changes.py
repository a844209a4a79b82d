"""What a checkpoint's data and those of the run that resumes it have in common: the same, grown, or others."""

import hashlib
import posixpath
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from open_lm.config.redact import redact
from open_lm.data.manifest import Source
from open_lm.data.order import Change, Mix, upsample_weights

MARKS = 256  # per source: where two listings part is known to 1/256 of the shards
FLAGS = {
    "global_batch": "--global-batch-size",
    "weights": "--train-data-mix-weights",
    "factors": "--train-data-upsampling-factors",
    "seed": "--seed",
    "shuffle": "not --disable-buffer",
    "resampled": "--dataset-resampled",
    "synthetic": "--dataset-type synthetic",
}
MOVES_ON = {"global_batch", "weights", "factors", "seed"}
"""What may change while every source goes on where it was."""


def describe_source(source: Source) -> dict[str, Any]:
    """What a checkpoint keeps of a source, as plain JSON; `marks` are the first 8 hex digits of the sha256 of the
    listing up to every ceil(shards / MARKS)-th shard."""
    first, last = (posixpath.basename(redact(source.shards[i].url)) for i in (0, -1))
    return {
        "sha256": source.sha256,
        "sequences": source.sequences,
        "shards": len(source.shards),
        "first": first,
        "last": last,
        "marks": "".join(marks(source.listing, -(-len(source.shards) // MARKS))),
    }


def lines_of(listing: bytes) -> list[bytes]:
    return [line for line in listing.split(b"\n") if line.strip()]


def marks(listing: bytes, stride: int) -> list[str]:
    digest, found = hashlib.sha256(), []
    for number, line in enumerate(lines_of(listing), start=1):
        digest.update(line.strip() + b"\n")
        if number % stride == 0:
            found.append(digest.hexdigest()[:8])
    return found


def grown_from(saved: dict[str, Any], source: Source) -> int | None:
    """How many of the source's shards make the listing that `saved` describes; None if it does not begin so."""
    sequences, end = 0, 0
    lines = source.listing.split(b"\n")
    shards = iter(source.shards)
    count = 0
    for line in lines:
        end += len(line)
        if line.strip():
            sequences += next(shards).num_sequences
            count += 1
            if sequences == saved["sequences"] and count == saved.get("shards", count):
                for old in (
                    source.listing[:end],
                    source.listing[:end] + b"\n",
                ):  # the last newline is optional
                    if hashlib.sha256(old).hexdigest() == saved["sha256"]:
                        return count
        end += 1
    return None


def differ(saved: dict[str, Any], source: Source) -> str:
    """How a source differs from what `saved` says, for people."""
    here = describe_source(source)
    text = f"{saved['sequences']:,} sequences"
    if "shards" in saved:
        text = f"{saved['shards']:,} shards ({redact(saved['first'])} … {redact(saved['last'])}), {text}"
    names = f"{here['first']} … {here['last']}"
    text += f" there, {here['shards']:,} shards ({names}), {here['sequences']:,} sequences here"
    if grown_from(saved, source) is not None:
        return f"{text}; it has grown at its end: --append-data takes that in"
    if "marks" not in saved:
        return f"{text}; sha256 {saved['sha256'][:12]}… there, {here['sha256'][:12]}… here"
    stride = -(-saved["shards"] // MARKS)
    there = [saved["marks"][i : i + 8] for i in range(0, len(saved["marks"]), 8)]
    mine = marks(source.listing, stride)
    same = next(
        (i for i, (x, y) in enumerate(zip(there, mine, strict=False)) if x != y), min(len(there), len(mine))
    )
    first, last = same * stride, min((same + 1) * stride, here["shards"]) - 1
    if first >= here["shards"]:
        return f"{text}; shards are missing at the end"
    names = [posixpath.basename(redact(source.shards[i].url)) for i in (first, last)]
    where = (
        f"number {first} ({names[0]})" if first == last else f"of {first} … {last} ({names[0]} … {names[1]})"
    )
    return f"{text}; the first shard that differs is {where}"


def counts_of(saved: dict[str, Any], step: int) -> list[int]:
    """Sequences that each source had given at a step of the run whose fingerprint is `saved`."""
    sequences = [source["sequences"] for source in saved["sources"]]
    weights = [Fraction(weight) for weight in saved["weights"]]
    if factors := saved.get("factors"):
        weights = upsample_weights(factors, sequences)
    mix = Mix(weights, saved["global_batch"], saved["seed"])
    history = read_history(saved)
    start, given = (history[-1].step, history[-1].counts) if history else (0, [0] * len(sequences))
    return [n + now - then for n, now, then in zip(given, mix.counts(step), mix.counts(start), strict=True)]


def read_history(saved: dict[str, Any]) -> list[Change]:
    """The changes that a checkpoint has recorded."""
    return [
        Change(change["step"], tuple(change["counts"]), tuple(change["shards"]))
        for change in saved.get("history", [])
    ]


def changes_since(
    saved: dict[str, Any], here: dict[str, Any], sources: Sequence[Source], step: int, append: bool
) -> tuple[list[str], list[Change]]:
    """What differs between a checkpoint's fingerprint and this run's, and the history of a run that goes on at
    `step`. With `append`, a source that has grown at its end is no difference."""
    history = read_history(saved)
    same = saved.get("factors") == here.get("factors")
    keys = sorted((saved.keys() | here.keys()) - {"sources", "history"})
    changed = [key for key in keys if saved.get(key) != here.get(key)]
    if same and here.get("factors"):  # then weights follow the sources' sizes
        changed = [key for key in changed if key != "weights"]
    texts = [f"{FLAGS.get(key, key)}: {saved.get(key)!r} there, {here.get(key)!r} here" for key in changed]
    there = saved["sources"]
    if len(there) != len(sources):
        return [f"{len(there)} sources there, {len(sources)} here", *texts], []
    before: list[int] = []
    goes_on = set(changed) <= MOVES_ON | {"masks"}
    for number, (old, source) in enumerate(zip(there, sources, strict=True)):
        count = len(source.shards) if old["sha256"] == source.sha256 else grown_from(old, source)
        grown = count is not None and count < len(source.shards)
        if count is None or (grown and not append):
            texts.insert(0, f"source {number} ({redact(source.name)}): {differ(old, source)}")
        if count is None:
            goes_on = False
        else:
            before.append(count)
    if not goes_on or saved.get("synthetic"):
        return texts, history if not texts else []
    if MOVES_ON & set(changed) or before != [len(source.shards) for source in sources]:
        history.append(Change(step, tuple(counts_of(saved, step)), tuple(before)))
    return texts, history
