"""python -m open_lm.report LOGS/RUN [LOGS/RUN2 …] --output report.html"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from open_lm.report import write_figures, write_report


@dataclass(frozen=True)
class ReportConfig:
    """Write one HTML page about one or more runs: loss, held-out perplexity, what the experts did."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """The runs' folders, LOGS/NAME; the first is the one that the others are compared with."""

    output: Path = Path("report.html")
    """The page."""

    title: str = "Report"
    """Its heading."""

    figures: Path | None = None
    """Write the charts into this folder too, as .svg files."""


def main() -> None:
    config = tyro.cli(ReportConfig)
    try:
        runs = write_report(config.runs, config.output, config.title)
    except ValueError as error:
        sys.exit(f"open_lm.report: error: {error}")
    print(f"wrote {config.output}")
    if config.figures:
        print("wrote", *write_figures(runs, config.figures))


if __name__ == "__main__":
    main()
