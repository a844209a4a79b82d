"""Token sequences to tar shards with a manifest, byte for byte the same for the same tokens.

A tar is USTAR without times or owners. Members `.u16` or `.u32` are raw little-endian ids, equally long, so that
a manifest can say where each lies (open_lm.data.binary), and their headers hold digests of them
(open_lm.data.digests); `.json.gz` is what open_lm reads.

Legend: N sequences, L ids in a sequence (seq_len + 1), R bytes from one binary member's header to the next.
"""

import gzip
import hashlib
import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from open_lm.data.binary import BLOCK_BYTES, CHECKSUM, DTYPES
from open_lm.data.digests import add_digests_, digest_shard

CHUNK_BYTES = 2**24


def choose_key(vocab_size: int) -> str:
    """The narrowest binary key whose members hold every id of the vocabulary."""
    return "u16" if vocab_size <= 2**16 else "u32"


def write_shards(
    folder: Path, tokens_NL: np.ndarray, sequences_per_shard: int, key: str = "json.gz"
) -> list[dict]:
    """tokens_NL → `folder`/shard_00000000.tar … and manifest.jsonl, whose lines it returns.

    Raises ValueError without sequences, and as `write_shard`.
    """
    if not len(tokens_NL):
        raise ValueError(f"{folder}: no sequence of {tokens_NL.shape[1]} ids to write; give it more text")
    folder.mkdir(parents=True, exist_ok=True)
    manifest = [
        write_shard(folder, number, tokens_NL[start : start + sequences_per_shard], key)
        for number, start in enumerate(range(0, len(tokens_NL), sequences_per_shard))
    ]
    (folder / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in manifest))
    return manifest


def write_shard(folder: Path, number: int, tokens_NL: np.ndarray, key: str) -> dict:
    """tokens_NL → `folder`/shard_<number>.tar of samples <number>_<row>.<key>; returns its manifest line.

    Raises ValueError for an unknown key and ids that the key cannot hold.
    """
    if key not in (*DTYPES, "json.gz"):
        raise ValueError(f"shards of .{key} members cannot be written: take {', '.join(DTYPES)} or json.gz")
    name = f"shard_{number:08d}"
    digest, size = hashlib.sha256(), 0
    pieces, layout = pack(number, tokens_NL, key)
    with open(folder / f"{name}.tar", "wb") as file:
        for piece in pieces:
            file.write(piece)
            digest.update(piece)
            size += len(piece)
    sequences, tokens = tokens_NL.shape
    return {
        "shard": name,
        "num_sequences": sequences,
        "tokens": sequences * tokens,
        "bytes": size,
        "sha256": digest.hexdigest(),
        "sequence_tokens": tokens,
        **layout,
    }


def pack(number: int, tokens_NL: np.ndarray, key: str) -> tuple[Iterator[bytes], dict]:
    """A shard's bytes in pieces, and how its members lie: {"data_key", of binary ones "first_offset", "stride", in
    bytes, and "row_digests"}."""
    if key not in DTYPES:
        return pack_json(number, tokens_NL), {"data_key": key}
    layout = {"first_offset": BLOCK_BYTES, "stride": find_stride(tokens_NL.shape[1], key)}
    digest = digest_shard(narrow(number, tokens_NL, key))
    return pack_binary(number, tokens_NL, key, digest), {"data_key": key, **layout, "row_digests": digest}


def pack_tar(tokens_NL: np.ndarray, number: int, format: str) -> tuple[bytes, dict]:
    """A whole shard and its layout, as `pack`; `binary` takes the key of the ids' dtype."""
    key = f"u{8 * tokens_NL.itemsize}" if format == "binary" else format
    pieces, layout = pack(number, tokens_NL, key)
    return b"".join(pieces), layout


