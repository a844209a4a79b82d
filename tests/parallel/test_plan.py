"""One process, DDP and FSDP compute the same: gradients, norms and parameters after a few steps."""

import contextlib
import functools
import os
import warnings
from dataclasses import replace

import pytest
import torch
from torch.distributed.tensor import DTensor, Replicate, Shard

from open_lm import checkpoint, loss, optim
from open_lm.config.distributed import DistributedConfig
from open_lm.config.model import ModelConfig
from open_lm.config.moe import MoEConfig
from open_lm.config.optim import OptimConfig
from open_lm.model import Transformer
from open_lm.nn.init import initialize_
from open_lm.parallel import mesh, plan

DENSE = ModelConfig(dim=32, n_layers=2, n_heads=2, seq_len=16, vocab_size=64)
SPARSE = replace(DENSE, moe=MoEConfig(freq=2, num_experts=4, top_k=2, capacity_factor=0, ffn_type="swiglu"))
MODELS = {
    "dense": DENSE,
    "moe": SPARSE,
    "latent": replace(
        DENSE, kv_lora_rank=6, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=10, q_lora_rank=7
    ),
    "gpt": replace(
        DENSE,
        positional_embedding_type="learned",
        attn_bias=True,
        ffn_bias=True,
        ffn_type="gelu_tanh",
        weight_tying=True,
        n_kv_heads=1,
    ),
    "tied": replace(SPARSE, weight_tying=True, model_norm="gain_only_layer_norm", qk_norm=True),
}
PLAIN, FSDP = DistributedConfig(), DistributedConfig(fsdp=True)
ALONE = mesh.World(0, 0, 1, torch.device("cpu"), None)


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    """These tests are of gloo and CPUs, wherever they run; test_gpu.py has the others."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(mesh, "_device", lambda *_: torch.device("cpu"))


@pytest.fixture
def group_of_one(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    yield mesh.start(FSDP)
    mesh.stop()


def make(config, world=ALONE, distributed=PLAIN, precision="fp32", **options):
    return plan.parallelize(
        config, world=world, distributed=distributed, precision=precision, seed=1, **options
    )


def whole(tensor):
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).float().clone().numpy()


def batch(step, sequences=4):
    """Sequences of which the ranks and micro-batches have unequal numbers of tokens."""
    tokens = torch.randint(0, 64, (sequences, 17), generator=torch.Generator().manual_seed(step))
    targets = tokens[:, 1:].clone()
    targets[0, :9] = -100
    return tokens[:, :-1], targets


def train(
    model,
    world,
    *,
    accumulate=1,
    steps=3,
    optimizer="adamw",
    precision="fp32",
    balance=0.1,
    always_sync=False,
    sequences=4,
    stepper=None,
):
    """(losses, gradient norms, gradients of the first step, parameters after the last step)."""
    parameters = list(model.parameters())
    if stepper is not None:
        pass
    elif optimizer == "adamw":
        stepper = optim.make_optimizer(model, OptimConfig(lr=1e-3, eps=1e-6, wd=0.1))
    else:
        stepper = torch.optim.SGD(parameters, lr=0.1)
    named = dict(plan.unwrap(model).named_parameters())
    losses, norms, gradients = [], [], {}
    for step in range(steps):
        tokens, targets = batch(step, sequences)
        n = (targets != -100).sum()
        mine = slice(*((rank * sequences) // world.world_size for rank in (world.rank, world.rank + 1)))
        micro = list(zip(tokens[mine].chunk(accumulate), targets[mine].chunk(accumulate), strict=True))
        total = torch.zeros(())
        for i, (x, y) in enumerate(micro):
            last = i == len(micro) - 1
            with contextlib.nullcontext() if always_sync else plan.no_sync(model, not last):
                with plan.autocast(precision, world.device):
                    output = model(x)
                nll = loss.cross_entropy(output.logits_BSV, y).nll_sum
                objective = nll / n * world.world_size
                if output.router_stats:
                    objective = objective + balance / accumulate * output.router_stats[0].balance_loss
                objective.backward()
            total += nll.detach()
        losses.append(mesh.sum_over_ranks_(total).item() / n.item())
        norm = optim.grad_norm(parameters)
        norms.append(norm.item())
        optim.clip_(parameters, norm, 0.5)
        if step == 0:
            gradients = {name: whole(p.grad) for name, p in named.items()}
        stepper.step()
        stepper.zero_grad()
    return losses, norms, gradients, {name: whole(p) for name, p in named.items()}


def assert_same(ours, reference):
    for got, expected in zip(ours[:2], reference[:2], strict=True):
        torch.testing.assert_close(torch.tensor(got), torch.tensor(expected), rtol=5e-6, atol=0)
    assert ours[2].keys() == reference[2].keys()
    for name in reference[2]:
        got, expected = (torch.from_numpy(r[2][name]) for r in (ours, reference))
        torch.testing.assert_close(got, expected, rtol=2e-5, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")
        got, expected = (torch.from_numpy(r[3][name]) for r in (ours, reference))
        torch.testing.assert_close(got, expected, rtol=2e-6, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")


def on_two_ranks():
    warnings.simplefilter("error")
    world = mesh.start(DistributedConfig(force_distributed=True))
    results = {}
    for name, config in MODELS.items():
        for kind, distributed in (("ddp", PLAIN), ("fsdp", FSDP)):
            for optimizer in ("adamw", "sgd"):
                model = make(config, world, distributed)
                results[name, kind, optimizer] = train(model, world, optimizer=optimizer)
    for kind, distributed in (("ddp", PLAIN), ("fsdp", FSDP)):
        results["accumulated", kind] = train(make(SPARSE, world, distributed), world, accumulate=2)
        model = make(SPARSE, world, distributed, grad_checkpointing=True)
        results["recomputed", kind] = train(model, world)
    results["always synced"] = train(make(SPARSE, world, FSDP), world, accumulate=2, always_sync=True)
    static = replace(PLAIN, ddp_static_graph=True)
    results["static"] = train(make(SPARSE, world, static), world)
    return results if world.is_first else None


HYBRIDS = {"fsdp_hybrid": SPARSE, "fsdp_hybrid_o2": MODELS["tied"]}


def on_two_hosts(folder):
    """Four ranks as 2 hosts with 2 each: what `on_these_hosts` gives, by flag."""
    warnings.simplefilter("error")
    os.environ |= {"LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": str(int(os.environ["RANK"]) % 2)}
    world = mesh.start(replace(FSDP, fsdp_hybrid=True))
    return {flag: on_these_hosts(world, folder / flag, flag) for flag in HYBRIDS}


def on_these_hosts(world, folder, flag):
    """{kind: result of train}; a checkpoint in `folder` on the way."""
    distributed, config = replace(FSDP, **{flag: True}), HYBRIDS[flag]
    assert world.mesh.mesh_dim_names == ("replicate", "shard")
    assert world.notes == ("--fsdp-hybrid: sharded over 2 ranks, replicated over 2 nodes",)
    assert world.mesh.mesh.tolist() == [[0, 1], [2, 3]]
    results = {}

    model = make(config, world, distributed)
    assert all(p.placements == (Replicate(), Shard(0)) for p in model.parameters())
    results["initial"] = {name: whole(p) for name, p in model.named_parameters()}
    results["plain"] = train(model, world, sequences=8)
    model = make(config, world, distributed)
    optimizer = optim.make_optimizer(model, OptimConfig(lr=1e-3, eps=1e-6, wd=0.1))
    results["accumulated"] = train(model, world, accumulate=2, sequences=8, stepper=optimizer)
    path = checkpoint.save(folder, 1, model=model, optimizer=optimizer, state={"step": 3})

    again = make(config, world, distributed)
    optimizer = optim.make_optimizer(again, OptimConfig(lr=1e-3, eps=1e-6, wd=0.1))
    checkpoint.load_training_state(path, again, optimizer)
    loaded = {name: whole(p) for name, p in again.named_parameters()}
    assert all((loaded[name] == results["accumulated"][3][name]).all() for name in loaded)
    with torch.no_grad():
        mine = again(batch(9)[0][world.rank : world.rank + 1]).logits_BSV
    plan.reshard_(again)
    results["evaluated"] = mine.numpy()
    results["resumed"] = train(again, world, steps=1, sequences=8, stepper=optimizer)

    again(batch(0)[0]).logits_BSV.sum().backward()
    again(batch(0)[0])
    results["sharded after forward"] = isinstance(again.layers[0].attention.in_proj.weight, DTensor)
    return results


@pytest.mark.slow
def test_two_hosts_equal_one_process(spawn, tmp_path):
    ranks = spawn(4, on_two_hosts, tmp_path)
    for flag, config in HYBRIDS.items():
        check_hosts(flag, config, [rank[flag] for rank in ranks], tmp_path / flag)


def check_hosts(flag, config, ranks, folder):
    ours = ranks[0]
    expected = Transformer(config)
    initialize_(expected, config, seed=1)
    for name, value in expected.named_parameters():
        assert (ours["initial"][name] == value.detach().numpy()).all(), name
    assert_same(ours["plain"], train(make(config), ALONE, accumulate=4, sequences=8))
    model = make(config)
    optimizer = optim.make_optimizer(model, OptimConfig(lr=1e-3, eps=1e-6, wd=0.1))
    reference = train(model, ALONE, accumulate=8, sequences=8, stepper=optimizer)
    for result in ranks:
        assert_same(result["accumulated"], reference)

    # one process continues from what the four saved
    state = checkpoint.load_training_state(folder / "epoch_1.pt", model, optimizer)
    assert state["step"] == 3
    for name, p in model.named_parameters():
        assert (whole(p) == ours["accumulated"][3][name]).all(), name
    with torch.no_grad():
        logits = model(batch(9)[0]).logits_BSV
    for rank, result in enumerate(ranks):
        got = torch.from_numpy(result["evaluated"])
        torch.testing.assert_close(got, logits[rank : rank + 1], rtol=1e-5, atol=1e-5)
    reference = train(model, ALONE, accumulate=4, steps=1, sequences=8, stepper=optimizer)
    assert_same(ours["resumed"], reference)
    assert ours["sharded after forward"] == (flag == "fsdp_hybrid")


def compiled_on_two_ranks():
    world = mesh.start(FSDP)
    plan.torch.compile = functools.partial(torch.compile, backend="aot_eager")  # no C++ compiler needed
    results = {}
    for kind, distributed in (("ddp", PLAIN), ("fsdp", FSDP)):
        for recompute in (False, True):
            model = make(SPARSE, world, distributed, torchcompile=True, grad_checkpointing=recompute)
            results[kind, recompute] = train(model, world)
    return results


@pytest.mark.slow
def test_compiled_blocks_on_two_ranks_equal_one_process(spawn, references):
    for result in spawn(2, compiled_on_two_ranks, timeout=240)[0].values():
        assert_same(result, references["moe", "adamw"])


def triton_on_two_ranks():
    world = mesh.start(FSDP)
    config = replace(SPARSE, moe=replace(SPARSE.moe, backend="triton"))
    return train(make(config, world, FSDP), world)


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="on CPUs in Triton's interpreter")
def test_our_kernels_on_two_ranks_equal_one_process(spawn, references):
    """What the kernels save for backward are parameters that FSDP frees meanwhile."""
    assert_same(spawn(2, triton_on_two_ranks, timeout=240)[0], references["moe", "adamw"])


@pytest.mark.parametrize(
    ("asked", "device", "ranks", "triton", "compiler", "expected"),
    [
        (None, "cuda", 1, True, "gcc", True),
        (None, "cuda", 1, True, "clang", True),
        (None, "cuda", 1, True, None, False),
        (None, "cuda", 1, False, "gcc", False),
        (None, "cuda", 2, True, "gcc", False),
        (None, "cpu", 1, True, "gcc", False),
        (True, "cpu", 2, False, None, True),
        (False, "cuda", 1, True, "gcc", False),
    ],
)
def test_one_gpu_compiles_unless_told_not_to(asked, device, ranks, triton, compiler, expected, monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(plan.shutil, "which", lambda name: f"/bin/{name}" if name == compiler else None)
    monkeypatch.setattr(plan, "has_triton", lambda: triton)
    with torch._dynamo.config.patch(suppress_errors=False):
        assert plan.compiles(asked, torch.device(device), ranks) == expected
        # what nobody asked for must not end a run
        assert torch._dynamo.config.suppress_errors == (expected and asked is None)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of torch.compile's own
@pytest.mark.parametrize("recompute", [False, True], ids=["one graph", "block by block"])
def test_compiled_in_one_process_equals_uncompiled(recompute, references, monkeypatch):
    compiled, compile = [], torch.compile
    torch._dynamo.reset()  # sizes of earlier tests would make these symbolic

    def compile_without_code(function):  # no C++ compiler needed
        compiled.append(function.__name__)
        return compile(function, backend="aot_eager", fullgraph=True)

    monkeypatch.setattr(plan.torch, "compile", compile_without_code)
    model = make(SPARSE, ALONE, PLAIN, torchcompile=True, grad_checkpointing=recompute)
    assert compiled == (["forward"] * len(model.layers) if recompute else ["body"])
    assert_same(train(model, ALONE), references["moe", "adamw"])


def forward_and_backward(model):
    """(output, gradients, bytes that the forward pass keeps for the backward pass)."""
    kept: dict[int, int] = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    x, y = batch(0)
    local = (p.to_local() if isinstance(p, DTensor) else p for p in model.parameters())
    weights = {p.untyped_storage().data_ptr() for p in local}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(x)
        value = loss.cross_entropy(output.logits_BSV, y).nll_sum
    value = value + sum(stats.balance_loss for stats in output.router_stats)
    kept_bytes = sum(size for pointer, size in kept.items() if pointer not in weights)
    value.backward()
    return output, {name: whole(p.grad) for name, p in model.named_parameters()}, kept_bytes


@pytest.mark.parametrize("distributed", [PLAIN, FSDP], ids=["plain", "fsdp"])
def test_recomputation_changes_memory_alone(distributed, group_of_one):
    config = replace(SPARSE, n_layers=4)
    results = [
        forward_and_backward(make(config, group_of_one, distributed, grad_checkpointing=recompute))
        for recompute in (False, True)
    ]
    (kept, gradients, kept_bytes), (recomputed, gradients_again, bytes_again) = results
    assert torch.equal(kept.logits_BSV, recomputed.logits_BSV)
    for before, after in zip(kept.router_stats, recomputed.router_stats, strict=True):
        for field, value in before._asdict().items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(getattr(after, field))), field
    for name in gradients:
        assert (gradients[name] == gradients_again[name]).all(), name
    assert bytes_again < 0.5 * kept_bytes, (bytes_again, kept_bytes)


def test_fsdp_gathers_the_next_block_during_a_backward(group_of_one):
    """What the warning of --fsdp-backward-prefetch says."""
    model = make(replace(DENSE, n_layers=3), group_of_one, FSDP)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiled:
        model(batch(0)[0]).logits_BSV.sum().backward()
    events = sorted(profiled.events(), key=lambda event: event.time_range.start)
    order = [event.name.removeprefix("FSDP::") for event in events if event.name.startswith("FSDP::")]
    for layer in (1, 2):
        gathered = order.index(f"backward_prefetch for layers.{layer - 1}")
        assert gathered < order.index(f"post_backward_reduce (layers.{layer})")


@pytest.fixture(scope="module")
def references():
    """One process whose micro-batches are what the two ranks have, and twice as many."""
    results = {
        (name, optimizer): train(make(config), ALONE, accumulate=2, optimizer=optimizer)
        for name, config in MODELS.items()
        for optimizer in ("adamw", "sgd")
    }
    return results | {"accumulated": train(make(SPARSE), ALONE, accumulate=4)}


def test_two_ranks_equal_one_process(spawn, references):
    results = spawn(2, on_two_ranks)[0]
    for name in MODELS:
        for kind in ("ddp", "fsdp"):
            for optimizer in ("adamw", "sgd"):
                assert_same(results[name, kind, optimizer], references[name, optimizer])
    for kind in ("ddp", "fsdp"):
        assert_same(results["accumulated", kind], references["accumulated"])
        assert_same(results["recomputed", kind], references["moe", "adamw"])
    assert_same(results["always synced"], references["accumulated"])
    assert_same(results["static"], references["moe", "adamw"])


@pytest.mark.parametrize("name", MODELS)
def test_fsdp_on_one_rank_equals_one_process(name, references, group_of_one):
    ours = train(make(MODELS[name], group_of_one, FSDP), group_of_one, accumulate=2)
    assert_same(ours, references[name, "adamw"])


@pytest.mark.parametrize("name", MODELS)
def test_accumulation_equals_the_large_batch(name):
    # the balance loss is by definition a mean over micro-batches
    large, slices = (
        train(make(MODELS[name]), ALONE, accumulate=n, balance=0.0, optimizer="sgd") for n in (1, 4)
    )
    assert_same(slices, large)


def to_all_but_routers(model, dtype):
    for name, parameter in model.named_parameters():
        if ".router." not in name:
            parameter.data = parameter.data.to(dtype)
    return model


@pytest.mark.parametrize("distributed", [PLAIN, FSDP], ids=["plain", "fsdp"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", MODELS)
def test_initial_numbers_do_not_depend_on_how_they_are_made(name, precision, distributed, group_of_one):
    expected = Transformer(MODELS[name])
    initialize_(expected, MODELS[name], seed=1)
    if precision == "bf16":
        to_all_but_routers(expected, torch.bfloat16)
    for meta in (True, False):
        model = make(MODELS[name], group_of_one, distributed, precision, meta=meta)
        parameters = dict(plan.unwrap(model).named_parameters())
        assert parameters.keys() == dict(expected.named_parameters()).keys()
        for parameter_name, value in expected.named_parameters():
            got = parameters[parameter_name].detach()
            got = got.full_tensor() if isinstance(got, DTensor) else got
            assert got.dtype == value.dtype
            assert torch.equal(got, value), parameter_name
        assert (plan.unwrap(model).output.weight is plan.unwrap(model).tok_embeddings.weight) == (
            MODELS[name].weight_tying
        )


def test_meta_holds_one_whole_block_at_a_time(monkeypatch):
    config = replace(DENSE, n_layers=5)
    alive = []
    fill = plan.initialize_

    def watch(module, *arguments):
        fill(module, *arguments)
        alive.append(sum(p.is_meta for p in whole_model.parameters()))

    build = plan.build

    def remember(config):
        nonlocal whole_model
        whole_model = build(config)
        return whole_model

    whole_model = torch.nn.Module()
    monkeypatch.setattr(plan, "initialize_", watch)
    monkeypatch.setattr(plan, "build", remember)
    make(config)
    total = len(list(whole_model.parameters()))
    assert alive[0] > 0.7 * total, "everything was materialised at once"
    assert alive == sorted(alive, reverse=True)
    assert alive[-1] == 0


def test_fp16_is_a_forward_on_fp16_casts_of_fp32_weights(group_of_one):
    x, y = batch(0)
    model = make(SPARSE, precision="fp16")
    output = model(x)
    assert output.logits_BSV.dtype == torch.float16
    loss.cross_entropy(output.logits_BSV, y).nll_sum.backward()
    by_hand = to_all_but_routers(make(SPARSE), torch.float16)
    expected = by_hand(x)
    assert torch.equal(output.logits_BSV, expected.logits_BSV)
    loss.cross_entropy(expected.logits_BSV, y).nll_sum.backward()
    others = [
        make(SPARSE, precision="fp16", grad_checkpointing=True),
        make(SPARSE, group_of_one, FSDP, "fp16"),
        make(SPARSE, group_of_one, FSDP, "fp16", grad_checkpointing=True),
    ]
    for other in others:
        loss.cross_entropy(other(x).logits_BSV, y).nll_sum.backward()
    for name, p in model.named_parameters():
        assert p.dtype == p.grad.dtype == torch.float32
        assert torch.equal(p.grad, by_hand.get_parameter(name).grad.float()), name
        for other in others:
            assert (whole(other.get_parameter(name).grad) == p.grad.numpy()).all(), name


def dtypes_on_two_ranks():
    """{flag: what was seen of its dtypes}."""
    world = mesh.start(FSDP)
    seen = {}
    for flag in ("fsdp_amp", "fsdp_pure_bf16"):
        model = make(SPARSE, world, replace(FSDP, **{flag: True}))
        optimizer = optim.make_optimizer(model, OptimConfig())
        gathered = set()
        for block in model.layers:
            for part in (block.attention, block.feed_forward):
                part.register_forward_hook(
                    lambda module, *_, into=gathered: into.update(
                        p.dtype for name, p in module.named_parameters() if "router" not in name
                    )
                )
        x, y = (part[2 * world.rank : 2 * world.rank + 2] for part in batch(0))
        logits = model(x).logits_BSV
        loss.cross_entropy(logits, y).nll_sum.backward()
        gradients = {name: whole(p.grad) for name, p in model.named_parameters()}
        optimizer.step()
        seen[flag] = {
            "logits": logits.dtype,
            "gathered": gathered,
            "kept": {p.dtype for p in model.parameters()} | {p.grad.dtype for p in model.parameters()},
            "moments": {
                optimizer.state[p][k].dtype for p in model.parameters() for k in ("exp_avg", "exp_avg_sq")
            },
            "gradients": gradients,
            "weights": {name: whole(p) for name, p in model.named_parameters()},
        }
    return seen


def share_in_bf16(values):
    """Of all numbers, the share that bf16 holds exactly."""
    flat = torch.cat([torch.from_numpy(v).flatten() for v in values.values()])
    return (flat.bfloat16().float() == flat).float().mean().item()


def test_fsdp_in_bf16_keeps_fp32_weights(spawn):
    seen, _ = spawn(2, dtypes_on_two_ranks)
    for flag in ("fsdp_amp", "fsdp_pure_bf16"):
        assert seen[flag]["logits"] == torch.bfloat16
        assert seen[flag]["gathered"] == {torch.bfloat16}
        assert seen[flag]["kept"] == seen[flag]["moments"] == {torch.float32}
        routers = [name for name in seen[flag]["gradients"] if ".router." in name]
        assert share_in_bf16({name: seen[flag]["gradients"].pop(name) for name in routers}) < 0.1
        assert share_in_bf16(seen[flag]["weights"]) < 0.1  # an update is smaller than bf16 sees
    # the mean of two bf16 gradients, in fp32 and rounded
    assert share_in_bf16(seen["fsdp_amp"]["gradients"]) < 0.9
    assert share_in_bf16(seen["fsdp_pure_bf16"]["gradients"]) == 1


def test_fsdp_amp_accumulates_in_fp32(group_of_one):
    model = make(SPARSE, group_of_one, replace(FSDP, fsdp_amp=True))
    x, y = batch(0)
    for part in (slice(0, 2), slice(2, 4)):
        with plan.no_sync(model, part.start == 0):
            loss.cross_entropy(model(x[part]).logits_BSV, y[part]).nll_sum.backward()
    assert share_in_bf16({name: whole(p.grad) for name, p in model.named_parameters()}) < 0.9


@pytest.mark.parametrize("precision", ["bf16", "amp", "amp_bf16", "fp16"])
def test_low_precision_trains_near_fp32(precision):
    exact = train(make(SPARSE), ALONE)
    low = train(make(SPARSE, precision=precision), ALONE, precision=precision)
    torch.testing.assert_close(torch.tensor(low[0]), torch.tensor(exact[0]), rtol=2e-2, atol=0)
    assert low[0] != exact[0]


def test_bf16_has_bf16_gradients_and_moments():
    model = make(SPARSE, precision="bf16")
    optimizer = optim.make_optimizer(model, OptimConfig())
    loss.cross_entropy(model(batch(0)[0]).logits_BSV, batch(0)[1]).nll_sum.backward()
    optimizer.step()
    for name, p in model.named_parameters():
        dtype = torch.float32 if ".router." in name else torch.bfloat16
        assert p.dtype == p.grad.dtype == optimizer.state[p]["exp_avg"].dtype == dtype


def test_reshard_after_an_evaluation(group_of_one):
    model = make(DENSE, group_of_one, FSDP)
    with torch.no_grad():
        model(batch(0)[0])
    plan.reshard_(model)
    assert all(isinstance(p, DTensor) for p in model.parameters())


@pytest.mark.parametrize(
    ("flags", "precision", "message"),
    [
        ({"fsdp_amp": True}, "fp32", "--fsdp-amp without --fsdp"),
        ({"fsdp": True, "fsdp_amp": True, "fsdp_pure_bf16": True}, "fp32", "--fsdp-amp --fsdp-pure-bf16"),
        ({"fsdp": True, "fsdp_amp": True}, "fp16", "--precision fp16 .* --fsdp-amp"),
    ],
)
def test_contradictions_are_refused(flags, precision, message):
    with pytest.raises(ValueError, match=message):
        make(DENSE, distributed=DistributedConfig(**flags), precision=precision)
