"""What the experiments of paper 004 share: options of the network and their defaults, images, features."""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from experiments.common import evaluation
from experiments.common.options import ConfigError, RunOptions, check_at_most
from experiments.data import Dataset, Split
from sul_jax import training
from sul_jax.cli.ranges import NonNegativeInt, PositiveInt
from sul_jax.nn import AlexNet, LeNet5

SIZE = 32  # side of the images that the networks see
_SCALED_BY = 10_000  # first images, whose mean and standard deviation normalise all
# Table 1; 9 on MNIST as in the authors' log.
_CLUSTERS = {"mnist": 9, "digits": 9, "fashion_mnist": 5, "svhn_cropped": 200, "cifar10": 1000}
_KMEANS: dict[str, dict[str, Any]] = {
    "scikit-learn": {"init": "k-means++", "empty_clusters": "relocate", "tolerance": 1e-4},
    "faiss": {"init": "random", "empty_clusters": "split", "tolerance": 0.0},
}


@dataclass(frozen=True, kw_only=True)
class NetworkOptions(RunOptions):
    """Options of the network and of the clustering of its features."""

    dataset: str = "auto"
    """mnist, fashion_mnist, svhn_cropped, cifar10, digits, FILE.npz, or auto: MNIST if available, else the
    bundled digits."""
    architecture: Literal["lenet5", "alexnet"] | None = None
    """The network; by default alexnet (the paper's small one) for colour images, else lenet5."""
    num_clusters: PositiveInt | None = None
    """Clusters; by default 9 on MNIST and the digits, 5 on Fashion-MNIST, 200 on SVHN, 1,000 on CIFAR-10,
    else the number of classes, or 10."""
    num_components: NonNegativeInt | None = None
    """Principal components that are whitened before clustering, 0 for none; by default 256 for alexnet."""
    kmeans: Literal["scikit-learn", "faiss"] | None = None
    """Whose k-means: scikit-learn's starts with k-means++, and an empty cluster takes the farthest image;
    faiss's starts with random images, and an empty cluster takes half of another. (Both are this library's
    own code, with one start of at most 20 iterations.) By default faiss's with alexnet, as in the authors'
    jobs."""
    sobel: bool | Literal["random"] | None = None
    """Fixed filters of 3×3 pixels below the network: True for Sobel's, random for random ones, drawn with the
    network (as the authors' code does in effect). By default random with alexnet, else False."""
    num_train: PositiveInt | None = None
    """Use only this many training images, the first ones."""


@dataclass(frozen=True, kw_only=True)
class FilledNetwork(NetworkOptions):
    """The same with nothing left to the data."""

    architecture: Literal["lenet5", "alexnet"]
    num_clusters: int
    num_components: int
    kmeans: Literal["scikit-learn", "faiss"]
    sobel: bool | Literal["random"]

    @property
    def clustering(self) -> dict[str, Any]:
        """Options of `deep_cluster.feature_clusters`."""
        sizes = {"num_clusters": self.num_clusters, "num_components": self.num_components or None}
        return sizes | _KMEANS[self.kmeans]


def network_defaults(config: NetworkOptions, dataset: Dataset) -> dict[str, Any]:
    """What `FilledNetwork` declares anew, and the data set's own name."""
    colour = dataset.train_images.shape[-1] == 3
    architecture = config.architecture or ("alexnet" if colour else "lenet5")
    alexnet = architecture == "alexnet"
    clusters = _CLUSTERS.get(dataset.name) or dataset.train.num_classes or 10
    return {
        "dataset": dataset.name,
        "architecture": architecture,
        "num_clusters": config.num_clusters or clusters,
        "num_components": (256 if alexnet else 0) if config.num_components is None else config.num_components,
        "kmeans": config.kmeans or ("faiss" if alexnet else "scikit-learn"),
        "sobel": ("random" if alexnet else False) if config.sobel is None else config.sobel,
    }


