"""Cross-entropy against torch's and against -log softmax spelled out, and the fused one against both."""

from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F

from open_lm import loss


@pytest.fixture(params=["definition", "kernel"])
def losses_(request, monkeypatch):
    """What is done between the products: by torch, and by the kernel, in Triton's interpreter where is no GPU."""
    if request.param == "kernel":
        if find_spec("triton") is None or torch.cuda.is_available():
            pytest.skip("needs triton's interpreter; on a GPU the kernel itself is tested")
        from open_lm.loss import kernel

        monkeypatch.setattr(kernel, "BLOCK", 4)  # several blocks a row, the last not full
        monkeypatch.setattr(loss, "find_losses", lambda *_: kernel.losses_)


@pytest.fixture(params=[1, 5, 10**9], ids=["chunks of 1", "chunks of 5", "one chunk"])
def chunk_tokens(request, monkeypatch):
    monkeypatch.setitem(loss.CHUNK_LOGITS, "cpu", request.param * 11)


def batch(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(2, 7, 11, generator=generator)).to(dtype)
    targets = torch.randint(0, 11, (2, 7), generator=generator)
    targets[0, 2] = targets[1, 6] = -100
    return logits.requires_grad_(), targets


def linear_batch(dtype=torch.float32):
    """x_BSD, weight_VD and targets_BS, two of them ignored."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 7, 5, generator=generator).to(dtype)
    weight = (2 * torch.randn(11, 5, generator=generator)).to(dtype)
    return x.requires_grad_(), weight.requires_grad_(), batch()[1]


def test_equals_torch_and_the_definition():
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


@pytest.mark.parametrize("z", [0.0, 0.1])
def test_fused_equals_torch_in_value_and_gradient(losses_, chunk_tokens, z):
    x, weight, targets = linear_batch()
    fused = loss.linear_cross_entropy(x, weight, targets, z_loss_coefficient=z)
    (3 * fused.objective_sum).backward()
    gradients = x.grad, weight.grad
    x.grad = weight.grad = None

    logits = F.linear(x, weight)
    nll = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(2, 7)
    logsumexp = logits.logsumexp(-1).where(targets != -100, 0)
    (3 * (nll.sum() + z * logsumexp.square().sum())).backward()

    torch.testing.assert_close(fused.objective_sum, nll.sum() + z * logsumexp.square().sum())
    torch.testing.assert_close(fused.nll_BS, nll)
    torch.testing.assert_close(fused.logsumexp_BS, logsumexp)
    torch.testing.assert_close(fused.logit_mean, logits.mean())
    sums = torch.stack((nll.sum(), logsumexp.square().sum(), logits.mean())).double()
    torch.testing.assert_close(fused.sums(), sums)
    for ours, theirs in zip(gradients, (x.grad, weight.grad), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert (gradients[0][targets == -100] == 0).all()
    assert not fused.nll_BS.requires_grad


def test_fused_without_gradient_is_the_same(losses_, chunk_tokens):
    x, weight, targets = linear_batch()
    expected = loss.linear_cross_entropy(x, weight, targets)
    with torch.no_grad():
        result = loss.linear_cross_entropy(x, weight, targets)
    assert not result.objective_sum.requires_grad
    for ours, theirs in zip(result, expected, strict=True):
        torch.testing.assert_close(ours, theirs.detach(), rtol=0, atol=0)


def test_fused_under_autocast_is_as_good_as_unfused(chunk_tokens):
    """bf16 logits, fp32 behind them: gradients as close to fp32's as those that autograd finds."""
    x, weight, targets = linear_batch()

    def run(function, precise=False):
        with torch.autocast("cpu", torch.bfloat16, enabled=not precise):
            value = function()
        return value, torch.autograd.grad(value, (x, weight))

    exact, exact_gradients = run(lambda: loss.cross_entropy(F.linear(x, weight), targets).nll_sum, True)
    plain, plain_gradients = run(lambda: loss.cross_entropy(F.linear(x, weight), targets).nll_sum)
    fused, fused_gradients = run(lambda: loss.linear_cross_entropy(x, weight, targets).objective_sum)
    torch.testing.assert_close(fused, plain)  # the same rounded logits
    for ours, theirs, true in zip(fused_gradients, plain_gradients, exact_gradients, strict=True):
        assert ours.dtype == torch.float32
        assert (ours - true).norm() < 1.5 * (theirs - true).norm() + 1e-3 * true.norm()
    assert (fused - exact).abs() < 0.02 * exact


