"""On GPUs: NCCL, sharding, checkpoints and precisions give what a CPU gives."""

import os
import time
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor

from open_lm import checkpoint, loss, optim
from open_lm.checkpoint import tensors
from open_lm.config.distributed import DistributedConfig
from open_lm.config.model import ModelConfig
from open_lm.config.moe import MoEConfig
from open_lm.config.optim import OptimConfig
from open_lm.parallel import gather, mesh, plan, transfer

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


def train(world, model, optimizer, steps=3, precision="fp32", accumulate=1):
    """[(loss, gradient norm)] of each step."""
    results = []
    for step in range(steps):
        tokens = torch.randint(0, 128, (4, 33), generator=torch.Generator().manual_seed(step))
        mine = tokens[world.rank :: world.world_size].to(world.device)
        total = torch.zeros((), device=world.device)
        for i, part in enumerate(mine.chunk(accumulate)):
            with plan.no_sync(model, i < accumulate - 1), plan.autocast(precision, world.device):
                result = loss.cross_entropy(model(part[:, :-1]).logits_BSV, part[:, 1:])
                (result.nll_sum / (4 * 32) * world.world_size).backward()
            total += result.nll_sum.detach()
        optim.scale_gradients_(model.parameters(), 0.5)
        optim.scale_gradients_(model.parameters(), 2.0)
        norm = optim.grad_norm(model.parameters())
        optim.clip_(model.parameters(), norm, 0.5)
        finite = optim.is_finite(total, norm)
        assert finite
        optim.update_(optimizer, finite)
        optimizer.zero_grad()
        mesh.sum_over_ranks_(total)
        results.append((total.item() / (4 * 32), norm.item()))
    return results


def contents(model, optimizer):
    tensors = {}
    for name, p in plan.unwrap(model).named_parameters():
        tensors[name] = p.detach()
        tensors |= {f"{name} {key}": value for key, value in optimizer.state[p].items()}
    whole = {n: gather.whole(t) if isinstance(t, DTensor) else t for n, t in tensors.items()}
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


def offloaded(folder, backend):
    """[(loss, gradient norm)] with and without --fsdp-cpu-offload, of accumulated steps; then of one more."""
    warnings.simplefilter("error")
    flags = replace(FSDP, dist_backend=backend, no_set_device_rank=backend == "gloo")
    offload = replace(flags, fsdp_cpu_offload=True)
    world = mesh.start(offload)
    assert world.notes == ()
    results = {"kept": train(world, *make(world, flags), accumulate=2)}

    model, optimizer = make(world, offload)
    results["offloaded"] = train(world, model, optimizer, accumulate=2)
    state = [value for p in model.parameters() for value in (p, *optimizer.state[p].values())]
    assert all(tensor.device.type == "cpu" for tensor in state)
    assert all(p.to_local().is_pinned() for p in model.parameters())
    tokens = torch.randint(0, 128, (2, 32), generator=torch.Generator().manual_seed(9)).to(world.device)
    with torch.no_grad():
        before = model(tokens).logits_BSV
    plan.reshard_(model)
    expected = contents(model, optimizer)
    for p in model.parameters():  # a step that is skipped, as the flag on the GPU says
        p.grad = torch.full_like(p, float("nan"))
    optim.update_(optimizer, optim.is_finite(optim.grad_norm(model.parameters())))
    optimizer.zero_grad()
    assert contents(model, optimizer) == expected
    path = checkpoint.save(folder, 1, model=model, optimizer=optimizer, state={"step": 3})
    for kind, distributed in (("kept", flags), ("offloaded", offload)):
        again, again_optimizer = make(world, distributed)
        checkpoint.load_training_state(path, again, again_optimizer)
        assert contents(again, again_optimizer) == expected
        with torch.no_grad():
            torch.testing.assert_close(again(tokens).logits_BSV, before)
        plan.reshard_(again)
        results["resumed", kind] = train(world, again, again_optimizer, 1)
    mesh.stop()
    return results


@pytest.mark.parametrize("backend", [None, "nccl"])
def test_offloaded_training_equals_training_on_the_gpu(spawn, tmp_path, backend):
    for results in spawn(1, offloaded, tmp_path, backend, timeout=400):
        for name in ("offloaded", ("resumed", "offloaded")):
            reference = results["kept" if name == "offloaded" else ("resumed", "kept")]
            torch.testing.assert_close(
                torch.tensor(results[name]), torch.tensor(reference), rtol=1e-4, atol=0
            )


def through_gloo(distributed):
    warnings.simplefilter("error")
    world = mesh.start(replace(distributed, dist_backend="gloo", no_set_device_rank=True))
    assert world.device == torch.device("cuda:0")
    results = train(world, *make(world, distributed))
    on_host = mesh.sum_over_ranks_(torch.ones(()))
    mesh.stop()
    return results, on_host.item()


