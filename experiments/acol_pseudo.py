"""Clusters from pseudo supervision: which way was this image turned? (paper 002, table 3)

    python -m experiments.acol_pseudo                                    # MNIST if available, or digits
    python -m experiments.acol_pseudo --data-dir DIR --dataset usps --seeds 3
    python -m experiments.acol_pseudo --data-dir DIR --dataset mnist --transformations 1 3
    python -m experiments.acol_pseudo --sweep transformations            # figure 8; width: figure 4, right
    python -m experiments.acol_pseudo --supervision parents              # taught: digits below or above 5

A network learns to tell how images were flipped and turned. It has twenty softmax nodes for each way, and
Graph-based Activity Regularization divides the images among them. Then k-means on the layer below, with
images that are not turned, finds the classes. Beside it stand spectral clustering of each image's ten nearest
in that layer, for clusters that are not round, and both on the network before it learns. The paper reports
accuracies of 98.32 ± 0.08 % for MNIST, 96.51 ± 0.26 % for USPS and 76.80 ± 1.30 % for SVHN after 400 epochs.
experiments/results/README.md lists our results.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array
from sklearn.cluster import SpectralClustering

from experiments import data
from experiments.common import evaluation, figures
from experiments.common.options import ConfigError, RunOptions, check_at_most, check_options, command_line
from experiments.common.runs import Learned, SeedResult, Workdir, identity, run_seeds, same_setting, sweep
from experiments.common.training import Trained, run_steps, seeds_name
from experiments.data import Split
from sul_jax import acol, augment, gar, metrics, training
from sul_jax.cli.ranges import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Range
from sul_jax.learning_rule import GradientState, LearningRule
from sul_jax.nn import ACOL
from sul_jax.seeds import of_seed, over_seeds, stacked

EXPERIMENT = "acol_pseudo"
_ALL = tuple(range(1, 9))
_SMALL = 5_000  # images below which a data set is small
# Options that the network and the rule are handed as they are.
_SIZES = ("nodes_per_parent", "num_features", "num_filters")
_WEIGHTS = ("affinity_weight", "balance_weight", "frobenius_weight", "frobenius", "balance_over")
_SHARES = (0, 0.05, 0.2, 1)  # of the steps, after which figure 3 looks at F
Other = Literal["scaling", "shearing", "translation", "permutation"]
# What is swept: sizes of F around the 1,024 below which the paper sees it fail, and section 4.6's sets.
_SWEEPS: dict[str, tuple[str, tuple[Any, ...]]] = {
    "width": ("num_features", (128, 256, 512, 1024, 2048)),
    "transformations": ("transformations", (*get_args(Other), (1, 2), (1, 3), (1, 2, 3, 4), _ALL)),
}
# Accuracy in percent: table 3, section 4.3 for Z and section 4.6 for sets of transformations on MNIST.
PAPER: dict[Any, float] = {
    ("mnist", _ALL, "features"): 98.32,
    ("mnist", _ALL, "logits"): 98.16,
    ("mnist", (1, 2, 3, 4), "features"): 97.80,
    ("mnist", (1, 3), "features"): 96.84,
    ("mnist", (1, 2), "features"): 72.52,
    ("usps", _ALL, "features"): 96.51,
    ("svhn_cropped", _ALL, "features"): 76.80,
}


@dataclass(frozen=True, kw_only=True)
class Config(RunOptions):
    """Options of the experiment; the defaults are the paper's, except on small data."""

    dataset: str = "auto"
    """mnist, usps (all of it, as in the paper), fashion_mnist, svhn_cropped, digits, FILE.npz, or auto: MNIST
    if available, else the bundled digits."""
    workdir: Path = Path("runs/acol_pseudo")
    """Where everything is written; a folder previous-… in it keeps an earlier run."""
    supervision: Literal["pseudo", "parents"] = "pseudo"
    """What is taught. pseudo: how an image is transformed; parents: whether its label is below the middle of
    the classes (images are then not transformed)."""
    transformations: tuple[int, ...] | Other = _ALL
    """Transformations of eq. 15: 1 is none, 2 to 4 turn by 90, 180 and 270 degrees, 5 to 8 are the same,
    mirrored. Or the name of another kind, which gives eight of it; section 4.6 finds no classes with these.
    Their sizes are ours: the paper gives none."""
    nodes_per_parent: Annotated[int, Range(2)] = 20
    """Softmax nodes for each class that is taught."""
    num_features: PositiveInt = 2048
    """Width of F, the layer below the nodes."""
    num_filters: PositiveInt | None = None
    """Filters of the first pair of convolutions; by default 32, or 16 for small data. The second pair has
    twice as many."""
    epochs: PositiveInt | None = None
    """Passes over the images; by default 400 (on MNIST half a day on two cores), or 85 for small data,
    chosen by the accuracies on the bundled digits."""
    batch_size: PositiveInt | None = None
    """Images in a minibatch; by default 400, or 50 for small data."""
    learning_rate: PositiveFloat = 1e-3
    """Adam's learning rate."""
    decay_epochs: NonNegativeInt = 0
    """Last epochs, over which the learning rate falls linearly to 0; the paper has none."""
    affinity_weight: NonNegativeFloat = 0.1
    """Weight c_α of the affinity."""
    balance_weight: NonNegativeFloat = 1.0
    """Weight c_β of the balance."""
    frobenius_weight: NonNegativeFloat = 1e-6
    """Weight c_F of the Frobenius term."""
    frobenius: gar.Frobenius = "squared"
    """The term of c_F: squared is ΣZ², as in the authors' code; mean its value for their batch of 400; norm
    is ‖B‖_F, as printed in the paper."""
    balance_over: NonNegativeInt = 0
    """Images, of this minibatch and earlier ones, over which the nodes' activity is averaged for the balance;
    0 is the minibatch alone, as in the paper."""
    representation: Literal["features", "logits", "probabilities"] = "features"
    """What k-means sees: F, Z or softmax(Z)."""
    num_clusters: PositiveInt | None = None
    """Clusters; by default the number of classes."""
    sweep: Literal["width", "transformations"] | None = None
    """Train once for each of several widths of F (figure 4, right) or sets of transformations (figure 8)."""
    num_train: PositiveInt | None = None
    """Use only this many training images, the first ones."""
    num_test: PositiveInt | None = None
    """Use only this many test images, the first ones."""
    seeds_together: PositiveInt | None = None
    """Seeds trained at once, by vmap; by default all of them on an accelerator and one on a CPU."""


