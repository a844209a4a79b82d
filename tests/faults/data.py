"""Faults of data: on disk, behind a network, too little, in another order."""

import gzip
import io
import json
import logging
import os
import tarfile
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.conftest import write_source
from tests.data.faults import FaultProxy
from tests.faults.runs import ANYWHERE, Ranks, fault, last_step, losses, run, source, steps


def tokens_of(folder: Path, ranks: int) -> dict[int, list]:
    """{step: its rows in the order of ranks}."""
    found: dict[int, list] = {}
    for rank in range(ranks):
        for line in (folder / f"tokens_{rank}.jsonl").read_text().splitlines():
            entry = json.loads(line)
            found.setdefault(entry["step"], []).extend(entry["tokens"])
    return found


@fault(
    5,
    "resume on 1 rank what 2 began, and on 2 what 1 began",
    "the same order of tokens, unsorted; losses to 1e-6",
)
def other_ranks(folder: Path, quick: bool) -> str:
    flags = f"{source(folder)} --workers 0 {ANYWHERE} {steps(4, 12)}"
    run(folder / "one", flags, faults="record_tokens")
    expected, loss = tokens_of(folder / "one", 1), losses(folder / "one")
    worst = 0.0
    for name, first, second in (("2_1", 2, 1), ("1_2", 1, 2)):
        place = folder / name
        run(place, f"{flags} --max-steps 6", ranks=first, faults="record_tokens")
        before = tokens_of(place, first)
        for path in place.glob("tokens_*"):
            path.unlink()
        run(place, f"{flags} --resume latest", ranks=second, faults="record_tokens")
        seen = before | tokens_of(place, second)
        assert seen == expected, f"{name}: another order"
        worst = max(worst, *(abs(losses(place)[s] / loss[s] - 1) for s in loss))
    assert worst < 1e-6, worst
    return f"12 steps of 8 rows alike in both directions; greatest relative difference of a loss {worst:.1e}"


@fault(6, "--workers 0, 1, 4", "the same order")
def workers(folder: Path, quick: bool) -> str:
    orders = {}
    for n in (0, 1, 4):
        run(folder / str(n), f"{source(folder)} --workers {n} {steps(6, 12)}", faults="record_tokens")
        orders[n] = tokens_of(folder / str(n), 1)
    assert orders[0] == orders[1] == orders[4]
    return f"{len(orders[0])} steps of 8 rows alike"


def damaged(folder: Path) -> str:
    """A shard of 40 samples: sample 3 is no JSON, 5 is too short; and one that is cut in the middle."""
    folder.mkdir(parents=True)
    listing = []
    for shard in range(2):
        path = folder / f"shard_{shard:08d}.tar"
        with tarfile.open(path, "w") as tar:
            for sample in range(40):
                content = json.dumps([sample % 16] * (9 if (shard, sample) == (0, 5) else 17)).encode()
                data = b"{broken" if (shard, sample) == (0, 3) else content
                data = gzip.compress(data)
                member = tarfile.TarInfo(f"{shard:04d}_{sample:06d}.json.gz")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
        listing.append(json.dumps({"shard": path.stem, "num_sequences": 40}))
    cut = folder / "shard_00000001.tar"
    os.truncate(cut, 1024 * 30 + 300)
    (folder / "manifest.jsonl").write_text("\n".join(listing))
    return str(folder / "manifest.jsonl")


@fault(
    11,
    "a truncated tar, bad JSON, a sample of the wrong length",
    "failed with the name, or with --ignore-parse-errors counted and skipped: 80 samples in 10 steps",
)
def damaged_data(folder: Path, quick: bool) -> str:
    flags = f"--dataset-manifest {damaged(folder / 'data')} --data-key json --workers 0 {steps(5, 10)}"
    strict = Ranks(folder / "strict", flags)
    (code,) = strict.wait()
    assert code == 1, "damaged data trained on"
    said = strict.text().strip().splitlines()[-1]
    assert said.startswith("open_lm.main: error: shard "), strict.text()
    assert "Traceback" not in strict.text(), strict.text()
    loose = run(folder / "loose", f"{flags} --ignore-parse-errors")
    entries = [json.loads(line) for line in (folder / "loose/run/log.jsonl").read_text().splitlines()]
    bad = [e["train/bad_samples"] for e in entries if "train/bad_samples" in e][-1]
    tokens = [e["tokens"] for e in entries if "train/bad_samples" in e][-1]
    assert tokens == (80 - bad) * 16, (tokens, bad)
    assert bad >= 12, bad  # 1 + 1 and what the cut took
    named = loose.text().count(": ignored")
    assert named >= 3, loose.text()
    assert last_step(folder / "loose") == 10
    return f"strict: status {code}, “{said[-160:]}”; loose: 80 = {tokens // 16} trained on + {bad} counted"


@contextmanager
def s3() -> Iterator[tuple[FaultProxy, Any, dict[str, str]]]:
    """A real S3 server behind the proxy that injects faults: (proxy, client, environment)."""
    import boto3
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line for each request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    urllib.request.urlopen(f"http://{host}:{port}/moto-api/reset", data=b"").close()
    keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
    client = boto3.client(
        "s3", endpoint_url=f"http://{host}:{port}", aws_access_key_id="test", aws_secret_access_key="test",
        region_name="us-east-1",
    )  # fmt: skip
    client.create_bucket(Bucket="bucket")
    proxy = FaultProxy(f"http://{host}:{port}")
    try:
        yield proxy, client, keys | {"AWS_ENDPOINT_URL": proxy.url}
    finally:
        proxy.close()
        client.close()
        server.stop()


