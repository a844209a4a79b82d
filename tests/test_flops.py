"""FLOPs per token against the literal sums of the models' shapes, and MFU and memory in a run's lines."""

from dataclasses import replace

import pytest
import torch

from open_lm import metrics
from open_lm.config import ModelConfig, ModelFlags, MoEConfig
from open_lm.config.resolve import resolve_model
from open_lm.flops import flops_per_token, peak_flops
from open_lm.model import count_parameters
from open_lm.moe.routers import ROUTERS

# MFLOP per token, dense and with 8 experts in every second layer, worked out apart from this code
MEGAFLOPS = {
    "41m": (201, 225),
    "87m": (448, 504),
    "160m": (855, 1025),
    "410m": (2462, 3047),
    "830m": (4995, 6354),
}


def config_of(model: str, moe: MoEConfig):
    return resolve_model(ModelFlags(model=f"open_lm_{model}", model_norm="gain_only_layer_norm"), moe, ())


@pytest.mark.parametrize("model", MEGAFLOPS)
def test_flops_per_token(model):
    dense, sparse = (config_of(model, moe) for moe in (MoEConfig(), MoEConfig(freq=2, num_experts=8)))
    assert (round(flops_per_token(dense) / 1e6), round(flops_per_token(sparse) / 1e6)) == MEGAFLOPS[model]


def test_by_hand():
    """41m: 12 layers of attention (4 d²) and SwiGLU (3 d 768), the head, and causal attention at half."""
    d, layers, seq_len, vocab = 288, 12, 2048, 50432
    products = layers * (4 * d * d + 3 * d * 768) + vocab * d
    assert flops_per_token(config_of("41m", MoEConfig())) == 6 * (products + layers * seq_len * d)


BASE = ModelConfig(dim=32, n_layers=3, n_heads=4, seq_len=20, vocab_size=50, ffn_hidden_dim=24)


def test_grouped_queries_by_hand():
    config = replace(BASE, n_kv_heads=2, explicit_head_dim=6, attn_bias=True, ffn_bias=True)
    products = 3 * (32 * (4 + 2 + 2) * 6 + 4 * 6 * 32 + 3 * 32 * 24) + 50 * 32
    assert flops_per_token(config) == 6 * (products + 3 * 20 * 4 * 6)


@pytest.mark.parametrize("q_lora_rank", [None, 7])
def test_latent_attention_by_hand(q_lora_rank):
    """Queries and keys of 8 + 4, values of 10: scores and their sums over values differ in cost."""
    config = replace(
        BASE, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=10, q_lora_rank=q_lora_rank
    )
    queries = 32 * 4 * 12 if q_lora_rank is None else 32 * 7 + 7 * 4 * 12
    products = 3 * (queries + 32 * (16 + 4) + 16 * 4 * (8 + 10) + 4 * 10 * 32 + 3 * 32 * 24) + 50 * 32
    scores = values = 3 * 20 // 2 * 2 * 4  # layers, half of the keys, a product and a sum, heads
    assert flops_per_token(config) == 6 * products + 3 * (scores * 12 + values * 10)


def test_learned_positions_are_looked_up():
    learned = replace(BASE, positional_embedding_type="learned")
    assert flops_per_token(learned) == flops_per_token(BASE)
    assert flops_per_token(replace(learned, weight_tying=True)) == flops_per_token(BASE)
    assert count_parameters(learned).total == count_parameters(BASE).total + 20 * 32


def parameters_by_hand(d, f, experts, used, *, bias=False):
    """(Of an MoE layer's gelu experts those that are used, all) with the router."""
    each = 2 * d * f + bias * (f + d)
    return d * experts + used * each, d * experts + experts * each


@pytest.mark.parametrize(
    ("moe", "used"),
    [
        (MoEConfig(freq=1, num_experts=(4, 8), top_k=2, hidden_dim=24), 2),
        (MoEConfig(freq=1, num_experts=(4, 8), top_k=2, hidden_dim=24, expert_bias=True), 2),
        (
            MoEConfig(
                freq=1, num_experts=(4, 8), router="expert_choice", capacity_factor=0.75, hidden_dim=24
            ),
            1.5,
        ),
        (MoEConfig(layers=(1,), num_experts=8, hidden_dim=24), 2),
        (MoEConfig(layer_pattern="[0]+[1]", num_experts=8, hidden_dim=24, shared_hidden_dim=10), 2),
        (MoEConfig(freq=1, first_dense=1, num_experts=8, hidden_dim=24, residual=True), 2),
        (MoEConfig(layers=(1,), num_experts=8, hidden_dim=24, dense_before=True, dense_after=True), 2),
    ],
    ids=[
        "pyramid",
        "biases",
        "expert_choice",
        "list",
        "pattern, shared",
        "first_dense, residual",
        "sparse block",
    ],
)
def test_counts_by_hand(monkeypatch, moe, used):
    monkeypatch.setitem(ROUTERS, moe.router, ROUTERS["top_k"])  # only its name counts here
    d, vocab, layers, length = 32, 64, 2, 16
    config = ModelConfig(
        dim=d, n_layers=layers, n_heads=2, seq_len=length, vocab_size=vocab, moe=moe,
        model_norm="gain_only_layer_norm",
    )  # fmt: skip
    dense = 3 * d * config.swiglu_hidden_dim
    sparse = 1 if moe.freq != 1 or moe.first_dense else 2
    sizes = moe.num_experts if isinstance(moe.num_experts, tuple) else (moe.num_experts,) * sparse
    experts = [parameters_by_hand(d, 24, e, used, bias=moe.expert_bias) for e in sizes]
    mixing = sparse * (2 * d * moe.shared_hidden_dim + moe.residual * (2 * d * 24 + 2 * d))
    blocks = sparse * dense * (moe.dense_before + moe.dense_after)
    products = layers * 4 * d * d + (layers - sparse) * dense + vocab * d + mixing + blocks
    gains = d * (2 * layers + 1 + sparse * (moe.dense_before + moe.dense_after))
    vectors = gains + sparse * (d + 2 * moe.residual)  # and the output biases, the coefficients'
    active, total = (sum(pair[i] for pair in experts) + products + vocab * d + vectors for i in (0, 1))
    assert count_parameters(config) == (total, active)
    of_experts = sum(pair[0] - moe.expert_bias * used * (24 + d) for pair in experts)
    assert flops_per_token(config) == pytest.approx(
        6 * (products + of_experts + layers * length * d), rel=1e-12
    )


def test_peaks_are_of_the_devices_name():
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("NVIDIA A100-SXM4-40GB") == 312e12
    assert peak_flops("a device of tomorrow") is None


def test_efficiency(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 * 2**30)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 4 * 2**30)
    entry = metrics.efficiency(1e6, 200e6, torch.device("cuda"))
    assert entry["train/mfu"] == pytest.approx(200e12 / 989e12)
    assert (entry["train/memory_gib"], entry["train/memory_reserved_gib"]) == (3, 4)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a device of tomorrow")
    assert "train/mfu" not in metrics.efficiency(1e6, 200e6, torch.device("cuda"))
    assert metrics.efficiency(1e6, 200e6, torch.device("cpu")) == {}
