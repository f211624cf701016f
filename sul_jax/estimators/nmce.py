"""Clustering by coding rates (paper 003)."""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array
from sklearn.utils.validation import check_is_fitted

from sul_jax import augment, nmce
from sul_jax.estimators import _learning
from sul_jax.estimators._base import ImageClustering
from sul_jax.estimators._images import Images
from sul_jax.learning_rule import LearningRule
from sul_jax.nn import NMCE, ResNet
from sul_jax.nn.backbones import RESNET_BLOCKS


class NMCEClustering(ImageClustering):
    """Neural manifold clustering and embedding: coding rates of two random views (paper 003).

    A small ResNet first learns an embedding by the total coding rate, then embedding and clusters together.

    Args:
      n_clusters: clusters.
      image_shape: height, width and perhaps channels of images given as rows, which need it.
      image_size: side to which images are resized.
      num_filters: of the ResNet's first stage.
      num_features: of the embedding.
      batch_size: images in a minibatch, of which two views are taken.
      max_steps: minibatches, in at most `epochs` passes; the first two thirds learn the embedding.
      epochs: passes over the images, in at most `max_steps` minibatches.
      learning_rate: of Adam.
      eps_squared: squared distortion of the coding rates.
      invariance_weight: weight λ of the views' similarity.
      random_state: an integer for the same result every time, on one machine with as many threads.
      verbose: show progress.

    Attributes:
      labels_: int32 `[num_images]`, clusters of the images learned from.
      cluster_centers_: `[n_clusters, num_features]`, means of the embeddings, infinite where a cluster is
        empty. `predict` and `labels_` come from the network's own cluster head, as the method has it, so that
        another centre may be nearer.

    Example:
      >>> import numpy as np
      >>> from sul_jax.estimators import NMCEClustering
      >>> images = np.random.default_rng(0).random((20, 8, 8))
      >>> model = NMCEClustering(2, image_size=8, num_filters=2, num_features=4, batch_size=10, epochs=1)
      >>> model.fit(images).transform(images).shape
      (20, 4)
    """

    learns_clusters = True

    def __init__(
        self,
        n_clusters: int = 8,
        *,
        image_shape: tuple[int, ...] | None = None,
        image_size: int = 28,
        num_filters: int = 16,
        num_features: int = 64,
        batch_size: int = 256,
        max_steps: int = 300,
        epochs: int = 60,
        learning_rate: float = 1e-3,
        eps_squared: float = 0.2,
        invariance_weight: float = 20.0,
        random_state: Any = None,
        verbose: bool = False,
    ):
        self.n_clusters = n_clusters
        self.image_shape = image_shape
        self.image_size = image_size
        self.num_filters = num_filters
        self.num_features = num_features
        self.batch_size = batch_size
        self.max_steps = max_steps
        self.epochs = epochs
        self.learning_rate = learning_rate
        self.eps_squared = eps_squared
        self.invariance_weight = invariance_weight
        self.random_state = random_state
        self.verbose = verbose

    def _rule(self, clusters: bool) -> LearningRule:
        return _rule(
            self.image_shape_[2],
            self.num_filters,
            self.num_features,
            self.n_clusters,
            self.learning_rate,
            self.eps_squared,
            self.invariance_weight,
            clusters,
            RESNET_BLOCKS[10],
        )

    def _template(self) -> Any:
        return _learning.learned(jax.eval_shape(self._rule(True).init, jax.random.key(0), None))

    def _learn(self, keys: Array, images: Images) -> Any:
        state = _learning.begin(self._rule(False), keys)
        total = _learning.number_of_steps(self, images)
        first = 2 * total // 3
        for clusters, steps in ((False, first), (True, total - first)):
            keys = _learning.folded(keys, clusters)
            state = _learning.descend(
                self, keys, images, self._rule(clusters), _learning.forgotten(state), steps
            )
        return _learning.learned(state)

    def _encoder(self, learned: Any) -> Callable[[Array], Array]:
        # Embedding and logits side by side: `_codes` is asked for either.
        network = _build(
            self.image_shape_[2], self.num_filters, self.num_features, self.n_clusters, nnx.Rngs(0)
        )
        return partial(_outputs, nnx.graphdef(network), learned)

    def _num_maps(self) -> int:
        return (
            2 * self.num_filters
        )  # two views; the stem halves the sides, its maps are kept for the gradient

    def first_kernels(self) -> np.ndarray:
        """The stem's, `[num_filters, 5, 5, channels]`."""
        check_is_fitted(self)
        return _learning.as_images(self.learned_.params["backbone"]["stem"]["kernel"])

    def _shown(self, codes: np.ndarray) -> np.ndarray:
        return codes[:, : self.num_features]

    def _labels(self, codes: np.ndarray, distances: np.ndarray) -> np.ndarray:
        """The cluster head's choice."""
        return np.argmax(codes[:, self.num_features :], axis=1).astype(np.int32)

    def _cluster(self, codes: np.ndarray) -> None:
        self._set_labels(self._labels(codes, np.empty(0)))
        one_hot = (self.labels_ == np.arange(self.n_clusters)[:, None]).astype(np.float32)
        sums = one_hot @ self._shown(codes)
        number = one_hot.sum(axis=1, keepdims=True)
        self.cluster_centers_ = np.where(number > 0, sums / np.maximum(number, 1), np.float32(np.inf))


@lru_cache(maxsize=8)  # so that compiled programs are found again
def _rule(
    channels: int,
    num_filters: int,
    num_features: int,
    num_clusters: int,
    rate: float,
    eps_squared: float,
    invariance_weight: float,
    clusters: bool,
    blocks: tuple[int, ...],
) -> LearningRule:
    del blocks  # they tell networks of other depths apart
    return nmce.rule(
        partial(_build, channels, num_filters, num_features, num_clusters),
        views=_views,
        optimizer=optax.adam(rate),
        clusters=clusters,
        eps_squared=eps_squared,
        invariance_weight=invariance_weight,
        average_views=False,
    )


def _build(channels: int, num_filters: int, num_features: int, num_clusters: int, rngs: nnx.Rngs) -> NMCE:
    backbone = ResNet(
        10, channels=channels, num_filters=num_filters, stem="5x5", num_pre_features=None, rngs=rngs
    )
    size = backbone.num_features
    return NMCE(backbone, size, num_features=num_features, num_clusters=num_clusters, rngs=rngs)


@partial(jax.jit, static_argnums=0)
def _outputs(graph: Any, learned: Any, images: Array) -> Array:
    net = nnx.merge(graph, learned.params, learned.rest)
    net.eval()
    return jnp.concatenate(net(images), axis=1)


def _views(key: Array, images: Array) -> Array:
    return jnp.stack([_view(own, images) for own in jax.random.split(key)])


def _view(key: Array, images: Array) -> Array:
    """A random crop; in colour, flipped and with changed colours as well."""
    if images.shape[-1] == 3:
        return augment.random_view(key, images, scale=(0.5, 1.0))
    keys = jax.random.split(key, 4)
    changed = augment.random_resized_crop(keys[0], images, scale=(0.5, 1.0))
    return augment.gaussian_noise(keys[1], changed, scale=0.05)
