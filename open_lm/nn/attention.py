"""Causal multi-head self-attention, its implementations, and the KV cache.

Shapes: B batch, S query positions, T key positions, D model width, H heads, K head width; G heads of keys and
values, each shared by H / G queries, and V their values' width, where these are not H and K.
The S queries are the last S of the T positions; without a cache S = T.
"""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, varlen

from open_lm.config.model import ModelConfig
from open_lm.nn.documents import Documents
from open_lm.nn.norm import NORMS
from open_lm.nn.rotary import Table, make_position

Attend = Callable[..., Tensor]
HAS_WINDOW = "window_size" in inspect.signature(varlen.varlen_attn).parameters


class LayerCache:
    """Keys and values of the positions that one layer has seen; `length` counts the positions.

    Latent attention keeps here what all heads' keys and values are made of.
    """

    def __init__(self) -> None:
        self.k_BTHK: Tensor | None = None
        self.v_BTHK: Tensor | None = None

    @property
    def length(self) -> int:
        return 0 if self.k_BTHK is None else self.k_BTHK.shape[1]

    def extend_(self, k_BSHK: Tensor, v_BSHK: Tensor) -> tuple[Tensor, Tensor]:
        """Appends S positions; returns the k_BTHK and v_BTHK of all T."""
        if self.k_BTHK is not None and self.v_BTHK is not None:
            k_BSHK = torch.cat((self.k_BTHK, k_BSHK), dim=1)
            v_BSHK = torch.cat((self.v_BTHK, v_BSHK), dim=1)
        self.k_BTHK, self.v_BTHK = k_BSHK, v_BSHK
        return k_BSHK, v_BSHK


def causal_mask(queries: int, keys: int, device: torch.device) -> Tensor:
    """mask_ST: True where a query, one of the last S of T positions, may look."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


def share_heads(x_BTGK: Tensor, heads: int) -> Tensor:
    """x_BTHK: each head of keys or values, for all the queries that share it (arXiv:2305.13245)."""
    return x_BTGK.repeat_interleave(heads // x_BTGK.shape[2], dim=2)


def positions(x_BSD: Tensor, cache: LayerCache | None, documents: Documents | None) -> Tensor:
    """position_S of the tokens, int64, behind those in the cache; or position_BS within their documents."""
    if documents is not None:
        return documents.position_BS
    offset = 0 if cache is None else cache.length
    return torch.arange(offset, offset + x_BSD.shape[1], device=x_BSD.device)


def torch_attn(
    q_BSHK: Tensor,
    k_BTGK: Tensor,
    v_BTGV: Tensor,
    *,
    causal: bool,
    dropout: float = 0.0,
    documents: Documents | None = None,
) -> Tensor:
    """o_BSHV = softmax(q k^T / sqrt(K)) v by torch's scaled_dot_product_attention.

    Of the weights a share `dropout` is set to 0, the rest divided by 1 - dropout. With `documents` (self-attention
    without a cache) a query sees its own document alone, by a kernel that skips the rest if there is one.
    """
    queries, keys = q_BSHK.shape[1], k_BTGK.shape[1]
    mask_ST = None
    if documents is not None:
        if can_skip(q_BSHK, v_BTGV) and not dropout:
            return varlen_attn(q_BSHK, k_BTGK, v_BTGV, documents)
        number_BS = documents.number_BS()
        mask_ST = causal_mask(queries, keys, q_BSHK.device) & (number_BS[:, :, None] == number_BS[:, None])
        mask_ST, causal = mask_ST[:, None], False
    elif causal and 1 < queries < keys:  # is_causal=True would align the corner of position 0 instead
        mask_ST = causal_mask(queries, keys, q_BSHK.device)
    o_BHSV = F.scaled_dot_product_attention(
        q_BSHK.transpose(1, 2),
        k_BTGK.transpose(1, 2),
        v_BTGV.transpose(1, 2),
        attn_mask=mask_ST,
        dropout_p=dropout,
        is_causal=bool(causal and queries == keys > 1),  # of symbolic lengths, in a compiled graph, too
        enable_gqa=q_BSHK.shape[2] != k_BTGK.shape[2],
    )
    return o_BHSV.transpose(1, 2)


def kernel_of(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> str:
    """What computes attention in training: of torch's kernels its own choice, else the name of --attn-name."""
    if ATTENTIONS[config.attn_name] is not torch_attn:
        return config.attn_name
    shape_HK = (
        (config.n_heads, config.qk_head_dim),
        (config.kv_heads, config.qk_head_dim),
        (config.kv_heads, config.value_head_dim),
    )
    q, k, v = (torch.empty(1, h, config.seq_len, width, device=device, dtype=dtype) for h, width in shape_HK)
    mask_ST = None
    if config.document_attention:
        if can_skip(q, v) and not config.attn_dropout:
            return "flash (of variable length)"
        mask_ST = causal_mask(config.seq_len, config.seq_len, device)
    grouped = config.n_heads != config.kv_heads
    choice = torch._fused_sdp_choice(
        q, k, v, mask_ST, config.attn_dropout, mask_ST is None, enable_gqa=grouped
    )
    return SDPBackend(choice).name.removesuffix("_ATTENTION").lower()


