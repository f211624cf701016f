"""Tables for a terminal."""

from collections.abc import Sequence


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table that also reads well on a terminal; the first column is left-aligned.

    Args:
      header: titles of the columns.
      rows: cells, as many in each row as titles.

    Example:
      >>> from sul_jax.cli.tables import format_table
      >>> print(format_table(["clusters", "ARI"], [["8", "71.0"]]))
      | clusters |  ARI |
      | -------- | ---: |
      | 8        | 71.0 |
    """
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        first = cells[0].ljust(widths[0])
        others = [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
        return "| " + " | ".join([first, *others]) + " |"

    rule = ["-" * widths[0]] + ["-" * (width - 1) + ":" for width in widths[1:]]
    return "\n".join([line(header), line(rule), *map(line, rows)])
