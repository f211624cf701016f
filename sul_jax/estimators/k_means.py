"""k-means of vectors."""

from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import ArrayLike
from sklearn.utils.validation import check_is_fitted

from sul_jax import k_means
from sul_jax._check import check_choice, check_integer
from sul_jax._linalg import directions
from sul_jax.estimators._vectors import Given, VectorClustering
from sul_jax.vectors import Vectors

_fit = jax.jit(k_means.fit, static_argnames=("num_clusters", "num_init", "max_iterations", "metric"))
_first = jax.jit(k_means.init, static_argnames=("num_clusters", "metric"))
_apply = jax.jit(k_means.apply, static_argnames="metric")
_assign, _encode = jax.jit(k_means.assign), jax.jit(k_means.encode)
# Compiled, it does not look for vectors of norm 0 again: reading has.
_directions = jax.jit(partial(directions, "X"))


class KMeans(VectorClustering):
    """k-means of vectors such as embeddings, in memory, in a memory map or in files.

    Of vectors of 256 MiB or less all starts run side by side. More, and those on disk, are read in chunks:
    the best of all starts on a sample, then steps of Lloyd's algorithm on all of them, on all devices.

    Args:
      n_clusters: clusters.
      metric: `"euclidean"`, or `"cosine"` for vectors of which only the direction counts.
      n_init: starts by k-means++, of which the best is taken.
      max_iter: bound on the steps.
      tol: a start has converged when its centroids move by a summed squared distance of at most this share of
        the mean variance of the features.
      random_state: an integer for the same result every time, on one machine with as many threads.
      verbose: show progress.

    Attributes:
      cluster_centers_: `[n_clusters, num_features]`, float64 of vectors in float64; of unit norm under
        cosine.
      labels_: int32 `[num_vectors]`, clusters of the vectors learned from.
      inertia_: their summed squared distance to their centres, times their weights.
      n_iter_: steps until convergence.
      counts_: `[n_clusters]`, weight of the vectors that the centres are the means of.

    Example:
      >>> import numpy as np
      >>> from sul_jax.estimators import KMeans
      >>> model = KMeans(2, random_state=0).fit([[0.0], [1.0], [10.0], [11.0]])
      >>> np.sort(model.cluster_centers_, axis=0).tolist(), model.inertia_
      ([[0.5], [10.5]], 1.0)
    """

    _kept = ("labels_", "counts_")

    def __init__(
        self,
        n_clusters: int = 8,
        *,
        metric: k_means.Metric = "euclidean",
        n_init: int = 10,
        max_iter: int = 300,
        tol: float = 1e-4,
        random_state: Any = None,
        verbose: bool = False,
    ):
        self.n_clusters = n_clusters
        self.metric = metric
        self.n_init = n_init
        self.max_iter = max_iter
        self.tol = tol
        self.random_state = random_state
        self.verbose = verbose

    def _begin(self) -> Array:
        check_choice("metric", self.metric, ("euclidean", "cosine"))
        return super()._begin()

    def fit(self, X: ArrayLike, y: object = None, sample_weight: ArrayLike | None = None) -> Self:  # noqa: N803
        """Learns clusters.

        Args:
          X: `[num_vectors, num_features]`, a memory map, a file of vectors or a folder of them; see
            `sul_jax.vectors.read`.
          y: ignored.
          sample_weight: `[num_vectors]`, not negative; by default 1.

        Returns:
          The estimator itself.

        Raises:
          ValueError: vectors that are not finite, fewer of them than clusters, or of norm 0 under cosine.

        Warns:
          ConvergenceWarning: fewer clusters than asked for.
        """
        key = self._begin()
        given = self._given(X, sample_weight, least=1)
        check_integer("n_clusters", self.n_clusters, low=1, high=given.source.num_vectors, why=", n_samples")
        options = {
            "num_clusters": self.n_clusters,
            "metric": self.metric,
            "num_init": self.n_init,
            "max_iterations": self.max_iter,
            "tolerance": self.tol,
        }
        if given.array is not None:
            result = _fit(key, given.array, weights=given.weights, **options)
            centroids, self.n_iter_ = result.centroids, int(result.num_iterations)
        else:
            some, weights = self._sample(given)
            least = self.tol * float(np.mean(np.var(self._seen(jnp.asarray(some)), axis=0)))
            centroids = _fit(key, some, weights=weights, **options).centroids
            first = k_means.KMeansState(centroids, jnp.zeros(self.n_clusters))
            state, self.n_iter_ = self._steps(
                given,
                first,
                _statistics(self.metric),
                partial(_apply, metric=self.metric),
                lambda old, new, *_: float(jnp.sum(jnp.square(new.centroids - old.centroids))) <= least,
                self.max_iter,
            )
            centroids = state.centroids
        self.counts_ = self._finish(given, centroids)
        return self

    def partial_fit(
        self,
        X: ArrayLike,  # noqa: N803
        y: object = None,
        sample_weight: ArrayLike | None = None,
    ) -> Self:
        """A step of mini-batch k-means: every centre is the mean of all vectors that it ever won.

        Args:
          X: a batch, as for `fit`; the first one holds at least as many vectors as clusters.
          y: ignored.
          sample_weight: `[num_vectors]`.

        Returns:
          The estimator itself; `labels_` and `inertia_` are the batch's.
        """
        if hasattr(self, "cluster_centers_"):
            given = self._given(X, sample_weight)
            state = k_means.KMeansState(self._learned(), jnp.asarray(self.counts_))
        else:
            key, given, self.n_iter_ = self._begin(), self._given(X, sample_weight, least=1), 0
            number = given.source.num_vectors
            check_integer(
                "n_clusters", self.n_clusters, low=1, high=number, why=", n_samples of the first batch"
            )
            some, weights = self._sample(given)
            state = _first(key, some, num_clusters=self.n_clusters, metric=self.metric, weights=weights)
        step = partial(_apply, metric=self.metric, memory=1.0)
        state, _ = self._steps(given, state, _statistics(self.metric), step, lambda *_: True, 1)
        self.n_iter_ += 1
        self._finish(given, state.centroids)
        self.counts_ = np.asarray(state.counts)
        return self

    def score(
        self,
        X: ArrayLike,  # noqa: N803
        y: object = None,
        sample_weight: ArrayLike | None = None,
    ) -> float:
        """The negative inertia of vectors: the higher, the nearer they are to their centres."""
        check_is_fitted(self)
        given = self._given(X, sample_weight)
        _, squares = self._each(given.source, self._nearest)
        return -_sum(squares, given.weights)

    def _finish(self, given: Given, centroids: Array) -> np.ndarray:
        """Keeps the centres, and how the vectors lie about them; returns the weights of the clusters."""
        self._set_centers(np.asarray(centroids))
        labels, squares = self._each(given.source, self._nearest)
        self.inertia_ = _sum(squares, given.weights)
        self._set_labels(labels)
        counts = np.bincount(labels, weights=given.weights, minlength=self.n_clusters)
        return counts.astype(np.float32)

    def _set_centers(self, relative: np.ndarray) -> None:
        self.cluster_centers_ = relative if self.offset_ is None else relative + self.offset_

    def _arrays(self) -> dict[str, Any]:
        return super()._arrays() | {"centers": self._learned()}  # in float64 they could not be stored

    def _restore(self, arrays: dict[str, np.ndarray], path: str | Path) -> None:
        super()._restore(arrays, path)
        self._set_centers(arrays["centers"])

    def _learned(self) -> Array:
        """The centres relative to the offset."""
        centers = self.cluster_centers_ - (0 if self.offset_ is None else self.offset_)
        return jnp.asarray(centers, jnp.float32)

    def _offset(self, source: Vectors) -> np.ndarray | None:
        # Float64 vectors may lie where float32 is coarse; angles are those from the origin.
        return source.middle() if self.metric == "euclidean" else None

    def _bytes_of_a_vector(self) -> int:
        return 4 * self.n_init * k_means.num_candidates(self.n_clusters)

    def _directions(self) -> bool:
        return self.metric == "cosine"

    def _codes(self, inputs: Array) -> Array:
        return _encode(k_means.KMeansState(self._learned(), jnp.zeros(self.n_clusters)), self._seen(inputs))

    def _labels(self, inputs: Array) -> Array:
        return _assign(self._learned(), self._seen(inputs))

    def _nearest(self, inputs: Array) -> tuple[Array, Array]:
        """Labels and squared distances."""
        inputs = self._seen(inputs)
        labels = _assign(self._learned(), inputs)
        return labels, jnp.sum(jnp.square(inputs - self._learned()[labels]), axis=1)

    def _seen(self, inputs: Array) -> Array:
        return _directions(inputs) if self.metric == "cosine" else inputs

    @property
    def _n_features_out(self) -> int:
        return len(self.cluster_centers_)


@lru_cache(maxsize=2)
def _statistics(metric: k_means.Metric) -> Any:
    """The same function every time: so its compiled program is found again."""

    def statistics(state: k_means.KMeansState, inputs: Array, weights: Array | None = None) -> Any:
        return k_means.statistics(state, inputs, metric=metric, weights=weights)

    return statistics


def _sum(values: np.ndarray, weights: np.ndarray | None) -> float:
    wide = values.astype(np.float64)
    return float(np.sum(wide if weights is None else wide * weights))
