"""On GPUs: NCCL, sharding, checkpoints and precisions give what a CPU gives."""

import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor

from open_lm import checkpoint, loss, optim
from open_lm.config.distributed import DistributedConfig
from open_lm.config.model import ModelConfig
from open_lm.config.moe import MoEConfig
from open_lm.config.optim import OptimConfig
from open_lm.parallel import mesh, plan

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

# the initial numbers differ between CPU and GPU generators, so GPUs are compared with one GPU
CONFIG = ModelConfig(
    dim=64, n_layers=2, n_heads=2, seq_len=32, vocab_size=128, weight_tying=True,
    moe=MoEConfig(freq=2, num_experts=4, top_k=2, capacity_factor=0, ffn_type="swiglu"),
)  # fmt: skip
PLAIN, FSDP = DistributedConfig(), DistributedConfig(fsdp=True)
PRECISIONS = {"fp32": PLAIN, "amp_bf16": PLAIN, "bf16": PLAIN, "fp16": PLAIN, "amp": PLAIN}


def make(world, distributed=PLAIN, precision="fp32", **options):
    model = plan.parallelize(
        CONFIG, world=world, distributed=distributed, precision=precision, seed=1, **options
    )
    return model, optim.make_optimizer(model, OptimConfig(lr=1e-3, eps=1e-6))


def train(world, model, optimizer, steps=3, precision="fp32"):
    """[(loss, gradient norm)] of each step."""
    results = []
    for step in range(steps):
        tokens = torch.randint(0, 128, (4, 33), generator=torch.Generator().manual_seed(step))
        mine = tokens[world.rank :: world.world_size].to(world.device)
        with plan.autocast(precision, world.device):
            output = model(mine[:, :-1])
        result = loss.cross_entropy(output.logits_BSV, mine[:, 1:])
        (result.nll_sum / (4 * 32) * world.world_size).backward()
        norm = optim.grad_norm(model.parameters())
        optim.clip_(model.parameters(), norm, 0.5)
        assert optim.is_finite(norm)
        optimizer.step()
        optimizer.zero_grad()
        total = mesh.sum_over_ranks_(result.nll_sum.detach().clone())
        results.append((total.item() / (4 * 32), norm.item()))
    return results


def contents(model, optimizer):
    tensors = {}
    for name, p in plan.unwrap(model).named_parameters():
        tensors[name] = p.detach()
        tensors |= {f"{name} {key}": value for key, value in optimizer.state[p].items()}
    whole = {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in tensors.items()}
    return {n: t.float().cpu().numpy().tobytes() for n, t in whole.items()}


def everything(folder):
    """On every rank: {name: results}; checks resumption on the way."""
    warnings.simplefilter("error")
    world = mesh.start(FSDP)
    assert world.device.type == "cuda"
    assert mesh.broadcast_object(world.rank) == 0
    results = {}
    for precision in PRECISIONS:
        for kind, distributed in (("plain", PLAIN), ("fsdp", FSDP)):
            results[kind, precision] = train(world, *make(world, distributed, precision), precision=precision)
    for flags in ("fsdp_amp", "fsdp_pure_bf16"):
        results[flags] = train(world, *make(world, replace(FSDP, **{flags: True})))
    results["recomputed"] = train(world, *make(world, FSDP, grad_checkpointing=True))
    with warnings.catch_warnings():
        warnings.simplefilter("default")  # the compiler uses what torch itself deprecates
        results["compiled"] = train(world, *make(world, FSDP, torchcompile=True))

    model, optimizer = make(world, FSDP)
    train(world, model, optimizer)
    path = checkpoint.save(folder, 1, model=model, optimizer=optimizer, state={"step": 3})
    noise = torch.rand(3, device=world.device)
    expected = contents(model, optimizer)
    for kind, distributed in (("plain", PLAIN), ("fsdp", FSDP)):
        again, again_optimizer = make(world, distributed)
        checkpoint.load_training_state(path, again, again_optimizer)
        assert torch.equal(torch.rand(3, device=world.device), noise)
        assert contents(again, again_optimizer) == expected
        results["resumed", kind] = train(world, again, again_optimizer, 1)
    mesh.stop()
    return results


def assert_near(results, reference):
    tolerances = {"fp32": 1e-4, "amp_bf16": 3e-2, "bf16": 3e-2, "fp16": 1e-2, "amp": 1e-2}
    for (kind, precision), result in ((k, r) for k, r in results.items() if k[0] in ("plain", "fsdp")):
        for (got, _), (expected, _) in zip(result, reference, strict=True):
            assert got == pytest.approx(expected, rel=tolerances[precision]), (kind, precision)
    for name in ("recomputed", "compiled"):
        torch.testing.assert_close(torch.tensor(results[name]), torch.tensor(reference), rtol=1e-4, atol=0)
    for name in ("fsdp_amp", "fsdp_pure_bf16"):
        torch.testing.assert_close(torch.tensor(results[name]), torch.tensor(reference), rtol=5e-2, atol=0)
    assert results["resumed", "plain"][0][0] == pytest.approx(results["resumed", "fsdp"][0][0], rel=1e-4)


def test_one_gpu(spawn, tmp_path):
    (results,) = spawn(1, everything, tmp_path, timeout=400)
    assert_near(results, results["plain", "fp32"])


@pytest.mark.multi_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_gpus_equal_one(spawn, tmp_path):
    (one,) = spawn(1, everything, Path(tmp_path, "one"), timeout=400)
    for results in spawn(2, everything, Path(tmp_path, "two"), timeout=400):
        assert_near(results, one["plain", "fp32"])


def test_loss_equals_torch():
    logits = torch.randn(2, 300, 1000, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(0, 1000, (2, 300), device="cuda")
    targets[0, :7] = -100
    result = loss.cross_entropy(logits, targets)
    (gradient,) = torch.autograd.grad(result.nll_sum, logits)
    exact = logits.detach().double().requires_grad_()
    expected = torch.nn.functional.cross_entropy(exact.flatten(0, 1), targets.flatten(), reduction="sum")
    (exact_gradient,) = torch.autograd.grad(expected, exact)
    torch.testing.assert_close(result.nll_sum, expected.float(), rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient.double(), exact_gradient, rtol=2**-7, atol=1e-7)
