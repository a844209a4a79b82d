import gc
import gzip
import hashlib
import io
import json
import os
import tarfile

import numpy as np
import pytest
import webdataset

from open_lm.config import DataConfig
from open_lm.config.data import DATA_KEYS
from open_lm.data.batches import make_batch
from open_lm.data.binary import BinaryShard
from open_lm.data.loader import TrainData, ValData
from open_lm.data.manifest import read_manifest
from open_lm.data.reader import Rows
from open_lm.data.shards import DECODERS, ShardReader, open_shard
from open_lm.tokenize.shard_writer import write_shards

LENGTH, VOCAB = 9, 1000


@pytest.fixture
def tokens_NL():
    return np.random.default_rng(0).integers(0, VOCAB, (50, LENGTH))


@pytest.fixture
def source(tmp_path, tokens_NL):
    """50 sequences in three shards of u16 members: the folder."""
    write_shards(tmp_path / "source", tokens_NL, 20, key="u16")
    return tmp_path / "source"


def change(folder, **fields):
    """The first line of the manifest with other values (None: without)."""
    lines = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    lines[0] = {key: value for key, value in (lines[0] | fields).items() if value is not None}
    (folder / "manifest.jsonl").write_text("\n".join(map(json.dumps, lines)))


def read_all(path, key="auto", length=LENGTH, vocab_size=VOCAB, **options):
    batches = ValData(str(path), key, length - 1, vocab_size, **options).batches(7)
    return np.concatenate(
        [np.concatenate((b.tokens_BS.numpy(), b.targets_BS.numpy()[:, -1:]), 1) for b in batches if b]
    )


