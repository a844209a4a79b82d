import errno
import io
import itertools
import json
import os
import shutil
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from open_lm.data.manifest import read_manifest
from open_lm.tokenize.folder import Folder
from open_lm.tokenize.lock import locked
from open_lm.tokenize.pipeline import Run, tokenize
from open_lm.tokenize.progress import Progress
from open_lm.tokenize.settings import TokenizeConfig
from tests.tokenize.conftest import TEXTS, digests, read_rows, write_lines

SMALL = {
    "seq_len": 32,
    "processes": 1,
    "unit_megabytes": 0.004,
    "bucket_megabytes": 0.008,
    "sequences_per_shard": 50,
    "progress_seconds": 1000,
}


@pytest.fixture
def inputs(tmp_path) -> Path:
    write_lines(tmp_path / "in" / "a.jsonl", TEXTS[:150])
    return write_lines(tmp_path / "in" / "b.jsonl", TEXTS[150:]).parent


def config(inputs: Path | str, output: Path | str, tokenizer: Path, **changes) -> TokenizeConfig:
    given = {"inputs": (str(inputs),), "output": str(output), "tokenizer": str(tokenizer)}
    return TokenizeConfig(**(SMALL | given | changes))


def stream(tokenizer: Path, texts) -> Counter:
    """How often each id comes in these texts, an end of text for each."""
    loaded = Tokenizer.from_file(str(tokenizer))
    return Counter(i for t in texts for i in [*loaded.encode(t, add_special_tokens=False).ids, 0])


def documents_in(rows: np.ndarray, tokenizer: Path) -> list[str]:
    """Texts between ends of text within rows."""
    loaded = Tokenizer.from_file(str(tokenizer))
    found = []
    for row in rows.tolist():
        ends = [i for i, token in enumerate(row) if token == 0]
        found += [loaded.decode(row[a + 1 : b]) for a, b in itertools.pairwise(ends)]
    return found


def test_join_loses_nothing_but_the_last_tail(inputs, tmp_path, tokenizer):
    (info,) = tokenize(config(inputs, tmp_path / "out", tokenizer)).values()
    rows = read_rows(tmp_path / "out")
    expected, found = stream(tokenizer, TEXTS), Counter(rows.ravel().tolist())
    assert not found - expected
    assert (expected - found).total() == info["tokens_dropped"] < 33
    assert info["tokens"] == expected.total()
    assert info["sequences"] == len(rows) == info["tokens_in_shards"] / 33
    assert info["documents"] == 200
    assert info["sources"][0]["bytes"] == sum(len(t.encode()) for t in TEXTS)
    pieces = documents_in(rows, tokenizer)
    whole = [piece for piece in pieces if piece in TEXTS]
    assert len(whole) > 20
    others = [piece for piece in pieces if piece not in TEXTS]
    assert len(others) <= 3, "where the rest of a bucket (here 3) is joined to that of the one before"
    assert all(any(t.endswith(piece) for t in TEXTS) for piece in others)
    assert len(set(whole)) == len(whole)
    numbers = [int(t.partition(":")[0]) for t in whole]
    assert abs(np.corrcoef(numbers, range(len(numbers)))[0, 1]) < 0.5, "shuffled"
    lines = [json.loads(line) for line in (tmp_path / "out/manifest.jsonl").read_text().splitlines()]
    assert [line["num_sequences"] for line in lines[:-1]] == [50] * (len(lines) - 1)
    assert list(lines[0])[:2] == ["shard", "num_sequences"]
    assert not (tmp_path / "out/work").exists()
    assert not [name for name in digests(tmp_path / "out") if name.endswith(".partial")]


