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


def add_sample(tar: tarfile.TarFile, name: str, sequence_L: np.ndarray) -> None:
    """Append one member: the ids as gzipped JSON, without time or owner."""
    data = gzip.compress(json.dumps(sequence_L.tolist()).encode(), compresslevel=6, mtime=0)
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))
