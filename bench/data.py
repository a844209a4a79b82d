"""Our data loading beside plain webdataset, mosaicml-streaming and litdata, on the same tokens.

    python bench/data.py --peers build/peers

makes shards of random tokens in each library's own format, then measures every reader in fresh processes, without
worker processes (so: per core): tokens/s of CPU time and of wall time in a warm page cache, time to the first
batch, time to the first batch at 90 % of the data, greatest resident memory; then one pass from an S3 server on
loopback (moto, in a process of its own, whose CPU time is recorded). Peers live in a venv of their own, made on the
first run. At last, how long a loop waits for our batches that takes `rate` tokens/s, with one worker process, as in
training. Prints a table and appends the numbers to bench/records/data.jsonl.

A batch is int64 inputs and targets, shuffled where a reader can without reading ahead: ours shuffles everything,
streaming and litdata shards and what is in them; webdataset does not. moto reads all of an object for every range
of it, so ranges cost more CPU than a real server's; --server takes another one.
"""

import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
READERS = ("ours", "webdataset", "streaming", "litdata")
PACKAGES = ("webdataset", "mosaicml-streaming", "litdata")
BUCKET = "bench"


@dataclass(frozen=True)
class BenchConfig:
    """Compare data readers on the same tokens."""

    folder: Path = Path("build/bench_data")
    """Where the data lie in every format; about 1.4 times 3 copies of `sequences` * (`seq_len` + 1) * 2 bytes."""

    peers: Path = Path("build/peers")
    """Virtual environment of the other libraries, made if it is not there."""

    sequences: int = 32_768
    """In all shards."""

    shards: int = 8
    """Files that they are divided among."""

    seq_len: int = 2048
    """Tokens the model sees; a stored sequence has one more."""

    batch: int = 64
    """Sequences of a batch."""

    repeats: int = 3
    """Fresh processes for each local measurement; the best is kept."""

    rate: int = 1_500_000
    """Tokens/s of the loop that waits for batches."""

    server: str = "moto.server"
    """The S3 server: what starts it, with {port}; a module without arguments is Python's, as moto's is."""

    record: Path | None = ROOT / "bench" / "records" / "data.jsonl"
    """File that the numbers are appended to."""


def make_tokens(task: dict):
    """(sequences, seq_len + 1) uint16 of open_lm's vocabulary, the same in every process."""
    import numpy as np

    shape = (task["sequences"], task["seq_len"] + 1)
    return np.random.default_rng(0).integers(0, 50_432, shape, dtype=np.uint16)


def tokens_of(i: int, source: Any):
    """For litdata's optimize: the i-th block of tokens."""
    import torch

    return torch.from_numpy(source[i].astype("int32"))