def test_best_fit_keeps_documents_whole(inputs, tmp_path, tokenizer):
    (info,) = tokenize(config(inputs, tmp_path / "out", tokenizer, packing="best-fit", seq_len=255)).values()
    rows = read_rows(tmp_path / "out")
    with_end = np.concatenate([np.zeros((len(rows), 1), rows.dtype), rows], axis=1)
    found = [text for text in documents_in(with_end, tokenizer) if text]
    assert sorted(found) == sorted(TEXTS)
    assert info["tokens_dropped"] == 0
    assert info["tokens_of_padding"] == rows.size - info["tokens"] == (with_end == 0).sum() - len(rows) - 200


def test_the_pad_token_fills(inputs, tmp_path, tokenizer):
    tokenize(config(inputs, tmp_path / "out", tokenizer, packing="best-fit", seq_len=299, pad_token="!"))
    rows = read_rows(tmp_path / "out")
    assert (rows == 0).sum() == 200
    assert json.loads((tmp_path / "out/info.json").read_text())["pad"] == rows[0, -1] != 0


def test_the_split_follows_the_text_whatever_else_changes(inputs, tmp_path, tokenizer):
    sides = []
    for number, changes in enumerate(({}, {"seed": 7, "unit_megabytes": 1.0, "bucket_megabytes": 1.0})):
        out = tmp_path / f"out{number}"
        parts = tokenize(
            config(inputs, out, tokenizer, held_out_share=0.2, packing="best-fit", seq_len=299, **changes)
        )
        held_out = {t for t in documents_in(read_rows(out / "held_out"), tokenizer) if t}
        assert 15 < parts["held_out"]["documents"] < 65
        assert parts["held_out"]["documents"] + parts["train"]["documents"] == 200
        assert not held_out & set(documents_in(read_rows(out), tokenizer))
        sides.append(held_out)
    assert (
        digests(tmp_path / "out0")["shard_00000000.tar"] != digests(tmp_path / "out1")["shard_00000000.tar"]
    )
    assert sides[0] & sides[1]


def test_rates_take_repeat_and_leave(tmp_path, tokenizer):
    a, b, c = (
        write_lines(tmp_path / f"{n}.jsonl", TEXTS[i : i + 60]) for n, i in (("a", 0), ("b", 60), ("c", 120))
    )
    made = config(
        a, tmp_path / "out", tokenizer, sampling_rates=(2.0, 0.5, 0.0), packing="best-fit", seq_len=299
    )
    (info,) = tokenize(TokenizeConfig(**(vars(made) | {"inputs": (str(a), str(b), str(c))}))).values()
    rows = read_rows(tmp_path / "out")
    found = Counter(t for t in documents_in(np.insert(rows, 0, 0, axis=1), tokenizer) if t)
    assert all(found[t] == 2 for t in TEXTS[:60])
    assert all(found[t] <= 1 for t in TEXTS[60:120])
    assert not any(found[t] for t in TEXTS[120:])
    taken = [source["documents"] for source in info["sources"]]
    assert taken == [120, sum(found[t] for t in TEXTS[60:120]), 0]
    assert 15 < taken[1] < 45
    assert [source["documents_not_sampled"] for source in info["sources"]] == [0, 60 - taken[1], 60]


def test_units_and_processes_never_change_the_shards(inputs, tmp_path, tokenizer):
    for name, changes in {"a": {}, "b": {"unit_megabytes": 1.0}, "c": {"processes": 2}}.items():
        tokenize(config(inputs, tmp_path / name, tokenizer, held_out_share=0.1, **changes))
    a, b, c = (digests(tmp_path / name) for name in "abc")
    assert a == c
    assert {k: v for k, v in a.items() if k != "plan.json"} == {
        k: v for k, v in b.items() if k != "plan.json"
    }


class Killed(BaseException):
    pass


