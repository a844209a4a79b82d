"""What a run says of its result: info.json, bad.jsonl, and that the counts add up."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from open_lm import __version__
from open_lm.tokenize.inputs import Unit
from open_lm.tokenize.plan import Plan
from open_lm.tokenize.readers import name_place
from open_lm.tokenize.settings import TokenizeConfig
from open_lm.tokenize.vocabulary import TOKENIZER


@dataclass(frozen=True)
class Vocabulary:
    """Ids below `size`; the end of text, the padding, the numpy type that holds them."""

    size: int
    end_of_text: int
    end_of_text_token: str
    pad: int
    dtype: str


def count_sources(units: Sequence[Unit], results: Sequence[dict], sources: int) -> list[Counter]:
    """The units' counts, summed by source."""
    counts = [Counter() for _ in range(sources)]
    for unit, result in zip(units, results, strict=True):
        counts[unit.file.source].update(result["counts"])
    return counts


def name_bad(units: Sequence[Unit], results: Sequence[dict]) -> Iterator[dict]:
    """{"place": file:member:line, "problem": text} of every bad document, in the order of the inputs."""
    file, before = None, 0
    for unit, result in zip(units, results, strict=True):
        if unit.file != file:
            file, before = unit.file, 0
        for member, line, problem in result["bad"]:
            yield {"place": name_place(unit, member, line, before), "problem": problem}
        before += result["lines"]


def describe_part(
    part: str,
    config: TokenizeConfig,
    plan: Plan,
    vocabulary: Vocabulary,
    counts: Sequence[Counter],
    packed: Sequence[dict],
    dropped_tokens: int,
    manifest: Sequence[dict],
) -> dict:
    """info.json of a part. AssertionError: a token is neither in the shards nor counted as dropped."""
    tokens = sum(c[f"{part}_tokens"] for c in counts)
    in_shards = sum(line["tokens"] for line in manifest)
    padding = sum(result["padding"] for result in packed)
    assert tokens == in_shards - padding + dropped_tokens, (part, tokens, in_shards, padding, dropped_tokens)
    sources = [
        {
            "input": entry,
            "sampling_rate": rate,
            "documents": c[f"{part}_documents"],
            "bytes": c[f"{part}_bytes"],
            "tokens": c[f"{part}_tokens"],
            "documents_read": c["documents"],
            "bytes_read": c["bytes"],
            "documents_not_sampled": c["not_sampled"],
            "documents_empty": c["empty"],
            "documents_bad": c["bad"],
            "members_passed_over": c["passed"],
        }
        for entry, rate, c in zip(config.inputs, plan.split.rates, counts, strict=True)
    ]
    return {
        "part": part,
        "tokenizer": TOKENIZER,
        "vocab_size": vocabulary.size,
        "end_of_text": vocabulary.end_of_text,
        "end_of_text_token": vocabulary.end_of_text_token,
        "pad": vocabulary.pad if config.packing == "best-fit" else None,
        "packing": config.packing,
        "seq_len": config.seq_len,
        "sequences": sum(line["num_sequences"] for line in manifest),
        "documents": sum(source["documents"] for source in sources),
        "tokens": tokens,  # of the documents, an end of text for each among them
        "tokens_in_shards": in_shards,
        "tokens_of_padding": padding,
        "tokens_dropped": dropped_tokens,
        "sources": sources,
        "seed": config.seed,
        "open_lm": __version__,
    }


def to_lines(entries: Sequence[dict]) -> bytes:
    """JSON lines."""
    return "".join(json.dumps(entry) + "\n" for entry in entries).encode()
