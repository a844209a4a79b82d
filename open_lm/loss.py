"""Cross-entropy of next tokens, in sums, so that means over micro-batches and ranks can be exact.

Shapes: B sequences, S positions, V vocabulary, T = B * S tokens.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORE_INDEX = -100
CHUNK_LOGITS = 2**24  # fp32 numbers alive at a time (64 MiB), however large the batch


class TokenLoss(NamedTuple):
    """Sums over the tokens whose target is not -100: divide by `tokens` (of the whole batch) for means."""

    nll_sum: Tensor
    """Negative log-likelihood in nats, fp32 scalar, differentiable."""
    z_sum: Tensor
    """Of logsumexp(logits)**2, fp32 scalar, differentiable (z-loss of PaLM, section 5)."""
    tokens: Tensor
    """How many, int64 scalar."""


def cross_entropy(logits_BSV: Tensor, targets_BS: Tensor) -> TokenLoss:
    """Sums of -log p(target) and logsumexp² over tokens, in fp32 whatever the dtype of the logits.

    Neither forward nor backward holds a whole fp32 copy of logits that are not fp32.
    """
    _check_shapes(logits_BSV, targets_BS)
    logits_TV, targets_T = logits_BSV.flatten(0, -2), targets_BS.flatten()
    nll_sum, z_sum = _ChunkedCrossEntropy.apply(logits_TV, targets_T)
    return TokenLoss(nll_sum, z_sum, (targets_T != IGNORE_INDEX).sum())


@torch.no_grad()
def token_nll(logits_BSV: Tensor, targets_BS: Tensor) -> Tensor:
    """nll_BS, fp32 nats, 0 where the target is -100; without gradient."""
    _check_shapes(logits_BSV, targets_BS)
    nll_T, _ = _nll_and_logsumexp(logits_BSV.flatten(0, -2), targets_BS.flatten())
    return nll_T.view_as(targets_BS)


def _check_shapes(logits_BSV: Tensor, targets_BS: Tensor) -> None:
    if logits_BSV.shape[:-1] != targets_BS.shape:
        raise ValueError(
            f"targets {tuple(targets_BS.shape)} do not belong to logits {tuple(logits_BSV.shape)}: "
            "one target per position is needed"
        )


def _chunks(logits_TV: Tensor) -> Iterator[slice]:
    n_tokens, n_vocab = logits_TV.shape
    size = max(1, CHUNK_LOGITS // n_vocab)
    return (slice(start, start + size) for start in range(0, n_tokens, size))


def _nll_and_logsumexp(logits_TV: Tensor, targets_T: Tensor) -> tuple[Tensor, Tensor]:
    """nll_T and logsumexp_T in fp32, both 0 at ignored tokens."""
    nll_T = torch.zeros(targets_T.shape, dtype=torch.float32, device=logits_TV.device)
    logsumexp_T = torch.zeros_like(nll_T)
    counted_T = targets_T != IGNORE_INDEX
    for chunk in _chunks(logits_TV):
        logits, counted = logits_TV[chunk].float(), counted_T[chunk]
        logsumexp = logits.logsumexp(-1)
        target_logit = logits.gather(-1, targets_T[chunk].where(counted, 0).unsqueeze(-1)).squeeze(-1)
        nll_T[chunk] = torch.where(counted, logsumexp - target_logit, 0)
        logsumexp_T[chunk] = torch.where(counted, logsumexp, 0)
    return nll_T, logsumexp_T


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Keeps the logits as they are and a logsumexp per token; autograd would keep fp32 log-probabilities."""

    @staticmethod
    def forward(ctx, logits_TV: Tensor, targets_T: Tensor) -> tuple[Tensor, Tensor]:
        nll_T, logsumexp_T = _nll_and_logsumexp(logits_TV, targets_T)
        ctx.save_for_backward(logits_TV, targets_T, logsumexp_T)
        return nll_T.sum(), logsumexp_T.square().sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor, None]:
        grad_nll, grad_z = gradients
        logits_TV, targets_T, logsumexp_T = ctx.saved_tensors
        counted_T = targets_T != IGNORE_INDEX
        grad_TV = torch.empty_like(logits_TV)
        for chunk in _chunks(logits_TV):
            logsumexp, counted = logsumexp_T[chunk].unsqueeze(-1), counted_T[chunk].unsqueeze(-1)
            # d nll = softmax - onehot;  d logsumexp² = 2 logsumexp softmax
            grad = (logits_TV[chunk].float() - logsumexp).exp_()
            grad *= grad_nll + 2 * grad_z * logsumexp
            target = targets_T[chunk].unsqueeze(-1).where(counted, 0)
            grad.scatter_add_(-1, target, -grad_nll.expand_as(target).to(grad.dtype))
            grad_TV[chunk] = grad.masked_fill_(~counted, 0)
        return grad_TV, None
