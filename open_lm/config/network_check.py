"""Contradictions within a network's widths, positions, dropout and initialisation."""

import math
from collections.abc import Mapping

from open_lm.config.model import ModelConfig, ModelFlags

# Sizes that a model's JSON may leave out, by their keys
SIZES = {
    "n_kv_heads": "n_kv_heads",
    "head_dim": "explicit_head_dim",
    "ffn_hidden_dim": "ffn_hidden_dim",
    "kv_lora_rank": "kv_lora_rank",
    "q_lora_rank": "q_lora_rank",
    "qk_nope_head_dim": "qk_nope_head_dim",
    "qk_rope_head_dim": "qk_rope_head_dim",
    "v_head_dim": "v_head_dim",
}
OF_LATENT = ("q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
NOT_OF_LATENT = ("n_kv_heads", "head_dim", "qk_norm", "qk_norm_per_head")
# Flags of --rope-scaling, and the scalings that read them
OF_SCALING = {
    "rope_scaling_factor": ("linear", "llama3", "yarn"),
    "rope_original_seq_len": ("llama3", "yarn"),
    "rope_llama3_low_freq": ("llama3",),
    "rope_llama3_high_freq": ("llama3",),
    "rope_yarn_beta_fast": ("yarn",),
    "rope_yarn_beta_slow": ("yarn",),
    "rope_yarn_mscale": ("yarn",),
    "rope_yarn_mscale_all_dim": ("yarn",),
}
ROTATES_BY_POSITION = ("rotary", "llama_rotary")
DROPS_WEIGHTS = ("auto", "torch_attn")


def check_network(config: ModelConfig) -> None:
    """Raises ValueError where they contradict each other, naming both values."""
    sizes = {key: getattr(config, name) for key, name in SIZES.items()}
    for key, value in sizes.items():
        if value is not None and not is_count(value):
            raise ValueError(f"the model's {key} is {value!r}: expected a positive integer")
    _check_heads(config, sizes)
    _check_rope(config)
    for name in ("dropout", "attn_dropout"):
        value = getattr(config, name)
        if not (is_number(value) and 0 <= value < 1):
            raise ValueError(f"{_flag(name)} {value!r}: expected a probability, 0 or more and less than 1")
    if config.attn_dropout and config.attn_name not in DROPS_WEIGHTS:
        raise ValueError(
            f"--attn-dropout {config.attn_dropout}, but --attn-name {config.attn_name} cannot drop attention "
            "weights: use --attn-name torch_attn, or --attn-dropout 0"
        )
    _check_init(config)
    _check_documents(config)


def _check_documents(config: ModelConfig) -> None:
    end = config.end_of_text
    if end is not None and not -config.vocab_size <= end < config.vocab_size:
        raise ValueError(
            f"--end-of-text {end}: the model's vocabulary has the ids 0 … {config.vocab_size - 1} (-1 … "
            f"-{config.vocab_size} count from its end)"
        )
    if not config.document_attention:
        return
    if end is None:
        raise ValueError("--document-attention needs --end-of-text ID: which token ends a document")
    if config.attn_name not in DROPS_WEIGHTS:
        raise ValueError(
            f"--document-attention, but --attn-name {config.attn_name} cannot keep documents apart: use "
            "--attn-name torch_attn"
        )


def _check_heads(config: ModelConfig, sizes: Mapping[str, int | None]) -> None:
    if config.n_heads % config.kv_heads:
        raise ValueError(
            f"the model's n_heads {config.n_heads} is not a multiple of its n_kv_heads {config.kv_heads}: each "
            "head of keys and values serves equally many queries"
        )
    if config.qk_norm and config.qk_norm_per_head:
        raise ValueError("--qk-norm (all heads together) and --qk-norm-per-head are both given: use one")
    if config.kv_lora_rank is None:
        if stray := [key for key in OF_LATENT if sizes[key] is not None]:
            raise ValueError(
                f"the model's {stray[0]} is {sizes[stray[0]]}, but latent attention begins with kv_lora_rank, "
                "which is not given: add it, or drop the key"
            )
    else:
        if missing := [key for key in OF_LATENT[1:] if sizes[key] is None]:
            raise ValueError(
                f"the model's kv_lora_rank {config.kv_lora_rank} is latent attention: it lacks {', '.join(missing)}"
            )
        for key in NOT_OF_LATENT:
            if value := sizes[key] if key in sizes else getattr(config, key):
                raise ValueError(
                    f"{key} {value}, but the model has latent attention (kv_lora_rank {config.kv_lora_rank}), "
                    "whose heads have widths and norms of their own: drop one"
                )
    position = config.positional_embedding_type
    if position == "head_rotary" and (config.kv_lora_rank or config.kv_heads != config.n_heads):
        raise ValueError(
            f"--positional-embedding-type head_rotary turns query head h and key head h alike, but the model has "
            f"n_heads {config.n_heads}, n_kv_heads {config.kv_heads}, kv_lora_rank "
            f"{config.kv_lora_rank}: use rotary"
        )
    if config.rotary_dim % 2 and position not in ("none", "learned"):
        key = "head width" if config.kv_lora_rank is None else "qk_rope_head_dim"
        raise ValueError(
            f"{key} {config.rotary_dim} (hidden_dim {config.dim}, n_heads {config.n_heads}) is odd: "
            f"--positional-embedding-type {position} rotates pairs"
        )


def _check_rope(config: ModelConfig) -> None:
    position, scaling = config.positional_embedding_type, config.rope_scaling
    if not (is_number(config.rope_theta) and config.rope_theta > 1):
        raise ValueError(f"--rope-theta {config.rope_theta!r}: expected a number above 1")
    if config.rope_theta != ModelFlags.rope_theta and position in ("learned", "none"):
        raise ValueError(
            f"--rope-theta {config.rope_theta}, but --positional-embedding-type {position} rotates nothing: "
            "drop one"
        )
    known = {name for names in OF_SCALING.values() for name in names}
    if scaling != "none" and scaling not in known:
        raise ValueError(f"--rope-scaling {scaling!r}: expected none, {', '.join(sorted(known))}")
    if scaling != "none" and position not in ROTATES_BY_POSITION:
        raise ValueError(
            f"--rope-scaling {scaling}, but --positional-embedding-type {position} does not rotate by position: "
            f"use {' or '.join(ROTATES_BY_POSITION)}, or --rope-scaling none"
        )
    for name, scalings in OF_SCALING.items():
        value = getattr(config, name)
        if scaling not in scalings:
            if value != getattr(ModelFlags, name):
                raise ValueError(
                    f"{_flag(name)} {value} acts with --rope-scaling {' or '.join(scalings)} only, "
                    f"not with {scaling}"
                )
        elif value is None:
            raise ValueError(f"--rope-scaling {scaling} needs {_flag(name)}")
        elif not (is_number(value) and value >= 0 and (value > 0 or "mscale" in name)):
            raise ValueError(f"{_flag(name)} {value!r}: expected a positive number")
    if scaling in ("llama3", "yarn") and not is_count(config.rope_original_seq_len):
        raise ValueError(
            f"--rope-original-seq-len {config.rope_original_seq_len!r}: expected a positive integer"
        )
    if config.rope_scaling_factor is not None and config.rope_scaling_factor < 1:
        raise ValueError(f"--rope-scaling-factor {config.rope_scaling_factor}: expected 1 or more")
    for low, high in (("llama3_low_freq", "llama3_high_freq"), ("yarn_beta_slow", "yarn_beta_fast")):
        below, above = (getattr(config, f"rope_{name}") for name in (low, high))
        if below >= above:
            raise ValueError(
                f"{_flag('rope_' + low)} {below} >= {_flag('rope_' + high)} {above}: expected less"
            )
    if config.rope_yarn_mscale_all_dim and config.kv_lora_rank is None:
        raise ValueError(
            f"--rope-yarn-mscale-all-dim {config.rope_yarn_mscale_all_dim} is latent attention's, but the model "
            "has no kv_lora_rank: drop it, or use --rope-yarn-mscale"
        )


def _check_init(config: ModelConfig) -> None:
    if config.init_std is None:
        if config.init_scaled_outputs:
            raise ValueError("--init-scaled-outputs divides --init-std, which is not given: add it")
        return
    if not (is_number(config.init_std) and config.init_std > 0):
        raise ValueError(f"--init-std {config.init_std!r}: expected a number above 0")
    if config.moe.freq and config.moe.init != "open_lm":
        raise ValueError(
            f"--init-std {config.init_std} is that of the experts too, but --moe-init {config.moe.init} is "
            "another: drop one"
        )


def is_count(value: object) -> bool:
    """A positive integer, as a model's JSON may hold anything."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def is_number(value: object) -> bool:
    """A finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
