"""Save and load bitwise, on any number of ranks; refuse what does not fit; survive kills and full disks."""

import errno
import hashlib
import itertools
import json
import math
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import warnings
import zipfile
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor

from open_lm import checkpoint, loss, optim
from open_lm.averaging import Average
from open_lm.checkpoint import files, state
from open_lm.checkpoint.tensors import padded, share, tensors_to_save
from open_lm.config.averaging import Averager
from open_lm.config.distributed import DistributedConfig
from open_lm.config.model import ModelConfig
from open_lm.config.moe import MoEConfig
from open_lm.config.optim import OptimConfig
from open_lm.parallel import mesh, plan
from open_lm.parallel.plan import unwrap

SPARSE = ModelConfig(
    dim=32, n_layers=2, n_heads=2, seq_len=16, vocab_size=64, weight_tying=True,
    moe=MoEConfig(freq=2, num_experts=3, top_k=2, capacity_factor=0),
)  # fmt: skip
GELU = ModelConfig(dim=16, n_layers=2, n_heads=2, seq_len=8, vocab_size=32, ffn_type="gelu")
PLAIN, FSDP = DistributedConfig(), DistributedConfig(fsdp=True)
ALONE = mesh.World(0, 0, 1, torch.device("cpu"), None)


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    """Ranks are gloo's, wherever the tests run."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def make(config=SPARSE, world=ALONE, distributed=PLAIN, precision="fp32", seed=1):
    model = plan.parallelize(config, world=world, distributed=distributed, precision=precision, seed=seed)
    return model, optim.make_optimizer(model, OptimConfig(lr=1e-3))


def train(model, optimizer, steps):
    for step in steps:
        vocab = plan.unwrap(model).config.vocab_size
        tokens = torch.randint(0, vocab, (2, 9), generator=torch.Generator().manual_seed(step))
        loss.cross_entropy(model(tokens[:, :-1]).logits_BSV, tokens[:, 1:]).nll_sum.backward()
        optimizer.step()
        optimizer.zero_grad()


def contents(model, optimizer):
    """Every weight and moment, whole, as {name: array}."""
    tensors = {}
    for name, p in plan.unwrap(model).named_parameters():
        tensors[name] = p.detach()
        tensors |= {f"{name} {key}": value for key, value in optimizer.state[p].items()}
    whole = {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in tensors.items()}
    return {n: (str(t.dtype), t.float().clone().numpy().tobytes()) for n, t in whole.items()}


def save(folder, number=1, step=2, config=SPARSE, **options):
    model, optimizer = make(config, **options)
    train(model, optimizer, range(step))
    content = {"step": step, "name": "run", "tokens": 32, "data": {"seed": 3, "shards": ["a", "b"], "w": 0.5}}
    return (
        checkpoint.save(folder, number, model=model, optimizer=optimizer, state=content),
        model,
        optimizer,
        content,
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_round_trip_is_bitwise(tmp_path, precision):
    path, model, optimizer, state = save(tmp_path, precision=precision)
    expected, noise = contents(model, optimizer), torch.rand(3)
    other, other_optimizer = make(precision=precision, seed=2)
    assert contents(other, other_optimizer) != expected
    assert checkpoint.load_training_state(path, other, other_optimizer) == state
    assert contents(other, other_optimizer) == expected
    assert torch.equal(torch.rand(3), noise)

    assert sorted(p.name for p in tmp_path.iterdir()) == ["epoch_1.pt", "step_2"]
    content = torch.load(tmp_path / "epoch_1.pt", weights_only=True)
    assert (content["epoch"], content["name"], content["step"]) == (1, "run", 2)
    third, third_optimizer = make(precision=precision, seed=3)
    checkpoint.load_training_state(tmp_path / "step_2", third, third_optimizer)
    assert contents(third, third_optimizer) == expected
    assert checkpoint.read_model_config(path) == asdict(SPARSE)


def test_six_steps_are_three_and_resume_and_three(tmp_path):
    model, optimizer = make()
    train(model, optimizer, range(6))
    path, *_ = save(tmp_path, step=3)
    resumed, resumed_optimizer = make(seed=2)
    checkpoint.load_training_state(path, resumed, resumed_optimizer)
    train(resumed, resumed_optimizer, range(3, 6))
    assert contents(resumed, resumed_optimizer) == contents(model, optimizer)


def test_before_the_first_step(tmp_path):
    path, *_ = save(tmp_path, step=0)
    model, optimizer = make(seed=2)
    checkpoint.load_training_state(path, model, optimizer)
    train(model, optimizer, range(2))
    expected, expected_optimizer = make()
    train(expected, expected_optimizer, range(2))
    assert contents(model, optimizer) == contents(expected, expected_optimizer)


def test_flags_win_over_saved_hyperparameters(tmp_path):
    path, *_ = save(tmp_path)
    model, _ = make()
    optimizer = optim.make_optimizer(model, OptimConfig(wd=0.7, beta2=0.5))
    checkpoint.load_training_state(path, model, optimizer)
    assert [(g["weight_decay"], g["betas"]) for g in optimizer.param_groups] == [
        (0.7, (0.9, 0.5)),
        (0.0, (0.9, 0.5)),
    ]


def on_two_ranks(folder):
    warnings.simplefilter("error")
    folder = Path(folder)
    world = mesh.start(FSDP)
    results = {}
    for kind, distributed in (("ddp", PLAIN), ("fsdp", FSDP)):
        model, optimizer = make(world=world, distributed=distributed, seed=2)
        checkpoint.load_training_state(folder / "from_one/epoch_1.pt", model, optimizer)
        results[f"{kind} loaded"] = contents(model, optimizer)
        train(model, optimizer, [7])
        with torch.no_grad():
            model(torch.zeros(1, 4, dtype=torch.long))  # leaves FSDP's root gathered
        torch.manual_seed(world.rank)
        state = {"step": 3}
        path = checkpoint.save(folder / kind, 1, model=model, optimizer=optimizer, state=state)
        noise = torch.rand(3)
        results[f"{kind} saved"] = contents(model, optimizer)
        again, again_optimizer = make(world=world, distributed=distributed, seed=3)
        assert checkpoint.load_training_state(path, again, again_optimizer) == state
        assert contents(again, again_optimizer) == results[f"{kind} saved"]
        assert torch.equal(torch.rand(3), noise), "every rank has its own random state back"
    refused = []
    for attempt in (
        lambda: checkpoint.load_weights(folder / "nowhere.pt", model),
        lambda: checkpoint.load_training_state(folder / "evil/epoch_1.pt", model, optimizer),
        lambda: checkpoint.save(folder / "a_file", 1, model=model, optimizer=optimizer, state={"step": 3}),
    ):
        try:
            attempt()
        except (OSError, ValueError) as e:
            refused.append(type(e).__name__)
    return results, refused


def test_any_number_of_ranks_loads_what_any_number_saved(tmp_path, spawn):
    _, model, optimizer, _ = save(tmp_path / "from_one")
    (tmp_path / "evil").mkdir()
    torch.save({"step": 3, "x": Evil(tmp_path / "touched")}, tmp_path / "evil/epoch_1.pt")
    (tmp_path / "a_file").touch()
    (results, refused), (_, refused_elsewhere) = spawn(2, on_two_ranks, tmp_path)
    assert refused == refused_elsewhere == ["FileNotFoundError", "ValueError", "FileExistsError"]
    assert not (tmp_path / "touched").exists()
    for kind in ("ddp", "fsdp"):
        assert results[f"{kind} loaded"] == contents(model, optimizer)
        alone, alone_optimizer = make(seed=4)
        checkpoint.load_training_state(tmp_path / kind / "epoch_1.pt", alone, alone_optimizer)
        assert contents(alone, alone_optimizer) == results[f"{kind} saved"]


def reserve_and_save(folder):
    """[(bytes reserved before the first step, bytes that its save took)] of both layouts."""
    world, found = mesh.start(FSDP), []
    for kind, distributed in (("ddp", PLAIN), ("fsdp", FSDP)):
        model, optimizer = make(world=world, distributed=distributed, seed=2)
        saver = checkpoint.Saver(Path(folder, kind), model=model, optimizer=optimizer)
        reserved, address = len(saver.staging._memory), saver.staging._memory.data_ptr()
        train(model, optimizer, range(2))
        tensors = saver.staging.copy(share(tensors_to_save(unwrap(model), optimizer, ())))
        assert saver.staging._memory.data_ptr() == address, (
            "a GPU locks memory for seconds: not while it trains"
        )
        found.append((reserved, sum(padded(tensor.nbytes) for tensor in tensors.values())))
    return found


def test_memory_for_a_save_is_reserved_before_the_first_step(tmp_path, spawn):
    for ranks in (1, 2):
        for found in spawn(ranks, reserve_and_save, str(tmp_path)):
            assert all(reserved == taken for reserved, taken in found), found


def pass_on(start, folder):
    """Loads, trains no step, saves again: of each layout."""
    warnings.simplefilter("error")
    world, found = mesh.start(FSDP), {}
    for kind, distributed in (("ddp", PLAIN), ("fsdp", FSDP)):
        model, optimizer = make(world=world, distributed=distributed, seed=2)
        checkpoint.load_training_state(start, model, optimizer)
        found[kind] = contents(model, optimizer)
        saver = checkpoint.Saver(Path(folder, kind), model=model, optimizer=optimizer)
        assert saver.is_shared
        saver.save({"step": 2}, number=1, labels=["1"])
        saver.wait()
        (done,) = saver.finished()
        assert done.error is None
    return found


def test_two_ranks_to_three_to_one_and_back(tmp_path, spawn):
    """By the thread, in both layouts; 3 experts and 64 rows divide evenly by neither."""
    path, model, optimizer, _ = save(tmp_path / "one")
    expected = contents(model, optimizer)
    for ranks, start in ((2, path), (3, tmp_path / "2/fsdp/epoch_1.pt"), (2, tmp_path / "3/ddp/epoch_1.pt")):
        for found in spawn(ranks, pass_on, str(start), str(tmp_path / str(ranks))):
            assert found == {"ddp": expected, "fsdp": expected}
        for kind in ("ddp", "fsdp"):
            folder = tmp_path / str(ranks) / kind
            assert len(list(folder.glob("step_2/*.safetensors"))) == ranks
            again, again_optimizer = make(seed=3)
            checkpoint.load_training_state(folder / "epoch_1.pt", again, again_optimizer)
            assert contents(again, again_optimizer) == expected
            whole = torch.load(folder / "epoch_1.pt", weights_only=True)["state_dict"]
            assert all(torch.equal(whole[n], p) for n, p in model.state_dict().items())


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize(
    "load", [checkpoint.load_training_state, lambda path, model, _: checkpoint.load_weights(path, model)]
)
def test_a_file_that_would_run_code_is_refused(tmp_path, load):
    path, *_ = save(tmp_path)
    content = torch.load(path, weights_only=True)
    torch.save(content | {"x": Evil(tmp_path / "touched")}, path)
    torch.load(path, weights_only=False)
    (tmp_path / "touched").unlink()  # it does work
    model, optimizer = make(seed=2)
    before = contents(model, optimizer)
    with pytest.raises(ValueError, match=r"epoch_1.pt cannot be loaded.*could run code"):
        load(path, model, optimizer)
    assert contents(model, optimizer) == before
    assert not (tmp_path / "touched").exists()


def test_no_file_of_a_state_is_a_pickle(tmp_path):
    """Nor holds one: each is read by a reader that can do nothing else, and is all of what was saved."""
    _, model, optimizer, _ = save(tmp_path)
    folder, names, whole = tmp_path / "step_2", set(), contents(model, optimizer)
    for file in folder.iterdir():
        if file.suffix == ".safetensors":
            names |= load_file(file).keys()
        else:
            assert file.suffix == ".json"
            json.loads(file.read_text())
        with pytest.raises(Exception):  # noqa: B017 - whatever it says
            pickle.loads(file.read_bytes())
    assert len(names) == len(whole) + 1, "every weight and moment, and the random state"
    steps = {name for name in names if name.endswith("/step")}
    tensors = load_file(next(folder.glob("*.safetensors")))
    assert steps
    assert all(tensors[name].shape == () and tensors[name] == 2 for name in steps)


def test_torchs_own_reader_reads_it(tmp_path):
    _, model, *_ = save(tmp_path)
    into = {f"model/{name}": torch.empty_like(p) for name, p in model.named_parameters()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(into, storage_reader=dcp.HuggingFaceStorageReader(str(tmp_path / "step_2")), no_dist=True)
    for name, p in model.named_parameters():
        assert torch.equal(into[f"model/{name}"], p), name


@pytest.mark.parametrize("junk", [b"", b"PK\x03\x04 truncated", b"\x80\x02K\x01."])
def test_damaged_files_are_named(tmp_path, junk):
    (tmp_path / "epoch_1.pt").write_bytes(junk)
    (tmp_path / "w.safetensors").write_bytes(junk)
    for name in ("epoch_1.pt", "w.safetensors"):
        with pytest.raises(ValueError, match=name):
            checkpoint.load_weights(tmp_path / name, make()[0])


def damage(path, how):
    data = bytearray(path.read_bytes())
    if how == "flipped":
        data[len(data) // 2] ^= 1
    path.write_bytes(data[: len(data) // 2] if how == "truncated" else data)
    if how == "missing":
        path.unlink()


def test_latest_is_natural_and_complete(tmp_path):
    assert checkpoint.latest(tmp_path / "none") is None
    for number in (9, 10):
        save(tmp_path, number=number, step=number - 8)
    assert checkpoint.latest(tmp_path) == tmp_path / "epoch_10.pt"
    (tmp_path / "epoch_11.pt").write_bytes((tmp_path / "epoch_10.pt").read_bytes())
    assert checkpoint.latest(tmp_path) == tmp_path / "epoch_10.pt"
    shutil.rmtree(tmp_path / "step_2")
    with pytest.warns(
        UserWarning, match=r"epoch_1[01].pt is passed over: step_2, its state, is missing"
    ) as caught:
        assert checkpoint.latest(tmp_path) == tmp_path / "epoch_9.pt"
    assert len(caught) == 2
    (tmp_path / "epoch_9.pt").unlink()
    with pytest.warns(UserWarning, match="passed over"):
        assert checkpoint.latest(tmp_path) == tmp_path / "epoch_9.pt", "made anew of its state"
    checkpoint.load_weights(tmp_path / "epoch_9.pt", make()[0])


@pytest.mark.parametrize("how", ["flipped", "truncated", "missing"])
@pytest.mark.parametrize(
    "file", ["shard-00001-model-00001-of-00001.safetensors", "state.json", "digests.json"]
)
def test_damage_is_named_and_passed_over(tmp_path, file, how):
    first, *_ = save(tmp_path, number=1, step=1)
    second, *_ = save(tmp_path, number=2, step=2)
    damage(tmp_path / "step_2" / file, how)
    model, optimizer = make(seed=2)
    before = contents(model, optimizer)
    named = "step_2" if file == "digests.json" else f"step_2/{file}"
    with pytest.raises(ValueError, match=rf"{named}.*(damaged|missing|no complete|cannot be resumed)"):
        checkpoint.load_training_state(second, model, optimizer)
    assert contents(model, optimizer) == before
    with pytest.warns(UserWarning, match=r"(step|epoch)_2(\.pt)? is passed over.*step_2"):
        assert checkpoint.latest(tmp_path) == first
    assert checkpoint.load_training_state(first, model, optimizer)["step"] == 1
    checkpoint.load_weights(second, model)  # the weights alone are whole


def test_a_file_that_the_digests_do_not_list_is_not_loaded(tmp_path):
    """Else its tensors would take the place of the state's own."""
    first, *_ = save(tmp_path, number=1, step=1)
    second, *_ = save(tmp_path, number=2, step=2)
    shard = "shard-00001-model-00001-of-00001.safetensors"
    shutil.copy(tmp_path / "step_1" / shard, tmp_path / "step_2/zz.safetensors")
    model, optimizer = make(seed=2)
    before = contents(model, optimizer)
    for load in (
        lambda: checkpoint.load_training_state(second, model, optimizer),
        lambda: checkpoint.load_weights(tmp_path / "step_2", model),
    ):
        with pytest.raises(ValueError, match=r"zz.safetensors is not a file of this state"):
            load()
    assert contents(model, optimizer) == before
    with pytest.warns(UserWarning, match=r"step_2 is passed over: .*zz.safetensors"):
        assert checkpoint.latest(tmp_path) == first
    parts = state.Shards(tmp_path / "step_2")._parts
    assert all(len(each) == 1 for each in parts.values())


