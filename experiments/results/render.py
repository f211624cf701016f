"""The results tables as text, and the pages that hold them between their markers."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev

from experiments.common import runs
from experiments.common.tables import comparison
from experiments.data import atomic_path
from experiments.results import records
from experiments.results.rows import ACCELERATOR, TABLES, Row
from sul_jax.cli.tables import format_table

_ROOT = Path(__file__).parents[2]


def write_pages() -> None:
    """Renders the tables of all pages anew."""
    for page, tables in PAGES.items():
        text = rendered(page.read_text(encoding="utf-8"), tables)
        with atomic_path(page) as temporary:
            temporary.write_text(text, encoding="utf-8")


def rendered(text: str, tables: Mapping[str, Callable[[], str]]) -> str:
    """Text with the tables between their markers made anew.

    Example:
      >>> from experiments.results import render
      >>> render.rendered("<!-- a: begin -->old<!-- a: end -->", {"a": lambda: "new"}).splitlines()
      ['<!-- a: begin -->', 'new', '<!-- a: end -->']
    """
    for name, table in tables.items():
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        before, rest = text.split(begin)
        _, after = rest.split(end)
        text = f"{before}{begin}\n{table()}\n{end}{after}"
    return text


def results_table(rows: Sequence[Row]) -> str:
    """The table of some rows; those without a recorded run say so, and what a run would take.

    Example:
      >>> from experiments.results import render
      >>> from experiments.results.rows import TABLES
      >>> row = TABLES["003"][0]._replace(command="nmce_spiral --steps 7")
      >>> [cell.strip() for cell in render.results_table([row]).splitlines()[2].split("|")[2:7]]
      ['–', 'not yet run', '', '', 'about 4 min']
    """
    header = ("", "paper", "ours, mean ± s.d.", "best", "seeds", "device, time a seed", "command")
    return format_table(header, [_cells(row) for row in rows])


def headline_table() -> str:
    """The rows to see first, and how many of all have been run."""
    rows = [row for table in TABLES.values() for row in table]
    lines = []
    for row in rows:
        if row.headline:
            _, paper, ours, _, seeds, time, _ = _cells(row)
            lines.append((row.headline, paper, ours, seeds, time))
    published = [row for row in rows if row.paper != "–"]
    missing = [row for row in published if not records.recorded(row)]
    run, large = len(published) - len(missing), sum(row.minutes is ACCELERATOR for row in missing)
    return (
        f"{format_table(('', 'paper', 'ours, mean ± s.d.', 'seeds', 'device, time a seed'), lines)}\n\n"
        f"{len(published)} rows of all tables have a paper's number. {run} of them have been run; of the "
        f"other {len(missing)}, {large} want an accelerator."
    )


def comparison_table() -> str:
    """All methods on the same images, a table for each set of them, from the last run of each seed."""
    sets: dict[tuple[str, int], dict[str, dict[int, dict[str, float]]]] = {}
    for one in runs.read_json(runs.RESULTS / "compare.json", []):
        about = one["dataset"]["name"], one["dataset"]["num_test"]
        (method,) = one["config"]["methods"]
        sets.setdefault(about, {}).setdefault(method, {})[one["seed"]] = one["metrics"]
    return "\n\n".join(
        f"{name}, {number:,} images:\n\n"
        + comparison({method: list(seeds.values()) for method, seeds in latest.items()})
        for (name, number), latest in sets.items()
    )


def _cells(row: Row) -> tuple[str, ...]:
    latest = records.recorded(row)
    command = f"`{row.command}`"
    if not latest:
        cost = "an accelerator" if row.minutes is ACCELERATOR else f"about {duration(row.minutes)}"
        return row.label, row.paper, "not yet run", "", "", cost, command
    values = [record["metrics"][row.metric] for record in latest.values()]
    last = list(latest.values())[-1]
    number = f".{row.decimals}f"
    spread = f" ± {stdev(values):{number}}" if len(values) > 1 else ""
    if row.spread and not spread:
        spread = f" ± {last['metrics'][row.spread]:{number}}"
    best = {"lower": min, "higher": max}.get(row.better)
    return (
        row.label,
        row.paper,
        f"{mean(values):{number}}{spread}",
        f"{best(values):{number}}" if best else "",
        ", ".join(map(str, sorted(latest))),
        f"{last['device']}, {duration(mean(r['seconds'] for r in latest.values()) / 60)}",
        command,
    )


def duration(minutes: float) -> str:
    """Minutes in words.

    Example:
      >>> from experiments.results import render
      >>> render.duration(0.5), render.duration(22.4), render.duration(1130)
      ('< 1 min', '22 min', '19 h')
    """
    if minutes < 1:
        return "< 1 min"
    return f"{minutes:.0f} min" if minutes < 100 else f"{minutes / 60:.0f} h"


def _table(paper: str) -> Callable[[], str]:
    return lambda: results_table(TABLES[paper])


# The pages, and what is rendered into each.
PAGES: Mapping[Path, Mapping[str, Callable[[], str]]] = {
    _ROOT / "README.md": {"headlines": headline_table},
    Path(__file__).with_name("README.md"): {paper: _table(paper) for paper in TABLES}
    | {"comparison": comparison_table},
}
