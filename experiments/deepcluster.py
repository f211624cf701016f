"""DeepCluster: a network taught by the clusters of its own features (paper 004).

    python -m experiments.deepcluster                                # MNIST if available, else bundled digits
    python -m experiments.deepcluster --dataset fashion_mnist --data-dir DIR --seeds 3
    python -m experiments.deepcluster --dataset cifar10 --data-dir DIR --cycles 8
    python -m experiments.deepcluster --sweep clusters --seeds 3            # figures 3 and 4; halt: figure 5

In every cycle the features of all images are clustered, the clusters become labels, and the network, with a
new top layer, learns to predict them for an epoch. A linear classifier on one of its convolutions then shows
what was learned, compared with the same classifier on the untrained network. The paper prints no table of
these accuracies, only figures. On Fashion-MNIST, with 5 clusters, 50 cycles raise its accuracy from 80.9 to
82.9 % (three seeds, 13 minutes each on 2 cores); on CIFAR-10 its accuracy first falls, and passes the
untrained network's after 36 of 100 cycles (one seed, 85 minutes on 2 cores). experiments/results/README.md
lists our results.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array
from scipy.stats import spearmanr

from experiments import data
from experiments.common import deep_cluster as common
from experiments.common import evaluation, figures
from experiments.common.options import ConfigError, check_at_most, check_options, command_line
from experiments.common.runs import Learned, SeedResult, Workdir, identity, run_seeds, sweep
from experiments.common.training import Trained, run_steps, seeds_name
from sul_jax import augment, deep_cluster, metrics, probes, training
from sul_jax.cli.ranges import NonNegativeFloat, PositiveFloat, PositiveInt
from sul_jax.cli.tables import format_table
from sul_jax.learning_rule import GradientState
from sul_jax.nn import AlexNet, LeNet5
from sul_jax.seeds import of_seed, over_seeds, stacked

EXPERIMENT = "deepcluster"
_SMALL = 10_000  # below, a data set is small
# What the authors' jobs tried for figures 4 and 5.
_SWEPT_CLUSTERS = {
    "fashion_mnist": (5, 7, 10, 12, 20, 200, 500),
    "svhn_cropped": (10, 50, 100, 500),
    "cifar10": (10, 100, 1000, 2000),
}
_SWEPT_HALTS = (1, 10, 30, 50)
_HISTORY = ("cluster_change_nmi", "class_nmi", "loss")


@dataclass(frozen=True, kw_only=True)
class Config(common.NetworkOptions):
    """Options of the experiment; those not given are the paper's for the data set."""

    workdir: Path = Path("runs/deepcluster")
    """Where everything is written; a folder previous-… in it keeps an earlier run."""
    cycles: PositiveInt | None = None
    """Cycles of clustering and training; by default 50 for lenet5, 100 for alexnet, and 15 on small data."""
    halt: PositiveInt | None = None
    """Cycle from which the clusters stay fixed; 1 clusters only once."""
    fresh_head: bool = True
    """A new top layer in every cycle, as in the authors' code; --no-fresh-head keeps it once clustering has
    halted, as the paper's text says."""
    augmentation: Literal["code", "crops", "text"] = "code"
    """Of training images. code: one random crop for the whole minibatch (most jobs of the authors' code);
    crops: one crop for each image (its jobs on MNIST, and its jobs on Fashion-MNIST that vary the number of
    clusters); text: a horizontal flip of each image (the paper's text)."""
    learning_rate: PositiveFloat = 0.1
    """Learning rate of stochastic gradient descent."""
    momentum: NonNegativeFloat | None = None
    """Momentum; by default 0.9 for alexnet (0.5 on SVHN), 0.1 for lenet5."""
    weight_decay: NonNegativeFloat = 1e-3
    """L2 penalty added to the gradients."""
    batch_size: PositiveInt | None = None
    """Images in a minibatch; by default 64 for alexnet, else 128."""
    probe_layer: str | None = None
    """Layer that the linear classifier sees: conv_1, … are before normalisation, relu_1, … after it; by
    default relu_5 of alexnet and conv_2 of lenet5."""
    every_layer: bool = False
    """Also judge all other layers by linear classifiers, in the untrained network and at the end."""
    probe_epochs: PositiveInt = 20
    """Passes of the authors' linear classifier over the training images. Beside its probe_accuracy… stands a
    converged_probe_accuracy…, which depends neither on passes nor on the features' scale."""
    probe_every: PositiveInt | None = None
    """Cycles between two looks by the authors' linear classifier during learning; the results have its
    accuracies as probe_accuracy_after_…. By default only the last cycle is judged."""
    sweep: Literal["clusters", "halt"] | None = None
    """Learn once for each of several numbers of clusters (figures 3 and 4) or values of halt (figure 5)."""
    sweep_values: tuple[int, ...] | None = None
    """Values of the sweep; by default the paper's for the data set. `halt` at the number of cycles never
    halts. (The authors' jobs that vary the number of clusters take `--augmentation crops` on Fashion-MNIST,
    and `--num-components 64 --batch-size 256` on CIFAR-10.)"""
    num_test: PositiveInt | None = None
    """Use only this many test images, the first ones."""
    seeds_together: PositiveInt | None = None
    """Seeds trained at once, by vmap; by default all of them on an accelerator and one on a CPU."""


