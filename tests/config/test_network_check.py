"""What a model's JSON and flags say of attention, positions, dropout and initialisation, and what is refused."""

import json
import shlex
from dataclasses import asdict

import pytest

from open_lm.config.model import ModelConfig
from open_lm.config.parse import parse
from open_lm.config.resolve import reconcile, resolve_model
from open_lm.model import build

SMALL = {"hidden_dim": 64, "n_layers": 2, "n_heads": 4, "seq_len": 32, "vocab_size": 100}
LATENT = {"kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 10}


def resolve(tmp_path, line: str = "", **entries) -> tuple[ModelConfig, frozenset[str]]:
    path = tmp_path / "model.json"
    path.write_text(json.dumps(SMALL | entries))
    run, given = parse(shlex.split(f"--model {path} {line}"))
    return resolve_model(run.model, run.moe, given), given


def test_defaults_follow_from_the_width(tmp_path) -> None:
    config, _ = resolve(tmp_path)
    assert (config.head_dim, config.kv_heads, config.qk_head_dim, config.value_head_dim) == (16, 4, 16, 16)
    assert (config.rope_theta, config.rope_scaling, config.dropout) == (1e4, "none", 0)


def test_keys_of_the_json(tmp_path) -> None:
    config, _ = resolve(
        tmp_path, n_kv_heads=2, head_dim=24, ffn_hidden_dim=72, rope_theta=1e6, attn_bias=True
    )
    assert (config.kv_heads, config.head_dim, config.rope_theta) == (2, 24, 1e6)
    shapes = {name: tuple(p.shape) for name, p in build(config).named_parameters()}
    assert shapes["layers.0.attention.in_proj.weight"] == ((4 + 2 + 2) * 24, 64)
    assert shapes["layers.0.attention.in_proj.bias"] == ((4 + 2 + 2) * 24,)
    assert shapes["layers.0.attention.out_proj.weight"] == (64, 4 * 24)
    assert shapes["layers.0.feed_forward.w12.weight"] == (2 * 72, 64)

    config, _ = resolve(tmp_path, **LATENT, q_lora_rank=12)
    assert (config.rotary_dim, config.qk_head_dim, config.value_head_dim) == (4, 12, 10)
    shapes = {
        name: tuple(p.shape) for name, p in build(config).named_parameters() if "layers.0.attention." in name
    }
    assert shapes == {
        "layers.0.attention.q_a_proj.weight": (12, 64),
        "layers.0.attention.q_a_norm.weight": (12,),
        "layers.0.attention.q_a_norm.bias": (12,),
        "layers.0.attention.q_b_proj.weight": (4 * 12, 12),
        "layers.0.attention.kv_a_proj.weight": (16 + 4, 64),
        "layers.0.attention.kv_a_norm.weight": (16,),
        "layers.0.attention.kv_a_norm.bias": (16,),
        "layers.0.attention.kv_b_proj.weight": (4 * (8 + 10), 16),
        "layers.0.attention.out_proj.weight": (64, 4 * 10),
    }


YARN = "--rope-scaling yarn --rope-scaling-factor 8 --rope-original-seq-len 64"


@pytest.mark.parametrize(
    ("entries", "line", "message"),
    [
        ({"n_kv_heads": 3}, "", "n_heads 4 is not a multiple of its n_kv_heads 3"),
        ({"n_kv_heads": "2"}, "", "n_kv_heads is '2': expected a positive integer"),
        ({"head_dim": 0}, "", "head_dim is 0: expected a positive integer"),
        ({"head_dim": 7}, "", "head width 7 .* is odd: --positional-embedding-type rotary"),
        ({"ffn_hidden_dim": True}, "", "ffn_hidden_dim is True"),
        ({"q_lora_rank": 8}, "", "q_lora_rank is 8, but latent attention begins with kv_lora_rank"),
        ({"kv_lora_rank": 8, "v_head_dim": 4}, "", "lacks qk_nope_head_dim, qk_rope_head_dim"),
        (LATENT | {"n_kv_heads": 2}, "", r"n_kv_heads 2, but the model has latent attention \(kv_lora_rank 16"),
        (LATENT | {"head_dim": 16}, "", "head_dim 16, but the model has latent"),
        (LATENT, "--qk-norm-per-head", "qk_norm_per_head True, but the model has latent"),
        (LATENT | {"qk_rope_head_dim": 5}, "", "qk_rope_head_dim 5 .* is odd"),
        (LATENT, "--positional-embedding-type head_rotary", "head_rotary .* kv_lora_rank 16"),
        ({"n_kv_heads": 2}, "--positional-embedding-type head_rotary", "head_rotary .* n_heads 4, n_kv_heads 2"),
        ({"rope_theta": 5e5}, "--rope-theta 1e4", "--rope-theta 10000.0, but --model .* says rope_theta 500000.0"),
        ({}, "--qk-norm --qk-norm-per-head", "use one"),
        ({}, "--rope-theta 1", "--rope-theta 1.0: expected a number above 1"),
        ({}, "--rope-theta 5e5 --positional-embedding-type learned", "learned rotates nothing"),
        ({"rope_scaling": "ntk"}, "", "--rope-scaling 'ntk': expected none, linear, llama3, yarn"),
        ({}, "--rope-scaling linear", "--rope-scaling linear needs --rope-scaling-factor"),
        ({}, "--rope-scaling yarn --rope-scaling-factor 2", "yarn needs --rope-original-seq-len"),
        ({}, "--rope-scaling-factor 2", "factor 2.0 acts with --rope-scaling linear or llama3 or yarn only"),
        ({}, "--rope-scaling linear --rope-scaling-factor 0.5", "--rope-scaling-factor 0.5: expected 1 or more"),
        ({}, YARN + " --rope-llama3-low-freq 2", "--rope-llama3-low-freq 2.0 .* llama3 only, not with yarn"),
        ({}, YARN + " --rope-yarn-beta-slow 40", "--rope-yarn-beta-slow 40.0 >= --rope-yarn-beta-fast 32.0"),
        ({}, YARN + " --rope-yarn-mscale-all-dim 1", "--rope-yarn-mscale-all-dim 1.0 is latent attention's"),
        ({}, YARN + " --positional-embedding-type none", "none does not rotate by position"),
        ({}, YARN.replace("64", "-64"), "--rope-original-seq-len -64: expected a positive number"),
        ({}, "--dropout 1", "--dropout 1.0: expected a probability"),
        ({"attn_dropout": -0.1}, "", "--attn-dropout -0.1: expected a probability"),
        ({}, "--attn-dropout 0.1 --attn-name xformers_attn", "--attn-name xformers_attn cannot drop"),
        ({}, "--init-scaled-outputs", "--init-std, which is not given"),
        ({}, "--init-std 0", "--init-std 0.0: expected a number above 0"),
        ({}, "--init-std 0.02 --moe-freq 2 --moe-num-experts 4 --moe-init scaled", "--moe-init scaled is another"),
    ],
)  # fmt: skip
def test_what_is_refused(tmp_path, entries, line, message) -> None:
    with pytest.raises(ValueError, match=message):
        resolve(tmp_path, line, **entries)


@pytest.mark.parametrize("line", [YARN + " --rope-yarn-mscale-all-dim 1", "--dropout 0.1 --init-std 0.006"])
def test_what_fits(tmp_path, line) -> None:
    resolve(tmp_path, line, **LATENT)


def test_older_checkpoints_have_the_defaults(tmp_path) -> None:
    """A field that a checkpoint does not know yet was at its default when it was trained."""
    saved = asdict(resolve(tmp_path)[0])
    for name in ("rope_theta", "n_kv_heads", "explicit_head_dim", "dropout"):
        del saved[name]
    config, given = resolve(tmp_path)
    assert reconcile(config, saved, given, "e.pt") == (config, [])
    config, given = resolve(tmp_path, "--rope-theta 5e5")
    with pytest.raises(ValueError, match=r"--rope-theta 500000\.0, but e\.pt was trained with 10000\.0"):
        reconcile(config, saved, given, "e.pt")
    config, given = resolve(tmp_path, "--dropout 0.1")  # decided anew in every run
    assert reconcile(config, saved, given, "e.pt")[0].dropout == 0.1
    config, given = resolve(tmp_path, n_kv_heads=2)
    with pytest.raises(ValueError, match=r"--model with n_kv_heads 2, but e\.pt was trained with None"):
        reconcile(config, saved, given, "e.pt")