@pytest.mark.parametrize("distributed", [PLAIN, FSDP], ids=["ddp", "fsdp"])
def test_gloo_on_a_gpu(spawn, distributed):
    (alone, _), *_ = spawn(1, through_gloo, PLAIN, timeout=400)
    for results, on_host in spawn(2, through_gloo, distributed, timeout=400):
        torch.testing.assert_close(torch.tensor(results), torch.tensor(alone), rtol=1e-4, atol=0)
        assert on_host == 2


def host_tensors(backend):
    world = mesh.start(replace(PLAIN, dist_backend=backend, force_distributed=True))
    sums = [mesh.sum_over_ranks_(torch.ones((), device=device)).item() for device in ("cpu", world.device)]
    mesh.stop()
    return sums


@pytest.mark.parametrize("backend", [None, "nccl"])
def test_nccl_leaves_host_memory_to_gloo(spawn, backend):
    assert spawn(1, host_tensors, backend) == [[1, 1]]


def hybrid(folder, flag):
    warnings.simplefilter("error")
    each = torch.cuda.device_count() // 2
    os.environ["LOCAL_WORLD_SIZE"] = str(each)
    rank = int(os.environ["RANK"])
    os.environ["LOCAL_RANK"] = str(rank % each)
    # one host plays two: all its GPUs are used, though LOCAL_RANK says otherwise
    mesh._device = lambda *_: torch.device("cuda", rank)
    distributed = replace(FSDP, **{flag: True})
    world = mesh.start(distributed)
    assert world.mesh.mesh_dim_names == ("replicate", "shard")
    model, optimizer = make(world, distributed)
    results = train(world, model, optimizer)
    path = checkpoint.save(folder, 1, model=model, optimizer=optimizer, state={"step": 3})
    expected = contents(model, optimizer)
    for layout in (distributed, FSDP, replace(distributed, fsdp_cpu_offload=True)):
        again, again_optimizer = make(world, layout)
        checkpoint.load_training_state(path, again, again_optimizer)
        assert contents(again, again_optimizer) == expected
        results += train(world, again, again_optimizer, 1)
    mesh.stop()
    return results


@pytest.mark.multi_gpu
@pytest.mark.skipif(torch.cuda.device_count() not in (2, 4), reason="needs two or four CUDA devices")
@pytest.mark.parametrize("flag", ["fsdp_hybrid", "fsdp_hybrid_o2"])
def test_two_hosts_equal_one_gpu(spawn, tmp_path, flag):
    (one,) = spawn(1, everything, Path(tmp_path, "one"), timeout=400)
    reference = one["plain", "fp32"] + 3 * one["resumed", "plain"]
    for results in spawn(torch.cuda.device_count(), hybrid, Path(tmp_path, "many"), flag, timeout=400):
        torch.testing.assert_close(torch.tensor(results), torch.tensor(reference), rtol=1e-4, atol=0)


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


@pytest.mark.parametrize("room", [True, False])
def test_a_gpu_copies_beside_its_work_and_saves_what_was(room, tmp_path, monkeypatch) -> None:
    """Updates follow at once; without a snapshot or `before_update` they would overwrite what is copied."""
    monkeypatch.setattr(tensors, "has_room", lambda device, size: room)
    config = replace(CONFIG, dim=1024, n_heads=8, n_layers=8)
    alone = mesh.World(0, 0, 1, torch.device("cuda"), None)
    model = plan.parallelize(config, world=alone, distributed=PLAIN, precision="fp32", seed=1)
    optimizer = optim.make_optimizer(model, OptimConfig(lr=1e-3))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    saver = checkpoint.Saver(tmp_path, model=model, optimizer=optimizer)
    for step in (1, 2, 3):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        save = saver.save({"step": step}, labels=[str(step)])
        saver.before_update()
        for _ in range(3):
            optimizer.step()
        saver.wait()
        assert save.error is None
        saved = torch.load(tmp_path / f"epoch_{step}.pt", weights_only=True)["state_dict"]
        for name, tensor in before.items():
            assert torch.equal(saved[name], tensor.cpu()), (step, name)
    saver.close()


def test_copies_to_the_gpu_wait_for_nothing_and_are_right() -> None:
    """More are on their way than there are buffers, while the GPU is busy; and the host writes over its own."""
    device = torch.device("cuda", torch.cuda.current_device())
    staging = transfer.Staging(device)
    wanted = [torch.randint(1000, (4, 32), generator=torch.Generator().manual_seed(i)) for i in range(40)]
    staging.send(wanted[0])
    torch.cuda.synchronize()
    torch.cuda._sleep(10**9)  # about half a second
    started, sent, source = time.perf_counter(), [], torch.empty(4, 32, dtype=torch.int64)
    for i, x in enumerate(wanted):
        source.copy_(x)
        sent.append(staging.send(source if i % 2 else source.t().contiguous().t()))
        if i == transfer.IN_FLIGHT - 2:
            assert time.perf_counter() - started < 0.1
    for got, x in zip(sent, wanted, strict=True):
        assert torch.equal(got.cpu(), x)
        assert got.is_contiguous()
    assert sum(map(len, staging.places.values())) == transfer.IN_FLIGHT
