"""Files to documents to token sequences: pure functions.

Legend: N sequences, L ids in a sequence (seq_len + 1).
"""

import ast
import hashlib
import re
import warnings
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, NamedTuple

import numpy as np

Part = Literal["train", "held_out"]

MIN_CHARACTERS = 200
MAX_BYTES = 200_000
MAX_LINE = 1_000  # longer lines are data or generated
MIN_PASSAGE = 60  # shorter docstrings ("Return self.") may repeat
GENERATED = re.compile(r"do not edit|generated (by|from|file|code)|auto-?generated", re.IGNORECASE)
LEGAL = re.compile(r"licen[cs]e|copyright", re.IGNORECASE)
SKIPPED_NAMES = re.compile(
    r"licen[cs]e|copying|notice|authors|requirements|cmakelists|entry_points|top_level|third.?party|sources\.txt",
    re.IGNORECASE,
)


class Division(NamedTuple):
    """What one file holds. `passages` (docstrings, or the whole text) and `code` have no sentence in common."""

    digest: str
    sketch: frozenset[int]
    passages: tuple[str, ...]
    code: str


def decode(data: bytes) -> str | None:
    """Bytes → text with newlines `\\n`; None if not UTF-8, binary, too large, or more data than text."""
    if len(data) > MAX_BYTES or b"\0" in data:
        return None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return text if is_text(text) else None


def is_text(text: str) -> bool:
    """False for short texts, very long lines, tables of numbers, other alphabets, and generated files."""
    if len(text) < MIN_CHARACTERS or max(map(len, text.split("\n"))) > MAX_LINE:
        return False
    digits = sum(map(text.count, "0123456789"))
    ascii_bytes = len(text.encode("ascii", "ignore"))
    return digits < 0.2 * len(text) and ascii_bytes > 0.9 * len(text) and not GENERATED.search(text[:1000])


def digest(text: str) -> str:
    """sha256 of the text without trailing blanks, in hex: equal for equal documents."""
    return hashlib.sha256("\n".join(map(str.rstrip, text.strip().split("\n"))).encode()).hexdigest()


def sketch(text: str, size: int = 16) -> frozenset[int]:
    """The `size` smallest hashes of the text's runs of three lines (bottom-k sketch, Broder 1997)."""
    lines = [line.strip() for line in text.split("\n")]
    lines = [line for line in lines if line]
    runs = {zlib.crc32("\n".join(lines[i : i + 3]).encode()) for i in range(max(1, len(lines) - 2))}
    return frozenset(sorted(runs)[:size])


def part_of(digest_hex: str, held_out_share: float) -> Part:
    """The side of the split a document is on: a function of its content alone."""
    return "held_out" if int(digest_hex[:8], 16) < held_out_share * 2**32 else "train"


def strip_notice(code: str) -> str:
    """Without the licence notice among the comments it begins with (the same words in thousands of files)."""
    lines = code.split("\n")
    end = next((i for i, line in enumerate(lines) if line.strip() and not line.startswith("#")), len(lines))
    legal = [i for i, line in enumerate(lines[:end]) if LEGAL.search(line)]
    while legal and legal[-1] < end and lines[legal[-1]].strip():
        legal[-1] += 1  # to the end of the notice's paragraph
    return "\n".join(lines[legal[-1] :]) if legal else code


def divide_python(text: str) -> tuple[tuple[str, ...], str]:
    """Python source → (its docstrings, dedented, in order; the source without them, which still parses).

    Raises SyntaxError (or ValueError, RecursionError) as `ast.parse` does.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in other people's strings
        tree = ast.parse(text)
    lines = text.split("\n")
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found: list[tuple[ast.stmt, str, bool]] = []
    for node in ast.walk(tree):
        if isinstance(node, owners) and (passage := ast.get_docstring(node)) is not None:
            found.append((node.body[0], passage, len(node.body) == 1))
    found.sort(key=lambda item: item[0].lineno)
    for statement, _, alone in reversed(found):
        first, last = statement.lineno - 1, (statement.end_lineno or statement.lineno) - 1
        before = lines[first].encode()[: statement.col_offset].decode()
        after = lines[last].encode()[statement.end_col_offset :].decode()
        after = "" if after.lstrip().startswith("#") else after  # a linter's remark on the docstring
        kept = before.strip() or after.strip() or (alone and statement.col_offset)
        lines[first : last + 1] = [f"{before}...{after}"] if kept else []
    passages = tuple(passage for _, passage, _ in found if passage.strip())
    return passages, strip_notice("\n".join(lines)).strip() + "\n"


def divide_metadata(text: str) -> tuple[tuple[str, ...], str]:
    """A wheel's METADATA → its description (what follows the first empty line)."""
    return (text.partition("\n\n")[2].strip(),), ""


