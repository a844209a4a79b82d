"""Short names of the --val-data entries, to tell their metrics apart."""

import re
from collections.abc import Sequence

from open_lm.config.redact import redact
from open_lm.data.remote import PIPE


def name_entries(entries: Sequence[str]) -> list[str]:
    """A unique name for each of several entries: the part of their paths that differs.

    …/books/manifest.jsonl and …/code/manifest.jsonl are `books` and `code`.
    """
    parts = [[part for part in path_of(entry).split("/") if part] or [""] for entry in entries]
    for end in (0, -1):
        while all(len(p) > 1 for p in parts) and len({p[end] for p in parts}) == 1:
            for p in parts:
                p.pop(end)
    first = [clean(p[0]) for p in parts]
    names = first if len(set(first)) == len(first) else [clean("-".join(p)) for p in parts]
    return names if len(set(names)) == len(names) else [f"{name}-{i}" for i, name in enumerate(names)]


def path_of(entry: str) -> str:
    """The entry without its scheme and what is secret in it; of a `pipe:` command the last word that is the path of
    a tar or manifest, else nothing."""
    if entry.startswith(PIPE):
        words = re.findall(r"(?<=[\s'\"])[^\s'\"]+\.(?:tar|jsonl)(?=[\s'\"?|;&<>)]|$)", entry)
        entry = words[-1] if words else ""
    return re.sub(r"^\w+://", "", redact(entry))


def clean(text: str) -> str:
    """The text without file endings, and `-` for what a metric's name should not hold."""
    text = re.sub(r"\.(tar|jsonl)$", "", text)
    return re.sub(r"[^\w.-]+", "-", text).strip("-.") or "entry"
