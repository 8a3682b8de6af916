"""Turn a results file into pictures, one for each operation in it.

python benchmarks/plot.py benchmarks/results/cpu/results.json
"""

import argparse
import io
import math
from pathlib import Path
from typing import Any

import harness
import shapes

COLOURS = {
    "tutorial": "#b5b5b5",
    "torch.compile": "#e8a33d",
    "sdpa": "#5a9e6f",
    "sdpa cudnn": "#1f6b3a",
    "sdpa flash": "#5a9e6f",
    "sdpa efficient": "#8fc49f",
    "sdpa math": "#cfe5d5",
    "flex_attention": "#a05fb4",
    "attnk": "#2a6fbb",
    "attnk, two launches": "#2a6fbb",
    "attnk, one launch": "#123a63",
    "attnk, torch.compile": "#123a63",
}
LIGHT = ("tutorial", "torch.compile", "sdpa efficient", "sdpa math")  # what dark letters are read on
TIMES = "times as fast as\nthe tutorials' code"
MANY = 5  # bars in a group whose numbers must stand upright
MANY_NAMES = 5  # in a legend

# What an operation's ``panels(records)`` gives, in rows. Bars have records, a title, "label" (of a record, below its
# bars), "section" (of a record, a name below several labels), and may have "value", the column that is drawn instead
# of times_tutorial, its "ylabel", and a "scale", which panels of one axis range share. Lines have "x" (of a record) and
# "xlabel" instead, and may have "column" and "unit", what is drawn instead of peak_mib and what it is multiplied by,
# its "ylabel", and "exponent": True where names tell the power of x that a line follows.
Panel = dict[str, Any]


