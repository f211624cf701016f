"""Tables of results, for a terminal and for a page."""

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from experiments.common.runs import SeedResult


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table that also reads well on a terminal; the first column is left-aligned."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        first = cells[0].ljust(widths[0])
        others = [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
        return "| " + " | ".join([first, *others]) + " |"

    rule = ["-" * widths[0]] + ["-" * (width - 1) + ":" for width in widths[1:]]
    return "\n".join([line(header), line(rule), *map(line, rows)])


def print_metrics(results: Sequence[SeedResult[Any]], paper: Mapping[str, float]) -> None:
    """The metrics of every seed, their mean, and the paper's numbers."""
    names = [name for name in results[0].metrics if all(name in r.metrics for r in results)]
    rows = []
    for name in names:
        values = [r.metrics[name] for r in results]
        beside = f"{paper[name]:.3f}" if name in paper else "–"
        cells = [f"{value:.3f}" for value in [*values, mean(values)]]
        rows.append([name.replace("_", " "), *cells, beside])
    print("\n" + format_table(["", *(f"seed {r.seed}" for r in results), "mean", "paper"], rows))
