"""The whole model: open_lm's names, transformers' Llama and Mixtral as references, recomputation, dtypes."""

import typing
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from open_lm import loss
from open_lm.config import ModelConfig, ModelFlags, MoEConfig
from open_lm.config.model import FFNName, NormName, PositionName
from open_lm.config.resolve import resolve_model
from open_lm.generate import generate
from open_lm.model import Transformer, build, count_parameters
from open_lm.nn.attention import LayerCache

DENSE = ModelConfig(dim=48, n_layers=3, n_heads=2, seq_len=32, vocab_size=67, model_norm="rms_norm")
SPARSE = replace(DENSE, moe=MoEConfig(freq=2, num_experts=4, capacity_factor=0.0))
LATENT = replace(
    DENSE, kv_lora_rank=16, q_lora_rank=12, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=10,
    rope_scaling="yarn", rope_scaling_factor=4.0, rope_original_seq_len=8, rope_yarn_mscale_all_dim=1.0,
    dropout=0.1, attn_dropout=0.1,
)  # fmt: skip
TOKENS = torch.arange(2 * 32).view(2, 32) * 37 % 67


# --- open_lm's checkpoints -------------------------------------------------------------------------------


def test_tiny_loads_open_lm_names():
    """A dense and an MoE checkpoint of open_lm_test_tiny: d 16, 2 layers, vocabulary 16, MoE on layer 0."""
    block = {
        "attention.in_proj.weight": (48, 16),
        "attention.out_proj.weight": (16, 16),
        "attention_norm.weight": (16,),
        "ffn_norm.weight": (16,),
    }
    dense_ffn = {"feed_forward.w12.weight": (512, 16), "feed_forward.w3.weight": (16, 256)}
    sparse_ffn = {
        "feed_forward.router.layer.weight": (8, 16),
        "feed_forward.experts.mlp.w1": (8, 16, 64),
        "feed_forward.experts.mlp.w2": (8, 64, 16),
        "feed_forward.experts.bias": (16,),
    }
    ends = {"tok_embeddings.weight": (16, 16), "norm.weight": (16,), "output.weight": (16, 16)}
    flags = ModelFlags(model="open_lm_test_tiny", model_norm="gain_only_layer_norm")
    for moe, first in (
        (MoEConfig(), dense_ffn),
        (MoEConfig(freq=2, num_experts=8), sparse_ffn),
    ):
        shapes = ends | {f"layers.0.{n}": s for n, s in (block | first).items()}
        shapes |= {f"layers.1.{n}": s for n, s in (block | dense_ffn).items()}
        state = {name: torch.randn(shape) for name, shape in shapes.items()}
        model = build(resolve_model(flags, moe, given=())).to_empty(device="cpu")
        model.load_state_dict(state, strict=True)
        assert model(TOKENS[:, :16] % 16).logits_BSV.shape == (2, 16, 16)


# --- references that others wrote ------------------------------------------------------------------------


def llama_like(model: Transformer, family: str):
    """transformers' model of the same function, with the same weights under its own names."""
    import transformers

    config, moe = model.config, model.config.moe
    sizes = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "intermediate_size": moe.hidden_dim or 256,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_heads,
        "rms_norm_eps": config.norm_eps,
        "max_position_embeddings": config.seq_len,
        "bos_token_id": None,
        "eos_token_id": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},  # Mixtral's own default is 1e6
    }
    if family == "mixtral":
        hf = transformers.MixtralConfig(num_local_experts=moe.num_experts, num_experts_per_tok=2, **sizes)
        reference = transformers.MixtralForCausalLM(hf)
    else:
        reference = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    ours = model.state_dict()
    state = {
        "model.embed_tokens.weight": ours["tok_embeddings.weight"],
        "model.norm.weight": ours["norm.weight"],
        "lm_head.weight": ours["output.weight"],
    }
    for i in range(config.n_layers):
        here, there = f"layers.{i}.", f"model.layers.{i}."
        for name, part in zip("qkv", ours[here + "attention.in_proj.weight"].chunk(3), strict=True):
            state[f"{there}self_attn.{name}_proj.weight"] = part
        state[there + "self_attn.o_proj.weight"] = ours[here + "attention.out_proj.weight"]
        state[there + "input_layernorm.weight"] = ours[here + "attention_norm.weight"]
        state[there + "post_attention_layernorm.weight"] = ours[here + "ffn_norm.weight"]
        ffn = here + "feed_forward."
        if family == "mixtral":
            w1, v1 = ours[ffn + "experts.mlp.w1"], ours[ffn + "experts.mlp.v1"]
            state[there + "mlp.gate.weight"] = ours[ffn + "router.layer.weight"]
            state[there + "mlp.experts.gate_up_proj"] = torch.cat((w1, v1), -1).mT
            state[there + "mlp.experts.down_proj"] = ours[ffn + "experts.mlp.w2"].mT
        else:
            gate, up = ours[ffn + "w12.weight"].chunk(2)
            state[there + "mlp.gate_proj.weight"] = gate
            state[there + "mlp.up_proj.weight"] = up
            state[there + "mlp.down_proj.weight"] = ours[ffn + "w3.weight"]
    reference.load_state_dict(state, strict=True)
    return reference.eval()


