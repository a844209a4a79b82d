"""Rotary embeddings against complex numbers in float64."""

import cmath
import math

import pytest
import torch

from open_lm.config import ModelConfig
from open_lm.nn.rotary import make_position

B, S, H, K = 2, 5, 3, 8
PLANES = {  # plane j → the two coordinates it turns
    "rotary": lambda j: (j, j + K // 2),
    "head_rotary": lambda j: (j, j + K // 2),
    "llama_rotary": lambda j: (2 * j, 2 * j + 1),
}


def make(name: str) -> torch.nn.Module:
    return make_position(
        ModelConfig(
            dim=H * K, n_layers=1, n_heads=H, seq_len=16, vocab_size=8, positional_embedding_type=name
        )
    )


def rotate(name: str, q_BSHK: torch.Tensor, k_BSHK: torch.Tensor, offset: int) -> tuple:
    position = make(name)
    return position(q_BSHK, k_BSHK, position.table(torch.arange(offset, offset + q_BSHK.shape[1])))


def turn(name: str, x_BSHK: torch.Tensor, offset: int) -> torch.Tensor:
    out = torch.zeros(x_BSHK.shape, dtype=torch.float64)
    for b in range(x_BSHK.shape[0]):
        for s in range(x_BSHK.shape[1]):
            for h in range(H):
                place = h if name == "head_rotary" else s + offset
                for j in range(K // 2):
                    re, im = PLANES[name](j)
                    z = complex(x_BSHK[b, s, h, re], x_BSHK[b, s, h, im])
                    z *= cmath.exp(1j * place * 10_000 ** (-2 * j / K))
                    out[b, s, h, re], out[b, s, h, im] = z.real, z.imag
    return out


@pytest.mark.parametrize("offset", [0, 7])
@pytest.mark.parametrize("name", PLANES)
def test_definition(name, offset):
    q, k = torch.randn(2, B, S, H, K)
    for rotated, x in zip(rotate(name, q, k, offset), (q, k), strict=True):
        torch.testing.assert_close(rotated.double(), turn(name, x, offset), atol=1e-5, rtol=1e-5)


def test_none_leaves_everything():
    q, k = torch.randn(2, B, S, H, K)
    assert all(map(torch.equal, rotate("none", q, k, 3), (q, k)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_angles_stay_fp32(dtype):
    """Position 1001 would be 1000 or 1004 in half precision: an error of a radian."""
    q = torch.zeros(1, 1, H, K, dtype=dtype)
    q[..., 0] = 1
    rotated, _ = rotate("rotary", q, q, 1001)
    assert rotated.dtype == dtype
    assert rotated[0, 0, 0, 0].item() == pytest.approx(math.cos(1001), abs=5e-3)
    assert rotated[0, 0, 0, K // 2].item() == pytest.approx(math.sin(1001), abs=5e-3)


def test_survives_meta_construction():
    with torch.device("meta"):
        position = make("rotary")
    position.to_empty(device="cpu")
    assert not position.state_dict()
    q = torch.randn(B, S, H, K)
    table = position.table(torch.arange(2, 2 + S))
    assert torch.equal(position(q, q, table)[0], rotate("rotary", q, q, 2)[0])