def test_killed_at_every_write(inputs, tmp_path, tokenizer, monkeypatch):
    made = config(inputs, tmp_path / "whole", tokenizer, held_out_share=0.1, bucket_megabytes=0.015)
    write, count = Folder.write, 0

    def counted(folder, name, data):
        nonlocal count
        count += 1
        if count == last and not after:
            raise Killed
        write(folder, name, data)
        if count == last:
            raise Killed

    monkeypatch.setattr(Folder, "write", counted)
    last, after = 0, False
    tokenize(made)
    total, expected = count, digests(tmp_path / "whole")
    assert total > 20
    for last in range(1, total + 1):
        after, count, out = last % 2 == 0, 0, tmp_path / f"killed{last}"
        again = TokenizeConfig(**(vars(made) | {"output": str(out)}))
        with pytest.raises(Killed):
            tokenize(again)
        count = -(10**6)
        tokenize(again)
        assert digests(out) == expected, f"killed at write {last} of {total}"
        assert count + 10**6 <= total - last + 6, "but for a task and the five closing files"


def test_another_plan_is_refused_with_the_difference(inputs, tmp_path, tokenizer):
    tokenize(config(inputs, tmp_path / "out", tokenizer))
    before = digests(tmp_path / "out")
    tokenize(config(inputs, tmp_path / "out", tokenizer))
    with pytest.raises(ValueError, match="seed: 0 there, 3 now") as raised:
        tokenize(config(inputs, tmp_path / "out", tokenizer, seed=3, seq_len=16))
    assert "seq_len: 32 there, 16 now" in str(raised.value)
    write_lines(inputs / "b.jsonl", TEXTS[:2])
    with pytest.raises(ValueError, match=r"inputs\[0\]\.files\[1\]\[1\]: \d+ there, \d+ now"):
        tokenize(config(inputs, tmp_path / "out", tokenizer))
    assert digests(tmp_path / "out") == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match=r"holds other files \(e\.g\. thesis\.txt\)"):
        tokenize(config(inputs, tmp_path / "mine", tokenizer))


def test_work_that_is_not_the_runs_is_left_alone(inputs, tmp_path, tokenizer):
    mine = tmp_path / "mine"
    (mine / "sub").mkdir(parents=True)
    (mine / "thesis.txt").write_text("precious")
    (mine / "sub/plan.json").write_text("{}")
    out = tmp_path / "out"
    tokenize(config(inputs, out, tokenizer))
    for name in ("notes.partial", "held_out.txt"):
        (out / name).write_text("precious")
    before = digests(mine) | digests(out)
    tokenize(config(inputs, out, tokenizer, work=str(mine)))  # complete: the work folder has no part in it
    assert digests(mine) | digests(out) == before
    with pytest.raises(ValueError, match=r"--work .*mine holds other files"):
        tokenize(config(inputs, tmp_path / "other", tokenizer, work=str(mine)))
    assert digests(mine).items() <= before.items()


def test_only_what_the_run_made_goes(inputs, tmp_path, tokenizer, monkeypatch):
    work = tmp_path / "work"
    write = Folder.write

    def write_beside(folder, name, data):
        write(folder, name, data)
        if name.startswith("unit_000000") and name.endswith(
            ".json"
        ):  # a user's file that comes while the run goes on
            (work / "unit_notes.json").write_text("precious")
            (work / "manifest.jsonl").write_text("precious")

    monkeypatch.setattr(Folder, "write", write_beside)
    tokenize(config(inputs, tmp_path / "out", tokenizer, work=str(work)))
    assert set(digests(work)) == {"unit_notes.json", "manifest.jsonl"}
    for name in ("new", "empty"):
        if name == "empty":
            (tmp_path / name).mkdir()
        tokenize(config(inputs, tmp_path / f"out_{name}", tokenizer, work=str(tmp_path / name)))
        assert (tmp_path / name).exists() == (name == "empty"), "a folder that was there stays"


@pytest.mark.parametrize(("output", "work"), [("a/out", "a"), ("a", "a"), ("a", "b/../a/"), ("a", "a/held_out"),
    ("s3://b/x/out", "s3://b/x/"), ("s3://b/x", "s3://b/x/"), ("a", "link")])  # fmt: skip
