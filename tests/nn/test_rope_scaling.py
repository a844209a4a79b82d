"""Scaled frequencies against transformers' own functions, and what YaRN multiplies scores by."""

import math
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from open_lm.config import ModelConfig
from open_lm.nn.rope_scaling import SCALINGS, score_factor
from open_lm.nn.rotary import frequencies, make_position

CONFIG = ModelConfig(dim=512, n_layers=1, n_heads=4, seq_len=2048, vocab_size=8)
# ours and theirs
CASES = [
    ({"rope_scaling": "linear", "rope_scaling_factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
    *(
        (
            {"rope_scaling": "llama3", "rope_scaling_factor": 8.0, "rope_original_seq_len": length}
            | {"rope_llama3_low_freq": low, "rope_llama3_high_freq": high},
            {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": length}
            | {"low_freq_factor": low, "high_freq_factor": high},
        )
        for length, low, high in ((8192, 1.0, 4.0), (300, 2.0, 16.0))
    ),
    *(
        (
            {"rope_scaling": "yarn", "rope_scaling_factor": 40.0, "rope_original_seq_len": length}
            | {"rope_yarn_beta_fast": fast, "rope_yarn_beta_slow": slow},
            {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": length}
            | {"beta_fast": fast, "beta_slow": slow},
        )
        for length, fast, slow in ((4096, 32.0, 1.0), (100, 8.0, 2.0))
    ),
    (
        {"rope_scaling": "yarn", "rope_scaling_factor": 40.0, "rope_original_seq_len": 4096}
        | {"rope_yarn_mscale": 0.707, "rope_yarn_mscale_all_dim": 0.9},
        {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096}
        | {"mscale": 0.707, "mscale_all_dim": 0.9},
    ),
]


@pytest.mark.parametrize("theta", [1e4, 1e6])
@pytest.mark.parametrize(("ours", "theirs"), CASES, ids=lambda x: str(x.get("rope_scaling", "")))
def test_frequencies_and_factor_are_those_of_transformers(ours, theirs, theta):
    config = replace(CONFIG, rope_theta=theta, **ours)
    llama = LlamaConfig(
        hidden_size=512, num_attention_heads=4, max_position_embeddings=2048,
        rope_parameters=theirs | {"rope_theta": theta},
    )  # fmt: skip
    expected_J, factor = ROPE_INIT_FUNCTIONS[theirs["rope_type"]](llama, torch.device("cpu"))
    frequency_J, ours_factor = frequencies(config, torch.device("cpu"))
    torch.testing.assert_close(frequency_J, expected_J, atol=0, rtol=2e-6)
    assert ours_factor == pytest.approx(factor, rel=1e-6)
    plain_J, _ = frequencies(replace(CONFIG, rope_theta=theta), torch.device("cpu"))
    assert not torch.allclose(frequency_J, plain_J)
    cos_S1J, _ = make_position(config).table(torch.arange(7, 9))
    torch.testing.assert_close(cos_S1J[1, 0], (8 * expected_J).cos() * factor, atol=1e-5, rtol=1e-5)


def test_every_scaling_is_tested():
    assert {ours["rope_scaling"] for ours, _ in CASES} == set(SCALINGS) - {"none"}


def test_scores_of_latent_attention():
    """DeepSeek-V3: cosines and sines as they are, all scores times (0.1 ln 40 + 1)²."""
    config = replace(
        CONFIG,
        rope_scaling="yarn",
        rope_scaling_factor=40.0,
        rope_original_seq_len=4096,
        rope_yarn_mscale_all_dim=1.0,
    )
    assert frequencies(config, torch.device("cpu"))[1] == 1
    assert score_factor(config) == pytest.approx((0.1 * math.log(40) + 1) ** 2)
    assert score_factor(CONFIG) == 1
