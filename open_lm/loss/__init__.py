"""Cross-entropy of next tokens: from logits (the definition), and fused with the output projection.

Shapes: B sequences, S positions, T = B * S tokens, D model width, V vocabulary, C tokens of a chunk.
"""

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORE_INDEX = -100
# Logits alive at a time: enough to fill a GPU; on a CPU few enough to stay in its caches.
CHUNK_LOGITS = {"cuda": 2**28, "cpu": 2**21}


def real_positions(targets_BS: Tensor) -> Tensor | None:
    """real_BS, bool: False where neither this target nor a later one of the sequence counts; None if there is no
    such place, which costs a look at the last targets alone. For targets in host memory: elsewhere it waits.

    What is trained on sees none of those places, so they are padding, whatever made them so.
    """
    counted_BS = targets_BS != IGNORE_INDEX
    if counted_BS[:, -1:].all():
        return None
    return counted_BS.flip(1).long().cumsum(1).flip(1) > 0


class TokenLoss(NamedTuple):
    """Sums over the tokens whose target is not -100: divide by `tokens` (of the whole batch) for means."""

    nll_sum: Tensor
    """Negative log-likelihood in nats, fp32 scalar, differentiable."""
    z_sum: Tensor
    """Of logsumexp(logits)**2, fp32 scalar, differentiable (z-loss of PaLM, section 5)."""
    tokens: Tensor
    """How many, int64 scalar."""


def cross_entropy(logits_BSV: Tensor, targets_BS: Tensor) -> TokenLoss:
    """Sums of -log p(target) and logsumexp² over tokens, in fp32 whatever the dtype of the logits."""
    _check_shapes(logits_BSV, targets_BS)
    logits_TV, targets_T = logits_BSV.flatten(0, -2).float(), targets_BS.flatten()
    counted_T = targets_T != IGNORE_INDEX
    logsumexp_T = logits_TV.logsumexp(-1)
    target_logit_T = logits_TV.gather(-1, targets_T.where(counted_T, 0)[:, None]).squeeze(-1)
    nll_sum = (logsumexp_T - target_logit_T).where(counted_T, 0).sum()
    return TokenLoss(nll_sum, logsumexp_T.square().where(counted_T, 0).sum(), counted_T.sum())


class LinearLoss(NamedTuple):
    """What `linear_cross_entropy` returns; only `objective_sum` carries a gradient."""

    objective_sum: Tensor
    """Sum over tokens of weight * (nll + z_loss_coefficient * logsumexp²), fp32 scalar."""
    nll_BS: Tensor
    """Negative log-likelihood of each token in nats, fp32, 0 where the target is -100."""
    logsumexp_BS: Tensor
    """logsumexp(logits) of each token, fp32, 0 where the target is -100."""
    logit_mean: Tensor
    """Mean of all logits, of ignored tokens too, fp32 scalar."""

    def sums(self) -> Tensor:
        """(3,) float64: sums over tokens of nll and of logsumexp², and the logits' mean."""
        return torch.stack((self.nll_BS.sum(), self.logsumexp_BS.square().sum(), self.logit_mean)).double()


def linear_cross_entropy(
    x_BSD: Tensor,
    weight_VD: Tensor,
    targets_BS: Tensor,
    *,
    z_loss_coefficient: float = 0.0,
    token_weights_BS: Tensor | None = None,
) -> LinearLoss:
    """Cross-entropy (and z-loss) of the logits x @ weight.T, which never exist all at once.

    Equal to `cross_entropy(F.linear(x, weight), targets)`: logits have the dtype that autocast would give them,
    everything behind them is fp32. The gradients of x and weight are computed in the forward pass, chunk by
    chunk while the logits are at hand: three matrix products in all, and one kernel between them where there is
    Triton and a GPU. `token_weights_BS` (fp32, no gradient) weighs the tokens in the objective; None: all 1.
    """
    _check_shapes(x_BSD, targets_BS)
    if token_weights_BS is not None:
        _check_shapes(x_BSD, token_weights_BS)
        token_weights_BS = token_weights_BS.detach().float().flatten()
    x_TD, targets_T = x_BSD.flatten(0, -2), targets_BS.flatten()
    device = x_TD.device.type
    if torch.is_autocast_enabled(device):
        x_TD = x_TD.to(torch.get_autocast_dtype(device))
    objective, nll_T, logsumexp_T = _LinearCrossEntropy.apply(
        x_TD, weight_VD, targets_T, token_weights_BS, z_loss_coefficient, torch.is_grad_enabled()
    )
    with torch.no_grad():  # the mean of all products is the product of the means
        logit_mean = x_TD.mean(0, dtype=torch.float32).dot(weight_VD.mean(0, dtype=torch.float32))
    return LinearLoss(objective, nll_T.view_as(targets_BS), logsumexp_T.view_as(targets_BS), logit_mean)


def _check_shapes(per_token: Tensor, targets_BS: Tensor) -> None:
    if per_token.shape[:-1] != targets_BS.shape:
        raise ValueError(
            f"targets {tuple(targets_BS.shape)} do not belong to {tuple(per_token.shape)}: one target per "
            "position is needed"
        )


