"""Router statistics: by hand, summed over batches, and through one flat tensor."""

import math

import torch

from open_lm.config.model import ModelConfig
from open_lm.config.moe import MoEConfig
from open_lm.moe.capacity import drop_by
from open_lm.moe.layer import MoE
from open_lm.moe.placement import moe_layers
from open_lm.moe.routing import Context, sort_by_expert
from open_lm.moe.stats import add, measure, pack, summarize, unpack

E = 4


def stats_of(expert_TK: list[list[int]], logits_TE: torch.Tensor, capacity: int):
    choices = torch.tensor(expert_TK)
    routed = sort_by_expert(choices, torch.ones(choices.shape), logits_TE)
    config = MoEConfig(num_experts=E, top_k=choices.shape[1])
    return measure(routed._replace(choice_TK=choices), drop_by(routed, capacity), config, Context())


def test_summary_by_hand():
    # Expert 0 is chosen 4 times, 1 twice, 2 twice, 3 never; capacity 3 drops one assignment of 8.
    first = stats_of([[0, 1], [0, 1], [0, 2], [0, 2]], torch.zeros(4, E), capacity=3)
    (summary,) = summarize([first], [6])
    assert summary == {
        "layer": 6,
        "share": [0.5, 0.25, 0.25, 0.0],
        "entropy": summary["entropy"],
        "fullest_over_mean": 2.0,
        "dropped_share": 0.125,
        "dead_experts": 1,
    }
    assert math.isclose(summary["entropy"], math.log(E), rel_tol=1e-6)

    # A second batch of two certain tokens: entropy 0, so the mean over 6 tokens is 4/6 of log E.
    second = stats_of([[3, 0], [3, 0]], torch.tensor([[0.0, 0, 0, 200]] * 2), capacity=8)
    both = add([first], [second])
    (summary,) = summarize(both, [6])
    assert summary["share"] == [6 / 12, 2 / 12, 2 / 12, 2 / 12]
    assert math.isclose(summary["entropy"], math.log(E) * 4 / 6, rel_tol=1e-6)
    assert summary["fullest_over_mean"] == 2.0
    assert summary["dropped_share"] == 1 / 12
    assert summary["dead_experts"] == 0
    assert both[0].balance_loss == first.balance_loss + second.balance_loss


def test_pack_and_unpack_are_inverse():
    stats = [stats_of([[0], [1], [e]], torch.randn(3, E), capacity=1) for e in range(3)]
    flat_N = pack(stats)
    assert flat_N.ndim == 1
    assert not flat_N.requires_grad
    doubled = unpack(2 * flat_N, stats)
    for ours, wanted in zip(doubled, add(stats, stats), strict=True):
        for a, b in zip(ours, wanted, strict=True):
            torch.testing.assert_close(a, b, check_dtype=False)


def test_only_the_losses_carry_gradients():
    layer = MoE(MoEConfig(dim=8, num_experts=E, ffn_type="gelu", hidden_dim=8))
    _, stats = layer(torch.randn(2, 4, 8))
    assert [n for n, f in zip(stats._fields, stats, strict=True) if f.requires_grad] == [
        "loss",
        "probability_E",
    ]
    assert stats.tokens == 8
    assert stats.count_E.sum() == 16


def test_moe_layers():
    def of(freq: int):
        moe = MoEConfig(freq=freq, num_experts=2)
        return moe_layers(ModelConfig(dim=8, n_layers=7, n_heads=1, seq_len=4, vocab_size=8, moe=moe))

    assert of(0) == ()
    assert of(1) == tuple(range(7))
    assert of(2) == (0, 2, 4, 6)
    assert of(3) == (0, 3, 6)
    assert of(9) == (0,)