@dataclass(frozen=True, kw_only=True)
class Filled(common.FilledNetwork, Config):
    """The same with nothing left to the data."""

    cycles: int
    momentum: float
    batch_size: int
    probe_layer: str
    seeds_together: int


class Splits(NamedTuple):
    """A data set and its images on the device."""

    dataset: data.Dataset
    train: common.Images
    test: common.Images


class Learner(NamedTuple):
    """All that a cycle changes, along a leading axis of seeds.

    Attributes:
      state: of `deep_cluster.rule`.
      labels: `[num_images]`, the clusters.
      history: `[cycles, 3]`: normalised mutual information with the cycle before and with the classes, mean
        loss; NaN where there is none.
    """

    state: GradientState
    labels: Array
    history: Array


class Judge(NamedTuple):
    """Tells by linear classifiers what networks have learned."""

    config: Filled
    splits: Splits

    @property
    def layers(self) -> list[str]:
        """Those that are judged, `probe_layer` first; none without labels."""
        if self.splits.train.labels is None or self.splits.test.labels is None:
            return []
        first = self.config.probe_layer
        every = _layers(self.config, self.splits.train) if self.config.every_layer else []
        return [first, *(layer for layer in every if layer != first)]

    def accuracies(
        self, seed: int, network: LeNet5 | AlexNet, layers: Sequence[str], *, converged: bool = True
    ) -> dict[str, float]:
        """In percent, `probe_accuracy` of the `probe_layer` and `probe_accuracy_…` of others.

        Beside each, if asked for, `converged_probe_accuracy`, of a classifier that has converged on
        standardised features; it takes a minute for each 10,000 images.
        """
        train, test = self.splits.train, self.splits.test
        key, accuracies = jax.random.key(seed), {}
        for layer in layers:
            seen, unseen = (common.features(network, images.seen, layer) for images in (train, test))
            name = "probe_accuracy" if layer == self.config.probe_layer else f"probe_accuracy_{layer}"
            told = seen, np.asarray(train.labels), unseen, np.asarray(test.labels)
            accuracies[name] = probes.linear_probe(key, *told, num_epochs=self.config.probe_epochs)
            if converged:
                accuracies[f"converged_{name}"] = probes.logistic_regression(key, *told)
        return accuracies


def run(config: Config) -> list[SeedResult[LeNet5 | AlexNet]]:
    """Trains and evaluates; see the module's docstring.

    Args:
      config: the options.

    Returns:
      One `SeedResult` a seed; with `sweep`, one for each setting and seed.

    Raises:
      ValueError: options or data that cannot be used.
    """
    check_options(config)
    dataset = data.load(config.dataset, config.data_dir)
    train = common.prepare(dataset.train[: config.num_train])
    test = common.prepare(dataset.test[: config.num_test], train.scale)
    splits = Splits(dataset, train, test)
    if config.sweep is not None:
        return _sweep(config, splits)
    if config.sweep_values is not None:
        raise ConfigError(f"sweep_values={config.sweep_values} needs sweep='clusters' or sweep='halt'")
    filled = fill_in(config, splits)
    _check_sizes(filled, splits)
    told_apart = identity(dataset.train_images[: config.num_train])
    evaluation_only = ("probe_layer", "every_layer", "probe_epochs", "num_test")
    with Workdir(EXPERIMENT, filled, data=told_apart, may_differ=evaluation_only) as workdir:
        cycles, judge = Cycles(filled, train), Judge(filled, splits)
        courses: list[figures.Course] = []

        def learn(seeds: range) -> Iterator[Learned[LeNet5 | AlexNet]]:
            for course, learned in _learned(judge, cycles, workdir, seeds):
                courses.append(course)
                yield learned
            figures.cycles(courses, config.halt, config.workdir / "cycles.png")

        numbers = {"num_train": len(train.raw), "num_test": len(test.raw)}
        return run_seeds(workdir, learn, dataset, **numbers, paper={}, together=filled.seeds_together)