def test_states_whose_names_were_swapped_are_not_loaded(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, number=step, step=step)
    for old, new in (("step_3", "x"), ("step_2", "step_3"), ("x", "step_2")):
        (tmp_path / old).rename(tmp_path / new)
    with pytest.raises(ValueError, match=r"step_3/state.json is of step 2: the folder's name is not its own"):
        checkpoint.load_training_state(tmp_path / "epoch_3.pt", *make())
    with pytest.warns(UserWarning, match=r"step_[23] is passed over: .* is of step [23]"):
        assert checkpoint.latest(tmp_path) == tmp_path / "epoch_1.pt"


EMA = Averager("ema_0.9_1", "ema", 0.9, 1)


def save_with_average(folder, step=2):
    model, optimizer = make()
    train(model, optimizer, range(step))
    checkpoint.save(
        folder, 1, model=model, optimizer=optimizer, state={"step": step}, averages=[Average(EMA, model)]
    )
    return model


@pytest.mark.parametrize("part", ["epoch", "ema_0.9_1"])
def test_a_flipped_byte_in_a_file_of_weights_is_named(tmp_path, part):
    """Wherever it is: by whatever loads it; and `latest` makes the file anew of its state."""
    model = save_with_average(tmp_path)
    path = tmp_path / f"{part}_1.pt"
    whole = path.read_bytes()
    other, _ = make(seed=2)
    before = {n: t.clone() for n, t in other.state_dict().items()}
    for at in (30, len(whole) // 3, len(whole) // 2, len(whole) - 200, len(whole) - 3):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        attempts = [
            lambda: checkpoint.load_weights(path, other),
            lambda: checkpoint.load_soup([str(path), str(path)], [0.5, 0.5], other),
            lambda: checkpoint.read_model_config(path),
        ]
        if part != "epoch":
            attempts.append(
                lambda: checkpoint.load_averages(tmp_path / "epoch_1.pt", [Average(EMA, other)], other)
            )
        for attempt in attempts:
            with pytest.raises(ValueError, match=rf"{path.name} is damaged: its sha256"):
                attempt()
    assert all(torch.equal(before[n], t) for n, t in other.state_dict().items())
    with pytest.warns(UserWarning, match=rf"{path.name} is damaged.*made anew of step_2"):
        assert checkpoint.latest(tmp_path) == tmp_path / "epoch_1.pt"
    checkpoint.load_weights(path, other)
    if part == "epoch":
        assert all(torch.equal(model.state_dict()[n], t) for n, t in other.state_dict().items())


