"""Units of work to documents, or to what is wrong with them."""

import gzip
import io
import json
import posixpath
import tarfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, NamedTuple

from open_lm.data.retry import Patience
from open_lm.data.stream import Watched, open_stream
from open_lm.tokenize.inputs import ARRAY, Kind, Unit, kind_of

CHUNK_BYTES = 2**20


class Document(NamedTuple):
    """One text, or the problem in its place. `position` identifies it in its file, however that was divided.

    `line` counts from 1 in the unit (not the file); 0 where there are no lines. `member` is of a tar, or a row.
    """

    position: str
    member: str
    line: int
    text: str | None
    problem: str = ""
    is_passed: bool = False
    """It stands for a tar's member that is not read, as its name has no known ending."""


class How(NamedTuple):
    """What readers are told: the text's key, what is a document in .txt files, the patience with remote ones."""

    text_key: str
    txt_documents: str
    patience: Patience = Patience()


class Frames(io.RawIOBase):
    """Decompressed zstd. EOFError at the end of a file that was cut short (zstandard's own reader is silent)."""

    def __init__(self, stream: BinaryIO) -> None:
        try:
            import zstandard
        except ImportError as error:
            raise ImportError(f"{error} (pip install zstandard)") from error
        self.new = zstandard.ZstdDecompressor().decompressobj
        self.error = zstandard.ZstdError
        self.stream, self.frame, self.ready = stream, None, b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self.ready:
            data = (self.frame.unused_data if self.frame and self.frame.eof else b"") or self.stream.read(
                CHUNK_BYTES
            )
            if self.frame is None or self.frame.eof:
                self.frame = self.new() if data else None
            elif not data:
                raise EOFError("the compressed data end before their end mark")
            if not data:
                return 0
            try:
                self.ready = self.frame.decompress(data)  # pyright: ignore[reportOptionalMemberAccess]
            except self.error as error:
                raise zlib.error(str(error)) from None
        count = min(len(buffer), len(self.ready))
        buffer[:count] = self.ready[:count]
        self.ready = self.ready[count:]
        return count


class Tail:
    """Passes reads on and keeps the last block, to see whether a tar has its end mark."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream, self.last = stream, b""

    def read(self, size: int = -1) -> bytes:
        data = self.stream.read(size)
        self.last = (self.last + data)[-tarfile.BLOCKSIZE :]
        return data


def decompress(stream: BinaryIO, compression: str) -> BinaryIO:
    """The bytes inside."""
    if compression == "gz":
        return gzip.open(stream)  # pyright: ignore[reportReturnType]
    return io.BufferedReader(Frames(stream), CHUNK_BYTES) if compression == "zst" else stream


@contextmanager
def open_parquet(url: str, patience: Patience) -> Iterator[tuple[Any, Watched]]:
    """pyarrow's ParquetFile and what it reads from. ValueError names a file that is none; OSError: it cannot be
    read at all."""
    with open_stream(url, patience) as stream:
        watched = Watched(stream)
        yield parse_parquet(watched, url), watched


def parse_parquet(watched: Watched, name: str) -> Any:
    """pyarrow's ParquetFile. ValueError: it is none."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError(f"{name}: {error} (pip install pyarrow)") from error
    try:
        return parquet.ParquetFile(watched)
    except (pyarrow.ArrowException, OSError) as error:
        if watched.error is not None:
            raise watched.error from None
        raise ValueError(f"{name}: cannot be read as parquet: {error}") from None


def read_unit(unit: Unit, how: How) -> Iterator[Document]:
    """The documents of a unit in order. What cannot be read is a Document with a problem.

    OSError: the file is gone, or cannot be read (any more): that is no bad document.
    """
    kind = kind_of(unit.file.url)
    assert kind is not None
    if kind.format == "parquet":
        yield from read_rows(unit, how)
        return
    with open_stream(unit.file.url, how.patience) as raw:
        if unit.start:
            raw.seek(unit.start - 1)
            raw.readline()  # the line that begins before belongs to the unit before
        yield from READERS[kind.format](
            decompress(raw, kind.compression), how, "", raw.tell() if unit.end else 0, unit.end
        )


def read_lines(stream: BinaryIO, how: How, member: str, start: int, end: int | None) -> Iterator[Document]:
    """JSON lines from byte `start` on that begin before `end`; blank ones are passed over."""
    line, offset = 0, start
    try:
        while end is None or offset < end:
            data = stream.readline()
            if not data:
                return
            line += 1
            if data.strip():
                yield Document(f"{member}@{offset}", member, line, *parse_line(data, how.text_key))
            else:
                yield Document("", member, line, "")
            offset += len(data)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        yield unreadable(member, line + 1, error)


def unreadable(member: str, line: int, error: Exception) -> Document:
    return Document("", member, line, None, f"unreadable from here on: {type(error).__name__}: {error}")


def parse_line(data: bytes, key: str) -> tuple[str | None, str]:
    """A JSON line → its text, or the problem with it."""
    try:
        entry = json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return None, f"not UTF-8: {error.reason} at byte {error.start}"
    except (ValueError, RecursionError) as error:
        if data.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
            return None, f"not JSON lines but part of an array: {ARRAY}"
        return None, f"not JSON: {error}"
    if isinstance(entry, list):
        return None, f"an array, so no key {key!r} (--text-key): {ARRAY}"
    if not isinstance(entry, dict) or key not in entry:
        return None, f"no key {key!r} (--text-key)"
    return check_text(entry[key], key)


