"""Which part and which bucket a document belongs to: functions of its text, its place and the seed.

Bucket and order: a document's key is 64 bits of BLAKE2b of (seed, source, file, position, copy); documents are
globally in the order of their keys, and bucket b of n holds the keys from b/n to (b+1)/n of the range.
"""

import hashlib
from dataclasses import dataclass

PARTS = ("train", "held_out")
RANGE = 2**64


@dataclass(frozen=True)
class Split:
    """What decides: sampling rate of each source, share held out, seed, buckets of each part."""

    rates: tuple[float, ...]
    held_out_share: float
    seed: int
    buckets: tuple[int, int]

    @property
    def slots(self) -> int:
        """Buckets of all parts."""
        return sum(self.buckets)


def choose(data: bytes, source: int, split: Split) -> tuple[str, int]:
    """A document's part (by its bytes alone) and the number of its copies (by its bytes and the seed)."""
    digest = hashlib.blake2b(data, digest_size=16).digest()
    held_out = int.from_bytes(digest[:8], "big") < split.held_out_share * RANGE
    whole, share = divmod(split.rates[source], 1)
    copies = int(whole)
    if share:
        drawn = hashlib.blake2b(
            digest[8:], digest_size=8, salt=split.seed.to_bytes(8, "big", signed=True)
        ).digest()
        copies += int.from_bytes(drawn, "big") < share * RANGE
    return ("held_out", min(copies, 1)) if held_out else ("train", copies)


def order_key(source: int, file: int, position: str, copy: int, seed: int) -> int:
    """64 bits in whose order documents come."""
    name = f"{seed}/{source}/{file}/{position}/{copy}".encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "big")


def find_slot(part: str, key: int, split: Split) -> int:
    """The bucket, counted through all parts."""
    buckets = split.buckets[PARTS.index(part)]
    return (key * buckets >> 64) + (split.buckets[0] if part == "held_out" else 0)