def randomize_(model: Transformer) -> Transformer:
    """Gains that are not 1, and experts and routers large enough to matter."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        elif "experts.mlp" in name or "router" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def gradients(model: torch.nn.Module, logits: Tensor) -> dict[str, Tensor]:
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), TOKENS.roll(-1, 1).flatten())
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("llama", DENSE),
        (
            "mixtral",
            replace(
                DENSE,
                moe=MoEConfig(
                    freq=1,
                    num_experts=5,
                    ffn_type="swiglu",
                    hidden_dim=80,
                    normalize_weights=True,
                    capacity_factor=0,
                ),
            ),
        ),
    ],
)
def test_agrees_with_transformers(family, config):
    """Logits, gradients and greedy text of LlamaForCausalLM and MixtralForCausalLM with our weights."""
    model = randomize_(build(config, "cpu"))
    reference = llama_like(model, family)
    logits, expected = model(TOKENS).logits_BSV, reference(TOKENS).logits
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)

    ours, theirs = gradients(model, logits), gradients(reference, expected)
    torch.testing.assert_close(
        ours["tok_embeddings.weight"], theirs["model.embed_tokens.weight"], atol=1e-6, rtol=1e-4
    )
    q_proj = theirs["model.layers.0.self_attn.q_proj.weight"]
    torch.testing.assert_close(
        ours["layers.0.attention.in_proj.weight"][: len(q_proj)], q_proj, atol=1e-6, rtol=1e-4
    )
    text = generate(model, TOKENS[:, :5], 10)
    greedy = reference.generate(
        TOKENS[:, :5],
        attention_mask=torch.ones(2, 5, dtype=torch.long),
        max_new_tokens=10,
        do_sample=False,
        pad_token_id=0,
    )
    assert text.tolist() == greedy.tolist()


# --- options ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("moe", [MoEConfig(), SPARSE.moe, replace(SPARSE.moe, capacity_factor=1.0)])
@pytest.mark.parametrize("tied", [False, True])
def test_grad_checkpointing_changes_nothing(moe, tied):
    model = randomize_(build(replace(DENSE, moe=moe, weight_tying=tied), "cpu"))
    results = []
    for model.grad_checkpointing in (False, True):
        model.zero_grad()
        logits, stats, _ = model(TOKENS)
        aux = sum((s.balance_loss + s.z_loss for s in stats), torch.zeros(()))
        (logits.square().mean() + aux).backward()
        grads = {name: p.grad for name, p in model.named_parameters()}
        results.append((logits, grads, [tuple(s) for s in stats]))
        assert len(stats) == (2 if moe.freq else 0)
    torch.testing.assert_close(*results, atol=0, rtol=0)


@pytest.mark.parametrize("tied", [False, True])
def test_loss_in_the_model_equals_that_of_its_logits(tied, monkeypatch):
    """Value and every parameter's gradient, tied embeddings and ignored targets included."""
    monkeypatch.setitem(loss.CHUNK_LOGITS, "cpu", 10 * 67)
    config = replace(SPARSE, weight_tying=tied)
    targets = TOKENS.roll(-1, 1)
    targets[0, 3:9] = -100
    model, reference = randomize_(build(config, "cpu")), randomize_(build(config, "cpu"))
    logits, _, nothing = reference(TOKENS)
    assert nothing is None
    expected = loss.cross_entropy(logits, targets)
    (expected.nll_sum + 0.01 * expected.z_sum).backward()
    output = model(TOKENS, targets, z_loss_coefficient=0.01)
    assert output.logits_BSV is None
    output.loss.objective_sum.backward()
    torch.testing.assert_close(output.loss.objective_sum, expected.nll_sum + 0.01 * expected.z_sum)
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-5, rtol=1e-4)


def test_grad_checkpointing_recomputes():
    model = build(DENSE, "cpu")
    calls = []
    model.layers[1].register_forward_pre_hook(lambda *_: calls.append(1))
    model.grad_checkpointing = True
    model(TOKENS).logits_BSV.sum().backward()
    with torch.no_grad():
        model(TOKENS)
    assert len(calls) == 3


