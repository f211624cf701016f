"""What a run leaves behind."""

import dataclasses
import datetime
import fcntl
import json
import os
import resource
import shutil
import tempfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import numpy as np

from experiments.common.options import ConfigError
from experiments.data import Dataset, atomic_path

RESULTS = Path(__file__).parents[1] / "results"
# Fields of a config that say where and how a run was made, not what it computed.
_NOT_RECORDED = (
    "workdir", "data_dir", "resume", "record", "seeds", "seed", "storage", "study", "save_as",
    "beside",
)  # fmt: skip

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
            earlier = found.get(key)
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