def test_work_that_holds_the_output_is_refused(inputs, tmp_path, tokenizer, output, work, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "link").symlink_to("a")
    with pytest.raises(ValueError, match=rf"--work {work} .*--output {output}"):
        tokenize(config(inputs, output, tokenizer, work=work))
    assert list((tmp_path / "a").iterdir()) == []


def test_what_a_run_writes_is_no_input(inputs, tmp_path, tokenizer, monkeypatch):
    (expected,) = tokenize(config(inputs, tmp_path / "apart", tokenizer)).values()
    for entry in (str(inputs), f"{inputs}/**/*l"):
        out, work = inputs / "out", inputs / "tmp"
        made = config(entry, out, tokenizer, work=str(work), bucket_megabytes=0.015)
        with monkeypatch.context() as patch:
            patch.setattr(Run, "write_shards", lambda *given: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                tokenize(made)
        (work / "old.txt").write_text("a user's, which the plan never listed")
        (info,) = tokenize(made).values()
        assert info["documents"] == expected["documents"]
        assert tokenize(made) == {"train": info}
        shutil.rmtree(out)
        shutil.rmtree(work)
    write_lines(tmp_path / "new/a.jsonl", TEXTS)
    with pytest.raises(
        FileNotFoundError, match=r"new: all that is there \(1 files\) lies in --output or --work"
    ):
        tokenize(config(tmp_path / "new", tmp_path / "new", tokenizer))


class Told(Progress):
    """Keeps what is said."""

    def __init__(self):
        super().__init__(1000, is_terminal=False)
        self.lines: list[str] = []

    def say(self, text):
        self.lines.append(text)


@pytest.mark.parametrize("packing", ["join", "best-fit"])
@pytest.mark.parametrize("texts", [TEXTS, TEXTS[:1]])
def test_a_held_out_part_without_a_sequence_is_empty_and_said(tmp_path, tokenizer, packing, texts):
    write_lines(tmp_path / "a.jsonl", texts)
    made = config(
        tmp_path / "a.jsonl", tmp_path / "out", tokenizer, held_out_share=1e-9, packing=packing, seq_len=8
    )
    told = Told()
    parts = tokenize(made, told)
    (said,) = [line for line in told.lines if "warning" in line]
    assert "--held-out-share 1e-09) has 0 documents of 0 tokens" in said
    assert "one sequence of 9 ids (--seq-len 8)" in said
    assert parts["train"]["documents"] == len(texts)
    assert parts["held_out"]["sequences"] == parts["held_out"]["tokens_in_shards"] == 0
    with pytest.raises(
        ValueError, match=r"held_out/manifest\.jsonl: the manifest lists no sequences; .* share held out"
    ):
        read_manifest(f"{tmp_path}/out/held_out/manifest.jsonl")
    assert tokenize(made, told) == parts
    assert "nothing to do" in told.lines[-1]


def test_a_small_held_out_part_is_counted_as_dropped(inputs, tmp_path, tokenizer):
    told = Told()
    parts = tokenize(config(inputs, tmp_path / "out", tokenizer, held_out_share=0.02, seq_len=500), told)
    assert any("held-out part" in line for line in told.lines)
    assert parts["held_out"]["tokens"] == parts["held_out"]["tokens_dropped"] > 0


def test_a_training_part_without_a_sequence_is_said_before_packing(inputs, tmp_path, tokenizer):
    with pytest.raises(
        ValueError, match=r"training part has 0 documents of 0 tokens.*33 ids \(--seq-len 32\)"
    ):
        tokenize(config(inputs, tmp_path / "out", tokenizer, held_out_share=1 - 1e-12))
    assert not [name for name in digests(tmp_path / "out/work") if name.startswith("pack")]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda out: (out / "shard_00000001.tar").unlink(), "shard_00000001.tar is missing"),
        (lambda out: os.truncate(out / "shard_00000000.tar", 99), "shard_00000000.tar has 99 bytes, its manifest"),
        (lambda out: (out / "info.json").unlink(), "info.json is missing"),
        (lambda out: (out / "held_out/info.json").write_text("{"), "held_out/info.json is damaged"),
        (lambda out: (out / "held_out/manifest.jsonl").unlink(), "held_out/manifest.jsonl is missing"),
        (lambda out: (out / "tokenizer.json").write_text("{}"), "tokenizer.json is not the one of the plan"),
        (lambda out: (out / "held_out/tokenizer.json").unlink(), "held_out/tokenizer.json is missing"),
        (lambda out: shutil.rmtree(out / "held_out"), "held_out/manifest.jsonl is missing"),
    ],
)  # fmt: skip
def test_a_damaged_output_is_made_again(inputs, tmp_path, tokenizer, damage, said):
    out, told = tmp_path / "out", Told()
    made = config(inputs, out, tokenizer, held_out_share=0.1, bucket_megabytes=1.0, unit_megabytes=1.0)
    tokenize(made)
    expected = digests(out)
    damage(out)
    tokenize(made, told)
    assert said in told.lines[0]
    assert digests(out) == expected


