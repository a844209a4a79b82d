"""Dropout: how much, where, and never in evaluation; learned positions; caches of the newer attentions."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from open_lm.config import ModelConfig
from open_lm.generate import generate
from open_lm.model import build
from open_lm.nn.attention import LayerCache, torch_attn
from open_lm.nn.block import Block

CONFIG = ModelConfig(dim=32, n_layers=2, n_heads=4, seq_len=24, vocab_size=53)
TOKENS = torch.arange(48).view(2, 24) * 7 % 53
LATENT = {"kv_lora_rank": 12, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 10}
VARIANTS = {
    "gqa": {"n_kv_heads": 2, "explicit_head_dim": 6, "qk_norm_per_head": True},
    "latent": LATENT,
    "latent, queries too": LATENT | {"q_lora_rank": 8, "positional_embedding_type": "none"},
    "learned": {"positional_embedding_type": "learned", "attn_bias": True},
    "gqa, relu": {"n_kv_heads": 1, "attn_name": "custom_attn", "attn_activation": "relu",
                  "attn_seq_scalar": "max", "attn_seq_scalar_alpha": 1.0},
    "latent, custom": LATENT | {"attn_name": "custom_attn", "attn_activation": "softmax",
                                "attn_seq_scalar": "none", "attn_seq_scalar_alpha": 1.0},
    "yarn": {"rope_scaling": "yarn", "rope_scaling_factor": 2.0, "rope_original_seq_len": 12},
}  # fmt: skip


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_cut_text_and_generation_equal_the_whole(name, dropout):
    """With dropout too, which evaluation and generation leave out."""
    model = build(replace(CONFIG, dropout=dropout, **VARIANTS[name]), "cpu", seed=3).eval()
    expected = model(TOKENS).logits_BSV
    caches = [LayerCache() for _ in model.layers]
    parts = [model(TOKENS[:, a:b], caches=caches).logits_BSV for a, b in pairwise((0, 7, 8, 9, 24))]
    torch.testing.assert_close(torch.cat(parts, 1), expected, atol=1e-5, rtol=1e-5)
    assert caches[0].length == 24

    text = TOKENS[:, :3]
    for _ in range(21):
        text = torch.cat((text, model(text).logits_BSV[:, -1:].argmax(-1)), 1)
    model.train()
    assert generate(model, TOKENS[:, :3], 21).tolist() == text.tolist()
    assert model.training


def test_latent_caches_are_small():
    caches = [LayerCache() for _ in range(2)]
    build(replace(CONFIG, **LATENT), "cpu")(TOKENS, caches=caches)
    for cache in caches:
        assert cache.k_BTHK is not None
        assert cache.v_BTHK is not None
        assert cache.k_BTHK.numel() + cache.v_BTHK.numel() == TOKENS.numel() * (12 + 4)


def test_share_that_is_dropped():
    """Of the embedding, of attention's output and of the FFN's, each alone."""
    config = replace(CONFIG, dim=256, n_heads=2, dropout=0.25)
    model = build(config, "cpu")
    tokens = torch.arange(24 * 16).view(16, 24) % 53
    torch.manual_seed(0)
    embedded = model.embed(tokens, torch.arange(24), 0)
    kept = model.eval().embed(tokens, torch.arange(24), 0)
    dropped = embedded == 0
    assert dropped.float().mean().item() == pytest.approx(
        0.25, abs=5 * (0.25 * 0.75 / dropped.numel()) ** 0.5
    )
    torch.testing.assert_close(embedded[~dropped], kept[~dropped] / 0.75)

    block = model.layers[0]
    assert isinstance(block, Block)
    x = torch.randn(16, 24, 256)
    for silent in (block.attention.out_proj, block.feed_forward.w3):
        weight = silent.weight.detach().clone()
        torch.nn.init.zeros_(silent.weight)  # so that the other branch is all there is
        added = block.train()(x)[0] - x
        whole = block.eval()(x)[0] - x
        dropped = added == 0
        assert dropped.float().mean().item() == pytest.approx(0.25, abs=0.01)
        torch.testing.assert_close(added[~dropped], whole[~dropped] / 0.75, atol=1e-5, rtol=1e-3)
        silent.weight.data.copy_(weight)


@pytest.mark.parametrize("kv_heads", [1, 4])
def test_attention_weights_that_are_dropped(kv_heads):
    """Values that name their position show the weights; a dropped one is 0, the others grow."""
    torch.manual_seed(0)
    q, k = torch.randn(64, 8, 4, 8), torch.randn(64, 8, kv_heads, 8)
    v = torch.eye(8)[None, :, None].expand(64, -1, kv_heads, -1)
    weights, dropped = (torch_attn(q, k, v, causal=True, dropout=p) for p in (0.0, 0.4))
    seen = weights > 0
    gone = (dropped == 0) & seen
    share = gone.sum().item() / seen.sum().item()
    assert share == pytest.approx(0.4, abs=5 * (0.24 / seen.sum().item()) ** 0.5)
    torch.testing.assert_close(dropped[seen & ~gone], weights[seen & ~gone] / 0.6)


@pytest.mark.parametrize("attention", [{}, LATENT], ids=["plain", "latent"])
def test_attention_dropout_acts_in_training_only(attention):
    model = build(replace(CONFIG, attn_dropout=0.5, **attention), "cpu")
    plain = build(replace(CONFIG, **attention), "cpu")
    assert not torch.allclose(model(TOKENS).logits_BSV, plain(TOKENS).logits_BSV)
    assert torch.equal(model.eval()(TOKENS).logits_BSV, plain(TOKENS).logits_BSV)


@pytest.mark.parametrize("options", [{"dropout": 0.2}, {"attn_dropout": 0.2}], ids=str)
def test_recomputation_drops_the_same(options):
    model = build(replace(CONFIG, **options), "cpu")
    results = []
    for model.grad_checkpointing in (False, True):
        model.zero_grad()
        torch.manual_seed(5)
        logits = model(TOKENS).logits_BSV
        logits.square().mean().backward()
        results.append((logits, {name: p.grad for name, p in model.named_parameters()}))
    torch.testing.assert_close(*results, atol=0, rtol=0)


def test_learned_positions_end():
    model = build(replace(CONFIG, positional_embedding_type="learned"), "cpu")
    assert model.get_parameter("pos_embeddings.weight").shape == (24, 32)
    with pytest.raises(
        ValueError, match="a text of 25 tokens, but the model has learned the positions of seq_len 24"
    ):
        model(torch.zeros(1, 25, dtype=torch.long))
    caches = [LayerCache() for _ in model.layers]
    model(TOKENS, caches=caches)
    with pytest.raises(ValueError, match="25 tokens"):
        model(TOKENS[:, :1], caches=caches)


def test_models_without_them_have_no_new_parameters():
    names = [name for name, _ in build(CONFIG).named_parameters()]
    assert names[0] == "tok_embeddings.weight"
    assert not any("pos_embeddings" in name or "dropout" in name for name in names)
    assert {name.rsplit(".", 1)[0] for name in names if ".attention." in name} == {
        f"layers.{layer}.attention.{part}" for layer in (0, 1) for part in ("in_proj", "out_proj")
    }
