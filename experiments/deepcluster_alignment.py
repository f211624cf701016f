"""Initial alignment: what the clusters of an untrained network tell of the classes (paper 004, 4.1.1).

    python -m experiments.deepcluster_alignment --dataset mnist --data-dir DIR
    python -m experiments.deepcluster_alignment --dataset cifar10 --data-dir DIR --num-networks 10
    python -m experiments.deepcluster_alignment --sweep clusters --sweep-values 5 10 50 --num-networks 20

The features of randomly initialised networks are clustered and compared with the classes. The paper's figures
show 0.37 to 0.41 on Fashion-MNIST with 5 clusters and 0.065 to 0.085 on CIFAR-10 with 1,000; the authors'
log of 100 networks on MNIST, with 9 clusters, has a mean of 0.409. README.md lists what ours gives.
"""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from experiments import data
from experiments.common import figures
from experiments.common.options import ConfigError, check_options, command_line
from experiments.common.runs import Outcome, SeedResult, Workdir, identity, sweep
from experiments.common.training import run_steps
from experiments.deepcluster import (
    Images,
    build,
    check_network,
    check_swept,
    cluster,
    features,
    fill_in,
    moments,
    prepare,
)
from sul_jax import metrics

EXPERIMENT = "deepcluster_alignment"
_DRAWN = 2000  # images in figure 2
# By data set, for the default options: the mean of the authors' log, else the range that the networks of a
# figure span.
PAPER = {"mnist": (0.409, 0.409), "fashion_mnist": (0.37, 0.41), "cifar10": (0.065, 0.085)}


@dataclass(frozen=True)
class Config:
    """Options of the experiment; those that are not given are the paper's for the data set."""

    dataset: str = "auto"
    """mnist, fashion_mnist, cifar10, digits, FILE.npz, or auto: MNIST if at hand, else the bundled digits."""
    data_dir: Path | None = None
    """Folder of data sets; by default $SUL_JAX_DATA."""
    workdir: Path = Path("runs/deepcluster_alignment")
    """Where everything is written; an earlier run there is set aside, not lost."""
    num_networks: int = 100
    """Networks, each with its own random weights."""
    architecture: Literal["lenet5", "alexnet"] | None = None
    """The network; by default alexnet (the paper's small one) for colour images, else lenet5."""
    num_clusters: int | None = None
    """Clusters; by default 9 on MNIST and the digits, 5 on Fashion-MNIST, 200 on SVHN, 1,000 on CIFAR-10,
    else the number of classes, or 10."""
    num_components: int | None = None
    """Principal components that are whitened before clustering, 0 for none; by default 256 for alexnet."""
    kmeans: Literal["scikit-learn", "faiss"] = "scikit-learn"
    """Whose k-means, as in `experiments.deepcluster`, but scikit-learn's for every network."""
    sobel: bool | Literal["random"] | None = None
    """Filters of 3×3 pixels below the network that do not learn: True for Sobel's, random for random ones,
    drawn with the network, which the authors' code has in effect. By default random with alexnet, else
    False."""
    sweep: Literal["clusters", "components"] | None = None
    """Measure once for each of several numbers of clusters (figure 6) or principal components (figure
    B.1)."""
    sweep_values: tuple[int, ...] | None = None
    """Those numbers; needed with `sweep`."""
    num_train: int | None = None
    """Use only the first training images."""
    seed: int = 0
    """First seed; the networks of seed s are those from number s · num_networks on."""
    seeds: int = 1
    """Number of such collections of networks, from seed, seed + 1, …"""
    resume: bool = False
    """Continue the run in the workdir."""
    record: bool = False
    """Append the results to experiments/results/deepcluster_alignment.json."""


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
    check_options(
        config,
        at_least={
            "num_networks": 2, "num_clusters": 1, "num_components": 0, "num_train": 1, "seed": 0, "seeds": 1,
        },
    )  # fmt: skip
    dataset = data.load(config.dataset, config.data_dir)
    train = prepare(dataset.train_images, dataset.train_labels, config.num_train)
    if train.labels is None:
        raise ConfigError(f"dataset={config.dataset!r} has no labels to compare with")
    if config.sweep is not None:
        return _sweep(config, dataset, train)
    if config.sweep_values is not None:
        raise ConfigError(f"sweep_values={config.sweep_values} needs sweep, clusters or components")
    config = fill_in(config, dataset, len(train.seen))
    check_network(config, train)
    assert config.num_clusters is not None
    default = fill_in(Config(), dataset, len(train.seen))
    published = ("num_clusters", "architecture", "num_components", "kmeans", "sobel", "num_train")
    as_published = all(getattr(config, name) == getattr(default, name) for name in published)
    names = ("initial_alignment_mean_lowest", "initial_alignment_mean_highest")
    bounds = PAPER.get(dataset.name)
    paper = dict(zip(names, bounds, strict=True)) if bounds and as_published else {}
    network = build(config, 0, train.seen.shape[-1])
    embed, group, scale = features(config, network), jax.jit(cluster(config)), moments(train)
    channels, labels = train.seen.shape[-1], train.labels
    results = []
    told_apart = identity(dataset.train_images[: config.num_train])
    with Workdir(EXPERIMENT, config, data=told_apart) as workdir:
        print(f"{dataset.name}: {len(train.raw)} images ({dataset.source})")
        for seed in workdir.seeds:

            def advance(found: Array, index: int, _: int, seed: int = seed) -> tuple[Array, Array]:
                number = seed * config.num_networks + index
                _, params, statistics = nnx.split(  # type: ignore[misc]
                    build(config, number, channels), nnx.Param, ...
                )
                clusters = group(jax.random.key(number), embed(params, statistics, train.seen, scale))
                value = metrics.normalized_mutual_info(labels, np.asarray(clusters))
                return found.at[index].set(value), jnp.asarray(value)

            trained = run_steps(
                advance,
                jnp.zeros(config.num_networks),
                steps=config.num_networks,
                stride=1,
                folder=config.workdir / f"checkpoints-{seed}",
                title=f"seed {seed}",
                unit="network",
                value_name="alignment",
                log=partial(workdir.log, seed=seed),
            )
            found = np.asarray(trained.state)
            spread = {"mean": found.mean(), "std": found.std(ddof=1), "min": found.min(), "max": found.max()}
            values = {f"initial_alignment_{k}": round(float(v), 4) for k, v in spread.items()}
            values["num_networks"] = config.num_networks
            workdir.finish(seed, Outcome(values, dataset, len(train.raw), 0, trained.seconds, paper))
            workdir.log(seed=seed, alignments=[round(float(value), 4) for value in found])
            if seed == config.seed:
                title = f"{dataset.name}, {config.num_clusters} clusters, {len(found)} untrained networks"
                figures.alignments(found, title, [*paper.values()], config.workdir / "figure6_alignment.png")
                drawn = Images(train.raw[:_DRAWN], train.seen[:_DRAWN], labels[:_DRAWN])
                _draw_features(config, embed, scale, drawn, config.workdir / "figure2_features.png")
            print(
                "  ".join(f"{name} {value}" for name, value in values.items())
                + f"  paper {[*paper.values()]}"
            )
            results.append(SeedResult(seed, found, values))
    print(f"\nfigure and results: {config.workdir}")
    return results


