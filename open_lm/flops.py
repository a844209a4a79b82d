"""Model FLOPs per token and a device's peak: what MFU is the ratio of (PaLM, arXiv:2204.02311, appendix B)."""

from open_lm.config.model import ModelConfig
from open_lm.model import build, count_parameters, experts_per_token, is_of_experts

FORMULA = (
    "MFU = tokens/s/GPU x FLOPs per token / peak; FLOPs per token = 6 x active parameters in matrix products (with "
    "the output projection, without embeddings' look-ups) + 6 x layers x sequence length x attention width (of "
    "keys and values, their mean) (causal attention at half); recomputation does not count"
)

# Dense bf16 peak in FLOP/s by a part of the device's name, of NVIDIA's data sheets; the first match counts.
PEAKS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "A10G": 70e12,
}


def peak_flops(device_name: str) -> float | None:
    """FLOP/s of the device's dense bf16 matrix units; None where it is not known."""
    return next((peak for name, peak in PEAKS.items() if name in device_name), None)


def flops_per_token(config: ModelConfig) -> float:
    """Forward and backward, by FORMULA."""
    looked_up = 0 if config.weight_tying else config.vocab_size * config.dim
    if config.positional_embedding_type == "learned":
        looked_up += config.seq_len * config.dim
    vectors = 0.0  # gains and biases, of the experts' those that a token uses
    for name, parameter in build(config).named_parameters():
        of_experts = is_of_experts(name)
        if parameter.ndim - of_experts < 2:
            used = min(experts_per_token(config.moe) / parameter.shape[0], 1) if of_experts else 1
            vectors += parameter.numel() * used
    in_products = count_parameters(config).active - looked_up - vectors
    widths = config.n_heads * (config.qk_head_dim + config.value_head_dim)
    return 6 * in_products + 3 * config.n_layers * config.seq_len * widths