def _chunks(tokens: int, vocab_size: int, device: str) -> Iterator[slice]:
    """Equal slices of the tokens where a count near the ideal one divides them: each size is compiled once."""
    fewest = max(1, -(-tokens * vocab_size // CHUNK_LOGITS.get(device, CHUNK_LOGITS["cuda"])))
    count = next((n for n in range(fewest, min(2 * fewest, tokens)) if tokens % n == 0), fewest)
    size = -(-tokens // count)
    return (slice(start, start + size) for start in range(0, tokens, size))


def losses_(
    logits_CV: Tensor,
    targets_C: Tensor,
    weights_C: Tensor | None,
    z_loss_coefficient: float,
    ignored: int,
    *,
    with_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """nll_C and logsumexp_C in fp32, both 0 at ignored tokens; with the gradient, the objective's with respect to
    the logits takes their place. What open_lm/loss/kernel.py does in one kernel."""
    counted_C = targets_C != ignored
    logsumexp_C = logits_CV.float().logsumexp(-1)
    target_C1 = targets_C.where(counted_C, 0)[:, None]
    target_logit_C = logits_CV.gather(-1, target_C1).squeeze(-1).float()
    nll_C = (logsumexp_C - target_logit_C).where(counted_C, 0)
    if with_gradient:
        weight_C = counted_C.float() if weights_C is None else weights_C.where(counted_C, 0)
        # d nll = softmax - onehot;  d logsumexp² = 2 logsumexp softmax
        scale_C = (weight_C * (1 + 2 * z_loss_coefficient * logsumexp_C)).where(counted_C, 0)
        # at ignored tokens 0 * exp(logit - 0) could be 0 * inf
        shift_C = logsumexp_C.where(counted_C, torch.inf)
        gradient_CV = (logits_CV - shift_C[:, None]).exp_().mul_(scale_C[:, None])
        gradient_CV.scatter_add_(-1, target_C1, -weight_C[:, None])
        logits_CV.copy_(gradient_CV)
    return nll_C, logsumexp_C.where(counted_C, 0)


def find_losses(device: torch.device, dtype: torch.dtype) -> Callable[..., tuple[Tensor, Tensor]]:
    """The kernel where it runs, else its definition."""
    if device.type != "cuda" or dtype == torch.float64 or find_spec("triton") is None:
        return losses_
    from open_lm.loss import kernel

    return kernel.losses_


def _add_product_(sum_VD: Tensor, a_VC: Tensor, b_CD: Tensor) -> None:
    """sum += a @ b, a chunk's product kept in fp32 where the device can."""
    if sum_VD.dtype == a_VC.dtype:
        sum_VD.addmm_(a_VC, b_CD)
    elif a_VC.is_cuda:
        torch.addmm(sum_VD, a_VC, b_CD, out_dtype=torch.float32, out=sum_VD)
    else:
        sum_VD += a_VC @ b_CD


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        x_TD: Tensor,
        weight_VD: Tensor,
        targets_T: Tensor,
        token_weights_T: Tensor | None,
        z_loss_coefficient: float,
        with_gradient: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        losses_ = find_losses(x_TD.device, x_TD.dtype)
        with torch.autocast(x_TD.device.type, enabled=False):
            narrow_VD = weight_VD.detach().to(x_TD.dtype)
            x_TD = x_TD.detach()
            nll_T = torch.empty(targets_T.shape, dtype=torch.float32, device=x_TD.device)
            logsumexp_T = torch.empty_like(nll_T)
            if with_gradient:
                grad_x_TD = torch.empty_like(x_TD)
                grad_weight_VD = torch.zeros_like(narrow_VD, dtype=torch.float32)
            for chunk in _chunks(len(targets_T), len(narrow_VD), x_TD.device.type):
                logits_CV = x_TD[chunk] @ narrow_VD.t()
                weights_C = None if token_weights_T is None else token_weights_T[chunk]
                nll_T[chunk], logsumexp_T[chunk] = losses_(
                    logits_CV, targets_T[chunk], weights_C, z_loss_coefficient, IGNORE_INDEX,
                    with_gradient=with_gradient,
                )  # fmt: skip
                if with_gradient:  # whose place was the logits'
                    torch.mm(logits_CV, narrow_VD, out=grad_x_TD[chunk])
                    _add_product_(grad_weight_VD, logits_CV.t(), x_TD[chunk])
            objective_T = nll_T + z_loss_coefficient * logsumexp_T.square()
            objective = (objective_T if token_weights_T is None else token_weights_T * objective_T).sum()
        if with_gradient:
            ctx.save_for_backward(grad_x_TD, grad_weight_VD.to(weight_VD.dtype))
        ctx.mark_non_differentiable(nll_T, logsumexp_T)
        return objective, nll_T, logsumexp_T

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients: Tensor):
        grad_x_TD, grad_weight_VD = ctx.saved_tensors
        scale = gradients[0]
        return scale * grad_x_TD, scale * grad_weight_VD, None, None, None, None
