"""Records as plain tables for a terminal."""

from collections.abc import Iterable
from typing import Any

import harness

Records = list[dict[str, Any]]

# Columns that name a case; each operation has some of them.
CASE = ("case", "output", "shape", "dtype", "extra", "layout")


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


def label(record: dict[str, Any], *more: str) -> str:
    """What names a record's case, and the values of the columns besides."""
    return " ".join(str(record[name]) for name in (*CASE, *more) if record.get(name))


def pivot(records: Records, rows: tuple[str, ...], column: str, cell: Any) -> tuple[list[str], list[list[str]]]:
    """One row for each case and combination of ``rows``, one column for each value of ``column``; "-" for none."""
    columns = list(dict.fromkeys(record[column] for record in records))
    found: dict[str, dict[str, str]] = {}
    for record in records:
        found.setdefault(label(record, *rows), {})[record[column]] = cell(record)
    return columns, [[name, *(cells.get(column, "-") for column in columns)] for name, cells in found.items()]


def all_tables(records: Records) -> list[str]:
    """Every table that the records fill, an operation after the other."""
    lines: list[str] = []
    for op, members in harness.by_operation(records).items():
        for group, title, make in (
            ("io", "io, counted: bytes moved, in S = bytes of the first input (formula: what the kernels' file says)",
             _io),
            ("memory", "memory, counted: peak of what a call allocates, its results included, MiB (in S)", _memory),
            ("aot", "aot: registers / spilled bytes a thread, shared bytes a program", _aot),
            ("aot_time", "aot, measured: seconds to compile the kernels above", _aot_time),
            ("overhead", "overhead, measured: microseconds a call, and above the operators that attnk runs", _overhead),
            ("cpu", "cpu, measured: milliseconds, and how many times as fast as the tutorial", _times),
            ("gpu", "gpu, measured: milliseconds, times as fast as the tutorial, percent of copy bandwidth at the "
                    "fewest bytes, TFLOP/s", _times),
        ):  # fmt: skip
            chosen = [record for record in members if record["group"] == group]
            if chosen:
                lines += [f"{op}: {title}", *make(chosen), *_refusals(chosen), ""]
    return lines


def _io(records: Records) -> list[str]:
    rows = []
    for record in records:
        rows.append([f"{label(record)}, {record['provider']}"])
        for which in ("forward", "backward"):
            rows[-1] += [record[f"{which}_S"], record.get(f"{which}_formula_S", "-")]
    return table(("", "forward", "formula", "backward", "formula"), rows)


def _memory(records: Records) -> list[str]:
    def cell(record: dict[str, Any]) -> str:
        mib = f"{record['peak_mib']:.1f} " if "peak_mib" in record else ""
        return f"{mib}({record['peak_S']:.2f})"

    columns, rows = pivot(records, ("pass",), "provider", cell)
    return table(("", *columns), rows)


def _aot(records: Records) -> list[str]:
    def cell(record: dict[str, Any]) -> str:
        return f"{record['registers']} / {record['spilled']}, {record['shared']}"

    columns, rows = pivot(records, ("kernel",), "architecture", cell)
    return table(("", *columns), rows)


def _aot_time(records: Records) -> list[str]:
    columns, rows = pivot(records, (), "architecture", lambda record: f"{record['seconds']:.1f}")
    return table(("", *columns), rows)


def _overhead(records: Records) -> list[str]:
    def cell(record: dict[str, Any]) -> str:
        return f"{record['median_us']:.1f} ({record['above_operators_us']:+.1f})"

    columns, rows = pivot(records, ("pass",), "provider", cell)
    return table(("", *columns), rows)


def _times(records: Records) -> list[str]:
    def cell(record: dict[str, Any]) -> str:
        if "refused" in record:
            return "refused"
        percent = f" {record['percent_of_copy']:.0f}%" if "percent_of_copy" in record else ""
        flops = f" {record['tflops']:.0f}T" if "tflops" in record else ""
        gates = f" gates {record['gates_percent']:.0f}%" if "gates_percent" in record else ""
        return f"{record['median_us'] / 1e3:.3f} ({record['times_tutorial']:.2f}x{percent}{flops}{gates})"

    columns, rows = pivot(records, ("pass",), "provider", cell)
    return table(("", *columns), rows)


def _refusals(records: Records) -> list[str]:
    """Each reason once, with how often it was given."""
    reasons = [record["refused"] for record in records if "refused" in record]
    return [f"  refused {reasons.count(reason)} times: {reason}" for reason in dict.fromkeys(reasons)]
