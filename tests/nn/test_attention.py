"""Attention functions against loops over positions, and the module with its cache against itself without."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from open_lm.config import ModelConfig
from open_lm.nn.attention import (
    ACTIVATIONS,
    ATTENTIONS,
    SEQUENCE_SCALARS,
    Attention,
    LayerCache,
    custom_attn,
    kernel_of,
    make_attention,
    torch_attn,
    xformers_attn,
)
from open_lm.nn.documents import find_documents

CONFIG = ModelConfig(dim=26, n_layers=1, n_heads=3, seq_len=16, vocab_size=8)  # head width 8, attention 24
SOFTMAX = {
    "attn_name": "custom_attn",
    "attn_activation": "softmax",
    "attn_seq_scalar": "none",
    "attn_seq_scalar_alpha": 1.0,
}

SCALAR = {  # plain Python
    "relu": lambda x: max(x, 0),
    "relu_squared": lambda x: max(x, 0) ** 2,
    "softplus": lambda x: math.log1p(math.exp(x)),
    "identity": lambda x: x,
    "relu6": lambda x: min(max(x, 0), 6),
    "sigmoid": lambda x: 1 / (1 + math.exp(-x)),
}


def attend_by_loops(q_BSHK, k_BTHK, v_BTHK, causal, activation="softmax", scale=1.0):
    """Query s of S stands at position s + T - S and sees the positions up to its own, one after the other."""
    (B, S, H, K), T = q_BSHK.shape, k_BTHK.shape[1]
    out = torch.zeros(B, S, H, K, dtype=torch.float64)
    q, k, v = q_BSHK.double(), k_BTHK.double(), v_BTHK.double()
    for b in range(B):
        for h in range(H):
            for s in range(S):
                seen = range(s + T - S + 1 if causal else T)
                scores = [(q[b, s, h] @ k[b, t, h]).item() / math.sqrt(K) for t in seen]
                if activation == "softmax":
                    total = sum(math.exp(x) for x in scores)
                    weights = [math.exp(x) / total for x in scores]
                else:
                    weights = [SCALAR[activation](x) for x in scores]
                for t, weight in zip(seen, weights, strict=True):
                    out[b, s, h] += scale * weight * v[b, t, h]
    return out


def make_qkv(queries: int, keys: int, head_dim: int = 8):
    torch.manual_seed(queries * 100 + keys)
    q = torch.randn(2, queries, 3, head_dim) * 2  # some scores beyond relu6's 6
    k, v = torch.randn(2, 2, keys, 3, head_dim) * 2
    return q, k, v


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("queries", "keys"), [(5, 5), (1, 5), (3, 7), (1, 1)])
def test_softmax_attentions_agree_with_loops(queries, keys, causal):
    q, k, v = make_qkv(queries, keys)
    expected = attend_by_loops(q, k, v, causal)
    for attend in (torch_attn, custom_attn, ATTENTIONS["auto"]):
        torch.testing.assert_close(attend(q, k, v, causal=causal).double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("activation", SCALAR)
@pytest.mark.parametrize(("queries", "keys"), [(5, 5), (3, 7)])
def test_custom_activations_agree_with_loops(activation, queries, keys):
    """In particular no weight on the future, not even by `identity`."""
    q, k, v = make_qkv(queries, keys)
    out = custom_attn(q, k, v, causal=True, activation=activation, scale=0.25)
    expected = attend_by_loops(q, k, v, True, activation, 0.25)
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)


def test_every_activation_and_scalar_is_tested():
    assert set(ACTIVATIONS) == {*SCALAR, "softmax"}
    lengths = {"max": 16, "avg": 8.5, "none": 1}  # mean of 1..16 is 8.5
    assert {name: of(16) for name, of in SEQUENCE_SCALARS.items()} == lengths
    q, k, v = make_qkv(4, 4)
    for name, length in lengths.items():
        config = replace(CONFIG, **SOFTMAX | {"attn_seq_scalar": name, "attn_seq_scalar_alpha": 0.5})
        out = make_attention(config)(q, k, v, causal=True)
        torch.testing.assert_close(out, torch_attn(q, k, v, causal=True) / length**0.5)


def test_custom_attn_names_missing_flags():
    with pytest.raises(ValueError, match="--attn-seq-scalar-alpha"):
        make_attention(replace(CONFIG, **SOFTMAX | {"attn_seq_scalar_alpha": None}))


@pytest.mark.parametrize("head_dim", [24, 40])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("queries", "keys"), [(6, 6), (2, 6)])
def test_half_precision(dtype, head_dim, queries, keys):
    q, k, v = (x.to(dtype) for x in make_qkv(queries, keys, head_dim))
    expected = attend_by_loops(q, k, v, True)
    for attend in (torch_attn, custom_attn):
        out = attend(q, k, v, causal=True)
        assert out.dtype == dtype
        torch.testing.assert_close(out.double(), expected, atol=5e-2, rtol=2e-2)


def test_xformers_needs_a_gpu():
    with pytest.raises(ValueError, match="--attn-name torch_attn"):
        xformers_attn(*make_qkv(4, 4), causal=True)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # triton's, as xformers is imported
@pytest.mark.parametrize("name", ["xformers_attn", "xformers_attn_variable_length"])
@pytest.mark.parametrize(("queries", "keys"), [(8, 8), (1, 8), (3, 8)])
def test_xformers_agrees_with_torch(name, queries, keys):
    pytest.importorskip("xformers")
    q, k, v = (x.cuda() for x in make_qkv(queries, keys))
    try:
        out = ATTENTIONS[name](q, k, v, causal=True)
    except NotImplementedError as error:  # a wheel for another CUDA has no operators
        pytest.skip(str(error)[-200:])
    torch.testing.assert_close(out, torch_attn(q, k, v, causal=True), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("cuts", [(0, 1, 2, 3, 9), (0, 4, 9)])
@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("position", ["rotary", "llama_rotary", "head_rotary", "none"])
@pytest.mark.parametrize("activation", [None, "softmax", "relu"])
def test_cache(cuts, qk_norm, position, activation):
    """A text in one call, or cut into several that continue the cache."""
    custom = SOFTMAX | {"attn_activation": activation, "attn_seq_scalar": "max"} if activation else {}
    torch.manual_seed(0)
    config = replace(CONFIG, qk_norm=qk_norm, positional_embedding_type=position, **custom)
    attention = Attention(config)
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x_BSD = torch.randn(2, 9, CONFIG.dim)
    cache = LayerCache()
    parts = [attention(x_BSD[:, start:end], cache) for start, end in pairwise(cuts)]
    assert cache.length == 9
    torch.testing.assert_close(torch.cat(parts, 1), attention(x_BSD), atol=1e-5, rtol=1e-5)


def test_qk_norm_is_over_all_heads():
    """One norm over n_heads * head_dim, before the split: by hand, with torch's own pieces."""
    torch.manual_seed(0)
    attention = Attention(replace(CONFIG, qk_norm=True, positional_embedding_type="none"))
    torch.nn.init.normal_(attention.q_norm.weight)
    torch.nn.init.normal_(attention.k_norm.bias)
    x = torch.randn(2, 5, CONFIG.dim)
    q, k, v = (x @ attention.in_proj.weight.T).split(24, -1)
    q = torch.nn.functional.layer_norm(q, (24,)) * attention.q_norm.weight
    k = torch.nn.functional.layer_norm(k, (24,)) + attention.k_norm.bias
    o = attend_by_loops(*(t.view(2, 5, 3, 8) for t in (q, k, v)), True)
    expected = o.flatten(2).float() @ attention.out_proj.weight.T
    torch.testing.assert_close(attention(x), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "changes",
    [{}, {"n_kv_heads": 1}, {"attn_dropout": 0.1}, {"document_attention": True, "end_of_text": 0}],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_that_is_said_is_the_one_that_runs(changes, dtype):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = replace(CONFIG, dim=32, n_heads=2, seq_len=8, **changes)
    attention = Attention(config).to(device, dtype).train()
    documents = find_documents(torch.tensor([[1, 0, 2, 3, 4, 0, 5, 6]]), 0).to(device)
    x_BSD = torch.randn(1, 8, 32, device=device, dtype=dtype)
    with torch.profiler.profile() as profile:
        attention(x_BSD, documents=documents if config.document_attention else None)
    ran = {event.key for event in profile.key_averages()}
    kernel = kernel_of(config, device, dtype).partition(" ")[0]
    assert any(f"{kernel}_attention" in name or f"attention_{kernel}" in name for name in ran), (kernel, ran)


def test_other_attentions_are_said_by_their_names():
    config = replace(CONFIG, attn_name="custom_attn")
    assert kernel_of(config, torch.device("cpu"), torch.float32) == "custom_attn"
