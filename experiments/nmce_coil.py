"""Objects from all sides: COIL-20 and COIL-100 clustered by their manifolds (paper 003, section 4.2).

    python -m experiments.nmce_coil --data-dir DIR                       # COIL-20 at the paper's size
    python -m experiments.nmce_coil --data-dir DIR --image-size 32 --depth 10 --num-filters 16 --steps 300
    python -m experiments.nmce_coil --data-dir DIR --dataset coil100 --depth 10 --num-features 200 \
        --eps-squared 0.001 --steps 10000 --gamma 200 --l1-ratio 0.5 --num-clusters 94

A ResNet learns features by the total coding rate (eq. 5), the whole data set as one batch; subspace
clustering of the features (self-expression by an elastic net, then spectral clustering) finds the objects. A
network that has learned only for minutes needs a sparser graph than the paper's:
`--gammas 1.5 2 3 5 10 20 50 400` (9 to 16 % error instead of 49 on COIL-20). The paper reports 0.0 % for
COIL-20 and 11.53 % for COIL-100; its published code reaches the second number with 94 clusters, which were
tuned on labels. So experiments/results/README.md has our results for 94 and for 100 clusters, with seeds,
device and time. Every run also clusters two controls: features of the untrained network, and plain pixels,
which on COIL-20 need no network (0.14 %).
"""

import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array
from sklearn.decomposition import TruncatedSVD
from sklearn.preprocessing import normalize

from experiments import data
from experiments.common import embeddings, evaluation, figures
from experiments.common.options import ConfigError, check_at_most, check_options, command_line
from experiments.common.runs import Learned, SeedResult, Workdir, identity, run_seeds, same_setting
from sul_jax import augment, metrics, nmce, subspace_clustering, training
from sul_jax.cli.ranges import NonNegativeFloat, PositiveFloat, PositiveInt, Range
from sul_jax.nn import NMCE

EXPERIMENT = "nmce_coil"


@dataclass(frozen=True, kw_only=True)
class Config(embeddings.Config):
    """Options of the experiment; the defaults are the paper's for COIL-20."""

    dataset: str = "coil20"
    """coil20, coil100, or FILE.npz."""
    workdir: Path = Path("runs/nmce_coil")
    """Where everything is written; a folder previous-… in it keeps an earlier run."""
    image_size: int = 64
    """Side to which images are resized."""
    num_filters: int = 32
    """Filters of the ResNet's first stage."""
    num_features: int = 40
    """Dimensions of the embedding."""
    steps: PositiveInt = 2000
    """Training steps, each on all images."""
    learning_rate: PositiveFloat = 1e-3
    """Adam's learning rate at the start, annealed to 0 by a cosine."""
    weight_decay: NonNegativeFloat = 1e-6
    """L2 penalty added to the gradients."""
    eps_squared: float = 0.01
    """Squared distortion of the coding rate."""
    invariance_weight: NonNegativeFloat = 20.0
    """Weight λ of the views' similarity."""
    gamma: Annotated[float, Range(1, open=True)] = 400.0
    """Self-expression: a larger value gives a closer fit and more neighbours."""
    gammas: tuple[Annotated[float, Range(1, open=True)], ...] = ()
    """Candidates, instead of one gamma. The smallest one is taken whose graph has no more connected parts
    than there are clusters."""
    l1_ratio: Annotated[float, Range(0, 1, open=True)] = 1.0
    """Self-expression: 1 is the lasso, a smaller value an elastic net."""


@dataclass(frozen=True, kw_only=True)
class Filled(Config):
    """Options of which none waits for the data."""

    num_clusters: int


# Error in percent (table 1), and the options that it was reached with.
PAPER = (
    (0.0, Config(num_clusters=20)),
    (
        11.53,
        Config(
            dataset="coil100", depth=10, num_features=200, eps_squared=0.001, steps=10_000, gamma=200.0,
            l1_ratio=0.5, num_clusters=94,
        ),
    ),
)  # fmt: skip


def run(config: Config) -> list[SeedResult[NMCE]]:
    """Trains and evaluates; see the module's docstring.

    Args:
      config: the options.

    Returns:
      One `SeedResult` a seed.

    Raises:
      ValueError: options or data that cannot be used.
    """
    check_options(config)
    dataset = data.load(config.dataset, config.data_dir)
    split = dataset.train[: config.num_images]
    data.check_unit_range(dataset.train_images)
    images, labels = resized(split.images, config.image_size), split.labels
    num_clusters = config.num_clusters or split.num_classes
    if num_clusters is None:
        raise ConfigError("num_clusters is needed for images without labels")
    check_at_most("num_clusters", num_clusters, len(images), "images")
    config = replace(config, dataset=dataset.name)
    filled = Filled(**{**vars(config), "num_clusters": num_clusters})
    evaluation_only = ("num_clusters", "gamma", "gammas", "l1_ratio")
    with Workdir(EXPERIMENT, config, data=identity(images), may_differ=evaluation_only) as workdir:

        def learn(seed: int) -> Learned[NMCE]:
            network, seconds = train(config, seed, jnp.asarray(images), workdir)
            network.save(config.workdir / f"network-seed{seed}")
            start = time.perf_counter()
            values = _judge(filled, seed, network, images, labels)
            values["training_seconds"] = round(seconds, 1)
            return Learned(network, values, seconds + time.perf_counter() - start)

        numbers = {"num_train": len(images), "num_test": len(images)}
        return run_seeds(workdir, partial(map, learn), dataset, **numbers, paper=_paper(filled))


