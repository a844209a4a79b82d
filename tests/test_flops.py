"""FLOPs per token against the literal sums of the models' shapes, and MFU and memory in a run's lines."""

import pytest
import torch

from open_lm import metrics
from open_lm.config import ModelFlags, MoEConfig
from open_lm.config.resolve import resolve_model
from open_lm.flops import flops_per_token, peak_flops

# MFLOP per token, dense and with 8 experts in every second layer, worked out apart from this code
MEGAFLOPS = {
    "41m": (201, 225),
    "87m": (448, 504),
    "160m": (855, 1025),
    "410m": (2462, 3047),
    "830m": (4995, 6354),
}


def config_of(model: str, moe: MoEConfig):
    return resolve_model(ModelFlags(model=f"open_lm_{model}", model_norm="gain_only_layer_norm"), moe, ())


@pytest.mark.parametrize("model", MEGAFLOPS)
def test_flops_per_token(model):
    dense, sparse = (config_of(model, moe) for moe in (MoEConfig(), MoEConfig(freq=2, num_experts=8)))
    assert (round(flops_per_token(dense) / 1e6), round(flops_per_token(sparse) / 1e6)) == MEGAFLOPS[model]


def test_by_hand():
    """41m: 12 layers of attention (4 d²) and SwiGLU (3 d 768), the head, and causal attention at half."""
    d, layers, seq_len, vocab = 288, 12, 2048, 50432
    products = layers * (4 * d * d + 3 * d * 768) + vocab * d
    assert flops_per_token(config_of("41m", MoEConfig())) == 6 * (products + layers * seq_len * d)


def test_peaks_are_of_the_devices_name():
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("NVIDIA A100-SXM4-40GB") == 312e12
    assert peak_flops("a device of tomorrow") is None


def test_efficiency(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 * 2**30)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 4 * 2**30)
    entry = metrics.efficiency(1e6, 200e6, torch.device("cuda"))
    assert entry["train/mfu"] == pytest.approx(200e12 / 989e12)
    assert (entry["train/memory_gib"], entry["train/memory_reserved_gib"]) == (3, 4)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a device of tomorrow")
    assert "train/mfu" not in metrics.efficiency(1e6, 200e6, torch.device("cuda"))
    assert metrics.efficiency(1e6, 200e6, torch.device("cpu")) == {}
