import gzip
import hashlib
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from open_lm.tokenize.corpus import END_OF_TEXT, CorpusConfig, list_files, write_corpus
from open_lm.tokenize.documents import unigram_perplexity

VERBS = ["reads", "writes", "counts", "sorts", "moves", "checks", "merges", "drops", "opens", "closes"]


def sentences(i: int, n: int) -> str:
    rng = np.random.default_rng(i)
    return "\n".join(
        f"Object{i} {rng.choice(VERBS)} the {rng.choice(VERBS)[:-1]}er of item {rng.choice(VERBS)} in case{i}."
        for _ in range(n)
    )


def source(i: int) -> str:
    methods = "\n".join(
        f'    def step_{i}_{j}(self, value):\n        """{sentences(1000 + 10 * i + j, 1)}"""\n'
        f"        total_{j} = self.case{i} * {'left' if (i + j) % 3 else 'right'}_{j}\n"
        f"        return total_{j}\n"
        for j in range(6)
    )
    return f'"""{sentences(i, 3)}\n"""\n\n\nclass Case{i}:\n{methods}'


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> Path:
    """Sixty modules, a vendored and an exact copy of some, READMEs, and what is to be left out."""
    root = tmp_path_factory.mktemp("environment")
    for i in range(60):
        (root / f"package_{i % 4}").mkdir(exist_ok=True)
        (root / f"package_{i % 4}" / f"module_{i}.py").write_text(source(i))
    for i in range(8):
        (root / f"README_{i}.md").write_text(f"See {END_OF_TEXT} above.\n" + sentences(500 + i, 8))
        (root / "vendor").mkdir(exist_ok=True)
        (root / "vendor" / f"module_{i}.py").write_text(source(i))
        (root / "vendor" / f"changed_{i}.py").write_text(
            source(i).replace("\n\n\nclass", "\n\nimport vendor\n\nclass")
        )
    (root / "LICENSE.txt").write_text("LEGALWORD " * 100)
    (root / "__pycache__").mkdir()
    (root / "__pycache__" / "cached.py").write_text(source(70))
    (root / "binary.txt").write_bytes(b"\xff\xfe" * 400)
    return root


def config(output: Path, environment: Path, **changes) -> CorpusConfig:
    fixed = {
        "seq_len": 32,
        "vocab_size": 400,
        "held_out_share": 0.25,
        "processes": 1,
        "sequences_per_shard": 50,
    }
    return CorpusConfig(output=output, roots=(environment,), **(fixed | changes))


