"""Which recorded runs belong to a row: those made with its command's options."""

import contextlib
import functools
import importlib
import io
import json
import shlex
from collections.abc import Mapping
from typing import Any

import tyro

from experiments.common import runs
from experiments.results.rows import FILLED, Row

# Options that change how long a run takes or what else it says, but no number of a row.
_INCIDENTAL = frozenset(
    {
        "seeds_together", "devices", "evaluate_layers", "learning_curve", "every_layer", "probe_every",
        "cache_gib", "num_validation", "sweep", "sweep_values",
    }
)  # fmt: skip
# The file of the records, where it is not named as the command.
_FILES = {"sul-jax": "cluster_images"}


def experiment(row: Row) -> str:
    """The first word of a row's command: an experiment, or the installed command.

    Example:
      >>> from experiments.results import records
      >>> from experiments.results.rows import TABLES
      >>> records.experiment(TABLES["001"][0])
      'cifar10_hebbian'
    """
    return row.command.split()[0]


@functools.cache
def options(command: str) -> Mapping[str, Any]:
    """The options of an experiment's command line as a record holds them, defaults included.

    Args:
      command: what stands after `python -m experiments.`.

    Raises:
      ValueError: no such experiment, or one that does not take these options.

    Example:
      >>> from experiments.results import records
      >>> stated = records.options("nmce_manifolds --no-biases")
      >>> stated["biases"], stated["steps"]
      (False, 3000)
    """
    name, *arguments = shlex.split(command)
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            config = tyro.cli(importlib.import_module(f"experiments.{name}").Config, args=arguments)
    except ModuleNotFoundError as error:
        raise ValueError(f"{command!r} is not a command: {error}") from None
    except SystemExit:
        raise ValueError(f"{command!r} is not accepted: {said.getvalue()}") from None
    described: dict[str, Any] = json.loads(
        json.dumps(runs.recorded(config))
    )  # as read back: tuples are lists
    return described


def expected(row: Row) -> Mapping[str, Any]:
    """The options that a row's records have; None for one that nobody gave and that is not filled in."""
    name = experiment(row)
    if name in _FILES:
        return FILLED[name, ""]
    stated = options(row.command)
    filled = dict(FILLED.get((name, stated.get("dataset", "")), {})) | dict(row.filled)
    left = {key for key, value in stated.items() if value in (None, "auto")}
    return {
        key: filled.get(key) if key in left else value
        for key, value in stated.items()
        if key not in _INCIDENTAL and not (row.published and key in left)
    }


def recorded(row: Row) -> dict[int, Any]:
    """The last record of each seed that belongs to a row; empty where it has not been run.

    Example:
      >>> from experiments.results import records
      >>> from experiments.results.rows import TABLES
      >>> sorted(records.recorded(TABLES["003"][0]))
      [0, 1, 2, 3, 4]
    """
    return {record["seed"]: record for record in _read(experiment(row)) if belongs(record, row)}


def belongs(record: Mapping[str, Any], row: Row) -> bool:
    """Whether a record is of a row.

    An option that the record lacks is younger than the record, which therefore has its default.
    """
    stated = expected(row)
    config = record["config"]
    return (
        row.metric in record["metrics"]
        and (not row.published or row.metric in record["paper"])
        and all(
            config[key] == value if key in config else value == _default(experiment(row), key)
            for key, value in stated.items()
        )
    )


def _default(name: str, option: str) -> Any:
    return options(name)[option]


def _read(name: str) -> list[dict[str, Any]]:
    path = runs.RESULTS / f"{_FILES.get(name, name)}.json"
    stored: list[dict[str, Any]] = runs.read_json(path, [])
    return stored
