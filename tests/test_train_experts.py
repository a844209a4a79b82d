"""What a step does for the experts: --moe-balance global and bias, padding, noise; equal on one rank and on two."""

from dataclasses import replace

import pytest
import torch

from open_lm.averaging import Average, averaged_loss
from open_lm.config.averaging import parse_averagers
from open_lm.config.distributed import DistributedConfig
from open_lm.config.model import ModelConfig
from open_lm.config.moe import MoEConfig
from open_lm.config.optim import OptimConfig
from open_lm.config.schedule import Batch as BatchPlan
from open_lm.data.batches import Batch
from open_lm.loss import IGNORE_INDEX, real_positions
from open_lm.metrics import Clock
from open_lm.moe.balance import switch_loss, update_bias_
from open_lm.moe.stats import unpack
from open_lm.parallel import mesh, plan
from open_lm.train import accumulate_gradients, balance_, seed_randomness_

MOE = MoEConfig(freq=2, num_experts=(4, 6), top_k=2, capacity_factor=0, loss_weight=1.0)
CONFIG = ModelConfig(dim=16, n_layers=3, n_heads=2, seq_len=16, vocab_size=64, moe=MOE)
GLOBAL = replace(CONFIG, moe=replace(MOE, balance=("global",)))
BIAS = replace(CONFIG, moe=replace(MOE, balance=("bias",), bias_rate=0.01, loss_weight=0.1))
PLAIN, FSDP = DistributedConfig(), DistributedConfig(fsdp=True)
ALONE = mesh.World(0, 0, 1, torch.device("cpu"), None)
OPTIM = OptimConfig(precision="fp32", lr=1e-3, eps=1e-6)


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def make(config, world=ALONE, distributed=PLAIN, **options):
    return plan.parallelize(config, world=world, distributed=distributed, precision="fp32", seed=1, **options)


