"""--train-data-upsampling-factors: a source is read as often as its size times its factor says."""

from collections import Counter

import pytest

from open_lm.config import DataConfig
from open_lm.data.loader import TrainData
from open_lm.main import main

SEQ_LEN = 4


@pytest.fixture
def sources(write_source, tmp_path):
    """60 sequences of tokens 0 … 59, 20 of 500 … 519."""
    return (write_source(tmp_path / "a", [40, 20]), write_source(tmp_path / "b", [20], first=500))


def open_data(sources, factors, **changes):
    config = DataConfig(
        dataset_manifest=sources, data_key="json", workers=0, train_data_upsampling_factors=factors, **changes
    )
    return TrainData(config, SEQ_LEN, 1000, rank=0, world_size=1, global_batch=12, seed=3)


@pytest.mark.parametrize("factors", [("1", "3"), ("1::3",)])
def test_a_source_is_read_factor_times_while_the_others_are_read_once(sources, factors):
    data = open_data(sources, factors)
    data.check_enough(10)  # 60 + 3 * 20 sequences
    seen = Counter(i for batch in data.batches(0, 10) for i in batch.tokens_BS[:, 0].tolist())
    assert seen == {**dict.fromkeys(range(60), 1), **dict.fromkeys(range(500, 520), 3)}
    with pytest.raises(
        ValueError, match=r"source 1 .* holds 20 sequences, 60 at its factor of 3.0, .* needs 6"
    ):
        data.check_enough(11)
    open_data(sources, factors, multiple_data_passes=True).check_enough(11)


def test_a_factor_below_one_leaves_a_source_whole(sources):
    data = open_data(sources, ("0.5", "1"))
    assert data.order.counts(6) in ([43, 29], [44, 28])  # 30 : 20
    with pytest.raises(ValueError, match=r"source 1 .* holds 20 sequences, the run needs 2"):
        data.check_enough(6)
    data.check_enough(4)


def test_the_fingerprint_has_factors_only_where_they_are_given(sources):
    plain = open_data(sources, None).fingerprint()
    assert "factors" not in plain
    assert open_data(sources, ("1", "3")).fingerprint()["factors"] == ["1", "3"]


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        (("1",), "upsampling-factors 1: 1 factors for 2 sources"),
        (("1", "x"), "1::x: a factor must be a number"),
        (("1", "-1"), "factors must be 0 or more"),
        (("0", "0"), "not 0 for every source"),
    ],
)
def test_factors_that_cannot_be_are_refused(sources, factors, message):
    with pytest.raises(ValueError, match=message):
        open_data(sources, factors)


def test_factors_and_weights_are_not_given_together(sources, capsys):
    flags = f"--dataset-manifest {sources[0]} {sources[1]} --train-num-samples 100"
    both = "--train-data-upsampling-factors 1::2 --train-data-mix-weights 1 1"
    with pytest.raises(SystemExit):
        main(f"--model open_lm_test_tiny {flags} {both}".split())
    message = capsys.readouterr().err
    assert (
        "--train-data-upsampling-factors 1::2 and --train-data-mix-weights 1.0 1.0 are both given" in message
    )