def main() -> None:
    """Draw the pictures next to the results, under their name."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("--out", type=Path, help="PNG; beside the results by default")
    options = parser.parse_args()
    for png in draw(options.results, options.out or options.results.with_suffix(".png")):
        print(png)


def draw(results: Path, png: Path) -> list[Path]:
    """Draw the records of a results file.

    Args:
        results: a file that ``harness.write_results`` wrote.
        png: where the picture goes; where the file holds several operations, each one's name is put behind this.

    Returns:
        The pictures.

    Raises:
        ValueError: no record is a time.
    """
    found = harness.read_results(results)
    drawn = {}
    for op, records in harness.by_operation(found["records"]).items():
        grid = [row for row in harness.cases_of(op).panels(records) if all(panel["records"] for panel in row)]
        if grid:
            drawn[op] = grid
    if not drawn:
        raise ValueError(f"{results} holds the times of no pass in full")
    if len(drawn) == 1:
        return [_draw_panels(op, grid, found["conditions"], png) for op, grid in drawn.items()]
    paths = {op: png.with_name(f"{png.stem}_{op}{png.suffix}") for op in drawn}
    return [_draw_panels(op, grid, found["conditions"], paths[op]) for op, grid in drawn.items()]


def _draw_panels(op: str, grid: list[list[Panel]], conditions: dict[str, Any], png: Path) -> Path:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image

    cases = harness.cases_of(op)
    width = max(11.5, *(len(row) * _width(panel) for row in grid for panel in row))
    caption = _caption(cases.CAPTION, conditions, grid)
    height = 3.1 * len(grid) + 0.75 + 0.18 * len(caption.splitlines())
    figure = Figure(figsize=(width, height), facecolor="white")
    FigureCanvasAgg(figure)
    parts = math.lcm(*map(len, grid))
    places = figure.add_gridspec(len(grid), parts)
    axes = [
        [
            figure.add_subplot(places[y, x * parts // len(row) : (x + 1) * parts // len(row)])
            for x in range(len(row))
        ]
        for y, row in enumerate(grid)
    ]  # fmt: skip
    highest: dict[str, float] = {}
    for panel in (panel for row in grid for panel in row if "x" not in panel):
        values = [record[panel.get("value", "times_tutorial")] for record in panel["records"]]
        scale = panel.get("scale", "")
        highest[scale] = max(highest.get(scale, 0), *values)
    handles: dict[str, Any] = {}
    for row, axes_row in zip(grid, axes, strict=True):
        for panel, axis in zip(row, axes_row, strict=True):
            if "x" in panel:
                _draw_lines(axis, panel)
            else:
                handles |= _draw_bars(axis, panel, highest[panel.get("scale", "")])
            axis.set_title(panel["title"], fontsize=11.5, loc="left")
            for side in ("top", "right"):
                axis.spines[side].set_visible(False)
            if axis is axes_row[0] or "ylabel" in panel or "x" in panel:
                axis.set_ylabel(panel.get("ylabel", "MiB" if "x" in panel else TIMES), fontsize=10)
    handles = {name: handles[name] for name in COLOURS if name in handles}
    figure.text(0.012, 1 - 0.14 / height, cases.TITLE, ha="left", va="top", fontsize=15, weight="bold")
    if handles:
        many = len(handles) > MANY_NAMES
        figure.legend(handles.values(), handles.keys(), loc="upper right", bbox_to_anchor=(0.995, 1 - 0.04 / height),
                      ncol=len(handles), frameon=False, fontsize=9 if many else 11,
                      columnspacing=1.0 if many else 2.0, handlelength=1.2 if many else 2.0)  # fmt: skip
    figure.text(0.012, 0.12 / height, caption, ha="left", va="bottom", fontsize=9.5, color="0.3",
                linespacing=1.4)  # fmt: skip
    below = 0.26 + 0.18 * len(caption.splitlines())
    figure.tight_layout(rect=(0, below / height, 1, 1 - 0.5 / height), h_pad=1.2, w_pad=1.5)
    png.parent.mkdir(parents=True, exist_ok=True)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=100)
    Image.open(picture).convert("RGB").quantize(64).save(png, optimize=True)  # a quarter of the bytes
    return png


def _width(panel: Panel) -> float:
    """Inches that a panel needs for its bars."""
    if "x" in panel:
        return 0.0
    places = dict.fromkeys(_place(panel, record) for record in panel["records"])
    bars = len({record["provider"] for record in panel["records"]})
    return len(places) * (0.36 + (0.14 if bars < MANY else 0.1) * bars)


def _place(panel: Panel, record: dict[str, Any]) -> tuple[str, str]:
    return panel["label"](record), panel["section"](record)


def _draw_bars(axis: Any, panel: Panel, highest: float) -> dict[str, Any]:
    records = panel["records"]
    value = panel.get("value", "times_tutorial")
    percent = any("percent_of_copy" in record for record in records)
    groups = list(dict.fromkeys(_place(panel, record) for record in records))
    names = [name for name in COLOURS if any(record["provider"] == name for record in records)]
    by_key = {(_place(panel, record), record["provider"]): record for record in records}
    bar = 0.84 / len(names)
    handles = {}
    for place, group in enumerate(groups):
        present = [name for name in names if (group, name) in by_key]
        start = place - bar * (len(present) - 1) / 2
        for position, name in enumerate(present):
            record = by_key[group, name]
            height, centre = record[value], start + position * bar
            handles[name] = axis.bar(centre, height, 0.92 * bar, color=COLOURS[name], zorder=2)
            if name != "tutorial" or value != "times_tutorial":
                text = f"{height:.1f}" if highest < 100 else f"{height:.0f}"
                axis.text(centre, height + 0.015 * highest, text, ha="center", va="bottom",
                          rotation=0 if len(names) < MANY else 90, fontsize=7.5 if percent else 9)  # fmt: skip
            if percent and value != "percent_of_copy" and height > 0.15 * highest:
                axis.text(centre, 0.03 * highest, f"{record['percent_of_copy']:.0f}%", ha="center", va="bottom",
                          rotation=90, fontsize=7, color="black" if name in LIGHT else "white")  # fmt: skip
    if value == "times_tutorial":
        axis.axhline(1, color="0.55", linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
    axis.set_ylim(0, (1.1 if len(names) < MANY else 1.2) * highest)
    axis.set_xlim(-0.6, len(groups) - 0.4)
    axis.set_xticks(range(len(groups)), [label for label, _ in groups], fontsize=8.5)
    sections = list(dict.fromkeys(section for _, section in groups))
    if len(sections) > 1:
        below = -0.06 - 0.055 * max(label.count("\n") + 1 for label, _ in groups)
        for section in sections:
            places = [place for place, (_, other) in enumerate(groups) if other == section]
            axis.text(sum(places) / len(places), below, section, transform=axis.get_xaxis_transform(), ha="center",
                      va="top", fontsize=9.5, weight="bold", color="0.3")  # fmt: skip
            if places[0]:
                axis.axvline(places[0] - 0.5, color="0.8", linewidth=0.8, zorder=0)
    axis.tick_params(axis="x", length=0)
    axis.grid(axis="y", color="0.92", zorder=0)
    axis.set_axisbelow(True)
    return handles


def _draw_lines(axis: Any, panel: Panel) -> None:
    """Memory, or another column, over a size, both axes logarithmic; every line has its name at its end."""
    column, unit = panel.get("column", "peak_mib"), panel.get("unit", 1)
    ticks = sorted({panel["x"](record) for record in panel["records"]})
    ends: dict[int, list[tuple[float, str, str]]] = {}
    for name in COLOURS:
        points = sorted(
            (panel["x"](record), record[column] * unit) for record in panel["records"] if record["provider"] == name
        )
        if points:
            axis.plot(*zip(*points, strict=True), color=COLOURS[name], marker="o", markersize=4, linewidth=1.8)
            words = f"{name}, {points[-1][1]:,.0f}"
            if panel.get("exponent") and len(points) > 1:
                words = f"{name}, n^{harness.exponent(points):.2f}"
            ends.setdefault(points[-1][0], []).append((points[-1][1], name, words))
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xlim(ticks[0] / 1.15, ticks[-1] * (ticks[-1] / ticks[0]) ** 0.25)
    axis.set_xticks(ticks, [str(tick) for tick in ticks], fontsize=8.5)
    axis.set_xlabel(panel["xlabel"], fontsize=9.5)
    low, high = axis.get_ylim()
    gap = (high / low) ** 0.08  # that letters need
    axis.set_ylim(low, high * gap)  # for the upper of two names at the top
    for x, members in ends.items():
        previous = 0.0
        for y, name, words in sorted(members):
            previous = max(y, previous * gap)
            axis.annotate(words, (x, previous), xytext=(7, 0), textcoords="offset points", va="center",
                          fontsize=9, color="0.25" if name == "tutorial" else COLOURS[name])  # fmt: skip
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.grid(color="0.92", zorder=0)
    axis.set_axisbelow(True)
    axis.minorticks_off()


def _caption(words: str, conditions: dict[str, Any], grid: list[list[Panel]]) -> str:
    records = [record for row in grid for panel in row for record in panel["records"]]
    timed = [record for record in records if "rounds" in record]
    on_gpu = any(record["group"] == "gpu" for record in timed)
    dtypes = "/".join(dict.fromkeys(record["dtype"] for record in records))
    where = "" if on_gpu else f", {shapes.CPU_THREADS} threads"
    lines = [f"{conditions['device']}{where}, {dtypes}, torch {conditions['torch']}, {conditions['date']}. "]
    if timed:
        lines[0] += (
            f"Medians of at least {min(record['rounds'] for record in timed)} rounds; in each round all took their "
            "turn.\nEach had to compute the right values and gradients first."
        )
    if on_gpu:
        in_bars = any(panel.get("value") != "percent_of_copy" for row in grid for panel in row)
        percent = "In the bars: percent" if in_bars else "Percent"
        lines.append(f"{percent} of a copy's bandwidth, at the fewest bytes the pass could move.")
    return "\n".join([*lines, words])


if __name__ == "__main__":
    main()