def can_skip(q_BSHK: Tensor, v_BTGV: Tensor) -> bool:
    """Whether flash attention of documents is to be had: CUDA, 16 bits, equal widths."""
    wide = q_BSHK.shape[-1] == v_BTGV.shape[-1] <= 256 and q_BSHK.shape[-1] % 8 == 0
    return q_BSHK.is_cuda and q_BSHK.dtype in (torch.float16, torch.bfloat16) and wide


def varlen_attn(q_BSHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, documents: Documents) -> Tensor:
    """o_BSHK: causal attention within each document, whose costs grow with the documents' lengths alone."""
    length = q_BSHK.shape[1]
    k_BSHK, v_BSHK = (share_heads(x, q_BSHK.shape[2]) for x in (k_BSGK, v_BSGK))
    # torch 2.11 and newer say it differently
    causal = {"window_size": (-1, 0)} if HAS_WINDOW else {"is_causal": True}
    o_THK = varlen.varlen_attn(
        q_BSHK.flatten(0, 1),
        k_BSHK.flatten(0, 1),
        v_BSHK.flatten(0, 1),
        documents.edge_N,
        documents.edge_N,
        length,
        length,
        **causal,  # pyright: ignore[reportArgumentType]
    )
    assert isinstance(o_THK, Tensor)
    return o_THK.view_as(q_BSHK)


def load_xformers(device: torch.device) -> Any:
    """The module xformers.ops. Raises ValueError where it is not installed or `device` is no GPU."""
    if device.type != "cuda":
        raise ValueError(
            f"--attn-name xformers_attn runs on a GPU only, the model is on {device}: use --attn-name torch_attn"
        )
    try:
        import xformers.ops as xops  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError(
            "--attn-name xformers_attn, but xformers is not installed: pip install xformers, "
            "or use --attn-name torch_attn"
        ) from error
    return xops


def xformers_attn(q_BSHK: Tensor, k_BTGK: Tensor, v_BTGV: Tensor, *, causal: bool) -> Tensor:
    """As `torch_attn`, by xformers. Raises ValueError where there is no xformers or no GPU."""
    xops = load_xformers(q_BSHK.device)
    queries, keys, heads = q_BSHK.shape[1], k_BTGK.shape[1], q_BSHK.shape[2]
    k_BTHK, v_BTHV = share_heads(k_BTGK, heads), share_heads(v_BTGV, heads)
    bias = None
    if causal and queries == keys > 1:
        bias = xops.LowerTriangularMask()
    elif causal and queries > 1:
        bias = xops.fmha.attn_bias.LowerTriangularFromBottomRightMask()
    return xops.memory_efficient_attention(q_BSHK, k_BTHK, v_BTHV, attn_bias=bias)


def xformers_attn_variable_length(q_BSHK: Tensor, k_BTGK: Tensor, v_BTGV: Tensor, *, causal: bool) -> Tensor:
    """As `xformers_attn`, with contiguous output whatever strides the kernel chose for this length."""
    return xformers_attn(q_BSHK, k_BTGK, v_BTGV, causal=causal).contiguous()


# --attn-activation: what stands where softmax stood, on scores of shape (…, T)
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu_squared": lambda x: F.relu(x).square(),
    "softplus": F.softplus,
    "identity": lambda x: x,
    "relu6": F.relu6,
    "sigmoid": F.sigmoid,
    "softmax": lambda x: x.softmax(-1),
}

# --attn-seq-scalar: sequence length in tokens → L: the most, or on average, that a query sees
SEQUENCE_SCALARS: dict[str, Callable[[int], float]] = {
    "max": lambda tokens: tokens,
    "avg": lambda tokens: (tokens + 1) / 2,
    "none": lambda tokens: 1,
}


def custom_attn(
    q_BSHK: Tensor,
    k_BTGK: Tensor,
    v_BTGV: Tensor,
    *,
    causal: bool,
    activation: str = "softmax",
    scale: float = 1.0,
) -> Tensor:
    """o_BSHV = scale * activation(q k^T / sqrt(K)) v, weights in fp32 (arXiv:2309.08586: scale 1/L)."""
    k_BTHK, v_BTHV = (share_heads(x, q_BSHK.shape[2]) for x in (k_BTGK, v_BTGV))
    score_BHST = torch.einsum("bshk,bthk->bhst", q_BSHK * q_BSHK.shape[-1] ** -0.5, k_BTHK).float()
    if not causal:
        weight_BHST = ACTIVATIONS[activation](score_BHST)
    else:
        mask_ST = causal_mask(q_BSHK.shape[1], k_BTHK.shape[1], q_BSHK.device)
        score_BHST = score_BHST.masked_fill(~mask_ST, torch.finfo(score_BHST.dtype).min)
        # Every other activation is 0 at the least score; `identity` is not, and the future must not leak.
        weight_BHST = ACTIVATIONS[activation](score_BHST).masked_fill(~mask_ST, 0)
    return torch.einsum("bhst,bthv->bshv", (scale * weight_BHST).to(v_BTHV.dtype), v_BTHV)