def check_network(config: FilledNetwork, images: "Images") -> None:
    """Raises `ConfigError` where the clustering cannot be done on this many images or features."""
    number = len(images.seen)
    check_at_most("num_clusters", config.num_clusters, number, "training images")
    size = nnx.eval_shape(lambda: build(config, images, nnx.Rngs(0))).num_features
    if config.num_components > min(size, number):
        raise ConfigError(
            f"num_components={config.num_components} is not accepted: there are {size} features of "
            f"{number} images"
        )


def check_swept(config: Any, option: str, values: tuple[int, ...], *, low: int) -> None:
    """Raises `ConfigError` where an option that is swept is given too, or has unusable values."""
    if getattr(config, option) is not None:
        raise ConfigError(f"{option} is not accepted with sweep={config.sweep!r}, which tries several")
    if not values or len(set(values)) < len(values) or min(values) < low:
        raise ConfigError(f"sweep_values={values} is not accepted: give different numbers from {low} on")


class Scale(NamedTuple):
    """Mean and standard deviation of each channel, by which images are normalised."""

    mean: Array
    deviation: Array


class Images(NamedTuple):
    """A split of a data set on the device.

    Attributes:
      raw: `[num, height, width, channels]`, uint8 or float32.
      seen: `[num, 32, 32, channels]`, as clustered and judged: their middle, normalised.
      labels: `[num]` or None.
      scale: by which they are normalised.
    """

    raw: Array
    seen: Array
    labels: np.ndarray | None
    scale: Scale


def prepare(split: Split, scale: Scale | None = None) -> Images:
    """A split on the device.

    Args:
      split: of a data set.
      scale: of the training images; by default that of the images themselves.
    """
    raw = jnp.asarray(split.images)
    scale = _scale(raw) if scale is None else scale
    seen = training.map_batches(_middle, split.images)
    return Images(raw, _normalize(seen, scale), split.labels, scale)


def _scale(raw: Array) -> Scale:
    first = np.asarray(raw[:_SCALED_BY]) / (255 if raw.dtype == jnp.uint8 else 1)
    mean, deviation = first.mean((0, 1, 2)), np.maximum(first.std((0, 1, 2)), 1e-6)
    return Scale(jnp.asarray(mean, jnp.float32), jnp.asarray(deviation, jnp.float32))


@partial(jax.jit, donate_argnums=0)
def _normalize(images: Array, scale: Scale) -> Array:
    return (images - scale.mean) / scale.deviation


def middle(images: Array) -> Array:
    """Images in [0, 1], enlarged as the authors do and cut to the middle 32×32 pixels."""
    images = evaluation.to_float(images)
    side = 44 if images.shape[-1] == 1 else 45
    resized = jax.image.resize(images, (len(images), side, side, images.shape[-1]), "bilinear")
    edge = (side - SIZE) // 2
    return resized[:, edge : edge + SIZE, edge : edge + SIZE]


_middle = jax.jit(middle)


def build(config: FilledNetwork, images: Images, rngs: nnx.Rngs) -> LeNet5 | AlexNet:
    """The untrained network for such images."""
    kind = LeNet5 if config.architecture == "lenet5" else AlexNet
    return kind(channels=images.seen.shape[-1], use_sobel=config.sobel, rngs=rngs)


def features(network: LeNet5 | AlexNet, seen: Array, layer: str | None = None) -> Array:
    """What a network, switched to `eval()`, makes of images, compiled once for each architecture.

    Args:
      network: trained or not.
      seen: `[num, 32, 32, channels]`, normalised.
      layer: gives the flattened values of this layer instead of the top features.

    Returns:
      `[num, features]`.
    """
    network.eval()  # type: ignore[no-untyped-call]
    graph, state = nnx.split(network)
    return training.map_batches(lambda batch: _features(graph, state, batch, layer), seen, batch_size=400)


@partial(jax.jit, static_argnames=("graph", "layer"))
def _features(graph: Any, state: Any, images: Array, layer: str | None) -> Array:
    network = nnx.merge(graph, state)
    values = network(images) if layer is None else network.layers(images)[layer]
    return values.reshape(len(images), -1)