def test_a_sealed_file_is_torchs_and_zips(tmp_path):
    save_with_average(tmp_path)
    for path in tmp_path.glob("*.pt"):
        for options in ({}, {"mmap": True}):
            torch.load(path, weights_only=True, **options)
        with zipfile.ZipFile(path) as archive:
            assert archive.testzip() is None
            assert archive.comment.startswith(b"open_lm sha256 ")
        digest = hashlib.sha256(path.read_bytes()[:-64]).hexdigest()
        assert path.read_bytes()[-64:].decode() == digest
    torch.save(torch.load(tmp_path / "epoch_1.pt", weights_only=True), tmp_path / "foreign.pt")
    checkpoint.load_weights(tmp_path / "foreign.pt", make()[0])  # has none: as before


# For COUNT = 0, 1, …: a fork saves step 2 after step 1, and is killed at the call number COUNT of those that reach
# the disk; half of what was not synced then is lost. Ends when one is not killed any more.
KILLED = """
import os, shutil, sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
import torch
torch.set_num_threads(1)
import test_checkpoint as here
from open_lm import checkpoint
from open_lm.checkpoint import state
top = Path(sys.argv[1])
model, optimizer = here.make()
here.train(model, optimizer, [0])
checkpoint.save(top / "first", 1, model=model, optimizer=optimizer, state={"step": 1})
here.train(model, optimizer, [1])
checkpoint.save(top / "second", 2, model=model, optimizer=optimizer, state={"step": 2})

def save_and_die(folder, count):
    saver, calls = checkpoint.Saver(folder, model=model, optimizer=optimizer), []
    def dies(owner, name):
        real = getattr(owner, name)
        def call(*arguments, **options):
            calls.append(name)
            if len(calls) > count:
                for path in folder.rglob("*"):
                    lost = name == "fsync" and ".tmp" in str(path)
                    if lost and path.is_file() and path.stat().st_size > 9:
                        os.truncate(path, path.stat().st_size // 2)
                os._exit(9)
            return real(*arguments, **options)
        setattr(owner, name, call)
    for name in ("fsync", "rename", "replace", "unlink"):
        dies(os, name)
    dies(Path, "mkdir")
    dies(state, "write_shard")
    saver.save({"step": 2}, number=2, labels=sys.argv[3:])
    saver.wait()
    (done,) = saver.finished()
    os._exit(0 if done.error is None else 1)

count, code = 0, 9
while code == 9:
    shutil.copytree(top / "first", top / str(count))
    child = os.fork()
    if not child:
        save_and_die(top / str(count), count)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    count += 1
print(code, count)
"""


