"""Cross-entropy against torch's and against -log softmax spelled out, gradients too."""

import pytest
import torch
import torch.nn.functional as F

from open_lm import loss


@pytest.fixture(params=[1, 5, 10**9], ids=["chunks of 1", "chunks of 5", "one chunk"])
def chunk_tokens(request, monkeypatch):
    monkeypatch.setattr(loss, "CHUNK_LOGITS", request.param * 11)


def batch(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(2, 7, 11, generator=generator)).to(dtype)
    targets = torch.randint(0, 11, (2, 7), generator=generator)
    targets[0, 2] = targets[1, 6] = -100
    return logits.requires_grad_(), targets


def test_equals_torch_and_the_definition(chunk_tokens):
    logits, targets = batch()
    nll_sum, z_sum, tokens = loss.cross_entropy(logits, targets)
    (nll_sum + 0.1 * z_sum).backward()
    gradient, logits.grad = logits.grad, None

    expected_nll = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    expected_z = torch.zeros(())
    for b, s in (targets != -100).nonzero().tolist():
        expected_z = expected_z + logits[b, s].exp().sum().log() ** 2
    (expected_nll + 0.1 * expected_z).backward()

    assert tokens == 12
    assert tokens.dtype == torch.int64
    torch.testing.assert_close(nll_sum, expected_nll)
    torch.testing.assert_close(z_sum, expected_z)
    torch.testing.assert_close(gradient, logits.grad, atol=1e-6, rtol=1e-5)
    assert (gradient[targets == -100] == 0).all()


def test_bf16_logits_are_treated_in_fp32(chunk_tokens):
    logits, targets = batch(torch.bfloat16)
    result = loss.cross_entropy(logits, targets)
    result.nll_sum.backward()
    exact = logits.detach().float().requires_grad_()
    expected = F.cross_entropy(exact.flatten(0, 1), targets.flatten(), reduction="sum")
    expected.backward()
    assert result.nll_sum.dtype == torch.float32
    assert logits.grad.dtype == torch.bfloat16
    torch.testing.assert_close(result.nll_sum, expected)
    torch.testing.assert_close(logits.grad, exact.grad.bfloat16(), atol=0, rtol=2**-7)


@pytest.mark.parametrize("pick", [0, 1])
def test_gradient_is_the_slope(pick):
    logits, targets = batch()
    value = lambda x: loss.cross_entropy(x, targets)[pick]
    (gradient,) = torch.autograd.grad(value(logits), logits)
    direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        slope = (value(logits + 1e-2 * direction) - value(logits - 1e-2 * direction)) / 2e-2
    torch.testing.assert_close((gradient * direction).sum(), slope, rtol=2e-3, atol=2e-3)


def test_token_nll_is_the_summand_and_zero_where_ignored(chunk_tokens):
    logits, targets = batch()
    nll = loss.token_nll(logits, targets)
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(2, 7)
    torch.testing.assert_close(nll, expected)
    assert not nll.requires_grad
    assert nll[0, 2] == nll[1, 6] == 0


def test_extreme_logits_and_nothing_to_predict():
    logits = torch.tensor([[[1e4, -1e4], [-1e4, 1e4]]], requires_grad=True)
    result = loss.cross_entropy(logits, torch.tensor([[0, 0]]))
    result.nll_sum.backward()
    assert result.nll_sum == 2e4
    assert logits.grad.tolist() == [[[0, 0], [-1, 1]]]

    nothing = loss.cross_entropy(logits, torch.full((1, 2), -100))
    assert [x.item() for x in nothing] == [0, 0, 0]


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match=r"\(2, 6\).*\(2, 7, 11\)"):
        loss.cross_entropy(torch.zeros(2, 7, 11), torch.zeros(2, 6, dtype=torch.long))
