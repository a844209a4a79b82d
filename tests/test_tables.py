"""`python moe/tables.py parameters` against the exact counts of open_lm's own models."""

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "moe" / "tables.py"

EXACT = {  # open_lm's Transformer with MegaBlocks' MoE, counted by running it
    8: (68_884_704, 165_443_224, 360_639_744, 1_113_224_192, 2_420_092_416),
    32: (164_477_664, 439_855_384, 1_040_227_584, 3_529_438_208, 7_856_352_768),
    2: (44_986_464, 96_840_184, 190_742_784, 509_170_688, 1_061_027_328),
}


def test_parameters():
    command = [sys.executable, str(SCRIPT), "parameters"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    rows = [line.split() for line in printed.splitlines() if line.endswith((" yes", " NO"))]
    models = ("41m", "87m", "160m", "410m", "830m")
    expected = {(str(e), m, f"{n:,}") for e, row in EXACT.items() for m, n in zip(models, row, strict=True)}
    assert len(rows) == 15
    assert {tuple(row[:3]) for row in rows} == expected
    assert all(row[-1] == "yes" and row[3] == row[4] for row in rows)
