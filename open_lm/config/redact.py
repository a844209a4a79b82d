"""Secrets taken out of what is written: logs, checkpoints, params.txt, config.yaml, reports, `ps`."""

import contextlib
import functools
import hashlib
import json
import logging
import os
import posixpath
import re
import traceback
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

HIDDEN = "…"
# Whatever they hold is secret
NAMES = (
    r"(?:secret|passw|passphrase|(?<=_)pwd|credential|api[-_]?key|access[-_]?key|priv(?:ate)?[-_]?key|account[-_]?key|"
    r"connection[-_]?string)"
)
TOKEN = (
    r"(?:token(?!s|iz)|signature)"  # a number behind these is a count or an id ("token id: 50256"), no secret
)
FLAG = rf"(?<!\S)--?[\w-]*(?:{NAMES}|token(?!s|iz|-id))[\w-]*"
# Names of headers that say who asks
HEADER = r"(?:set-)?cookie|x-[\w-]*(?:auth|token|key|secret)[\w-]*"
USER = r"(?:-u\s*|(?:--user|--proxy-user|--cookie)[\s=]+)"
BOT = r"hooks\.slack\.com/\w+/|discord(?:app)?\.com/api/webhooks/|api\.telegram\.org/(?:file/)?bot"
PATTERNS = [
    (re.compile(r"(\w+://)[^/\s@]*:[^/\s@]*@"), r"\1"),  # a password may hold quotes
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
    (re.compile(r"\bAIza[A-Za-z0-9_-]{30,}"), HIDDEN),
    (re.compile(r"\b(npm_|pypi-|dckr_pat_)[A-Za-z0-9-]{24,}"), HIDDEN),
    (re.compile(rf"(?i)\b({BOT})[^\s'\"]+"), rf"\1{HIDDEN}"),
    (re.compile(r"\beyJ[\w-]{5,}\.[\w-]{5,}\.[\w-]*"), HIDDEN),  # a JSON web token
    (re.compile(rf"(?i)\b((?:{HEADER})['\"]?\s*:\s*['\"]?)[^'\"\n]+"), rf"\1{HIDDEN}"),
    (re.compile(r"(?<!\S)((?:-H|--header)[\s=]*(['\"])[\w-]+:)(?:(?!\2).)+"), rf"\1 {HIDDEN}"),
    (re.compile(rf"(?<!\S)({USER}['\"]?)[^\s'\":=]+[:=][^\s'\"]+"), rf"\1{HIDDEN}"),
    (re.compile(r"\b(sshpass\s+-p\s*['\"]?)[^\s'\"]+"), rf"\1{HIDDEN}"),
    (re.compile(r"\b(mysql\w*\s(?:[^\n|;]*?\s)?-p['\"]?)[^\s'\"]+"), rf"\1{HIDDEN}"),
]  # fmt: skip
# A command's arguments may be secret in any of their program's ways: none is shown
PIPE = "pipe:"
SHOWN_COMMAND = rf"pipe:[\w.+-]*[ ]?{HIDDEN}(?: (?:[\w.{{}},-]+ )?\[[0-9a-f]{{8}}\])?"
COMMAND = re.compile(
    rf"(?P<shown>(?<![\w-]){SHOWN_COMMAND})"
    rf"|\A(?P<flag>--[\w-]+=)?(?!{SHOWN_COMMAND})pipe:(?P<whole>\s*\S[\s\S]*)"  # a flag's value, a URL
    r"|(?<![\w-])pipe:(?P<within>\S(?:\\\n|[^\n])*)"  # in a text, where none knows its end
)
PROGRAM = re.compile(r"""\s*(?:\w+=(?:[^\s'"\\$`()]*|'[^']*'|"[^"\\$`]*")\s+)*(?P<name>[\w./+-]+)(?=\s|$)""")
FILE = re.compile(r"""(?:^|[\s/'"])(?P<name>[\w{][\w.{},-]*\.(?:tar|jsonl))(?=[\s'"?|;&<>)]|$)""")
STRONG_VARIABLE = re.compile(rf"(?i){NAMES}|(?:^|_)pass$|cookies?$")
PASSWORD_VARIABLE = re.compile(r"(?i)secret|passw|passphrase|(?:^|_)pass$|_pwd")
# the word, not TOKENIZER or EOS_TOKEN_ID; not MONKEY, AUTHOR
WEAK_VARIABLE = re.compile(
    r"(?i)tokens?(?:_?\d+)?$|(?:tokens?|(?:^|_)(?:key|auth))_(?!ids?$|count|limit|name|type|sock|url)|"
    r"(?:^|_)key(?:_?\d+)?$|auth$|(?:^|_)sas$"
)
OF_A_PATH = re.compile(r"(?i)_(?:file|path|dir|folder)$")
WORD = re.compile(r"[a-z]{0,16}|[A-Z]{0,16}|[A-Z][a-z]{0,15}|\d{1,6}")
# Characters of a variable's value that is looked for: shorter ones are words
SHORTEST, SHORTEST_PASSWORD = 8, 6


def redact(text: str) -> str:
    """The text without user names in URLs, signed queries, keys, tokens and passwords, the arguments of `pipe:`
    commands, and without the values of the environment's secrets (AWS_SECRET_ACCESS_KEY, WANDB_API_KEY, …).

    Of a `pipe:` command amid a text all to the line's end goes: messages name commands by `redact(url)`.
    """
    text = COMMAND.sub(_hide_arguments, text)
    for value in environment_secrets():
        text = text.replace(value, HIDDEN)
    for pattern, replacement in PATTERNS:
        text = pattern.sub(replacement, text)
    return text


def _hide_arguments(match: re.Match[str]) -> str:
    """`pipe:curl … shard_0.tar [1a2b3c4d]`: the program, the last word's name that is a tar's or a manifest's, and
    the start of the command's sha256, by which two of them are told apart."""
    if match["shown"]:
        return match[0]
    command = match["whole"] or match["within"]
    program, files = PROGRAM.match(command), list(FILE.finditer(command))
    words = [posixpath.basename(program["name"]) if program else "", HIDDEN]
    if match["whole"]:
        words += [files[-1]["name"]] if files else []
        words.append(f"[{hashlib.sha256(command.encode(errors='replace')).hexdigest()[:8]}]")
    return f"{match['flag'] or ''}{PIPE}" + " ".join(word for word in words if word)


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
    if len(value) < SHORTEST_PASSWORD or OF_A_PATH.search(name):
        return False
    if len(value) < SHORTEST:
        return PASSWORD_VARIABLE.search(name) is not None and not looks_harmless(value)
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
