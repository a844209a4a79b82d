"""--document-loss-mask: the first token of a document is no target."""

import pytest
import torch

from open_lm.config.data import DataConfig
from open_lm.data.masks import Masks, divide, find_masks


def test_the_target_behind_an_end_is_ignored():
    tokens_BL = torch.tensor([[5, 9, 6, 7, 9, 9, 8], [9, 1, 2, 3, 4, 5, 9]])
    inputs_BS, targets_BS = divide(tokens_BL, Masks(after=9))
    assert inputs_BS.tolist() == tokens_BL[:, :-1].tolist()
    assert targets_BS.tolist() == [[9, -100, 7, 9, -100, -100], [-100, 2, 3, 4, 5, 9]]


def test_flags():
    config = DataConfig(document_loss_mask=True)
    assert find_masks(config, 100, -1).after == 99
    assert find_masks(DataConfig(), 100, 4).after is None
    with pytest.raises(ValueError, match="--document-loss-mask needs --end-of-text"):
        find_masks(config, 100)
