"""Routers compute with fp32 weights, whatever the rest of the model is cast to, and their biases stay alike."""

import functools
import math
import os
from dataclasses import replace

import pytest
import torch
from torch.distributed.tensor import DTensor

from open_lm import loss, optim
from open_lm.averaging import Average, averaged
from open_lm.config.averaging import parse_averagers
from open_lm.config.distributed import DistributedConfig
from open_lm.config.model import ModelConfig
from open_lm.config.moe import MoEConfig
from open_lm.config.optim import OptimConfig
from open_lm.parallel import mesh, plan

CONFIG = ModelConfig(
    dim=32, n_layers=3, n_heads=2, seq_len=16, vocab_size=64,
    moe=MoEConfig(freq=2, num_experts=(4, 6), top_k=2, capacity_factor=0, balance=("aux", "bias")),
)  # fmt: skip
PLAIN, FSDP = DistributedConfig(), DistributedConfig(fsdp=True)
ALONE = mesh.World(0, 0, 1, torch.device("cpu"), None)
LAYOUTS = {
    "--precision bf16": (PLAIN, "bf16"),
    "--precision fp16": (PLAIN, "fp16"),
    "--fsdp --precision bf16": (FSDP, "bf16"),
    "--fsdp --precision fp16": (FSDP, "fp16"),
    "--fsdp-amp": (replace(FSDP, fsdp_amp=True), "amp_bf16"),
    "--fsdp-pure-bf16": (replace(FSDP, fsdp_pure_bf16=True), "amp_bf16"),
    "--fsdp-pure-bf16 --precision bf16": (replace(FSDP, fsdp_pure_bf16=True), "bf16"),
}


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(mesh, "_device", lambda *_: torch.device("cpu"))


def make(world, distributed, precision, config=CONFIG, **options):
    return plan.parallelize(
        config, world=world, distributed=distributed, precision=precision, seed=1, **options
    )


def whole(tensor):
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).float().clone()


def watch(model):
    """[(what a router was given, what it gave)] of every forward pass from now on."""
    seen = []
    for router in plan.routers(model):
        router.register_forward_hook(lambda _, given, gave: seen.append((given[0].detach(), gave.detach())))
    return seen


