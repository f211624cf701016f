"""What a run leaves behind."""

import contextlib
import ctypes
import dataclasses
import datetime
import fcntl
import json
import os
import resource
import shutil
import sys
import tempfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from types import TracebackType
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import numpy as np
import tyro

from experiments.data import Dataset, atomic_path

RESULTS = Path(__file__).parent / "results"
# Fields of a config that say where and how a run was made, not what it computed.
_NOT_RECORDED = (
    "workdir", "data_dir", "resume", "record", "seeds", "seed", "storage", "study", "save_as",
    "beside",
)  # fmt: skip

# Options that older records lack, with the value that was then in effect.
ADDED_LATER: dict[str, Any] = {
    "code_whitening": 0.0, "gammas": [], "decay_epochs": 0, "schedule": "drops", "kmeans": "scikit-learn",
}  # fmt: skip


class ConfigError(ValueError):
    """A configuration that cannot run, said in one line."""


Network = TypeVar("Network")


class SeedResult(NamedTuple, Generic[Network]):
    """What one seed gave: the network and its metrics (errors and accuracies in percent)."""

    seed: int
    network: Network
    metrics: dict[str, float]


class Outcome(NamedTuple):
    """What is stored and recorded of one seed.

    Attributes:
      metrics: by name.
      dataset: what the run was made on.
      num_train: training examples seen.
      num_test: examples of the evaluation.
      seconds: of training and evaluation.
      paper: the paper's numbers, by the names of the metrics.
    """

    metrics: Mapping[str, float]
    dataset: Dataset
    num_train: int
    num_test: int
    seconds: float
    paper: Mapping[str, float] = {}


def check_options(
    config: Any, *, at_least: Mapping[str, float] = {}, above: Mapping[str, float] = {}
) -> None:
    """Raises `ConfigError` for an option out of range or infinite; one that is None is not given."""
    for bounds, words in ((at_least, "at least"), (above, "above")):
        for name, low in bounds.items():
            value = getattr(config, name)
            if value is None:
                continue
            if not (low <= value if words == "at least" else low < value) or value == float("inf"):
                raise ConfigError(f"{name}={value} is not accepted: it must be {words} {low}")
    last = getattr(config, "seed", 0) + getattr(config, "seeds", 1) - 1
    if last >= 2**32:  # jax.random.key takes 32 bits: larger seeds are smaller ones again
        raise ConfigError(f"seed={config.seed} is not accepted: the last seed, {last}, is beyond 2³² − 1")


def command_line(run: Callable[[Any], Any], config: type[Any], *, description: str) -> None:
    """Parses the command line and runs; an error is one line, with SUL_JAX_TRACEBACK set a traceback."""
    parsed = tyro.cli(config, description=description)
    _keep_freed_memory()
    try:
        run(parsed)
    except KeyboardInterrupt:
        hint = "; the same command with --resume goes on" if hasattr(parsed, "resume") else ""
        print(f"\ninterrupted{hint}", file=sys.stderr)
        raise SystemExit(130) from None
    except (ValueError, TypeError, OSError) as error:
        if os.environ.get("SUL_JAX_TRACEBACK"):
            raise
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def _keep_freed_memory() -> None:
    """Large arrays out of memory that was used before, where the C library is glibc.

    By default it returns every large array to the system, which clears the pages of the next one: a step of
    a linear classifier on 300 × 40,000 features took 26 ms so, and 14 ms without.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            c_library = ctypes.CDLL(None)
            # M_MMAP_THRESHOLD; the second, M_TRIM_THRESHOLD, alone would make more of them go back.
            if c_library.mallopt(-3, 2**31 - 1) == 1:
                c_library.mallopt(-1, 2**31 - 1)


def identity(images: np.ndarray) -> dict[str, Any]:
    """What tells training images apart from others."""
    return {"num_train": len(images), "shape": images.shape[1:], "crc32": zlib.crc32(images.tobytes())}


def make_workdir(path: Path) -> None:
    """Makes a run's folder where there is none; raises `ConfigError` where it cannot be made."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()  # an existing folder may be read-only
    except OSError as error:
        raise ConfigError(f"workdir={str(path)!r} cannot be written: {error}") from None


