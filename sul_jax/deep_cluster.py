"""DeepCluster's rules (Caron et al. 2018) as studied by Mustapha et al. (2022).

A cycle clusters the features of a network, takes the clusters as labels, and trains the network to tell
them apart: `preprocess`, `pseudo_labels`, `balanced_indices`, then steps of gradient descent on
the cross-entropy.
"""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import ArrayLike

from sul_jax import k_means, metrics, whitening
from sul_jax._check import check_finite, check_integer, check_labels, check_vectors


def preprocess(features: Array, *, num_components: int | None = None, axis_name: str | None = None) -> Array:
    """Features as they are clustered: principal components, whitened, then scaled to unit norm.

    Args:
      features: `[batch, features]`.
      num_components: principal components kept and divided by their standard deviation; None leaves
        the features as they are, as the paper does for Fashion-MNIST.
      axis_name: mapped axis over which the batch is split.

    Returns:
      `[batch, num_components]`, or `[batch, features]` without components; rows of norm 1, zero where
      there is nothing to scale. Components without variance are zero.

    Raises:
      ValueError: `num_components` above the number of features, or (outside jit) values that are not
        finite.

    Example:
      >>> import jax
      >>> from sul_jax import deep_cluster
      >>> features = jax.random.normal(jax.random.key(0), (50, 6))
      >>> deep_cluster.preprocess(features, num_components=4).shape
      (50, 4)
    """
    check_vectors("features", features)
    check_finite("features", features)
    if num_components is not None:
        size = features.shape[1]
        check_integer("num_components", num_components, low=1, high=size, why=f": there are {size} features")
        state = whitening.pca(features, num_components=num_components, axis_name=axis_name)
        features = whitening.pca_whiten(features, state)
    return whitening.normalize(features)


def pseudo_labels(
    key: Array,
    features: Array,
    *,
    num_clusters: int,
    max_iterations: int = 20,
    tolerance: float | Array = 1e-4,
    init: Literal["k-means++", "random"] = "k-means++",
    empty_clusters: Literal["relocate", "split"] = "relocate",
    axis_name: str | None = None,
) -> Array:
    """Clusters of the features by one start of k-means, to be learned as classes.

    Args:
      key: `jax.random.key`.
      features: `[batch, features]`, from `preprocess`.
      num_clusters: K.
      max_iterations: of Lloyd's algorithm.
      tolerance: as in `k_means.fit`; scikit-learn's is 1e-4, faiss always does all iterations.
      init: the first centroids; `"k-means++"` as scikit-learn, `"random"` as faiss.
      empty_clusters: `"relocate"` as scikit-learn, `"split"` as faiss; see `k_means.fit`.
      axis_name: mapped axis over which the batch is split.

    Returns:
      int32 `[batch]`, 0 to `num_clusters` − 1.

    Raises:
      ValueError: more clusters than vectors, or (outside jit) values that are not finite.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from sul_jax import deep_cluster
      >>> features = jnp.array([[0.0, 1.0], [0.0, 1.0], [1.0, 0.0]])
      >>> labels = deep_cluster.pseudo_labels(jax.random.key(0), features, num_clusters=2)
      >>> bool(labels[0] == labels[1]), bool(labels[0] == labels[2])
      (True, False)
    """
    check_vectors("features", features)
    check_finite("features", features)
    return k_means.fit(
        key,
        features,
        num_clusters=num_clusters,
        num_init=1,
        max_iterations=max_iterations,
        tolerance=tolerance,
        init=init,
        empty_clusters=empty_clusters,
        axis_name=axis_name,
    ).labels


def balanced_indices(key: Array, labels: Array, *, num_clusters: int, num_samples: int) -> Array:
    """A random order of examples in which every cluster that is not empty is seen equally often.

    A cluster larger than its share gives that many different examples, a smaller one is drawn from
    with replacement. Large clusters would otherwise be all that the network learns to predict.

    Args:
      key: `jax.random.key`.
      labels: int32 `[batch]`, 0 to `num_clusters` − 1.
      num_clusters: K.
      num_samples: length of the epoch; the authors take about `batch`.

    Returns:
      int32 `[num_samples]`, indices into the batch; the shares of any two clusters differ by one at
      most.

    Raises:
      ValueError: no labels, labels out of range (outside jit), or a number below 1.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from sul_jax import deep_cluster
      >>> labels = jnp.array([0, 0, 0, 0, 0, 2])
      >>> indices = deep_cluster.balanced_indices(
      ...     jax.random.key(0), labels, num_clusters=3, num_samples=8
      ... )
      >>> jnp.bincount(labels[indices], length=3).tolist()
      [4, 0, 4]
    """
    labels = jnp.asarray(labels)
    if labels.ndim != 1 or not len(labels):
        raise ValueError(f"labels must be a vector of at least one label, got shape {labels.shape}")
    check_integer("num_clusters", num_clusters, low=1)
    check_integer("num_samples", num_samples, low=1)
    check_labels("labels", labels, num_examples=len(labels), num_classes=num_clusters)
    order_key, draw_key, shuffle_key = jax.random.split(key, 3)
    # Members of each cluster side by side, in random order.
    shuffled = jax.random.permutation(order_key, len(labels))
    members = shuffled[jnp.argsort(labels[shuffled])]
    sizes = jnp.sum(labels == jnp.arange(num_clusters)[:, None], axis=1, dtype=jnp.int32)
    firsts = jnp.cumsum(sizes) - sizes
    filled = jnp.argsort(sizes == 0)  # the clusters that are not empty, in order
    number = jnp.sum(sizes > 0)
    place = jnp.arange(num_samples)
    owner = filled[place % number]
    turn = place // number
    share = -(-num_samples // number)
    drawn = jax.random.randint(draw_key, (num_samples,), 0, sizes[owner])
    within = jnp.where(sizes[owner] >= share, turn, drawn)
    return jax.random.permutation(shuffle_key, members[firsts[owner] + within]).astype(jnp.int32)


def initial_alignment(
    key: Array, features: Array, labels: ArrayLike, *, num_clusters: int, num_components: int | None = None
) -> float:
    """How well the clusters of an untrained network's features agree with the classes (section 4.1.1).

    Args:
      key: `jax.random.key`.
      features: `[batch, features]` of the untrained network.
      labels: `[batch]`, the classes.
      num_clusters: K.
      num_components: as in `preprocess`.

    Returns:
      Normalised mutual information, 0 to 1. It is computed on the host: for many networks, compile
      `preprocess` and `pseudo_labels` once and compare with `metrics.normalized_mutual_info`.

    Raises:
      ValueError: as `preprocess` and `pseudo_labels`.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from sul_jax import deep_cluster
      >>> features = jnp.repeat(jnp.eye(3), 4, axis=0)
      >>> labels = jnp.repeat(jnp.arange(3), 4)
      >>> deep_cluster.initial_alignment(jax.random.key(0), features, labels, num_clusters=3)
      1.0
    """
    ready = preprocess(features, num_components=num_components)
    found = pseudo_labels(key, ready, num_clusters=num_clusters)
    return metrics.normalized_mutual_info(labels, np.asarray(found))
