"""K-Subspaces of vectors."""

from typing import Any, Literal, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import ArrayLike
from sklearn.utils.validation import check_is_fitted

from sul_jax import k_subspaces
from sul_jax._check import check_choice, check_integer
from sul_jax.estimators._vectors import VectorClustering

_fit = jax.jit(
    k_subspaces.fit, static_argnames=("num_subspaces", "rank", "num_init", "max_iterations", "init")
)
_apply, _assign = jax.jit(k_subspaces.apply), jax.jit(k_subspaces.assign)


class KSubspaces(VectorClustering):
    """Clusters vectors by the linear subspaces through the origin that explain them best (paper 000, eq. 1).

    Of vectors of 256 MiB or less all starts run one after the other. More, and those on disk, are read in
    chunks: the best of all starts on a sample, then steps on all of them, on all devices.

    Args:
      n_clusters: subspaces.
      rank: of each.
      init: `"k-means"` begins around the centroids of k-means; `"random"`, around vectors, suits subspaces
        whose vectors lie all around the origin.
      n_init: starts, of which the one with the least energy is taken.
      max_iter: bound on the steps.
      tol: a start has converged when a step lowers its energy by less than this share of it.
      random_state: an integer for the same result every time, on one machine with as many threads.
      verbose: show progress.

    Attributes:
      bases_: float32 `[n_clusters, rank, num_features]`, orthonormal rows.
      labels_: int32 `[num_vectors]`, the nearest subspace of each vector learned from.
      energy_: their mean squared distance to it.
      n_iter_: steps until convergence.

    Example:
      >>> import numpy as np
      >>> from sul_jax.estimators import KSubspaces
      >>> lines = [[1.0, 0.1], [-2.0, 0.0], [0.1, 3.0], [0.0, -1.0]]  # near the two axes
      >>> labels = KSubspaces(2, init="random", random_state=0).fit_predict(lines)
      >>> bool(labels[0] == labels[1] != labels[2] == labels[3])
      True
    """

    _kept = ("labels_", "bases_")

    def __init__(
        self,
        n_clusters: int = 8,
        *,
        rank: int = 1,
        init: Literal["k-means", "random"] = "k-means",
        n_init: int = 10,
        max_iter: int = 300,
        tol: float = 1e-5,
        random_state: Any = None,
        verbose: bool = False,
    ):
        self.n_clusters = n_clusters
        self.rank = rank
        self.init = init
        self.n_init = n_init
        self.max_iter = max_iter
        self.tol = tol
        self.random_state = random_state
        self.verbose = verbose

    def fit(self, X: ArrayLike, y: object = None) -> Self:  # noqa: N803
        """Learns subspaces.

        Args:
          X: `[num_vectors, num_features]`, a memory map, a file of vectors or a folder of them; see
            `sul_jax.vectors.read`.
          y: ignored.

        Returns:
          The estimator itself.

        Raises:
          ValueError: vectors that are not finite or fewer than clusters, or a rank beyond their features.

        Warns:
          ConvergenceWarning: fewer clusters than asked for.
        """
        check_choice("init", self.init, ("k-means", "random"))
        check_integer("rank", self.rank, low=1)
        key, given = self._begin(), self._given(X, least=1)
        features = given.source.num_features
        check_integer("n_clusters", self.n_clusters, low=1, high=given.source.num_vectors, why=", n_samples")
        check_integer("rank", self.rank, low=1, high=features, why=f": X has {features} features")
        some = self._sample(given)[0] if given.array is None else given.array
        result = _fit(
            key,
            some,
            num_subspaces=self.n_clusters,
            rank=self.rank,
            num_init=self.n_init,
            max_iterations=self.max_iter,
            tolerance=self.tol,
            init=self.init,
        )
        state, self.n_iter_ = k_subspaces.KSubspacesState(result.bases), int(result.num_iterations)
        if given.array is None:
            state, self.n_iter_ = self._steps(
                given, state, k_subspaces.statistics, _apply, self._rests, self.max_iter
            )
        self.bases_ = np.asarray(state.bases)
        labels, squares = self._each(given.source, self._nearest)
        self.energy_ = float(np.mean(squares, dtype=np.float64))
        self._set_labels(labels)
        return self

    def score(self, X: ArrayLike, y: object = None) -> float:  # noqa: N803
        """The negative energy of vectors: the higher, the nearer they are to their subspaces."""
        check_is_fitted(self)
        _, squares = self._each(self._given(X).source, self._nearest)
        return -float(np.mean(squares, dtype=np.float64))

    def _rests(self, old: Any, new: Any, earlier: Any, info: Any) -> bool:
        return earlier is not None and float(earlier.energy - info.energy) <= self.tol * float(info.energy)

    def _bytes_of_a_vector(self) -> int:
        return 4 * self.n_clusters * self.rank

    def _width(self) -> int:
        return max(self.n_features_in_, self.n_clusters * self.rank)

    def _state(self) -> k_subspaces.KSubspacesState:
        return k_subspaces.KSubspacesState(jnp.asarray(self.bases_))

    def _codes(self, inputs: Array) -> Array:
        return _distances(self._state(), inputs)

    def _labels(self, inputs: Array) -> Array:
        return _assign(self._state(), inputs)

    def _nearest(self, inputs: Array) -> tuple[Array, Array]:
        """Labels and squared distances."""
        return self._labels(inputs), jnp.min(jnp.square(self._codes(inputs)), axis=1)

    @property
    def _n_features_out(self) -> int:
        return len(self.bases_)


@jax.jit
def _distances(state: k_subspaces.KSubspacesState, inputs: Array) -> Array:
    squares = jnp.sum(jnp.square(inputs), axis=1, keepdims=True)
    return jnp.sqrt(jnp.maximum(squares - jnp.square(k_subspaces.encode(state, inputs)), 0))
