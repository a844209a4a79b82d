"""Tar shards whose members are equally long arrays of token ids (`.u16`, `.u32`): read without an index.

Sequence i lies at first_offset + i * stride, so one `pread` fetches it, straight into its row of the batch. Not
mapped into memory: a file that shrinks or a disk that fails is then an OSError or ValueError with the shard's
name, not a SIGBUS, and the resident memory of a process does not grow with what it has read.

Legend: L tokens of a stored sequence.
"""

import os
import weakref
from typing import NamedTuple

import numpy as np

from open_lm.config.redact import redact
from open_lm.data.manifest import Shard

CUT_SHORT = (
    "it is cut short: copy or write it again; with a manifest, --ignore-parse-errors takes what is there"
)
DTYPES = {"u16": np.dtype("<u2"), "u32": np.dtype("<u4")}
BLOCK_BYTES = 512  # of a tar: a header, and what members are padded to
CHECKSUM = slice(148, 156)  # of a header


class UnreadableSample(ValueError):
    """A member that is no list of whole numbers; says which."""


class Layout(NamedTuple):
    """Where the sequences of a tar lie, in bytes, if all are equally long and equally far from each other."""

    key: str
    count: int
    sequence_tokens: int
    first_offset: int
    stride: int

    @property
    def sequence_bytes(self) -> int:
        """Bytes of a sequence."""
        return self.sequence_tokens * DTYPES[self.key].itemsize

    @property
    def end(self) -> int:
        """Where the last sequence ends."""
        return self.first_offset + (self.count - 1) * self.stride + self.sequence_bytes if self.count else 0


def promised_layout(shard: Shard) -> Layout | None:
    """What the manifest says of where the sequences lie; None unless it says all of it.

    ValueError names the shard if sequences would overlap.
    """
    numbers = (shard.sequence_tokens, shard.first_offset, shard.stride)
    if shard.data_key not in DTYPES or None in numbers:
        return None
    layout = Layout(shard.data_key, shard.num_sequences, *numbers)  # pyright: ignore[reportArgumentType]
    if layout.first_offset < BLOCK_BYTES or layout.stride < BLOCK_BYTES + layout.sequence_bytes:
        raise ValueError(
            f"shard {redact(shard.url)}: the manifest's first_offset "
            f"{layout.first_offset} and stride {layout.stride} "
            f"cannot hold headers of {BLOCK_BYTES} and sequences of {layout.sequence_bytes} bytes"
        )
    return layout