OPTIONS = [
    *({"model_norm": name} for name in typing.get_args(NormName)),
    *({"model_norm": name, "qk_norm": True} for name in typing.get_args(NormName)),
    *({"ffn_type": name} for name in typing.get_args(FFNName)),
    *({"positional_embedding_type": name} for name in typing.get_args(PositionName)),
    {"post_embed_norm": True},
    {"dim": 488, "n_heads": 12, "n_layers": 1},
    *({"model_norm": name, "qk_norm_per_head": True, "n_kv_heads": 1} for name in typing.get_args(NormName)),
    {"explicit_head_dim": 40, "attn_bias": True, "ffn_bias": True, "rope_theta": 1e6},
    pytest.param(
        {
            "kv_lora_rank": 16,
            "q_lora_rank": 12,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 4,
            "v_head_dim": 10,
            "model_norm": "rms_norm",
        },
        id="latent",
    ),
    pytest.param(
        {
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 4,
            "v_head_dim": 10,
            "model_norm": "lp_layer_norm",
        },
        id="latent, layer norm",
    ),
    pytest.param({"moe": SPARSE.moe}, id="moe"),
    pytest.param({"moe": replace(SPARSE.moe, ffn_type="swiglu", backend="reference")}, id="moe swiglu"),
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_option_in_every_dtype(options):
    """fp32 against bf16 and fp16 weights, and autocast: close, forward and backward."""
    model = build(replace(DENSE, **options), "cpu")
    expected = model(TOKENS).logits_BSV
    for dtype, tolerance in ((torch.bfloat16, 0.12), (torch.float16, 0.02)):
        with torch.autocast("cpu", dtype):
            logits = model(TOKENS).logits_BSV
        torch.testing.assert_close(logits.float(), expected, atol=tolerance, rtol=tolerance)
        half = build(replace(DENSE, **options), "cpu").to(dtype)
        logits, stats, _ = half(TOKENS)
        assert logits.dtype == dtype
        torch.testing.assert_close(logits.float(), expected, atol=tolerance, rtol=tolerance)
        (logits.float().square().mean() + sum(s.balance_loss for s in stats)).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in half.parameters())


@pytest.mark.parametrize("config", [DENSE, SPARSE], ids=["dense", "moe"])
def test_no_token_sees_the_future(config):
    model = randomize_(build(config, "cpu"))
    changed = TOKENS.clone()
    changed[:, 20] = (changed[:, 20] + 1) % 67
    before, after = model(TOKENS).logits_BSV, model(changed).logits_BSV
    torch.testing.assert_close(before[:, :20], after[:, :20], atol=1e-6, rtol=1e-6)
    assert (before[:, 20] - after[:, 20]).abs().max() > 1e-2


@pytest.mark.parametrize("config", [DENSE, SPARSE, replace(SPARSE, qk_norm=True)])
def test_caches_continue_a_text(config):
    model = randomize_(build(config, "cpu"))
    caches = [LayerCache() for _ in range(config.n_layers)]
    parts = [model(part, caches=caches).logits_BSV for part in TOKENS.split((7, 1, 1, 23), 1)]
    torch.testing.assert_close(torch.cat(parts, 1), model(TOKENS).logits_BSV, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "config", [DENSE, LATENT, replace(SPARSE, moe=replace(SPARSE.moe, capacity_factor=1.25))]
)
def test_nothing_waits_for_the_device(config):
    """Under fake tensors any .item(), nonzero or data-dependent branch raises, forward and backward."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)  # torch's shape rule for grouped_mm knows bf16 only
    try:
        with FakeTensorMode():
            model = Transformer(config)
            tokens = torch.zeros(2, 32, dtype=torch.long)
            logits, stats, _ = model(tokens)
            (logits.float().mean() + sum(s.balance_loss + s.z_loss for s in stats)).backward()
            model(tokens, tokens).loss.objective_sum.backward()
    finally:
        torch.set_default_dtype(before)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch's own, while it traces
@pytest.mark.parametrize(
    "config",
    [DENSE, SPARSE, replace(LATENT, dropout=0.0, attn_dropout=0.0), replace(DENSE, n_kv_heads=1)],
    ids=["dense", "moe", "latent", "gqa"],
)
def test_compiled_blocks(config):
    """Tracing and autograd by torch.compile; code generation left out, as it takes minutes here."""
    if config is SPARSE:  # fp32 grouped_mm cannot be traced (bf16 only), the reference loops over experts
        config = replace(config, moe=replace(config.moe, backend="reference"))
    model, compiled = (randomize_(build(config, "cpu")) for _ in range(2))
    for block in compiled.layers:
        block.compile(backend="aot_eager")
    expected, logits = model(TOKENS), compiled(TOKENS)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    ours, theirs = gradients(compiled, logits.logits_BSV), gradients(model, expected.logits_BSV)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)


def test_count_parameters():
    """41m with 8 experts, by hand: active is total less 6 of 8 experts in 6 layers; tied counts once."""
    flags = ModelFlags(model="open_lm_41m", model_norm="gain_only_layer_norm")
    config = resolve_model(flags, MoEConfig(freq=2, num_experts=8), given=())
    assert count_parameters(config) == (68_884_704, 68_884_704 - 6 * 6 * 2 * 288 * 1152)
    tied = count_parameters(replace(config, weight_tying=True))
    assert tied.total == 68_884_704 - 50432 * 288
    dense = count_parameters(resolve_model(flags, MoEConfig(), given=()))
    assert dense.total == dense.active
    assert dense.total == sum(p.numel() for p in build(replace(config, moe=MoEConfig()), "cpu").parameters())