def _sweep(config: Config, dataset: data.Dataset, train: Images) -> list[SeedResult[np.ndarray]]:
    """A measurement for each number of clusters or components, and the picture of them all."""
    option = "num_clusters" if config.sweep == "clusters" else "num_components"
    values = config.sweep_values or ()
    check_swept(config, option, values, low=1 if config.sweep == "clusters" else 0)
    common = replace(config, sweep=None, sweep_values=None)
    for value in values:  # before the first of them takes its minutes
        changes: dict[str, Any] = {option: value}
        check_network(fill_in(replace(common, **changes), dataset, len(train.seen)), train)
    found = sweep(run, common, {f"{option}-{value}": {option: value} for value in values})
    spread = {
        f"{value}": np.concatenate([one.network for one in results])
        for value, results in zip(values, found, strict=True)
    }
    name = "figure6_clusters" if config.sweep == "clusters" else "figure_b1_components"
    path = config.workdir / f"{name}.png"
    figures.distributions(spread, option.removeprefix("num_"), "initial alignment", path)
    return [one for results in found for one in results]


def _draw_features(
    config: Config, embed: Any, scale: tuple[Array, Array], images: Images, path: Path
) -> None:
    """Figure 2: the features of some images by the first network, coloured by class."""
    assert images.labels is not None
    network = build(config, config.seed * config.num_networks, images.seen.shape[-1])
    _, params, statistics = nnx.split(network, nnx.Param, ...)  # type: ignore[misc]
    found = embed(params, statistics, images.seen, scale)
    figures.embeddings({"features of an untrained network": np.asarray(found)}, images.labels, path)


def main() -> None:
    """The command line."""
    command_line(run, Config, description=__doc__)


if __name__ == "__main__":
    main()
