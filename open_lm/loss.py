"""Cross-entropy of next tokens: from logits (the definition), and fused with the output projection.

Shapes: B sequences, S positions, T = B * S tokens, D model width, V vocabulary, C tokens of a chunk.
"""

import functools
from collections.abc import Callable, Iterator
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
    """Sum over tokens of nll + z_loss_coefficient * logsumexp², fp32 scalar."""
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
    compiled: bool = False,
) -> LinearLoss:
    """Cross-entropy (and z-loss) of the logits x @ weight.T, which never exist all at once.

    Equal to `cross_entropy(F.linear(x, weight), targets)`: logits have the dtype that autocast would give them,
    everything behind them is fp32. The gradients of x and weight are computed in the forward pass, chunk by
    chunk while the logits are at hand: three matrix products in all. `compiled` fuses what lies between them.
    """
    _check_shapes(x_BSD, targets_BS)
    x_TD, targets_T = x_BSD.flatten(0, -2), targets_BS.flatten()
    device = x_TD.device.type
    if torch.is_autocast_enabled(device):
        x_TD = x_TD.to(torch.get_autocast_dtype(device))
    objective, nll_T, logsumexp_T = _LinearCrossEntropy.apply(
        x_TD, weight_VD, targets_T, z_loss_coefficient, compiled, torch.is_grad_enabled()
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


def _losses(logits_CV: Tensor, targets_C: Tensor) -> tuple[Tensor, Tensor]:
    """nll_C and logsumexp_C in fp32, both 0 at ignored tokens."""
    counted_C = targets_C != IGNORE_INDEX
    logsumexp_C = logits_CV.float().logsumexp(-1)
    target_C1 = targets_C.where(counted_C, 0)[:, None]
    target_logit_C = logits_CV.gather(-1, target_C1).squeeze(-1).float()
    return (logsumexp_C - target_logit_C).where(counted_C, 0), logsumexp_C.where(counted_C, 0)


def _losses_and_gradient(
    logits_CV: Tensor, targets_C: Tensor, z_loss_coefficient: float
) -> tuple[Tensor, Tensor, Tensor]:
    """As `_losses`, and the objective's gradient with respect to the logits."""
    nll_C, logsumexp_C = _losses(logits_CV, targets_C)
    counted_C = targets_C != IGNORE_INDEX
    # d nll = softmax - onehot;  d logsumexp² = 2 logsumexp softmax
    scale_C = (1 + 2 * z_loss_coefficient * logsumexp_C).where(counted_C, 0)
    # at ignored tokens 0 * exp(logit - 0) could be 0 * inf
    shift_C = logsumexp_C.where(counted_C, torch.inf)
    grad_CV = (logits_CV - shift_C[:, None]).exp_().mul_(scale_C[:, None]).to(logits_CV.dtype)
    at_target_C = (scale_C * (-nll_C).exp() - 1).where(counted_C, 0)
    target_C1 = targets_C.where(counted_C, 0)[:, None]
    grad_CV.scatter_(-1, target_C1, at_target_C[:, None].to(grad_CV.dtype))
    return nll_C, logsumexp_C, grad_CV


@functools.cache
def _compiled(function: Callable) -> Callable:
    return torch.compile(function, dynamic=False)


def _add_product_(sum_VD: Tensor, a_VC: Tensor, b_CD: Tensor) -> None:
    """sum += a @ b, a chunk's product kept in fp32 where the device can."""
    if sum_VD.dtype == a_VC.dtype:
        sum_VD.addmm_(a_VC, b_CD)
    elif a_VC.is_cuda:
        sum_VD += torch.mm(a_VC, b_CD, out_dtype=torch.float32)
    else:
        sum_VD += a_VC @ b_CD


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        x_TD: Tensor,
        weight_VD: Tensor,
        targets_T: Tensor,
        z_loss_coefficient: float,
        compiled: bool,
        with_gradient: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        losses, losses_and_gradient = _losses, _losses_and_gradient
        if compiled:
            losses, losses_and_gradient = _compiled(losses), _compiled(losses_and_gradient)
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
                if not with_gradient:
                    nll_T[chunk], logsumexp_T[chunk] = losses(logits_CV, targets_T[chunk])
                    continue
                nll_T[chunk], logsumexp_T[chunk], grad_CV = losses_and_gradient(
                    logits_CV, targets_T[chunk], z_loss_coefficient
                )
                torch.mm(grad_CV, narrow_VD, out=grad_x_TD[chunk])
                _add_product_(grad_weight_VD, grad_CV.t(), x_TD[chunk])
            objective = nll_T.sum() + z_loss_coefficient * logsumexp_T.square().sum()
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
