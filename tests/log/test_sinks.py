"""Servers that are dead, hang, or die on the way; folders that vanish: a run goes on, and ends in time."""

import gzip
import json
import logging
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from open_lm.log import sinks
from open_lm.log.sinks import Record, Sink, TensorBoard, run_id
from open_lm.main import main

RUN = "--model open_lm_test_tiny --dataset-type synthetic --precision fp32 --global-batch-size 8 --epochs 4 \
 --train-num-samples 640 --lr 1e-2 --warmup 2 --log-every-n-steps 1 --workers 0 --moe-freq 2 --moe-num-experts 4"


class Server(BaseHTTPRequestHandler):
    """Answers as wandb's server does to a new run, until it is told to hang."""

    def log_message(self, *arguments) -> None:
        pass

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        try:
            asked = json.loads(body)
        except ValueError:
            asked = {}
        name = re.search(r"(?:query|mutation)\s+(\w+)", asked.get("query", ""))
        self.server.seen.append((name[1] if name else self.path, asked.get("variables") or asked))
        while self.server.hangs.is_set():
            time.sleep(0.1)
        answer: dict = {"data": {}}
        if name and name[1] == "UpsertBucket":
            project = {"id": "P", "name": "p", "entity": {"id": "E", "name": "e"}}
            bucket = {"id": "B", "name": asked["variables"].get("name"), "displayName": "d", "config": "{}"}
            bucket |= {"description": "", "sweepName": None, "historyLineCount": 0, "project": project}
            answer = {"data": {"upsertBucket": {"bucket": bucket, "inserted": True}}}
        data = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_PUT = do_POST


@pytest.fixture
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    server.daemon_threads = True
    server.seen, server.hangs = [], threading.Event()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.hangs.clear()
    server.shutdown()
    server.server_close()
    thread.join()


def start(port: int, script: str, *arguments) -> subprocess.Popen:
    """A process of its own, with a key for the server at `port`: wandb reads its environment once."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")}
    environment |= {"WANDB_BASE_URL": f"http://127.0.0.1:{port}", "WANDB_API_KEY": "a" * 40}
    environment |= {"WANDB_ERROR_REPORTING": "false", "OMP_NUM_THREADS": "1"}
    head = "import sys, time; from open_lm.log import sinks; from open_lm.main import main\n"
    return subprocess.Popen(
        [sys.executable, "-c", head + script, *map(str, arguments)],
        env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def read_wandb(folder: Path) -> list[list]:
    """Of every run in `folder`, its records: protocol buffers in LevelDB's log format, after 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record as Saved

    runs = []
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        data, at, parts, records = path.read_bytes(), 7, b"", []
        while at + 7 <= len(data):
            if 32768 - at % 32768 < 7:  # a block's end too short for a header
                at += 32768 - at % 32768
                continue
            length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
            parts += data[at + 7 : at + 7 + length]
            at += 7 + length
            if kind in (1, 4):  # whole, or the last part
                records.append(Saved.FromString(parts))
                parts = b""
        runs.append(records)
    return runs


def history(records: list) -> list[dict]:
    def name(item) -> str:
        return item.key or "/".join(item.nested_key)

    rows = [r.history for r in records if r.WhichOneof("record_type") == "history"]
    return [{name(item): json.loads(item.value_json) for item in row.item} for row in rows]


def scalars(folder: Path) -> EventAccumulator:
    read = EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0})
    return read.Reload()


