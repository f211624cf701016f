"""Runs the rows of the results tables that have no record yet, the cheapest first.

    python -m experiments.reproduce --list             # the plan only
    python -m experiments.reproduce --hours 2          # what fits into two hours
    python -m experiments.reproduce --paper 002

Each row is run by its own command, which records the result; the tables are rendered after each run. If you
stop it, the same command continues where it stopped. Times are estimates for two cores.
"""

import contextlib
import functools
import io
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from experiments import data
from experiments.common.options import check_options, command_line
from experiments.results import records
from experiments.results.render import duration, write_pages
from experiments.results.rows import ACCELERATOR, TABLES
from sul_jax.cli.ranges import PositiveFloat
from sul_jax.cli.tables import format_table


@dataclass(frozen=True)
class Config:
    """Options of the command."""

    paper: Literal["000", "001", "002", "003", "004"] | None = None
    """Only the rows of this paper."""
    hours: PositiveFloat | None = None
    """Start no run that would end later than this, by the estimated times."""
    list: bool = False
    """Print the plan and run nothing."""
    data_dir: Path | None = None
    """Folder of data sets; by default $SUL_JAX_DATA."""
    workdir: Path = Path("runs/reproduce")
    """Folder of all runs; each run has its own folder in it."""


class Task(NamedTuple):
    """A command whose rows have no record.

    Attributes:
      command: what stands after `python -m experiments.`.
      minutes: a seed takes on two cores, or `ACCELERATOR`.
    """

    command: str
    minutes: float | None

    @property
    def cost(self) -> str:
        """In words."""
        return "accelerator" if self.minutes is ACCELERATOR else duration(self.minutes)

    @property
    def obstacle(self) -> str:
        """Why it cannot be run here; empty if it can. Data are looked for when this is asked."""
        if self.command.startswith("sul-jax"):
            return "needs your own images"
        missing = _missing(str(records.options(self.command).get("dataset", "")))
        if missing:
            return missing
        return "needs an accelerator" if self.minutes is ACCELERATOR and not _accelerated() else ""


def run(config: Config) -> list[Task]:
    """Runs what has no record; see the module's docstring.

    Returns:
      What is left.

    Raises:
      ValueError: options that cannot be used.
    """
    check_options(config)
    if config.data_dir is not None:
        os.environ["SUL_JAX_DATA"] = str(config.data_dir.resolve())  # of the runs too
    tasks = plan(config.paper)
    print(_described(tasks))
    if config.list:
        return tasks
    deadline = time.monotonic() + 3600 * config.hours if config.hours else float("inf")
    for task in tasks:
        if task.obstacle or time.monotonic() + 60 * (task.minutes or 0) > deadline:
            continue
        print(f"\n{task.command} ({task.cost})", flush=True)
        if _finished(task, config.workdir):
            write_pages()
        else:
            print(f"{task.command} failed; continuing with the others", file=sys.stderr)
    left = plan(config.paper)
    print("\n" + _described(left))
    return left


def plan(paper: str | None = None) -> list[Task]:
    """The commands whose rows have no record, the cheapest first.

    Args:
      paper: only its rows, by its number; None for those of all.

    Example:
      >>> from experiments import reproduce
      >>> costs = [task.minutes for task in reproduce.plan("000")]
      >>> costs == sorted(costs)
      True
    """
    rows = [row for key, table in TABLES.items() if paper in (None, key) for row in table]
    missing = {row.command: row for row in rows if not records.recorded(row)}
    tasks = [Task(row.command, row.minutes) for row in missing.values()]
    return sorted(tasks, key=lambda task: float("inf") if task.minutes is ACCELERATOR else task.minutes)


@functools.cache
def _missing(dataset: str) -> str:
    """Why a data set cannot be read; empty if it can, or if none is needed."""
    try:
        if dataset:
            with contextlib.redirect_stdout(io.StringIO()):  # of data that are prepared
                data.load(dataset)
    except (ValueError, OSError) as error:
        return str(error)
    return ""


@functools.cache
def _accelerated() -> bool:
    """Whether jax finds an accelerator; asked in another process, which lets go of its memory again."""
    code = "import jax; print(jax.default_backend())"
    asked = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    return asked.returncode == 0 and asked.stdout.strip() != "cpu"


def _finished(task: Task, parent: Path) -> bool:
    """Runs a task, from where an earlier run of it stopped; whether it came to its end."""
    name, *arguments = shlex.split(task.command)
    workdir = parent / slug(task.command)
    command = [sys.executable, "-m", f"experiments.{name}", *arguments, "--record", "--workdir", str(workdir)]
    if (workdir / "config.json").exists():
        command.append("--resume")
    # In a group of its own: an interruption is said once, here, and the run stopped as a kill would.
    process = subprocess.Popen(command, process_group=0)
    try:
        return process.wait() == 0
    finally:
        if process.poll() is None:
            if os.name == "posix":
                os.killpg(process.pid, signal.SIGTERM)
            else:
                process.terminate()
            process.wait()


def slug(command: str) -> str:
    """A command as the name of a folder.

    Example:
      >>> from experiments import reproduce
      >>> reproduce.slug("mnist_energy --dataset mnist --no-zca")
      'mnist_energy-dataset-mnist-no-zca'
    """
    return re.sub(r"[^\w.]+", "-", command)


def _described(tasks: Sequence[Task]) -> str:
    """What is left, and what it would cost."""
    if not tasks:
        return "every row has a record"
    rows = [(task.command, task.cost, task.obstacle.split(" (")[0]) for task in tasks]
    able = [task.minutes or 0 for task in tasks if not task.obstacle]
    cost = f"{len(able)} can be run here, in about {duration(sum(able))}" if able else "none can be run here"
    table = format_table(("not yet run", "two cores", "cannot be run here"), rows)
    return f"{table}\n\nwithout a record: {len(tasks)}; {cost}"


def main() -> None:
    """The command line."""
    for end in (signal.SIGTERM, signal.SIGHUP):  # a closed terminal stops the run below too
        signal.signal(end, signal.default_int_handler)
    command_line(run, Config, description=__doc__)


if __name__ == "__main__":
    main()