def divide_prose(text: str) -> tuple[tuple[str, ...], str]:
    """A README or a page of documentation → itself, if it is mostly words."""
    words = sum(character.isalpha() or character == " " for character in text)
    return ((text.strip(),) if words > 0.7 * len(text) else ()), ""


DIVIDERS: dict[str, Callable[[str], tuple[tuple[str, ...], str]]] = {
    "py": divide_python,
    "METADATA": divide_metadata,
    "md": divide_prose,
    "rst": divide_prose,
    "txt": divide_prose,
}


def is_document(name: str) -> bool:
    """Whether a file of this name (no folder) may hold prose or code."""
    return name.rpartition(".")[2] in DIVIDERS and (name.endswith(".py") or not SKIPPED_NAMES.search(name))


def divide(name: str, data: bytes) -> Division | None:
    """A file → its prose and its code; None if it holds neither or is not fit to learn from."""
    text = decode(data)
    if text is None:
        return None
    try:
        passages, code = DIVIDERS[name.rpartition(".")[2]](text)
    except (SyntaxError, ValueError, RecursionError):
        return None
    code = code if len(code) >= MIN_CHARACTERS else ""
    if not code and sum(map(len, passages)) < MIN_CHARACTERS:
        return None
    body = "\n".join((*passages, code))
    return Division(digest(text), sketch(body), passages, code)


class SeenDocuments:
    """Remembers documents, to drop repeated ones: exact copies, vendored copies with small changes, and
    passages that appear in several files."""

    def __init__(self) -> None:
        self._digests: set[str] = set()
        self._passages: set[str] = set()
        self._documents_of_run: dict[int, list[int]] = {}
        self._count = 0

    def is_new(self, division: Division) -> bool:
        """True, and remembers it, unless an earlier document shares half of its sketch."""
        if division.digest in self._digests:
            return False
        shared: dict[int, int] = {}
        for run in division.sketch:
            for document in self._documents_of_run.get(run, ()):
                shared[document] = shared.get(document, 0) + 1
        if max(shared.values(), default=0) * 2 >= len(division.sketch):
            return False
        self._digests.add(division.digest)
        for run in division.sketch:
            self._documents_of_run.setdefault(run, []).append(self._count)
        self._count += 1
        return True

    def new_passages(self, passages: Iterable[str]) -> list[str]:
        """Those not seen before in any file; very short ones always."""
        new = []
        for passage in passages:
            key = digest(passage)
            if len(passage) < MIN_PASSAGE or key not in self._passages:
                new.append(passage)
            self._passages.add(key)
        return new


def pack(documents: Iterable[Sequence[int]], sequence_ids: int, end_of_text: int) -> tuple[np.ndarray, int]:
    """Documents' ids, each followed by `end_of_text`, cut into consecutive rows → (tokens_NL, ids dropped).

    The incomplete tail is dropped. Rows do not overlap: a row's last id is only a target, as in open_lm.
    """
    ids = [np.append(np.asarray(document, dtype=np.int32), np.int32(end_of_text)) for document in documents]
    stream = np.concatenate(ids) if ids else np.zeros(0, np.int32)
    rows = len(stream) // sequence_ids
    return stream[: rows * sequence_ids].reshape(rows, sequence_ids), len(stream) - rows * sequence_ids


def unigram_perplexity(tokens: np.ndarray) -> float:
    """exp(entropy of the tokens' own frequencies): what the best predictor without context reaches on them."""
    counts = np.unique(tokens, return_counts=True)[1]
    shares = counts / counts.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))
