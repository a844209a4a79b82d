"""The rules of docs/architecture.md that a machine can hold."""

import ast
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from setuptools import find_packages

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "open_lm"
# Lowest first; members of a set do not import each other.
LAYERS = [
    {"config"}, {"nn"}, {"moe"}, {"loss"}, {"model"}, {"parallel", "optim", "flops", "data"},
    {"tokenize"}, {"averaging"}, {"checkpoint"}, {"log"}, {"eval", "metrics", "report", "generate", "job"},
    {"debug", "skips"}, {"train", "validation", "saves"}, {"main"},
]  # fmt: skip
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
OPTIONAL = {
    "wandb",
    "xformers",
    "s3fs",
    "botocore",
    "tokenizers",
    "webdataset",
    "megablocks",
    "grouped_gemm",
    "ray",
    "pyarrow",
    "zstandard",
    "lm_eval",
}
FILES = sorted(PACKAGE.rglob("*.py"))


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path, everywhere: bool = True) -> set[str]:
    """Dotted names that a file imports; `everywhere` includes those inside functions."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = ast.walk(tree) if everywhere else tree.body
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_left_only(path: Path) -> None:
    part = part_of(path)
    if part == "__init__":
        return
    for name in imports(path):
        pieces = name.split(".")
        if pieces[0] != "open_lm" or pieces[1] in (part, "__version__"):
            continue
        assert pieces[1] in RANK, f"{path} imports {name}, which no layer holds"
        assert RANK[pieces[1]] < RANK[part], f"{path} ({part}) imports {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_heavy_imports(path: Path) -> None:
    part, everything = part_of(path), imports(path)
    roots = {name.split(".")[0] for name in everything}
    if part == "config":
        assert "torch" not in roots
    if part in ("nn", "moe", "model"):
        assert not any(name.startswith("torch.distributed") for name in everything)
    at_import = {name.split(".")[0] for name in imports(path, everywhere=False)}
    assert not at_import & OPTIONAL, "optional packages are imported where they are used"


def test_files_hold_one_idea() -> None:
    long = {str(p): n for p in FILES if (n := len(p.read_text(encoding="utf-8").splitlines())) > 350}
    assert not long


def test_the_wheel_holds_only_open_lm() -> None:
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = find_packages(str(ROOT), **setup["packages"]["find"])
    assert found
    assert {name.split(".")[0] for name in found} == {"open_lm"}
    folders = {p.parent.relative_to(ROOT) for p in FILES}
    assert {Path(*name.split(".")) for name in found} == folders, "a folder lacks __init__.py"


def test_nothing_large_or_private_is_tracked() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    files = [ROOT / name for name in listed.stdout.split("\0") if name]
    assert all(f.stat().st_size < 2_000_000 for f in files if f.exists())
    secrets = re.compile(r"AKIA[0-9A-Z]{16}|-----BEGIN [A-Z ]*PRIVATE KEY")
    assert not [
        f for f in files if f.suffix in (".py", ".md", ".sh") and secrets.search(f.read_text("utf-8"))
    ]
