"""DeepCluster: a network taught by the clusters of its own features (paper 004).

    python -m experiments.deepcluster                                # MNIST if at hand, else bundled digits
    python -m experiments.deepcluster --dataset fashion_mnist --data-dir DIR --seeds 3
    python -m experiments.deepcluster --dataset cifar10 --data-dir DIR --cycles 8
    python -m experiments.deepcluster --sweep clusters --seeds 3            # figures 3 and 4; halt: figure 5

In every cycle the features of all images are clustered, the clusters become labels, and the network, with a
new top layer, learns to predict them for an epoch. A linear classifier on one of its convolutions then tells
what was learned, beside the same classifier on the untrained network. The paper prints no table of these
accuracies, only figures. On Fashion-MNIST, with 5 clusters, 50 cycles lead from 80.9 to 82.9 % (three seeds:
+2.6, -0.4, +3.8; 13 minutes a seed on 2 cores); after 10 to 40 cycles two of the seeds were below their
untrained networks more often than above. The authors' classifier sees conv_2, linear in what lies below;
on relu_2 (--every-layer) 20 cycles over 10,000 images gain 4.6 to 5.3 points in each of three seeds. On
CIFAR-10 the classifier first falls from 33.6 to 27.4 %, and rises above 33.6 after 36 of 100 cycles, to 35.7
(one seed; 85 minutes on 2 cores); on 10,000 of its images eight cycles end below the untrained networks
(23.9, 25.0 and 22.4 against 26.6 % for 10, 100 and 1,000 clusters, four seeds), in the order of their initial
alignments (rank correlation 0.90 of eight networks with 100 clusters).
"""

import time
from collections.abc import Callable, Mapping, Sequence
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
from experiments.common import evaluation, figures
from experiments.common.options import ConfigError, check_options, command_line
from experiments.common.runs import Outcome, SeedResult, Workdir, identity, sweep
from experiments.common.tables import format_table, print_metrics
from experiments.common.training import (
    Trained,
    over_batches,
    run_steps,
    seeds_name,
)
from sul_jax import augment, deep_cluster, metrics
from sul_jax.nn import AlexNet, LeNet5
from sul_jax.seeds import of_seed, over_seeds, stacked

EXPERIMENT = "deepcluster"
_SIZE = 32  # side of the images that the networks see
_SMALL = 10_000  # below, a data set is small
# Table 1; 9 on MNIST as in the authors' log.
_CLUSTERS = {"mnist": 9, "digits": 9, "fashion_mnist": 5, "svhn_cropped": 200, "cifar10": 1000}
# What the authors' jobs tried for figures 4 and 5.
_SWEPT_CLUSTERS = {
    "fashion_mnist": (5, 7, 10, 12, 20, 200, 500),
    "svhn_cropped": (10, 50, 100, 500),
    "cifar10": (10, 100, 1000, 2000),
}
_SWEPT_HALTS = (1, 10, 30, 50)
_KMEANS: Mapping[str, Mapping[str, Any]] = {
    "scikit-learn": {"init": "k-means++", "empty_clusters": "relocate", "tolerance": 1e-4},
    "faiss": {"init": "random", "empty_clusters": "split", "tolerance": 0.0},
}


