import errno
import gzip
import io
import json
import random
import tarfile

import pytest
import zstandard

from open_lm.data.retry import Patience
from open_lm.tokenize import readers
from open_lm.tokenize.inputs import Unit, divide, list_files
from open_lm.tokenize.readers import How, count_lines, read_unit
from tests.tokenize.conftest import TEXTS, write_lines

HOW = How("text", "file")


def read(path, how=HOW, unit_bytes=10**9):
    files = list_files(str(path), 0, Patience())
    return [
        d for file in files for unit in divide(file, unit_bytes, Patience()) for d in read_unit(unit, how)
    ]


def texts_of(documents):
    assert all(d.text is not None for d in documents), documents
    return [d.text for d in documents]


def test_every_kind_of_file_gives_the_same_documents(tmp_path):
    plain = write_lines(tmp_path / "a.jsonl", TEXTS)
    data = plain.read_bytes()
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(data[:999]) + gzip.compress(data[999:]))
    frames = [zstandard.compress(data[:555]), zstandard.compress(data[555:])]
    (tmp_path / "c.jsonl.zst").write_bytes(b"".join(frames))
    with tarfile.open(tmp_path / "d.tar.gz", "w:gz") as tar:
        for name, half in (
            ("x/1.jsonl", data),
            ("x/skipped.bin", b"\0"),
            ("x/2.jsonl.gz", gzip.compress(data)),
        ):
            member = tarfile.TarInfo(name)
            member.size = len(half)
            tar.addfile(member, io.BytesIO(half))
    for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl.zst"):
        assert texts_of(read(tmp_path / name)) == TEXTS
    documents = [d for d in read(tmp_path / "d.tar.gz") if not d.is_passed]
    assert texts_of(documents) == TEXTS * 2
    positions = [d.position for d in documents]
    assert len(set(positions)) == 400


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(
        pyarrow.table({"text": TEXTS, "n": range(200)}), tmp_path / "a.parquet", row_group_size=70
    )
    documents = read(tmp_path / "a.parquet")
    assert texts_of(documents) == TEXTS
    assert len({d.position for d in documents}) == 200
    assert len(divide(list_files(str(tmp_path), 0, Patience())[0], 1, Patience())) == 3
    (other,) = {d.problem for d in read(tmp_path / "a.parquet", How("body", "file"))}
    assert "no column 'body'" in other
    (tmp_path / "b.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(ValueError, match=r"b\.parquet: cannot be read as parquet"):
        read(tmp_path / "b.parquet")


class Dying(io.FileIO):
    """A disk that reads no more of the first bytes of a file."""

    def readinto(self, buffer):
        if self.tell() < 40_000:
            raise OSError(errno.EIO, "Input/output error")
        return super().readinto(buffer)


def test_rows_that_the_disk_does_not_give_are_no_bad_documents(tmp_path, monkeypatch):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    noise = [random.Random(i).randbytes(1000) for i in range(200)]  # the texts are not near the metadata
    parquet.write_table(pyarrow.table({"text": TEXTS, "noise": noise}), path)
    (unit,) = divide(*list_files(str(path), 0, Patience()), 1, Patience())
    monkeypatch.setattr(readers, "open_stream", lambda url, patience: io.BufferedReader(Dying(url)))
    with pytest.raises(OSError, match="Input/output error"):
        list(read_unit(unit, HOW))
    data = bytearray(path.read_bytes())
    data[4:40] = bytes(36)
    path.write_bytes(data)
    monkeypatch.undo()
    (bad,) = read_unit(unit, HOW)
    assert "unreadable from here on" in bad.problem


@pytest.mark.parametrize("unit_bytes", [1, 7, 64, 1000, 10**6])
def test_units_of_any_size_give_each_line_once_with_its_number(tmp_path, unit_bytes):
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b'{"text": "one"}\n\n{"text": "two is longer"}\r\n\n\n{"text": "3"}\n{"text": "last, no newline"}'
    )
    (file,) = list_files(str(path), 0, Patience())
    whole = list(read_unit(Unit(file, 0, None, 0), HOW))
    lines, positions = [], []
    for unit in divide(file, unit_bytes, Patience()):
        for document in read_unit(unit, HOW):
            positions.append(document.position)
            lines.append((document.line + count_lines(unit, Patience()), document.text))
    assert lines == [(d.line, d.text) for d in whole]
    assert positions == [d.position for d in whole]
    assert [line for line in lines if line[1]] == [
        (1, "one"), (3, "two is longer"), (6, "3"), (7, "last, no newline")
    ]  # fmt: skip