def write_ours(task: dict) -> None:
    from open_lm.tokenize.shard_writer import write_shards

    write_shards(Path(task["folder"], "ours"), make_tokens(task), task["sequences"] // task["shards"], "u16")


def write_streaming(task: dict) -> None:
    from streaming import MDSWriter

    columns = {"tokens": f"ndarray:uint16:{task['seq_len'] + 1}"}
    target = str(Path(task["folder"], "streaming"))
    limit = task["sequences"] // task["shards"] * (task["seq_len"] + 1) * 2 * 102 // 100
    with MDSWriter(out=target, columns=columns, size_limit=limit) as writer:
        for tokens_L in make_tokens(task):
            writer.write({"tokens": tokens_L})


def write_litdata(task: dict) -> None:
    import functools

    from litdata import TokensLoader, optimize

    length = task["seq_len"] + 1
    optimize(
        functools.partial(tokens_of, source=make_tokens(task)),
        list(range(task["sequences"])),
        str(Path(task["folder"], "litdata")),
        chunk_size=length * (task["sequences"] // task["shards"]),
        num_workers=1,
        item_loader=TokensLoader(block_size=length),
    )


def divide(tokens_BL):
    """Inputs and targets as ours makes them."""
    import numpy as np
    import torch

    return (
        torch.from_numpy(tokens_BL[:, :-1].astype(np.int64)),
        torch.from_numpy(tokens_BL[:, 1:].astype(np.int64)),
    )


def read_ours(task: dict, where: str, first: int):
    from open_lm.config import DataConfig
    from open_lm.data.loader import TrainData
    from open_lm.data.remote import Cache

    config = DataConfig(dataset_manifest=(f"{where}/ours/manifest.jsonl",), workers=0)
    data = TrainData(
        config, task["seq_len"], 50_432, 0, 1, task["batch"], 0, Cache(Path(task["cache"], "ours"))
    )
    for batch in data.batches(first // task["batch"], task["sequences"] // task["batch"]):
        yield batch.tokens_BS, batch.targets_BS


def read_webdataset(task: dict, where: str, first: int):
    import numpy as np
    import webdataset

    url = f"{where}/ours/shard_{{00000000..{task['shards'] - 1:08d}}}.tar"
    if where.startswith("s3://"):
        url = f"pipe:curl -s {os.environ['AWS_ENDPOINT_URL']}/{url.removeprefix('s3://')}"
    samples = iter(webdataset.WebDataset(url, shardshuffle=False))
    for _ in range(first):  # it has no other way to get there
        next(samples)
    rows = []
    for sample in samples:
        rows.append(np.frombuffer(sample["u16"], "<u2"))
        if len(rows) == task["batch"]:
            yield divide(np.stack(rows))
            rows = []


def read_streaming(task: dict, where: str, first: int):
    import numpy as np
    from streaming import StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    clean_stale_shared_memory()
    os.environ["S3_ENDPOINT_URL"] = os.environ.get("AWS_ENDPOINT_URL", "")
    is_remote = where.startswith("s3://")
    local = str(Path(task["cache"], "streaming")) if is_remote else f"{where}/streaming"
    data = StreamingDataset(
        remote=f"{where}/streaming" if is_remote else None,
        local=local,
        shuffle=True,
        batch_size=task["batch"],
        shuffle_seed=0,
    )
    if first:
        data.load_state_dict(
            {"epoch": 0, "sample_in_epoch": first, "num_canonical_nodes": 1, "shuffle_seed": 0,
             "initial_physical_nodes": 1}
        )  # fmt: skip
    rows = []
    for sample in data:
        rows.append(sample["tokens"])
        if len(rows) == task["batch"]:
            yield divide(np.stack(rows))
            rows = []


def read_litdata(task: dict, where: str, first: int):
    from litdata import StreamingDataLoader, StreamingDataset, TokensLoader
    from litdata.streaming import downloader

    # Its S3 client in Rust refuses http:// unless told otherwise, and litdata has no option for that.
    downloader._OBSTORE_CLIENT_OPTIONS["allow_http"] = "true"

    def make():
        options = {"endpoint_url": os.environ["AWS_ENDPOINT_URL"]} if where.startswith("s3://") else {}
        data = StreamingDataset(
            f"{where}/litdata",
            item_loader=TokensLoader(block_size=task["seq_len"] + 1),
            shuffle=True,
            storage_options=options,
            cache_dir=str(Path(task["cache"], "litdata")) if options else None,
        )
        return StreamingDataLoader(data, batch_size=task["batch"], num_workers=0)

    loader = make()
    if first:
        batches = iter(loader)
        next(batches)
        state = loader.state_dict()
        state["num_samples_yielded"] = first
        state["dataset"]["num_samples_yielded"] = first
        loader = make()
        task["resumed_at"] = time.perf_counter()
        loader.load_state_dict(state)
    for tokens_BL in loader:
        yield divide(tokens_BL.numpy())


def measure(task: dict) -> dict:
    """In a fresh process: seconds to the first batch from `first` on, then tokens/s until `tokens` are read."""
    import torch

    torch.set_num_threads(1)
    read = globals()[f"read_{task['reader']}"]
    if task["reader"] != "ours":
        __import__({"streaming": "streaming", "litdata": "litdata"}.get(task["reader"], "webdataset"))
    else:
        import open_lm.data.loader  # noqa: F401
    started = time.perf_counter()
    batches = read(task, task["where"], task["first"])
    next(batches)
    first_batch = time.perf_counter() - task.get("resumed_at", started)
    wall, cpu, tokens = time.perf_counter(), cpu_seconds(), 0
    for inputs_BS, _ in batches:
        tokens += inputs_BS.numel()
        if tokens >= task["tokens"]:
            break
    wall, cpu = time.perf_counter() - wall, cpu_seconds() - cpu
    (line,) = (
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")
    )
    peak = int(line.split()[1]) * 1024  # ru_maxrss would be the parent's, where that is larger
    return {
        "first_batch_seconds": first_batch,
        "tokens": tokens,
        "tokens_per_cpu_second": tokens / cpu if cpu else 0.0,
        "tokens_per_second": tokens / wall if wall else 0.0,
        "peak_bytes": peak,
    }


def wait(task: dict) -> dict:
    """How long a loop waits for our batches that takes `rate` tokens/s, after the first one."""
    import torch

    from open_lm.config import DataConfig
    from open_lm.data.loader import TrainData
    from open_lm.data.waiting import waiting

    torch.set_num_threads(1)
    config = DataConfig(dataset_manifest=(f"{task['where']}/ours/manifest.jsonl",), workers=1)
    data = TrainData(config, task["seq_len"], 50_432, 0, 1, task["batch"], 0)
    batches = waiting(
        data.batches(0, task["sequences"] // task["batch"]), lambda: False
    )  # as the training loop
    next(batches)
    started, waited, longest, steps = time.perf_counter(), 0.0, 0.0, 0
    while True:
        time.sleep(task["batch"] * task["seq_len"] / task["rate"])
        asked = time.perf_counter()
        if next(batches, None) is None:
            break
        seconds = time.perf_counter() - asked
        waited, longest, steps = waited + seconds, max(longest, seconds), steps + 1
    return {"share": waited / (asked - started), "longest_seconds": longest, "steps": steps}


def version(task: dict) -> dict:
    """Of a reader's package."""
    from importlib.metadata import version

    return {
        "version": "" if task["reader"] == "ours" else version(PACKAGES[READERS.index(task["reader"]) - 1])
    }


def cpu_seconds() -> float:
    """CPU time of this process and of those it has waited for."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def run_child(python: Path, action: str, task: dict) -> dict:
    """Runs `action` of this file in another interpreter. RuntimeError with the end of what it printed."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"}
    command = [str(python), __file__, action, json.dumps(task)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1200)
    if done.returncode != 0:
        raise RuntimeError(f"{action} {task['reader']}: {done.stdout[-500:]}{done.stderr[-1500:]}")
    return json.loads(done.stdout.splitlines()[-1])


def make_peers(folder: Path) -> Path:
    """The interpreter of the peers' environment, which sees this one's packages too."""
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        (library,) = folder.glob("lib/python3*/site-packages")
        (library / "outer.pth").write_text("\n".join(path for path in sys.path if "site-packages" in path))
        subprocess.run([python, "-m", "pip", "install", "-q", *PACKAGES], check=True)
    return python.absolute()


def serve(folder: Path, command: str) -> subprocess.Popen:
    """An S3 server on loopback, a process, that holds the folder's files; sets AWS_* for this process and its
    children."""
    import boto3
    from botocore.config import Config

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = shlex.split(command.format(port=port))
    if len(command) == 1:
        command = [sys.executable, "-m", *command, "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    os.environ |= {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_ACCESS_KEY_ID": "S3RVER",
                   "AWS_SECRET_ACCESS_KEY": "S3RVER", "AWS_DEFAULT_REGION": "us-east-1"}  # fmt: skip
    client = boto3.client("s3", config=Config(retries={"total_max_attempts": 20, "mode": "standard"}))
    client.create_bucket(Bucket=BUCKET, ACL="public-read")
    for path in (path for path in folder.rglob("*") if path.is_file()):
        key = str(path.relative_to(folder))
        client.put_object(Bucket=BUCKET, Key=key, Body=path.read_bytes(), ACL="public-read")
    return server


def cpu_seconds_of(process: int) -> float:
    """CPU time of a running process and its threads."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def compare(config: BenchConfig) -> list[dict]:
    """All measurements of all readers; a reader that fails has an `error` in place of numbers."""
    folder = config.folder.absolute()
    pythons = dict.fromkeys(READERS, make_peers(config.peers)) | {"ours": Path(sys.executable)}
    sizes = {key: getattr(config, key) for key in ("sequences", "shards", "seq_len", "batch")}
    task: dict = sizes | {"folder": str(folder), "cache": str(folder / "cache")}
    for reader in ("ours", "streaming", "litdata"):
        if not (folder / reader).exists():
            run_child(pythons[reader], "write", task | {"reader": reader})
    everything = config.sequences * config.seq_len
    ninety = config.sequences * 9 // 10 // config.batch * config.batch
    rows = []
    for reader in READERS:
        row: dict = {"reader": reader}
        try:
            row["version"] = run_child(pythons[reader], "version", task | {"reader": reader})["version"]
            plans = {"local": (0, everything), "resume": (ninety, 1)}
            for name, (first, tokens) in plans.items():
                plan = task | {"reader": reader, "where": str(folder), "first": first, "tokens": tokens}
                runs = [run_child(pythons[reader], "measure", plan) for _ in range(config.repeats)]
                row[name] = {
                    key: (max if key.startswith("tokens") else min)(run[key] for run in runs)
                    for key in runs[0]
                }
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            row["error"] = str(error)[-800:]
        rows.append(row)
    shutil.rmtree(folder / "cache", ignore_errors=True)
    server = serve(folder, config.server)
    try:
        for row in rows:
            plan = task | {"reader": row["reader"], "where": f"s3://{BUCKET}", "first": 0}
            try:
                # The server's share of the first batch: of a process that reads no more.
                for name, tokens in (("s3_first", 1), ("s3", everything)):
                    shutil.rmtree(folder / "cache", ignore_errors=True)
                    before = cpu_seconds_of(server.pid)
                    row[name] = run_child(pythons[row["reader"]], "measure", plan | {"tokens": tokens})
                    row[name]["server_cpu_seconds"] = cpu_seconds_of(server.pid) - before
            except (RuntimeError, subprocess.TimeoutExpired) as error:
                row["s3_error"] = str(error)[-800:]
    finally:
        server.kill()
        server.wait()
    return rows


def show(rows: list[dict]) -> str:
    """The numbers as a table."""
    lines = [
        "| reader | M tokens/s a core | M tokens/s, wall | first batch, s | at 90 %, s | peak MB "
        "| S3: first batch, s | S3: whole pass, s | of it the server's CPU, s |",
        "|-|-:|-:|-:|-:|-:|-:|-:|-:|",
    ]
    for row in rows:
        local, resume, s3 = (row.get(name, {}) for name in ("local", "resume", "s3"))
        cells = [
            local.get("tokens_per_cpu_second", 0) / 1e6, local.get("tokens_per_second", 0) / 1e6,
            local.get("first_batch_seconds", 0), resume.get("first_batch_seconds", 0),
            local.get("peak_bytes", 0) / 1e6, s3.get("first_batch_seconds", 0),
            s3.get("first_batch_seconds", 0) + s3["tokens"] / s3["tokens_per_second"] if s3 else 0,
            s3.get("server_cpu_seconds", 0),
        ]  # fmt: skip
        lines.append(
            f"| {row['reader']} | " + " | ".join(f"{cell:.3g}" if cell else "–" for cell in cells) + " |"
        )
    return "\n".join(lines)


def main() -> None:
    import tyro

    from open_lm.log import commit

    config = tyro.cli(BenchConfig)
    load = [os.getloadavg()[0]]
    rows = compare(config)
    sizes = {key: getattr(config, key) for key in ("sequences", "seq_len", "batch", "rate")}
    task = sizes | {"reader": "ours", "where": str(config.folder.absolute())}
    waiting = run_child(Path(sys.executable), "wait", task)
    load.append(os.getloadavg()[0])
    print(show(rows))
    print(
        f"A loop that takes {config.rate / 1e6:g} M tokens/s waits for {waiting['share']:.3%} of its time, at most "
        f"{waiting['longest_seconds'] * 1000:.1f} ms of {config.batch * config.seq_len / config.rate * 1000:.0f}"
    )
    for row in rows:
        for error in (row.get(name) for name in ("error", "s3_error")):
            if error:
                print(f"{row['reader']}: {error}", file=sys.stderr)
    if config.record is not None:
        settings = {key: value for key, value in asdict(config).items() if isinstance(value, int)}
        settings["server"] = "moto" if config.server == "moto.server" else Path(config.server.split()[0]).name
        rows = [{key: value for key, value in row.items() if "error" not in key} for row in rows]
        record = {
            "settings": settings,
            "cores": os.cpu_count(),
            "load": load,
            "commit": commit(),
            "versions": {row["reader"]: row["version"] for row in rows if "version" in row},
            "rows": rows,
            "waiting": waiting,
        }
        with open(config.record, "a") as file:
            file.write(json.dumps(record) + "\n")


ACTIONS = {
    "write": lambda task: globals()[f"write_{task['reader']}"](task) or {},
    "measure": measure,
    "wait": wait,
    "version": version,
}

if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[1] in ACTIONS:
        print(json.dumps(ACTIONS[sys.argv[1]](json.loads(sys.argv[2]))), flush=True)
        sys.stdout.flush()
        os._exit(0)  # other libraries' threads and shared memory are not waited for
    main()