@pytest.mark.parametrize("hangs", [False, True], ids=["dead", "hanging"])
def test_a_run_does_not_need_wandbs_server(tmp_path, hangs) -> None:
    """It starts at once, is logged offline after a time, and ends; the curves are all there."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if hangs:
            listener.listen(50)
        command = shlex.split(f"{RUN} --logs {tmp_path} --name run --report-to wandb --max-steps 6")
        script = "sinks.INIT_SECONDS = 3.0; main(sys.argv[1:])"
        process = start(listener.getsockname()[1], script, *command)
        printed, _ = process.communicate(timeout=60)
    assert process.returncode == 0, printed
    assert printed.index("step 1/20") < printed.index("wandb cannot be reached, the run is logged offline")
    assert "wandb sync --id " + run_id(tmp_path / "run") in printed
    (offline,) = [r for r in read_wandb(tmp_path / "run") if history(r)]
    rows = [row for row in history(offline) if "train/loss" in row]
    assert [(row["step"], row["tokens"]) for row in rows] == [(n, 128 * n) for n in range(1, 7)]
    assert rows[0]["router/layer_0/entropy"] > 0
    assert history(offline)[-1]["router/layer_0/shares/_type"] == "image-file"
    metrics = [r.metric for r in offline if r.WhichOneof("record_type") == "metric"]
    assert {(m.glob_name, m.step_metric) for m in metrics if m.glob_name} == {
        (name, "tokens") for name in ("train/*", "valid/*", "router/*")
    }


SEND = """
from pathlib import Path
sinks.FINISH_SECONDS = 3.0
sink = sinks.Sink("wandb", lambda: sinks.Wandb(Path(sys.argv[1]), "p", "", {"lr": 0.1}))
sink.put(sinks.Record(1, {"tokens": 5, "train/loss": 2.0}, {}))
sys.stdin.readline()
begin = time.monotonic()
for step in range(2, 1000):
    sink.put(sinks.Record(step, {"tokens": 5 * step, "train/loss": 2.0}, {}))
print("put", time.monotonic() - begin)
sink.finish(False)
sink.wait(time.monotonic() + 60)
print("ended", not sink._thread.is_alive(), time.monotonic() - begin)
"""


def test_a_resumed_wandb_run_and_a_server_that_dies_on_the_way(tmp_path, server) -> None:
    """The second start asks for the run of the first; then the server hangs, and the end is bounded in time."""
    for dies in (False, True):
        server.seen.clear()
        process = start(server.server_port, SEND, tmp_path)
        end = time.monotonic() + 60
        while not any(name == "UpsertBucket" for name, _ in server.seen) and time.monotonic() < end:
            time.sleep(0.1)
        time.sleep(1)
        if dies:
            server.hangs.set()
        begin = time.monotonic()
        printed, _ = process.communicate("go\n", timeout=60)
        assert process.returncode == 0, printed
        assert time.monotonic() - begin < 30
        assert float(re.search("put (.*)", printed)[1]) < 2
        assert "ended True" in printed
        asked = [(name, v["name"]) for name, v in server.seen if name in ("RunResumeStatus", "UpsertBucket")]
        assert asked[:2] == [("RunResumeStatus", run_id(tmp_path)), ("UpsertBucket", run_id(tmp_path))]


def test_a_sink_that_hangs_is_left_behind(caplog, monkeypatch) -> None:
    monkeypatch.setattr(sinks, "MAX_WAITING", 3)
    monkeypatch.setattr(logging.getLogger("open_lm"), "propagate", True)
    never = threading.Event()
    sink = Sink("slow", lambda: never.wait())
    start = time.monotonic()
    for step in range(10):
        sink.put(Record(step, {}, {}))
    sink.finish(False)
    sink.wait(start + 0.5)
    assert time.monotonic() - start < 2
    assert "slow is 3 records behind" in caplog.text
    assert "slow does not end" in caplog.text
    never.set()


def test_tensorboard_reads_back_scalars_and_pictures(tmp_path) -> None:
    main(shlex.split(f"{RUN} --logs {tmp_path} --name run --report-to tensorboard --max-steps 6"))
    read = scalars(tmp_path / "run/tensorboard")
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "train/loss" in line]
    losses = [(e.step, e.value) for e in read.Scalars("train/loss")]
    assert losses == [(line["step"], pytest.approx(line["train/loss"])) for line in lines]
    assert {"tokens", "train/lr", "router/layer_0/share_3"} <= set(read.Tags()["scalars"])
    (picture,) = read.Images("router/layer_0/shares")
    assert picture.step == 6
    assert (picture.height, picture.width) == (160, 6 * (500 // 6))


# SummaryWriter's own thread prints its error, which pytest would take for this test's
VANISHES = """
import shutil, sys, torch.utils.tensorboard as tensorboard
from open_lm.main import main
writer = tensorboard.SummaryWriter
class Vanishes(writer):
    def add_scalar(self, *arguments):
        super().add_scalar(*arguments)
        self.flush()
        shutil.rmtree(self.log_dir, ignore_errors=True)
