"""A run from s3:// through faults ends with the losses of the run from local files."""

import json
import shlex
import shutil
from pathlib import Path

import pytest

from open_lm.data import retry
from open_lm.main import main

RUN = (
    "--model open_lm_test_tiny --data-key json --precision fp32 --global-batch-size 8 --train-num-samples 640 "
    "--epochs 2 --lr 1e-2 --warmup 2 --log-every-n-steps 1 --name run --data-timeout 2 --data-retries 4"
)


def losses(logs: Path) -> list[float]:
    entries = map(json.loads, (logs / "run" / "log.jsonl").read_text().splitlines())
    return [entry["train/loss"] for entry in entries if "train/loss" in entry]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_through_faults_is_the_local_run(sources, bucket, faults, tmp_path, monkeypatch, workers):
    there = tmp_path / "there"
    shutil.copytree(Path(sources[0]).parent, there)
    bucket(there)
    main(shlex.split(f"{RUN} --dataset-manifest {there}/manifest.jsonl --workers 0 --logs {tmp_path}/local"))
    monkeypatch.setattr(retry.Patience, "wait_seconds", lambda self, attempt: 0.01)
    faults.requests.clear()
    faults.add("manifest.jsonl", "503", "503", "503")
    faults.add("shard_00000000.tar", "reset", "503", "truncate")
    faults.add("shard_00000001.tar", "stall")
    faults.add("shard_00000002.tar", "short", "500")
    remote = (
        f"--dataset-manifest s3://bucket/manifest.jsonl --data-cache {tmp_path}/cache --workers {workers}"
    )
    main(shlex.split(f"{RUN} {remote} --logs {tmp_path}/remote"))
    assert not any(faults.faults.values())
    assert len(losses(tmp_path / "local")) == 10
    assert losses(tmp_path / "remote") == losses(tmp_path / "local")
    assert len(list((tmp_path / "cache").glob("*.tar"))) == 3
    assert len(faults.asked(".tar")) == 3 + 3 + 1 + 2
