"""Masks against tables worked out by hand: 7 is the left mask, 0 the individual one (padding), _ is -100."""

import pytest
import torch

from open_lm.config import DataConfig
from open_lm.data.loader import TrainData, ValData
from open_lm.data.masks import NO_MASKS, Masks, divide, find_masks

_ = -100
LEFT, PADDING, BOTH, SQUASH = Masks(7), Masks(None, 0), Masks(7, 0), Masks(7, 0, True)

# (masks, sequence, inputs, targets)
TABLE = [
    (NO_MASKS, [1, 7, 2, 0], [1, 7, 2], [7, 2, 0]),
    # up to and including the last 7, counted among the targets
    (LEFT, [1, 2, 7, 3, 4], [1, 2, 7, 3], [_, _, 3, 4]),
    (LEFT, [1, 7, 2, 7, 3], [1, 7, 2, 7], [_, _, _, 3]),
    (LEFT, [1, 2, 3, 4, 7], [1, 2, 3, 4], [_, _, _, _]),
    (LEFT, [7, 1, 2, 3, 4], [7, 1, 2, 3], [1, 2, 3, 4]),  # is no target: masks nothing
    (LEFT, [1, 2, 3, 0, 0], [1, 2, 3, 0], [2, 3, 0, 0]),  # none
    # wherever it is; inputs stay
    (PADDING, [0, 1, 0, 2, 7], [0, 1, 0, 2], [1, _, 2, 7]),
    (PADDING, [1, 2, 0, 0, 0], [1, 2, 0, 0], [2, _, _, _]),
    (BOTH, [1, 7, 2, 0, 3], [1, 7, 2, 0], [_, 2, _, 3]),
    # open_lm's own example: a b c L d e L f P P
    (SQUASH, [1, 2, 3, 7, 4, 5, 7, 6, 0, 0], [1, 2, 3, 4, 5, 6, 0, 0, 0], [_, _, _, _, 6, _, _, _, _]),
    (SQUASH, [1, 7, 2, 3], [1, 2, 0], [2, 3, _]),
    (SQUASH, [1, 2, 3, 7], [1, 2, 3], [_, _, _]),
    (SQUASH, [1, 2, 3, 4], [1, 2, 3], [2, 3, 4]),
    (SQUASH, [7, 7, 7, 7], [0, 0, 0], [_, _, _]),
    # not open_lm's: it has targets 1 2 3 here, so that 1 would predict 1
    (SQUASH, [7, 1, 2, 3], [1, 2, 0], [2, 3, _]),
    (SQUASH, [7, 1, 7, 2], [1, 0, 0], [2, _, _]),
]


@pytest.mark.parametrize(("masks", "sequence", "inputs", "targets"), TABLE)
def test_by_hand(masks, sequence, inputs, targets):
    other = [5] * len(sequence)  # rows do not mix
    tokens_BL = torch.tensor([other, sequence, other])
    before = tokens_BL.clone()
    inputs_BS, targets_BS = divide(tokens_BL, masks)
    assert inputs_BS[1].tolist() == inputs
    assert targets_BS[1].tolist() == targets
    assert (inputs_BS[::2] == 5).all()
    assert (targets_BS[::2] == 5).all()
    assert torch.equal(tokens_BL, before)


def test_ids_count_from_the_end_as_in_open_lm():
    config = DataConfig(target_mask_left=-1, target_mask_individual=3, squash_mask_left=True)
    assert find_masks(config, 100) == (99, 3, True, None)
    assert find_masks(DataConfig(), 100) == NO_MASKS
    for name, value in (("target_mask_left", 100), ("target_mask_individual", -101)):
        flag = "--" + name.replace("_", "-")
        with pytest.raises(ValueError, match=rf"{flag} {value}: the model's vocabulary has the ids 0 … 99"):
            find_masks(DataConfig(**{name: value}), 100)
    with pytest.raises(
        ValueError, match=r"--target-mask-left -1 and --target-mask-individual 99 are the same"
    ):
        find_masks(DataConfig(target_mask_left=-1, target_mask_individual=99), 100)


@pytest.mark.parametrize("workers", [0, 1])
def test_training_and_evaluation_mask_alike(write_shard, tmp_path, workers):
    sequences = [[1, 2, 7, 3, -1], [7, 4, -1, 5, 6], [1, 2], [1, 2, 3, 4, 5]]
    path = write_shard(tmp_path / "a.tar", sequences)
    config = DataConfig(
        train_data=(path,), data_key="json", disable_buffer=True, workers=workers,
        target_mask_left=7, target_mask_individual=-1, squash_mask_left=True,
    )  # fmt: skip
    (batch,) = TrainData(config, 4, 10, 0, 1, 4, 0).batches(0, 1)
    masks = find_masks(config, 10)
    (held_out,) = ValData(path, "json", 4, 10, workers=workers, masks=masks).batches(4)
    assert held_out is not None
    for one in (batch, held_out):
        assert one.tokens_BS.tolist() == [[1, 2, 3, 9], [4, 9, 5, 9], [0, 0, 0, 0], [1, 2, 3, 4]]
        assert one.targets_BS.tolist() == [[_, 3, _, _], [_, 5, 6, _], [_] * 4, [2, 3, 4, 5]]
        assert one.n_bad == 1


def test_synthetic_data_are_masked_too():
    plain = DataConfig(dataset_type="synthetic", workers=0)
    masked = DataConfig(dataset_type="synthetic", workers=0, target_mask_individual=3)
    (a,) = TrainData(plain, 16, 5, 0, 1, 4, 0).batches(2, 3)
    (b,) = TrainData(masked, 16, 5, 0, 1, 4, 0).batches(2, 3)
    assert torch.equal(a.tokens_BS, b.tokens_BS)
    assert (a.targets_BS == 3).any()
    assert torch.equal(a.targets_BS.masked_fill(a.targets_BS == 3, _), b.targets_BS)


def test_the_fingerprint_says_the_masks_only_if_there_are_any():
    def fingerprint(**flags):
        config = DataConfig(dataset_type="synthetic", **flags)
        return TrainData(config, 4, 10, 0, 1, 4, 0).fingerprint()

    plain = fingerprint()
    assert "masks" not in plain  # equal to those of checkpoints from before there were masks
    left, end = fingerprint(target_mask_left=9), fingerprint(target_mask_left=-1)
    assert left == end == plain | {"masks": {"left": 9, "individual": None, "squash": False}}
    assert fingerprint(target_mask_left=9, target_mask_individual=1) != left
