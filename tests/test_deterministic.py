"""--deterministic: the same bits twice, also where tokens have unlike numbers of rows (expert choice)."""

import hashlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from open_lm.config.parse import parse
from open_lm.config.resolve import resolve_model
from open_lm.config.survival import refuse_nondeterministic

ROOT = Path(__file__).parents[1]
RUN = (
    "--model open_lm_test_tiny --dataset-type synthetic --precision amp_bfloat16 --global-batch-size 8 --warmup 1 "
    "--lr 1e-2 --train-num-samples 1280 --epochs 1 --workers 0 --moe-freq 2 --moe-num-experts 4 --deterministic"
)


def train(logs: Path, name: str, extra: str) -> str:
    command = [
        sys.executable,
        "-m",
        "open_lm.main",
        *shlex.split(f"{RUN} --logs {logs} --name {name} {extra}"),
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment.pop("CUBLAS_WORKSPACE_CONFIG", None)
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    weights = torch.load(logs / name / "checkpoints/epoch_1.pt", weights_only=True)["state_dict"]
    digest = hashlib.sha256()
    for tensor in weights.values():
        digest.update(tensor.float().numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("extra", ["", "--moe-router expert_choice"], ids=["top_k", "expert_choice"])
def test_twice_the_same(tmp_path, extra) -> None:
    assert train(tmp_path, "a", extra) == train(tmp_path, "b", extra)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    "extra",
    ["--torchcompile", "--moe-router expert_choice --torchcompile", "--moe-capacity-factor 0 --grad-checkpointing",
     "--moe-backend reference", "--dropout 0.1 --attn-dropout 0.1"],
)  # fmt: skip
def test_on_a_gpu(tmp_path, extra) -> None:
    assert train(tmp_path, "a", extra) == train(tmp_path, "b", extra)


@pytest.mark.parametrize("extra", ["--moe-backend megablocks", "--attn-name xformers_attn"])
def test_what_is_refused(extra) -> None:
    run, given = parse(shlex.split(f"{RUN} {extra}"))
    with pytest.raises(ValueError, match=f"--deterministic with {extra}"):
        refuse_nondeterministic(resolve_model(run.model, run.moe, given))


def test_the_cost_is_said_as_the_docs_say_it(tmp_path) -> None:
    train(tmp_path, "a", "")
    said = re.search(r"--deterministic: slower on a GPU, by (\d+ %)", (tmp_path / "a/out.log").read_text())
    assert said
    assert f"{said[1]} slower" in (ROOT / "docs/running.md").read_text()
