"""Initial alignment: what the clusters of an untrained network tell about the classes (paper 004, 4.1.1).

    python -m experiments.deepcluster_alignment --dataset mnist --data-dir DIR
    python -m experiments.deepcluster_alignment --dataset cifar10 --data-dir DIR --num-networks 10
    python -m experiments.deepcluster_alignment --sweep clusters --sweep-values 5 10 50 --num-networks 20

The features of randomly initialised networks are clustered and compared with the classes. The paper's figures
show 0.37 to 0.41 on Fashion-MNIST with 5 clusters and 0.065 to 0.085 on CIFAR-10 with 1,000; the authors' log
of 100 networks on MNIST, with 9 clusters, has a mean of 0.409. experiments/results/README.md lists our
results.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from experiments import data
from experiments.common import deep_cluster as common
from experiments.common import figures
from experiments.common.options import ConfigError, check_options, command_line
from experiments.common.runs import Learned, SeedResult, Workdir, identity, run_seeds, same_setting, sweep
from experiments.common.training import Trained, run_steps
from sul_jax import deep_cluster
from sul_jax.cli.ranges import Range

EXPERIMENT = "deepcluster_alignment"
_DRAWN = 2000  # images in figure 2
# By data set, for the default options: the mean of the authors' log, else the range that the networks of a
# figure span.
PAPER = {"mnist": (0.409, 0.409), "fashion_mnist": (0.37, 0.41), "cifar10": (0.065, 0.085)}


@dataclass(frozen=True, kw_only=True)
class Config(common.NetworkOptions):
    """Options of the experiment; those not given are the paper's for the data set."""

    workdir: Path = Path("runs/deepcluster_alignment")
    """Where everything is written; a folder previous-… in it keeps an earlier run."""
    num_networks: Annotated[int, Range(2)] = 100
    """Networks, each with its own random weights; the networks of seed s are numbered from s · num_networks
    on."""
    kmeans: Literal["scikit-learn", "faiss"] = "scikit-learn"
    """Whose k-means, as in `experiments.deepcluster`; by default scikit-learn's for every network."""
    sweep: Literal["clusters", "components"] | None = None
    """Measure once for each of several numbers of clusters (figure 6) or principal components (figure
    B.2)."""
    sweep_values: tuple[int, ...] | None = None
    """Values of the sweep; needed with `sweep`."""


@dataclass(frozen=True, kw_only=True)
class Filled(common.FilledNetwork, Config):
    """The same with nothing left to the data."""


def run(config: Config) -> list[SeedResult[np.ndarray]]:
    """Measures the alignments; see the module's docstring.

    Args:
      config: the options.

    Returns:
      One `SeedResult` a seed, with `sweep` one for each setting and seed; its `network` holds the
      alignments, `[num_networks]`.

    Raises:
      ValueError: options or data that cannot be used.
    """
    check_options(config)
    dataset = data.load(config.dataset, config.data_dir)
    train = common.prepare(dataset.train[: config.num_train])
    if train.labels is None:
        raise ConfigError(f"dataset={config.dataset!r} has no labels to compare with")
    if config.sweep is not None:
        return _sweep(config, dataset, train)
    if config.sweep_values is not None:
        raise ConfigError(f"sweep_values={config.sweep_values} needs sweep='clusters' or sweep='components'")
    filled = fill_in(config, dataset)
    common.check_network(filled, train)
    paper = _paper(filled, dataset)
    told_apart = identity(dataset.train_images[: config.num_train])
    with Workdir(EXPERIMENT, filled, data=told_apart) as workdir:

        def learn(seed: int) -> Learned[np.ndarray]:
            measured = _measure(filled, seed, train, workdir)
            alignments = np.asarray(measured.state)
            workdir.log(seed=seed, alignments=[round(float(value), 4) for value in alignments])
            if seed == config.seed:
                _draw(filled, alignments, train, [*paper.values()])
            return Learned(alignments, _metrics(alignments), measured.seconds)

        numbers = {"num_train": len(train.raw), "num_test": 0}
        return run_seeds(workdir, partial(map, learn), dataset, **numbers, paper=paper)


