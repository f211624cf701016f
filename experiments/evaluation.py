"""Clustering of codes and its agreement with labels: the same for every experiment."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from sul_jax import k_means, metrics

# Compiled once for each shape, however often `cluster` is called.
_fit = jax.jit(k_means.fit, static_argnames=("num_clusters", "num_init"))


class Clustering(NamedTuple):
    """A k-means clustering of codes, in percent against labels where there are any.

    Attributes:
      labels: `[num_examples]`, clusters.
      centroids: `[num_clusters, features]`.
      clustering_error: 100 less the one-to-one accuracy.
      purity, normalized_mutual_info, adjusted_rand_index: as in `sul_jax.metrics`, in percent.
    """

    labels: np.ndarray
    centroids: Array
    clustering_error: float | None
    purity: float | None
    normalized_mutual_info: float | None
    adjusted_rand_index: float | None


def map_batches(
    function: Callable[[Array], Array], images: np.ndarray | Array, *, batch_size: int = 500
) -> Array:
    """Applies a compiled function to images batch by batch; compiles once for the full batches.

    Args:
      function: maps `[batch, ...]` to `[batch, ...]`.
      images: `[num_images, ...]`.
      batch_size: images at a time.

    Returns:
      The concatenated results.
    """
    parts = [
        function(jnp.asarray(images[start : start + batch_size]))
        for start in range(0, len(images), batch_size)
    ]
    return jnp.concatenate(parts)


def cluster(
    key: Array,
    codes: Array,
    labels_true: np.ndarray | None,
    *,
    num_clusters: int,
    num_init: int = 10,
) -> Clustering:
    """k-means (k-means++, best of `num_init`) on the codes themselves, then the metrics.

    Args:
      key: `jax.random.key`.
      codes: `[num_examples, ...]`, flattened.
      labels_true: `[num_examples]` or None.
      num_clusters: k.
      num_init: starts of k-means.

    Returns:
      A `Clustering`.
    """
    flat = codes.reshape(codes.shape[0], -1)
    result = _fit(key, flat, num_clusters=num_clusters, num_init=num_init)
    found = np.asarray(result.labels)
    if labels_true is None:
        return Clustering(found, result.centroids, None, None, None, None)
    return Clustering(
        found,
        result.centroids,
        clustering_error=100 * (1 - metrics.clustering_accuracy(labels_true, found)),
        purity=100 * metrics.purity(labels_true, found),
        normalized_mutual_info=100 * metrics.normalized_mutual_info(labels_true, found),
        adjusted_rand_index=100 * metrics.adjusted_rand_index(labels_true, found),
    )