# --attn-name → fn(q_BSHK, k_BTGK, v_BTGV, *, causal) → o_BSHV; torch's takes `dropout` too
ATTENTIONS: dict[str, Attend] = {
    "auto": torch_attn,
    "torch_attn": torch_attn,
    "xformers_attn": xformers_attn,
    "xformers_attn_variable_length": xformers_attn_variable_length,
    "custom_attn": custom_attn,
}


def make_attention(config: ModelConfig) -> Attend:
    """The function of --attn-name. Raises ValueError when custom_attn lacks one of its three flags.

    custom_attn's L is that of the `seq_len` the model is trained on, at every position and in generation too:
    an L that grew with the keys of the moment would make outputs depend on how a text is cut into calls.
    """
    attend = ATTENTIONS[config.attn_name]
    if config.attn_name != "custom_attn":
        return attend
    chosen: dict[str, Any] = {
        "--attn-activation": config.attn_activation,
        "--attn-seq-scalar": config.attn_seq_scalar,
        "--attn-seq-scalar-alpha": config.attn_seq_scalar_alpha,
    }
    if missing := [flag for flag, value in chosen.items() if value is None]:
        raise ValueError(f"--attn-name custom_attn needs {', '.join(missing)}")
    activation, scalar, alpha = chosen.values()
    scale = SEQUENCE_SCALARS[scalar](config.seq_len) ** -alpha
    return partial(custom_attn, activation=activation, scale=scale)


class Attention(nn.Module):
    """Self-attention with one query-key-value projection; H * K may be another width than D."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.widths = [
            heads * config.head_dim for heads in (config.n_heads, config.kv_heads, config.kv_heads)
        ]
        self.in_proj = nn.Linear(config.dim, sum(self.widths), bias=config.attn_bias)
        self.out_proj = nn.Linear(self.widths[0], config.dim, bias=config.attn_bias)
        norm, per_head = NORMS[config.model_norm], config.qk_norm_per_head
        q_width, k_width = (config.head_dim, config.head_dim) if per_head else self.widths[:2]
        normed = config.qk_norm or per_head
        self.per_head = per_head
        self.q_norm = norm(q_width, config.norm_eps) if normed else nn.Identity()
        self.k_norm = norm(k_width, config.norm_eps) if normed else nn.Identity()
        self.position = make_position(config)
        self.attend = make_attention(config)
        self.dropout = {"dropout": config.attn_dropout} if config.attn_dropout else {}

    def position_table(self, position_S: Tensor) -> Table:
        """What `forward` turns queries and keys by, at positions (S,) or (B, S); the same for all layers."""
        return self.position.table(position_S)

    def forward(
        self,
        x_BSD: Tensor,
        cache: LayerCache | None = None,
        table: Table = None,
        documents: Documents | None = None,
    ) -> Tensor:
        """x_BSD → x_BSD. With a cache, the S tokens follow those already in it, and join them.

        `table` spares making the `position_table` anew.
        """
        table = table or self.position_table(positions(x_BSD, cache, documents))
        q, k, v = self.in_proj(x_BSD).split(self.widths, dim=-1)
        q_BSHK, k_BSGK = self.normed_heads(q, self.q_norm), self.normed_heads(k, self.k_norm)
        v_BSGK = v.unflatten(-1, (-1, self.head_dim))
        q_BSHK, k_BSGK = self.position(q_BSHK, k_BSGK, table)
        # A norm may have gone up to fp32 under autocast; attention wants one dtype.
        q_BSHK, k_BTGK, v_BTGK = q_BSHK.to(v.dtype), k_BSGK.to(v.dtype), v_BSGK
        if cache is not None:
            k_BTGK, v_BTGK = cache.extend_(k_BTGK, v_BTGK)
        options = self.dropout if self.training else {}
        if documents is not None:
            options = options | {"documents": documents}
        return self.out_proj(self.attend(q_BSHK, k_BTGK, v_BTGK, causal=True, **options).flatten(2))

    def normed_heads(self, x: Tensor, norm: nn.Module) -> Tensor:
        """(B, S, heads * K) → (B, S, heads, K), each head normalised, or before the cut all together."""
        if self.per_head:
            return norm(x.unflatten(-1, (-1, self.head_dim)))
        return norm(x).unflatten(-1, (-1, self.head_dim))