def test_txt(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffé\nb\r\n\nc".encode())
    assert texts_of(read(tmp_path / "a.txt")) == ["é\nb\r\n\nc"]
    assert texts_of(read(tmp_path / "a.txt", How("text", "line"))) == ["é", "b", "", "c"]
    (tmp_path / "a.txt").write_bytes(b"ok\n\xff")
    assert [d.problem for d in read(tmp_path / "a.txt")] == ["not UTF-8: invalid start byte at byte 3"]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"text": "x"', "not JSON: Expecting"),
        (b'{"text": "\xff"}', "not UTF-8: invalid start byte at byte 10"),
        (b'{"body": "x"}', "no key 'text' (--text-key)"),
        (b'["x"]', "no key 'text'"),
        (b'{"text": 3}', "'text' is a int, not a string"),
        (b'{"text": null}', "'text' is a NoneType"),
        (b'{"text": "\\ud800"}', "no Unicode text: surrogates not allowed"),
        (b"[" * 100_000, "not JSON lines but part of an array"),
        (
            b'[{"text": "x"}, {"text": "y"}]',
            "an array, so no key 'text' (--text-key): write each object on a line",
        ),
        (
            b'[{"text": "x"},',
            "not JSON lines but part of an array: write each object on a line of its own (jq -c",
        ),
    ],
)
def test_bad_lines(tmp_path, line, problem):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n' + line + b'\n{"text": "b"}\n')
    first, bad, last = read(tmp_path / "a.jsonl")
    assert (first.text, last.text) == ("a", "b")
    assert bad.text is None
    assert bad.line == 2
    assert problem in bad.problem


def cut_gz(data: bytes) -> bytes:
    return gzip.compress(data)[:-20]


def cut_zst(data: bytes) -> bytes:
    return zstandard.compress(data)[:-20]


def no_gz(data: bytes) -> bytes:
    return data


def corrupt_gz(data: bytes) -> bytes:
    packed = bytearray(gzip.compress(data))
    packed[len(packed) // 2] ^= 255
    return bytes(packed)


@pytest.mark.parametrize(
    ("ending", "damage"),
    [("gz", cut_gz), ("zst", cut_zst), ("gz", no_gz), ("zst", no_gz), ("gz", corrupt_gz)],
)
def test_what_cannot_be_decompressed_is_said_and_not_taken_for_the_end(tmp_path, ending, damage):
    data = "".join(json.dumps({"text": t}) + "\n" for t in TEXTS).encode()
    (tmp_path / f"a.jsonl.{ending}").write_bytes(damage(data))
    documents = read(tmp_path / f"a.jsonl.{ending}")
    problems = [d.problem for d in documents if d.text is None]
    assert "unreadable from here on" in problems[-1]
    assert documents[-1].text is None


@pytest.mark.parametrize("kept", [300, 512, 2048 + 100, 3 * 512 + 512, 0.5])
def test_a_tar_that_is_cut_short_is_said(tmp_path, kept):
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for name in ("1.txt", "2.txt", "3.txt"):
            member = tarfile.TarInfo(name)
            member.size = 1000
            tar.addfile(member, io.BytesIO(b"x" * 1000))
    data = (tmp_path / "a.tar").read_bytes()
    assert not [d for d in read(tmp_path / "a.tar") if d.text is None]
    (tmp_path / "a.tar").write_bytes(data[: kept if kept > 1 else int(4608 * kept)])
    assert "unreadable from here on" in read(tmp_path / "a.tar")[-1].problem


def write_members(path, **members):
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def test_parquet_in_a_tar(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    held = io.BytesIO()
    parquet.write_table(pyarrow.table({"text": TEXTS}), held, row_group_size=70)
    members = {"x/a.parquet": held.getvalue(), "b.txt": b"behind it", "bad.parquet": b"PAR1 no"}
    write_members(tmp_path / "a.tar", **members)
    *documents, bad = read(tmp_path / "a.tar")
    assert texts_of(documents) == [*TEXTS, "behind it"]
    assert len({d.position for d in documents}) == 201
    assert documents[75].member == "x/a.parquet, row group 1, row 5"
    assert bad.member == "bad.parquet"
    assert "cannot be read as parquet" in bad.problem
    other, text, _ = read(tmp_path / "a.tar", How("body", "file"))
    assert (other.member, other.problem) == ("x/a.parquet", "no column 'body' (--text-key)")
    assert text.text == "behind it"


def test_members_that_hold_no_documents_are_named(tmp_path):
    members = {
        "a.csv": b"1,2",
        ".hidden": b"",
        "b.txt": b"text",
        "c.tar": b"",
        "d.parquet.gz": b"",
        "README": b"",
    }
    write_members(tmp_path / "a.tar", **members)
    documents = read(tmp_path / "a.tar")
    assert [d.member for d in documents if d.is_passed] == ["a.csv", "c.tar", "d.parquet.gz", "README"]
    assert [d.text for d in documents if d.text] == ["text"]