@dataclass(frozen=True)
class Config:
    """Options of the experiment; those that are not given are the paper's for the data set."""

    dataset: str = "auto"
    """mnist, fashion_mnist, svhn_cropped, cifar10, digits, FILE.npz, or auto: MNIST if at hand, else the
    bundled digits."""
    data_dir: Path | None = None
    """Folder of data sets; by default $SUL_JAX_DATA."""
    workdir: Path = Path("runs/deepcluster")
    """Where everything is written; an earlier run there is set aside, not lost."""
    architecture: Literal["lenet5", "alexnet"] | None = None
    """The network; by default alexnet (the paper's small one) for colour images, else lenet5."""
    num_clusters: int | None = None
    """Clusters; by default 9 on MNIST and the digits, 5 on Fashion-MNIST, 200 on SVHN, 1,000 on CIFAR-10,
    else the number of classes, or 10."""
    num_components: int | None = None
    """Principal components that are whitened before clustering, 0 for none; by default 256 for alexnet."""
    kmeans: Literal["scikit-learn", "faiss"] | None = None
    """Whose k-means: scikit-learn's begins by k-means++, and an empty cluster takes the farthest image;
    faiss's begins with random images, and an empty cluster halves another. (Both are this library's own, one
    start of at most 20 iterations.) By default, as in the authors' jobs, faiss's with alexnet."""
    sobel: bool | Literal["random"] | None = None
    """Filters of 3×3 pixels below the network that do not learn: True for Sobel's, random for random ones,
    drawn with the network, which the authors' code has in effect. By default random with alexnet, else
    False."""
    cycles: int | None = None
    """Cycles of clustering and training; by default 50 for lenet5, 100 for alexnet, 15 on small data."""
    halt: int | None = None
    """Cycle from which on the clusters stay as they are; 1 clusters only once."""
    fresh_head: bool = True
    """A new top layer in every cycle, as in the authors' code; --no-fresh-head keeps it once clustering has
    halted, as their text reads."""
    augmentation: Literal["code", "crops", "text"] = "code"
    """Of training images: one random crop for the whole minibatch (the authors' code, in most of its jobs),
    one for each image (its jobs on MNIST, and those on Fashion-MNIST that vary the number of clusters), or a
    horizontal flip of each (their text)."""
    learning_rate: float = 0.1
    """Of stochastic gradient descent."""
    momentum: float | None = None
    """By default 0.9 for alexnet (0.5 on SVHN), 0.1 for lenet5."""
    weight_decay: float = 1e-3
    """L2 penalty added to the gradients."""
    batch_size: int | None = None
    """Images in a minibatch; by default 64 for alexnet, else 128."""
    probe_layer: str | None = None
    """What the linear classifier sees, conv_1 … before and relu_1 … after normalisation; by default relu_5 of
    alexnet and conv_2 of lenet5."""
    every_layer: bool = False
    """Also judge every other layer by a linear classifier, of the untrained network and at the end."""
    probe_epochs: int = 20
    """Passes of the linear classifier over the training images."""
    probe_every: int | None = None
    """Cycles between two linear classifiers while learning, whose accuracies become
    probe_accuracy_after_… of the results; by default only the last cycle is judged."""
    sweep: Literal["clusters", "halt"] | None = None
    """Learn once for each of several numbers of clusters (figures 3 and 4) or cycles from which on the
    clusters stay (figure 5)."""
    sweep_values: tuple[int, ...] | None = None
    """Those numbers; by default the paper's for the data set. `halt` at the number of cycles never halts.
    (The authors' jobs that vary the number of clusters take `--augmentation crops` on Fashion-MNIST, and
    `--num-components 64 --batch-size 256` on CIFAR-10.)"""
    num_train: int | None = None
    """Use only the first training images."""
    num_test: int | None = None
    """Use only the first test images."""
    seed: int = 0
    """First seed."""
    seeds: int = 1
    """Number of seeds: seed, seed + 1, …"""
    seeds_together: int | None = None
    """Seeds trained at once, by vmap; by default all of them on an accelerator and one on a CPU."""
    resume: bool = False
    """Continue the run in the workdir."""
    record: bool = False
    """Append the results to experiments/results/deepcluster.json."""


class Learner(NamedTuple):
    """All that a cycle changes, along a leading axis of seeds.

    Attributes:
      params: of the network.
      statistics: of its batch normalisation, and what else it does not learn.
      memory: of the optimiser, for the network.
      head: kernel and bias of the top layer.
      head_memory: of the optimiser, for the top layer.
      labels: `[num_images]`, the clusters.
      history: `[cycles, 3]`: normalised mutual information with the cycle before and with the classes, mean
        loss; NaN where there is none.
    """

    params: Any
    statistics: Any
    memory: Any
    head: tuple[Array, Array]
    head_memory: Any
    labels: Array
    history: Array


class Images(NamedTuple):
    """A split of a data set on the device.

    Attributes:
      raw: `[num, height, width, channels]`, uint8 or float32.
      seen: `[num, 32, 32, channels]`, as clustered and judged.
      labels: int32 `[num]` or None.
    """

    raw: Array
    seen: Array
    labels: np.ndarray | None


