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
FFNName = Literal["swiglu", "swiglu_torch", "gelu", "gelu_tanh", "gemma_geglu"]
PositionName = Literal["rotary", "head_rotary", "llama_rotary", "learned", "none"]
RopeScalingName = Literal["none", "linear", "llama3", "yarn"]
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
    """The dense FFN: gated by SiLU (swiglu) or GELU (gemma_geglu), or an MLP with exact or tanh GELU."""

    ffn_bias: bool = False
    """Biases in the dense FFN (gemma_geglu always has them)."""

    attn_bias: bool = False
    """Biases in attention's projections; in latent attention in q_a_proj, kv_a_proj and out_proj, as DeepSeek."""

    qk_norm: bool = False
    """Normalise queries and keys (over all heads together) before they are split into heads."""

    qk_norm_per_head: bool = False
    """Normalise queries and keys in each head, with one gain for all heads (Qwen3's)."""

    positional_embedding_type: PositionName = "rotary"
    """`rotary` rotates halves, `llama_rotary` interleaved pairs; `head_rotary` is open_lm's historical one,
    which rotates by head and not by position. `learned` adds a vector per position to the embedding."""

    rope_theta: float = 10000.0
    """Base of the rotary frequencies: theta ** (-2j / width)."""

    rope_scaling: RopeScalingName = "none"
    """Frequencies for texts longer than the model was trained on: all divided by the factor (linear), the low
    ones (llama3), or by a ramp over the frequencies, with a temperature (yarn)."""

    rope_scaling_factor: float | None = None
    """How many times longer texts may be. Needed by every --rope-scaling."""

    rope_original_seq_len: int | None = None
    """For --rope-scaling llama3 and yarn: tokens of the texts before scaling."""

    rope_llama3_low_freq: float = 1.0
    """llama3: frequencies of fewer turns in the original length are divided by the factor."""

    rope_llama3_high_freq: float = 4.0
    """llama3: frequencies of more turns in the original length stay."""

    rope_yarn_beta_fast: float = 32.0
    """yarn: frequencies of more turns in the original length stay."""

    rope_yarn_beta_slow: float = 1.0
    """yarn: frequencies of fewer turns in the original length are divided by the factor."""

    rope_yarn_mscale: float = 1.0
    """yarn: cosines and sines are multiplied by 0.1 * this * ln(factor) + 1."""

    rope_yarn_mscale_all_dim: float = 0.0
    """yarn in latent attention: all scores are multiplied by (0.1 * this * ln(factor) + 1) ** 2, cosines and sines
    divided by its root (DeepSeek's)."""

    dropout: float = 0.0
    """Probability that an element of the embedding, or of what attention or an FFN adds to it, is dropped in
    training."""

    attn_dropout: float = 0.0
    """Probability that an attention weight is dropped in training."""

    init_std: float | None = None
    """Draw all weights from N(0, this). Default: by width and depth, see open_lm/nn/init.py."""

    init_scaled_outputs: bool = False
    """With --init-std: projections back to the model's width get std / sqrt(2 n_layers), as GPT-2 and Megatron."""

    attn_name: AttentionName = "auto"
    """`auto`: torch's scaled_dot_product_attention."""

    attn_activation: AttentionActivation | None = None
    """For --attn-name custom_attn: what replaces the softmax."""

    attn_seq_scalar: SequenceScalar | None = None
    """For --attn-name custom_attn: the length L whose L**-alpha scales the attention weights."""

    attn_seq_scalar_alpha: float | None = None
    """For --attn-name custom_attn: alpha."""

    end_of_text: int | None = None
    """Token id that ends each document in packed sequences. Negative: from the vocabulary's end."""

    document_attention: bool = False
    """Attention and positions do not cross documents (--end-of-text tells them apart)."""

    experimental_meta_device: bool = False
    """Accepted: models are always built on the meta device and initialised block by block, shard by shard."""

    disable_meta_device: bool = False
    """Build the whole model on the device before it is sharded. The numbers are the same."""

    grad_checkpointing: bool = False
    """Recompute each block in the backward pass instead of keeping its activations."""

    torchcompile: bool = False
    """torch.compile: all blocks as one graph in a single process; block by block with --fsdp, DDP or
    --grad-checkpointing. On by itself where one GPU trains, unless --no-torchcompile or
    --deterministic is given."""


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
    ffn_bias: bool = False
    ffn_hidden_dim: int | None = None
    """Width of the dense FFN. None: 4d ungated, `swiglu_hidden_dim` gated."""
    n_kv_heads: int | None = None
    """Heads of keys and values, each shared by n_heads / n_kv_heads queries. None: n_heads."""
    explicit_head_dim: int | None = None
    """What a model's JSON says as head_dim."""
    kv_lora_rank: int | None = None
    """Width of the latent that keys and values are made of: latent attention. None: there is none."""
    q_lora_rank: int | None = None
    """Latent attention: width of the queries' latent. None: they come straight from the model's width."""
    qk_nope_head_dim: int | None = None
    """Latent attention: width of a query or key head's part without position, …"""
    qk_rope_head_dim: int | None = None
    """… of its part that is rotated, whose key is one for all heads, …"""
    v_head_dim: int | None = None
    """… and of a value head."""
    attn_bias: bool = False
    qk_norm: bool = False
    qk_norm_per_head: bool = False
    positional_embedding_type: PositionName = "rotary"
    rope_theta: float = 10000.0
    rope_scaling: RopeScalingName = "none"
    rope_scaling_factor: float | None = None
    rope_original_seq_len: int | None = None
    rope_llama3_low_freq: float = 1.0
    rope_llama3_high_freq: float = 4.0
    rope_yarn_beta_fast: float = 32.0
    rope_yarn_beta_slow: float = 1.0
    rope_yarn_mscale: float = 1.0
    rope_yarn_mscale_all_dim: float = 0.0
    dropout: float = 0.0
    attn_dropout: float = 0.0
    init_std: float | None = None
    init_scaled_outputs: bool = False
    attn_name: AttentionName = "auto"
    attn_activation: AttentionActivation | None = None
    attn_seq_scalar: SequenceScalar | None = None
    attn_seq_scalar_alpha: float | None = None
    end_of_text: int | None = None
    document_attention: bool = False
    moe: MoEConfig = field(default_factory=MoEConfig)

    @property
    def head_dim(self) -> int:
        """Width of a head, rounded down: 87m has d 488 and 12 heads of 40, so its attention is 480 wide."""
        return self.explicit_head_dim or self.dim // self.n_heads

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.n_kv_heads or self.n_heads

    @property
    def rotary_dim(self) -> int:
        """Width of what a rotary embedding turns in each head: all of it, but for latent attention."""
        return self.qk_rope_head_dim or self.head_dim

    @property
    def qk_head_dim(self) -> int:
        """Width of a head of queries and keys."""
        return self.rotary_dim + (self.qk_nope_head_dim or 0)

    @property
    def value_head_dim(self) -> int:
        """Width of a head of values."""
        return self.v_head_dim or self.head_dim

    @property
    def swiglu_hidden_dim(self) -> int:
        """Width of a gated FFN: 2/3 of 4d, rounded up to a multiple of 256 (as Llama)."""
        return 256 * -(-int(8 * self.dim / 3) // 256)