@dataclass(frozen=True, kw_only=True)
class Filled(Config):
    """The options with nothing left open."""

    num_filters: int
    epochs: int
    batch_size: int
    num_clusters: int
    seeds_together: int


def run(config: Config) -> list[SeedResult[ACOL]]:
    """Trains and evaluates; see the module's docstring.

    Args:
      config: the options.

    Returns:
      One `SeedResult` a seed; with `sweep`, one for each setting and seed.

    Raises:
      ValueError: options or data that cannot be used.
    """
    _check(config)
    if config.sweep is not None:
        return _sweep(replace(config, sweep=None), config.sweep)
    dataset, train, test = _load(config)
    filled = fill_in(config, dataset, train, test)
    evaluation_only = ("representation", "num_clusters", "num_test")
    told_apart = identity(dataset.train_images[: config.num_train])
    with Workdir(EXPERIMENT, filled, data=told_apart, may_differ=evaluation_only) as workdir:

        def learn(seeds: range) -> Iterator[Learned[ACOL]]:
            trained = train_seeds(filled, seeds, train, workdir)
            for index, seed in enumerate(seeds):
                start = time.perf_counter()
                network = _network(filled, seed, train.images.shape[1:])
                before = {} if test.labels is None else _evaluate(filled, seed, network, test)[0]
                nnx.update(network, of_seed(trained.state.params, index))
                network.save(config.workdir / f"network-seed{seed}")
                values, clusters = _evaluate(filled, seed, network, test)
                values |= {f"untrained_{name}": before[name] for name in before if "accuracy" in name}
                if seed == config.seed:
                    _draw(filled, network, test, trained, dataset.test_images, clusters)
                seconds = trained.seconds / len(seeds) + time.perf_counter() - start
                yield Learned(network, values, seconds)

        numbers = {"num_train": len(train.images), "num_test": len(test.images)}
        return run_seeds(
            workdir, learn, dataset, **numbers, paper=_paper(filled), together=filled.seeds_together
        )


def _paper(config: Filled) -> dict[str, float]:
    """The paper's accuracy of this very setting, but for the number of epochs."""
    published = Config(
        dataset=config.dataset,
        transformations=config.transformations,
        representation=config.representation,
        num_filters=32,
        batch_size=400,
        num_clusters=10,
    )
    accuracy = PAPER.get((config.dataset, config.transformations, config.representation))
    if accuracy is None or not same_setting(config, published, ("epochs", "seeds_together")):
        return {}
    return {"clustering_accuracy": accuracy}