@pytest.mark.parametrize("labels", [["2"], []], ids=["an interval's end", "between"])
def test_killed_at_every_stage_of_a_save(tmp_path, labels):
    """The state before, or the whole new one."""
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", KILLED]
    command += [str(tmp_path), str(Path(__file__).parent), *labels]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout.startswith("0 "), done.stdout + done.stderr
    expected, found = {}, []
    for step, name in ((1, "first"), (2, "second")):
        model, optimizer = make()
        checkpoint.load_training_state(tmp_path / name / f"epoch_{step}.pt", model, optimizer)
        expected[step] = contents(model, optimizer)
    for n in range(int(done.stdout.split()[1])):
        folder = tmp_path / str(n)
        path = checkpoint.latest(folder)  # a warning would be an error: no damage is seen
        again, again_optimizer = make(seed=2)
        step = checkpoint.load_training_state(path, again, again_optimizer)["step"]
        assert contents(again, again_optimizer) == expected[step], n
        if step == 2:
            assert path.name == ("epoch_2.pt" if labels else "step_2")
        found.append(step)
        checkpoint.save(folder, 3, model=model, optimizer=optimizer, state={"step": 3})  # no obstacle
        assert not list(folder.glob("*.tmp"))
    assert found == sorted(found)
    assert found.count(1) >= 6
    assert found.count(2) >= (4 if labels else 2)


