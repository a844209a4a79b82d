"""Weights of a file by the model's names, or one error that says how they do not fit."""

import errno
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from open_lm.checkpoint.seal import read_whole
from open_lm.checkpoint.state import CONTENT, Shards, read_json, verify
from open_lm.checkpoint.tensors import tensors_of
from open_lm.model import Transformer

# What other writers call our parameters: wrappers' prefixes; the second name open_lm's gelu FFN has.
RENAMES = (
    (r"(^|(?<=\.))(module|_orig_mod|_fsdp_wrapped_module)\.", ""),
    (r"\.(feed_forward\.)?_ff_w1\.", ".feed_forward.0."),
    (r"\.(feed_forward\.)?_ff_w2\.", ".feed_forward.2."),
)
BIAS = ".router.bias_E"  # of --moe-balance bias; a checkpoint trained without it has none: zeros
NO_WEIGHTS = r".*\.pos_embed\.inv_freq"  # open_lm's rotary tables


def read_weights(path: Path, model: Transformer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(Weights by `model`'s names, what else the file holds) of epoch_N.pt, an average's NAME_N.pt, a bare state
    dict, .safetensors or a state's folder.

    Raises ValueError if they do not fit `model`, or the file cannot be read without executing it.
    """
    if path.is_dir():
        verify(path)
        shards, content = Shards(path), read_json(path / CONTENT)
        weights = {name: shards.whole(key) for name, key in shards.named("model/").items()}
        check_fit(path, weights, model)
        return weights, {key: content[key] for key in ("epoch", "name", "step", "tokens", "model_config")}
    content = _read_safetensors(path) if path.suffix == ".safetensors" else read_whole(path)
    key = next((key for key in ("state_dict", "av_model_sd") if key in content), None)
    weights = content if key is None else content[key]
    if not isinstance(weights, dict) or not all(isinstance(w, Tensor) for w in weights.values()):
        raise ValueError(f"{path} holds no weights: neither a state dict nor one under the key 'state_dict'")
    rest = {k: v for k, v in content.items() if k != key} if key else {}
    weights = rename(weights)
    check_fit(path, weights, model)
    return weights, rest


def or_zeros(weights: dict[str, Tensor], name: str, like: Tensor) -> Tensor:
    """`name`'s tensor; zeros for a router's bias that the file lacks."""
    return weights[name] if name in weights else torch.zeros(like.shape)


def _read_safetensors(path: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    if not path.is_file():
        raise FileNotFoundError(errno.ENOENT, f"no checkpoint file {path}")
    try:
        return load_file(path)
    except Exception as e:
        raise ValueError(f"{path} cannot be loaded: {e}") from e


def rename(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors by our names, without those that are no weights."""
    renamed = {}
    for name, tensor in weights.items():
        for pattern, ours in RENAMES:
            name = re.sub(pattern, ours, name)
        if not re.fullmatch(NO_WEIGHTS, name):
            renamed[name] = tensor
    return renamed


def check_fit(path: Path, weights: dict[str, Tensor], model: Transformer) -> None:
    """Raises one ValueError that lists what is missing, unexpected or of another shape, up to five of each."""
    expected = tensors_of(model)
    shared = [name for name in expected if name in weights]
    for name in shared:
        experts, others = expected[name].shape[0], weights[name].shape[0] if weights[name].ndim else 0
        if name.endswith(".router.layer.weight") and experts != others:
            layer = name.removeprefix("layers.").split(".")[0]
            raise ValueError(
                f"--moe-num-experts {experts}, but {path} has {others} experts (in layer {layer})"
            )
    if dropped := sorted(name for name in weights if name.endswith(BIAS) and name not in expected):
        raise ValueError(
            f"{path} has biases that experts are selected by ({dropped[0]} …), which a model without --moe-balance "
            "bias would drop: it would choose other experts. Add bias to --moe-balance; with --moe-bias-rate 0 "
            "the biases stay as they are"
        )
    aliases = model.state_dict(keep_vars=True)
    embedding = weights.get("tok_embeddings.weight")
    problems = {
        "missing": [name for name in expected if name not in weights and not name.endswith(BIAS)],
        "unexpected": [name for name in weights if name not in aliases],
        "of another shape": [
            f"{name} {tuple(weights[name].shape)}, in the model {tuple(expected[name].shape)}"
            for name in shared
            if weights[name].shape != expected[name].shape
        ],
        "tied in the model but not in the file": [
            name
            for name, tensor in weights.items()
            if name in aliases and name not in expected  # so it is a parameter's second name
            if embedding is not None and not torch.equal(tensor, embedding)
        ],
    }
    lines = [
        f"{len(names)} {kind}: {'; '.join(names[:5])}{' …' if len(names) > 5 else ''}"
        for kind, names in problems.items()
        if names
    ]
    if lines:
        raise ValueError(
            f"{path} does not fit the model (check --model and the --moe flags)\n  " + "\n  ".join(lines)
        )
