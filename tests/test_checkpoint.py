"""Save and load bitwise, on any number of ranks; refuse what does not fit; survive kills and full disks."""

import errno
import math
import os
import resource
import signal
import warnings
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from open_lm import checkpoint, loss, optim
from open_lm.checkpoint import files
from open_lm.config.distributed import DistributedConfig
from open_lm.config.model import ModelConfig
from open_lm.config.moe import MoEConfig
from open_lm.config.optim import OptimConfig
from open_lm.parallel import mesh, plan

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
    state = {"step": step, "name": "run", "tokens": 32, "data": {"seed": 3, "shards": ["a", "b"], "w": 0.5}}
    return (
        checkpoint.save(folder, number, model=model, optimizer=optimizer, state=state),
        model,
        optimizer,
        state,
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

    assert sorted(p.name for p in tmp_path.iterdir()) == ["epoch_1.pt", "optimizer_1.pt", "stats_1.pt"]
    for file in tmp_path.iterdir():
        content = torch.load(file, weights_only=True)
        assert (content["epoch"], content["name"], content["step"]) == (1, "run", 2)
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
    for part in ("epoch", "optimizer", "stats"):
        torch.save({"step": 3, "x": Evil(tmp_path / "touched")}, tmp_path / f"evil/{part}_1.pt")
    (tmp_path / "a_file").touch()
    (results, refused), (_, refused_elsewhere) = spawn(2, on_two_ranks, tmp_path)
    assert refused == refused_elsewhere == ["FileNotFoundError", "ValueError", "FileExistsError"]
    assert not (tmp_path / "touched").exists()
    for kind in ("ddp", "fsdp"):
        assert results[f"{kind} loaded"] == contents(model, optimizer)
        alone, alone_optimizer = make(seed=4)
        checkpoint.load_training_state(tmp_path / kind / "epoch_1.pt", alone, alone_optimizer)
        assert contents(alone, alone_optimizer) == results[f"{kind} saved"]


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("part", files.PARTS)
def test_a_file_that_would_run_code_is_refused(tmp_path, part):
    path, *_ = save(tmp_path)
    content = torch.load(tmp_path / f"{part}_1.pt", weights_only=True)
    torch.save(content | {"x": Evil(tmp_path / "touched")}, tmp_path / f"{part}_1.pt")
    torch.load(tmp_path / f"{part}_1.pt", weights_only=False)
    (tmp_path / "touched").unlink()  # it does work
    model, optimizer = make(seed=2)
    before = contents(model, optimizer)
    with pytest.raises(ValueError, match=rf"{part}_1.pt cannot be loaded.*could run code"):
        checkpoint.load_training_state(path, model, optimizer)
    assert contents(model, optimizer) == before
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize("junk", [b"", b"PK\x03\x04 truncated", b"\x80\x02K\x01."])
def test_damaged_files_are_named(tmp_path, junk):
    (tmp_path / "epoch_1.pt").write_bytes(junk)
    (tmp_path / "w.safetensors").write_bytes(junk)
    for name in ("epoch_1.pt", "w.safetensors"):
        with pytest.raises(ValueError, match=name):
            checkpoint.load_weights(tmp_path / name, make()[0])


def test_latest_is_natural_and_complete(tmp_path):
    assert checkpoint.latest(tmp_path / "none") is None
    for number in (9, 10):
        save(tmp_path, number=number, step=1)
    assert checkpoint.latest(tmp_path) == tmp_path / "epoch_10.pt"
    (tmp_path / "epoch_11.pt").write_bytes((tmp_path / "epoch_10.pt").read_bytes())
    (tmp_path / "stats_10.pt").write_bytes(b"cut")
    with pytest.warns(UserWarning, match=r"epoch_1[01].pt is passed over") as caught:
        assert checkpoint.latest(tmp_path) == tmp_path / "epoch_9.pt"
    assert len(caught) == 2


class KilledError(BaseException):
    pass


@pytest.mark.parametrize("renames", [0, 1, 2])
@pytest.mark.parametrize("overwrite", [True, False], ids=["over an older one", "the first"])
def test_killed_between_renames(tmp_path, monkeypatch, renames, overwrite):
    if overwrite:
        save(tmp_path, step=1)
    done = []

    def rename(source, target, real=os.replace):
        if len(done) == renames:
            raise KilledError
        done.append(real(source, target))

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", rename)
        with pytest.raises(KilledError):
            save(tmp_path, step=2)
    path = checkpoint.latest(tmp_path)
    model, optimizer = make(seed=2)
    assert checkpoint.load_training_state(path, model, optimizer)["step"] == 2
    expected, expected_optimizer = make()
    train(expected, expected_optimizer, range(2))
    assert contents(model, optimizer) == contents(expected, expected_optimizer)


def test_files_of_different_steps_are_never_one_checkpoint(tmp_path):
    save(tmp_path, number=1, step=1)
    path, *_ = save(tmp_path, number=2, step=2)
    (tmp_path / "optimizer_1.pt").rename(tmp_path / "optimizer_2.pt")
    with pytest.raises(ValueError, match=r"epoch_2.pt cannot be resumed.*'optimizer_2.pt': 1"):
        checkpoint.load_training_state(path, *make())
    with pytest.warns(UserWarning, match="is passed over") as caught:
        assert checkpoint.latest(tmp_path) is None
    texts = [str(warning.message) for warning in caught]
    assert len(texts) == 2
    assert "'optimizer_2.pt': 1" in texts[0]
    assert "'optimizer_1.pt': None" in texts[1]
    with pytest.raises(ValueError, match=r"optimizer_1.pt is missing .*--pretrained"):
        checkpoint.load_training_state(tmp_path / "epoch_1.pt", *make())
    checkpoint.load_weights(tmp_path / "epoch_1.pt", make()[0])


def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path):
    path, *_ = save(tmp_path, step=1)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    model, optimizer = make()
    train(model, optimizer, range(2))
    try:
        # room for the weights, not for the moments
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before["epoch_1.pt"]) + 4096, limits[1]))
        with pytest.raises(OSError, match=r"cannot write .*optimizer_1.pt") as error:
            checkpoint.save(tmp_path, 1, model=model, optimizer=optimizer, state={"step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert error.value.errno == errno.EFBIG
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    assert checkpoint.latest(tmp_path) == path


def test_what_could_not_be_loaded_is_not_saved(tmp_path):
    model, optimizer = make()
    with pytest.raises(ValueError, match=r"stats_1.pt.tmp cannot be loaded"):
        checkpoint.save(tmp_path, 1, model=model, optimizer=optimizer, state={"step": 1, "x": Evil(tmp_path)})
    assert list(tmp_path.iterdir()) == []


def test_leftovers_are_cleaned_up(tmp_path):
    (tmp_path / "epoch_7.pt.tmp").write_bytes(b"half")
    (tmp_path / "mine.tmp").touch()
    save(tmp_path)
    assert not (tmp_path / "epoch_7.pt.tmp").exists()
    assert (tmp_path / "mine.tmp").exists()


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
    with pytest.raises(ValueError, match=r"optimizer_4.pt is missing"):
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