def test_an_array_is_said_to_be_one(tmp_path, tokenizer):
    (tmp_path / "a.json").write_text(json.dumps([{"text": t} for t in TEXTS], indent=1))
    with pytest.raises(
        ValueError, match=r"--inputs .*a\.json: not JSON lines but an array: write each object"
    ):
        tokenize(config(tmp_path / "a.json", tmp_path / "out", tokenizer))


def test_inputs_that_come_twice_are_named(inputs, tmp_path, tokenizer, monkeypatch):
    monkeypatch.chdir(inputs)
    made = config(inputs, tmp_path / "out", tokenizer)
    twice = {"inputs": (str(inputs), "b.jsonl", "a.jsonl::./a.jsonl"), "sampling_rates": (1.0, 1.0, 1.0)}
    told = Told()
    (info,) = tokenize(TokenizeConfig(**(vars(made) | twice)), told).values()
    assert info["documents"] == 200 + 50 + 300
    warnings = [line for line in told.lines if line.startswith("warning: --inputs: ")]
    assert len(warnings) == 2
    assert f"b.jsonl: in {inputs} and in b.jsonl, so every document of it is used twice" in warnings[0]
    assert f"a.jsonl and 1 more files: in {inputs} and in a.jsonl::./a.jsonl" in warnings[1]


@pytest.mark.parametrize(("name", "flag"), [("unit_000000", "work"), ("shard_00000000.tar", "output")])
def test_a_full_disk_is_said_and_the_run_goes_on(inputs, tmp_path, tokenizer, monkeypatch, name, flag):
    made = config(inputs, tmp_path / "out", tokenizer, work=str(tmp_path / "work"))
    write = Path.write_bytes

    def fill(path, data):
        if path.name.startswith(name):
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", fill)
        place = tmp_path / ("out" if flag == "output" else "work")
        with pytest.raises(
            OSError, match=rf"^{place}/{name}\S*: No space left .*, in --{flag} {place}: .* goes on"
        ):
            tokenize(made)
    assert tokenize(made)["train"]["documents"] == 200


def test_two_runs_in_one_output(inputs, tmp_path, tokenizer):
    with locked(Folder(str(tmp_path / "out"))), pytest.raises(ValueError, match="another run is writing"):
        tokenize(config(inputs, tmp_path / "out", tokenizer))


