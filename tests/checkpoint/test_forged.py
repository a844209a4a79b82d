"""States that are damaged or forged, here and behind a URL: passed over with a warning; nothing lands elsewhere."""

import hashlib
import json
import pickle
from pathlib import Path

import pytest
import torch

from open_lm.checkpoint import files, recover, state
from open_lm.checkpoint.bring import bring_named, fetch, newest
from open_lm.checkpoint.remote import RemoteFolder
from open_lm.checkpoint.sync import Sync

SHARD = "shard-00001-model-00001-of-00001.safetensors"


def seal(folder: Path) -> None:
    """Makes the digests those of the files that are there."""
    entries = {
        path.name: {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "bytes": path.stat().st_size}
        for path in folder.iterdir()
        if path.name != state.DIGESTS
    }
    (folder / state.DIGESTS).write_text(json.dumps({"files": entries}))


def change(**new: object):
    def forge(folder: Path) -> None:
        content = json.loads((folder / state.CONTENT).read_text()) | new
        content = {key: value for key, value in content.items() if value is not ...}
        (folder / state.CONTENT).write_text(json.dumps(content))

    return forge


def put(name: str, data: bytes):
    return lambda folder: (folder / name).write_bytes(data)


def list_files(*names: object):
    entry = {"sha256": "0" * 64, "bytes": 0}
    return put(state.DIGESTS, json.dumps({"files": dict.fromkeys(names, entry)}).encode())


FORGED = {
    "a pickle as a shard": put(SHARD, pickle.dumps({"a": 1})),
    "no shard of ours": lambda folder: torch.save({}, folder / SHARD),
    "a list": put(state.CONTENT, b"[1, 2]"),
    "deep content": put(state.CONTENT, b"[" * 100_000),
    "no labels": change(labels=...),
    "no state": change(state=...),
    "labels that lead elsewhere": change(labels=["../../x"]),
    "labels of no text": change(labels=[{}]),
    "an average that leads elsewhere": change(averages={"../../x": {"steps": 1}}),
    "averages of nothing": change(averages={"ema_0.9_1": None}),
    "weights that are nowhere": change(weights={"w": "absent"}),
    "weights of no text": change(weights={"w": [1]}),
}
DIGESTS = {
    "deep digests": put(state.DIGESTS, b"[" * 100_000),
    "digests of a parent": list_files(state.CONTENT, "../../x"),
    "digests of the root": list_files(state.CONTENT, "/tmp/x"),
    "digests of a sub folder": list_files(state.CONTENT, "sub/x"),
    "digests with a backslash": list_files(state.CONTENT, "..\\x"),
    "digests of numbers": put(state.DIGESTS, b'{"files": {"state.json": {"sha256": 1, "bytes": "2"}}}'),
}


def two_states(folder: Path, write_checkpoint, name: str) -> Path:
    """step_1, and step_2 that is forged."""
    write_checkpoint(folder, "1", 1)
    write_checkpoint(folder, "2", 2)
    forged = folder / "checkpoints/step_2"
    (FORGED | DIGESTS)[name](forged)
    if name in FORGED:
        seal(forged)
    (folder / "checkpoints/epoch_2.pt").unlink()
    return folder / "checkpoints"


@pytest.mark.parametrize("name", [*FORGED, *DIGESTS])
def test_a_forged_state_is_passed_over(tmp_path, write_checkpoint, name) -> None:
    checkpoints = two_states(tmp_path / "logs/run", write_checkpoint, name)
    with pytest.warns(UserWarning, match=r"step_2 is passed over: .*is damaged"):
        assert recover.latest(checkpoints) == checkpoints / "epoch_1.pt"
    remote = RemoteFolder(str(tmp_path / "logs/run"))
    with pytest.warns(UserWarning, match=r"step_2 is passed over: .*is damaged"):
        assert newest(remote, tmp_path / "a/b/run", than=-1).name == "epoch_1.pt"
    assert {path.name for path in (tmp_path / "a").rglob("*")} == {
        "b", "run", "checkpoints", "epoch_1.pt", "ema_0.9_1_1.pt", "step_1", SHARD, state.CONTENT, state.DIGESTS,
    }  # fmt: skip


@pytest.mark.parametrize("code", [5, 13])
def test_digests_that_cannot_be_read(tmp_path, write_checkpoint, monkeypatch, code) -> None:
    for label in ("1", "2"):
        write_checkpoint(tmp_path, label, int(label))
    real = Path.read_bytes

    def read(path: Path) -> bytes:
        if path.match("step_2/digests.json"):
            raise OSError(code, "cannot")
        return real(path)

    monkeypatch.setattr(Path, "read_bytes", read)
    with pytest.warns(UserWarning, match=r"step_2 is passed over: .*digests.json cannot be read"):
        assert recover.latest(tmp_path / "checkpoints") == tmp_path / "checkpoints/epoch_1.pt"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"step": 1, "place": "../../x"}'])