def test_killed_while_it_replaces_a_state_of_the_same_step(tmp_path, monkeypatch):
    save(tmp_path, step=2)
    model, optimizer = make(seed=5)

    def die(*_, **__):
        raise KilledError

    monkeypatch.setattr(state.os, "rename", die)
    monkeypatch.setattr("shutil.rmtree", die)  # a kill leaves what is there
    with pytest.raises(KilledError):
        checkpoint.save(tmp_path, 1, model=model, optimizer=optimizer, state={"step": 2})
    monkeypatch.undo()
    assert not (tmp_path / "step_2/digests.json").exists()
    path = checkpoint.latest(tmp_path)
    again, again_optimizer = make(seed=2)
    checkpoint.load_training_state(path, again, again_optimizer)
    assert contents(again, again_optimizer) == contents(model, optimizer)


class KilledError(BaseException):
    pass


def test_a_missing_state_is_said(tmp_path):
    path, *_ = save(tmp_path, number=2, step=2)
    shutil.copy(path, tmp_path / "epoch_3.pt")
    checkpoint.load_training_state(tmp_path / "epoch_3.pt", *make())  # its step leads to it
    shutil.rmtree(tmp_path / "step_2")
    with pytest.raises(
        ValueError, match=r"epoch_2.pt cannot be resumed: step_2, its state, is missing .*--pretrained"
    ):
        checkpoint.load_training_state(path, *make())
    checkpoint.load_weights(path, make()[0])
    for part in ("optimizer", "stats"):
        torch.save({"step": 2}, tmp_path / f"{part}_2.pt")
    with pytest.raises(
        ValueError, match=r"epoch_2.pt cannot be resumed: optimizer_2.pt .*older version.*--pretrained"
    ):
        checkpoint.load_training_state(path, *make())
    with (
        pytest.warns(UserWarning, match="passed over"),
        pytest.raises(ValueError, match=r"older version.*--pretrained"),
    ):
        checkpoint.latest(tmp_path)