def test_bad_documents(inputs, tmp_path, tokenizer):
    lines = (inputs / "a.jsonl").read_text().splitlines()
    lines[99] = '{"text": '
    lines[120:122] = ['{"text": ""}', '{"body": "x"}']
    (inputs / "a.jsonl").write_text("\n".join(lines))
    place = f"{inputs}/a.jsonl"
    with pytest.raises(ValueError, match=r"a\.jsonl:1(00|22): no"):
        tokenize(config(inputs, tmp_path / "out", tokenizer))
    with pytest.raises(ValueError, match=r"a\.jsonl:122: no key 'text'.*2 bad documents .*--max-bad 1"):
        tokenize(config(inputs, tmp_path / "out", tokenizer, on_bad="skip", max_bad=1))
    (info,) = tokenize(config(inputs, tmp_path / "out", tokenizer, on_bad="skip")).values()
    bad = [json.loads(line) for line in (tmp_path / "out/bad.jsonl").read_text().splitlines()]
    assert [b["place"] for b in bad] == [f"{place}:100", f"{place}:122"]
    counts = info["sources"][0]
    assert (counts["documents"], counts["documents_bad"], counts["documents_empty"]) == (197, 2, 1)


def test_unreadable_gz_stops_or_is_named(tmp_path, tokenizer):
    import gzip

    write_lines(tmp_path / "a.jsonl", TEXTS)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes())[:-300])
    with pytest.raises(ValueError, match=r"a\.jsonl\.gz:\d+: unreadable from here on: EOFError"):
        tokenize(config(tmp_path / "a.jsonl.gz", tmp_path / "out", tokenizer))


def test_wide_vocabulary_is_u32_others_u16(tmp_path, tokenizer):
    content = json.loads(tokenizer.read_text())
    token = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    for size, key in ((2**16, "u16"), (2**16 + 1, "u32")):
        content["added_tokens"][1:] = [{"id": i, "content": f"<{i}>", **token} for i in range(300, size)]
        wide = tmp_path / f"{size}.json"
        wide.write_text(json.dumps(content))
        write_lines(tmp_path / "a.jsonl", TEXTS)
        tokenize(config(tmp_path / "a.jsonl", tmp_path / key, wide))
        assert json.loads((tmp_path / key / "manifest.jsonl").read_text().splitlines()[0])["data_key"] == key
        assert not Counter(read_rows(tmp_path / key).ravel().tolist()) - stream(tokenizer, TEXTS)


def test_json_gz_is_what_open_lm_reads(inputs, tmp_path, tokenizer):
    import gzip
    import tarfile

    tokenize(config(inputs, tmp_path / "j", tokenizer, format="json.gz"))
    tokenize(config(inputs, tmp_path / "b", tokenizer))
    rows = []
    for line in (tmp_path / "j/manifest.jsonl").read_text().splitlines():
        with tarfile.open(tmp_path / "j" / (json.loads(line)["shard"] + ".tar")) as tar:
            rows += [json.loads(gzip.decompress(tar.extractfile(m).read())) for m in tar.getmembers()]
    assert rows == read_rows(tmp_path / "b").tolist()


def test_trained_tokenizer(inputs, tmp_path):
    for name in ("a", "b"):
        made = config(inputs, tmp_path / name, None, train_tokenizer=290, held_out_share=0.1)
        info = tokenize(TokenizeConfig(**(vars(made) | {"tokenizer": None})))["train"]
        assert info["vocab_size"] == 290
        assert info["end_of_text_token"] == "<|endoftext|>"
    assert digests(tmp_path / "a") == digests(tmp_path / "b")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"end_of_text": "<none>"}, "--end-of-text <none>: not in the tokenizer's vocabulary"),
        ({"pad_token": "<none>", "packing": "best-fit"}, "--pad-token <none>"),
        ({"pad_token": "!"}, "--pad-token ! needs --packing best-fit, not join"),
        ({"tokenizer": "missing.json"}, "--tokenizer missing.json"),
        ({"tokenizer": None}, "one of --tokenizer and --train-tokenizer"),
        ({"train_tokenizer": 300}, "one of --tokenizer and --train-tokenizer"),
        ({"sampling_rates": (1.0, 2.0)}, "2 rates for 1 entries"),
        ({"sampling_rates": (-1.0,)}, "--sampling-rates -1.0"),
        ({"held_out_share": 1.0}, "--held-out-share 1.0"),
        ({"seq_len": 0}, "--seq-len 0"),
        ({"seed": 2**63}, "--seed 9223372036854775808 must be from"),
        ({"ray_address": "auto"}, "needs --engine ray, not local"),
        ({"seq_len": 100_000}, "does not fill one sequence of 100,001"),
    ],
)
def test_refused(inputs, tmp_path, tokenizer, changes, said):
    made = config(inputs, tmp_path / "out", tokenizer)
    with pytest.raises(ValueError) as raised:
        tokenize(TokenizeConfig(**(vars(made) | changes)))
    assert said in str(raised.value)