def batch_of(rows: list[int] | slice, seed=0, sequences=8) -> Batch:
    """Some sequences of a batch; two halves that crowd other experts, by their tokens."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 32, (sequences, 17), generator=generator)
    tokens[sequences // 2 :] += 32
    tokens = tokens[rows]
    return Batch(tokens[:, :-1], tokens[:, 1:], 0)


def step(model, batch, config, world=ALONE, micro=8):
    """(result of one step's forward and backward passes, {name: gradient})."""
    sequences = len(batch.tokens_BS)
    result = accumulate_gradients(
        model,
        batch,
        plan=BatchPlan(sequences * world.world_size, sequences, micro, sequences // micro),
        optim=OPTIM,
        config=config,
        world=world,
        loss_scale=1.0,
        clock=Clock(),
    )
    gradients = {
        name: (p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad).clone().numpy()
        for name, p in plan.unwrap(model).named_parameters()
    }
    model.zero_grad()
    return result, gradients


def assert_same(ours, expected, rtol=1e-5):
    (result, gradients), (wanted, wanted_gradients) = ours, expected
    torch.testing.assert_close(torch.as_tensor(result), torch.as_tensor(wanted), rtol=rtol, atol=1e-9)
    for name in wanted_gradients:
        got, want = (torch.from_numpy(g[name]) for g in (gradients, wanted_gradients))
        torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-7, msg=lambda m, n=name: f"{n}: {m}")


def global_on_two_ranks():
    world = mesh.start(FSDP)
    results = {}
    for kind, distributed in (("ddp", PLAIN), ("fsdp", FSDP)):
        for accumulate in (1, 2):
            # micro-batch i of both ranks together is micro-batch i of one process
            rows = {1: [0, 1, 2, 3, 4, 5, 6, 7], 2: [0, 1, 4, 5, 2, 3, 6, 7]}[accumulate]
            mine = rows[4 * world.rank : 4 * world.rank + 4]
            for config in (GLOBAL, CONFIG):
                model = make(config, world, distributed)
                result, gradients = step(model, batch_of(mine), config, world, micro=4 // accumulate)
                key = (kind, accumulate, config is GLOBAL)
                results[key] = (result.losses.numpy(), gradients)
    return results


def test_global_is_the_same_on_one_rank_and_on_two(spawn):
    first, second = spawn(2, global_on_two_ranks)
    for kind in ("ddp", "fsdp"):
        for accumulate in (1, 2):
            result, gradients = step(make(GLOBAL), batch_of(list(range(8))), GLOBAL, micro=8 // accumulate)
            for rank in (first, second):
                assert_same(rank[kind, accumulate, True], (result.losses.numpy(), gradients))
    # and it is another loss than aux, which counts on each rank by itself
    aux = first["ddp", 1, False]
    assert abs(aux[0][3] - first["ddp", 1, True][0][3]) > 1e-4
    names = [name for name in aux[1] if ".router." in name]
    assert all(abs(aux[1][n] - first["ddp", 1, True][1][n]).max() > 1e-6 for n in names)


def test_global_has_a_running_mean_over_micro_batches():
    model, batch = make(GLOBAL), batch_of(list(range(8)))
    parts = [
        plan.unwrap(model)(x, y).router_stats for x, y in zip(*(t.split(4) for t in batch[:2]), strict=True)
    ]
    both = [a.choice_count_E + b.choice_count_E for a, b in zip(*parts, strict=True)]
    terms = [[switch_loss(s.choice_count_E, s.probability_E, s.tokens) for s in parts[0]]]
    terms += [[switch_loss(c, s.probability_E, s.tokens) for c, s in zip(both, parts[1], strict=True)]]
    expected = torch.stack([torch.stack(layers).mean() for layers in terms]).mean().item()
    result, _ = step(model, batch, GLOBAL, micro=4)
    assert result.losses[3].item() == pytest.approx(expected, rel=1e-6)
    local = torch.stack([s.loss for part in parts for s in part]).mean().item()
    assert abs(expected - local) > 1e-4


def bias_on_two_ranks():
    world = mesh.start(FSDP)
    results = {}
    for kind, distributed in (("ddp", PLAIN), ("fsdp", FSDP)):
        for recompute in (False, True):
            model = make(BIAS, world, distributed, grad_checkpointing=recompute)
            with torch.no_grad():
                for router in plan.routers(model):  # different on every rank, if anything were broadcast
                    router.bias_E += torch.linspace(-0.1, 0.1, len(router.bias_E))
            mine = slice(4 * world.rank, 4 * world.rank + 4)
            for number in range(3):
                result, _ = step(model, batch_of(mine, number), BIAS, world, micro=2)
                balance_(model, result, 0.01)
            results[kind, recompute] = [router.bias_E.numpy() for router in plan.routers(model)]
    return results


def test_bias_is_the_same_on_one_rank_and_on_two(spawn):
    first, second = spawn(2, bias_on_two_ranks)
    model = make(BIAS)
    with torch.no_grad():
        for router in plan.routers(model):
            router.bias_E += torch.linspace(-0.1, 0.1, len(router.bias_E))
    for number in range(3):
        result, _ = step(model, batch_of(slice(0, 8), number), BIAS)
        assert sum(layer.count_E.sum() for layer in unpack(result.router, result.like)) == 2 * 2 * 8 * 16
        balance_(model, result, 0.01)
    expected = [router.bias_E.numpy() for router in plan.routers(model)]
    assert abs(expected[0] - torch.linspace(-0.1, 0.1, 4).numpy()).max() > 0.005
    for rank in (first, second):
        for biases in rank.values():
            for ours, wanted in zip(biases, expected, strict=True):
                assert (ours == wanted).all()


def test_bias_evens_out_a_skewed_router():
    """Text of five words: whole words go to one expert, until the biases part them in turn."""
    model = make(BIAS)
    loads = []
    for number in range(60):
        tokens, targets, *_ = batch_of(slice(0, 8), number)
        result, _ = step(model, Batch(tokens % 5, targets % 5, 0), BIAS)
        loads.append([layer.count_E for layer in unpack(result.router, result.like)])
        balance_(model, result, 0.002)
    for early, late in zip(
        *(map(sum, zip(*part, strict=True)) for part in (loads[:5], loads[-30:])), strict=True
    ):
        spreads = [(count_E.max() / count_E.mean()).item() - 1 for count_E in (early, late)]
        assert spreads[0] > 0.4
        assert spreads[1] < 0.3 * spreads[0]


def test_a_skipped_update_changes_no_bias():
    model = make(BIAS)
    result, _ = step(model, batch_of(slice(0, 8)), BIAS)
    for finite, changed in ((False, False), (True, True)):
        balance_(model, result, BIAS.moe.bias_rate * torch.tensor(finite))
        assert any((router.bias_E != 0).any().item() for router in plan.routers(model)) == changed


def test_the_bias_moves_against_the_load():
    bias_E = torch.zeros(4)
    update_bias_(bias_E, torch.tensor([8.0, 4, 2, 2]), 0.1)
    assert bias_E.argmin() == 0
    assert bias_E.sum().abs() < 1e-7


def pad(batch: Batch, positions: int) -> Batch:
    """The same batch with targets ignored from `positions` on, and what stands there replaced."""
    tokens, targets = batch.tokens_BS.clone(), batch.targets_BS.clone()
    targets[:, positions:] = IGNORE_INDEX
    tokens[:, positions:] = 63
    return Batch(tokens, targets, 0)


@pytest.mark.parametrize(
    "balance", [("aux",), ("sequence",), ("global",), ("first_choice",), ("importance",)]
)
def test_padding_is_not_there(balance):
    config = replace(CONFIG, moe=replace(MOE, balance=balance, z_loss_weight=0.1))
    model, batch = make(config), batch_of(slice(0, 8))
    short = Batch(batch.tokens_BS[:, :11], batch.targets_BS[:, :11], 0)
    (expected, wanted), (padded, ours) = (step(model, b, config, micro=4) for b in (short, pad(batch, 11)))
    assert expected.tokens == padded.tokens == 88
    losses = [torch.cat((r.losses[:2], r.losses[3:])) for r in (padded, expected)]  # not the logits' mean
    assert_same((losses[0], ours), (losses[1], wanted))
    torch.testing.assert_close(padded.router, expected.router, rtol=1e-5, atol=1e-5)
    seen_by_all, _ = step(model, batch, config, micro=4)
    assert not torch.allclose(seen_by_all.router, expected.router)


def test_padding_takes_no_place():
    """Six sequences of padding stand before two real ones, which are routed as if they were alone."""
    config = replace(CONFIG, moe=replace(MOE, num_experts=4, capacity_factor=0.5))
    model, batch = make(config), batch_of(slice(0, 8))
    targets = batch.targets_BS.clone()
    targets[:6] = IGNORE_INDEX  # samples that were too short
    padded, ours = step(model, Batch(batch.tokens_BS, targets, 6), config)
    alone, wanted = step(model, Batch(batch.tokens_BS[6:], targets[6:], 0), config, micro=2)
    layers = unpack(padded.router, padded.like)
    assert all(layer.dropped > 0 for layer in layers)
    torch.testing.assert_close(padded.router, alone.router, rtol=1e-5, atol=1e-5)
    assert_same((padded.losses[[0, 1, 3]], ours), (alone.losses[[0, 1, 3]], wanted))


def test_averaged_loss_sees_no_padding():
    model = make(replace(CONFIG, moe=replace(MOE, num_experts=4, capacity_factor=0.5)))
    (averager,) = parse_averagers("ema_0.9_1")
    average = Average(averager, model)

    def of(batch):
        return averaged_loss(model, average, batch, micro_sequences=8, precision="fp32", world=ALONE)

    targets = batch_of(slice(0, 8)).targets_BS.clone()
    targets[:6] = IGNORE_INDEX
    batch = Batch(batch_of(slice(0, 8)).tokens_BS, targets, 6)
    other = batch.tokens_BS.clone()
    other[:6] = 7
    assert of(batch) == of(batch._replace(tokens_BS=other))
    assert model.training


def test_real_positions():
    x = IGNORE_INDEX
    targets = torch.tensor([[1, x, 2, 3], [x, 4, x, x], [x, x, x, x]])
    assert real_positions(targets[:1]) is None
    wanted = [[True] * 4, [True, True, False, False], [False] * 4]
    assert real_positions(targets).tolist() == wanted


def test_randomness_of_a_step():
    draws = []
    for seed, number, rank in ((0, 0, 0), (0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)):
        torch.rand(number + 1)
        seed_randomness_(seed, number, rank)
        draws.append(torch.rand(1).item())
    assert draws[0] == draws[1]
    assert len(set(draws)) == 4


def test_noise_is_of_training_alone():
    moe = replace(MOE, noise="rsample", jitter=0.1)
    model = make(replace(CONFIG, moe=moe))
    tokens = batch_of(slice(0, 2)).tokens_BS
    model.train()
    assert not torch.equal(model(tokens).logits_BSV, model(tokens).logits_BSV)
    model.eval()
    assert torch.equal(model(tokens).logits_BSV, model(tokens).logits_BSV)
