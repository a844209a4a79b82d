"""Generation with the KV cache against recomputing the whole text for every token, and sampling."""

from dataclasses import replace

import pytest
import torch

from open_lm.config import ModelConfig, MoEConfig
from open_lm.config.moe import RouterName
from open_lm.generate import generate
from open_lm.model import build
from open_lm.moe.routers import ROUTERS

CONFIG = ModelConfig(dim=32, n_layers=2, n_heads=4, seq_len=24, vocab_size=53)
PROMPT = torch.tensor([[1, 2, 3], [50, 7, 7]])


def recompute(model, tokens, new_tokens):
    for _ in range(new_tokens):
        tokens = torch.cat((tokens, model(tokens).logits_BSV[:, -1:].argmax(-1)), 1)
    return tokens


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"positional_embedding_type": "llama_rotary", "qk_norm": True},
        {"moe": MoEConfig(freq=2, num_experts=4, capacity_factor=0)},
        {
            "attn_name": "custom_attn",
            "attn_activation": "relu",
            "attn_seq_scalar": "avg",
            "attn_seq_scalar_alpha": 1.0,
        },
    ],
    ids=["dense", "llama_rotary", "moe", "relu attention"],
)
def test_cache_equals_recomputing(options):
    model = build(replace(CONFIG, **options), "cpu", seed=3)
    text = generate(model, PROMPT, 21)
    assert text.shape == (2, 24)
    assert text.tolist() == recompute(model, PROMPT, 21).tolist()
    assert len(set(text[0].tolist())) > 4  # not one token for ever, which any cache would get right


@pytest.mark.parametrize("router", [name for name in RouterName.__args__ if name in ROUTERS])
@pytest.mark.parametrize("sequences", [1, 2])
def test_every_router_generates(router, sequences):
    """A token at a time: capacities of less than one row drop nobody, and experts that choose take one."""
    moe = MoEConfig(freq=1, num_experts=4, router=router, top_k=2)
    if router == "top_k":
        moe = replace(moe, noise="rsample", jitter=0.5)
    model = build(replace(CONFIG, moe=moe), "cpu", seed=3)
    text = generate(model, PROMPT[:sequences], 5)
    assert text.shape == (sequences, 8)
    assert text.tolist() == generate(model, PROMPT[:sequences], 5).tolist()  # evaluation: no noise
    assert model.training


def test_sampling_follows_the_distribution():
    model = build(CONFIG, "cpu")
    samples = 20_000
    drawn = generate(model, PROMPT[:1].expand(samples, -1), 1, temperature=0.7)[:, -1]
    p_V = (model(PROMPT[:1]).logits_BSV[0, -1] / 0.7).softmax(-1)
    counts = torch.zeros(53).index_add_(0, drawn, torch.ones(samples))
    chi_square = ((counts - samples * p_V).square() / (samples * p_V)).sum().item()
    assert chi_square < 52 + 5 * (2 * 52) ** 0.5  # 52 degrees of freedom, five sigma
    assert p_V.max() > 2 * p_V.min()  # and not a uniform one


def test_seed_decides_samples():
    model = build(CONFIG, "cpu")
    a, again, b = (generate(model, PROMPT, 8, temperature=1.0, seed=seed).tolist() for seed in (1, 1, 2))
    assert a == again != b


def test_errors():
    model = build(CONFIG, "cpu")
    with pytest.raises(ValueError, match=r"3 \+ new_tokens 22 > the model's seq_len 24"):
        generate(model, PROMPT, 22)
    with pytest.raises(ValueError, match="at least one prompt token"):
        generate(model, PROMPT[:, :0], 1)
