"""--averagers and --average: what they ask for, and the errors that a contradiction ends in."""

import shlex

import pytest

from open_lm.config.averaging import Averager, AveragingConfig, coefficients_of, parse_averagers
from open_lm.config.check import check
from open_lm.config.parse import parse

TRAIN = "--dataset-manifest A B --train-num-samples 1000000 "


def test_names_say_method_parameter_and_frequency() -> None:
    assert parse_averagers("ema_0.999_5,poly_8_10,none,ema,poly_2") == (
        Averager("ema_0.999_5", "ema", 0.999, 5),
        Averager("poly_8_10", "poly", 8, 10),
        Averager("ema", "ema", 0.99, 1),
        Averager("poly_2", "poly", 2, 1),
    )
    assert parse_averagers(None) == parse_averagers("none") == ()


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("cosine_1", "unknown method 'cosine'"),
        ("", "unknown method ''"),
        ("ema,", "unknown method ''"),
        ("ema_0.9_5_2", "--averagers ema_0.9_5_2: 4 parts"),
        ("ema_1", "gamma 1, expected 0 <= gamma < 1"),
        ("ema_-.1", "gamma -.1"),
        ("poly_-1", "eta -1"),
        ("poly_1e999", "eta 1e999"),
        ("ema_x", "'x' is no number"),
        ("ema_nan", "'nan' is no number"),
        ("ema_ .5", "no number"),
        ("ema_../.5", "no number"),
        ("ema_.9_0", "'0' steps"),
        ("ema_.9_1.5", "'1.5' steps"),
        ("ema_.9,poly,ema_.9", "ema_.9 is given twice"),
    ],
)
def test_wrong_names_are_quoted(names: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_averagers(names)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--averagers mean", "--averagers mean: unknown method"),
        ("--log-avg-model-training-loss -1 --averagers ema", "--log-avg-model-training-loss -1"),
        ("--log-avg-model-training-loss 5", "--log-avg-model-training-loss 5 needs --averagers"),
        ("--log-avg-model-training-loss 5 --averagers none", "needs --averagers"),
        ("--average a.pt", "--average a.pt: expected several"),
        ("--average a b --average-coefficients 1 2 3", "1.0 2.0 3.0: 3 for the 2 checkpoints"),
        ("--average a b --average-coefficients 1 nan", "finite"),
        ("--average-coefficients 1 2", "needs --average"),
        ("--average a b --resume c.pt", "--resume from c.pt"),
        ("--average a b --pretrained x.pt", "--pretrained from x.pt"),
    ],
)
def test_contradictions(line: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(*parse(shlex.split(TRAIN + line)))


def test_averagers_are_not_evaluated_beside_a_soup() -> None:
    with pytest.raises(ValueError, match="not beside --average"):
        check(*parse(shlex.split("--val-data V --average a b --averagers ema")))
    assert check(*parse(shlex.split("--val-data V --average a b"))) == []


def test_coefficients() -> None:
    assert coefficients_of(AveragingConfig(average=("a", "b", "c", "d"))) == (0.25,) * 4
    line = TRAIN + "--average a b --average-coefficients .5 1"
    (warning,) = check(*parse(shlex.split(line)))
    assert "sum to 1.5, not 1" in warning
    assert check(*parse(shlex.split(TRAIN + "--average a b --average-coefficients -.5 1.5"))) == []