def fill_in(config: Config, dataset: data.Dataset) -> Filled:
    return Filled(**{**vars(config), **common.network_defaults(config, dataset)})


def _paper(config: Filled, dataset: data.Dataset) -> Mapping[str, float]:
    """The paper's bounds of the mean, where they are for these options."""
    default, bounds = fill_in(Config(), dataset), PAPER.get(dataset.name)
    if bounds is None or not same_setting(config, default, ("num_networks",)):
        return {}
    names = ("initial_alignment_mean_lowest", "initial_alignment_mean_highest")
    return dict(zip(names, bounds, strict=True))


def _measure(config: Filled, seed: int, train: common.Images, workdir: Workdir) -> Trained:
    """The alignments of a seed's networks."""
    labels = np.asarray(train.labels)

    def measure(alignments: Array, index: int) -> tuple[Array, Array]:
        number = seed * config.num_networks + index
        network = common.build(config, train, nnx.Rngs(number))
        key, features = jax.random.key(number), common.features(network, train.seen)
        value = deep_cluster.initial_alignment(key, features, labels, **config.clustering)
        return alignments.at[index].set(value), jnp.asarray(value)

    return run_steps(
        measure,
        jnp.zeros(config.num_networks),
        num_steps=config.num_networks,
        workdir=workdir,
        name=f"{seed}",
        unit="network",
        value_name="alignment",
        about={"seed": seed},
    )


def _metrics(alignments: np.ndarray) -> dict[str, float]:
    bounds = {"min": alignments.min(), "max": alignments.max()}
    spread = {"mean": alignments.mean(), "std": alignments.std(ddof=1)} | bounds
    values = {f"initial_alignment_{name}": round(float(value), 4) for name, value in spread.items()}
    return values | {"num_networks": len(alignments)}


def _draw(config: Filled, alignments: np.ndarray, train: common.Images, paper: list[float]) -> None:
    """Figure 6, and figure 2: the features of some images by the first network, coloured by class."""
    title = f"{config.dataset}, {config.num_clusters} clusters, {len(alignments)} untrained networks"
    figures.alignments(alignments, title, paper, config.workdir / "figure6_alignment.png")
    network = common.build(config, train, nnx.Rngs(config.seed * config.num_networks))
    features = {"features of an untrained network": np.asarray(common.features(network, train.seen[:_DRAWN]))}
    classes = np.asarray(train.labels)[:_DRAWN]
    figures.embeddings(features, classes, config.workdir / "figure2_features.png")


def _sweep(config: Config, dataset: data.Dataset, train: common.Images) -> list[SeedResult[np.ndarray]]:
    """A measurement for each number of clusters or components, and the picture of them all."""
    option = "num_clusters" if config.sweep == "clusters" else "num_components"
    values = config.sweep_values or ()
    common.check_swept(config, option, values, low=1 if config.sweep == "clusters" else 0)
    shared = replace(config, sweep=None, sweep_values=None)
    settings: dict[str, dict[str, Any]] = {f"{option}-{value}": {option: value} for value in values}
    for changes in settings.values():  # before the first of them takes its minutes
        common.check_network(fill_in(replace(shared, **changes), dataset), train)
    swept = sweep(run, shared, settings)
    networks = [np.concatenate([one.network for one in results]) for results in swept]
    spread = {f"{value}": of for value, of in zip(values, networks, strict=True)}
    name = "figure6_clusters" if config.sweep == "clusters" else "figure_b2_components"
    path = config.workdir / f"{name}.png"
    figures.distributions(spread, option.removeprefix("num_"), "initial alignment", path)
    return [one for results in swept for one in results]


main = partial(command_line, run, Config, description=__doc__)


if __name__ == "__main__":
    main()
