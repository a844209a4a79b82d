"""--inputs to files, and files to units of work."""

import functools
import glob
import os
import posixpath
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from open_lm.data.patterns import expand, hint
from open_lm.data.remote import find_file_system, is_local
from open_lm.data.retry import Patience, retry
from open_lm.data.stream import open_stream
from open_lm.tokenize.places import is_inside, normalize

COMPRESSIONS = ("gz", "zst")
FORMATS = {
    "jsonl": "jsonl",
    "ndjson": "jsonl",
    "json": "jsonl",
    "txt": "txt",
    "parquet": "parquet",
    "tar": "tar",
}
ARRAY = "write each object on a line of its own (jq -c '.[]' FILE > FILE.jsonl)"
KNOWN = ".jsonl, .ndjson, .json (JSON lines), .txt, .parquet, .tar, with .gz or .zst where it is not parquet"


IN_TARS = KNOWN.replace(".tar, ", "")


class Kind(NamedTuple):
    """How to read a file: format jsonl, txt, parquet or tar; compression gz, zst or none ('')."""

    format: str
    compression: str


class File(NamedTuple):
    """An input; `version` changes when its content does (time of change, or ETag)."""

    source: int
    number: int  # among the source's files
    url: str
    bytes: int
    version: str


class Unit(NamedTuple):
    """What one task reads: the documents that begin in bytes (parquet: row groups) start … end-1 of a file."""

    file: File
    start: int
    end: int | None
    bytes: int


def kind_of(name: str) -> Kind | None:
    """By the endings of the name; None if it holds no documents."""
    stem, _, ending = name.lower().rpartition(".")
    compression = ending if ending in COMPRESSIONS else ""
    format = FORMATS.get(stem.rpartition(".")[2] if compression else ending)
    if format is None or (format == "parquet" and compression):
        return None
    return Kind(format, compression)


def list_files(
    entry: str,
    source: int,
    patience: Patience,
    excluded: Sequence[str] = (),
    passed: list[str] | None = None,
) -> list[File]:
    """The files of one --inputs entry, in a fixed order, without those in `excluded` folders (what a run writes is
    no input). Files that only their folder stands for, and that hold no documents by their names, are added to
    `passed`. ValueError or FileNotFoundError names what gives none."""
    found: dict[str, tuple[int, str]] = {}
    others: list[str] = []
    is_ours = functools.cache(lambda folder: any(is_inside(folder, ours) for ours in excluded))
    for pattern in expand(entry):
        listing = list_local(pattern, others) if is_local(pattern) else list_remote(pattern, patience, others)
        try:
            every = list(listing)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{error}{hint(entry)}") from None
        listed = [file for file in every if not is_ours(posixpath.dirname(file[0]))]
        if every and not listed:
            raise FileNotFoundError(
                f"--inputs {pattern}: all that is there ({len(every):,} files) lies in --output or --work, and "
                "what a run writes is no input: name other folders for those"
            )
        if not listed:
            there = f"; {others[0]}: name it, or a pattern, to have it read" if others else ""
            raise FileNotFoundError(
                f"--inputs {pattern}: no file with documents there (known: {KNOWN}){there}"
            )
        for url, size, version in listed:
            if kind_of(url) is None:
                raise ValueError(f"--inputs {url}: unknown ending (known: {KNOWN})")
            found[url] = (size, version)
    if passed is not None:
        passed += [url for url in dict.fromkeys(others) if not is_ours(posixpath.dirname(url))]
    return [File(source, number, url, *found[url]) for number, url in enumerate(found)]


def find_repeats(entries: Sequence[str], files: Sequence[File]) -> list[str]:
    """What is in --inputs more than once, a line for each pair of entries: its documents come that often."""
    first: dict[str, File] = {}
    shared: dict[tuple[int, int], list[str]] = {}
    place = functools.cache(normalize)
    for file in files:
        folder, name = posixpath.split(file.url)
        before = first.setdefault(f"{place(folder)}/{name}", file)
        if before is not file:
            shared.setdefault((before.source, file.source), []).append(file.url)
    lines = []
    for (a, b), urls in shared.items():
        which = f"{urls[0]} and {len(urls) - 1:,} more files" if urls[1:] else urls[0]
        where = f"in {entries[a]} and in {entries[b]}" if a != b else f"under two names in {entries[a]}"
        if a != b and entries[a] == entries[b]:
            where = f"{entries[a]} is given twice"
        lines.append(f"--inputs: {which}: {where}, so every document of it is used twice")
    return lines


