"""Perplexity against the definition, and the same for every number of ranks."""

import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

from open_lm.config.distributed import DistributedConfig
from open_lm.config.eval import EvalConfig
from open_lm.config.model import ModelConfig
from open_lm.config.moe import MoEConfig
from open_lm.data.batches import Batch
from open_lm.eval.bootstrap import interval
from open_lm.eval.perplexity import evaluate, perplexity
from open_lm.loss import real_positions
from open_lm.parallel import mesh, plan

# a capacity that drops: what else is in the batch matters
CONFIG = ModelConfig(
    dim=32, n_layers=2, n_heads=2, seq_len=8, vocab_size=64,
    moe=MoEConfig(freq=1, num_experts=4, top_k=2, capacity_factor=0.5),
)  # fmt: skip
DROPLESS = replace(CONFIG, moe=replace(CONFIG.moe, capacity_factor=0))
PLAIN = DistributedConfig()
ALONE = mesh.World(0, 0, 1, torch.device("cpu"), None)


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    """Ranks are gloo's, wherever the tests run."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


class Sequences:
    """Stands in for ValData: 7 sequences, one of them bad, another with masked targets."""

    entry = "text.jsonl"

    def __init__(self, n=7):
        tokens = torch.randint(0, 64, (n, 9), generator=torch.Generator().manual_seed(0))
        self.tokens, self.targets = tokens[:, :-1], tokens[:, 1:].clone()
        self.targets[2] = -100
        self.targets[4, :3] = -100

    def batches(self, batch_sequences, rank, world_size):
        starts = range(0, len(self.tokens), batch_sequences)
        for first in range(0, len(starts), world_size):
            if first + rank >= len(starts):
                yield None
                continue
            rows = slice(starts[first + rank], starts[first + rank] + batch_sequences)
            bad = (self.targets[rows] == -100).all(1).sum().item()
            yield Batch(self.tokens[rows], self.targets[rows], bad)


def make(config, world=ALONE, distributed=PLAIN):
    model = plan.parallelize(config, world=world, distributed=distributed, precision="fp32", seed=1)
    with torch.no_grad():  # far from uniform, so that every mistake shows
        for parameter in model.parameters():
            parameter.mul_(3)
    return model


INTERVALS = EvalConfig(val_seq_ci=True, val_tok_ci=True, val_iter_ci=300)
ENDS = [f"loss_{kind}_{end}_95" for kind in ("sequences", "tokens") for end in ("lower", "upper")]


def run(model, batch_sequences=2, world=ALONE, precision="fp32", n=7, config=None):
    return evaluate(
        model, Sequences(n), batch_sequences=batch_sequences, world=world, precision=precision, config=config
    )


@pytest.mark.parametrize("batch_sequences", [1, 2, 7])
def test_equals_the_definition(batch_sequences):
    model, data = make(DROPLESS), Sequences()
    result = run(model, batch_sequences)
    total, count = 0.0, 0
    for tokens, targets in zip(data.tokens, data.targets, strict=True):
        log_p = model(tokens[None]).logits_BSV[0].detach().double().log_softmax(-1)
        for position, target in enumerate(targets.tolist()):
            if target != -100:
                total, count = total - log_p[position, target].item(), count + 1
    assert (result["tokens"], result["sequences"], result["skipped_sequences"]) == (count, 6, 1) == (45, 6, 1)
    assert result["loss"] == pytest.approx(total / count, rel=1e-6)
    assert result["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-5)
    assert result["tokens_per_second"] == pytest.approx(45 / result["seconds"])


def test_open_lms_names():
    result = run(make(CONFIG))
    for name in ("samples_per_second", "samples_per_second_per_gpu", "data_time", "batch_time", "seconds"):
        assert result[name] > 0, name
    assert result["samples_per_second"] == pytest.approx(7 * 8 / result["seconds"])
    assert result["batch_time"] == pytest.approx(result["seconds"] / 4)
    assert not any("95" in name for name in result)  # intervals only where they are asked for


def test_intervals_are_of_each_tokens_and_each_sequences_loss():
    model, data = make(DROPLESS), Sequences()
    with torch.no_grad():
        log_p = model(data.tokens).logits_BSV.log_softmax(-1)
    nll = -log_p.gather(-1, data.targets.clamp(min=0)[..., None])[..., 0]
    counted = data.targets != -100
    of_tokens = nll[counted].numpy()
    of_sequences = np.array([nll[i][counted[i]].double().mean() for i in range(7) if counted[i].any()])
    assert (len(of_tokens), len(of_sequences)) == (45, 6)
    expected = [
        *interval(of_sequences, max_population=None, iterations=300),
        *interval(of_tokens, max_population=None, iterations=300),
    ]
    result = run(model, config=INTERVALS)
    assert [result[end] for end in ENDS] == pytest.approx(expected, rel=1e-5)
    assert result["loss_tokens_lower_95"] < result["loss"] < result["loss_tokens_upper_95"]
    narrow = run(model, config=replace(INTERVALS, val_seq_ci=False))
    wide = run(model, config=replace(INTERVALS, val_seq_ci=False, val_max_pop_ci=5))
    assert ENDS[0] not in wide
    widths = [r["loss_tokens_upper_95"] - r["loss_tokens_lower_95"] for r in (narrow, wide)]
    assert widths[1] == pytest.approx(3 * widths[0], rel=0.3)  # 45 draws, 5 draws


def test_what_a_capacity_drops_is_said():
    """Against the layers' own counts, batch by batch; nothing of it in a dense model."""
    model = make(CONFIG).eval()
    assignments = dropped = 0
    with torch.no_grad():
        for batch in Sequences().batches(2, 0, 1):
            real_BS = real_positions(batch.targets_BS)  # one sequence is bad: it takes no place
            for layer in model(batch.tokens_BS, real_BS=real_BS).router_stats:
                limit = int(0.5 * 2 * layer.tokens / 4)
                assignments += layer.count_E.sum().item()
                dropped += (layer.count_E - limit).clamp(min=0).sum().item()
    share = evaluate(model, Sequences(), batch_sequences=2, world=ALONE, precision="fp32")["dropped_share"]
    assert share == pytest.approx(dropped / assignments)
    assert 0 < share < 1
    assert (
        evaluate(make(DROPLESS), Sequences(), batch_sequences=2, world=ALONE, precision="fp32")[
            "dropped_share"
        ]
        == 0
    )
    dense = make(replace(CONFIG, moe=MoEConfig()))
    assert "dropped_share" not in evaluate(
        dense, Sequences(), batch_sequences=2, world=ALONE, precision="fp32"
    )