def test_an_empty_leaving_file_says_what_to_do(tmp_path, write_checkpoint, text) -> None:
    for label in ("1", "2"):
        write_checkpoint(tmp_path, label, int(label))
    folder = tmp_path / "checkpoints"
    (folder / files.LEAVING).write_text(text)
    with pytest.raises(ValueError, match=r"leaving.json is damaged: .*--resume .*epoch_N.pt .*or remove"):
        recover.latest(folder)
    assert files.set_aside(folder, 1) == folder / "abandoned_after_step_1"
    assert recover.latest(folder) == folder / "epoch_1.pt"


# ---- behind a URL


@pytest.fixture
def there(tmp_path, write_checkpoint) -> RemoteFolder:
    """step_1 and step_2 of a run, with a log."""
    for label in ("1", "2"):
        write_checkpoint(tmp_path / "here", label, int(label))
    (tmp_path / "here/log.jsonl").write_text("1\n")
    remote = RemoteFolder(f"{tmp_path}/remote")
    assert Sync(tmp_path / "here", remote, every_seconds=1000).close()
    return remote


@pytest.mark.parametrize(
    "error", [PermissionError(13, "403"), FileNotFoundError(2, "vanished"), OSError("reset")]
)
@pytest.mark.parametrize("name", [SHARD, state.CONTENT, state.DIGESTS])
def test_one_object_that_cannot_be_read(there, tmp_path, monkeypatch, name, error) -> None:
    real, bad = there._place[0].get_file, ["step_2/" + name]

    def get_file(path: str, local: str, **options: object) -> None:
        if any(text in path for text in bad):
            raise error
        real(path, local, **options)

    monkeypatch.setattr(there._place[0], "get_file", get_file)
    with pytest.warns(UserWarning, match=r"step_2 is passed over"):
        assert newest(there, tmp_path / "run", than=-1) == tmp_path / "run/checkpoints/epoch_1.pt"
    bad.append("log.jsonl")
    with pytest.warns(UserWarning, match=r"passed over|left out") as caught:
        newest(there, tmp_path / "other/run", than=-1)
    assert "log.jsonl is left out" in str(caught[-1].message)
    bad.append("step_1/" + name)
    with pytest.warns(UserWarning, match="passed over"):  # noqa: PT031
        if isinstance(error, FileNotFoundError):
            found = newest(there, tmp_path / "third/run", than=-1)
            assert found is None
            return
        refused = pytest.raises(OSError, match=r"none of the states in .* can be read")
        with refused:
            newest(there, tmp_path / "third/run", than=-1)


def test_a_sub_folder_of_a_state_is_left_there(there, tmp_path) -> None:
    (tmp_path / "remote/checkpoints/step_2/sub").mkdir()
    (tmp_path / "remote/checkpoints/step_2/sub/x").touch()
    assert newest(there, tmp_path / "run", than=-1) == tmp_path / "run/checkpoints/epoch_2.pt"
    assert not (tmp_path / "run/checkpoints/step_2/sub").exists()


def test_names_that_lead_elsewhere_are_left_out(there, tmp_path, monkeypatch) -> None:
    real = there.sizes
    evil = ["../../x", "checkpoints/step_2/../../../x", "/x", "a/../../x", "a\\x", "./x", "a\n"]
    quiet = [".owner.json", "checkpoints/leaving.json", "checkpoints/step_9.tmp/state.json"]
    monkeypatch.setattr(there, "sizes", lambda: real() | dict.fromkeys([*evil, *quiet], 1))
    asked, get = [], there.get
    monkeypatch.setattr(there, "get", lambda name, local: (asked.append(name), get(name, local))[1])
    with pytest.warns(UserWarning, match="is left out: it is no path in its folder") as caught:
        newest(there, tmp_path / "run", than=-1)
    assert len(caught) == len(evil)
    assert sorted(asked) == sorted(
        [*(f"checkpoints/step_2/{n}" for n in (SHARD, state.CONTENT, state.DIGESTS)), "log.jsonl"]
    )


def test_averages_that_lead_elsewhere_are_not_fetched(there, tmp_path) -> None:
    path = tmp_path / "remote/checkpoints/epoch_2.pt"
    torch.save({"step": [2], "averagers": ["../../x", 3, "epoch"]}, path)
    (tmp_path / "x_2.pt").touch()
    assert files.saved_averages(path) == ()
    fetch(f"{there.url}/checkpoints/epoch_2.pt", tmp_path / "a/b/c", resumes=True, averages=True)
    assert {p.name for p in (tmp_path / "a").rglob("*")} == {"b", "c", "epoch_2.pt"}
    assert bring_named(there, tmp_path / "run", "epoch_2.pt") is None
