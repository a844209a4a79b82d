"""`python moe/tables.py parameters` against the exact counts of open_lm's own models."""

import re
import subprocess
import sys
from pathlib import Path

from open_lm.config.parse import flag_types

SCRIPT = Path(__file__).parents[1] / "moe" / "tables.py"

EXACT = {  # open_lm's Transformer with MegaBlocks' MoE, counted by running it
    8: (68_884_704, 165_443_224, 360_639_744, 1_113_224_192, 2_420_092_416),
    32: (164_477_664, 439_855_384, 1_040_227_584, 3_529_438_208, 7_856_352_768),
    2: (44_986_464, 96_840_184, 190_742_784, 509_170_688, 1_061_027_328),
}


def test_parameters():
    command = [sys.executable, str(SCRIPT), "parameters"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "DIFFERS" not in printed
    for experts, counts in EXACT.items():
        (row,) = [line for line in printed.splitlines() if line.startswith(f"| {experts} experts |")]
        found = [
            (int(n.replace(",", "")), short) for n, short in re.findall(r"([\d,]+) \(([\d.]+[MB])\)", row)
        ]
        assert tuple(n for n, _ in found) == counts
        for n, short in found:
            scale = {"M": 1e6, "B": 1e9}[short[-1]]
            assert abs(n / scale - float(short[:-1])) <= 0.05, (n, short)


def test_every_flag_of_open_lm_has_a_row():
    """MOE.md's table is this one (tests/test_docs.py holds that); each flag stands in it with a text."""
    open_lms = Path(__file__).with_name("config").joinpath("open_lm_flags.txt").read_text().split()
    command = [sys.executable, str(SCRIPT), "flags"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    rows = dict(re.findall(r"^\| `--([a-z0-9-]+)` \|.*\| (.+) \|$", printed, re.MULTILINE))
    assert {name.replace("_", "-") for name in flag_types()} == set(rows)
    assert {entry.split("=", 1)[0] for entry in open_lms} <= set(rows)
    assert all(len(text) > 8 for text in rows.values())
