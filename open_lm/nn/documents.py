"""Where documents begin in a batch of packed sequences, so that attention and positions stay within each.

Shapes: B batch, S sequence, N documents in the batch (more in the tensor: the rest are empty).
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Documents(NamedTuple):
    """The documents of a batch, laid end to end as B*S positions; a row's first document begins with the row."""

    edge_N: Tensor
    """int32 (N + 1): where each begins, then where the last one ends; repeated to a power of two of documents, so
    that compiled code and kernels meet few shapes."""
    position_BS: Tensor
    """int64: each token's place in its document."""

    def to(self, device: torch.device) -> "Documents":
        """On the device, without waiting for it."""
        return Documents(*(x.to(device, non_blocking=True) for x in self))

    def number_BS(self) -> Tensor:
        """int64: each token's document, counted over the batch."""
        place_BS = torch.arange(self.position_BS.numel(), device=self.edge_N.device, dtype=torch.int32)
        # of empty documents at the same edge the last counts, alike for all tokens behind it
        return torch.searchsorted(self.edge_N, place_BS, right=True).view_as(self.position_BS)


def find_documents(tokens_BS: Tensor, end_of_text: int) -> Documents:
    """The documents of inputs in host memory: each begins behind an `end_of_text`, which ends the one before."""
    B, S = tokens_BS.shape
    begins_BS = torch.ones(B, S, dtype=torch.bool)
    begins_BS[:, 1:] = tokens_BS[:, :-1] == end_of_text
    start_N = begins_BS.flatten().nonzero()[:, 0]
    spare = (1 << max(len(start_N) - 1, 0).bit_length()) - len(start_N)
    edge_N = torch.cat((start_N, start_N.new_full((spare + 1,), B * S))).int()
    place_S = torch.arange(S)
    first_BS = torch.where(begins_BS, place_S, 0).cummax(dim=1).values
    return Documents(edge_N, place_S - first_BS)
