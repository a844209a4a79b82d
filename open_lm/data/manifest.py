"""Manifests: which tar shards a source has and how many sequences each of them holds."""

import hashlib
import json
import os
import posixpath
import re
from typing import NamedTuple

from open_lm.config.redact import redact
from open_lm.data.remote import PIPE, Patience, is_local, read_bytes

NUMBERS = ("bytes", "sequence_tokens", "first_offset", "stride", "tokens")
TEXTS = ("sha256", "data_key", "row_digests")
# The word of a command that names a manifest.
PIPED = re.compile(r"""(?P<folder>(?:[^\s'"|;<>]*/)?)[^\s/'"|;<>]+\.jsonl(?=$|[\s'"|;<>])""")
COUNT_KEYS = ("num_sequences", "num_chunks")  # the second is open_lm's old name


class Shard(NamedTuple):
    """A tar and its number of sequences; what else its manifest says, None where it says nothing."""

    url: str
    num_sequences: int
    bytes: int | None = None
    """Of the tar."""
    sha256: str | None = None
    """Of the tar."""
    data_key: str | None = None
    """Ending of the members that hold the tokens."""
    sequence_tokens: int | None = None
    """Of each sequence. With first_offset and stride, bytes: sequence i begins at first_offset + i * stride."""
    first_offset: int | None = None
    stride: int | None = None
    tokens: int | None = None
    """Of all sequences."""
    row_digests: str | None = None
    """The shard's digest, which each row's header repeats beside the row's own (open_lm.data.digests)."""


class Source(NamedTuple):
    """One source of the mix: what was given, its shards, and what identifies their list."""

    name: str
    shards: tuple[Shard, ...]
    sha256: str
    """Of the listing."""
    listing: bytes = b""
    """The manifest as it is, or a line per shard."""

    @property
    def sequences(self) -> int:
        """Sequences in all shards."""
        return sum(shard.num_sequences for shard in self.shards)


def read_manifest(url: str, patience: Patience | None = None) -> Source:
    """The source that a local, remote or piped manifest lists; sha256 is that of the manifest's bytes.

    One JSON object a line: {"shard": "shard_00000000", "num_sequences": N} (old key: num_chunks), the optional
    fields of Shard, other keys are ignored, the last newline is optional. The tars lie beside the manifest.
    ValueError names the file and the line.
    """
    if is_local(url) and os.path.isdir(url.removeprefix("file://")):
        raise IsADirectoryError(
            f"{redact(url)} is a folder: name its manifest, e.g. {posixpath.join(url, 'manifest.jsonl')}"
        )
    content = read_bytes(url, patience)
    shards: dict[str, Shard] = {}
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        shard = parse_line(line, url, f"{redact(url)}:{number}")
        if shard.url in shards:
            raise ValueError(f"{redact(url)}:{number}: shard {redact(shard.url)} is listed twice")
        shards[shard.url] = shard
    source = Source(url, tuple(shards.values()), hashlib.sha256(content).hexdigest(), content)
    if source.sequences == 0:
        raise ValueError(
            f"{redact(url)}: the manifest lists no sequences; where open_lm.tokenize "
            "wrote it, the part had too little "
            "text (info.json beside it counts): leave it out, or tokenize with more text or share held out"
        )
    return source


def read_information(manifest: str, patience: Patience | None = None) -> dict:
    """info.json beside the manifest; empty if there is none (of a command, it is not looked for). ValueError if it
    is no JSON object."""
    if manifest.startswith(PIPE):
        return {}
    url = locate_beside("info.json", manifest)
    try:
        information = json.loads(read_bytes(url, patience))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f"{redact(url)}: not JSON: {error}") from None
    if not isinstance(information, dict):
        raise ValueError(f"{redact(url)}: not a JSON object")
    return information


def parse_line(line: bytes, manifest: str, place: str) -> Shard:
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{place}: not JSON ({error}): {line[:60]!r}") from None
    if not isinstance(entry, dict) or not isinstance(entry.get("shard"), str) or not entry["shard"]:
        raise ValueError(f'{place}: a line must be {{"shard": NAME, "num_sequences": N}}, not {line[:60]!r}')
    count = next((entry[key] for key in COUNT_KEYS if key in entry), None)
    if type(count) is not int or count < 0:
        raise ValueError(f"{place}: num_sequences must be a whole number, not {count!r}")
    known = {key: entry[key] for key in (*NUMBERS, *TEXTS) if entry.get(key) is not None}
    for key, value in known.items():
        if key in NUMBERS and (type(value) is not int or value < 0):
            raise ValueError(f"{place}: {key} must be a whole number, not {value!r}")
        if key in TEXTS and not isinstance(value, str):
            raise ValueError(f"{place}: {key} must be a string, not {value!r}")
    return Shard(locate_shard(entry["shard"], manifest), count, **known)


def locate_shard(name: str, manifest: str) -> str:
    """URL of a shard that the manifest names: beside it, unless the name is a URL or an absolute path."""
    name = name if name.endswith(".tar") else f"{name}.tar"
    return name if "://" in name else locate_beside(name, manifest)


def is_manifest(entry: str) -> bool:
    """Whether a path, URL or command gives a manifest: it ends in .jsonl, a command names a file that does."""
    return bool(PIPED.search(entry)) if entry.startswith(PIPE) else entry.endswith(".jsonl")


def locate_beside(name: str, manifest: str) -> str:
    """URL of a file in the manifest's folder: of `pipe:cat F/manifest.jsonl`, `pipe:cat F/NAME`.

    ValueError: a command that names no .jsonl file, or a name that a shell would take for more than a name.
    """
    if not manifest.startswith(PIPE):
        return posixpath.join(posixpath.dirname(manifest), name)
    if name.startswith("/"):
        return name
    found = list(PIPED.finditer(manifest))
    if not found:
        raise ValueError(
            f"{redact(manifest)}: the command names no .jsonl file, so where its shard "
            f"{name} lies is unknown: give the "
            "manifest itself"
        )
    if not re.fullmatch(r"(?!-)[\w./+=:@%,-]+", name):
        raise ValueError(f"{redact(manifest)}: {name!r} cannot stand in a command: rename the shard")
    word = found[-1]
    return manifest[: word.start()] + word["folder"] + name + manifest[word.end() :]