def run(config: Config) -> list[SeedResult[LeNet5 | AlexNet]]:
    """Trains and evaluates; see the module's docstring.

    Args:
      config: the options.

    Returns:
      One `SeedResult` a seed; with `sweep`, one for each setting and seed.

    Raises:
      ValueError: options or data that cannot be used.
    """
    check_options(
        config,
        at_least={
            "num_clusters": 1, "num_components": 0, "cycles": 1, "halt": 1, "batch_size": 1, "seeds": 1,
            "seed": 0, "seeds_together": 1, "probe_epochs": 1, "probe_every": 1, "num_train": 1,
            "num_test": 1, "momentum": 0, "weight_decay": 0,
        },
        above={"learning_rate": 0},
    )  # fmt: skip
    dataset = data.load(config.dataset, config.data_dir)
    train = prepare(dataset.train_images, dataset.train_labels, config.num_train)
    test = prepare(dataset.test_images, dataset.test_labels, config.num_test)
    if config.sweep is not None:
        return _sweep(config, dataset, train, test)
    if config.sweep_values is not None:
        raise ConfigError(f"sweep_values={config.sweep_values} needs sweep, clusters or halt")
    config = fill_in(config, dataset, len(train.seen))
    _check_sizes(config, train, test)
    judged: list[_Judged] = []
    told_apart = identity(dataset.train_images[: config.num_train])
    evaluation_only = ("probe_layer", "every_layer", "probe_epochs", "num_test")
    with Workdir(EXPERIMENT, config, data=told_apart, may_differ=evaluation_only) as workdir:
        print(f"{dataset.name}: {len(train.raw)} training, {len(test.raw)} test images ({dataset.source})")
        assert config.seeds_together is not None
        for first in workdir.seeds[:: config.seeds_together]:
            seeds = range(first, min(first + config.seeds_together, workdir.seeds.stop))
            judged += _run_seeds(config, seeds, workdir, dataset, train, test)
            figures.cycles([one.course for one in judged], config.halt, config.workdir / "cycles.png")
    results = [one.result for one in judged]
    print_metrics(results, {})
    print(f"\nfigures, checkpoints and results: {config.workdir}")
    return results


class _Judged(NamedTuple):
    """What a seed gave and how it went."""

    result: SeedResult[LeNet5 | AlexNet]
    course: figures.Course


def _run_seeds(
    config: Config, seeds: range, workdir: Workdir, dataset: data.Dataset, train: Images, test: Images
) -> list[_Judged]:
    """Trains several seeds at once and judges one after the other, before and after."""
    networks = [build(config, seed, train.seen.shape[-1]) for seed in seeds]
    assert config.probe_layer is not None
    layers = [config.probe_layer]
    layers += [name for name in (_layers(config, test) if config.every_layer else ()) if name not in layers]
    labelled = train.labels is not None and test.labels is not None
    probes = {name: _prober(config, networks[0], train, test, name) for name in layers if labelled}
    untrained, spent = [], []
    for seed, network in zip(seeds, networks, strict=True):
        began = time.perf_counter()
        untrained.append({name: probe(seed, network) for name, probe in probes.items()})
        spent.append(time.perf_counter() - began)
    trained = learn(config, seeds, networks, train)
    judged = []
    for index, (seed, network) in enumerate(zip(seeds, networks, strict=True)):
        learner: Learner = of_seed(trained.state, index)
        values = {f"random_{_named(config, layer)}": accuracy for layer, accuracy in untrained[index].items()}
        curve = {}
        new = workdir.finished(seed) is None
        began = time.perf_counter()
        for cycle, kept in trained.snapshots if labelled else []:
            nnx.update(network, *of_seed(kept, index))
            curve[cycle] = probes[config.probe_layer](seed, network)
        nnx.update(network, learner.params, learner.statistics)
        network.eval()  # type: ignore[no-untyped-call]
        network.save(config.workdir / f"network-seed{seed}")
        for layer in layers[1:] if labelled else []:
            values[_named(config, layer)] = probes[layer](seed, network)
        training = trained.seconds / len(seeds)
        seconds = training + spent[index] + time.perf_counter() - began
        history = np.asarray(learner.history)
        names = ("cluster_change_nmi", "class_nmi", "loss")
        for number, row in enumerate(history, 1) if new else ():
            known = {name: round(float(v), 5) for name, v in zip(names, row, strict=True) if np.isfinite(v)}
            probed = {"probe_accuracy": curve[number]} if number in curve else {}
            workdir.log(seed=seed, cycle=number, **known, **probed)
        values |= {name: float(v) for name, v in zip(names, history[-1], strict=True) if np.isfinite(v)}
        if labelled:
            assert config.cycles is not None
            values["initial_alignment"] = float(history[0, 1])
            values["probe_accuracy"] = curve[config.cycles]
            values |= {f"probe_accuracy_after_{n}": a for n, a in curve.items() if n < config.cycles}
        values = {name: round(value, 4) for name, value in values.items()}
        values["training_seconds"] = round(training, 1)
        workdir.finish(seed, Outcome(values, dataset, len(train.raw), len(test.raw), seconds))
        if seed == config.seed:
            _draw_clusters(config, np.asarray(learner.labels), train)
        course = figures.Course(seed, history, curve, values.get("random_probe_accuracy"))
        judged.append(_Judged(SeedResult(seed, network, values), course))
    return judged


