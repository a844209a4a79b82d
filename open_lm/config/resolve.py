"""Flags, a model's JSON and a checkpoint → `ModelConfig`. Contradictions are errors: none wins silently."""

import difflib
import json
from collections.abc import Collection, Mapping
from dataclasses import MISSING, asdict, fields, replace
from importlib import resources
from pathlib import Path
from typing import Any

from open_lm.config.model import ModelConfig, ModelFlags
from open_lm.config.moe import MoEConfig
from open_lm.config.moe_check import check_moe, without_idle
from open_lm.config.network_check import SIZES, check_network
from open_lm.config.parse import NO_FLAGS

# The architecture's size: only a model's JSON says it, no flag does.
SIZE_KEYS = {"hidden_dim": "dim", "n_layers": "n_layers", "n_heads": "n_heads", "seq_len": "seq_len",
             "vocab_size": "vocab_size", "post_embed_norm": "post_embed_norm", "weight_tying": "weight_tying",
             "norm_eps": "norm_eps", **SIZES}  # fmt: skip
REQUIRED_KEYS = ("hidden_dim", "n_layers", "n_heads", "seq_len", "vocab_size")
# Flags that shape the network and that a model's JSON may fix too.
MODEL_FLAGS = ("model_norm", "ffn_type", "ffn_bias", "attn_bias", "qk_norm", "qk_norm_per_head",
               "positional_embedding_type", "rope_theta", "rope_scaling", "rope_scaling_factor",
               "rope_original_seq_len", "rope_llama3_low_freq", "rope_llama3_high_freq", "rope_yarn_beta_fast",
               "rope_yarn_beta_slow", "rope_yarn_mscale", "rope_yarn_mscale_all_dim", "dropout", "attn_dropout",
               "init_std", "init_scaled_outputs", "attn_name", "attn_activation", "attn_seq_scalar",
               "attn_seq_scalar_alpha", "end_of_text", "document_attention")  # fmt: skip
# What may differ between training and evaluation without making it another model.
RUNTIME_FIELDS = {"attn_name", "end_of_text", "dropout", "attn_dropout", "init_std", "init_scaled_outputs",
                  *(f"moe_{name}" for name in (
    "backend", "balance", "bias_rate", "capacity_factor", "capacity_per", "capacity_rounding", "drop_policy",
    "eval_capacity_factor", "eval_threshold", "init", "jitter", "loss_weight", "min_capacity", "noise",
    "pad_to_capacity", "recompute", "z_loss_weight"))}  # fmt: skip
# Numbers that --moe-balance reads.
OF_BALANCE = ("moe_loss_weight", "moe_bias_rate")


def model_names() -> list[str]:
    """The models that --model knows by name."""
    folder = resources.files("open_lm") / "model_configs"
    return sorted(p.name.removesuffix(".json") for p in folder.iterdir() if p.name.endswith(".json"))


def read_model(model: str) -> dict[str, Any]:
    """The JSON of --model, a name or a path. Raises ValueError where there is none, or a key is wrong."""
    if model.endswith(".json"):
        source: Any = Path(model)
    elif model in model_names():
        source = resources.files("open_lm") / "model_configs" / f"{model}.json"
    else:
        nearest = difflib.get_close_matches(model, model_names(), n=1)
        hint = f" Did you mean {nearest[0]}?" if nearest else f" Known: {', '.join(model_names())}."
        raise ValueError(f"--model {model}: no such model, and not the path of a .json file.{hint}")
    try:
        entries = json.loads(source.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"--model {model}: {error}") from error
    if not isinstance(entries, dict):
        raise ValueError(f"--model {model}: expected a JSON object, found {type(entries).__name__}")
    known = [
        *SIZE_KEYS,
        *MODEL_FLAGS,
        *(f"moe_{f.name}" for f in fields(MoEConfig) if f.name not in NO_FLAGS),
    ]
    for key, value in entries.items():
        if isinstance(value, list):
            entries[key] = tuple(value)
        if key not in known:
            nearest = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else f". Known keys: {', '.join(known)}"
            raise ValueError(f"--model {model}: unknown key {key!r}{hint}")
    if missing := [key for key in REQUIRED_KEYS if key not in entries]:
        raise ValueError(f"--model {model}: missing {', '.join(missing)}")
    return entries


