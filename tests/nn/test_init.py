"""Initial values: their statistics, and that they depend on seed and name alone."""

import re
from dataclasses import replace

import pytest
import torch
from torch import nn

from open_lm.config import ModelConfig, MoEConfig
from open_lm.model import Transformer, build
from open_lm.nn.init import initialize_

D, F = 128, 512  # swiglu: int(8 * 128 / 3) = 341 → 512
DENSE = ModelConfig(
    dim=D, n_layers=3, n_heads=2, seq_len=8, vocab_size=256, qk_norm=True, post_embed_norm=True
)
SPARSE = replace(DENSE, moe=MoEConfig(freq=2, num_experts=4, ffn_type="swiglu", hidden_dim=192))
TRUNCATION = 0.98658  # standard deviation of a unit normal cut at 3


def fill(config: ModelConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    return dict(build(config, "cpu", seed).named_parameters())


def check_truncated(x: torch.Tensor, std: float) -> None:
    error = 5 / (2 * x.numel()) ** 0.5  # five standard errors of a sample's standard deviation
    assert x.std().item() == pytest.approx(std * TRUNCATION, rel=error)
    assert abs(x.mean().item()) < 5 * std / x.numel() ** 0.5
    assert 2.5 * std < x.abs().max() <= 3 * std * (1 + 1e-6)


@pytest.mark.parametrize(
    ("ffn_type", "into", "out"),
    [
        ("swiglu", ("w12",), ("w3",)),
        ("gelu", ("0",), ("2",)),
        ("gemma_geglu", ("gate_proj", "up_proj"), ("down_proj",)),
    ],
)
def test_dense(ffn_type, into, out):
    parameters = fill(replace(DENSE, ffn_type=ffn_type))
    for name in ("tok_embeddings.weight", "output.weight"):
        check_truncated(parameters.pop(name), D**-0.5)
    for layer in range(3):
        prefix = f"layers.{layer}."
        check_truncated(parameters.pop(prefix + "attention.in_proj.weight"), D**-0.5)
        check_truncated(parameters.pop(prefix + "attention.out_proj.weight"), (2 * D * (layer + 1)) ** -0.5)
        for name in into:
            check_truncated(parameters.pop(f"{prefix}feed_forward.{name}.weight"), D**-0.5)
        for name in out:  # hidden width 512, for gelu 4 * 128 by coincidence of the sizes
            check_truncated(
                parameters.pop(f"{prefix}feed_forward.{name}.weight"), (2 * F * (layer + 1)) ** -0.5
            )
    for name, x in parameters.items():  # what is left
        assert re.search(r"norm\.(weight|bias)$|feed_forward\.\w+\.bias$", name)
        assert (x == (1 if name.endswith("weight") else 0)).all(), name


def test_experts_as_open_lm():
    parameters = fill(SPARSE)
    for name in ("router.layer.weight", "experts.mlp.w1", "experts.mlp.v1", "experts.mlp.w2"):
        x = parameters[f"layers.2.feed_forward.{name}"]
        assert x.std().item() == pytest.approx(0.02, rel=5 / (2 * x.numel()) ** 0.5)
    assert parameters["layers.0.feed_forward.experts.mlp.w1"].abs().max() > 0.07  # not truncated at .06
    assert (parameters["layers.0.feed_forward.experts.bias"] == 0).all()


def test_scaled_experts():
    parameters = fill(replace(SPARSE, moe=replace(SPARSE.moe, init="scaled")))
    for layer in (0, 2):
        prefix = f"layers.{layer}.feed_forward.experts.mlp."
        check_truncated(parameters[prefix + "w1"], D**-0.5)
        check_truncated(parameters[prefix + "v1"], D**-0.5)
        check_truncated(parameters[prefix + "w2"], (2 * 192 * (layer + 1)) ** -0.5)


LATENT = {
    "kv_lora_rank": 96,
    "qk_nope_head_dim": 48,
    "qk_rope_head_dim": 32,
    "v_head_dim": 40,
    "q_lora_rank": 64,
}


def test_latent_attention_and_learned_positions():
    config = replace(
        DENSE, qk_norm=False, seq_len=64, positional_embedding_type="learned", attn_bias=True, **LATENT
    )
    parameters = fill(config)
    check_truncated(parameters["pos_embeddings.weight"], D**-0.5)
    here = "layers.2.attention."
    for name, fan_in in (("q_a_proj", D), ("q_b_proj", 64), ("kv_a_proj", D), ("kv_b_proj", 96)):
        check_truncated(parameters[f"{here}{name}.weight"], fan_in**-0.5)
    check_truncated(parameters[here + "out_proj.weight"], (2 * D * 3) ** -0.5)
    assert (parameters[here + "kv_a_norm.weight"] == 1).all()
    assert (parameters[here + "kv_a_proj.bias"] == 0).all()
    check_truncated(fill(replace(config, q_lora_rank=None))[here + "q_proj.weight"], D**-0.5)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(
    "config", [DENSE, SPARSE, replace(DENSE, qk_norm=False, **LATENT)], ids=["dense", "moe", "latent"]
)
def test_one_std_for_all(config, scaled):
    """Routers, experts and embeddings too; outputs less by sqrt(2 * 3 layers) where it is asked for."""
    config = replace(config, init_std=0.1, init_scaled_outputs=scaled, attn_bias=True, ffn_bias=True)
    outputs = 0
    for name, x in fill(config).items():
        if x.ndim == 1:
            assert (x == (0 if name.endswith("bias") else 1)).all(), name
            continue
        is_output = name.endswith(("out_proj.weight", "w3.weight", "mlp.w2"))
        outputs += is_output
        std = 0.1 / 6**0.5 if scaled and is_output else 0.1
        assert x.std().item() == pytest.approx(std, rel=5 / (2 * x.numel()) ** 0.5), name
        if x.numel() > 10_000:
            assert x.abs().max() > 3.2 * std, name  # not truncated
    assert outputs == 6


def test_one_std_for_what_is_mixed_in():
    moe = replace(SPARSE.moe, residual=True, shared_hidden_dim=320)
    parameters = fill(replace(SPARSE, moe=moe, init_std=0.1, init_scaled_outputs=True))
    for name in ("shared.w1", "shared.v1", "shared.w2", "mlp.w2", "coefficient"):
        x = parameters[f"layers.2.feed_forward.mixing.{name}.weight"]
        std = 0.1 / 6**0.5 if name.endswith("w2") else 0.1
        assert x.std().item() == pytest.approx(std, rel=5 / (2 * x.numel()) ** 0.5), name


@pytest.mark.parametrize("init", ["open_lm", "scaled"])
def test_all_that_a_layer_may_have(init):
    moe = replace(
        SPARSE.moe, init=init, expert_bias=True, residual=True, shared_hidden_dim=320, shared_mix="gate",
        dense_before=True, dense_after=True, balance=("bias",),
    )  # fmt: skip
    model = build(replace(SPARSE, moe=moe))
    model.to_empty(device="cpu")
    with torch.no_grad():
        for buffer in model.buffers():
            buffer.fill_(9)  # what memory may hold
    initialize_(model, replace(SPARSE, moe=moe), 0)
    assert [(len(b), b.abs().max().item()) for b in model.buffers()] == [(4, 0), (4, 0)]
    layer = model.layers[2].feed_forward
    for name, hidden in (("shared", 320), ("mlp", 192)):
        mlp = getattr(layer.mixing, name)
        weights = {"w1": mlp.w1.weight, "v1": mlp.v1.weight, "w2": mlp.w2.weight}
        assert weights["w2"].shape == (D, hidden)
        for part, x in weights.items():
            if init == "open_lm":
                assert x.std().item() == pytest.approx(0.02, rel=5 / (2 * x.numel()) ** 0.5)
            else:
                check_truncated(x, (2 * hidden * 3) ** -0.5 if part == "w2" else D**-0.5)
    for x in (layer.mixing.gate.weight, layer.mixing.coefficient.weight):
        assert x.std().item() == pytest.approx(0.02, rel=5 / (2 * x.numel()) ** 0.5)
    for dense in (model.layers[2].dense_before, model.layers[2].dense_after):
        check_truncated(dense.feed_forward.w12.weight, D**-0.5)
        check_truncated(dense.feed_forward.w3.weight, (2 * F * 3) ** -0.5)
        assert (dense.ffn_norm.weight == 1).all()
    experts = layer.experts.mlp
    for bias in (experts.b1, experts.c1, experts.b2, layer.mixing.coefficient.bias, layer.mixing.mlp.w1.bias):
        assert (bias == 0).all()


@pytest.mark.parametrize("weight_tying", [False, True])
def test_same_numbers_in_any_order_of_materialisation(weight_tying):
    config = replace(SPARSE, weight_tying=weight_tying)
    whole = build(config, "cpu", seed=7).state_dict()
    model = build(config)
    for name, child in reversed(list(model.named_children())):
        parts = [(f"{name}.", child)]
        if name == "layers":
            parts = [(f"layers.{i}.", block) for i, block in reversed(list(child.named_children()))]
        for prefix, module in parts:
            module.to_empty(device="cpu")
            initialize_(module, config, 7, prefix)
    pieces = model.state_dict()
    assert pieces.keys() == whole.keys()
    assert all(torch.equal(pieces[name], whole[name]) for name in whole)


def test_every_parameter_and_seed_has_a_stream_of_its_own():
    a, b = fill(DENSE, seed=0), fill(DENSE, seed=1)
    drawn = [x.flatten()[:8] for p in (a, b) for n, x in p.items() if "norm" not in n]
    assert len({tuple(x.tolist()) for x in drawn}) == len(drawn)
    again = fill(DENSE, seed=0)
    assert all(torch.equal(a[name], again[name]) for name in a)


def test_bf16_is_the_rounded_fp32():
    model = build(DENSE).bfloat16().to_empty(device="cpu")
    initialize_(model, DENSE, 0)
    for name, x in fill(DENSE).items():
        assert torch.equal(model.get_parameter(name), x.bfloat16())


def test_errors():
    with pytest.raises(ValueError, match="to_empty"):
        initialize_(build(DENSE), DENSE, 0)
    with pytest.raises(ValueError, match=r"no rule to initialise layers\.0\.mystery"):
        initialize_(nn.ParameterDict({"mystery": torch.zeros(2)}), DENSE, 0, "layers.0.")


def test_tying_survives_to_empty():
    model = build(replace(DENSE, weight_tying=True)).to_empty(device="cpu")
    assert isinstance(model, Transformer)
    assert model.tok_embeddings.weight is model.output.weight
    assert model.double().tok_embeddings.weight is model.output.weight
