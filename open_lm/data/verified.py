"""Rows of whole shards, each verified by its digest as it is read: nothing is trained on that a disk, its cache in
memory or another program has damaged, whenever that was.

What is wrong is read once more: of a local shard from the disk, of a remote one from a copy that is fetched anew.
What is wrong then, too, is an UnreadableSample. A row that is never read is never looked at
(`open_lm.data.inspect --verify` reads all).
"""

import logging
import mmap
import os
from binascii import hexlify
from hashlib import sha256

import numpy as np

from open_lm.config.redact import redact
from open_lm.data.binary import BLOCK_BYTES, BinaryShard, Layout, UnreadableSample
from open_lm.data.cache import Cache, remove_open
from open_lm.data.digests import DIGITS, NAME, ROW, ROW_MARK, SHARD, SHARD_MARK, find_fault, row_start
from open_lm.data.manifest import Shard
from open_lm.data.remote import is_local, open_file

logger = logging.getLogger(__name__)

DIGEST_BYTES = DIGITS // 2


class VerifiedShard(BinaryShard):
    """The sequences of an open tar whose manifest has `row_digests`. Not for several threads: it has one buffer.

    A short row takes 3 µs, so all that is the same for every row is laid out here.
    """

    def __init__(self, shard: Shard, fd: int, layout: Layout, cache: Cache):
        super().__init__(shard.url, fd, layout)
        assert shard.row_digests is not None
        self.shard = shard
        self.shard_digest = shard.row_digests
        self.cache = cache
        self.is_hopeless = False  # fetched anew, it was as wrong
        self.begin, self.stride = row_start(layout, 0), layout.stride
        self.member = bytearray(BLOCK_BYTES + layout.sequence_bytes)  # a header and its row
        fields = memoryview(self.member)
        self.name_field, self.shard_field, self.data = fields[NAME], fields[SHARD], fields[BLOCK_BYTES:]
        self.tokens_L = np.frombuffer(self.data, self.dtype)
        # What follows a row's digest in its header, up to the end of `gname`, which comes after `uname`:
        rest = SHARD_MARK + self.shard_digest.encode()
        self.after = bytes(ROW.stop - ROW.start - len(ROW_MARK) - DIGITS) + rest.ljust(
            SHARD.stop - SHARD.start, b"\0"
        )
        self.name_end = b"_%08d." + layout.key.encode() + b"\0"

    def read_into(self, tokens: np.ndarray, i: int, start: int = 0) -> None:
        """As BinaryShard's; UnreadableSample also says what is not as the digests say. OSError: a remote shard
        cannot be fetched anew."""
        if (fault := self.read(i)) is not None:
            self.read_again(i, fault)
        tokens[:] = self.tokens_L[start : start + len(tokens)]

    def read(self, i: int) -> str | None:
        """Reads row i into the buffer and says what is wrong with it, as `find_fault`, which is asked where a
        quicker look finds anything."""
        member = self.member
        try:
            done = os.preadv(self.fd, (member,), self.begin + i * self.stride)
        except OSError as error:
            raise self.failed(i, error) from error
        if done != len(member):
            raise self.too_short(i, max(done - BLOCK_BYTES, 0), len(self.data))
        digest = sha256(self.name_field)
        digest.update(self.shard_field)
        digest.update(self.data)
        expected = ROW_MARK + hexlify(digest.digest()[:DIGEST_BYTES]) + self.after
        if member.startswith(expected, ROW.start) and member.find(self.name_end % i, 0, NAME.stop + 1) >= 0:
            return None
        return find_fault(bytes(member), self.layout, i, self.shard_digest)

    def read_again(self, i: int, fault: str) -> None:
        """Reads row i from where it is not damaged, if there is such a place. UnreadableSample."""
        place, again = f"shard {redact(self.url)}", fault
        where = "from the disk" if is_local(self.url) else "after the shard was fetched again"
        if not self.is_hopeless:
            logger.warning("%s: %s: it is read once more, %s", place, fault, where)
            self.renew(i)
            again = self.read(i)
        if again is not None:
            self.is_hopeless = not is_local(self.url)  # not fetched for every row of it
            raise UnreadableSample(
                f"{place}: {again}, also {where}: copy or write the shard again, or its manifest, if that is of "
                "another version (python -m open_lm.data.index)"
            )

    def renew(self, i: int) -> None:
        """Forgets what memory holds of row i; of a remote shard, the whole copy, which is fetched again."""
        if is_local(self.url):
            begin = self.begin + i * self.stride
            first, end = begin // mmap.PAGESIZE, -(-(begin + len(self.member)) // mmap.PAGESIZE)
            length = (end - first) * mmap.PAGESIZE  # whole pages: parts of them would stay
            if hasattr(os, "posix_fadvise"):  # not on macOS
                os.posix_fadvise(self.fd, first * mmap.PAGESIZE, length, os.POSIX_FADV_DONTNEED)
        else:
            remove_open(self.cache, self.fd)
            self.take(open_file(self.url, self.cache, self.shard.bytes, self.shard.sha256))
