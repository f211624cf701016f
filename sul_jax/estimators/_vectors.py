"""What the estimators for vectors share: reading them, a chunk at a time where they are many, and saving."""

from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from numpy.typing import ArrayLike
from sklearn.base import ClusterMixin
from sklearn.utils.validation import check_is_fitted, validate_data

from sul_jax import training, vectors
from sul_jax._check import check_integer, check_number, check_weights
from sul_jax._parallel import gathered
from sul_jax.estimators._estimator import Estimator, warn_of_few

# Bytes up to which vectors in memory are learned from at once, all starts side by side. Learning may hold
# four times as many beside them.
_AT_ONCE = 2**28
# Vectors of a chunk, and bytes of it at most.
_CHUNK, _CHUNK_BYTES = 2**16, 2**26
# Vectors from which those in chunks are begun: for each cluster, at least, and bytes of them at most.
_SAMPLED, _LEAST_SAMPLE, _SAMPLE_BYTES = 256, 2**14, 2**27


class Given(NamedTuple):
    """Vectors as an estimator was given them.

    Attributes:
      source: to be read in chunks.
      array: the same in memory, less the estimator's offset, where they can be learned from at once.
      weights: `[num_vectors]`, or None where all are 1.
    """

    source: vectors.Vectors
    array: np.ndarray | None
    weights: np.ndarray | None


