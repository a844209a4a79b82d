"""What is refused of time-outs and skipped updates, and what a restart goes on from."""

import shlex

import pytest

from open_lm.config.check import check
from open_lm.config.parse import parse
from open_lm.config.survival import after_restart

RUN = "--dataset-type synthetic --train-num-samples 640"


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--collective-timeout 0", "--collective-timeout 0: expected seconds"),
        ("--hang-timeout -1", "--hang-timeout -1: expected seconds, or 0"),
        ("--max-skipped-updates 0", "--max-skipped-updates 0: expected at least 1"),
        ("--skip-loss-spikes 0", "--skip-loss-spikes 0: expected more than 0"),
        ("--skip-loss-spikes 6 --loss-spike-window 3", "--loss-spike-window 3: expected at least 8"),
    ],
)
def test_refused(flags: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        check(*parse(shlex.split(f"{RUN} {flags}")))


def test_what_does_nothing_is_said() -> None:
    run, given = parse(
        shlex.split(f"{RUN} --loss-spike-window 50 --hang-timeout 900 --collective-timeout 600")
    )
    notes = check(run, given)
    assert any("--loss-spike-window does nothing" in note for note in notes)
    assert any("--hang-timeout 900 > --collective-timeout 600" in note for note in notes)
    assert not check(*parse(shlex.split(f"{RUN} --stop-signals TERM --skip-loss-spikes 6 --deterministic")))


def test_a_restart_goes_on_from_the_newest_state() -> None:
    def restarted(flags: str, restarts: int = 1) -> tuple:
        run, _ = parse(shlex.split(f"{RUN} {flags}"))
        again, notes = after_restart(run, restarts, trains=True)
        options = again.checkpoint
        assert bool(notes) == bool(restarts)
        return options.resume, options.pretrained, options.load_pretrained_state

    assert restarted("", 0) == (None, None, False)
    assert restarted("") == ("latest", None, False)
    assert restarted("--resume latest") == ("latest", None, False)
    assert restarted("--pretrained w.pt") == ("latest", "w.pt", False)
    # its own newest checkpoint; before there is one, what the first start went on from
    assert restarted("--resume a/epoch_3.pt") == ("latest", "a/epoch_3.pt", True)