def learning_rule(config: Filled, image_shape: tuple[int, ...], *, num_images: int) -> LearningRule:
    """The rule that is trained."""
    height, width, channels = image_shape
    per_epoch = -(-num_images // config.batch_size)
    falling = per_epoch * config.decay_epochs
    before = per_epoch * config.epochs - falling
    return acol.rule(
        (height, width, channels),
        transformations=_ways(config, (height, width, channels)),
        num_parents=2 if config.supervision == "parents" else None,
        optimizer=optax.adam(optax.linear_schedule(config.learning_rate, 0.0, falling, before)),
        **{name: getattr(config, name) for name in (*_SIZES, *_WEIGHTS)},
    )


def train_seeds(config: Filled, seeds: range, train: Split, workdir: Workdir) -> Trained:
    """Networks of several seeds side by side: a rule's state with a leading axis of seeds."""
    number = len(train.images)
    rule = learning_rule(config, train.images.shape[1:], num_images=number)
    taught = config.supervision == "parents"

    def one(state: GradientState, batch: training.Minibatch, images: Array, parents: Array) -> Any:
        given = {"parents": parents[batch.indices]} if taught else {}
        return rule.update(state, images[batch.indices], key=batch.key, **given)

    keys = [jax.random.key(seed) for seed in seeds]
    batches = training.Minibatches(jnp.stack(keys), number, config.batch_size, fill_last=True)
    parents = jnp.asarray(_parents(train)) if taught else jnp.zeros(number, jnp.int32)
    steps, names, scan = config.epochs * batches.per_epoch, seeds_name(seeds), training.scans_convolutions()
    return run_steps(
        training.compiled(over_seeds(one, (0, 0, None, None)), scan=scan),
        stacked([rule.init(key, None) for key in keys]),
        batches,
        train.images,
        parents,
        num_steps=steps,
        workdir=workdir,
        name=names,
        stride=200 if scan else 1,
        about={"seeds": names},
        snapshot_at={round(share * steps) for share in _SHARES},
        snapshot=lambda state: jax.tree.map(lambda leaf: leaf[:1], state.params),
    )


def representations(network: ACOL, images: Array) -> dict[str, np.ndarray]:
    """F, Z and softmax(Z) of images as they are."""
    graph, state = nnx.split(network)
    return jax.device_get(training.map_batches(partial(_representations, graph, state), images))


@partial(jax.jit, static_argnums=0)
def _representations(graph: Any, state: Any, batch: Array) -> dict[str, Array]:
    net = nnx.merge(graph, state)
    logits = net(batch)
    return {"features": net.features(batch), "logits": logits, "probabilities": jax.nn.softmax(logits)}


def _ways(config: Config, image_shape: tuple[int, ...]) -> list[augment.Transformation]:
    """What pseudo supervision tells apart."""
    if not isinstance(config.transformations, str):
        return [augment.FLIPS_AND_ROTATIONS[number - 1] for number in config.transformations]
    height, width = image_shape[:2]
    number = len(_ALL)
    if config.transformations == "permutation":
        return [
            partial(_permuted, np.random.default_rng(index).permutation(height * width))
            for index in range(number)
        ]
    still, angles = np.eye(2), np.arange(number) * 2 * np.pi / number
    matrices, offset = {
        "scaling": (still / np.linspace(0.6, 1.3, number)[:, None, None], 0.0),
        "shearing": (still + np.linspace(-0.7, 0.7, number)[:, None, None] * np.eye(2, k=1), 0.0),
        "translation": (still[None].repeat(number, 0), 0.2 * min(height, width)),
    }[config.transformations]
    shifts = offset * np.stack([np.sin(angles), np.cos(angles)], axis=1)
    return [partial(_affine, *pair) for pair in zip(matrices, shifts, strict=True)]


def _permuted(order: np.ndarray, images: Array) -> Array:
    return images.reshape(len(images), -1, images.shape[-1])[:, order].reshape(images.shape)


def _affine(matrix: np.ndarray, shift: np.ndarray, images: Array) -> Array:
    """Pixel p from the place matrix · p + shift, both from the centre; nothing beyond the border."""
    sides = np.array(images.shape[1:3])
    centre = (sides - 1)[:, None, None] / 2
    places = np.tensordot(matrix, np.indices(images.shape[1:3]) - centre, 1) + centre + shift[:, None, None]

    def one(channel: Array) -> Array:
        return jax.scipy.ndimage.map_coordinates(channel, list(places), order=1)

    return jax.vmap(jax.vmap(one, -1, -1))(images)


def _network(config: Filled, seed: int, image_shape: tuple[int, ...]) -> ACOL:
    """The network as it starts to learn."""
    height, width, channels = image_shape
    return ACOL(
        (height, width, channels),
        num_parents=_num_parents(config),
        **{name: getattr(config, name) for name in _SIZES},
        rngs=nnx.Rngs(jax.random.key(seed)),
    )


def _evaluate(config: Filled, seed: int, network: ACOL, test: Split) -> tuple[dict[str, float], np.ndarray]:
    """In percent the one-to-one accuracy, purity and mutual information of k-means, and the accuracy of
    spectral clustering; and k-means' clusters."""
    codes, number = representations(network, test.images)[config.representation], config.num_clusters
    key, names = jax.random.key(seed), ("clustering_accuracy", "purity", "normalized_mutual_info")
    clustering = evaluation.cluster(key, jnp.asarray(codes), test.labels, num_clusters=number)
    scores = {name: clustering.scores[name] for name in names if clustering.scores}
    if test.labels is not None and number < len(codes) - 1:
        graph = {"n_neighbors": min(10, len(codes)), "assign_labels": "cluster_qr", "random_state": seed}
        spectral = SpectralClustering(number, affinity="nearest_neighbors", **graph).fit_predict(codes)
        scores["spectral_accuracy"] = 100 * metrics.clustering_accuracy(test.labels, spectral)
    return {name: round(value, 3) for name, value in scores.items()}, clustering.labels


def _draw(
    config: Filled, network: ACOL, test: Split, trained: Trained, raw: np.ndarray, clusters: np.ndarray
) -> None:
    """The paper's figures, of the first seed."""
    folder, shown = config.workdir, test[:2000]
    images, labels, raw, clusters = shown.images, shown.labels, raw[:2000], clusters[:2000]
    layers = representations(network, images)
    colours = clusters if labels is None else labels
    while_learning, then = {}, nnx.clone(network)
    for step, params in trained.snapshots:
        nnx.update(then, of_seed(params, 0))
        codes = representations(then, images)["features"]
        scores = _clustered(codes, labels, len(np.unique(colours))).scores
        accuracy = f", {scores['clustering_accuracy']:.1f} %" if scores else ""
        while_learning[f"step {step}{accuracy}"] = codes
    figures.embeddings(while_learning, colours, folder / "figure3_while_learning.png")
    spaces = {"F": layers["features"], "Z": layers["logits"], "softmax(Z)": layers["probabilities"]}
    figures.embeddings(spaces, colours, folder / "figure5_representations.png")
    kernel = np.asarray(network.nodes.kernel[...])
    norms = {"F": np.linalg.norm(kernel, axis=1), "Z": np.linalg.norm(kernel, axis=0)}
    figures.activity(spaces, norms, folder / "figure4_activity.png")
    _draw_graphs(config, network, shown[:500], colours[:500])
    figures.gallery(raw, clusters, labels, folder / "figure7_clusters.png")
    for number in (number for number in (7, 20) if number <= len(images)):
        few = _clustered(layers[config.representation], None, number).labels
        figures.gallery(raw, few, labels, folder / f"figure7_{number}_clusters.png")


def _draw_graphs(config: Filled, network: ACOL, some: Split, colours: np.ndarray) -> None:
    """Figure 6, of the first two parents: every other image transformed in the second way, or labelled so."""
    images, parents = some.images, np.arange(len(some)) % min(2, network.num_parents)
    if config.supervision == "pseudo":
        ways = _ways(config, network.image_shape)[:2]
        images = jnp.where((parents == 0)[:, None, None, None], ways[0](images), ways[-1](images))
    else:
        parents = _parents(some)
    seen = representations(network, images)
    pooled = np.asarray(gar.acol_pool(jnp.asarray(seen["probabilities"]), num_parents=network.num_parents))
    groups = parents * (int(colours.max()) + 1) + colours
    path = config.workdir / "figure6_graphs.png"
    figures.example_graphs(pooled, np.maximum(seen["logits"], 0), groups, path)


def _clustered(codes: np.ndarray, labels: np.ndarray | None, number: int) -> evaluation.Clustering:
    return evaluation.cluster(jax.random.key(0), jnp.asarray(codes), labels, num_clusters=number)


def _sweep(config: Config, kind: str) -> list[SeedResult[ACOL]]:
    """A run in a folder of its own for each setting, and the picture of them all."""
    option, values = _SWEEPS[kind]
    names = ["-".join(map(str, value)) if isinstance(value, tuple) else f"{value}" for value in values]
    settings = {f"{option}-{name}": {option: value} for name, value in zip(names, values, strict=True)}
    swept = sweep(run, config, settings)
    accuracies = [[one.metrics.get("clustering_accuracy", np.nan) for one in results] for results in swept]
    networks = {
        f"{name}: {np.mean(several):.1f} %": results[0].network
        for name, several, results in zip(names, accuracies, swept, strict=True)
    }
    if kind == "width":
        curves = {"k-means": (values, accuracies)}
        figures.accuracies(curves, "width of F", config.workdir / "figure4_width.png", log=True)
    else:
        _, _, test = _load(config)
        spaces = {
            name: representations(network, test.images[:2000])["features"]
            for name, network in networks.items()
        }
        labels = np.zeros(len(test.images), int) if test.labels is None else test.labels
        figures.embeddings(spaces, labels[:2000], config.workdir / "figure8_transformations.png")
    return [one for results in swept for one in results]


def _load(config: Config) -> tuple[data.Dataset, Split, Split]:
    dataset = data.load(config.dataset, config.data_dir)
    if dataset.name == "usps":  # "USPS-full"
        dataset = data.joined(dataset)
    train = _prepare(dataset.train[: config.num_train], dataset.name)
    test = _prepare(dataset.test[: config.num_test], dataset.name)
    return dataset, train, test


def _prepare(split: Split, name: str) -> Split:
    """On the device, floating."""
    values = evaluation.to_float(jnp.asarray(split.images))
    if name == "digits":  # eight pixels wide to begin with: 20 are enough, at half the cost
        values = jax.image.resize(values, (len(values), 20, 20, values.shape[-1]), "linear")
    if name == "svhn_cropped":  # as the authors: each split less its mean image, then each image standardised
        values = values - values.mean(axis=0)
        mean, scale = (f(values, axis=(1, 2, 3), keepdims=True) for f in (jnp.mean, jnp.std))
        values = (values - mean) / (scale + 1e-8)
    return Split(values, split.labels)


def fill_in(config: Config, dataset: data.Dataset, train: Split, test: Split) -> Filled:
    """The defaults that depend on the data, and checks of what depends on them."""
    number = len(train.images)
    num_clusters = config.num_clusters or train.num_classes
    if num_clusters is None:
        raise ConfigError("num_clusters is needed for images without labels")
    small = number < _SMALL
    defaults = {
        "dataset": dataset.name,
        "epochs": config.epochs or (85 if small else 400),
        "batch_size": config.batch_size or min(50 if small else 400, number),
        "num_filters": config.num_filters or (16 if small else 32),
        "num_clusters": num_clusters,
        "seeds_together": config.seeds_together or (1 if jax.default_backend() == "cpu" else config.seeds),
    }
    filled = Filled(**{**vars(config), **defaults})
    check_at_most("num_clusters", num_clusters, len(test.images), "images")
    check_at_most("decay_epochs", filled.decay_epochs, filled.epochs, "epochs")
    check_at_most("batch_size", filled.batch_size, number, "images")
    if config.supervision == "parents" and train.labels is None:
        raise ConfigError("supervision='parents' needs labels")
    height, width = train.images.shape[1:3]
    turned = config.supervision == "pseudo" and height != width
    if turned and not {2, 4, 6, 8}.isdisjoint(config.transformations):
        raise ConfigError(
            f"transformations={config.transformations} is not accepted: quarter turns change the shape of "
            f"{height}×{width} images; 1, 3, 5 and 7 do not"
        )
    return filled


def _parents(train: Split) -> np.ndarray:
    """The class that each image is taught by where transformations are not: the lower labels or the upper."""
    assert train.labels is not None
    classes, place = np.unique(train.labels, return_inverse=True)
    return (place >= len(classes) / 2).astype(np.int32)


def _num_parents(config: Config) -> int:
    if config.supervision == "parents":
        return 2
    return len(_ALL if isinstance(config.transformations, str) else config.transformations)


def _check(config: Config) -> None:
    check_options(config)
    numbers = config.transformations
    if config.sweep is not None:
        option, _ = _SWEEPS[config.sweep]
        if getattr(config, option) != getattr(Config(), option):
            raise ConfigError(f"{option} is not accepted with sweep={config.sweep!r}, which tries several")
        if option == "transformations" and config.supervision == "parents":
            raise ConfigError("sweep='transformations' needs supervision='pseudo': parents turns no image")
    if isinstance(numbers, str):
        if numbers not in get_args(Other):
            raise ConfigError(f"transformations={numbers!r} is not one of {', '.join(get_args(Other))}")
        return
    if not numbers or len(set(numbers)) < len(numbers) or not set(numbers) <= set(_ALL):
        raise ConfigError(f"transformations={numbers} is not accepted: give different numbers from 1 to 8")


main = partial(command_line, run, Config, description=__doc__)


if __name__ == "__main__":
    main()