class VectorEstimator(Estimator):
    """Reads vectors and encodes them, in chunks."""

    _kept: tuple[str, ...]  # attributes that are arrays

    def transform(self, X: ArrayLike) -> np.ndarray:  # noqa: N803
        """Codes of vectors; of a path those of all its files, one after the other.

        Args:
          X: as for `fit`.

        Returns:
          float32 `[num_vectors, num_codes]`.
        """
        check_is_fitted(self)
        codes: np.ndarray = self._each(self._given(X).source, self._codes)
        return codes

    def _arrays(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self._kept}

    def _restore(self, arrays: dict[str, np.ndarray], path: str | Path) -> None:
        for name in self._kept:
            setattr(self, name, arrays[name])

    def _codes(self, inputs: Array) -> Array:
        """What `transform` gives of vectors."""
        raise NotImplementedError

    def _given(self, X: Any, sample_weight: Any = None, *, least: int = 0) -> Given:  # noqa: N803
        """Checks vectors, in memory as scikit-learn does, on disk as they are read.

        Args:
          X: array, memory map or paths.
          sample_weight: of the vectors.
          least: vectors, of those that are learned from; 0 for others.
        """
        if vectors.is_path(X) or isinstance(X, np.memmap):
            source = vectors.read(X, directions=self._directions())
            if source.num_vectors < least:
                raise ValueError(f"X holds {source.num_vectors} vectors; at least {least} are needed")
            if least:
                self.n_features_in_, self.offset_ = source.num_features, self._offset(source)
                self.__dict__.pop("feature_names_in_", None)  # of an earlier fit
            elif source.num_features != self.n_features_in_:
                raise ValueError(
                    f"X has {source.num_features} features, but {type(self).__name__} is expecting "
                    f"{self.n_features_in_} features as input"
                )
            source = source.relative_to(self.offset_)
            return Given(source, None, _weights(sample_weight, source.num_vectors))
        array = validate_data(
            self, X, reset=least > 0, dtype=(np.float64, np.float32), ensure_min_samples=max(1, least)
        )
        source = vectors.read(array, directions=self._directions())
        if least:
            self.offset_ = self._offset(source)
        source = source.relative_to(self.offset_)
        weights = _weights(sample_weight, len(array))
        needed = max(array.nbytes, len(array) * self._bytes_of_a_vector() // 4)
        if needed > _AT_ONCE or jax.process_count() > 1:
            return Given(source, None, weights)
        if least and self._directions():  # what is not read in chunks is not checked yet
            for _ in source.chunks(chunk_size(source)):
                pass
        centred = array if self.offset_ is None else array - self.offset_
        return Given(source, centred.astype(np.float32, copy=False), weights)

    def _offset(self, source: vectors.Vectors) -> np.ndarray | None:
        """What is subtracted from vectors before float32 rounds them."""
        return None

    def _bytes_of_a_vector(self) -> int:
        """That learning at once holds, about, beside the vector itself."""
        return 0

    def _width(self) -> int:
        """Numbers that encoding makes of a vector."""
        return self.n_features_in_

    def _directions(self) -> bool:
        """Whether vectors need a norm."""
        return False

    def _each(self, source: vectors.Vectors, function: Callable[[Array], Any]) -> Any:
        """What a compiled function makes of all vectors, an array or a tree of them."""
        every: Any = None
        size = max(1, min(chunk_size(source), _CHUNK_BYTES // (4 * self._width())))
        start, source = 0, own_share(source)
        for chunk in self._chunks(source, size):
            # Programs for a few numbers of vectors, whatever is asked.
            made = function(jnp.asarray(_filled(chunk, min(size, _rounded(len(chunk))))))
            if every is None:  # filled in place: many codes are not held twice
                every = jax.tree.map(partial(_empty, source.num_vectors), made)
            for whole, part in zip(jax.tree.leaves(every), jax.tree.leaves(made), strict=True):
                whole[start : start + len(chunk)] = np.asarray(part)[: len(chunk)]
            start += len(chunk)
        return gathered(every)

    def _chunks(self, source: vectors.Vectors, size: int) -> Iterable[np.ndarray]:
        chunks = source.chunks(size)
        if not self.verbose:
            return chunks
        from tqdm import tqdm

        return tqdm(chunks, total=-(-source.num_vectors // size), unit="chunk", leave=False)


class VectorClustering(ClusterMixin, VectorEstimator):  # type: ignore[misc]
    """Learns clusters of vectors, of many by steps that are exact on all of them."""

    n_clusters: int
    n_init: int
    max_iter: int
    tol: float
    labels_: np.ndarray

    def _begin(self) -> Array:
        """Checks options that all have; the key of what is drawn."""
        for name in ("n_clusters", "n_init", "max_iter"):
            check_integer(name, getattr(self, name), low=1)
        check_number("tol", self.tol, low=0)
        self._draw_seed()
        return jax.random.key(self.seed_)

    def predict(self, X: ArrayLike) -> np.ndarray:  # noqa: N803
        """The cluster of each vector, int32 `[num_vectors]`."""
        check_is_fitted(self)
        labels: np.ndarray = self._each(self._given(X).source, self._labels)
        return labels

    def places(self, X: ArrayLike) -> tuple[np.ndarray, np.ndarray]:  # noqa: N803
        """Distance of vectors to their own clusters, and how much farther the next one is.

        Args:
          X: as for `fit`.

        Returns:
          Distances and margins, `[num_vectors]` each; margins are infinite where there is no other cluster.
        """
        check_is_fitted(self)
        distances, margins = self._each(self._given(X).source, self._own_and_margin)
        return distances, margins

    def _own_and_margin(self, inputs: Array) -> tuple[Array, Array]:
        nearest = _least(self._codes(inputs), number=min(2, self.n_clusters))
        own = nearest[:, 0]
        return own, nearest[:, 1] - own if self.n_clusters > 1 else jnp.full_like(own, jnp.inf)

    def fit_predict(self, X: ArrayLike, y: object = None, **options: Any) -> np.ndarray:  # noqa: N803
        """Learns clusters and returns those of the vectors, int32 `[num_vectors]`; see `fit`."""
        return self.fit(X, **options).labels_  # type: ignore[no-any-return, attr-defined]

    def _labels(self, inputs: Array) -> Array:
        """The clusters of vectors."""
        raise NotImplementedError

    def _set_labels(self, labels: np.ndarray) -> None:
        self.labels_ = labels
        warn_of_few(len(np.unique(labels)), self.n_clusters, "vectors differ too little")

    def _sample(self, given: Given) -> tuple[np.ndarray, np.ndarray | None]:
        """Vectors at random, from which clusters of many are begun, and their weights, none of them 0."""
        most = _SAMPLE_BYTES // max(4 * given.source.num_features, self._bytes_of_a_vector() // 8)
        number = max(self.n_clusters, min(most, max(_LEAST_SAMPLE, _SAMPLED * self.n_clusters)))
        source, number = own_share(given.source), -(-number // jax.process_count())
        weights = None if given.weights is None else given.weights[source.rows]
        some, rows = source.sample(number, seed=self.seed_, among=weights)
        return gathered(some), None if weights is None else gathered(weights[rows])

    def _width(self) -> int:
        return max(self.n_features_in_, self.n_clusters)

    def _steps(
        self,
        given: Given,
        state: Any,
        statistics: Callable[..., Any],
        apply: Callable[..., tuple[Any, Any]],
        rests: Callable[[Any, Any, Any, Any], bool],
        max_steps: int,
    ) -> tuple[Any, int]:
        """Steps on all vectors, in chunks and over this process's devices.

        Args:
          given: the vectors.
          state: to begin from.
          statistics: of the rule.
          apply: of the rule, compiled.
          rests: from a state, the next, and the infos of the last two steps, whether to stop.
          max_steps: bound on the steps.

        Returns:
          The last state and the number of steps.
        """
        summed, size, info = over_devices(statistics), chunk_size(given.source), None
        source, weights, taken = own_share(given.source), given.weights, 0
        if weights is not None:
            weights = weights[source.rows]
        while taken < max_steps:
            chunks = _with_weights(self._chunks(source, size), weights)
            before, earlier, taken = state, info, taken + 1
            state, info = apply(state, training.sum_chunks(summed, state, chunks))
            if rests(before, state, earlier, info):
                break
        return state, taken


@partial(jax.jit, static_argnames="number")
def _least(codes: Array, *, number: int) -> Array:
    return -lax.top_k(-codes, number)[0]


def own_share(source: vectors.Vectors) -> vectors.Vectors:
    """This process's part of vectors that all are given alike."""
    return source.share(jax.process_index(), jax.process_count())


@lru_cache(maxsize=16)
def over_devices(statistics: Callable[..., Any]) -> Callable[..., Any]:
    """A rule's statistics compiled, a chunk spread over the devices of this process where they divide it."""
    whole, number = jax.jit(statistics), jax.local_device_count()
    if number == 1:
        return whole

    def of_part(state: Any, inputs: tuple[Array, ...]) -> Any:
        return lax.psum(statistics(state, *inputs), "batch")

    mesh = Mesh(np.array(jax.local_devices()), ("batch",))
    split = jax.jit(jax.shard_map(of_part, mesh=mesh, in_specs=(P(), P("batch")), out_specs=P()))
    return lambda state, *inputs: whole(state, *inputs) if len(inputs[0]) % number else split(state, inputs)


def _with_weights(
    chunks: Iterable[np.ndarray], weights: np.ndarray | None
) -> Iterator[np.ndarray | tuple[np.ndarray, np.ndarray]]:
    start = 0
    for chunk in chunks:
        yield chunk if weights is None else (chunk, weights[start : start + len(chunk)])
        start += len(chunk)


def _weights(given: Any, number: int) -> np.ndarray | None:
    if given is None:
        return None
    return np.asarray(check_weights("sample_weight", given, number), np.float32)


def _empty(number: int, like: Any) -> np.ndarray:
    return np.empty((number, *like.shape[1:]), like.dtype)


def chunk_size(source: vectors.Vectors) -> int:
    """Vectors of a chunk, by their width alone."""
    return max(1, min(_CHUNK, _CHUNK_BYTES // (4 * source.num_features)))


def _rounded(number: int) -> int:
    """Up to a power of two."""
    return 1 << (number - 1).bit_length()


def _filled(chunk: np.ndarray, size: int) -> np.ndarray:
    """A chunk filled up with its last vector."""
    return chunk if len(chunk) == size else chunk[np.minimum(np.arange(size), len(chunk) - 1)]
