"""Whole dense models of other families, with our weights under their names: logits, all gradients, greedy text."""

from dataclasses import replace

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.models.olmoe.modeling_olmoe import OlmoeAttention, OlmoeRotaryEmbedding

from open_lm.config import ModelConfig
from open_lm.config.resolve import check_model
from open_lm.generate import generate
from open_lm.model import Transformer, build
from open_lm.nn.attention import Attention

TOKENS = torch.arange(2 * 24).view(2, 24) * 37 % 61
SMALL = ModelConfig(
    dim=48,
    n_layers=2,
    n_heads=6,
    seq_len=32,
    vocab_size=61,
    model_norm="rms_norm",
    norm_eps=1e-6,
    ffn_hidden_dim=80,
)
GQA = replace(SMALL, n_kv_heads=2, rope_theta=5e5)
LATENT = replace(
    SMALL, n_heads=4, kv_lora_rank=20, qk_nope_head_dim=12, qk_rope_head_dim=8, v_head_dim=10,
    positional_embedding_type="llama_rotary",
)  # fmt: skip
LONGER = {"rope_scaling": "yarn", "rope_scaling_factor": 8.0, "rope_original_seq_len": 16}
GPT2 = replace(
    SMALL, model_norm="default_layer_norm", ffn_type="gelu_tanh", ffn_hidden_dim=None,
    positional_embedding_type="learned", attn_bias=True, ffn_bias=True, weight_tying=True, n_heads=3,
    dropout=0.1, attn_dropout=0.1,
)  # fmt: skip
# case → (family, our config, what its own config says otherwise)
FAMILIES = {
    "Llama GQA": ("Llama", GQA, {}),
    "Llama one key head, biases": (
        "Llama",
        replace(GQA, n_kv_heads=1, attn_bias=True, ffn_bias=True),
        {"attention_bias": True, "mlp_bias": True},
    ),
    "Llama linear": (
        "Llama",
        replace(GQA, rope_scaling="linear", rope_scaling_factor=4.0),
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0}},
    ),
    "Llama llama3": (
        "Llama",
        replace(
            GQA, rope_scaling="llama3", rope_scaling_factor=8.0, rope_original_seq_len=16, rope_theta=100.0
        ),
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "factor": 8.0,
                "original_max_position_embeddings": 16,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
            }
        },
    ),
    "Mistral head_dim": (
        "Mistral",
        replace(GQA, explicit_head_dim=14),
        {"head_dim": 14, "sliding_window": None},
    ),
    "Qwen3": (
        "Qwen3",
        replace(GQA, explicit_head_dim=16, qk_norm_per_head=True, rope_theta=1e6, weight_tying=True),
        {"head_dim": 16, "tie_word_embeddings": True},
    ),
    "DeepseekV3": ("DeepseekV3", replace(LATENT, q_lora_rank=14), {"q_lora_rank": 14}),
    "DeepseekV3 biases": (
        "DeepseekV3",
        replace(LATENT, q_lora_rank=14, attn_bias=True),
        {"q_lora_rank": 14, "attention_bias": True},
    ),
    "DeepseekV3 plain queries": ("DeepseekV3", LATENT, {"q_lora_rank": None}),
    "DeepseekV3 halves": (
        "DeepseekV3",
        replace(LATENT, positional_embedding_type="rotary"),
        {"q_lora_rank": None, "rope_interleave": False},
    ),
    "DeepseekV3 yarn": (
        "DeepseekV3",
        replace(LATENT, q_lora_rank=14, rope_yarn_mscale=0.7, rope_yarn_mscale_all_dim=1.3, **LONGER),
        {
            "q_lora_rank": 14,
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 8.0,
                "original_max_position_embeddings": 16,
                "mscale": 0.7,
                "mscale_all_dim": 1.3,
            },
        },
    ),
    "GPT2": ("GPT2", GPT2, {}),
}
LATENT_NAMES = {
    "q_proj": "q_proj",
    "q_a_proj": "q_a_proj",
    "q_a_norm": "q_a_layernorm",
    "q_b_proj": "q_b_proj",
    "kv_a_proj": "kv_a_proj_with_mqa",
    "kv_a_norm": "kv_a_layernorm",
    "kv_b_proj": "kv_b_proj",
    "out_proj": "o_proj",
}


def their_config(family: str, config: ModelConfig, options: dict):
    if family == "GPT2":
        return transformers.GPT2Config(
            n_embd=config.dim, n_layer=config.n_layers, n_head=config.n_heads, n_positions=config.seq_len,
            vocab_size=config.vocab_size, layer_norm_epsilon=config.norm_eps, bos_token_id=None, eos_token_id=None,
        )  # fmt: skip
    sizes = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "intermediate_size": config.ffn_hidden_dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.kv_heads,
        "rms_norm_eps": config.norm_eps,
        "max_position_embeddings": config.seq_len,
        "bos_token_id": None,
        "eos_token_id": None,
        "rope_parameters": {"rope_type": "default"},
    }
    if family == "DeepseekV3":
        sizes |= {
            "kv_lora_rank": config.kv_lora_rank,
            "qk_nope_head_dim": config.qk_nope_head_dim,
            "qk_rope_head_dim": config.qk_rope_head_dim,
            "v_head_dim": config.v_head_dim,
            "first_k_dense_replace": config.n_layers,
        }
    sizes |= options
    sizes["rope_parameters"] |= {"rope_theta": config.rope_theta}
    return getattr(transformers, f"{family}Config")(**sizes)


