"""Rows of whole shards, each verified by its digest as it is read: nothing is trained on that a disk, its memory or
another program has damaged, whenever that was.

What is wrong is read once more: of a local shard from the disk, of a remote one from a copy that is fetched anew.
What is wrong then, too, is an UnreadableSample. A row that is never read is never looked at
(`open_lm.data.inspect --verify` reads all).
"""

import hashlib
import logging
import mmap
import os
from binascii import hexlify

import numpy as np

from open_lm.config.redact import redact
from open_lm.data.binary import BLOCK_BYTES, BinaryShard, Layout, UnreadableSample
from open_lm.data.cache import Cache, remove_open
from open_lm.data.digests import DIGITS, NAME, ROW, ROW_MARK, SHARD, SHARD_MARK, find_fault, row_start
from open_lm.data.manifest import Shard
from open_lm.data.remote import is_local, open_file

logger = logging.getLogger(__name__)


class VerifiedShard(BinaryShard):
    """The sequences of an open tar whose manifest has `row_digests`. Not for several threads: it has one buffer.

    `read_into` takes microseconds a row, so what it needs is laid out here.
    """

    def __init__(self, shard: Shard, fd: int, layout: Layout, cache: Cache):
        super().__init__(shard.url, fd, layout)
        assert shard.row_digests is not None
        self.shard = shard
        self.shard_digest = shard.row_digests
        self.cache = cache
        self.is_hopeless = False  # fetched anew, it was as wrong
        self.header = bytearray(BLOCK_BYTES)
        self.name_field, self.shard_field = (memoryview(self.header)[field] for field in (NAME, SHARD))
        self.row = np.empty(layout.sequence_tokens, self.dtype)  # of which a window is wanted
        self.row_bytes = layout.sequence_bytes
        self.member_bytes = BLOCK_BYTES + self.row_bytes
        self.begin, self.stride = row_start(layout, 0), layout.stride
        # What follows a row's digest in its header, where `gname` follows `uname`:
        self.after = bytes(ROW.stop - ROW.start - len(ROW_MARK) - DIGITS) + (
            SHARD_MARK + self.shard_digest.encode()
        ).ljust(SHARD.stop - SHARD.start, b"\0")
        self.name_end = b"_%08d." + layout.key.encode() + b"\0"

    def read_into(self, tokens: np.ndarray, i: int, start: int = 0) -> None:
        """As BinaryShard's; UnreadableSample also says what is not as the digests say. OSError: a remote shard cannot
        be fetched anew."""
        data = tokens.data
        if is_part := data.nbytes != self.row_bytes:
            data = self.row.data
        if (fault := self.read(data, i)) is not None:
            self.read_again(data, i, fault)
        if is_part:
            tokens[:] = self.row[start : start + len(tokens)]

    def read(self, data: memoryview, i: int) -> str | None:
        """Fills `data` with row i and says what is wrong with it, as `find_fault`, which is asked where a quicker look
        finds anything."""
        try:
            done = os.preadv(self.fd, (self.header, data), self.begin + i * self.stride)
        except OSError as error:
            raise self.failed(i, error) from error
        if done != self.member_bytes:
            raise self.too_short(i, max(done - BLOCK_BYTES, 0), data.nbytes)
        digest = hashlib.sha256(self.name_field)
        digest.update(self.shard_field)
        digest.update(data)
        expected = ROW_MARK + hexlify(digest.digest()[: DIGITS // 2]) + self.after
        if self.header.startswith(expected, ROW.start) and self.header.find(self.name_end % i, 0, NAME.stop + 1) >= 0:
            return None
        return find_fault(self.header + data.cast("B"), self.layout, i, self.shard_digest)

    def read_again(self, data: memoryview, i: int, fault: str) -> None:
        """Reads row i from where it is not damaged, if there is such a place. UnreadableSample."""
        place, how = f"shard {redact(self.url)}", "from the disk"
        if is_local(self.url):
            logger.warning("%s: %s: it is read once more %s", place, fault, how)
            begin = self.begin + i * self.stride
            pages = begin // mmap.PAGESIZE, -(-(begin + self.member_bytes) // mmap.PAGESIZE)  # whole: parts stay
            length = (pages[1] - pages[0]) * mmap.PAGESIZE
            os.posix_fadvise(self.fd, pages[0] * mmap.PAGESIZE, length, os.POSIX_FADV_DONTNEED)
            again = self.read(data, i)
        else:
            how = "after the shard was fetched again"
            again = fault
            if not self.is_hopeless:
                logger.warning("%s: %s: it is read once more %s", place, fault, how)
                remove_open(self.cache, self.fd)
                self.take(open_file(self.url, self.cache, self.shard.bytes, self.shard.sha256))
                again = self.read(data, i)
                self.is_hopeless = again is not None
        if again is not None:
            raise UnreadableSample(
                f"{place}: {again}, also {how}: copy or write the shard again, or its manifest, if that is of "
                "another version (python -m open_lm.data.index)"
            )
