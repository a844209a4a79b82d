"""Runs' logs to one HTML page that opens anywhere: `python -m open_lm.report LOGS/RUN … --output report.html`."""

from collections.abc import Sequence
from pathlib import Path

from open_lm.report.page import make_figures, make_page
from open_lm.report.runs import Run, read_run


def write_report(folders: Sequence[Path], output: Path, title: str = "Report") -> list[Run]:
    """Reads the runs in `folders`, writes the page to `output`, returns the runs."""
    runs = [read_run(folder) for folder in folders]
    page = make_page(runs, title)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(page, encoding="utf-8")
    return runs


def write_figures(runs: Sequence[Run], folder: Path) -> list[Path]:
    """The page's charts of all runs together as files, NAME.svg, that stand alone; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, figure in make_figures(runs).items():
        paths.append(folder / f"{name}.svg")
        paths[-1].write_text(figure, encoding="utf-8")
    return paths