def as_llama(ours: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Our weights, or gradients, under the names that Llama's successors share."""
    theirs = {
        "model.embed_tokens.weight": ours["tok_embeddings.weight"],
        "model.norm.weight": ours["norm.weight"],
        "lm_head.weight": ours["tok_embeddings.weight" if config.weight_tying else "output.weight"],
    }
    widths = [heads * config.head_dim for heads in (config.n_heads, config.kv_heads, config.kv_heads)]
    for name, x in ours.items():
        if not name.startswith("layers."):
            continue
        _, layer, part, *inner, kind = name.split(".")
        there = f"model.layers.{layer}."
        if part == "attention_norm":
            theirs[f"{there}input_layernorm.weight"] = x
        elif part == "ffn_norm":
            theirs[f"{there}post_attention_layernorm.weight"] = x
        elif inner == ["in_proj"]:
            for letter, piece in zip("qkv", x.split(widths), strict=True):
                theirs[f"{there}self_attn.{letter}_proj.{kind}"] = piece
        elif inner == ["w12"]:
            for side, piece in zip(("gate", "up"), x.chunk(2), strict=True):
                theirs[f"{there}mlp.{side}_proj.{kind}"] = piece
        elif inner == ["w3"]:
            theirs[f"{there}mlp.down_proj.{kind}"] = x
        else:
            names = {"q_norm": "q_norm", "k_norm": "k_norm"} | LATENT_NAMES
            theirs[f"{there}self_attn.{names[inner[0]]}.{kind}"] = x
    return theirs


def as_gpt2(ours: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """GPT-2's matrices are transposed."""
    ends = {"tok_embeddings": "wte", "pos_embeddings": "wpe", "norm": "ln_f"}
    inside = {"attention_norm": "ln_1", "ffn_norm": "ln_2", "attention.in_proj": "attn.c_attn",
              "attention.out_proj": "attn.c_proj", "feed_forward.0": "mlp.c_fc",
              "feed_forward.2": "mlp.c_proj"}  # fmt: skip
    theirs = {"lm_head.weight": ours["tok_embeddings.weight"]}
    for name, x in ours.items():
        where, kind = name.rsplit(".", 1)
        if where in ends:
            theirs[f"transformer.{ends[where]}.{kind}"] = x
        elif where != "output":
            _, layer, rest = where.split(".", 2)
            theirs[f"transformer.h.{layer}.{inside[rest]}.{kind}"] = x.mT if x.ndim == 2 else x
    return theirs


def randomize_(model: nn.Module) -> nn.Module:
    """Gains that are not 1 and biases that are not 0."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def step(model: nn.Module, logits: Tensor) -> dict[str, Tensor]:
    """Gradients of the mean loss on the next token."""
    nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten()).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_gradients_and_text(name):
    family, config, options = FAMILIES[name]
    check_model(config)
    translate = as_gpt2 if family == "GPT2" else as_llama
    model = randomize_(build(config, "cpu", seed=2)).eval()
    assert isinstance(model, Transformer)
    kind = "GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM"
    reference = getattr(transformers, kind)(their_config(family, config, options)).eval()
    reference.load_state_dict(translate(model.state_dict(), config), strict=True)

    logits, expected = model(TOKENS).logits_BSV, reference(TOKENS).logits
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    ours, theirs = translate(step(model, logits), config), step(reference, expected)
    assert theirs.keys() <= ours.keys()
    assert len(theirs) >= len(ours) - 1  # a tied head has no gradient of its own
    torch.testing.assert_close({n: ours[n] for n in theirs}, theirs, atol=1e-5, rtol=1e-4)

    text = generate(model, TOKENS[:, :5], 12)
    greedy = reference.generate(
        TOKENS[:, :5], attention_mask=torch.ones(2, 5, dtype=torch.long), max_new_tokens=12, do_sample=False,
        pad_token_id=0,
    )  # fmt: skip
    assert text.tolist() == greedy.tolist()


def test_olmoe_attention():
    """--qk-norm with fewer key heads: one norm over each side's heads together."""
    config = replace(GQA, qk_norm=True)
    torch.manual_seed(0)
    ours = randomize_(Attention(config))
    their = transformers.OlmoeConfig(
        hidden_size=48, num_attention_heads=6, num_key_value_heads=2, rms_norm_eps=1e-6, num_hidden_layers=1,
        rope_parameters={"rope_type": "default", "rope_theta": 5e5},
    )  # fmt: skip
    theirs = OlmoeAttention(their, layer_idx=0).eval()
    theirs.config._attn_implementation = "sdpa"
    state = ours.state_dict()
    q, k, v = state["in_proj.weight"].split([48, 16, 16])
    theirs.load_state_dict(
        {
            "q_proj.weight": q,
            "k_proj.weight": k,
            "v_proj.weight": v,
            "o_proj.weight": state["out_proj.weight"],
        }
        | {name: state[name] for name in ("q_norm.weight", "k_norm.weight")}
    )
    x, y = (
        torch.randn(2, 9, 48, generator=torch.Generator().manual_seed(3)).requires_grad_() for _ in range(2)
    )
    table = OlmoeRotaryEmbedding(their)(y, torch.arange(9)[None])
    out, expected = ours(x), theirs(y, table, None)[0]
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    out.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours.k_norm.weight.grad, theirs.k_norm.weight.grad, atol=1e-4, rtol=1e-4)
