"""Turn a results file into one picture: times as fast as the tutorials' code, and on a GPU the share of its bandwidth.

python benchmarks/plot.py benchmarks/results/cpu/results.json
"""

import argparse
import io
from pathlib import Path
from typing import Any

import harness
import shapes

COLOURS = {
    "tutorial": "#b5b5b5",
    "torch.compile": "#e8a33d",
    "attnk": "#2a6fbb",
    "attnk, two launches": "#2a6fbb",
    "attnk, one launch": "#123a63",
}
LIGHT = ("tutorial", "torch.compile")  # what dark letters are read on
PASS_TITLES = {"forward": "inference", "training": "forward + backward"}
OUTPUT_TITLES = {"gated": "returns x * gate", "map": "returns the gate"}


def main() -> None:
    """Draw the picture next to the results, under their name."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("--out", type=Path, help="PNG; beside the results by default")
    options = parser.parse_args()
    print(draw(options.results, options.out or options.results.with_suffix(".png")))


def draw(results: Path, png: Path) -> Path:
    """Draw the timed records of a results file.

    Args:
        results: a file that ``harness.write_results`` wrote.
        png: where the picture goes.

    Returns:
        png.

    Raises:
        ValueError: no record is a time.
    """
    found = harness.read_results(results)
    group = "gpu" if any(record["group"] == "gpu" for record in found["records"]) else "cpu"
    records = [record for record in found["records"] if record["group"] == group]
    if not records:
        raise ValueError(f"{results} holds no times")
    panels = _panels(records, group)
    if not panels:
        raise ValueError(f"{results} holds the times of no pass in full")
    return _draw_panels(panels, found["conditions"], group, png)


Panel = dict[str, Any]


def _panels(records: list[dict[str, Any]], group: str) -> list[list[Panel]]:
    """Rows of panels: on the CPU an output each, with a panel a pass; on a GPU one panel for a layout and pass."""
    if group == "cpu":
        wanted = [[{"output": output, "pass": which} for which in PASS_TITLES] for output in OUTPUT_TITLES]
    else:
        gated = {"output": "gated", "dtype": records[0]["dtype"]}
        layouts = ("contiguous", "channels_last")
        wanted = [[{**gated, "pass": which, "layout": layout}] for layout in layouts for which in PASS_TITLES]
    grid = []
    for row in wanted:
        panels = [
            {
                "title": ", ".join(
                    [
                        PASS_TITLES[keys["pass"]],
                        OUTPUT_TITLES[keys["output"]],
                        *([keys["layout"]] if "layout" in keys else []),
                    ]
                ),
                "records": [record for record in records if keys.items() <= record.items()],
            }
            for keys in row
        ]
        if all(panel["records"] for panel in panels):
            grid.append(panels)
    return grid


def _draw_panels(grid: list[list[Panel]], conditions: dict[str, Any], group: str, png: Path) -> Path:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image

    n_groups = max(len(_groups(panel["records"])) for row in grid for panel in row)
    width = max(11.5, len(grid[0]) * 0.78 * n_groups)
    height = 3.1 * len(grid) + 1.3
    figure = Figure(figsize=(width, height), facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(grid), len(grid[0]), squeeze=False)
    highest = max(record["times_tutorial"] for row in grid for panel in row for record in panel["records"])
    handles: dict[str, Any] = {}
    for row, axes_row in zip(grid, axes, strict=True):
        for panel, axis in zip(row, axes_row, strict=True):
            handles |= _draw_panel(axis, panel, highest, percent=group == "gpu")
        axes_row[0].set_ylabel("times as fast as\nthe tutorials' code", fontsize=10)
    figure.text(0.012, 1 - 0.14 / height, "Spatial gate, 7 x 7 convolution", ha="left", va="top", fontsize=15,
                weight="bold")  # fmt: skip
    figure.legend(handles.values(), handles.keys(), loc="upper right", bbox_to_anchor=(0.995, 1 - 0.04 / height),
                  ncol=4, frameon=False, fontsize=11)  # fmt: skip
    figure.text(0.012, 0.12 / height, _caption(conditions, grid, group), ha="left", va="bottom", fontsize=9.5,
                color="0.3", linespacing=1.4)  # fmt: skip
    figure.tight_layout(rect=(0, 0.8 / height, 1, 1 - 0.5 / height), h_pad=1.2, w_pad=1.5)
    png.parent.mkdir(parents=True, exist_ok=True)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=100)
    Image.open(picture).convert("RGB").quantize(64).save(png, optimize=True)  # a quarter of the bytes
    return png


def _groups(records: list[dict[str, Any]]) -> list[tuple[str, str]]:
    return list(dict.fromkeys((record["shape"], record["layout"]) for record in records))


def _draw_panel(axis: Any, panel: Panel, highest: float, percent: bool) -> dict[str, Any]:
    records = panel["records"]
    groups = _groups(records)
    names = [name for name in COLOURS if any(record["provider"] == name for record in records)]
    by_key = {(record["shape"], record["layout"], record["provider"]): record for record in records}
    bar = 0.84 / len(names)
    handles = {}
    for place, (shape, layout) in enumerate(groups):
        present = [name for name in names if (shape, layout, name) in by_key]
        start = place - bar * (len(present) - 1) / 2
        for position, name in enumerate(present):
            record = by_key[shape, layout, name]
            ratio, centre = record["times_tutorial"], start + position * bar
            handles[name] = axis.bar(centre, ratio, 0.92 * bar, color=COLOURS[name], zorder=2)
            if name != "tutorial":
                axis.text(centre, ratio + 0.015 * highest, f"{ratio:.1f}", ha="center", va="bottom",
                          fontsize=7.5 if percent else 9)  # fmt: skip
            if percent:
                axis.text(centre, 0.03 * highest, f"{record['percent_of_copy']:.0f}%", ha="center", va="bottom",
                          rotation=90, fontsize=7, color="black" if name in LIGHT else "white")  # fmt: skip
    axis.axhline(1, color="0.55", linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
    axis.set_title(panel["title"], fontsize=11.5, loc="left")
    axis.set_ylim(0, 1.1 * highest)
    axis.set_xlim(-0.6, len(groups) - 0.4)
    axis.set_xticks(range(len(groups)), [_tick_label(shape) for shape, _ in groups], fontsize=8.5)
    layouts = list(dict.fromkeys(layout for _, layout in groups))
    if len(layouts) > 1:
        for layout in layouts:
            places = [place for place, (_, other) in enumerate(groups) if other == layout]
            axis.text(sum(places) / len(places), -0.17, layout, transform=axis.get_xaxis_transform(), ha="center",
                      va="top", fontsize=9.5, weight="bold", color="0.3")  # fmt: skip
            if places[0]:
                axis.axvline(places[0] - 0.5, color="0.8", linewidth=0.8, zorder=0)
    axis.tick_params(axis="x", length=0)
    axis.grid(axis="y", color="0.92", zorder=0)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    return handles


def _tick_label(shape: str) -> str:
    batch, channels, height, width = shape.split("x")
    return f"{batch} x {channels}\n{height} x {width}"


def _caption(conditions: dict[str, Any], grid: list[list[Panel]], group: str) -> str:
    records = [record for row in grid for panel in row for record in panel["records"]]
    rounds = [record["rounds"] for record in records]
    dtypes = "/".join(dict.fromkeys(record["dtype"] for record in records))
    where = f", {shapes.CPU_THREADS} threads" if group == "cpu" else ""
    percent = (
        " In the bars: percent of a copy's bandwidth, at the fewest bytes the pass could move."
        if group == "gpu"
        else ""
    )
    return (
        f"{conditions['device']}{where}, {dtypes}, torch {conditions['torch']}, {conditions['date']}. Below the bars: "
        f"batch x channels, height x width.{percent}\nMedians of at least {min(rounds)} rounds; in each "
        "round all took their turn. Each had to compute the right values and gradients first.\n"
        "tutorial: mean, max, cat, conv2d, sigmoid in eager PyTorch, and the multiplication where there is one."
    )


if __name__ == "__main__":
    main()
