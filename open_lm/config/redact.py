"""Secrets taken out of what is written: logs, checkpoints, params.txt, config.yaml, reports, `ps`."""

import logging
import os
import re
import traceback
from collections.abc import Mapping
from typing import Any

HIDDEN = "…"
NAMES = r"(?:secret|token(?!s|iz)|passw|signature|credential|api[-_]?key|access[-_]?key)"
PATTERNS = [
    (re.compile(r"(\w+://)[^/\s'\"@]+@"), r"\1"),
    (re.compile(r"(\w+://[^\s'\"?]+)\?[^\s'\")]+"), rf"\1?{HIDDEN}"),
    (re.compile(r"(?i)(authorization['\"]?\s*[:=]\s*)(bearer|basic|aws4\S*)?\s*[^\s'\"]+"), rf"\1{HIDDEN}"),
    # a number is a count or an id ("token id: 50256"), no secret
    (re.compile(rf"(?i)([\w-]*{NAMES}[\w-]*['\"]?\s*[=:]\s*['\"]?)(?![\d.,]+(?:\W|$))[^\s'\"&]+"), rf"\1{HIDDEN}"),
    (re.compile(r"\b(AKIA|ASIA)[0-9A-Z]{12,}"), HIDDEN),
    (re.compile(r"\b(hf_|gh[pousr]_|sk-)[A-Za-z0-9_-]{16,}"), HIDDEN),
]  # fmt: skip
SECRET_VARIABLE = re.compile(r"(?i)secret|token|passw|credential|api_?key|access_?key|private_?key")
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
    """Values of variables whose names say that they are secret; not those that are paths or true, false, …"""
    named = (value for name, value in environment.items() if SECRET_VARIABLE.search(name))
    return [value for value in named if len(value) >= SHORTEST and not value.startswith(("/", "~"))]


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
