"""log.jsonl after deaths and resumes, and the pictures of the experts' shares."""

import json

import numpy as np
import pytest

from open_lm.log import open_jsonl
from open_lm.log.heat import MAX_COLUMNS, ShareHistory, draw
from open_lm.log.lines import read_lines, supersede


def test_resumed_lines_supersede_later_steps() -> None:
    lines = [{"run": {}}, *({"step": n, "try": 1} for n in (1, 2, 3, 4)), {"run": {}}, {"resumed": 2}]
    lines += [{"step": 3, "try": 2}, {"resumed": 2}, {"step": 3, "try": 3}]
    current, gone = supersede(lines)
    assert [(x["step"], x["try"]) for x in current if "step" in x] == [(1, 1), (2, 1), (3, 3)]
    assert [(x["step"], x["try"]) for x in gone] == [(3, 1), (4, 1), (3, 2)]
    assert sum("run" in x for x in current) == 2


def test_a_line_cut_off_by_a_death_is_left_out(tmp_path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "train/lo')
    assert read_lines(path) == [{"step": 1}]
    with open_jsonl(path) as file:
        file.write(json.dumps({"run": {}}) + "\n" + json.dumps({"step": 2}) + "\n")
    assert read_lines(path) == [{"step": 1}, {"run": {}}, {"step": 2}]
    with open_jsonl(path) as file:
        file.write("damage\n" + json.dumps({"step": 3}) + "\n")
    with pytest.raises(ValueError, match=r"log\.jsonl:5 is not JSON"):
        read_lines(path)


def test_share_history_is_bounded_and_exact() -> None:
    history, rng = ShareHistory(), np.random.default_rng(0)
    shares = rng.dirichlet(np.ones(4), size=1777)
    for line in shares:
        history.add(line)
    assert MAX_COLUMNS // 2 <= len(history.columns) < MAX_COLUMNS
    each = 2 ** int(np.ceil(np.log2(1777 / (MAX_COLUMNS - 1))))
    expected = shares[: 1777 // each * each].reshape(-1, each, 4).mean(axis=1)
    np.testing.assert_allclose(np.stack(history.columns), expected)
    assert history.picture().shape == (160, len(history.columns) + (1777 % each > 0), 3)


def test_colours_say_over_and_under() -> None:
    picture = draw(np.array([[0.5, 0.25], [0.125, 0.25], [0.25, 0.25], [0.125, 0.25]]))
    top, second, third = picture[0, 0], picture[41, 0], picture[81, 0]
    assert tuple(top) == (217, 115, 13)
    assert tuple(second) == (47, 111, 219)
    assert tuple(third) == (255, 255, 255)
    assert (picture[:, -1] == 255).all()
    assert picture.dtype == np.uint8
    assert draw(np.full((300, 700), 1 / 300)).shape == (300, 700, 3)