def _named(config: Config, layer: str) -> str:
    """What a layer's accuracy is called."""
    return "probe_accuracy" if layer == config.probe_layer else f"probe_accuracy_{layer}"


def _draw_clusters(config: Config, clusters: np.ndarray, train: Images) -> None:
    """Images of the first pseudo-classes."""
    shown = np.flatnonzero(clusters < 20)
    figures.gallery(
        np.asarray(train.raw)[shown],
        clusters[shown],
        None if train.labels is None else train.labels[shown],
        config.workdir / "clusters.png",
    )


def _sweep(
    config: Config, dataset: data.Dataset, train: Images, test: Images
) -> list[SeedResult[LeNet5 | AlexNet]]:
    """A run for each number of clusters or halting cycle, and the pictures of them all."""
    filled = fill_in(config, dataset, len(train.seen))
    assert filled.cycles is not None
    clusters = config.sweep == "clusters"
    option = "num_clusters" if clusters else "halt"
    halts = tuple(halt for halt in _SWEPT_HALTS if halt < filled.cycles)
    default = _SWEPT_CLUSTERS.get(dataset.name, (5, 10, 20)) if clusters else (*halts, filled.cycles)
    values = default if config.sweep_values is None else config.sweep_values
    check_swept(config, option, values, low=1)
    common = replace(config, sweep=None, sweep_values=None)
    settings: dict[str, dict[str, Any]] = {}
    for value in values:
        never = not clusters and value == filled.cycles
        settings[f"{option}-{value}"] = {option: None if never else value}
    for changes in settings.values():  # before the first of them takes its hours
        _check_sizes(fill_in(replace(common, **changes), dataset, len(train.seen)), train, test)
    found = sweep(run, common, settings)
    every = [result for results in found for result in results]
    if "probe_accuracy" not in every[0].metrics:
        return every
    metrics = ("initial_alignment", "probe_accuracy", "random_probe_accuracy")
    table = np.array([[[one.metrics[name] for name in metrics] for one in results] for results in found])
    words = "clusters" if clusters else "cycle from which on the clusters stay"
    curves = {"DeepCluster": (values, table[..., 1]), "untrained network": (values, table[..., 2])}
    name = "figure4_clusters.png" if clusters else "figure5_halting.png"
    figures.accuracies(curves, words, config.workdir / name, log=True)
    rows = [
        [f"{value}", *(f"{x:.3f}" for x in (of[:, 0].mean(), of[:, 1].mean(), (of[:, 1] - of[:, 2]).mean()))]
        for value, of in zip(values, table, strict=True)
    ]
    print("\n" + format_table([words, "initial alignment", "probe, %", "gain, %"], rows))
    if clusters:
        pairs = {f"{value} clusters": of[:, :2] for value, of in zip(values, table, strict=True)}
        figures.alignment_and_accuracy(pairs, config.workdir / "figure3_alignment.png")
        for name, of in pairs.items():
            if len(of) > 2:
                rank = float(spearmanr(of[:, 0], of[:, 1]).statistic)
                print(f"rank correlation of alignment and probe, {len(of)} networks, {name}: {rank:.2f}")
    print(f"\npictures of all: {config.workdir}")
    return every