def test_a_tokenizer_without_end_of_text(inputs, tmp_path, tokenizer):
    content = tokenizer.read_text().replace("<|endoftext|>", "<odd>")
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=r"no end of text .*--end-of-text"):
        tokenize(config(inputs, tmp_path / "out", tmp_path))
    info = tokenize(config(inputs, tmp_path / "out", tmp_path, end_of_text="<odd>"))["train"]
    assert info["end_of_text_token"] == "<odd>"


def test_missing_input_is_said_before_work(inputs, tmp_path, tokenizer):
    with pytest.raises(FileNotFoundError, match=r"gone\.jsonl: no such file"):
        tokenize(config(f"{inputs}::{tmp_path}/gone.jsonl", tmp_path / "out", tokenizer))
    assert not (tmp_path / "out").exists()


def test_s3_gives_the_same_shards(inputs, tmp_path, tokenizer, bucket):
    import s3fs

    bucket(inputs)
    bucket(tokenizer.parent)
    made = config("s3://bucket/", "s3://bucket/out/x", "s3://bucket/tokenizer.json", held_out_share=0.1)
    tokenize(made)
    tokenize(config(inputs, tmp_path / "local", tokenizer, held_out_share=0.1))
    system = s3fs.S3FileSystem(use_listings_cache=False, skip_instance_cache=True)
    system.get("bucket/out/x", str(tmp_path / "fetched"), recursive=True)
    there, here = digests(tmp_path / "fetched"), digests(tmp_path / "local")
    assert there.keys() == here.keys()
    differing = {name for name in here if here[name] != there[name]}
    assert differing == {"plan.json", "info.json", "held_out/info.json"}, "they name the inputs"
    assert sum(part["documents"] for part in tokenize(made).values()) == 200, "what is there is no input"
    with pytest.raises(FileNotFoundError, match="s3://bucket/none"):
        tokenize(config("s3://bucket/none/", "s3://bucket/y", tokenizer))


def test_members_of_tars_that_are_passed_over_are_counted_and_said(tmp_path, tokenizer):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, data in (("a.txt", " ".join(TEXTS).encode()), *((f"{n}.csv", b"1,2") for n in range(12))):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    told = Told()
    info = tokenize(config(tmp_path / "a.tar", tmp_path / "out", tokenizer), told)["train"]
    (said,) = [line for line in told.lines if "warning" in line]
    assert "12 members of its tars are passed over" in said
    assert f"{tmp_path}/a.tar:0.csv, " in said
    assert "9.csv, …; known there: .jsonl" in said
    assert (info["sources"][0]["members_passed_over"], info["documents"]) == (12, 1)


def test_an_input_that_was_touched_is_said_in_words(inputs, tmp_path, tokenizer):
    made = config(inputs, tmp_path / "out", tokenizer)
    tokenize(made)
    touched = sorted(path for path in inputs.rglob("*") if path.is_file())[0]
    os.utime(touched, (1, 1))
    with pytest.raises(
        ValueError, match=rf"{touched}: its modification time changed, from \d+ to 1000000000$"
    ):
        tokenize(made)
