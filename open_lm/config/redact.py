"""Secrets taken out of what is written: logs, checkpoints, params.txt, config.yaml, reports, `ps`."""

import contextlib
import functools
import json
import logging
import os
import re
import traceback
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

HIDDEN = "…"
# Whatever they hold is secret
NAMES = (
    r"(?:secret|passw|passphrase|(?<=_)pwd|credential|api[-_]?key|access[-_]?key|private[-_]?key|account[-_]?key|"
    r"connection[-_]?string)"
)
TOKEN = (
    r"(?:token(?!s|iz)|signature)"  # a number behind these is a count or an id ("token id: 50256"), no secret
)
FLAG = rf"(?<!\S)--?[\w-]*(?:{NAMES}|token(?!s|iz|-id))[\w-]*"
PATTERNS = [
    (re.compile(r"(\w+://)[^/\s'\"@:]+:(?!\d+/)[^\s'\"@]*/[^\s'\"@]*@"), r"\1"),  # a password with a slash
    (re.compile(r"(\w+://)[^/\s'\"]+@"), r"\1"),
    (re.compile(r"(?<![\w:])(//)[^/\s'\"@:]+:[^/\s'\"]+@"), r"\1"),  # without a scheme
    (re.compile(r"(\w+://[^\s'\"?]+)\?[^\s'\")]+"), rf"\1?{HIDDEN}"),
    (re.compile(r"(?i)(authorization['\"]?\s*[:=]\s*['\"]?)(bearer|basic|aws4\S*)?\s*[^\s'\"]+"), rf"\1{HIDDEN}"),
    (re.compile(r"(?i)\b(bearer\s+)(?=\S*[\d._~+/=])[\w.~+/=-]{8,}"), rf"\1{HIDDEN}"),
    (re.compile(rf"(?i)([\w-]*{NAMES}[\w-]*['\"]?\s*[=:]\s*['\"]?)[^\s'\"&;]+"), rf"\1{HIDDEN}"),
    (re.compile(rf"(?i)([\w-]*{TOKEN}[\w-]*['\"]?\s*[=:]\s*['\"]?)(?![\d.,]+(?:\W|$))[^\s'\"&]+"), rf"\1{HIDDEN}"),
    (re.compile(rf"(?i)({FLAG}\s+['\"]?)(?!-)[^\s'\"]+"), rf"\1{HIDDEN}"),
    (re.compile(r"(?i)\b(sig=)[^\s'\"&;]+"), rf"\1{HIDDEN}"),
    (re.compile(r"\b(AKIA|ASIA)[0-9A-Z]{12,}"), HIDDEN),
    (re.compile(r"\b(hf_|gh[pousr]_|github_pat_|glpat-|sk-|xox[a-z]-)[A-Za-z0-9_-]{16,}"), HIDDEN),
    (re.compile(r"(?i)\b(hooks\.slack\.com/services/)[^\s'\"]+"), rf"\1{HIDDEN}"),
    (re.compile(r"\bAIza[A-Za-z0-9_-]{30,}"), HIDDEN),
]  # fmt: skip
STRONG_VARIABLE = re.compile(rf"(?i){NAMES}|(?:^|_)pass$")
# the word, not MAX_TOKENS, TOKENIZER or EOS_TOKEN_ID; not MONKEY
WEAK_VARIABLE = re.compile(
    r"(?i)token(?:_?\d+)?$|token_(?!ids?$|count|limit|name|type)|(?:^|_)key(?:_?\d+)?$|(?:^|_)sas$"
)
OF_A_PATH = re.compile(r"(?i)_(?:file|path|dir|folder)$")
WORD = re.compile(r"[a-z]{0,16}|[A-Z]{0,16}|[A-Z][a-z]{0,15}|\d{1,6}")
SHORTEST = 8  # characters of a variable's value that is looked for: shorter ones are words


def redact(text: str) -> str:
    """The text without user names in URLs, signed queries, keys, tokens and passwords, and without the values of
    the environment's secrets (AWS_SECRET_ACCESS_KEY, WANDB_API_KEY, HF_TOKEN, …)."""
    for value in environment_secrets():
        text = text.replace(value, HIDDEN)
    for pattern, replacement in PATTERNS:
        text = pattern.sub(replacement, text)
    return text


def environment_secrets(environment: Mapping[str, str] = os.environ) -> list[str]:
    """Values of variables that are secret, the longest first, in all their spellings."""
    values = {value for name, value in environment.items() if is_secret(name, value)}
    return sorted({spelling for value in values for spelling in spellings(value)}, key=len, reverse=True)


def spellings(value: str) -> tuple[str, ...]:
    """The text as it is, and as it stands in URLs, in JSON and in Python's repr."""
    quoted = quote(value, safe="")
    lower = re.sub(r"%..", lambda match: match[0].lower(), quoted)
    return value, quoted, lower, json.dumps(value)[1:-1], repr(value)[1:-1]


@functools.lru_cache(maxsize=4096)
def is_secret(name: str, value: str) -> bool:
    """Whether a variable's name says so: SECRET, PASSWORD, API_KEY, … of any value that is no path, the last word
    KEY or TOKEN of one that looks random, as counts and names of things are called so, too."""
    if len(value) < SHORTEST or OF_A_PATH.search(name):
        return False
    if STRONG_VARIABLE.search(name):
        # an AWS key may begin with a slash, too
        is_path = value.startswith(("/", "~")) and (looks_harmless(value) or exists(value))
        return not is_path
    return WEAK_VARIABLE.search(name) is not None and not (looks_harmless(value) or exists(value))


def looks_harmless(value: str) -> bool:
    """A number, or words: `checkpoints`, `manifest.jsonl`, `run-12`."""
    with contextlib.suppress(ValueError):
        float(value)
        return len(value) < 20
    return all(WORD.fullmatch(part) for part in re.split(r"[-_./~\s,:]", value))


def exists(path: str) -> bool:
    """Whether it is a path on this host."""
    try:
        return os.path.lexists(os.path.expanduser(path))
    except (OSError, ValueError):
        return False


def redacted(value: Any) -> Any:
    """A flag's value, or a dict or list of them, with every text redacted; the rest is itself."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, Mapping):
        return {name: redacted(each) for name, each in value.items()}
    return [redacted(each) for each in value] if isinstance(value, list | tuple) else value


class Redacting(logging.Filter):
    """For a handler: what it writes holds no secret; neither do tracebacks."""

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        if (clean := redact(text)) != text:
            record.msg, record.args = clean, ()
        if record.exc_info and record.exc_info[1] is not None:
            record.exc_text = redact("".join(traceback.format_exception(record.exc_info[1])).rstrip())
        return True