tensorboard.SummaryWriter = Vanishes
main(sys.argv[1:])
"""


def test_tensorboards_folder_vanishes(tmp_path) -> None:
    command = shlex.split(f"{RUN} --logs {tmp_path} --name run --report-to tensorboard --max-steps 6")
    done = subprocess.run([sys.executable, "-c", VANISHES, *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "tensorboard failed and gets no more metrics: [Errno 2]" in done.stdout
    assert "step 6/20" in done.stdout
    assert (tmp_path / "run/checkpoints/epoch_2.pt").exists()


def test_a_resumed_run_goes_on_in_its_curves(tmp_path, monkeypatch) -> None:
    """It died at step 12, after the checkpoint of step 5: what it then does again is there once, in full."""
    command = f"{RUN} --logs {tmp_path} --name run --report-to tensorboard,wandb --max-steps"
    monkeypatch.setenv("WANDB_MODE", "offline")
    main(shlex.split(f"{command} 12"))
    for n, step in ((2, 10), (3, 12)):
        (tmp_path / f"run/checkpoints/epoch_{n}.pt").unlink()
        shutil.rmtree(tmp_path / f"run/checkpoints/step_{step}")
    time.sleep(1.1)  # the names of TensorBoard's files hold whole seconds
    main(shlex.split(f"{command} 8 --resume latest --lr 1e-3"))
    read = scalars(tmp_path / "run/tensorboard")
    assert [e.step for e in read.Scalars("train/loss")] == list(range(1, 9))
    rates = [e.value for e in read.Scalars("train/lr")]
    assert rates[4] > 5e-3
    assert all(rate <= 1e-3 for rate in rates[5:])
    # all eight steps are in the last picture: 5 of the first try, 3 of the second
    assert read.Images("router/layer_0/shares")[-1].width == 8 * (500 // 8)
    first, second = read_wandb(tmp_path / "run")
    ids = {
        r.run.run_id for records in (first, second) for r in records if r.WhichOneof("record_type") == "run"
    }
    assert ids == {run_id(tmp_path / "run")}
    assert [row["step"] for row in history(second) if "train/loss" in row] == [6, 7, 8]
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [line["resumed"] for line in lines if "resumed" in line] == [5]
    assert sum("train/loss" in line for line in lines) == 12 + 3  # nothing is lost


def test_wandb_is_told_that_a_run_failed(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    command = f"{RUN} --logs {tmp_path} --report-to wandb --max-steps 4 --max-skipped-updates 2"
    main(shlex.split(f"{command} --name well"))
    with pytest.raises(RuntimeError, match="not finite"):
        main(shlex.split(f"{command} --name failed --lr 1e30"))
    for name, code in (("well", 0), ("failed", 1)):
        codes, end = [], time.monotonic() + 10
        while not codes and time.monotonic() < end:  # another process writes the file
            (records,) = read_wandb(tmp_path / name)
            codes = [r.exit.exit_code for r in records if r.WhichOneof("record_type") == "exit"]
        assert codes == [code]


def test_a_folder_without_a_checkpoint_begins_again(tmp_path) -> None:
    main(shlex.split(f"{RUN} --logs {tmp_path} --name run --max-steps 2"))
    shutil.rmtree(tmp_path / "run/checkpoints")
    main(shlex.split(f"{RUN} --logs {tmp_path} --name run --max-steps 1 --resume latest"))
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [line["resumed"] for line in lines if "resumed" in line] == [0]


def test_tensorboard_keeps_what_an_evaluation_finds(tmp_path) -> None:
    """Without a step nothing is purged."""
    for step, folder_step in ((5, 4), (5, None)):
        writer = TensorBoard(tmp_path, folder_step)
        picture = np.zeros((4, 6, 3), dtype=np.uint8)
        writer.write(Record(step, {"a": float(folder_step or 0)}, {"p": picture}))
        writer.close(False)
    assert len(scalars(tmp_path / "tensorboard").Scalars("a")) == 2


def test_a_full_disk_does_not_end_a_run(tmp_path, monkeypatch) -> None:
    from open_lm import log as log_package

    opened = log_package.open_jsonl

    class Full:
        def __init__(self, path) -> None:
            self.file, self.writes = opened(path), 0

        def write(self, text) -> None:
            self.writes += 1
            if self.writes == 3:
                raise OSError(28, "No space left on device")
            self.file.write(text)

        def flush(self) -> None:
            self.file.flush()

        def close(self) -> None:
            self.file.close()
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(log_package, "open_jsonl", Full)
    main(shlex.split(f"{RUN} --logs {tmp_path} --name run --max-steps 5"))
    text = (tmp_path / "run/out.log").read_text()
    assert text.count("log.jsonl cannot be written: [Errno 28]") == 1
    assert "step 5/20" in text