def fill_in(config: Config, splits: Splits) -> Filled:
    """The defaults that depend on the data."""
    network = common.network_defaults(config, splits.dataset)
    alexnet, num_train = network["architecture"] == "alexnet", len(splits.train.raw)
    cycles = 15 if num_train < _SMALL else 100 if alexnet else 50
    momentum = 0.1 if not alexnet else 0.5 if splits.dataset.name == "svhn_cropped" else 0.9
    together = 1 if jax.default_backend() == "cpu" else config.seeds
    chosen = {
        "cycles": config.cycles or cycles,
        "momentum": momentum if config.momentum is None else config.momentum,
        "batch_size": config.batch_size or min(64 if alexnet else 128, num_train),
        "probe_layer": config.probe_layer or ("relu_5" if alexnet else "conv_2"),
        "seeds_together": config.seeds_together or together,
    }
    return Filled(**{**vars(config), **network, **chosen})


def _check_sizes(config: Filled, splits: Splits) -> None:
    common.check_network(config, splits.train)
    number, layers = len(splits.train.raw), _layers(config, splits.test)
    if config.halt is not None and config.halt >= config.cycles:
        raise ConfigError(f"halt={config.halt} is not accepted: the run has {config.cycles} cycles")
    check_at_most("batch_size", config.batch_size, number, "training images")
    if config.probe_layer not in layers:
        raise ConfigError(f"probe_layer={config.probe_layer!r} is unknown; accepted: {', '.join(layers)}")


def _layers(config: Filled, images: common.Images) -> list[str]:
    """Names of all layers."""
    shape = jax.ShapeDtypeStruct((1, *images.seen.shape[1:]), jnp.float32)
    layers = nnx.eval_shape(lambda x: common.build(config, images, nnx.Rngs(0)).layers(x), shape)
    return sorted(layers)


class Cycles:
    """DeepCluster's cycles for several seeds at once, compiled once for as many seeds."""

    def __init__(self, config: Filled, train: common.Images):
        self._config, self._train = config, train
        descent = optax.sgd(config.learning_rate, config.momentum)
        self._rule = rule = deep_cluster.rule(
            partial(common.build, config, train),
            num_clusters=config.num_clusters,
            optimizer=optax.chain(optax.add_decayed_weights(config.weight_decay), descent),
            augmentation=self._augment,
        )

        def step(state: Any, batch: training.Minibatch, labels: Array, raw: Array) -> tuple[Any, Array]:
            images = evaluation.to_float(raw[batch.indices])
            state, info = rule.update(state, images, key=batch.key, labels=labels[batch.indices])
            return state, info.loss

        mapped = over_seeds(step, (0, 0, 0, None))
        self._steps = training.compiled(mapped, scan=training.scans_convolutions())
        self._encode = jax.jit(rule.encode)
        self._cluster = jax.jit(partial(deep_cluster.feature_clusters, **config.clustering))
        self._draw = jax.jit(self._minibatches)

    def learn(self, seeds: range, workdir: Workdir) -> Trained:
        """All cycles of some seeds, with snapshots of the networks where they are to be judged."""
        cycles = self._config.cycles
        every = self._config.probe_every or cycles
        return run_steps(
            partial(self._cycle, seeds),
            stacked([self._begin(seed) for seed in seeds]),
            num_steps=cycles,
            workdir=workdir,
            name=seeds_name(seeds),
            unit="cycle",
            snapshot_at={*range(every, cycles, every), cycles},
            snapshot=lambda learner: _of_network(learner.state),
        )

    def _begin(self, seed: int) -> Learner:
        return Learner(
            state=self._rule.init(jax.random.key(seed), self._train.seen),
            labels=jnp.zeros(len(self._train.raw), jnp.int32),
            history=jnp.full((self._config.cycles, len(_HISTORY)), jnp.nan),
        )

    def _cycle(self, seeds: range, learner: Learner, cycle: int) -> tuple[Learner, Array]:
        ready = [self._prepare(seed, of_seed(learner, place), cycle) for place, seed in enumerate(seeds)]
        learner, batches = (stacked(part) for part in zip(*ready, strict=True))
        # Minibatches first, then seeds.
        batches = jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), batches)
        state, losses = self._steps(learner.state, batches, learner.labels, self._train.raw)
        means = jnp.mean(losses, axis=0)
        history = learner.history.at[:, cycle, 2].set(means)
        return Learner(state, learner.labels, history), jnp.mean(means)

    def _prepare(self, seed: int, learner: Learner, cycle: int) -> tuple[Learner, training.Minibatch]:
        """New clusters and a new head of one seed, its row of the history, and its minibatches."""
        key = jax.random.fold_in(jax.random.key(seed), cycle)
        cluster_key, head_key, batch_key = jax.random.split(key, 3)
        halt, train = self._config.halt, self._train
        halted = halt is not None and cycle >= halt
        state, labels, history = learner
        if not halted:
            encode = partial(self._encode, state)
            labels = self._cluster(cluster_key, training.map_batches(encode, train.seen, batch_size=400))
        if not halted or self._config.fresh_head:
            state = deep_cluster.new_head(head_key, state)
        now, before = np.asarray(labels), np.asarray(learner.labels)
        change = metrics.normalized_mutual_info(before, now) if cycle else np.nan
        alike = np.nan if train.labels is None else metrics.normalized_mutual_info(train.labels, now)
        history = history.at[cycle, :2].set(jnp.array([change, alike]))
        return Learner(state, labels, history), self._draw(batch_key, labels)

    def _minibatches(self, key: Array, labels: Array) -> training.Minibatch:
        """Of one epoch, in which every cluster is seen equally often."""
        order_key, steps_key = jax.random.split(key)
        clusters, size = self._config.num_clusters, self._config.batch_size
        steps = len(labels) // size
        drawn = {"num_clusters": clusters, "num_samples": steps * size}
        order = deep_cluster.balanced_indices(order_key, labels, **drawn)
        return training.Minibatch(order.reshape(steps, size), jax.random.split(steps_key, steps))

    def _augment(self, key: Array, images: Array) -> Array:
        scale = self._train.scale
        return (transform(self._config.augmentation, key, images) - scale.mean) / scale.deviation


