"""The network: the flags that describe it, and `ModelConfig`, which flags and a model's JSON resolve to."""

from dataclasses import dataclass, field
from typing import Literal

from open_lm.config.moe import MoEConfig

NormName = Literal[
    "default_layer_norm",
    "lp_layer_norm",
    "gain_only_lp_layer_norm",
    "gain_only_layer_norm",
    "no_wb_layer_norm",
    "rms_norm",
]
FFNName = Literal["swiglu", "swiglu_torch", "gelu", "gemma_geglu"]
PositionName = Literal["rotary", "head_rotary", "llama_rotary", "none"]
AttentionName = Literal["auto", "xformers_attn", "xformers_attn_variable_length", "torch_attn", "custom_attn"]
AttentionActivation = Literal["relu", "relu_squared", "softplus", "identity", "relu6", "sigmoid", "softmax"]
SequenceScalar = Literal["max", "avg", "none"]


@dataclass(frozen=True)
class ModelFlags:
    """The model. A flag that contradicts the model's JSON is an error."""

    model: str = "open_lm_1b"
    """A name in open_lm/model_configs, or the path of a .json file."""

    model_norm: NormName = "default_layer_norm"
    """Normalisation before attention, before the FFN, and at the end."""

    ffn_type: FFNName = "swiglu"
    """The dense FFN."""

    qk_norm: bool = False
    """Normalise queries and keys (over all heads together) before they are split into heads."""

    positional_embedding_type: PositionName = "rotary"
    """`rotary` rotates halves, `llama_rotary` interleaved pairs; `head_rotary` is open_lm's historical one,
    which rotates by head and not by position."""

    attn_name: AttentionName = "auto"
    """`auto`: torch's scaled_dot_product_attention."""

    attn_activation: AttentionActivation | None = None
    """For --attn-name custom_attn: what replaces the softmax."""

    attn_seq_scalar: SequenceScalar | None = None
    """For --attn-name custom_attn: the length L whose L**-alpha scales the attention weights."""

    attn_seq_scalar_alpha: float | None = None
    """For --attn-name custom_attn: alpha."""

    experimental_meta_device: bool = False
    """Accepted: models are always built on the meta device and initialised block by block, shard by shard."""

    disable_meta_device: bool = False
    """Build the whole model on the device before it is sharded. The numbers are the same."""

    grad_checkpointing: bool = False
    """Recompute each block in the backward pass instead of keeping its activations."""

    torchcompile: bool = False
    """torch.compile every block."""


@dataclass(frozen=True)
class ModelConfig:
    """Everything that determines the network's function and parameters; `model.Transformer` takes one.

    Dimensions are counts: `dim` is the width d, `vocab_size` the number of token ids, `seq_len` tokens.
    """

    dim: int
    n_layers: int
    n_heads: int
    seq_len: int
    vocab_size: int
    post_embed_norm: bool = False
    weight_tying: bool = False
    norm_eps: float = 1e-5
    model_norm: NormName = "default_layer_norm"
    ffn_type: FFNName = "swiglu"
    qk_norm: bool = False
    positional_embedding_type: PositionName = "rotary"
    attn_name: AttentionName = "auto"
    attn_activation: AttentionActivation | None = None
    attn_seq_scalar: SequenceScalar | None = None
    attn_seq_scalar_alpha: float | None = None
    moe: MoEConfig = field(default_factory=MoEConfig)

    @property
    def head_dim(self) -> int:
        """Width of a head, rounded down: 87m has d 488 and 12 heads of 40, so its attention is 480 wide."""
        return self.dim // self.n_heads

    @property
    def swiglu_hidden_dim(self) -> int:
        """Width of a gated FFN: 2/3 of 4d, rounded up to a multiple of 256 (as Llama)."""
        return 256 * -(-int(8 * self.dim / 3) // 256)
