"""Tables of results, for a terminal and for a page."""

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from experiments.common.runs import SeedResult
from sul_jax.cli.tables import format_table as format_table


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
