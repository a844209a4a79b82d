"""Charts as strings of SVG: pure functions, colours by CSS class, so that a page decides on light and dark.

Every number and name is escaped. Coordinates are rounded, so equal data give equal bytes.
Classes: `s0` … `s5` a series' colour (stroke of lines, fill of points and bars), `grid`, `axis`, `reference`,
`over` and `under` a heat map's two sides, `label` text.
"""

import math
from collections.abc import Callable, Sequence
from html import escape
from itertools import groupby, pairwise
from typing import NamedTuple

COLOURS = 6
MAX_POINTS = 400
MAX_CELLS = 6000


class Series(NamedTuple):
    """A named line; `points` are drawn as dots joined by dashes. Values that are not finite are left out."""

    name: str
    colour: int
    line: Sequence[tuple[float, float]]
    points: Sequence[tuple[float, float]] = ()


class Scale(NamedTuple):
    """Maps [low, high] to pixels [start, end]."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> str:
        share = (value - self.low) / ((self.high - self.low) or 1.0)
        return pixel(self.start + share * (self.end - self.start))


def pixel(value: float) -> str:
    """One decimal at most: `12.3`, `12`."""
    return f"{value:.1f}".removesuffix(".0")


def short(value: float) -> str:
    """A number for an axis or label: 0.25, 3.5, 820K, 1.2M."""
    for size, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(value) >= size:
            return f"{value / size:.3g}{suffix}"
    return f"{value:.3g}"


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers within [low, high]; steps of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / count
    if not rough > 0:
        return [low]
    power = 10 ** math.floor(math.log10(rough))
    step = power * min((1, 2, 5, 10), key=lambda m: abs(math.log(m * power / rough)))
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def thin(points: Sequence[tuple[float, float]], most: int = MAX_POINTS) -> list[tuple[float, float]]:
    """Finite points; where there are more than `most`, means of equal runs of neighbours."""
    finite = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    if len(finite) <= most:
        return finite
    edges = [round(i * len(finite) / most) for i in range(most + 1)]
    runs = [finite[a:b] for a, b in pairwise(edges)]
    return [(sum(x for x, _ in run) / len(run), sum(y for _, y in run) / len(run)) for run in runs]


def spread(positions: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """The positions moved as little as needed to be `gap` apart within [low, high], in the same order."""
    order = sorted(range(len(positions)), key=lambda i: positions[i])
    moved = [min(max(positions[i], low), high) for i in order]
    for i in range(1, len(moved)):
        moved[i] = max(moved[i], moved[i - 1] + gap)
    for i in reversed(range(len(moved))):
        moved[i] = min(moved[i], high - (len(moved) - 1 - i) * gap)
    placed = [0.0] * len(positions)
    for i, position in zip(order, moved, strict=True):
        placed[i] = position
    return placed


def text(
    x: str | float, y: str | float, content: str, *, anchor: str = "start", classes: str = "label"
) -> str:
    x, y = (v if isinstance(v, str) else pixel(v) for v in (x, y))
    return f'<text class="{classes}" x="{x}" y="{y}" text-anchor="{anchor}">{escape(content)}</text>'


def svg(width: float, height: float, title: str, parts: Sequence[str]) -> str:
    """The whole element; `title` is what a screen reader says."""
    head = f'<svg viewBox="0 0 {pixel(width)} {pixel(height)}" role="img" aria-label="{escape(title)}">'
    return "\n".join([head, f"<title>{escape(title)}</title>", *parts, "</svg>"])


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    reference: tuple[float, str] | None = None,
    from_zero: bool = False,
    y_format: Callable[[float], str] = short,
    size: tuple[int, int] = (920, 360),
) -> str:
    """Lines over a common x axis from 0, each named at its right end; a dashed `reference` (y, name)."""
    width, height = size
    lines = [(s, thin(s.line), thin(s.points)) for s in series]
    drawn = [point for _, line, points in lines for point in (*line, *points)]
    values = [y for _, y in drawn] + ([reference[0]] if reference else [])
    if not drawn:
        return svg(width, 40, title, [text(0, 24, f"{title}: no values logged")])
    low, high = (0.0 if from_zero else min(values)), max(values)
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    low, high = (low if from_zero else low - margin), high + margin
    name_width = 12 + 7.6 * max(len(s.name) for s, _, _ in lines)
    x_of = Scale(0, max(x for x, _ in drawn), 52, width - max(70, name_width))
    y_of = Scale(low, high, height - 40, 26)
    parts = [text(0, 13, y_label)]
    for value in ticks(low, high):
        parts.append(f'<path class="grid" d="M{pixel(x_of.start)} {y_of(value)}H{pixel(x_of.end)}"/>')
        parts.append(text(x_of.start - 8, float(y_of(value)) + 4, y_format(value), anchor="end"))
    for value in ticks(0, x_of.high, width // 120):
        parts.append(text(x_of(value), y_of.start + 18, short(value), anchor="middle"))
    parts.append(f'<path class="axis" d="M{pixel(x_of.start)} {pixel(y_of.start)}H{pixel(x_of.end)}"/>')
    parts.append(text(x_of.end, height - 6, x_label, anchor="end"))
    if reference:
        level = y_of(reference[0])
        parts.append(f'<path class="reference" d="M{pixel(x_of.start)} {level}H{pixel(x_of.end)}"/>')
        parts.append(text(x_of.start + 4, float(level) - 5, reference[1]))
    ends = []
    for one, line, points in lines:
        colour = f"s{one.colour % COLOURS}"
        if line:
            parts.append(f'<path class="line {colour}" d="{path(line, x_of, y_of)}"/>')
        if len(points) > 1:
            parts.append(f'<path class="line dashed {colour}" d="{path(points, x_of, y_of)}"/>')
        for x, y in points:
            note = escape(f"{one.name}: {y:.4g} at {short(x)}")
            dot = f'cx="{x_of(x)}" cy="{y_of(y)}" r="4.5"'
            parts.append(f'<circle class="point {colour}" {dot}><title>{note}</title></circle>')
        if line or points:
            ends.append((one, float(y_of((line or points)[-1][1]))))
    places = spread([y for _, y in ends], 15, y_of.end + 4, y_of.start - 2)
    for (one, _), place in zip(ends, places, strict=True):
        classes = f"label name s{one.colour % COLOURS}"
        parts.append(text(x_of.end + 10, place + 4, one.name, classes=classes))
    return svg(width, height, title, parts)


def path(points: Sequence[tuple[float, float]], x_of: Scale, y_of: Scale) -> str:
    """SVG path data of a polyline; a single point becomes a short dash."""
    joined = "L".join(f"{x_of(x)} {y_of(y)}" for x, y in points)
    return f"M{joined}" + ("h2" if len(points) == 1 else "")


def bar_chart(
    title: str, groups: Sequence[tuple[str, Sequence[tuple[str, int | None, float]]]], *, width: int = 920
) -> str:
    """Horizontal bars in named groups: (name, colour or None for the neutral one, value) each, from 0."""
    bar, gap = 20, 22
    most = max((value for _, bars in groups for _, _, value in bars), default=1.0)
    name_width = 16 + 6.8 * max((len(name) for _, bars in groups for name, _, _ in bars), default=0)
    scale = Scale(0, most, name_width, width - 70)
    y, parts = 4.0, []
    for group, bars in groups:
        parts.append(text(0, y + 12, group, classes="label strong"))
        y += gap
        for name, colour, value in bars:
            kind = "neutral" if colour is None else f"s{colour % COLOURS}"
            parts.append(text(scale.start - 10, y + 14, name, anchor="end"))
            length = pixel(max(float(scale(value)) - scale.start, 1))
            box = f'x="{pixel(scale.start)}" y="{pixel(y)}" width="{length}" height="{bar - 4}" rx="3"'
            parts.append(f'<rect class="bar {kind}" {box}/>')
            parts.append(text(float(scale(value)) + 8, y + 13, f"{value:,.1f}", classes="label strong"))
            y += bar
        y += gap - 8
    return svg(width, max(y, 20), title, parts)


def heat_map(
    title: str,
    columns: Sequence[tuple[float, Sequence[float]]],
    *,
    x_label: str,
    row_name: str = "expert",
    size: tuple[int, int] = (450, 190),
) -> str:
    """Shares over time: one row per entry, colour by log2(share / even share), full at twice or half.

    `columns` are (x, shares that sum to one). A share of the even size has no colour. The last column's
    shares stand at the right.
    """
    width, height = size
    rows = len(columns[-1][1])
    even = 1 / rows
    most = max(1, min(len(columns), MAX_CELLS // rows, 120))
    series = [thin([(x, shares[row]) for x, shares in columns], most) for row in range(rows)]
    left, right, top, bottom = 30, width - 44, 6, height - 34
    cell_height = (bottom - top) / rows
    edges = [left + i * (right - left) / len(series[0]) for i in range(len(series[0]) + 1)]
    parts = [f'<rect class="frame" x="{left}" y="{top}" width="{right - left}" height="{bottom - top}"/>']
    for row, cells in enumerate(series):
        y = top + row * cell_height
        depths = [max(-1.0, min(1.0, math.log2(max(share, 1e-9) / even))) for _, share in cells]
        start = 0
        for depth, run in groupby(round(20 * depth) for depth in depths):  # neighbours alike: one rectangle
            end = start + len(list(run))
            if depth:
                box = f'x="{pixel(edges[start])}" y="{pixel(y)}" width="{pixel(edges[end] - edges[start] + 0.3)}"'
                shade = f'height="{pixel(cell_height)}" fill-opacity="{abs(depth) / 20:.2f}"'
                parts.append(f'<rect class="{"over" if depth > 0 else "under"}" {box} {shade}/>')
            start = end
        if rows <= 16 or row % (rows // 8) == 0:
            middle = y + cell_height / 2 + 4
            parts.append(text(left - 7, middle, str(row), anchor="end"))
            parts.append(text(right + 7, middle, f"{columns[-1][1][row]:.1%}"))
    last = columns[-1][0]
    for value in ticks(0, last, 4):
        x = left + (right - left) * value / (last or 1)
        parts.append(text(x, bottom + 16, short(value), anchor="middle"))
    parts.append(text(right, bottom + 30, x_label, anchor="end"))
    parts.append(text(left, bottom + 30, row_name))
    return svg(width, height, title, parts)


SERIES = (("#2f6fdb", "#6ea8ff"), ("#d9730d", "#f39a4a"), ("#12946a", "#3ecf9b"),
          ("#a23bb5", "#d287e6"), ("#c92a4b", "#ff7f96"), ("#0e8fa8", "#4dc7de"))  # fmt: skip
LIGHT = (
    "--page: #fdfdfc; --card: #fff; --ink: #1c2126; --soft: #626a73; --line: #e3e5e8; --neutral: #aab1b9; "
)
DARK = (
    "--page: #14171a; --card: #1b1f23; --ink: #e6e9ec; --soft: #98a1ab; --line: #30363d; --neutral: #5d6670; "
)
LIGHT += " ".join(f"--s{i}: {light};" for i, (light, _) in enumerate(SERIES))
DARK += " ".join(f"--s{i}: {dark};" for i, (_, dark) in enumerate(SERIES))
CHART_STYLE = f"""
:root {{ color-scheme: light dark; {LIGHT} }}
@media (prefers-color-scheme: dark) {{ :root {{ {DARK} }} }}
svg {{ display: block; width: 100%; height: auto; overflow: visible; }}
svg text {{ font: 12px system-ui, -apple-system, "Segoe UI", Roboto, Arial, sans-serif; fill: var(--soft);
 font-variant-numeric: tabular-nums; }}
svg text.strong {{ fill: var(--ink); font-weight: 600; }}
svg text.name {{ font-weight: 600; }}
path {{ fill: none; }}
.grid {{ stroke: var(--line); }}
.axis {{ stroke: var(--soft); }}
.reference {{ stroke: var(--soft); stroke-dasharray: 2 4; }}
.line {{ stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }}
.dashed {{ stroke-dasharray: 3 5; opacity: .7; }}
.point {{ stroke: var(--card); stroke-width: 1.5; }}
.frame {{ fill: none; stroke: var(--line); }}
.over {{ fill: var(--s1); background: var(--s1); }}
.under {{ fill: var(--s0); background: var(--s0); }}
.bar.neutral {{ fill: var(--neutral); }}
.key {{ display: inline-block; width: 11px; height: 11px; border-radius: 3px; margin-right: 8px; }}
.key.neutral {{ background: var(--neutral); }}
""" + "".join(
    f"path.s{i} {{ stroke: var(--s{i}); }} .key.s{i} {{ background: var(--s{i}); }} "
    f".point.s{i}, .bar.s{i}, svg text.s{i} {{ fill: var(--s{i}); }}\n"
    for i in range(COLOURS)
)