def found_layout(key: str, offset_N: np.ndarray, size_N: np.ndarray) -> Layout | None:
    """The layout of members at these offsets; None if they are not alike."""
    size = int(size_N[0]) if len(size_N) else 0
    strides = np.diff(offset_N)
    if size == 0 or size % DTYPES[key].itemsize or (size_N != size).any() or (strides != strides[:1]).any():
        return None
    stride = int(strides[0]) if len(strides) else BLOCK_BYTES + -(-size // BLOCK_BYTES) * BLOCK_BYTES
    return Layout(key, len(offset_N), size // DTYPES[key].itemsize, int(offset_N[0]), stride)


def check_layout(
    fd: int, shard: Shard, layout: Layout, cut_short: bool = False, damaged: bool = False
) -> None:
    """ValueError, naming the shard, unless the file is as long as the manifest says, its first and last members
    are where they should be, and nothing follows. With `cut_short` a file that is too short will do, with `damaged`
    headers that are none: who reads the row will see."""
    length = os.fstat(fd).st_size
    if cut_short and length < max(layout.end, shard.bytes or 0):
        return
    if shard.bytes not in (None, length):
        raise ValueError(
            f"shard {redact(shard.url)}: the manifest says {shard.bytes:,} bytes, the tar has {length:,}: "
            + (f"{CUT_SHORT}; or it is" if length < (shard.bytes or 0) else "it is")
            + " another one than the manifest describes"
        )
    if length < layout.end:
        raise ValueError(
            f"shard {redact(shard.url)}: the manifest's {layout.count:,} sequences end at byte {layout.end:,}, "
            f"the tar has {length:,}: {CUT_SHORT}"
        )
    for sequence in sorted({0, layout.count - 1}) if layout.count else ():
        name, size = read_header(fd, layout.first_offset + sequence * layout.stride)
        if size is None and (damaged or (shard.row_digests is not None and is_spoiled(fd, layout, sequence))):
            continue
        if size != layout.sequence_bytes or not name.endswith(f".{layout.key}"):
            found = "no member" if size is None else f"{name} of {size:,} bytes"
            raise ValueError(
                f"shard {redact(shard.url)}: the manifest promises sequence "
                f"{sequence:,} as a .{layout.key} member of "
                f"{layout.sequence_bytes:,} bytes, there is {found}: the tar is damaged, or the manifest "
                "is not this tar's (python -m open_lm.data.index writes one)"
            )
    following, _ = (
        read_header(fd, layout.first_offset + layout.count * layout.stride) if layout.count else ("", 0)
    )
    if following:
        raise ValueError(
            f"shard {redact(shard.url)}: the manifest says {layout.count:,} sequences, "
            f"the tar goes on with {following}"
        )


def is_spoiled(fd: int, layout: Layout, sequence: int) -> bool:
    """Whether what should be the sequence's header was one of a row with a digest."""
    header = os.pread(fd, BLOCK_BYTES, layout.first_offset + sequence * layout.stride - BLOCK_BYTES)
    return header[257:262] == b"ustar" or header[265:269] == b"row:"


def read_header(fd: int, offset: int) -> tuple[str, int | None]:
    """Name and size of the member whose content begins at `offset`; ("", None) if there is no header before."""
    return parse_header(os.pread(fd, BLOCK_BYTES, offset - BLOCK_BYTES))


def parse_header(header: bytes) -> tuple[str, int | None]:
    """Name and size of a tar's member; ("", None) if this is no header, or one that its checksum does not fit."""
    try:
        if header[257:262] != b"ustar" or sum_header(header) != parse_octal(header[CHECKSUM]):
            return "", None
        return header[:100].partition(b"\0")[0].decode(errors="replace"), parse_octal(header[124:136])
    except ValueError:
        return "", None


def parse_octal(field: bytes) -> int:
    """A number of a tar's header. ValueError: it is none, or less than 0."""
    digits = field.strip(b"\0 ")
    if digits.translate(None, b"01234567"):
        raise ValueError(f"{field!r} is no octal number")
    return int(digits or b"0", 8)


def sum_header(header: bytes) -> int:
    """The checksum of a tar's header: of its bytes, where its own are taken as blanks."""
    return sum(header) - sum(header[CHECKSUM]) + 8 * ord(" ")


class BinarySequences:
    """The sequences of one tar of binary members: `len(shard)`, `shard[i]` → int64 array of token ids, and
    `read_into`. Not an ABC: `isinstance` would take a tenth of the time that a short row has."""

    def __init__(self, url: str, layout: Layout):
        self.url = url
        self.layout = layout
        self.sequence_tokens = layout.sequence_tokens
        self.dtype = DTYPES[layout.key]

    def __len__(self) -> int:
        return self.layout.count

    def __getitem__(self, i: int) -> np.ndarray:
        tokens_L = np.empty(self.layout.sequence_tokens, dtype=self.dtype)
        self.read_into(tokens_L, i)
        return tokens_L.astype(np.int64)

    def read_into(self, tokens: np.ndarray, i: int, start: int = 0) -> None:
        """Fills a contiguous array of the shard's dtype with the tokens of sequence i from `start` on."""
        raise NotImplementedError

    def name(self, i: int) -> str:
        """The sample's member name."""
        raise NotImplementedError

    def close(self) -> None:
        """Releases what the shard holds."""
        raise NotImplementedError


class BinaryShard(BinarySequences):
    """The sequences of an open tar. `close()`, or the shard's end, releases the file."""

    def __init__(self, url: str, fd: int, layout: Layout):
        super().__init__(url, layout)
        self.fd = fd
        self.release = weakref.finalize(self, os.close, fd)

    def take(self, fd: int) -> None:
        """Reads this file from now on."""
        self.release()
        self.fd = fd
        self.release = weakref.finalize(self, os.close, fd)

    def close(self) -> None:
        self.release()

    def read_into(self, tokens: np.ndarray, i: int, start: int = 0) -> None:
        """Fills a contiguous array of the shard's dtype with the tokens of sequence i from `start` on.

        UnreadableSample names the shard and the sample if the file ends before; OSError the shard.
        """
        _, _, _, first_offset, stride = self.layout
        try:
            done = os.preadv(self.fd, (tokens.data,), first_offset + i * stride + start * tokens.itemsize)
        except OSError as error:
            raise self.failed(i, error) from error
        if done != tokens.nbytes:
            raise self.too_short(i, done, tokens.nbytes)

    def failed(self, i: int, error: OSError) -> OSError:
        """The error, with the shard and the sample."""
        return OSError(f"shard {redact(self.url)}: sample {self.name(i)}: {error}")

    def too_short(self, i: int, found: int, expected: int) -> UnreadableSample:
        """Of a sample of which so many bytes are there."""
        return UnreadableSample(
            f"shard {redact(self.url)}: sample {self.name(i)} cannot be read: {found} bytes of {expected}: "
            "the file has become shorter"
        )

    def name(self, i: int) -> str:
        """The sample's member name."""
        try:
            return read_header(self.fd, self.layout.first_offset + i * self.layout.stride)[0] or f"number {i}"
        except OSError:
            return f"number {i}"
