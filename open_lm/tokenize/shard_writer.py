"""Token sequences to tar shards with a manifest, byte for byte the same for the same tokens.

Legend: N sequences, L ids in a sequence (seq_len + 1).
"""

import gzip
import io
import json
import tarfile
from pathlib import Path

import numpy as np


def write_shards(folder: Path, tokens_NL: np.ndarray, sequences_per_shard: int) -> list[dict]:
    """tokens_NL → `folder`/shard_00000000.tar … of `<key>.json.gz` samples, and manifest.jsonl.

    Returns the manifest's lines, {"shard": name, "num_sequences": count}. Raises ValueError without sequences.
    """
    if not len(tokens_NL):
        raise ValueError(f"{folder}: no sequence of {tokens_NL.shape[1]} ids to write; give it more text")
    folder.mkdir(parents=True, exist_ok=True)
    manifest = []
    for shard, start in enumerate(range(0, len(tokens_NL), sequences_per_shard)):
        sequences = tokens_NL[start : start + sequences_per_shard]
        name = f"shard_{shard:08d}"
        with tarfile.open(folder / f"{name}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for row, sequence in enumerate(sequences):
                add_sample(tar, f"{shard:08d}_{row:08d}.json.gz", sequence)
        manifest.append({"shard": name, "num_sequences": len(sequences)})
    (folder / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in manifest))
    return manifest


def pack_tar(tokens_NL: np.ndarray, shard: int, format: str) -> tuple[bytes, dict]:
    """A whole shard and how its members lie: {"data_key", and for `binary` "first_offset", "stride" in bytes}.

    `binary`: each member is the raw ids as they are in tokens_NL (little-endian uint16 or uint32).
    """
    if format == "json.gz":
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for row, sequence in enumerate(tokens_NL):
                add_sample(tar, f"{shard:08d}_{row:08d}.json.gz", sequence)
        return buffer.getvalue(), {"data_key": "json.gz"}
    key, size = f"u{8 * tokens_NL.itemsize}", tokens_NL.shape[1] * tokens_NL.itemsize
    stride = tarfile.BLOCKSIZE * (1 + -(-size // tarfile.BLOCKSIZE))
    end = len(tokens_NL) * stride
    data = bytearray(-(-(end + 2 * tarfile.BLOCKSIZE) // tarfile.RECORDSIZE) * tarfile.RECORDSIZE)
    for row, sequence_L in enumerate(tokens_NL):
        member = tarfile.TarInfo(f"{shard:08d}_{row:08d}.{key}")
        member.size = size
        start = row * stride + tarfile.BLOCKSIZE
        data[start - tarfile.BLOCKSIZE : start] = member.tobuf(tarfile.USTAR_FORMAT)
        data[start : start + size] = sequence_L.tobytes()
    return bytes(data), {"data_key": key, "first_offset": tarfile.BLOCKSIZE, "stride": stride}


def add_sample(tar: tarfile.TarFile, name: str, sequence_L: np.ndarray) -> None:
    """Append one member: the ids as gzipped JSON, without time or owner."""
    data = gzip.compress(json.dumps(sequence_L.tolist()).encode(), compresslevel=6, mtime=0)
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))
