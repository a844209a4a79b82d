import pytest

from open_lm.data.retry import Patience
from open_lm.tokenize.inputs import list_files
from tests.tokenize.conftest import write_lines


@pytest.fixture
def folder(tmp_path):
    for name in (
        "a/1.jsonl",
        "a/0.jsonl",
        "a/b/2.txt",
        "a/.hidden.txt",
        "a/readme.md",
        "a/info.json",
        "c/x.json",
    ):
        write_lines(tmp_path / name, ["x"])
    return tmp_path


@pytest.mark.parametrize(
    ("entry", "names"),
    [
        ("a", ["a/0.jsonl", "a/1.jsonl", "a/b/2.txt"]),
        ("a/*.jsonl", ["a/0.jsonl", "a/1.jsonl"]),
        ("a/{1..0}.jsonl", ["a/1.jsonl", "a/0.jsonl"]),
        ("a/{b/2.txt,0.jsonl}", ["a/b/2.txt", "a/0.jsonl"]),
        ("**/*.txt", ["a/b/2.txt"]),
        ("c/x.json::a/b::a/b/2.txt", ["c/x.json", "a/b/2.txt"]),
        ("a/?.json[l]", ["a/0.jsonl", "a/1.jsonl"]),
    ],
)
def test_files_folders_globs_braces(folder, entry, names, monkeypatch):
    monkeypatch.chdir(folder)
    assert [file.url for file in list_files(entry, 0, Patience())] == names


@pytest.mark.parametrize(
    ("entry", "error", "said"),
    [
        ("nothing.jsonl", FileNotFoundError, "nothing.jsonl: no such file"),
        ("a/*.parquet", FileNotFoundError, "a/*.parquet: no such file"),
        ("a/1.jsonl::a/{1,7}.jsonl", FileNotFoundError, "a/7.jsonl: no such file"),
        ("a/readme.md", ValueError, "a/readme.md: unknown ending"),
        ("c", FileNotFoundError, "c: no file with documents"),
    ],
)
def test_what_gives_no_file_is_named(folder, entry, error, said, monkeypatch):
    monkeypatch.chdir(folder)
    with pytest.raises(error, match=r"--inputs ") as raised:
        list_files(entry, 0, Patience())
    assert said in str(raised.value)


def test_what_a_folder_holds_beside_documents_is_said(tmp_path):
    for name in (
        "a.jsonl",
        "b/c.txt",
        "b/notes.md",
        "info.json",
        "d.json.zst",
        "e.json.gz",
        ".hidden.jsonl",
        "other/e.jsonl",
    ):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_text("x")
    (tmp_path / "in/b/linked").symlink_to(tmp_path / "in/other")  # read once
    (tmp_path / "in/b/up").symlink_to(tmp_path / "in")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/f.jsonl").write_text("x")
    (tmp_path / "in/g").symlink_to(tmp_path / "elsewhere")
    passed: list[str] = []
    files = list_files(str(tmp_path / "in"), 0, Patience(), passed=passed)
    names = [file.url.removeprefix(f"{tmp_path}/in/") for file in files]
    assert names == ["a.jsonl", "b/c.txt", "b/linked/e.jsonl", "d.json.zst", "e.json.gz", "g/f.jsonl"]
    assert [name.removeprefix(f"{tmp_path}/in/") for name in passed] == [
        "b/notes.md",
        "info.json",
    ]
