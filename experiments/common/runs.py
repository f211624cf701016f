"""What a run leaves behind."""

import dataclasses
import datetime
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any, Generic, NamedTuple, TypeVar

import jax

from experiments.data import Dataset
from sul_jax._files import read_json as read_json
from sul_jax._files import write_json as write_json
from sul_jax.cli import workdir
from sul_jax.cli.tables import format_table
from sul_jax.cli.workdir import identity as identity
from sul_jax.cli.workdir import make_workdir as make_workdir

RESULTS = Path(__file__).parents[1] / "results"
# Fields of a config that say where and how a run was made, not what it computed.
_NOT_RECORDED = (
    "workdir", "data_dir", "resume", "record", "seeds", "seed", "track", "storage", "study", "save_as",
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


class Workdir(workdir.Workdir):
    """The folder of an experiment: that of any run, with a file a seed, and records."""

    _FILES = (
        "results.json", "seed*.json", "*.png", "checkpoints-*", "network-*", "errors.json",
    )  # fmt: skip
    _STATE = ("seed*.json", "checkpoints-*", "network-*")

    def __init__(
        self, experiment: str, config: Any, *, data: Mapping[str, Any], may_differ: Sequence[str] = ()
    ):
        """Opens the folder.

        Args:
          experiment: its name.
          config: the run's dataclass. It names the folder (`workdir`, made if missing), the seeds, and with
            `resume` says that the run in the folder, of the same configuration and data, is to go on.
          data: what tells the data apart; see `identity`.
          may_differ: fields of the configuration that need not be the same on resume.

        Raises:
          ConfigError: the folder cannot be written, is in use, holds something else, or `resume` finds a
            run of another configuration.
        """
        self.seeds = range(config.seed, config.seed + config.seeds)
        self._experiment, self._config = experiment, config
        about = {"data": dict(data), **recorded(config), "seed": config.seed, "seeds": config.seeds}
        super().__init__(
            config.workdir,
            experiment,
            about,
            files=self._FILES,
            state=self._STATE,
            resume=config.resume,
            may_differ=may_differ,
            track=getattr(config, "track", None),
        )

    def finished(self, seed: int) -> dict[str, Any] | None:
        """`metrics` and `seconds` of a seed that an earlier run of this configuration has finished."""
        path = self.path / f"seed{seed}.json"
        stored: dict[str, Any] = read_json(path, {})
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


def recorded(config: Any) -> dict[str, Any]:
    """The options that say what a run computes, not where and how."""
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    return {k: str(v) if isinstance(v, Path) else v for k, v in values.items() if k not in _NOT_RECORDED}


def same_setting(one: Any, other: Any, may_differ: Collection[str] = ()) -> bool:
    """Whether two configs, but for some options, compute the same: a run and the paper's, for instance."""
    wanted = recorded(other)
    return all(value == wanted[name] for name, value in recorded(one).items() if name not in may_differ)


def record(experiment: str, config: Any, seed: int, outcome: Outcome) -> None:
    """Appends one run to `experiments/results/<experiment>.json`."""
    path = RESULTS / f"{experiment}.json"
    records = read_json(path, [])
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
    """This process's memory at its peak; 0 where the system does not tell."""
    status = Path("/proc/self/status")
    if status.exists():  # a child's `ru_maxrss` begins with its parent's
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 2**20
    try:
        import resource  # not on Windows
    except ImportError:
        return 0.0
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
    results, stored = [], []
    for name, changes in settings.items():
        print(f"\n{name}")
        results.append(run(dataclasses.replace(config, workdir=config.workdir / name, **changes)))
        stored += [{**changes, "seed": one.seed, "metrics": one.metrics} for one in results[-1]]
        write_json(config.workdir / "sweep.json", stored)
    return results


class Learned(NamedTuple, Generic[Network]):
    """What a seed learned: the network, its metrics, and the seconds of training and evaluation."""

    network: Network
    metrics: dict[str, float]
    seconds: float


def run_seeds(
    workdir: Workdir,
    learn: Callable[[range], Iterable[Learned[Network]]],
    dataset: Dataset,
    *,
    num_train: int,
    num_test: int,
    paper: Mapping[str, float],
    together: int = 1,
) -> list[SeedResult[Network]]:
    """Learns every seed of a run, stores and records what it gave, and prints a table.

    Args:
      workdir: of the run.
      learn: from seeds that are trained together to what each gave, one after the other; of a function of
        one seed, `partial(map, function)`.
      dataset: what is learned from.
      num_train: training examples.
      num_test: examples of the evaluation.
      paper: the paper's numbers, by the names of the metrics.
      together: seeds that are trained together.
    """
    print(f"{dataset.name}: {num_train} training, {num_test} test examples ({dataset.source})")
    results = []
    for first in workdir.seeds[::together]:
        seeds = range(first, min(first + together, workdir.seeds.stop))
        for seed, (network, metrics, seconds) in zip(seeds, learn(seeds), strict=True):
            workdir.finish(seed, Outcome(metrics, dataset, num_train, num_test, seconds, paper))
            results.append(SeedResult(seed, network, metrics))
    print_metrics(results, paper)
    print(f"\nfigures, networks and results: {workdir.path}")
    return results


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