@pytest.mark.filterwarnings(
    "ignore:unclosed:ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)
@pytest.mark.parametrize("key", ["u16", "u32", "json.gz"])
@pytest.mark.parametrize("shape", [(1, 1), (50, LENGTH), (3, 256), (300, 257)])
def test_shards_read_back_as_written_here_and_by_webdataset(tmp_path, key, shape):
    tokens_NL = np.random.default_rng(1).integers(0, 2**16 if key == "u16" else 2**20, shape)
    lines = write_shards(tmp_path, tokens_NL, 200, key)
    shards = read_manifest(f"{tmp_path}/manifest.jsonl").shards
    assert [(shard.num_sequences, shard.data_key) for shard in shards] == [
        (line["num_sequences"], key) for line in lines
    ]
    assert sum(line["tokens"] for line in lines) == tokens_NL.size
    readers = [open_shard(shard) for shard in shards]
    assert all(isinstance(reader, ShardReader if key == "json.gz" else BinaryShard) for reader in readers)
    np.testing.assert_array_equal([reader[i] for reader in readers for i in range(len(reader))], tokens_NL)
    for reader in readers:
        reader.close()
    tars = [str(path) for path in sorted(tmp_path.glob("*.tar"))]
    samples = list(webdataset.WebDataset(tars, shardshuffle=False, empty_check=False))
    gc.collect()  # webdataset leaves files open
    if key == "json.gz":
        read = [json.loads(gzip.decompress(sample["json.gz"])) for sample in samples]
    else:
        read = [np.frombuffer(sample[key], f"<u{int(key[1:]) // 8}") for sample in samples]
    np.testing.assert_array_equal(read, tokens_NL)
    assert len({sample["__key__"] for sample in samples}) == len(tokens_NL)


def test_binary_tars_are_those_of_the_standard_library(tmp_path, tokens_NL):
    (line,) = write_shards(tmp_path, tokens_NL, 100, key="u16")
    content_NB = tokens_NL.astype("<u2").view(np.uint8)
    assert line["row_digests"] == hashlib.sha256(content_NB.tobytes()).hexdigest()[:24]
    with tarfile.open(tmp_path / "expected.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for row, content_B in enumerate(content_NB):
            member = tarfile.TarInfo(f"{0:08d}_{row:08d}.u16")
            member.size = 2 * LENGTH
            member.gname = f"shard:{line['row_digests']}"
            fields = member.name.encode().ljust(100, b"\0") + member.gname.encode().ljust(32, b"\0")
            member.uname = f"row:{hashlib.sha256(fields + content_B.tobytes()).hexdigest()[:24]}"
            tar.addfile(member, io.BytesIO(content_B.tobytes()))
    assert (tmp_path / "shard_00000000.tar").read_bytes() == (tmp_path / "expected.tar").read_bytes()


def test_ids_that_do_not_fit_are_not_written(tmp_path):
    for token in (-1, 2**16):
        with pytest.raises(ValueError, match=r"shard 0: ids .* do not fit \.u16"):
            write_shards(tmp_path, np.array([[3, token]]), 10, key="u16")


def test_manifest_index_and_plain_members_give_the_same(source, tmp_path, tokens_NL):
    np.testing.assert_array_equal(read_all(source / "manifest.jsonl"), tokens_NL)
    np.testing.assert_array_equal(read_all(f"{source}/shard_0000000{{0..2}}.tar"), tokens_NL)
    change(source, stride=None, sequence_tokens=None, bytes=None, data_key=None)
    np.testing.assert_array_equal(read_all(source / "manifest.jsonl"), tokens_NL)
    np.testing.assert_array_equal(read_all(source / "manifest.jsonl", key="u16"), tokens_NL)
    with webdataset.TarWriter(str(tmp_path / "odd.tar")) as writer:  # not equally far from each other
        for row, tokens_L in enumerate(tokens_NL):
            content = tokens_L.astype("<u4").tobytes()
            writer.write({"__key__": f"{row:06d}", "u32": content, "cls": "x" * (600 * (row % 3))})
    np.testing.assert_array_equal(read_all(tmp_path / "odd.tar"), tokens_NL)


def test_longer_sequences_are_cropped_alike_in_every_format(tmp_path, tokens_NL):
    batches = []
    for key in ("u16", "u32", "json.gz"):
        write_shards(tmp_path / key, tokens_NL, 20, key)
        config = DataConfig(dataset_manifest=(f"{tmp_path}/{key}/manifest.jsonl",), workers=0)
        batches.append(list(TrainData(config, 4, VOCAB, 0, 1, 10, 0).batches(0, 5)))
    for batch, *others in zip(*batches, strict=True):
        assert (batch.tokens_BS[:, 1:] == batch.targets_BS[:, :-1]).all()
        for other in others:
            assert (other.tokens_BS == batch.tokens_BS).all()
            assert (other.targets_BS == batch.targets_BS).all()


@pytest.mark.parametrize("vocab_size", [2**16 - 1, 2**16, 2**16 + 1, 2**20])
@pytest.mark.parametrize("key", ["u16", "u32", "json.gz"])
def test_every_id_of_the_vocabulary_travels(tmp_path, key, vocab_size):
    highest = min(vocab_size, 2**16 if key == "u16" else 2**32) - 1
    write_shards(tmp_path, np.array([[0, 1, highest], [2, 2, 2]]), 9, key)
    manifest = tmp_path / "manifest.jsonl"
    assert read_all(manifest, length=3, vocab_size=vocab_size).tolist() == [[0, 1, highest], [2, 2, 2]]
    if highest == vocab_size - 1:
        with pytest.raises(ValueError, match=rf"0_00000000\.{key} has token id {highest}, .* has {highest}:"):
            read_all(manifest, length=3, vocab_size=vocab_size - 1, ignore_parse_errors=True)


def test_batches_widen_and_ignore_bad_rows():
    tokens_BL = np.array([[65535, 1, 2], [0, 0, 0]], np.uint16)
    batch = make_batch(Rows(tokens_BL, np.array([True, False])))
    assert batch.tokens_BS.tolist() == [[65535, 1], [0, 0]]
    assert batch.targets_BS.tolist() == [[1, 2], [-100, -100]]
    assert batch.n_bad == 1


def truncate(path, length):
    os.truncate(path, length)


WHOLE = 20 * 1024  # of the first shard, without its end mark


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: truncate(f / "shard_00000000.tar", WHOLE - 600), "says 30,720 bytes, the tar has 19,880"),
        (
            lambda f: (change(f, bytes=None), truncate(f / "shard_00000000.tar", WHOLE - 600)),
            "end at byte 19,986, the tar has 19,880: it is cut short",
        ),
        (lambda f: truncate(f / "shard_00000000.tar", 0), "says 30,720 bytes, the tar has 0"),
        (lambda f: change(f, num_sequences=19), r"says 19 sequences, the tar goes on with 0{8}_0{6}19\.u16"),
        (
            lambda f: change(f, num_sequences=21),
            r"promises sequence 20 as a \.u16 member .* there is no member",
        ),
        (lambda f: change(f, num_sequences=10**6), "end at byte 1,023,"),
        (lambda f: change(f, stride=1536), r"end at byte 29,714|promises sequence 19 .* there is"),
        (lambda f: change(f, stride=512), "stride 512 cannot hold"),
        (lambda f: change(f, first_offset=1536), "goes on|promises sequence 19|no member"),
        (
            lambda f: change(f, sequence_tokens=LENGTH + 1),
            "of 20 bytes, there is 00000000_00000000.u16 of 18",
        ),
        (
            lambda f: change(f, data_key="u32"),
            r"as a \.u32 member of 36 bytes, there is 00000000_00000000\.u16",
        ),
        (lambda f: change(f, data_key="u8"), "data_key 'u8', must be one of"),
        (
            lambda f: change(f, sequence_tokens=LENGTH - 1),
            "of 16 bytes, there is 00000000_00000000.u16 of 18",
        ),
        (lambda f: change(f, bytes=5), "says 5 bytes, the tar has 30,720"),
    ],
)
def test_a_tar_that_is_not_its_manifests_is_named_before_the_first_step(source, damage, message):
    damage(source)
    with pytest.raises(ValueError, match=rf"shard .*shard_00000000\.tar: .*({message})"):
        read_all(source / "manifest.jsonl")