def transform(augmentation: str, key: Array, images: Array) -> Array:
    """Training images of a minibatch, 32×32; see `Config.augmentation`."""
    size = (common.SIZE, common.SIZE)
    if augmentation == "text":
        return augment.horizontal_flip(key, common.middle(images))
    if augmentation == "crops":
        return augment.random_resized_crop(key, images, size=size)
    # One crop for all: the images of the minibatch are the channels of one image.
    batch, height, width, channels = images.shape
    one = jnp.moveaxis(images, 0, 2).reshape(1, height, width, batch * channels)
    crop = augment.random_resized_crop(key, one, size=size)
    return jnp.moveaxis(crop.reshape(*size, batch, channels), 2, 0)


def _of_network(state: GradientState) -> tuple[Any, Any]:
    """What `nnx.update` takes to make a module the trained network."""
    return state.params["network"], state.rest["network"]


def _learned(
    judge: Judge, cycles: Cycles, workdir: Workdir, seeds: range
) -> Iterator[tuple[figures.Course, Learned[LeNet5 | AlexNet]]]:
    """Trains several seeds at once and judges one after the other, before and after."""
    config, splits, layers = judge.config, judge.splits, judge.layers
    began = time.perf_counter()
    networks = [common.build(config, splits.train, nnx.Rngs(seed)) for seed in seeds]
    untrained = [judge.accuracies(*of, layers) for of in zip(seeds, networks, strict=True)]
    before = time.perf_counter() - began
    trained = cycles.learn(seeds, workdir)
    for place, (seed, network) in enumerate(zip(seeds, networks, strict=True)):
        began = time.perf_counter()
        learner: Learner = of_seed(trained.state, place)
        probes: dict[int, dict[str, float]] = {}
        for cycle, kept in trained.snapshots if layers else []:
            nnx.update(network, *of_seed(kept, place))
            last = cycle == config.cycles
            probes |= {cycle: judge.accuracies(seed, network, layers[:1], converged=last)}
        nnx.update(network, *_of_network(learner.state))
        network.eval()  # type: ignore[no-untyped-call]
        network.save(config.workdir / f"network-seed{seed}")
        others = judge.accuracies(seed, network, layers[1:])
        course = figures.Course(seed, np.asarray(learner.history), probes, untrained[place])
        values = _metrics(course, others)
        values["training_seconds"] = round(trained.seconds / len(seeds), 1)
        seconds = (trained.seconds + before) / len(seeds) + time.perf_counter() - began
        if workdir.finished(seed) is None:
            _log_cycles(workdir, course)
        if seed == config.seed:
            _draw_clusters(config, np.asarray(learner.labels), splits.train)
        yield course, Learned(network, values, seconds)


