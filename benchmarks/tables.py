"""Records as plain tables for a terminal."""

from collections.abc import Iterable
from typing import Any

Records = list[dict[str, Any]]


def table(head: Iterable[str], rows: Iterable[Iterable[Any]]) -> list[str]:
    """Lines of a table: the first column to the left, the others to the right."""
    cells = [[str(cell) for cell in row] for row in (head, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    return [
        "  "
        + "  ".join(
            f"{cell:<{width}}" if i == 0 else f"{cell:>{width}}"
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    ]


def pivot(records: Records, rows: tuple[str, ...], column: str, cell: Any) -> tuple[list[str], list[list[str]]]:
    """One row for each combination of ``rows``, one column for each value of ``column``; "-" where there is none."""
    columns = list(dict.fromkeys(record[column] for record in records))
    found: dict[str, dict[str, str]] = {}
    for record in records:
        found.setdefault(" ".join(str(record[name]) for name in rows), {})[record[column]] = cell(record)
    return columns, [[name, *(cells.get(column, "-") for column in columns)] for name, cells in found.items()]


def all_tables(records: Records) -> list[str]:
    """Every table that the records fill."""
    lines: list[str] = []
    for group, title, make in (
        ("io", "io, counted: bytes moved, in S = bytes of x (formula: what the kernels' file says)", _io),
        ("memory", "memory, counted: peak of what a call allocates, its results included, in S", _memory),
        ("aot", "aot: registers / spilled bytes a thread, shared bytes a program", _aot),
        ("aot_time", "aot, measured: seconds to compile the kernels above", _aot_time),
        ("overhead", "overhead, measured: microseconds a call, and above the operators that attnk runs", _overhead),
        ("cpu", "cpu, measured: milliseconds, and how many times as fast as the tutorial", _times),
        ("gpu", "gpu, measured: milliseconds, times as fast as the tutorial, percent of copy bandwidth at the "
                "fewest bytes", _times),
    ):  # fmt: skip
        chosen = [record for record in records if record["group"] == group]
        if chosen:
            lines += [title, *make(chosen), ""]
    return lines


def _io(records: Records) -> list[str]:
    rows = []
    for record in records:
        name = f"{record['output']} {record['shape']} {record['dtype']}, {record['provider']}"
        rows.append([name])
        for which in ("forward", "backward"):
            rows[-1] += [record[f"{which}_S"], record.get(f"{which}_formula_S", "-")]
    return table(("", "forward", "formula", "backward", "formula"), rows)


def _memory(records: Records) -> list[str]:
    columns, rows = pivot(records, ("output", "shape", "pass"), "provider", lambda record: f"{record['peak_S']:.2f}")
    return table(("", *columns), rows)


def _aot(records: Records) -> list[str]:
    def cell(record: dict[str, Any]) -> str:
        return f"{record['registers']} / {record['spilled']}, {record['shared']}"

    columns, rows = pivot(records, ("layout", "dtype", "kernel"), "architecture", cell)
    return table(("", *columns), rows)


def _aot_time(records: Records) -> list[str]:
    columns, rows = pivot(records, ("layout",), "architecture", lambda record: f"{record['seconds']:.1f}")
    return table(("", *columns), rows)


def _overhead(records: Records) -> list[str]:
    def cell(record: dict[str, Any]) -> str:
        return f"{record['median_us']:.1f} ({record['above_operators_us']:+.1f})"

    columns, rows = pivot(records, ("pass",), "provider", cell)
    return table(("", *columns), rows)


def _times(records: Records) -> list[str]:
    def cell(record: dict[str, Any]) -> str:
        percent = f" {record['percent_of_copy']:.0f}%" if "percent_of_copy" in record else ""
        return f"{record['median_us'] / 1e3:.3f} ({record['times_tutorial']:.2f}x{percent})"

    columns, rows = pivot(records, ("output", "shape", "dtype", "layout", "pass"), "provider", cell)
    return table(("", *columns), rows)
