"""A digest of each row in its own tar header: each is verified before it is trained on, whether a range brought it
(`ranges`) or it lies in a whole shard (`verified`).

A header's `gname` is "shard:" and a digest of all tokens of the shard, which its manifest repeats (`row_digests`);
its `uname` is "row:" and a digest of the member's name, that gname and the row's tokens. So bytes that were damaged
on the way are seen, and rows of another place, of another shard, and of a version of the shard that is not the
manifest's. Other readers of tars take both for names of users; unknown ones give way to the numbers beside them.

A digest: the first 24 hex digits of a sha256.

Legend: N rows, B bytes of a row's tokens, H = 512 bytes of a header.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator

import numpy as np

from open_lm.data.binary import BLOCK_BYTES, Layout, parse_header

NAME = slice(0, 100)  # fields of a header
ROW = slice(265, 297)  # uname
SHARD = slice(297, 329)  # gname
ROW_MARK, SHARD_MARK = b"row:", b"shard:"
DIGITS = 24


def digest_shard(pieces: Iterable[np.ndarray]) -> str:
    """Of all tokens of a shard, given in order."""
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece.data)
    return digest.hexdigest()[:DIGITS]


def digest_row(header: bytes, data: bytes | memoryview) -> bytes:
    """What `uname` is to begin with."""
    digest = hashlib.sha256(header[NAME])
    digest.update(header[SHARD])
    digest.update(data)
    return ROW_MARK + digest.hexdigest()[:DIGITS].encode()


def add_digests_(header_NH: np.ndarray, data_NB: np.ndarray, shard_digest: str) -> None:
    """Writes both fields. The headers' own checksums are no longer theirs."""
    write_(header_NH[:, SHARD], SHARD_MARK + shard_digest.encode())
    for header_H, data_B in zip(header_NH, data_NB, strict=True):
        write_(header_H[ROW], digest_row(header_H.tobytes(), data_B.data))


def write_(field: np.ndarray, text: bytes) -> None:
    field[..., : len(text)] = np.frombuffer(text, np.uint8)


def find_shard_digest(header: bytes) -> str | None:
    """The shard's digest in a row's header; None if there is none."""
    mark, row = header[SHARD].rstrip(b"\0"), header[ROW].rstrip(b"\0")
    if not mark.startswith(SHARD_MARK) or not row.startswith(ROW_MARK):
        return None
    return mark.removeprefix(SHARD_MARK).decode(errors="replace")


def find_fault(member: bytes | memoryview, layout: Layout, i: int, shard_digest: str) -> str | None:
    """Why a header and the bytes after it are not row i of the shard with this digest, with the sample's name; None
    if they are."""
    header, data = bytes(member[:BLOCK_BYTES]), member[BLOCK_BYTES : BLOCK_BYTES + layout.sequence_bytes]
    name, size = parse_header(header)
    if size is None:
        return f"sample number {i} has a damaged header, or none"
    if not name.endswith(f"_{i:08d}.{layout.key}") or size != layout.sequence_bytes:
        expected = f"sample number {i}, a .{layout.key} of {layout.sequence_bytes:,} bytes"
        return f"in the place of {expected}, is {name} of {size:,}"
    if (found := find_shard_digest(header)) != shard_digest:
        return f"sample {name} is of a shard with the digest {found}, the manifest's row_digests is {shard_digest}"
    if (found := digest_row(header, data)) != header[ROW].rstrip(b"\0"):
        return f"sample {name}: the digest of its bytes is not the one in its header"
    return None


def find_faults(fd: int, layout: Layout, shard_digest: str) -> Iterator[str]:
    """`find_fault` of all rows of an open tar."""
    for i in range(layout.count):
        member = os.pread(fd, BLOCK_BYTES + layout.sequence_bytes, row_start(layout, i))
        if (fault := find_fault(member, layout, i, shard_digest)) is not None:
            yield fault


def find_own_faults(fd: int, layout: Layout) -> Iterator[str]:
    """Of rows whose manifest says nothing of their digests: `find_faults` where all are of one shard, else those
    whose headers are damaged, or that carry a digest and are not what it says."""
    if (digest := find_common(fd, layout)) is not None:
        yield from find_faults(fd, layout, digest)
        return
    for i in range(layout.count):
        member = os.pread(fd, BLOCK_BYTES + layout.sequence_bytes, row_start(layout, i))
        header, data = member[:BLOCK_BYTES], member[BLOCK_BYTES:]
        name, size = parse_header(header)
        if header[257:262] == b"ustar" and size is None:
            yield f"sample number {i} has a damaged header"
        elif find_shard_digest(header) is not None and digest_row(header, data) != header[ROW].rstrip(b"\0"):
            yield f"sample {name}: the digest of its bytes is not the one in its header"


def find_common(fd: int, layout: Layout) -> str | None:
    """The shard's digest that every row carries; None if any carries none or another one."""
    headers = (os.pread(fd, BLOCK_BYTES, row_start(layout, i)) for i in range(layout.count))
    found = {find_shard_digest(header) for header in headers}
    return found.pop() if len(found) == 1 else None


def find_digests(fd: int, layout: Layout) -> str | None:
    """The digest of a shard of which every row carries one; None if any carries none or another shard's.

    ValueError: a row is not what its digest says.
    """
    digest = find_common(fd, layout)
    if digest is not None and (fault := next(find_faults(fd, layout, digest), None)) is not None:
        raise ValueError(fault)
    return digest


def row_start(layout: Layout, i: int) -> int:
    """Where the header of row i begins."""
    return layout.first_offset + i * layout.stride - BLOCK_BYTES
