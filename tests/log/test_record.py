"""A run's flags, as a file that --config takes, and its code."""

import json
import resource
import shlex
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from open_lm.config.parse import config_text, parse
from open_lm.log import record
from open_lm.log.record import code_files, commit, copy_code, keep_flags
from open_lm.main import main

RUN = "--model open_lm_test_tiny --precision fp32 --global-batch-size 8 --train-num-samples 640 --epochs 4 \
 --lr 1e-2 --warmup 2 --log-every-n-steps 1 --workers 0 --moe-freq 2 --moe-num-experts 4"


@pytest.mark.parametrize(
    "line",
    [
        "--fsdp --no-fsdp-amp --lr 1e-5 --wd=0.1 --seed 007 --name 1e5 --report-to= --wandb-notes='-x: #é'",
        "--dataset-manifest '/a b/m.jsonl' s3://x/{0..3}/m.jsonl --train-data-mix-weights .725 .275",
        "--name null --grad-clip-norm None --moe_num_experts 8 --moe-freq 2 --z-loss-coefficient 1e-4",
        "--val-data yes no 1 --epochs-cooldown 3 --debug",
    ],
)
def test_config_file_gives_the_same_flags(line, tmp_path) -> None:
    run, given = parse(shlex.split(line))
    (tmp_path / "config.yaml").write_text(config_text(run, given), encoding="utf-8")
    assert parse(["--config", str(tmp_path / "config.yaml")]) == (run, given)
    named, _ = parse(["--config", str(tmp_path / "config.yaml"), "--name", "other"])
    assert named.log.name == "other"