class Workdir:
    """The folder of a run: `config.json`, `metrics.jsonl`, `results.json`, figures, checkpoints.

    A context manager that holds a lock on the folder and at its end writes `results.json`. A new run in a
    folder that holds an earlier one sets that aside in `previous-…`; nothing is lost.
    """

    _FILES = (
        "metrics.jsonl", "results.json", "seed*.json", "*.png", "checkpoints-*", "network-*", "errors.json",
    )  # fmt: skip

    def __init__(
        self,
        experiment: str,
        config: Any,
        *,
        data: Mapping[str, Any],
        may_differ: Sequence[str] = (),
        files: Sequence[str] = _FILES,
    ):
        """Opens the folder.

        Args:
          experiment: its name.
          config: the run's dataclass. It names the folder (`workdir`, made if missing), the seeds, and with
            `resume` says that the run in the folder, of the same configuration and data, is to go on.
          data: what tells the data apart; see `identity`.
          may_differ: fields of the configuration that need not be the same on resume.
          files: patterns of what the experiment writes, and of an earlier run sets aside.

        Raises:
          ConfigError: the folder cannot be written, is in use, holds something else, or `resume` finds a
            run of another configuration.
        """
        self.path = path = config.workdir
        self._files = files
        self.seeds = range(config.seed, config.seed + config.seeds)
        self._experiment, self._config = experiment, config
        self.results: list[dict[str, Any]] = []
        # Through JSON, so that it compares equal to what is read back.
        self.described: dict[str, Any] = json.loads(
            json.dumps(
                {"experiment": experiment, "data": dict(data), **recorded(config)}
                | {"seed": config.seed, "seeds": config.seeds}
            )
        )
        make_workdir(path)
        try:
            self._lock = open(path / ".lock", "w")  # noqa: SIM115
        except OSError as error:
            raise ConfigError(f"workdir={str(path)!r} cannot be written: {error}") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(f"workdir={str(path)!r} is in use by another run") from None
        stored = path / "config.json"
        if stored.exists():
            found = self._read(stored, experiment)
            if config.resume:
                self._compare(found, may_differ)
            else:
                self._set_aside()
        elif any(next(path.glob(pattern), None) for pattern in ("seed*.json", "checkpoints-*")):
            self._set_aside()  # an interrupted setting aside, finished
        write_json(stored, self.described)

    def __enter__(self) -> "Workdir":
        return self

    def __exit__(self, kind: type[BaseException] | None, _: object, __: TracebackType | None) -> None:
        if kind is None:
            write_json(self.path / "results.json", self.results)
        self._lock.close()

    def log(self, **values: Any) -> None:
        """Appends a line to `metrics.jsonl`."""
        with open(self.path / "metrics.jsonl", "a") as file:
            file.write(json.dumps(values) + "\n")

    def finished(self, seed: int) -> dict[str, Any] | None:
        """`metrics` and `seconds` of a seed that an earlier run of this configuration has finished."""
        path = self.path / f"seed{seed}.json"
        stored: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        return stored if stored.get("config") == self.described else None

    def discard(self, seed: int) -> None:
        """Forgets a seed's metrics, before what they are metrics of is replaced."""
        (self.path / f"seed{seed}.json").unlink(missing_ok=True)

    def finish(self, seed: int, outcome: Outcome) -> None:
        """Stores what a seed gave, and records it where the run is to be and this seed has not been."""
        path = self.path / f"seed{seed}.json"
        earlier = self.finished(seed)
        metrics = dict(outcome.metrics)
        stored = {"config": self.described, "metrics": metrics, "seconds": outcome.seconds}
        recorded = earlier is not None and earlier["recorded"]
        write_json(path, stored | {"recorded": recorded})
        if earlier is None:
            self.log(seed=seed, **metrics)
        if self._config.record and not recorded:
            record(self._experiment, self._config, seed, outcome)
            write_json(path, stored | {"recorded": True})
        self.results.append({"seed": seed, "metrics": metrics})

    def _read(self, stored: Path, experiment: str) -> dict[str, Any]:
        try:
            found = json.loads(stored.read_text())
        except ValueError:
            found = None
        if not isinstance(found, dict) or found.get("experiment") != experiment:
            raise ConfigError(
                f"workdir={str(self.path)!r} holds a config.json that is not a run of {experiment}; "
                "give another --workdir"
            )
        return found

    def _compare(self, found: Mapping[str, Any], may_differ: Sequence[str]) -> None:
        for key, value in self.described.items():
            earlier = found.get(key, ADDED_LATER.get(key))
            if key not in may_differ and earlier != value:
                raise ConfigError(
                    f"workdir={str(self.path)!r} holds a run with {key}={earlier!r}, which "
                    f"cannot be resumed with {key}={value!r}; "
                    "give the same options or another --workdir"
                )

    def _set_aside(self) -> None:
        number = 1
        while (old := self.path / f"previous-{number:03d}").exists():
            number += 1
        old.mkdir()
        # The config goes last: until then the folder counts as an earlier run's.
        for pattern in (*self._files, "config.json"):
            for entry in sorted(self.path.glob(pattern)):
                shutil.move(entry, old / entry.name)