def upload(client: Any, folder: Path, shards: int = 2) -> None:
    write_source(folder / "data", [200 // shards] * shards, 16, 16, seed=1)
    for path in (folder / "data").iterdir():
        client.put_object(Bucket="bucket", Key=path.name, Body=path.read_bytes())


def remote_flags(place: Path, interval: int, total: int) -> str:
    return (
        f"--dataset-manifest s3://bucket/manifest.jsonl --data-key json --multiple-data-passes --workers 0 "
        f"--data-cache {place / 'cache'} --data-retries 2 --data-timeout 2 {steps(interval, total)}"
    )


@fault(12, "a shard vanishes from S3 in mid-run (503, then 404)", "tried again, then an error with its name")
def vanishing_shard(folder: Path, quick: bool) -> str:
    seen = []
    with s3() as (proxy, client, environment):
        upload(client, folder, shards=100)  # 64 of a source are open at a time
        names = [f"shard_{number:08d}.tar" for number in range(100)]
        for status, expected in (("503", "failed 3 times"), ("404", "no such file")):
            place = folder / status
            flags = remote_flags(place, 100, 400) + " --data-cache-gib 0 --disable-buffer"
            ranks = Ranks(place, flags, environment=environment, faults="slow:0.05")
            ranks.until_step(2)
            asked = len(proxy.requests)
            for name in names:
                for method in ("GET", "HEAD"):
                    proxy.add(name, *[status] * 50, method=method)
            (code,) = ranks.wait(120)
            assert code, "trained on without the shard"
            met = {Path(request.path.partition("?")[0]).name for request in proxy.requests[asked:]}
            said = [line for line in ranks.text().splitlines() if any(name in line for name in met)][-1]
            assert expected in said, said
            seen.append(f"{status}: status {code} after step {last_step(place)}, “{said[-140:]}”")
            proxy.faults.clear()
    return "; ".join(seen)


@fault(13, "S3: 503 three times, a reset connection, a stall; 403", "back-off succeeds; 403 fails at once")
def s3_faults(folder: Path, quick: bool) -> str:
    with s3() as (proxy, client, environment):
        upload(client, folder)
        flags = remote_flags(folder / "passing", 5, 10).replace("--data-retries 2", "--data-retries 6")
        proxy.add("shard_00000000.tar", "503", "503", "503")
        proxy.add("shard_00000001.tar", "reset", "stall")
        ranks = run(folder / "passing", flags, environment=environment)
        attempts = ranks.text().count("failed, attempt")
        assert attempts == 5, ranks.text()
        local = f"{source(folder)} --workers 0 {steps(5, 10)}"
        run(folder / "local", local)
        assert losses(folder / "local") == losses(folder / "passing")
        proxy.add("manifest.jsonl", *["403"] * 20)
        asked = len(proxy.asked("manifest.jsonl"))
        denied = Ranks(
            folder / "denied", remote_flags(folder / "denied", 5, 10), environment=environment
        ).ends(2)
        asked = len(proxy.asked("manifest.jsonl")) - asked
        assert asked == 1, f"a 403 was asked for {asked} times"
        said = denied.text().strip().splitlines()[-1]
        assert "access is denied" in said, said
    return f"{attempts} attempts made again, losses as from local files; 403: 1 request, “{said[-90:]}”"


@fault(18, "a token id outside of the vocabulary", "an error with shard and sample, before the embedding")
def foreign_token(folder: Path, quick: bool) -> str:
    place = folder / "data"
    place.mkdir(parents=True)
    with tarfile.open(place / "shard_00000000.tar", "w") as tar:
        for sample in range(16):
            data = json.dumps([sample % 16] * 16 + [16 if sample == 11 else 1]).encode()
            member = tarfile.TarInfo(f"{sample:08d}.json")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    (place / "manifest.jsonl").write_text(json.dumps({"shard": "shard_00000000", "num_sequences": 16}))
    flags = f"--dataset-manifest {place}/manifest.jsonl --data-key json --workers 0 {steps(2, 2)}"
    ranks = Ranks(folder, flags)
    (code,) = ranks.wait()
    assert code == 1, "a foreign id was trained on"
    said = ranks.text().strip().splitlines()[-1]
    assert "Traceback" not in ranks.text(), ranks.text()
    assert "open_lm.main: error: shard" in said, said
    assert "shard_00000000.tar: sample 00000011.json has token id 16" in said, ranks.text()
    return f"status {code}: “{said[-170:]}”"


@fault(20, "too little data for the run", "said before step 0")
def too_little(folder: Path, quick: bool) -> str:
    flags = source(folder).replace("--multiple-data-passes", "")
    ranks = Ranks(folder, f"{flags} --workers 0 {steps(10, 40)}").ends(2)
    said = ranks.text().strip().splitlines()[-1]
    assert "holds 200 sequences" in said, said
    assert "the run needs 320 by step 40" in said, said
    assert not (folder / "run/log.jsonl").exists()
    return f"status 2: “{said[-190:]}”"
