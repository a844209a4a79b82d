"""The examples run as their users run them, learn, and show what the experts do."""

import re
import runpy
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[2]


def run(script: str, *flags: str) -> str:
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / script, *flags], cwd=ROOT, capture_output=True, text=True,
        env={"PYTHONPATH": str(ROOT), "COLUMNS": "160", "PATH": "", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def rows(printed: str) -> list[list[str]]:
    """The cells of the table's rows."""
    return [
        [cell.strip() for cell in line.split("│")[1:-1]]
        for line in printed.splitlines()
        if line.startswith("│")
    ]


@pytest.mark.parametrize(
    ("flags", "experts"),
    [
        (("--experts", "4"), [4]),
        (("--experts", "2", "3", "--top-k", "1", "--noise", "rsample", "--residual"), [2, 3]),
        (("--experts", "4", "--top-k", "2", "--capacity-factor", "1"), [4]),
    ],
    ids=["plain", "two layers, RSample, residual", "top-2, drops"],
)
def test_digits(flags, experts):
    pytest.importorskip("sklearn")
    printed = run("cifar10.py", *flags, "--epochs", "6", "--data", "no/such/folder")
    assert "digits: 1,437 images" in printed
    table = rows(printed)
    assert [row[0] for row in table] == ["1", "2", "3", "4", "5", "6"]
    assert float(table[-1][1]) < float(table[0][1])
    assert float(table[-1][2].rstrip("%")) > 40
    for row in table:
        for number, shares in zip(experts, row[3:-1], strict=True):
            assert len(shares.split()) == number
            assert abs(sum(map(int, shares.split())) - 100) <= number
    assert any(row[-1] != "0.0%" for row in table) == ("--capacity-factor" in flags)


def test_cifar_through_torchvision(monkeypatch, tmp_path):
    """The attributes of torchvision.datasets.CIFAR10 as its documentation has them; it fails where no files are."""

    class CIFAR10:
        def __init__(self, root: str, train: bool):
            if not (Path(root) / "cifar-10-batches-py").is_dir():
                raise RuntimeError("Dataset not found or corrupted.")
            self.data = np.full((5 if train else 3, 32, 32, 3), 255, dtype=np.uint8)
            self.data[..., 0] = 0
            self.targets = list(range(5 if train else 3))

    monkeypatch.setitem(sys.modules, "torchvision", types.SimpleNamespace())
    monkeypatch.setitem(sys.modules, "torchvision.datasets", types.SimpleNamespace(CIFAR10=CIFAR10))
    example = runpy.run_path(str(ROOT / "examples" / "cifar10.py"))
    (tmp_path / "cifar-10-batches-py").mkdir()
    name, (images, labels, test_images, test_labels) = example["load_images"](tmp_path)
    assert name == "CIFAR-10"
    assert images.shape == (5, 3, 32, 32)
    assert test_images.shape == (3, 3, 32, 32)
    assert labels.tolist() == [0, 1, 2, 3, 4]
    assert test_labels.tolist() == [0, 1, 2]
    assert (images[:, 0] == -1).all()
    assert (images[:, 1:] == 1).all()
    network = example["Network"](3, 32, example["Flags"]())
    assert network(images)[0].shape == (5, 10)


def test_without_data(monkeypatch, tmp_path):
    example = runpy.run_path(str(ROOT / "examples" / "cifar10.py"))
    for name in ("torchvision", "torchvision.datasets", "sklearn"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SystemExit, match="pip install scikit-learn"):
        example["load_images"](tmp_path)


def test_contradicting_flags():
    example = runpy.run_path(str(ROOT / "examples" / "st_moe_block.py"))
    with pytest.raises(SystemExit, match="--moe-top-k 9 > --moe-num-experts 8"):
        example["main"](["--top-k", "9"])


def test_st_moe_block():
    printed = run("st_moe_block.py", "--steps", "60", "--length", "4", "--vocab-size", "8", "--experts", "4")
    table = rows(printed)
    assert [row[0] for row in table] == ["10", "20", "30", "40", "50", "60"]
    assert float(table[-1][1]) < float(table[0][1])
    assert all(len(row[3].split()) == len(row[4].split()) == 4 for row in table)
    assert re.fullmatch(r"\d+\.\d%", table[-1][-1])


def test_the_block_is_dense_moe_dense():
    """SparseBlock against its parts, called one by one."""
    example = runpy.run_path(str(ROOT / "examples" / "st_moe_block.py"))
    torch.manual_seed(0)
    block = example["SparseBlock"](example["Flags"](dim=16, experts=4)).eval()
    x_BSD = torch.randn(2, 8, 16)
    h_BSD = block.before(x_BSD)
    h_BSD = h_BSD + block.moe(block.norm(h_BSD))[0]
    y_BSD, stats = block(x_BSD)
    assert torch.equal(y_BSD, block.after(h_BSD))
    assert stats.loss.grad_fn is not None