def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path):
    """RLIMIT_FSIZE: a write fails in the middle of a file, as on a disk that another process fills."""
    path, *_ = save(tmp_path, step=1)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    model, optimizer = make()
    train(model, optimizer, range(2))
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before[path]) + 4096, limits[1]))
        with pytest.raises(
            OSError, match=r"cannot write .*step_2.tmp/shard-00001.*\([0-9,]+ bytes\)"
        ) as error:
            checkpoint.save(tmp_path, 1, model=model, optimizer=optimizer, state={"step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert error.value.errno == errno.EFBIG
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    assert checkpoint.latest(tmp_path) == path


def test_too_little_space_is_said_before_anything_is_written(tmp_path, monkeypatch):
    path, *_ = save(tmp_path, step=1)
    model, optimizer = make()
    train(model, optimizer, range(2))
    usage = shutil.disk_usage(tmp_path)._replace(free=12_345)
    monkeypatch.setattr("open_lm.checkpoint.saver.shutil.disk_usage", lambda _: usage)
    saver = checkpoint.Saver(tmp_path, model=model, optimizer=optimizer)
    saver.save({"step": 2}, number=2, labels=["2"])
    saver.wait()
    (done,) = saver.finished()
    size = sum(p.nbytes for p in model.parameters())
    needed = int(re.search(r"step 2 needs ([0-9,]+) bytes", str(done.error))[1].replace(",", ""))
    assert 4 * size <= needed < 4.2 * size + 60_000, "weights, two moments, and the weights again"
    assert f"{tmp_path} has 12,345 bytes free" in str(done.error)
    assert done.error.errno == errno.ENOSPC
    assert checkpoint.latest(tmp_path) == path
    monkeypatch.undo()
    saver.save({"step": 2}, number=2, labels=["2"])
    saver.wait()
    assert checkpoint.latest(tmp_path) == tmp_path / "epoch_2.pt"
    written = [tmp_path / "epoch_2.pt", *(tmp_path / "step_2").iterdir()]
    assert 0 <= needed - sum(p.stat().st_blocks * 512 for p in written) < 40_000, (
        "JSON, headers and zips, too"
    )


def test_what_could_not_be_loaded_is_not_saved(tmp_path):
    model, optimizer = make()
    with pytest.raises(ValueError, match=r"plain JSON.*Evil"):
        checkpoint.save(tmp_path, 1, model=model, optimizer=optimizer, state={"step": 1, "x": Evil(tmp_path)})
    assert list(tmp_path.iterdir()) == []


def test_the_loop_goes_on_while_a_save_is_written(tmp_path, monkeypatch):
    """What is saved is the state at the call; a second save waits for the first, and says so."""
    model, optimizer = make()
    train(model, optimizer, range(1))
    expected, gate = contents(model, optimizer), threading.Event()
    real = state.write_shard
    monkeypatch.setattr(state, "write_shard", lambda *a: (gate.wait(20), real(*a))[1])
    saver = checkpoint.Saver(tmp_path, model=model, optimizer=optimizer)
    saver.save({"step": 1}, number=1, labels=["1"])
    train(model, optimizer, range(1, 3))
    assert saver.finished() == []
    assert checkpoint.latest(tmp_path) is None
    threading.Timer(0.3, gate.set).start()
    saver.save({"step": 3}, labels=[])
    saver.wait()
    first, second = saver.finished()
    assert (first.step, second.step) == (1, 3)
    assert first.error is second.error is None
    assert first.stall_seconds < 0.25 < second.stall_seconds < 5
    assert first.write_seconds > 0.25
    assert first.size == sum(p.stat().st_size for p in tmp_path.glob("step_1/*.safetensors")) - headers(
        tmp_path / "step_1"
    )
    again, again_optimizer = make(seed=2)
    checkpoint.load_training_state(tmp_path / "epoch_1.pt", again, again_optimizer)
    assert contents(again, again_optimizer) == expected


def headers(folder):
    return sum(8 + int.from_bytes(p.read_bytes()[:8], "little") for p in folder.glob("*.safetensors"))


def test_retention_between_intervals(tmp_path):
    model, optimizer = make()
    saver = checkpoint.Saver(tmp_path, model=model, optimizer=optimizer, keep=2)
    for step in range(1, 8):
        labels = {3: ["1"], 6: ["2", "latest"], 7: ["latest"]}.get(step, [])
        saver.save({"step": step}, number=step // 3, labels=labels)
    saver.wait()
    assert [done.error for done in saver.finished()] == [None] * 7
    names = {p.name for p in tmp_path.iterdir()}
    assert names == {"epoch_1.pt", "epoch_2.pt", "epoch_latest.pt", *(f"step_{n}" for n in (3, 4, 5, 6, 7))}
    (tmp_path / "epoch_1.pt").unlink()
    saver.save({"step": 8}, labels=[])
    saver.wait()
    assert {p.name for p in tmp_path.glob("step_*")} == {f"step_{n}" for n in (5, 6, 7, 8)}


def test_killed_while_it_sets_aside_what_is_abandoned(tmp_path, monkeypatch):
    """At each rename: `latest` finishes it, and is the state that the run went back to."""
    for number in (1, 2, 3):
        save(tmp_path / "whole", number=number, step=number)
    evaluated = [f'{{"step": {step}, "loss": 1.0}}\n' for step in (1, 2, 3)]
    (tmp_path / "whole/results.jsonl").write_text("".join([*evaluated, "a user's note\n"]))
    for count in itertools.count():
        folder, left = tmp_path / str(count), [count]
        shutil.copytree(tmp_path / "whole", folder)
        for real in (os.rename, os.replace):

            def die(*arguments, real=real, left=left):
                if not left[0]:
                    raise KilledError
                left[0] -= 1
                return real(*arguments)

            monkeypatch.setattr(files.os, real.__name__, die)
        killed = False
        try:
            files.set_aside(folder, 1)
        except KilledError:
            killed = True
        monkeypatch.undo()
        newest = checkpoint.latest(folder)
        assert newest == folder / ("epoch_1.pt" if count else "epoch_3.pt"), (
            "before the first, nothing was begun"
        )
        files.set_aside(folder, 1)
        assert sorted(p.name for p in folder.iterdir() if p.suffix != ".tmp") == [
            "abandoned_after_step_1", "epoch_1.pt", "results.jsonl", "step_1",
        ]  # fmt: skip
        assert (folder / "results.jsonl").read_text() == f"{evaluated[0]}a user's note\n"
        place = folder / "abandoned_after_step_1"
        names = {p.name for p in place.iterdir()}
        assert names == {"epoch_2.pt", "epoch_3.pt", "results.jsonl", "step_2", "step_3"}
        assert (place / "results.jsonl").read_text() == "".join(evaluated[1:])
        if not killed:
            break
    assert count == 7


def test_states_of_later_steps_do_not_crowd_out_earlier_ones(tmp_path):
    model, optimizer = make()
    for step in (8, 9, 3, 4):
        checkpoint.Saver(tmp_path, model=model, optimizer=optimizer, keep=2, in_background=False).save(
            {"step": step}
        )
    assert {p.name for p in tmp_path.iterdir()} == {"step_3", "step_4", "step_8", "step_9"}


def test_the_state_of_a_damaged_file_of_weights_stays(tmp_path):
    for number in (1, 2):
        save(tmp_path, number=number, step=number)
    (tmp_path / "epoch_1.pt").write_bytes((tmp_path / "epoch_1.pt").read_bytes()[:100])
    (tmp_path / "epoch_2.pt").unlink()
    save(tmp_path, number=3, step=3)
    assert {p.name for p in tmp_path.glob("step_*")} == {"step_1", "step_3"}


def test_leftovers_are_cleaned_up(tmp_path):
    (tmp_path / "epoch_7.pt.tmp").write_bytes(b"half")
    (tmp_path / "step_9.tmp").mkdir()
    (tmp_path / "step_9.tmp/shard").write_bytes(b"half")
    (tmp_path / "mine.tmp").touch()
    save(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"mine.tmp", "epoch_1.pt", "step_2"}


def openlm_state_dict(model, prefix=""):
    """As open_lm's gelu model writes it: each FFN matrix by two names, and a buffer."""
    weights = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    for layer in range(model.config.n_layers):
        at = f"{prefix}layers.{layer}."
        for ours, theirs in (("feed_forward.0", "_ff_w1"), ("feed_forward.2", "_ff_w2")):
            weights[f"{at}{theirs}.weight"] = weights[f"{at}{ours}.weight"]
        weights[at + "attention.pos_embed.inv_freq"] = torch.zeros(4)
    return weights


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_openlm_checkpoints_load(tmp_path, prefix):
    source, _ = make(GELU)
    weights = openlm_state_dict(source, prefix)
    only_aliases = {n: t for n, t in weights.items() if ".feed_forward." not in n}
    plain = {n: t.contiguous().clone() for n, t in source.state_dict().items()}
    torch.save({"epoch": 4, "name": "x", "state_dict": weights}, tmp_path / "epoch_4.pt")
    torch.save(only_aliases, tmp_path / "bare.pt")
    torch.save(weights, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    save_file(plain, tmp_path / "model.safetensors")
    for name, rest in (
        ("epoch_4.pt", {"epoch": 4, "name": "x"}), ("bare.pt", {}), ("old.pt", {}), ("model.safetensors", {}),
    ):  # fmt: skip
        model, optimizer = make(GELU, seed=2)
        assert checkpoint.load_weights(tmp_path / name, model) == rest
        for (parameter, ours), theirs in zip(model.named_parameters(), source.parameters(), strict=True):
            assert torch.equal(ours, theirs), parameter
    assert checkpoint.read_model_config(tmp_path / "epoch_4.pt") is None
    with pytest.raises(ValueError, match=r"epoch_4.pt cannot be resumed.*--pretrained"):
        checkpoint.load_training_state(tmp_path / "epoch_4.pt", model, optimizer)


def test_a_wrong_number_of_experts_names_the_flag(tmp_path):
    path, *_ = save(tmp_path)
    model, _ = make(replace(SPARSE, moe=replace(SPARSE.moe, num_experts=64)))
    with pytest.raises(ValueError) as error:
        checkpoint.load_weights(path, model)
    assert str(error.value) == f"--moe-num-experts 64, but {path} has 3 experts (in layer 0)"


def test_everything_that_does_not_fit_is_in_one_error(tmp_path):
    model, _ = make(GELU)
    weights = dict(model.state_dict())
    del weights["norm.weight"]
    weights["surprise"] = torch.zeros(1)
    weights["output.weight"] = torch.zeros(31, 16)
    torch.save(weights, tmp_path / "w.pt")
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(ValueError) as error:
        checkpoint.load_weights(tmp_path / "w.pt", model)
    for part in (
        "w.pt",
        "1 missing: norm.weight",
        "1 unexpected: surprise",
        "output.weight (31, 16)",
        "(32, 16)",
    ):
        assert part in str(error.value)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())

    with pytest.raises(ValueError, match=r"missing: layers[^;]*(; [^;]*){4} …"):  # five, and no more
        checkpoint.load_weights(tmp_path / "w.pt", make(replace(SPARSE, weight_tying=False))[0])


def test_an_untied_file_does_not_load_into_a_tied_model(tmp_path):
    model, _ = make(GELU)
    torch.save(model.state_dict(), tmp_path / "w.pt")
    tied, _ = make(replace(GELU, weight_tying=True))
    with pytest.raises(ValueError, match=r"tied in the model but not in the file: output.weight"):
        checkpoint.load_weights(tmp_path / "w.pt", tied)
    torch.save(tied.state_dict(), tmp_path / "w.pt")
    assert math.isclose(
        (tmp_path / "w.pt").stat().st_size, sum(p.nbytes for p in tied.parameters()), rel_tol=0.3
    )
    checkpoint.load_weights(tmp_path / "w.pt", tied)