def test_config_file_trains_the_same_run(sources, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    data = f"--dataset-manifest {sources[0]} {sources[1]} --train-data-mix-weights .725 .275 --data-key json"
    main(shlex.split(f"{RUN} {data} --name run --max-steps 6 --seed 3 --resume latest"))
    main(shlex.split("--config logs/run/config.yaml --name other"))
    weights = [torch.load(f"logs/{n}/checkpoints/epoch_2.pt", weights_only=True) for n in ("run", "other")]
    for name, value in weights[0]["state_dict"].items():
        assert torch.equal(value, weights[1]["state_dict"][name]), name
    params = [Path(f"logs/{n}/params.txt").read_text().splitlines() for n in ("run", "other")]
    assert [pair for pair in zip(*params, strict=True) if pair[0] != pair[1]] == [
        ("name: run", "name: other")
    ]
    assert params[0] == sorted(params[0])
    assert "moe_num_experts: 4" in params[0]
    losses = [
        [json.loads(line).get("train/loss") for line in Path(f"logs/{n}/log.jsonl").read_text().splitlines()]
        for n in ("run", "other")
    ]
    assert losses[0] == losses[1]


def test_other_flags_do_not_take_the_place_of_the_first(tmp_path) -> None:
    keep_flags(tmp_path, "lr: 1\nresume: None\n", "# a\nlr: 1\n")
    keep_flags(tmp_path, "lr: 1\nresume: latest\n", "# b\nlr: 1\nresume: latest\n")
    assert {p.name for p in tmp_path.iterdir()} == {"params.txt", "config.yaml"}
    for lr in (2, 2, 3):
        keep_flags(tmp_path, f"lr: {lr}\n", f"lr: {lr}\n")
    assert (tmp_path / "config.yaml").read_text() == "# a\nlr: 1\n"
    assert (tmp_path / "config-2.yaml").read_text() == "lr: 2\n"
    assert (tmp_path / "params-3.txt").read_text() == "lr: 3\n"
    assert not (tmp_path / "config-4.yaml").exists()


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> Path:
    """A project with a package, in git, changed since; and what must not be copied."""
    root = tmp_path / "project"
    files = {
        "open_lm/__init__.py": "",
        "open_lm/a.py": "x = 1\n",
        "moe/run.py": "run()\n",
        "picture.bin": "0",
    }
    files |= {"requirements.txt": "torch\n", "large.bin": "0" * 1_000_001}
    files |= {".gitignore": "/logs/\n.venv/\n__pycache__/\n"}
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)

    def git(*command: str) -> None:
        subprocess.run(["git", "-c", "user.name=t", "-c", "user.email=t@t", "-C", root, *command], check=True)

    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "first")
    for name in (
        "logs/run/log.jsonl",
        ".venv/a.py",
        "open_lm/__pycache__/a.pyc",
        ".env.py",
        "data.tar",
        "new.py",
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("y = 2\n")
    (root / "open_lm/a.py").write_text("x = 3\n")
    monkeypatch.setattr(record, "PACKAGE", root / "open_lm")
    return root


def names(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


def test_the_code_that_runs_is_copied(checkout, tmp_path) -> None:
    copy_code(tmp_path / "run")
    code = tmp_path / "run/code"
    assert names(code) == {
        "open_lm/__init__.py", "open_lm/a.py", "moe/run.py", "requirements.txt", ".gitignore", "picture.bin",
        "new.py", "COMMIT", "changes.diff",
    }  # fmt: skip
    assert (code / "open_lm/a.py").read_text() == "x = 3\n"
    assert (code / "COMMIT").read_text().strip() == commit()
    assert commit().endswith("+")
    # the diff leads from the commit to what ran
    subprocess.run(["git", "-C", checkout, "stash", "-q"], check=True)
    subprocess.run(["git", "-C", checkout, "apply", code / "changes.diff"], check=True)
    assert (checkout / "open_lm/a.py").read_text() == "x = 3\n"


def test_a_resumed_run_keeps_both_codes(checkout, tmp_path) -> None:
    for text in ("x = 3\n", "x = 3\n", "x = 4\n", "x = 4\n"):
        (checkout / "open_lm/a.py").write_text(text)
        copy_code(tmp_path / "run")
    assert {p.name for p in (tmp_path / "run").iterdir()} == {"code", "code-2"}
    assert (tmp_path / "run/code/open_lm/a.py").read_text() == "x = 3\n"
    assert (tmp_path / "run/code-2/open_lm/a.py").read_text() == "x = 4\n"


def test_an_installed_package_is_copied_without_the_project_around_it(checkout, monkeypatch) -> None:
    """site-packages of a virtual environment that lies in somebody's checkout."""
    package = checkout / ".venv/lib/site-packages/open_lm"
    (package / "__pycache__").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "__pycache__/a.pyc").write_text("")
    monkeypatch.setattr(record, "PACKAGE", package)
    assert commit() is None
    assert set(code_files()[0]) == {"open_lm/__init__.py"}


def test_copy_codebase_as_users_run_it(tmp_path) -> None:
    main(
        shlex.split(
            f"{RUN} --dataset-type synthetic --logs {tmp_path} --name r --copy-codebase --max-steps 1"
        )
    )
    code = tmp_path / "r/code"
    assert (code / "open_lm/main.py").read_bytes() == (record.PACKAGE / "main.py").read_bytes()
    assert not any("__pycache__" in name for name in names(code))


@contextmanager
def small_files() -> Iterator[None]:
    """No file can grow beyond 4 kB, as if the disk were full. Not a fixture: pytest's own output may be a file."""
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def test_flags_are_kept_whole_or_not_at_all(tmp_path) -> None:
    with small_files():
        keep_flags(tmp_path, "lr: 1\n", "lr: 1\n")
        with pytest.raises(OSError, match=r"cannot write .*params-2.txt: File too large"):
            keep_flags(tmp_path, "lr: 2\n" * 1000, "lr: 2\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "params.txt"]


def test_a_full_disk_at_the_start_is_one_message(tmp_path, capsys) -> None:
    """The flags have more than 4 kB."""
    notes = "--wandb-notes " + "x" * 5000
    with pytest.raises(SystemExit) as end, small_files():
        main(shlex.split(f"{RUN} --dataset-type synthetic --logs {tmp_path} --name run {notes}"))
    assert end.value.code == 2
    assert (
        f"error: [Errno 27] cannot write {tmp_path}/run/params.txt: File too large" in capsys.readouterr().err
    )
    assert not (tmp_path / "run/params.txt").exists()