def step(model, world, optimizer, precision, accumulate=2):
    """A step as in training: the norm of its gradients and the weights after it."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 64, (4 * world.world_size, 17), generator=generator)
    mine = tokens[4 * world.rank : 4 * world.rank + 4].chunk(accumulate)
    for i, part in enumerate(mine):
        with plan.no_sync(model, i < len(mine) - 1):
            with plan.autocast(precision, world.device):
                output = model(part[:, :-1], part[:, 1:])
            objective = output.loss.objective_sum / 64 + sum(s.loss for s in output.router_stats)
            objective.backward()
    parameters = list(model.parameters())
    norm = optim.grad_norm(parameters)
    optim.clip_(parameters, norm, 0.5)
    clipped = optim.grad_norm(parameters)
    optim.update_(optimizer, norm.isfinite())
    return norm.item(), clipped.item()


def check(world, flags, **options):
    """Trains a step under `flags`; {what: value} of what the routers did."""
    distributed, precision = LAYOUTS[flags]
    model = make(world, distributed, precision, **options)
    optimizer = optim.make_optimizer(model, OptimConfig(lr=1e-3))
    bare = plan.unwrap(model)
    weights = [whole(router.layer.weight) for router in plan.routers(model)]
    for weight, router in zip(weights, plan.routers(model), strict=True):
        assert router.layer.weight.dtype == torch.float32
        assert (weight != weight.bfloat16()).float().mean() > 0.9, "the weights were rounded on the way"
    seen = watch(model)
    norm, clipped = step(model, world, optimizer, precision)
    if not options.get("torchcompile"):  # a compiled forward runs no hooks added later
        passes = 2 if options.get("grad_checkpointing") else 1
        assert len(seen) == 2 * 2 * passes  # layers, micro-batches
        for x_TD, logits_TE in seen:
            (weight,) = (w for w in weights if len(w) == logits_TE.shape[1])
            assert logits_TE.dtype == torch.float32
            torch.testing.assert_close(logits_TE, x_TD.float() @ weight.T, rtol=1e-5, atol=1e-6)
            rounded = x_TD.float() @ weight.bfloat16().float().T
            assert (rounded - logits_TE).abs().max() > 1e-4  # what 16 bits would have changed
    for name, parameter in bare.named_parameters():
        if ".router." in name:
            assert parameter.dtype == parameter.grad.dtype == torch.float32, name
            assert optimizer.state[parameter]["exp_avg"].dtype == torch.float32, name
    for router in plan.routers(model):
        assert router.bias_E.dtype == torch.float32
        assert (router.bias_E == 0).all()
    assert clipped == pytest.approx(0.5, rel=1e-2) or norm < 0.5
    plan.reshard_(model)
    after = torch.cat([whole(router.layer.weight).flatten() for router in plan.routers(model)])
    assert not torch.equal(after, torch.cat([w.flatten() for w in weights]))
    with torch.no_grad():  # a forward alone, as in evaluation, and with averaged weights
        tokens = torch.zeros(1, 16, dtype=torch.long)
        (averager,) = parse_averagers("ema_0.5_1")
        with averaged(model, Average(averager, model)):
            model(tokens)
    plan.reshard_(model)
    return {"norm": norm, "after": after.numpy()}


@pytest.mark.parametrize("flags", ["--precision bf16", "--precision fp16"])
def test_one_process(flags):
    check(ALONE, flags)
    check(ALONE, flags, grad_checkpointing=True)


def on_two_ranks():
    world = mesh.start(FSDP)
    results = {flags: check(world, flags) for flags in LAYOUTS}
    for flags in ("--fsdp-amp", "--fsdp --precision bf16"):
        results[flags, "recomputed"] = check(world, flags, grad_checkpointing=True)
    return results


def test_two_ranks(spawn):
    first, second = spawn(2, on_two_ranks, timeout=240)
    for flags in first:
        assert first[flags]["norm"] == second[flags]["norm"]
        assert (first[flags]["after"] == second[flags]["after"]).all()
        assert math.isfinite(first[flags]["norm"])
    for flags in ("--fsdp-amp", "--fsdp --precision bf16"):
        assert first[flags, "recomputed"]["norm"] == pytest.approx(first[flags]["norm"], rel=1e-3)


def on_two_hosts():
    os.environ |= {"LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": str(int(os.environ["RANK"]) % 2)}
    flag = {"fsdp_hybrid_o2": True}
    world = mesh.start(replace(FSDP, **flag))
    LAYOUTS["hybrid"] = (replace(FSDP, fsdp_amp=True, **flag), "amp_bf16")
    return check(world, "hybrid")


@pytest.mark.slow
def test_hybrid(spawn):
    ranks = spawn(4, on_two_hosts, timeout=240)
    assert len({rank["norm"] for rank in ranks}) == 1


def compiled_on_two_ranks():
    world = mesh.start(FSDP)
    plan.torch.compile = functools.partial(torch.compile, backend="aot_eager")  # no C++ compiler needed
    flags = "--fsdp-amp"
    return {
        recompute: (
            check(world, flags, grad_checkpointing=recompute),
            check(world, flags, grad_checkpointing=recompute, torchcompile=True),
        )
        for recompute in (False, True)
    }


@pytest.mark.slow
def test_compiled(spawn):
    for plain, compiled in spawn(2, compiled_on_two_ranks, timeout=400)[0].values():
        assert compiled["norm"] == pytest.approx(plain["norm"], rel=2e-2)
        assert (
            abs(compiled["after"] - plain["after"]).max() < 3e-3
        )  # Adam's first step is the rate, up or down


def test_fp32_has_no_unit_of_its_own(spawn):
    assert spawn(1, units_in_fp32) == [0]


def units_in_fp32():
    world = mesh.start(FSDP)
    model = make(world, FSDP, "fp32")
    return sum(isinstance(router, plan.FSDPModule) for router in plan.routers(model))


def test_a_cast_model_still_trains_near_fp32():
    x = torch.randint(0, 64, (4, 17), generator=torch.Generator().manual_seed(0))
    values = []
    for precision in ("fp32", "bf16", "fp16"):
        model = make(ALONE, PLAIN, precision)
        logits = model(x[:, :-1]).logits_BSV
        values.append(loss.cross_entropy(logits, x[:, 1:]).nll_sum.item())
    assert values[1:] == pytest.approx([values[0]] * 2, rel=1e-2)
