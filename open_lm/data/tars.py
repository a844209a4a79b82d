"""The members of a tar: where they lie, found without reading them. Damage is an error, never a shorter tar."""

import mmap
import os
import re
import tarfile
from typing import NamedTuple

from open_lm.data.binary import BLOCK_BYTES, CHECKSUM, parse_octal, sum_header


class Member(NamedTuple):
    name: bytes
    offset: int
    size: int


class DamagedHeader(ValueError):
    """A header that is none, or not what its checksum says; where, and the members before it."""

    def __init__(self, offset: int, why: str, members: list[Member]):
        super().__init__(f"the header at byte {offset:,} is damaged: {why}")
        self.members = members
        self.offset = offset


def scan_members(data: mmap.mmap) -> tuple[list[Member] | None, int]:
    """The regular files of a plain tar and where its end mark should be; None if only tarfile can tell.

    Faster than tarfile on what tarfile and webdataset write: ustar, and pax without path or size. DamagedHeader.
    """
    members, offset = [], 0
    while True:
        header = data[offset : offset + BLOCK_BYTES]
        if len(header) < BLOCK_BYTES or header == bytes(BLOCK_BYTES):
            return members, offset
        if header[257:262] != b"ustar" or header[124] & 0x80:
            return None, 0
        try:
            if sum_header(header) != parse_octal(header[CHECKSUM]):
                raise ValueError("its checksum does not fit")
            size = parse_octal(header[124:136])
        except ValueError as error:
            raise DamagedHeader(offset, str(error), members) from None
        start = offset + BLOCK_BYTES
        kind = header[156:157]
        if kind in b"0\0":
            members.append(Member(header[:100].partition(b"\0")[0], start, size))
        elif kind != b"x" or re.search(rb"\d (path|size|GNU\.)", data[start : start + size]):
            return None, 0
        offset = start + -(-size // BLOCK_BYTES) * BLOCK_BYTES


def list_members(fd: int, length: int) -> tuple[list[Member], int]:
    """As `scan_members`, of any tar of `length` bytes, by the standard library."""
    members: list[Member] = []
    with os.fdopen(os.dup(fd), "rb") as file:
        file.seek(0)
        with tarfile.open(fileobj=file, mode="r:") as tar:
            try:
                for m in tar:
                    if m.size < 0 or tar.offset <= m.offset:  # the next would be this one again
                        raise DamagedHeader(m.offset, f"a size of {m.size:,} bytes", members)
                    if m.isreg():
                        members.append(Member(m.name.encode(errors="surrogateescape"), m.offset_data, m.size))
                    if m.offset_data + m.size > length:
                        return members, tar.offset
            except tarfile.TarError as error:  # of one header of several, as long names have
                raise DamagedHeader(tar.offset, str(error), members) from None
            end = tar.offset
        file.seek(end)
        header = file.read(BLOCK_BYTES)
        if len(header) == BLOCK_BYTES and any(header):  # the library takes it for the end
            raise DamagedHeader(end, "its checksum does not fit, or it is none", members)
    return members, end