def test_sequences_too_short_for_the_model_are_said_at_once(source):
    with pytest.raises(
        ValueError, match=r"0\.tar: its manifest says 9 tokens a sequence, .* seq_len 9 needs 10"
    ):
        ValData(str(source / "manifest.jsonl"), "auto", LENGTH, VOCAB)


def test_other_keys_than_the_manifests_are_refused(source):
    with pytest.raises(ValueError, match=r"--data-key json: the manifest says u16 of shard .*0\.tar"):
        read_all(source / "manifest.jsonl", key="json")


def test_a_tar_that_shrinks_while_it_is_read_is_an_error(source):
    reader = open_shard(read_manifest(f"{source}/manifest.jsonl").shards[0])
    truncate(source / "shard_00000000.tar", 600)
    with pytest.raises(
        ValueError, match=r"shard_00000000\.tar: sample number 19 cannot be read: 0 bytes of 18"
    ):
        reader[19]
    reader.close()


def test_damaged_rows_go_by_the_policy(tmp_path, tokens_NL):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for row, content in enumerate([tokens_NL[0].astype("<u2").tobytes(), b"odd", b"\1\0\2\0"]):
            member = tarfile.TarInfo(f"{row}.u16")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    with pytest.raises(ValueError, match=r"a\.tar: sample 1\.u16 cannot be read"):
        read_all(tmp_path / "a.tar")
    (batch,) = ValData(str(tmp_path / "a.tar"), "auto", LENGTH - 1, VOCAB, ignore_parse_errors=True).batches(
        3
    )
    assert batch is not None
    assert batch.n_bad == 2
    assert batch.tokens_BS[0].tolist() == tokens_NL[0, :-1].tolist()


def test_auto_takes_the_only_known_ending(tmp_path):
    def write(*endings):
        with webdataset.TarWriter(str(tmp_path / "a.tar")) as writer:
            writer.write({"__key__": "0"} | dict.fromkeys(endings, b"[1, 2]"))
        return str(tmp_path / "a.tar")

    for endings, expected in ((("json", "cls"), [1, 2]), (("txt",), [1, 2]), (("u16", "meta"), None)):
        reader = open_shard(write(*endings))
        assert reader[0].tolist() == (expected or np.frombuffer(b"[1, 2]", "<u2").tolist())
        reader.close()
    with pytest.raises(
        ValueError, match=r"a\.tar: its members end in json, txt: name one of them, --data-key"
    ):
        open_shard(write("json", "txt"))
    with pytest.raises(ValueError, match=r"a\.tar: no member ends in any of \.json, .* \(it has \.cls\)"):
        open_shard(write("cls"))


def test_every_key_of_the_flag_can_be_read():
    assert set(DATA_KEYS) - {"auto"} <= set(DECODERS)