def learn(config: Config, seeds: range, networks: Sequence[LeNet5 | AlexNet], train: Images) -> Trained:
    """All cycles of several seeds at once, with snapshots of the networks where they are to be judged."""
    assert config.batch_size is not None
    assert config.num_clusters is not None
    assert config.cycles is not None
    scale = moments(train)
    clusters, batch_size = config.num_clusters, config.batch_size
    for network in networks:
        network.train()  # type: ignore[no-untyped-call]
    graph = nnx.split(networks[0], nnx.Param, ...)[0]  # type: ignore[misc]
    optimizer = optax.chain(
        optax.add_decayed_weights(config.weight_decay), optax.sgd(config.learning_rate, config.momentum)
    )
    num_features = networks[0].num_features

    def fresh_head(key: Array) -> tuple[Array, Array]:
        return 0.01 * jax.random.normal(key, (num_features, clusters)), jnp.zeros(clusters)

    def loss(
        weights: tuple[Any, tuple[Array, Array]], statistics: Any, images: Array, labels: Array, key: Array
    ) -> tuple[Array, Any]:
        params, (kernel, bias) = weights
        net = nnx.merge(graph, params, statistics, copy=True)  # statistics change at this trace level
        logits = jax.nn.relu(net(images, key=key)) @ kernel + bias
        value = jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))
        return value, nnx.state(net, nnx.Not(nnx.Param))

    def step(learner: Learner, batch: tuple[Array, Array], raw: Array) -> tuple[Learner, Array]:
        chosen, key = batch
        crop_key, dropout_key = jax.random.split(key)
        images = (transform(config, crop_key, evaluation.to_float(raw[chosen])) - scale[0]) / scale[1]
        weights = learner.params, learner.head
        (value, statistics), gradients = jax.value_and_grad(loss, has_aux=True)(
            weights, learner.statistics, images, learner.labels[chosen], dropout_key
        )
        changes, memory = optimizer.update(gradients[0], learner.memory, learner.params)
        head_changes, head_memory = optimizer.update(gradients[1], learner.head_memory, learner.head)
        return learner._replace(
            params=optax.apply_updates(learner.params, changes),
            statistics=statistics,
            memory=memory,
            head=optax.apply_updates(learner.head, head_changes),
            head_memory=head_memory,
        ), value

    take_steps = over_batches(over_seeds(step, (0, 0, None)))

    @jax.jit
    def draw(key: Array, labels: Array) -> tuple[Array, Array]:
        order_key, steps_key = jax.random.split(key)
        steps = len(labels) // batch_size
        order = deep_cluster.balanced_indices(
            order_key, labels, num_clusters=clusters, num_samples=steps * batch_size
        )
        return order.reshape(steps, batch_size), jax.random.split(steps_key, steps)

    group = jax.jit(cluster(config))
    embed = features(config, networks[0])

    def begin(seed: int, network: LeNet5 | AlexNet) -> Learner:
        _, params, statistics = nnx.split(network, nnx.Param, ...)  # type: ignore[misc]
        head = fresh_head(jax.random.key(seed))
        return Learner(
            params=params,
            statistics=statistics,
            memory=optimizer.init(params),
            head=head,
            head_memory=optimizer.init(head),
            labels=jnp.zeros(len(train.raw), jnp.int32),
            history=jnp.full((config.cycles, 3), jnp.nan),
        )

    def prepare_cycle(seed: int, learner: Learner, cycle: int) -> tuple[Learner, Any]:
        """New clusters and a new head of one seed, its row of the history, and its minibatches."""
        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), cycle), 3)
        halted = config.halt is not None and cycle >= config.halt
        before = np.asarray(learner.labels)
        if not halted:
            found = embed(learner.params, learner.statistics, train.seen, scale)
            learner = learner._replace(labels=group(keys[0], found))
        now = np.asarray(learner.labels)
        if not halted or config.fresh_head:
            head = fresh_head(keys[1])
            learner = learner._replace(head=head, head_memory=optimizer.init(head))
        change = metrics.normalized_mutual_info(before, now) if cycle else np.nan
        alike = np.nan if train.labels is None else metrics.normalized_mutual_info(train.labels, now)
        history = learner.history.at[cycle, :2].set(jnp.array([change, alike]))
        return learner._replace(history=history), draw(keys[2], learner.labels)

    def advance(learner: Learner, cycle: int, _: int) -> tuple[Learner, Array]:
        ready = [prepare_cycle(seed, of_seed(learner, i), cycle) for i, seed in enumerate(seeds)]
        learners, batches = (stacked(part) for part in zip(*ready, strict=True))
        # Minibatches first, then seeds.
        batches = jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), batches)
        learner, values = take_steps(learners, batches, train.raw)
        return learner._replace(history=learner.history.at[:, cycle, 2].set(values)), jnp.mean(values)

    every = config.probe_every or config.cycles
    return run_steps(
        advance,
        stacked([begin(*pair) for pair in zip(seeds, networks, strict=True)]),
        steps=config.cycles,
        stride=1,
        folder=config.workdir / f"checkpoints-{seeds_name(seeds)}",
        title=f"seed {seeds_name(seeds)}",
        unit="cycle",
        snapshot_at={*range(every, config.cycles, every), config.cycles},
        snapshot=lambda learner: (learner.params, learner.statistics),
    )