def check_text(text: object, key: str) -> tuple[str | None, str]:
    if not isinstance(text, str):
        return None, f"{key!r} is a {type(text).__name__}, not a string"
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            return None, f"{key!r} is no Unicode text: {error.reason} at character {error.start}"
    return text, ""


def read_text(stream: BinaryIO, how: How, member: str, start: int, end: int | None) -> Iterator[Document]:
    """The whole file, or each of its lines (with --txt-documents line, without the line's end)."""
    if how.txt_documents == "line":
        line = 0
        try:
            for line, data in enumerate(iter(stream.readline, b""), 1):
                yield Document(f"{member}#{line}", member, line, *decode_text(data.rstrip(b"\r\n")))
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            yield unreadable(member, line + 1, error)
        return
    try:
        yield Document(member, member, 0, *decode_text(stream.read()))
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        yield unreadable(member, 0, error)


def decode_text(data: bytes) -> tuple[str | None, str]:
    try:
        return data.decode("utf-8-sig"), ""
    except UnicodeDecodeError as error:
        return None, f"not UTF-8: {error.reason} at byte {error.start}"


def read_tar(stream: BinaryIO, how: How, member: str, start: int, end: int | None) -> Iterator[Document]:
    """The documents of every member with a known ending, in the tar's order. Others, but for hidden ones, are an
    empty Document that says so."""
    tail = Tail(stream)
    try:
        with tarfile.open(fileobj=tail, mode="r|") as tar:  # pyright: ignore[reportArgumentType, reportCallIssue]
            for number, information in enumerate(tar):
                if not information.isreg():
                    continue
                kind = kind_of(information.name)
                if kind is None or kind.format == "tar":
                    if not posixpath.basename(information.name).startswith("."):
                        yield Document("", information.name, 0, "", is_passed=True)
                    continue
                content = tar.extractfile(information)
                assert content is not None
                if kind.format == "parquet":
                    documents = read_parquet(content.read(), how, information.name)
                    yield from (d._replace(position=f"{number}:{d.position}") for d in documents)
                    continue
                documents = READERS[kind.format](
                    decompress(content, kind.compression),
                    how,
                    information.name,
                    0,
                    None,  # pyright: ignore[reportArgumentType]
                )
                yield from (d._replace(position=f"{number}:{d.position}") for d in documents)
        while tail.read(CHUNK_BYTES):
            pass
        if any(tail.last):
            yield unreadable("", 0, EOFError("the tar has no end mark: it is cut short"))
    except (tarfile.TarError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        yield unreadable("", 0, error)


def read_rows(unit: Unit, how: How) -> Iterator[Document]:
    """The rows of a parquet file's row groups."""
    with open_parquet(unit.file.url, how.patience) as (table, watched):
        yield from read_groups(table, watched, range(unit.start, unit.end or 0), how)


def read_parquet(data: bytes, how: How, member: str) -> Iterator[Document]:
    """The rows of a tar's parquet member, which is held in memory: a tar's stream cannot be read from its end."""
    watched = Watched(io.BytesIO(data))
    try:
        table = parse_parquet(watched, member)
    except ValueError as error:
        yield Document("", member, 0, None, str(error).removeprefix(f"{member}: "))
        return
    yield from read_groups(table, watched, range(table.metadata.num_row_groups), how, f"{member}, ")


def read_groups(
    table: Any, watched: Watched, groups: range, how: How, prefix: str = ""
) -> Iterator[Document]:
    import pyarrow

    if how.text_key not in table.schema_arrow.names:
        yield Document("", prefix.removesuffix(", "), 0, None, f"no column {how.text_key!r} (--text-key)")
        return
    for group in groups:
        row = 0
        try:
            for batch in table.iter_batches(256, row_groups=[group], columns=[how.text_key]):
                for value in batch.column(0):
                    try:
                        text, problem = check_text(value.as_py(), how.text_key)
                    except UnicodeDecodeError as error:
                        text, problem = None, f"not UTF-8: {error.reason} at byte {error.start}"
                    place = f"{prefix}row group {group}, row {row}"
                    yield Document(f"{group}/{row}", place, 0, text, problem)
                    row += 1
        except (pyarrow.ArrowException, OSError) as error:
            if watched.error is not None:
                raise watched.error from None
            yield unreadable(f"{prefix}row group {group}, row {row}", 0, error)


Reader = Callable[[BinaryIO, How, str, int, int | None], Iterator[Document]]
READERS: dict[str, Reader] = {"jsonl": read_lines, "txt": read_text, "tar": read_tar}


def name_place(unit: Unit, document_member: str, line: int, lines_before: int) -> str:
    """`file:member:line`, of which a document has some."""
    parts = [unit.file.url, document_member, str(line + lines_before) if line else ""]
    return ":".join(part for part in parts if part)


def count_lines(unit: Unit, patience: Patience) -> int:
    """Lines of the file before a unit."""
    remaining, count = unit.start, 0
    if not unit.start or kind_of(unit.file.url) != Kind("jsonl", ""):
        return 0
    with open_stream(unit.file.url, patience) as stream:
        while remaining > 0 and (data := stream.read(min(CHUNK_BYTES, remaining))):
            count += data.count(b"\n")
            remaining -= len(data)
        # The unit begins with the first line that begins at or after its start.
        stream.seek(unit.start - 1)
        return count + (stream.read(1) != b"\n")