def write_json(path: Path, content: Any) -> None:
    """Writes JSON whole or not at all."""
    with atomic_path(path) as temporary:
        text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
        # Names on disk are not always UTF-8; what Python makes of them is escaped.
        temporary.write_bytes((text + "\n").encode("utf-8", "backslashreplace"))


def recorded(config: Any) -> dict[str, Any]:
    """The options that say what a run computes, not where and how."""
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    return {k: str(v) if isinstance(v, Path) else v for k, v in values.items() if k not in _NOT_RECORDED}


def record(experiment: str, config: Any, seed: int, outcome: Outcome) -> None:
    """Appends one run to `experiments/results/<experiment>.json`."""
    path = RESULTS / f"{experiment}.json"
    records = json.loads(path.read_text()) if path.exists() else []
    records.append(
        {
            "experiment": experiment,
            "config": recorded(config),
            "seed": seed,
            "dataset": {
                "name": outcome.dataset.name,
                "num_train": outcome.num_train,
                "num_test": outcome.num_test,
                "source": outcome.dataset.source,
            },
            "metrics": dict(outcome.metrics),
            "paper": dict(outcome.paper),
            "device": device_name(),
            "jax": jax.__version__,
            "seconds": round(outcome.seconds, 1),
            "date": datetime.date.today().isoformat(),
        }
    )
    write_json(path, records)


def device_name() -> str:
    """Kind and number of devices, in words."""
    device = jax.devices()[0]
    if device.platform == "cpu":
        return f"CPU, {os.cpu_count()} cores"
    return f"{jax.device_count()}× {device.device_kind}"


def peak_gib() -> float:
    """This process's memory at its peak."""
    status = Path("/proc/self/status")
    if status.exists():  # a child's `ru_maxrss` begins with its parent's
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30  # bytes on a Mac


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


def sweep(
    run: Callable[[Any], list[SeedResult[Any]]], config: Any, settings: Mapping[str, Mapping[str, Any]]
) -> list[list[SeedResult[Any]]]:
    """A run for each of several settings, each in a folder of its own, and all in one `sweep.json`.

    Args:
      run: of the experiment.
      config: what the settings have in common; its `workdir` holds the folders.
      settings: by the name of the folder, the options that differ.

    Returns:
      What `run` returned for each.
    """
    make_workdir(config.workdir)
    found, stored = [], []
    for name, changes in settings.items():
        print(f"\n{name}")
        found.append(run(dataclasses.replace(config, workdir=config.workdir / name, **changes)))
        stored += [{**changes, "seed": one.seed, "metrics": one.metrics} for one in found[-1]]
        write_json(config.workdir / "sweep.json", stored)
    return found
