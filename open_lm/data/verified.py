"""Rows of whole shards, each verified by its digest as it is read: nothing is trained on that a disk, its cache in
memory or another program has damaged, whenever that was.

What is wrong, missing, or cannot be read is read again: of a local shard from the disk, or from the file that has
taken its place, of a remote one from a copy that is fetched anew. What is wrong then, too, is an UnreadableSample.
A row that is never read is never looked at (`open_lm.data.inspect --verify` reads all).
"""

import logging
import mmap
import os
import threading
from binascii import hexlify
from contextlib import suppress
from hashlib import sha256

import numpy as np

from open_lm.config.redact import redact
from open_lm.data.binary import BLOCK_BYTES, BinaryShard, Layout, UnreadableSample
from open_lm.data.cache import Cache, remove_open
from open_lm.data.digests import DIGITS, NAME, ROW, ROW_MARK, SHARD, SHARD_MARK, find_fault, row_start
from open_lm.data.manifest import Shard
from open_lm.data.remote import WrongFile, is_local, open_file

logger = logging.getLogger(__name__)

DIGEST_BYTES = DIGITS // 2
SHORT = "the file is cut short"
LOOKS = 3
"""At a local row that is not there or cannot be read: a file that is being copied lacks it for a moment, and
network disks forget one that was replaced."""


class VerifiedShard(BinaryShard):
    """The sequences of an open tar whose manifest has `row_digests`. Not for several threads: it has one buffer.

    A short row takes 3 µs, so all that is the same for every row is laid out here.
    """

    def __init__(self, shard: Shard, fd: int, layout: Layout, cache: Cache, takes_any: bool = False):
        super().__init__(shard.url, fd, layout)
        assert shard.row_digests is not None
        self.shard = shard
        self.shard_digest = shard.row_digests
        self.cache = cache
        self.takes_any = takes_any
        """Whether a file that is not the manifest's will do, for its good rows."""
        self.is_hopeless = False  # a row of it was as wrong the second time
        self.was_named = False
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
        fault, _ = self.read(i)
        if fault is not None:
            self.read_again(i)
        tokens[:] = self.tokens_L[start : start + len(tokens)]

    def read(self, i: int) -> tuple[str | None, bool]:
        """Reads row i into the buffer. (What is wrong with it, as `find_fault`, which is asked where a quicker look
        finds anything; whether that may pass by itself.)"""
        member = self.member
        try:
            done = os.preadv(self.fd, (member,), self.begin + i * self.stride)
        except OSError as error:
            return f"sample number {i} cannot be read: {error.strerror or error}", True
        if done != len(member):
            there = max(done - BLOCK_BYTES, 0)
            return f"sample number {i} cannot be read: {there} bytes of {len(self.data)}: {SHORT}", True
        digest = sha256(self.name_field)
        digest.update(self.shard_field)
        digest.update(self.data)
        expected = ROW_MARK + hexlify(digest.digest()[:DIGEST_BYTES]) + self.after
        if member.startswith(expected, ROW.start) and member.find(self.name_end % i, 0, NAME.stop + 1) >= 0:
            return None, False
        return find_fault(bytes(member), self.layout, i, self.shard_digest), False

    def read_again(self, i: int) -> None:
        """Reads row i from where it is not damaged, if there is such a place. UnreadableSample."""
        place, patience = f"shard {redact(self.url)}", self.cache.patience
        where = "from the disk" if is_local(self.url) else "after the shard was fetched again"
        fault, may_pass = self.read(i)
        for look in range(1, LOOKS + 1):
            if fault is None:
                return
            if not self.was_named:
                logger.warning("%s: %s: it is read once more, %s (further ones of this shard are not named here)",
                               place, fault, where)  # fmt: skip
                self.was_named = True
            if look > 1:
                (patience.stop or threading.Event()).wait(patience.wait_seconds(look - 1))
            self.renew(i)
            fault, may_pass = self.read(i)
            if self.is_hopeless or not may_pass or not is_local(self.url):
                break
        if fault is not None:
            self.is_hopeless = True
            raise UnreadableSample(f"{place}: {fault}, also {where}: {remedy(fault)}")

    def renew(self, i: int) -> None:
        """Forgets what memory holds of row i, or takes the file that is now in the place of this one; of a remote
        shard, whose copy it removes, one that is fetched, once."""
        if not is_local(self.url):
            if not self.is_hopeless:
                remove_open(self.cache, self.fd)
                try:
                    self.take(open_file(self.url, self.cache, self.shard.bytes, self.shard.sha256))
                except WrongFile:
                    if not self.takes_any:
                        raise
            return
        with suppress(OSError):  # what the row says then is the fault
            if not os.path.samestat(os.stat(self.url.removeprefix("file://")), os.fstat(self.fd)):
                self.take(open_file(self.url, self.cache))
        begin = self.begin + i * self.stride
        first, end = begin // mmap.PAGESIZE, -(-(begin + len(self.member)) // mmap.PAGESIZE)
        length = (end - first) * mmap.PAGESIZE  # whole pages: parts of them would stay
        with suppress(OSError, AttributeError):  # not on macOS
            os.posix_fadvise(self.fd, first * mmap.PAGESIZE, length, os.POSIX_FADV_DONTNEED)


def remedy(fault: str) -> str:
    """What to do about it."""
    if "is of a shard with the digest" in fault:
        return "put the manifest's own shard there, or write the manifest anew (python -m open_lm.data.index)"
    return "copy the shard again, or remove it and run open_lm.tokenize again"
