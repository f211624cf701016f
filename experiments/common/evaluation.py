"""Clustering of codes and its agreement with labels: the same for every experiment."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from tqdm import tqdm

from sul_jax import k_means, k_subspaces, metrics, whitening
from sul_jax.k_subspaces import KSubspacesState

MEASURES = (
    metrics.clustering_error,
    metrics.clustering_accuracy,
    metrics.purity,
    metrics.normalized_mutual_info,
    metrics.adjusted_rand_index,
)
_KEPT_AT_A_TIME = 250  # images whose features are kept
# Compiled once for each shape, however often `cluster` is called.
_fit = jax.jit(k_means.fit, static_argnames=("num_clusters", "num_init"))
_fit_subspaces = jax.jit(k_subspaces.fit, static_argnames=("num_subspaces", "rank", "num_init"))


class Clustering(NamedTuple):
    """A clustering of codes.

    Attributes:
      labels: `[num_examples]`, clusters.
      model: what further codes are assigned by: `centroids`, `[num_clusters, features]`, or `subspaces`, a
        `KSubspacesState`.
      scores: of `MEASURES` by name, in percent; empty where there is nothing to compare with.
    """

    labels: np.ndarray
    model: Mapping[str, Any]
    scores: Mapping[str, float]


def to_float(images: Array) -> Array:
    """Pixels in [0, 1] from uint8; floating images stay as they are."""
    return images / jnp.float32(255) if images.dtype == jnp.uint8 else images


def kept_features(take: Callable[[Array], Array], images: np.ndarray, *, title: str) -> Array:
    """Features of all images, filled in batch by batch: never held twice on a CPU.

    Args:
      take: maps `[batch, ...]` to features, `[batch, num_features]`, as small as they can be kept.
      images: `[num_images, ...]`.
      title: of the progress bar.

    Returns:
      `[num_images, num_features]` of the dtype that `take` gives.
    """
    number = len(images)
    like = jax.eval_shape(take, images[:1])
    size = like.dtype.itemsize * number * like.shape[1]
    # A CPU's device takes an array over as it is if it begins at a multiple of 64 bytes.
    memory = np.empty(size + 64, np.uint8)
    begin = -memory.ctypes.data % 64
    kept = memory[begin : begin + size].view(like.dtype).reshape(number, like.shape[1])
    for start in tqdm(range(0, number, _KEPT_AT_A_TIME), desc=title, unit="batch"):
        part = images[start : start + _KEPT_AT_A_TIME]
        kept[start : start + len(part)] = np.asarray(take(jnp.asarray(part)))
    return jax.device_put(kept, may_alias=True)


def cluster(
    key: Array,
    codes: Array,
    labels_true: np.ndarray | None,
    *,
    num_clusters: int,
    num_init: int = 10,
    rank: int | None = None,
) -> Clustering:
    """k-means (k-means++, best of `num_init`) on the codes themselves, or K-Subspaces; then the metrics.

    Args:
      key: `jax.random.key`.
      codes: `[num_examples, ...]`, flattened.
      labels_true: `[num_examples]` or None.
      num_clusters: k.
      num_init: starts.
      rank: of the subspaces of K-Subspaces, which clusters codes of unit norm; None for k-means.

    Returns:
      A `Clustering`.
    """
    flat = codes.reshape(codes.shape[0], -1)
    model: dict[str, Any] = {}
    if rank is None:
        centres = _fit(key, flat, num_clusters=num_clusters, num_init=num_init)
        clusters, model["centroids"] = np.asarray(centres.labels), centres.centroids
    else:
        unit = whitening.normalize(flat)
        best = _fit_subspaces(key, unit, num_subspaces=num_clusters, rank=rank, num_init=num_init)
        clusters, model["subspaces"] = np.asarray(best.labels), KSubspacesState(best.bases)
    scores = {} if labels_true is None else metrics.in_percent(labels_true, clusters, MEASURES)
    return Clustering(clusters, model, scores)