def resolve_model(
    flags: ModelFlags, moe: MoEConfig, given: Collection[str], complete: bool = True
) -> ModelConfig:
    """Raises ValueError where a given flag contradicts the model's JSON, naming both values.

    Not `complete`: a checkpoint may still say what the flags leave open (which layers are MoE), so that these are
    not checked against each other yet.
    """
    entries = read_model(flags.model)
    size = {SIZE_KEYS[key]: value for key, value in entries.items() if key in SIZE_KEYS}
    shape = {name: getattr(flags, name) for name in MODEL_FLAGS}
    experts = {field.name: getattr(moe, field.name) for field in fields(MoEConfig)}
    for key, value in entries.items():
        if key in SIZE_KEYS:
            continue
        part, name = (experts, key.removeprefix("moe_")) if key.startswith("moe_") else (shape, key)
        if key in given and part[name] != value:
            raise ValueError(
                f"{_flag(key)} {part[name]}, but --model {flags.model} says {key} {value}: drop the flag, "
                "or use another model file"
            )
        part[name] = value
    config = ModelConfig(**size, **shape, moe=MoEConfig(**experts))
    if complete:
        check_model(config, given)
    return config


def check_model(config: ModelConfig, given: Collection[str] = ()) -> None:
    """Raises ValueError where the network's own numbers contradict each other."""
    for name in ("dim", "n_layers", "n_heads", "seq_len", "vocab_size"):
        if not isinstance(getattr(config, name), int) or getattr(config, name) < 1:
            raise ValueError(f"the model's {name} is {getattr(config, name)!r}: expected a positive integer")
    if config.n_heads > config.dim:
        raise ValueError(f"the model's n_heads {config.n_heads} > hidden_dim {config.dim}")
    check_network(config)
    custom = (config.attn_activation, config.attn_seq_scalar, config.attn_seq_scalar_alpha)
    if config.attn_name == "custom_attn" and None in custom:
        raise ValueError(
            "--attn-name custom_attn needs --attn-activation, --attn-seq-scalar and --attn-seq-scalar-alpha"
        )
    if config.attn_name != "custom_attn" and custom != (None, None, None):
        raise ValueError(
            "--attn-activation, --attn-seq-scalar and --attn-seq-scalar-alpha need --attn-name custom_attn, "
            f"not {config.attn_name}"
        )
    check_moe(config.moe, given, config.n_layers)


def reconcile(
    config: ModelConfig, saved: Mapping[str, Any], given: Collection[str], path: str
) -> tuple[ModelConfig, list[str]]:
    """The model of a run that starts from the checkpoint at `path`, whose own configuration is `saved`.

    Where they differ: what was not given on the command line comes from the checkpoint; a given runtime flag
    (capacity, backend, …) wins; a given flag that would make it another model raises ValueError with both
    values. Returns the configuration and a line for each value taken from the checkpoint.
    """
    current, stored = flatten(config), flatten(saved)
    taken: dict[str, Any] = {}
    notes: list[str] = []
    sizes = dict.fromkeys(SIZE_KEYS.values(), "model")
    for name, here in current.items():
        there = stored.get(name, here)
        if here == there:
            continue
        flag = sizes.get(name, name)
        if name in OF_BALANCE and "moe_balance" in given:
            continue  # they belong to the checkpoint's balancing, which a given one replaces
        if flag not in given:
            taken[name] = there
            notes.append(f"{_flag(flag) if flag == name else name}: {there}, from {path} (not {here})")
        elif name not in RUNTIME_FIELDS:
            what = f"{_flag(name)} {here}" if flag == name else f"--model with {name} {here}"
            raise ValueError(f"{what}, but {path} was trained with {there}: drop the flag, or use its value")
    experts = {name.removeprefix("moe_"): v for name, v in taken.items() if name.startswith("moe_")}
    shape = {name: value for name, value in taken.items() if not name.startswith("moe_")}
    config = replace(config, **shape, moe=without_idle(replace(config.moe, **experts), given))
    check_model(config)
    return config, notes


def flatten(config: ModelConfig | Mapping[str, Any]) -> dict[str, Any]:
    """`{"dim": …, "moe_num_experts": …}` of a ModelConfig or of its `asdict`; what an older one does not have yet
    is at its default."""
    entries = asdict(config) if isinstance(config, ModelConfig) else defaults(ModelConfig) | dict(config)
    moe = defaults(MoEConfig) | entries.pop("moe", {})
    entries |= {f"moe_{name}": value for name, value in moe.items()}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in entries.items()}


def defaults(config: type) -> dict[str, Any]:
    """The fields of a dataclass that have a plain default."""
    return {field.name: field.default for field in fields(config) if field.default is not MISSING}


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