def find_stride(sequence_tokens: int, key: str) -> int:
    """Bytes from one binary member to the next: a header, and the ids filled up to whole blocks."""
    return BLOCK_BYTES + -(-sequence_tokens * DTYPES[key].itemsize // BLOCK_BYTES) * BLOCK_BYTES


def narrow(number: int, tokens_NL: np.ndarray, key: str) -> Iterator[np.ndarray]:
    """The rows as the key's dtype, a few megabytes at a time. ValueError: ids that it cannot hold."""
    dtype = DTYPES[key]
    at_once = max(1, CHUNK_BYTES // find_stride(tokens_NL.shape[1], key))
    for first in range(0, len(tokens_NL), at_once):
        chunk_NL = tokens_NL[first : first + at_once]
        if chunk_NL.min(initial=0) < 0 or chunk_NL.max(initial=0) > np.iinfo(dtype).max:
            raise ValueError(
                f"shard {number}: ids {chunk_NL.min()} … {chunk_NL.max()} do not fit .{key} members (0 … "
                f"{np.iinfo(dtype).max:,})"
            )
        yield np.ascontiguousarray(chunk_NL, dtype=dtype)


def pack_binary(number: int, tokens_NL: np.ndarray, key: str, digest: str) -> Iterator[bytes]:
    """The bytes of a tar of equally long binary members, a few megabytes at a time; `digest` is the shard's."""
    sequences, length = tokens_NL.shape
    stride, first = find_stride(length, key), 0
    for ids_NL in narrow(number, tokens_NL, key):
        block_NR = np.zeros((len(ids_NL), stride), dtype=np.uint8)
        data_NB = ids_NL.view(np.uint8)
        headers_NH = make_headers(number, first, len(ids_NL), data_NB.shape[1], key)
        add_digests_(headers_NH, data_NB, digest)
        add_checksums_(headers_NH)
        block_NR[:, :BLOCK_BYTES] = headers_NH
        block_NR[:, BLOCK_BYTES : BLOCK_BYTES + data_NB.shape[1]] = data_NB
        yield block_NR.tobytes()
        first += len(ids_NL)
    yield end_mark(sequences * stride)


def make_headers(number: int, first: int, count: int, size: int, key: str) -> np.ndarray:
    """(count, 512): headers of the members <number>_<first>.<key> and on, `size` bytes each, without checksums."""
    member = tarfile.TarInfo(f"{number:08d}_{0:08d}.{key}")
    member.size = size
    header = np.frombuffer(member.tobuf(tarfile.USTAR_FORMAT), dtype=np.uint8)
    header_NH = np.repeat(header[None], count, axis=0)
    row_N = np.arange(first, first + count)
    if first + count > 10**8:
        raise ValueError(f"shard {number}: {first + count:,} sequences; a shard's names count to 99,999,999")
    for digit in range(8):
        header_NH[:, 9 + digit] = ord("0") + row_N // 10 ** (7 - digit) % 10
    return header_NH


def add_checksums_(header_NH: np.ndarray) -> None:
    """Each header's own checksum: the sum of its bytes, itself taken as blanks."""
    header_NH[:, CHECKSUM] = ord(" ")
    sum_N = header_NH.sum(axis=1, dtype=np.int64)
    for digit in range(6):
        header_NH[:, CHECKSUM.start + digit] = ord("0") + (sum_N >> 3 * (5 - digit)) % 8
    header_NH[:, CHECKSUM.start + 6] = 0


def pack_json(number: int, tokens_NL: np.ndarray) -> Iterator[bytes]:
    """The bytes of a tar of gzipped JSON lists, a member at a time."""
    written = 0
    for row, sequence_L in enumerate(tokens_NL):
        data = gzip.compress(json.dumps(sequence_L.tolist()).encode(), compresslevel=6, mtime=0)
        member = tarfile.TarInfo(f"{number:08d}_{row:08d}.json.gz")
        member.size = len(data)
        buffer = io.BytesIO()
        buffer.write(member.tobuf(tarfile.USTAR_FORMAT))
        buffer.write(data)
        buffer.write(bytes(-len(data) % BLOCK_BYTES))
        written += buffer.tell()
        yield buffer.getvalue()
    yield end_mark(written)


def end_mark(written: int) -> bytes:
    """Two empty blocks, filled up to tar's record of 20 blocks."""
    return bytes(2 * BLOCK_BYTES + -(written + 2 * BLOCK_BYTES) % tarfile.RECORDSIZE)