def _metrics(course: figures.Course, others: dict[str, float]) -> dict[str, float]:
    """Of a seed: accuracies before, those of the other layers after, and what its course tells."""
    values = {f"random_{name}": accuracy for name, accuracy in course.untrained.items()} | others
    values |= _finite(course.history[-1])
    if course.probes:
        *between, last = sorted(course.probes)
        values["initial_alignment"] = float(course.history[0, 1])
        values |= course.probes[last]
        for cycle in between:
            values |= {f"{name}_after_{cycle}": value for name, value in course.probes[cycle].items()}
    return {name: round(value, 4) for name, value in values.items()}


def _finite(row: np.ndarray) -> dict[str, float]:
    """What is known of a cycle."""
    return {name: float(v) for name, v in zip(_HISTORY, row, strict=True) if np.isfinite(v)}


def _log_cycles(workdir: Workdir, course: figures.Course) -> None:
    for cycle, row in enumerate(course.history, 1):
        known = _finite(row) | dict(course.probes.get(cycle, {}))
        workdir.log(seed=course.seed, cycle=cycle, **{name: round(v, 5) for name, v in known.items()})


def _draw_clusters(config: Config, clusters: np.ndarray, train: common.Images) -> None:
    """Images of the first pseudo-classes."""
    shown = np.flatnonzero(clusters < 20)
    classes = None if train.labels is None else train.labels[shown]
    path = config.workdir / "clusters.png"
    figures.gallery(np.asarray(train.raw)[shown], clusters[shown], classes, path)


def _sweep(config: Config, splits: Splits) -> list[SeedResult[LeNet5 | AlexNet]]:
    """A run for each number of clusters or halting cycle, and the pictures of them all."""
    cycles, clusters = fill_in(config, splits).cycles, config.sweep == "clusters"
    option = "num_clusters" if clusters else "halt"
    halts = tuple(halt for halt in _SWEPT_HALTS if halt < cycles)
    default = _SWEPT_CLUSTERS.get(splits.dataset.name, (5, 10, 20)) if clusters else (*halts, cycles)
    values = default if config.sweep_values is None else config.sweep_values
    common.check_swept(config, option, values, low=1)
    shared = replace(config, sweep=None, sweep_values=None)
    settings: dict[str, dict[str, Any]] = {
        f"{option}-{value}": {option: None if not clusters and value == cycles else value} for value in values
    }
    for changes in settings.values():  # before the first of them takes its hours
        _check_sizes(fill_in(replace(shared, **changes), splits), splits)
    swept = sweep(run, shared, settings)
    if "probe_accuracy" in swept[0][0].metrics:
        _show_sweep(config, values, swept)
        print(f"\npictures of all: {config.workdir}")
    return [result for results in swept for result in results]


def _show_sweep(
    config: Config, values: Sequence[int], swept: Sequence[Sequence[SeedResult[LeNet5 | AlexNet]]]
) -> None:
    """A table and pictures of a sweep: of its values, each with the results of all seeds."""
    names = ("initial_alignment", "probe_accuracy", "random_probe_accuracy")
    table = np.array([[[one.metrics[name] for one in results] for results in swept] for name in names])
    alignment, probe, random = table
    clusters = config.sweep == "clusters"
    words = "clusters" if clusters else "cycle from which on the clusters stay"
    name = "figure4_clusters.png" if clusters else "figure5_halting.png"
    curves = {"DeepCluster": (values, probe), "untrained network": (values, random)}
    figures.accuracies(curves, words, config.workdir / name, log=True)
    means = np.stack([alignment, probe, probe - random]).mean(axis=-1).T
    rows = [[f"{value}", *(f"{mean:.3f}" for mean in row)] for value, row in zip(values, means, strict=True)]
    print("\n" + format_table([words, "initial alignment", "probe, %", "gain, %"], rows))
    if not clusters:
        return
    pairs = {f"{n} clusters": pair for n, pair in zip(values, np.stack([alignment, probe], -1), strict=True)}
    figures.alignment_and_accuracy(pairs, config.workdir / "figure3_alignment.png")
    for name, pair in pairs.items():
        if len(pair) > 2:
            rank = float(spearmanr(*pair.T).statistic)
            print(f"rank correlation of alignment and probe, {len(pair)} networks, {name}: {rank:.2f}")


main = partial(command_line, run, Config, description=__doc__)


if __name__ == "__main__":
    main()
