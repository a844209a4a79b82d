"""Initial values, one random stream per parameter: the same for any order, sharding or number of ranks.

d: model width, h: hidden width of an FFN or expert, l: layer, counted from 0.

    tok_embeddings, pos_embeddings, output        normal, std 1/sqrt(d), truncated at 3 std
    attention.in_proj, q_proj, q_a_proj, kv_a_proj  "  1/sqrt(d)
    attention.q_b_proj, kv_b_proj, of rank r      "  1/sqrt(r)
    attention.out_proj                            "  1/sqrt(2 d (l+1)), less with depth (arXiv:1908.11365)
    feed_forward, into h (w12, 0, gate_proj …)    "  1/sqrt(d)
    feed_forward, out of h (w3, 2, down_proj)     "  1/sqrt(2 h (l+1))
    router, experts                               normal, std .02 (MegaBlocks' and so open_lm's)
    experts with --moe-init scaled                as the dense FFN's
    mixing.shared, mixing.mlp (w1, v1, w2)        as the experts
    mixing.gate, mixing.coefficient               as the router
    norms' gains                                  1
    all biases, also b1, c1, b2, router.bias_E    0 (open_lm left gemma_geglu's at nn.Linear's default)

With --init-std s every weight above but the gains is normal with std s, not truncated: embeddings, routers and
experts too. With --init-scaled-outputs attention.out_proj, the FFNs' w3, 2, down_proj and the experts' and
mixing's w2 have s / sqrt(2 L) in a model of L layers, not less with depth (GPT-2, Megatron).
"""

import hashlib
import re
from collections.abc import Callable

import torch
from torch import Tensor, nn

from open_lm.config.model import ModelConfig

Fill = Callable[[Tensor, torch.Generator, int, int, int], object]

MEGABLOCKS_STD = 0.02


def _truncated_(x: Tensor, std: float, stream: torch.Generator) -> None:
    nn.init.trunc_normal_(x, std=std, a=-3 * std, b=3 * std, generator=stream)


def _into(x: Tensor, stream: torch.Generator, d: int, h: int, layer: int) -> None:
    _truncated_(x, d**-0.5, stream)


def _out_of_latent(x: Tensor, stream: torch.Generator, d: int, h: int, layer: int) -> None:
    _truncated_(x, h**-0.5, stream)


def _out_of_attention(x: Tensor, stream: torch.Generator, d: int, h: int, layer: int) -> None:
    _truncated_(x, (2 * d * (layer + 1)) ** -0.5, stream)


def _out_of_ffn(x: Tensor, stream: torch.Generator, d: int, h: int, layer: int) -> None:
    _truncated_(x, (2 * h * (layer + 1)) ** -0.5, stream)


def _megablocks(x: Tensor, stream: torch.Generator, d: int, h: int, layer: int) -> None:
    x.normal_(0.0, MEGABLOCKS_STD, generator=stream)


def _ones(x: Tensor, stream: torch.Generator, d: int, h: int, layer: int) -> None:
    x.fill_(1)


def _zeros(x: Tensor, stream: torch.Generator, d: int, h: int, layer: int) -> None:
    x.zero_()


# Pattern of the whole name → how it is filled; the first match counts.
DENSE: tuple[tuple[str, Fill], ...] = (
    (r"(tok_embeddings|pos_embeddings|output)\.weight", _into),
    (r".*\.attention\.(in_proj|q_proj|q_a_proj|kv_a_proj)\.weight", _into),
    (r".*\.attention\.(q_b_proj|kv_b_proj)\.weight", _out_of_latent),
    (r".*\.attention\.out_proj\.weight", _out_of_attention),
    (r".*\.feed_forward\.(w12|0|gate_proj|up_proj)\.weight", _into),
    (r".*\.feed_forward\.(w3|2|down_proj)\.weight", _out_of_ffn),
    (r"(.*\.)?(norm|\w+_norm)\.weight", _ones),
    (r".*\.(router\.layer|mixing\.gate|mixing\.coefficient)\.weight", _megablocks),
    (r".*(bias|\.experts\.mlp\.(b1|c1|b2))", _zeros),
)
MLP = r".*\.(experts\.mlp|mixing\.(shared|mlp))"
EXPERTS: dict[str, tuple[tuple[str, Fill], ...]] = {
    "open_lm": ((MLP + r"\.(w1|v1|w2)(\.weight)?", _megablocks),),
    "scaled": ((MLP + r"\.(w1|v1)(\.weight)?", _into), (MLP + r"\.w2(\.weight)?", _out_of_ffn)),
}
# Projections back to the model's width, for --init-scaled-outputs
OUTPUTS = r".*\.(out_proj|feed_forward\.(w3|2|down_proj))\.weight|" + MLP + r"\.w2(\.weight)?"


@torch.no_grad()
def initialize_(module: nn.Module, config: ModelConfig, seed: int, prefix: str = "") -> None:
    """Fills every parameter of `module`, whose name in the whole Transformer is `prefix` + its name here.

    Each is drawn in fp32 on its own device from a stream seeded by (seed, whole name), so filling the model
    at once, or block by block ("layers.3."), gives the same numbers. Raises ValueError for a parameter that
    is still on the meta device, or that no row of the table matches.
    """
    for local_name, parameter in module.named_parameters():
        name = prefix + local_name
        if config.weight_tying and name == "output.weight":
            name = "tok_embeddings.weight"  # one tensor, so one stream, whichever name it is reached by
        if parameter.is_meta:
            raise ValueError(f"{name} is on the meta device: call to_empty(device=...) first")
        fill = _find(name, config)
        layer = int(match[1]) if (match := re.match(r"layers\.(\d+)\.", name)) else 0
        hidden = parameter.shape[-2] if ".experts.mlp." in name else parameter.shape[-1]
        drawn = torch.empty(parameter.shape, dtype=torch.float32, device=parameter.device)
        fill(drawn, make_stream(seed, name, parameter.device), config.dim, hidden, layer)
        parameter.copy_(drawn)
    for name, buffer in module.named_buffers():
        if name.endswith("bias_E"):  # to_empty leaves whatever was in memory
            buffer.zero_()


def _plain(name: str, config: ModelConfig, std: float) -> Fill:
    """--init-std for one weight."""
    if config.init_scaled_outputs and re.fullmatch(OUTPUTS, name):
        std *= (2 * config.n_layers) ** -0.5
    return lambda x, stream, d, h, layer: x.normal_(0.0, std, generator=stream)


def make_stream(seed: int, name: str, device: torch.device) -> torch.Generator:
    """A generator that depends on (seed, name) alone."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def _find(name: str, config: ModelConfig) -> Fill:
    for pattern, fill in (*EXPERTS[config.moe.init], *DENSE):
        if re.fullmatch(pattern, name):
            drawn = fill not in (_ones, _zeros)
            return _plain(name, config, config.init_std) if drawn and config.init_std is not None else fill
    raise ValueError(f"no rule to initialise {name}: add a row to the tables of open_lm/nn/init.py")