def test_token_weights_weigh_the_objective_and_its_gradient(losses_, chunk_tokens):
    x, weight, targets = linear_batch()
    token_weights = torch.linspace(0, 2, 14).view(2, 7)
    fused = loss.linear_cross_entropy(
        x, weight, targets, z_loss_coefficient=0.1, token_weights_BS=token_weights
    )
    ours = torch.autograd.grad(fused.objective_sum, (x, weight))

    logits = F.linear(x, weight)
    nll = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(2, 7)
    logsumexp = logits.logsumexp(-1).where(targets != -100, 0)
    expected = (token_weights * (nll + 0.1 * logsumexp.square())).sum()
    torch.testing.assert_close(fused.objective_sum, expected)
    torch.testing.assert_close(fused.nll_BS, nll)
    for mine, theirs in zip(ours, torch.autograd.grad(expected, (x, weight)), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


def test_fused_keeps_no_logits():
    """Nothing as large as the logits outlives the forward pass."""
    x, weight, targets = linear_batch()
    fused = loss.linear_cross_entropy(x, weight, targets)
    sizes = [tensor.numel() for tensor in fused.objective_sum.grad_fn.saved_tensors]
    assert sorted(sizes) == sorted([x.numel(), weight.numel()])


@pytest.mark.parametrize("tokens", [1, 7, 64, 96, 97])
def test_chunks_cover_every_token_once(tokens, monkeypatch):
    monkeypatch.setitem(loss.CHUNK_LOGITS, "cpu", 10 * 11)
    chunks = list(loss._chunks(tokens, 11, "cpu"))
    assert [t for chunk in chunks for t in range(tokens)[chunk]] == list(range(tokens))
    assert all(len(range(tokens)[chunk]) <= 10 for chunk in chunks)


@pytest.mark.parametrize("pick", [0, 1])
def test_gradient_is_the_slope(pick):
    logits, targets = batch()
    value = lambda x: loss.cross_entropy(x, targets)[pick]
    (gradient,) = torch.autograd.grad(value(logits), logits)
    direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        slope = (value(logits + 1e-2 * direction) - value(logits - 1e-2 * direction)) / 2e-2
    torch.testing.assert_close((gradient * direction).sum(), slope, rtol=2e-3, atol=2e-3)


def test_extreme_logits_and_nothing_to_predict(losses_):
    logits = torch.tensor([[[1e4, -1e4], [-1e4, 1e4]]], requires_grad=True)
    result = loss.cross_entropy(logits, torch.tensor([[0, 0]]))
    result.nll_sum.backward()
    assert result.nll_sum == 2e4
    assert logits.grad.tolist() == [[[0, 0], [-1, 1]]]

    nothing = loss.cross_entropy(logits, torch.full((1, 2), -100))
    assert [x.item() for x in nothing] == [0, 0, 0]

    x, weight = torch.eye(2)[None], torch.tensor([[1e4, -1e4], [-1e4, 1e4]], requires_grad=True)
    fused = loss.linear_cross_entropy(x, weight, torch.tensor([[0, 0]]))
    fused.objective_sum.backward()
    assert fused.nll_BS.tolist() == [[0, 2e4]]
    assert weight.grad.tolist() == [[0, -1], [0, 1]]
    weight.grad = None
    loss.linear_cross_entropy(x, weight, torch.tensor([[-100, -100]])).objective_sum.backward()
    assert (weight.grad == 0).all()


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match=r"\(2, 6\).*\(2, 7, 11\)"):
        loss.cross_entropy(torch.zeros(2, 7, 11), torch.zeros(2, 6, dtype=torch.long))
    with pytest.raises(ValueError, match=r"\(2, 6\).*\(2, 7, 5\)"):
        loss.linear_cross_entropy(
            torch.zeros(2, 7, 5), torch.zeros(11, 5), torch.zeros(2, 6, dtype=torch.long)
        )


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")  # torch's compiler warns about itself
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kernel", [False, True])
def test_fused_on_a_gpu(dtype, kernel, monkeypatch):
    """Many chunks, one of them smaller, at the vocabulary's real size."""
    monkeypatch.setitem(loss.CHUNK_LOGITS, "cuda", 100 * 50_432)
    if not kernel:
        monkeypatch.setattr(loss, "find_losses", lambda *_: loss.losses_)
    torch.manual_seed(0)
    x = torch.randn(1, 411, 96, device="cuda").requires_grad_()
    weight = (torch.randn(50_432, 96, device="cuda") / 5).requires_grad_()
    targets = torch.randint(0, 50_432, (1, 411), device="cuda")
    targets[0, 5:9] = -100

    def run(function, low):
        with torch.autocast("cuda", dtype if low else torch.bfloat16, enabled=low and dtype != torch.float32):
            value = function()
        return value, *torch.autograd.grad(value, (x, weight))

    fused = lambda: loss.linear_cross_entropy(x, weight, targets, z_loss_coefficient=1e-3).objective_sum

    def plain():
        result = loss.cross_entropy(F.linear(x, weight), targets)
        return result.nll_sum + 1e-3 * result.z_sum

    tolerance = 1e-4 if dtype == torch.float32 else 1e-2
    for ours, true in zip(run(fused, True), run(plain, False), strict=True):
        assert (ours - true).norm() < tolerance * true.norm()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gradient_is_not_taken_for_the_targets_logit():
    """The gradient takes the logits' place: a warp that is late must not read it as the target's logit."""
    from open_lm.loss import kernel

    logits = torch.randn(8192, 50_432, device="cuda", dtype=torch.bfloat16) * 3
    targets = torch.randint(0, 50_432, (8192,), device="cuda")
    expected, _ = kernel.losses_(logits, targets, None, 0.0, -100, with_gradient=False)
    for _ in range(50):
        nll, _ = kernel.losses_(logits.clone(), targets, None, 0.0, -100, with_gradient=True)
        assert torch.equal(nll, expected)