def list_local(pattern: str, passed: list[str]) -> Iterator[tuple[str, int, str]]:
    pattern = pattern.removeprefix("file://")
    paths = [pattern]
    if not os.path.exists(pattern):
        paths = sorted(glob.glob(pattern, recursive=True)) if glob.has_magic(pattern) else []
        if not paths:
            raise FileNotFoundError(f"--inputs {pattern}: no such file or folder")
    for path in paths:
        inside = [path]
        if os.path.isdir(path):
            inside = choose_of_folder(sorted(walk(path)), passed)
        for name in inside:
            with open(name, "rb"):  # unreadable: said before work starts
                stat = os.stat(name)
            yield name, stat.st_size, str(stat.st_mtime_ns)


def walk(folder: str) -> Iterator[str]:
    """The files in a folder and those below it, also behind symbolic links, each folder once."""
    entered: set[str] = set()
    for here, folders, names in os.walk(folder, followlinks=True):
        if (place := os.path.realpath(here)) in entered:
            folders.clear()
            continue
        entered.add(place)
        folders.sort()
        yield from (os.path.join(here, name) for name in names)


def list_remote(pattern: str, patience: Patience, passed: list[str]) -> Iterator[tuple[str, int, str]]:
    def find() -> tuple[Any, dict[str, dict]]:
        file_system, path = find_file_system(pattern, patience)
        file_system.invalidate_cache()
        if glob.has_magic(path):
            return file_system, file_system.glob(path, detail=True)
        if not pattern.endswith("/") and file_system.isfile(path):
            return file_system, {path: file_system.info(path)}
        return file_system, file_system.find(path, detail=True)

    file_system, found = retry(pattern, "listing it", find, patience)
    names = sorted(found)
    if not glob.has_magic(pattern) and names != [file_system._strip_protocol(pattern)]:
        left: list[str] = []
        names = choose_of_folder(names, left)
        passed += map(file_system.unstrip_protocol, left)
    for name in names:
        information = found[name]
        if information.get("type") != "directory":
            version = next(
                (str(information[k]) for k in ("ETag", "mtime", "LastModified") if k in information), ""
            )
            yield file_system.unstrip_protocol(name), int(information.get("size") or 0), version


def choose_of_folder(paths: Sequence[str], passed: list[str]) -> list[str]:
    """Those that are meant where only their folder is named: no hidden ones, and no plain .json, which is mostly
    about data; what is passed over, but for the hidden ones, is added to `passed`."""
    shown = [path for path in paths if not posixpath.basename(path).startswith(".")]
    chosen = [path for path in shown if kind_of(path) is not None and not path.lower().endswith(".json")]
    kept = set(chosen)
    passed += [path for path in shown if path not in kept]
    return chosen


def divide(file: File, unit_bytes: int, patience: Patience) -> list[Unit]:
    """Units of at most about `unit_bytes`, where the format lets a reader begin in the middle. ValueError: a .json
    that is one array, or no parquet."""
    kind = kind_of(file.url)
    assert kind is not None
    if kind.format == "parquet":
        return divide_parquet(file, patience)
    if file.url.lower().endswith(".json"):  # of a divided array, the first line read could be anywhere
        with open_stream(file.url, patience) as stream:
            if stream.read(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
                raise ValueError(f"--inputs {file.url}: not JSON lines but an array: {ARRAY}")
    if kind != ("jsonl", "") or file.bytes <= unit_bytes:
        return [Unit(file, 0, None, file.bytes)]
    count = -(-file.bytes // unit_bytes)
    ends = [file.bytes * i // count for i in range(count + 1)]
    return [Unit(file, a, b, b - a) for a, b in pairwise(ends)]


def divide_parquet(file: File, patience: Patience) -> list[Unit]:
    from open_lm.tokenize.readers import open_parquet

    with open_parquet(file.url, patience) as (table, _):
        groups = table.metadata.num_row_groups
        sizes = [table.metadata.row_group(i).total_byte_size for i in range(groups)]
    total = sum(sizes) or 1
    return [Unit(file, i, i + 1, file.bytes * size // total) for i, size in enumerate(sizes)]
