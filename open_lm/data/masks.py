"""Loss masks: which tokens of a sequence are targets (open_lm's --target-mask-… and --squash-mask-left).

Legend: B sequences, S positions, L = S + 1 tokens of a stored sequence.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from open_lm.config.data import DataConfig

IGNORED = -100


class Masks(NamedTuple):
    """Token ids, in the vocabulary; None: no such mask."""

    left: int | None = None
    """Targets up to and including its last occurrence among the targets are ignored."""
    individual: int | None = None
    """Never a target."""
    squash: bool = False
    """Tokens `left` themselves are taken out, and `individual` fills up at the right."""
    after: int | None = None
    """A target whose input is this token is ignored: a document ends with it."""


NO_MASKS = Masks()


def find_masks(config: DataConfig, vocab_size: int, end_of_text: int | None = None) -> Masks:
    """The masks of the flags. A negative id counts from the vocabulary's end, as in open_lm: -1 is its last.

    ValueError: ids outside the vocabulary, or both the same.
    """
    ids: list[int | None] = []
    for flag in ("target_mask_left", "target_mask_individual"):
        given = getattr(config, flag)
        if given is not None and not -vocab_size <= given < vocab_size:
            raise ValueError(
                f"--{flag.replace('_', '-')} {given}: the model's vocabulary has the ids 0 … {vocab_size - 1} "
                f"(-1 … -{vocab_size} count from its end)"
            )
        ids.append(None if given is None else given % vocab_size)
    left, individual = ids
    if left is not None and left == individual:
        raise ValueError(
            f"--target-mask-left {config.target_mask_left} and --target-mask-individual "
            f"{config.target_mask_individual} are the same token of {vocab_size}: give two"
        )
    if config.document_loss_mask and end_of_text is None:
        raise ValueError("--document-loss-mask needs --end-of-text ID: which token ends a document")
    after = end_of_text % vocab_size if config.document_loss_mask and end_of_text is not None else None
    return Masks(left, individual, config.squash_mask_left, after)


def divide(tokens_BL: Tensor, masks: Masks = NO_MASKS) -> tuple[Tensor, Tensor]:
    """Inputs (all tokens but the last) and targets (all but the first), (B, S) each, -100 where masked.

    As in open_lm, but for a sequence that begins with `left` and is squashed: there open_lm's targets are one
    position behind its inputs, so that a token predicts itself.
    """
    inputs_BS, targets_BS = tokens_BL[:, :-1], tokens_BL[:, 1:].clone()
    if masks.left is not None:
        to_come_BS = (targets_BS == masks.left).flip(-1).cumsum(-1).flip(-1)  # here or further right
        targets_BS[to_come_BS > 0] = IGNORED
    if masks.after is not None:
        targets_BS[inputs_BS == masks.after] = IGNORED
    if masks.squash:
        assert masks.left is not None
        assert masks.individual is not None
        kept_BL = tokens_BL != masks.left
        # the first token stays in while squashing: what comes first afterwards has no input to predict it from
        labels_BL = torch.cat((tokens_BL[:, :1], targets_BS), dim=1)
        inputs_BS = squash(inputs_BS, kept_BL[:, :-1], masks.individual)
        targets_BS = squash(labels_BL, kept_BL, masks.individual)[:, 1:]
    if masks.individual is not None:
        targets_BS = targets_BS.masked_fill(targets_BS == masks.individual, IGNORED)
    return inputs_BS.contiguous(), targets_BS.contiguous()


def squash(values: Tensor, kept: Tensor, padding: int) -> Tensor:
    """Each row's kept values moved to its beginning, in their order; `padding` after them."""
    rows, columns = kept.nonzero(as_tuple=True)
    squashed = torch.full_like(values, padding)
    squashed[rows, kept.cumsum(-1)[rows, columns] - 1] = values[rows, columns]
    return squashed
