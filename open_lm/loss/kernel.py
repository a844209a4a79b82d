"""One Triton kernel for what lies between the matrix products of `linear_cross_entropy`: a row of logits is read
twice, the second time from the GPU's cache, and its gradient takes its place.

Shapes: C tokens of a chunk, V vocabulary.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096
WARPS = 8
LEAST = tl.constexpr(-1e38)  # as a maximum's start: -inf would give NaN, as inf - inf


@triton.jit
def _rows(
    logits_CV, target_C, weight_C, nll_C, logsumexp_C, stride, vocab_size, z, ignored,
    BLOCK: tl.constexpr, WEIGHTED: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    """Row by row, fp32: nll, logsumexp and, in place of the logits, the gradient of nll + z * logsumexp²."""
    row = tl.program_id(0)
    logits = logits_CV + row.to(tl.int64) * stride
    columns = tl.arange(0, BLOCK)
    target = tl.load(target_C + row)
    counts = target != ignored
    target = tl.where(counts, target, 0)
    # Here, as the sums below wait for all warps: later, another warp may have stored the gradient in its place.
    at_target = tl.load(logits + target).to(tl.float32)
    # a maximum and a sum per column of the block: no exchange between threads before the row's end
    most = tl.full([BLOCK], LEAST, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocab_size, BLOCK):
        at = start + columns
        # kept in the cache for the second time, then given up
        x = tl.load(logits + at, mask=at < vocab_size, other=LEAST, eviction_policy="evict_last").to(
            tl.float32
        )
        higher = tl.maximum(most, x)
        total = total * tl.exp(most - higher) + tl.exp(x - higher)
        most = higher
    top = tl.max(most, 0)
    logsumexp = top + tl.log(tl.sum(total * tl.exp(most - top), 0))

    tl.store(nll_C + row, tl.where(counts, logsumexp - at_target, 0.0))
    tl.store(logsumexp_C + row, tl.where(counts, logsumexp, 0.0))
    if GRADIENT:
        weight = 1.0
        if WEIGHTED:
            weight = tl.load(weight_C + row)
        weight = tl.where(counts, weight, 0.0)
        # d nll = softmax - onehot;  d logsumexp² = 2 logsumexp softmax
        scale = weight * (1.0 + 2.0 * z * logsumexp)
        for start in range(0, vocab_size, BLOCK):
            at = start + columns
            x = tl.load(logits + at, mask=at < vocab_size, other=LEAST, eviction_policy="evict_first")
            x = x.to(tl.float32)
            gradient = scale * tl.exp(x - logsumexp) - tl.where(at == target, weight, 0.0)
            # an ignored token's logits may be infinite: 0 * inf
            gradient = tl.where(counts, gradient, 0.0)
            gradient = gradient.to(logits_CV.dtype.element_ty)
            tl.store(logits + at, gradient, mask=at < vocab_size, eviction_policy="evict_first")


def losses_(
    logits_CV: Tensor,
    targets_C: Tensor,
    weights_C: Tensor | None,
    z_loss_coefficient: float,
    ignored: int,
    *,
    with_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """(nll_C, logsumexp_C) in fp32, 0 at ignored tokens; with the gradient, it is left in `logits_CV`, times
    `weights_C`. Logits of float32, bfloat16 or float16, rows contiguous."""
    nll_C = torch.empty(len(logits_CV), dtype=torch.float32, device=logits_CV.device)
    logsumexp_C = torch.empty_like(nll_C)
    if len(logits_CV):
        _rows[(len(logits_CV),)](
            logits_CV, targets_C, nll_C if weights_C is None else weights_C, nll_C, logsumexp_C,
            logits_CV.stride(0), logits_CV.shape[1], z_loss_coefficient, ignored,
            BLOCK=min(BLOCK, triton.next_power_of_2(logits_CV.shape[1])),
            WEIGHTED=weights_C is not None, GRADIENT=with_gradient,
            num_warps=WARPS,  # pyright: ignore[reportCallIssue]
        )  # fmt: skip
    return nll_C, logsumexp_C