def _judge(
    config: Filled, seed: int, network: NMCE, images: np.ndarray, labels: np.ndarray | None
) -> dict[str, float]:
    """Subspace clustering of the features, and of two controls; draws figures for the first seed.

    The controls are the features of the untrained network, and the images' leading principal components (not
    centred), as many as there are features.
    """
    gamma, number = config.gammas or config.gamma, config.num_clusters
    cluster = partial(subspace_clustering.fit, num_clusters=number, gamma=gamma, l1_ratio=config.l1_ratio)
    measures = [one for one in evaluation.MEASURES if one is not metrics.clustering_accuracy]
    fresh = _build(config, seed, images.shape[-1])
    fresh.eval()  # type: ignore[no-untyped-call]
    features, untrained = (embeddings.encode(one, images)[0] for one in (network, fresh))
    flat = images.reshape(len(images), -1)
    components = min(config.num_features, *flat.shape)
    pixels = normalize(TruncatedSVD(components, random_state=seed).fit_transform(flat))
    codes = {"": features, "untrained_": untrained, "pixel_": pixels}
    found = {name: cluster(own, seed=seed) for name, own in codes.items()}
    values: dict[str, float] = {"num_clusters": config.num_clusters}
    for name, clustering in found.items():
        judged = {} if labels is None else metrics.in_percent(labels, clustering.labels, measures)
        judged |= {"gamma": clustering.gamma, "graph_parts": clustering.num_parts}
        values |= {f"{name}{measure}": value for measure, value in judged.items()}
    if seed == config.seed:
        groups = found[""].labels if labels is None else labels
        figures.singular_values(features, groups, config.workdir / "figure_a3_singular_values.png")
        figures.gallery(images, found[""].labels, labels, config.workdir / "clusters.png")
    return values


def _build(config: Config, seed: int, channels: int) -> NMCE:
    return embeddings.build(config, nnx.Rngs(seed), channels=channels, stem="5x5", num_clusters=1)


def resized(images: np.ndarray, size: int) -> np.ndarray:
    """Images as float32 in [0, 1] with sides of `size`."""
    images = np.asarray(evaluation.to_float(jnp.asarray(images)))
    if images.shape[1:3] == (size, size):
        return images
    whole = partial(augment.random_resized_crop, jax.random.key(0), scale=(1.0, 1.0), size=(size, size))
    stretch = jax.jit(partial(whole, ratio=(images.shape[2] / images.shape[1],) * 2))
    return np.asarray(training.map_batches(stretch, images))


def views(key: Array, images: Array) -> Array:
    """Two random views of each image by the paper's transformations, `[2, *images.shape]`."""

    def view(key: Array) -> Array:
        keys = jax.random.split(key, 3)
        changed = augment.horizontal_flip(keys[0], images)
        changed = augment.random_perspective(keys[1], changed, distortion=0.3, probability=0.6)
        return augment.color_jitter(keys[2], changed, brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2)

    return jnp.stack([view(k) for k in jax.random.split(key)])


def train(config: Config, seed: int, images: Array, workdir: Workdir) -> tuple[NMCE, float]:
    """The network after Adam on the total coding rate, and the seconds it took; its clusters are not used."""
    network = _build(config, seed, images.shape[-1])
    schedule = optax.cosine_decay_schedule(config.learning_rate, config.steps)
    rule = nmce.rule(
        lambda rngs: network,
        views=views,
        optimizer=optax.chain(optax.add_decayed_weights(config.weight_decay), optax.adam(schedule, b2=0.99)),
        clusters=False,
        eps_squared=config.eps_squared,
        invariance_weight=config.invariance_weight,
    )
    key = jax.random.key(seed)
    trained = embeddings.train(
        lambda state, own, images: rule.update(state, images, key=own),
        rule.init(key, None),
        lambda first, end: jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(first, end)),
        images,
        num_steps=config.steps,
        workdir=workdir,
        name=f"{seed}",
        about={"seed": seed},
    )
    embeddings.restore(network, trained.state)
    return network, trained.seconds


def _paper(config: Filled) -> dict[str, float]:
    """The paper's error, for the paper's own setting."""
    errors = [error for error, own in PAPER if same_setting(config, own)]
    return {"clustering_error": errors[0]} if errors else {}


main = partial(command_line, run, Config, description=__doc__)


if __name__ == "__main__":
    main()
