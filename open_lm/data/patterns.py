"""Patterns that stand for many shards."""

import itertools
import os
import re
from collections.abc import Iterator

from open_lm.config.redact import HIDDEN, redact

COLONS = "; a shard whose own name holds `::` can be named by a manifest, and in a glob as `:[:]`"


def hint(pattern: str) -> str:
    """What to say of a file that is not there, where `::` may have been part of its name."""
    return f" (`::` joins several{COLONS})" if "::" in pattern else ""


def expand(pattern: str) -> list[str]:
    """Shard URLs of a pattern: `::` joins patterns; {00..09}, {0..9..3}, {a..c}, {x,y} expand as in bash.

    The name of a local file that is there is no pattern for its `::`. ValueError: what follows a URL looks like the
    rest of its name.
    """
    if "::" in pattern and os.path.exists(pattern.removeprefix("file://")):
        return [pattern]
    parts = [part for part in pattern.split("::") if part]
    for before, part in itertools.pairwise(parts):
        if "://" in before and not re.match(r"[.~]?/|\.\./|\w+://|pipe:", part):
            shown = HIDDEN if "pipe:" in pattern else part  # a command's rest may be secret
            raise ValueError(
                f"{redact(pattern)}: `::` joins shards, and {shown!r} is no URL as the one before it: write "
                f"./{shown} for a local file{COLONS}"
            )
    return [url for part in parts for url in expand_braces(part)]


def expand_braces(text: str) -> Iterator[str]:
    for opening, closing in find_braces(text):
        options = list(split_options(text[opening + 1 : closing]))
        if options:
            for option, rest in itertools.product(options, list(expand_braces(text[closing + 1 :]))):
                yield text[:opening] + option + rest
            return
    yield text


def find_braces(text: str) -> Iterator[tuple[int, int]]:
    """Positions of each `{` and the `}` that closes it."""
    for opening in (i for i, letter in enumerate(text) if letter == "{"):
        depth = 0
        for i in range(opening, len(text)):
            depth += (text[i] == "{") - (text[i] == "}")
            if depth == 0:
                yield opening, i
                break


def split_options(inside: str) -> Iterator[str]:
    """What may stand for a pair of braces; nothing if they are no pattern."""
    if match := re.fullmatch(r"(-?\d+)\.\.(-?\d+)(?:\.\.(-?\d+))?", inside):
        first, last = int(match[1]), int(match[2])
        step = abs(int(match[3] or 1)) or 1
        padded = any(re.match(r"-?0\d", text) for text in match.groups()[:2])
        width = max(len(match[1]), len(match[2])) if padded else 0
        sign = 1 if last >= first else -1
        yield from (f"{n:0{width}d}" for n in range(first, last + sign, sign * step))
    elif match := re.fullmatch(r"([a-zA-Z])\.\.([a-zA-Z])", inside):
        first, last = ord(match[1]), ord(match[2])
        sign = 1 if last >= first else -1
        yield from (chr(n) for n in range(first, last + sign, sign))
    elif len(parts := split_commas(inside)) > 1:
        for part in parts:
            yield from expand_braces(part)


def split_commas(text: str) -> list[str]:
    """Splits at the commas that are in no inner braces."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter == "{") - (letter == "}")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts
