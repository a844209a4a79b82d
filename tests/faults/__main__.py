"""`make faults`, `make faults ONLY=4,16`: every fault, what is expected and what was seen. Status 1 if any fails.

python -m tests.faults [--only 4,16] [--quick] [--output FILE.json]
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
import traceback
from pathlib import Path

from rich.console import Console
from rich.table import Table

from open_lm.log import commit
from tests.faults import checkpoints, data, numbers, processes
from tests.faults.runs import FAULTS

GROUPS = (checkpoints, data, numbers, processes)  # each fills FAULTS


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="numbers, with commas")
    parser.add_argument("--quick", action="store_true", help="fewer repetitions, as the test suite does")
    parser.add_argument("--output", help="a JSON file for the results")
    options = parser.parse_args()
    chosen = [int(n) for n in options.only.split(",") if n] or sorted(FAULTS)
    if unknown := [n for n in chosen if n not in FAULTS]:
        parser.error(f"--only {options.only}: there is no fault {unknown[0]}; they are 1 … {max(FAULTS)}")
    console = Console(width=max(Console().width, 150))
    results = []
    for number in chosen:
        one = FAULTS[number]
        folder = Path(tempfile.mkdtemp(prefix=f"open_lm-fault-{number}-"))
        started = time.monotonic()
        try:
            seen, passed = one.run(folder, options.quick), True
        except Exception as error:
            seen, passed = f"{type(error).__name__}: {error}", False
            if not isinstance(error, AssertionError):
                traceback.print_exc()
        seconds = time.monotonic() - started
        results.append(
            {"number": number, "fault": one.text, "expected": one.expected,
             "seen": seen.replace(str(folder), "…"), "seconds": round(seconds, 1), "passed": passed}
        )  # fmt: skip
        console.print(
            f"{number:2} {'PASS' if passed else 'FAIL'} {seconds:6.1f} s  {one.text}: {seen}", markup=False
        )
        if passed:
            shutil.rmtree(folder, ignore_errors=True)
        else:
            console.print(f"   its files: {folder}", markup=False)
    table = Table("no", "fault", "expected", "seen", "seconds", "", show_lines=True)
    for r in results:
        colour = "green" if r["passed"] else "red"
        cells = (str(r["number"]), r["fault"], r["expected"], r["seen"][:400], f"{r['seconds']:.1f}")
        table.add_row(
            *(c.replace("[", "\\[") for c in cells), f"[{colour}]{'PASS' if r['passed'] else 'FAIL'}"
        )
    console.print(table)
    passed = sum(r["passed"] for r in results)
    console.print(f"{passed} of {len(results)}")
    if options.output:
        record = {"commit": commit(), "cores": os.cpu_count(), "faults": results}
        Path(options.output).write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    return 0 if passed == len(results) else 1


if __name__ == "__main__":
    sys.exit(main())