@pytest.fixture(scope="module")
def corpus(environment, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("corpus") / "corpus"
    write_corpus(config(output, environment))
    return output


def read_part(folder: Path) -> np.ndarray:
    """All sequences of a source's part, in stored order, by the standard library alone."""
    rows = []
    for line in (folder / "manifest.jsonl").read_text().splitlines():
        entry = json.loads(line)
        with tarfile.open(folder / f"{entry['shard']}.tar") as tar:
            members = tar.getmembers()
            assert len(members) == entry["num_sequences"]
            assert len({m.name for m in members}) == len(members)
            rows += [json.loads(gzip.decompress(tar.extractfile(m).read())) for m in members]
    return np.array(rows)


def text_of(corpus: Path, source: str, part: str) -> str:
    tokenizer = Tokenizer.from_file(str(corpus / "tokenizer.json"))
    return tokenizer.decode_batch(
        [read_part(corpus / source / part).ravel().tolist()], skip_special_tokens=False
    )[0]


def test_counts_are_those_of_the_shards(corpus):
    summary = json.loads((corpus / "corpus.json").read_text())
    targets = {}
    for source_name, parts in summary["sources"].items():
        for part, counts in parts.items():
            rows = read_part(corpus / source_name / part)
            assert rows.shape == (counts["sequences"], 33)
            assert counts["tokens"] == rows[:, 1:].size
            assert rows.min() >= 0
            assert rows.max() < summary["vocab_size"] <= 400
        targets[source_name] = read_part(corpus / source_name / "held_out")[:, 1:]
        assert summary["held_out_unigram_perplexity"][source_name] == unigram_perplexity(targets[source_name])
    pooled = np.concatenate([t.ravel() for t in targets.values()])
    assert summary["held_out_unigram_perplexity"]["all"] == unigram_perplexity(pooled)
    assert summary["repeated_files"] == 16


def test_each_document_is_on_one_side_docstrings_with_their_code(corpus):
    sides: dict[int, set[str]] = {}
    copies = dict.fromkeys(range(60), 0)
    for part in ("train", "held_out"):
        prose, code = text_of(corpus, "prose", part), text_of(corpus, "code", part)
        for i in range(60):
            if f"Object{i} " in prose or f"class Case{i}:" in code:
                sides.setdefault(i, set()).add(part)
            copies[i] += code.count(f"class Case{i}:")
            assert f"Object{i} " not in code, "docstrings belong to prose alone"
        assert "LEGALWORD" not in prose
        assert "Object70 " not in prose
    assert all(len(parts) == 1 for parts in sides.values())
    assert {part for parts in sides.values() for part in parts} == {"train", "held_out"}
    assert len(sides) == 60
    assert max(copies.values()) == 1, "the copies under vendor/ are dropped"


def test_tokens_decode_to_the_text_and_documents_end_once(corpus, environment):
    text = text_of(corpus, "prose", "held_out")
    documents = text.split(END_OF_TEXT + "Obj")  # a README's own marker is followed by " above"
    assert len(documents) > 3
    module = next(p for p in sorted(environment.glob("package_*/*.py")) if sentences(number(p), 3) in text)
    assert sentences(number(module), 3) + "\n\n" in text
    ends = sum((read_part(corpus / "prose" / part)[:, :] == 0).sum() for part in ("train", "held_out"))
    summary = json.loads((corpus / "corpus.json").read_text())
    assert ends <= sum(summary["sources"]["prose"][part]["documents"] for part in ("train", "held_out"))


def number(path: Path) -> int:
    return int(path.stem.rpartition("_")[2])


def digest_of_files(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_same_environment_same_bytes_with_any_number_of_processes(corpus, environment, tmp_path):
    write_corpus(config(tmp_path / "again", environment, processes=2))
    assert digest_of_files(tmp_path / "again") == digest_of_files(corpus)
    write_corpus(config(tmp_path / "other", environment, seed=1))
    assert digest_of_files(tmp_path / "other") != digest_of_files(corpus)


def test_reused_replaced_or_refused(environment, tmp_path, capsys):
    output = tmp_path / "corpus"
    (tmp_path / "corpus.partial").mkdir()
    (tmp_path / "corpus.partial" / "stale").write_text("of a run that was killed")
    write_corpus(config(output, environment))
    assert not (output / "stale").exists()
    times = {p: p.stat().st_mtime_ns for p in output.rglob("*")}
    capsys.readouterr()
    write_corpus(config(output, environment, processes=2))
    assert "reused" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in output.rglob("*")} == times
    summary = write_corpus(config(output, environment, seq_len=16))
    assert read_part(output / "code" / "train").shape[1] == 17
    assert summary["settings"]["seq_len"] == 16
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match="is no corpus"):
        write_corpus(config(tmp_path / "mine", environment))
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"


def test_limit_is_per_source(environment, tmp_path):
    summary = write_corpus(config(tmp_path / "c", environment, max_megabytes_per_source=0.02))
    for parts in summary["sources"].values():
        assert 20_000 <= sum(counts["bytes"] for counts in parts.values()) < 23_000


def test_order_of_files_depends_on_names_and_seed_only(environment):
    names = [file.name for file in list_files([environment], 0)]
    assert names == [file.name for file in list_files([environment], 0)]
    assert names != sorted(names)
    assert sorted(names) == sorted(file.name for file in list_files([environment], 1))
    assert "__pycache__/cached.py" not in names


@pytest.mark.parametrize("wrong", [{"vocab_size": 256}, {"seq_len": 0}, {"held_out_share": 0.0}])
def test_settings_that_cannot_work(environment, tmp_path, wrong):
    with pytest.raises(ValueError, match=str(next(iter(wrong.values())))):
        write_corpus(config(tmp_path / "c", environment, **wrong))