def prepare(images: np.ndarray, labels: np.ndarray | None, number: int | None) -> Images:
    """The first images of a split, on the device."""
    raw = images[:number]
    seen = evaluation.map_batches(jax.jit(partial(middle, side=_side(images.shape[-1]))), raw)
    return Images(jnp.asarray(raw), seen, None if labels is None else labels[:number])


def _side(channels: int) -> int:
    """To which the authors enlarge images before they cut out the middle."""
    return 44 if channels == 1 else 45


def middle(images: Array, *, side: int) -> Array:
    """Images in [0, 1], resized to `side` and cut to the middle 32×32 pixels."""
    images = evaluation.to_float(images)
    resized = jax.image.resize(images, (len(images), side, side, images.shape[-1]), "bilinear")
    edge = (side - _SIZE) // 2
    return resized[:, edge : edge + _SIZE, edge : edge + _SIZE]


def moments(images: Images) -> tuple[Array, Array]:
    """Mean and standard deviation of each channel in the first images, by which images are normalised."""
    raw = np.asarray(images.raw[:_SMALL]) / (255 if images.raw.dtype == jnp.uint8 else 1)
    mean, deviation = raw.mean((0, 1, 2)), np.maximum(raw.std((0, 1, 2)), 1e-6)
    return jnp.asarray(mean, jnp.float32), jnp.asarray(deviation, jnp.float32)


def transform(config: Config, key: Array, images: Array) -> Array:
    """Training images of a minibatch, 32×32."""
    if config.augmentation == "text":
        return augment.horizontal_flip(key, middle(images, side=_side(images.shape[-1])))
    if config.augmentation == "crops":
        return augment.random_resized_crop(key, images, size=(_SIZE, _SIZE))
    # One crop for all: the images of the minibatch are the channels of one image.
    batch, height, width, channels = images.shape
    one = jnp.moveaxis(images, 0, 2).reshape(1, height, width, batch * channels)
    crop = augment.random_resized_crop(key, one, size=(_SIZE, _SIZE))
    return jnp.moveaxis(crop.reshape(_SIZE, _SIZE, batch, channels), 2, 0)


def build(config: Any, seed: int, channels: int) -> LeNet5 | AlexNet:
    """The untrained network."""
    kind = LeNet5 if config.architecture == "lenet5" else AlexNet
    return kind(channels=channels, use_sobel=config.sobel, rngs=nnx.Rngs(seed))


def features(config: Any, network: LeNet5 | AlexNet, *, layer: str | None = None) -> Any:
    """A function from parameters, statistics, 32×32 images in [0, 1] and their `moments` to features.

    Args:
      config: the options.
      network: of the architecture; its values are not used.
      layer: give the flattened values of this layer instead of the top features.
    """
    network.eval()  # type: ignore[no-untyped-call]
    graph = nnx.graphdef(network)
    network.train()  # type: ignore[no-untyped-call]

    @jax.jit
    def apply(params: Any, statistics: Any, mean: Array, deviation: Array, images: Array) -> Array:
        net = nnx.merge(graph, params, statistics)
        images = (images - mean) / deviation
        found = net(images) if layer is None else net.layers(images)[layer]
        return found.reshape(len(images), -1)

    def embed(params: Any, statistics: Any, images: Array, scale: tuple[Array, Array]) -> Array:
        return evaluation.map_batches(partial(apply, params, statistics, *scale), images, batch_size=400)

    return embed


def cluster(config: Any) -> Any:
    """The clustering of features, as a function of a key and the features."""

    def group(key: Array, found: Array) -> Array:
        ready = deep_cluster.preprocess(found, num_components=config.num_components or None)
        return deep_cluster.pseudo_labels(
            key, ready, num_clusters=config.num_clusters, **_KMEANS[config.kmeans]
        )

    return group