def test_nothing_is_left_changed():
    model = make(CONFIG)
    for training in (True, False):
        model.train(training)
        run(model)
        assert model.training is training
        assert all(p.grad is None for p in model.parameters())


def test_autocast_is_used():
    model = make(CONFIG)
    exact, low = run(model)["loss"], run(model, precision="amp_bf16")["loss"]
    assert low != exact
    assert low == pytest.approx(exact, rel=5e-2)


def on_two_ranks():
    warnings.simplefilter("error")
    world = mesh.start(DistributedConfig(fsdp=True))
    results = {}
    for kind, distributed in (("ddp", PLAIN), ("fsdp", DistributedConfig(fsdp=True))):
        model = make(CONFIG, world, distributed)
        # 7 sequences, 2 at a time: 4 batches; 5: 3 batches, and rank 1 has nothing in the last round
        results[kind] = [run(model, world=world, n=n, config=INTERVALS) for n in (7, 5)]
    return results


def test_does_not_depend_on_the_number_of_ranks(spawn):
    alone = [run(make(CONFIG), n=n, config=INTERVALS) for n in (7, 5)]
    for rank in spawn(2, on_two_ranks):
        for kind in ("ddp", "fsdp"):
            for ours, expected in zip(rank[kind], alone, strict=True):
                assert ours["loss"] == pytest.approx(expected["loss"], rel=1e-6), kind
                assert [ours[k] for k in ("tokens", "sequences", "skipped_sequences")] == [
                    expected[k] for k in ("tokens", "sequences", "skipped_sequences")
                ]
                assert [ours[end] for end in ENDS] == [expected[end] for end in ENDS]
    # the capacity acts here, so that equality is no accident
    assert run(make(CONFIG), 1)["loss"] != pytest.approx(alone[0]["loss"], rel=1e-4)


def test_nothing_to_predict_is_an_error():
    data = Sequences()
    data.targets[:] = -100
    with pytest.raises(ValueError, match=r"text.jsonl has no token to predict: all 7"):
        evaluate(make(CONFIG), data, batch_sequences=2, world=ALONE, precision="fp32")


def test_perplexity_overflows_to_infinity():
    assert perplexity(0.0) == 1
    assert perplexity(1e4) == math.inf
    assert math.isnan(perplexity(math.nan))
