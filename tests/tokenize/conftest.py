"""A tokenizer of 300 ids, documents as files, and what shards hold by the standard library alone."""

import hashlib
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

from open_lm.tokenize.corpus import train_tokenizer
from tests.data.conftest import faults  # noqa: F401, a fixture

WORDS = "alpha beta gamma delta epsilon zeta eta theta iota kappa".split()


def text(i: int) -> str:
    """The i-th document: no two are alike, 1 to 60 words, some beyond ASCII."""
    rng = np.random.default_rng(i)
    words = " ".join(rng.choice(WORDS, rng.integers(1, 60)))
    return f"{i}: {words}{' é字' if i % 5 == 0 else ''}"


TEXTS = [text(i) for i in range(200)]


def write_lines(path: Path, texts: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return path


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer(TEXTS, 300).save(str(path))
    return path


def read_rows(folder: Path) -> np.ndarray:
    """Every sequence of the manifest's shards, after checking the tars against their lines."""
    rows = []
    for line in map(json.loads, (folder / "manifest.jsonl").read_text().splitlines()):
        path = folder / f"{line['shard']}.tar"
        data = path.read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (line["bytes"], line["sha256"])
        with tarfile.open(path) as tar:
            members = tar.getmembers()
            assert len(members) == line["num_sequences"]
            assert line["tokens"] == line["num_sequences"] * line["sequence_tokens"]
            for i, member in enumerate(members):
                assert member.name.partition(".")[2] == line["data_key"]
                assert (member.mtime, member.uid, member.gname) == (0, 0, f"shard:{line['row_digests']}")
                dtype = {"u16": "<u2", "u32": "<u4"}[line["data_key"]]
                assert member.offset_data == line["first_offset"] + i * line["stride"]
                row = np.frombuffer(data, dtype, line["sequence_tokens"], member.offset_data)
                assert member.uname == f"row:{digest_of(member, row)}"
                rows.append(row)
    return np.array(rows)


def digest_of(member: tarfile.TarInfo, row: np.ndarray) -> str:
    """What open_lm.data.digests describes, of what the standard library reads."""
    fields = member.name.encode().ljust(100, b"\0") + member.gname.encode().ljust(32, b"\0")
    return hashlib.sha256(fields + row.tobytes()).hexdigest()[:24]


def digests(folder: Path) -> dict[str, str]:
    """sha256 of every file in a folder."""
    files = (p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