def _prober(
    config: Config, network: LeNet5 | AlexNet, train: Images, test: Images, layer: str
) -> Callable[[int, LeNet5 | AlexNet], float]:
    """The accuracy of a linear classifier on a layer, as a function of its seed and the network."""
    embed, scale = features(config, network, layer=layer), moments(train)

    def probe(seed: int, network: LeNet5 | AlexNet) -> float:
        _, params, statistics = nnx.split(network, nnx.Param, ...)  # type: ignore[misc]
        codes = [embed(params, statistics, images.seen, scale) for images in (train, test)]
        assert train.labels is not None
        assert test.labels is not None
        key, epochs = jax.random.key(seed), config.probe_epochs
        accuracy = evaluation.linear_probe(
            key, codes[0], train.labels, codes[1], test.labels, num_epochs=epochs
        )
        return round(accuracy, 4)

    return probe


def fill_in(config: Any, dataset: data.Dataset, num_train: int) -> Any:
    """The defaults that depend on the data, and the data set's own name."""
    colour = dataset.train_images.shape[-1] == 3
    architecture = config.architecture or ("alexnet" if colour else "lenet5")
    alexnet = architecture == "alexnet"
    clusters = _CLUSTERS.get(dataset.name)
    if clusters is None:
        clusters = 10 if dataset.train_labels is None else len(np.unique(dataset.train_labels))
    chosen = {
        "dataset": dataset.name,
        "architecture": architecture,
        "num_clusters": config.num_clusters or clusters,
        "num_components": (256 if alexnet else 0) if config.num_components is None else config.num_components,
        "kmeans": config.kmeans or ("faiss" if alexnet else "scikit-learn"),
        "sobel": ("random" if alexnet else False) if config.sobel is None else config.sobel,
    }
    if isinstance(config, Config):
        default = 15 if num_train < _SMALL else 100 if alexnet else 50
        momentum = 0.1 if not alexnet else 0.5 if dataset.name == "svhn_cropped" else 0.9
        chosen |= {
            "cycles": config.cycles or default,
            "momentum": momentum if config.momentum is None else config.momentum,
            "batch_size": config.batch_size or min(64 if alexnet else 128, num_train),
            "probe_layer": config.probe_layer or ("relu_5" if alexnet else "conv_2"),
            "seeds_together": config.seeds_together
            or (1 if jax.default_backend() == "cpu" else config.seeds),
        }
    return replace(config, **chosen)


def check_swept(config: Any, option: str, values: tuple[int, ...], *, low: int) -> None:
    """Raises where an option that is swept is given too, or has unusable values."""
    if getattr(config, option) is not None:
        raise ConfigError(f"{option} is not accepted with sweep={config.sweep!r}, which tries several")
    if not values or len(set(values)) < len(values) or min(values) < low:
        raise ConfigError(f"sweep_values={values} is not accepted: different numbers from {low} on")


def check_network(config: Any, train: Images) -> None:
    """Raises where the clustering cannot be done on this many images or features."""
    if config.num_clusters > len(train.seen):
        raise ConfigError(f"num_clusters={config.num_clusters} exceeds the {len(train.seen)} training images")
    size = nnx.eval_shape(lambda: build(config, 0, train.seen.shape[-1])).num_features
    if config.num_components > min(size, len(train.seen)):
        raise ConfigError(
            f"num_components={config.num_components} is not accepted: there are {size} features of "
            f"{len(train.seen)} images"
        )


def _check_sizes(config: Config, train: Images, test: Images) -> None:
    check_network(config, train)
    assert config.cycles is not None
    assert config.batch_size is not None
    if config.halt is not None and config.halt >= config.cycles:
        raise ConfigError(f"halt={config.halt} is not accepted: the run has {config.cycles} cycles")
    if config.batch_size > len(train.seen):
        raise ConfigError(f"batch_size={config.batch_size} exceeds the {len(train.seen)} training images")
    layers = _layers(config, test)
    if config.probe_layer not in layers:
        raise ConfigError(f"probe_layer={config.probe_layer!r} is unknown; accepted: {', '.join(layers)}")


def _layers(config: Config, images: Images) -> list[str]:
    """Names of all layers."""
    shape = jax.ShapeDtypeStruct((1, *images.seen.shape[1:]), jnp.float32)
    found = nnx.eval_shape(lambda x: build(config, 0, x.shape[-1]).layers(x), shape)
    return sorted(found)


def main() -> None:
    """The command line."""
    command_line(run, Config, description=__doc__)


if __name__ == "__main__":
    main()
