"""Rate reduction of vectors such as embeddings (Chu et al. 2024)."""

from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from numpy.typing import ArrayLike
from sklearn.neighbors import NearestNeighbors

from sul_jax import coding_rate, k_means, rate_reduction, training, vectors, whitening
from sul_jax._check import check_integer, check_number
from sul_jax.estimators import _learning, _saved
from sul_jax.estimators._vectors import VectorClustering
from sul_jax.learning_rule import LearningRule
from sul_jax.nn import MLP, NMCE

_fit = jax.jit(k_means.fit, static_argnames=("num_clusters", "num_init", "metric"))
_reduction = jax.jit(coding_rate.coding_rate_reduction)
_pca = jax.jit(partial(whitening.pca, exponent=0.0), static_argnames="num_components")
_INTEGERS = (
    "n_clusters", "n_components", "hidden_size", "num_features", "n_neighbors", "batch_size", "max_steps",
)  # fmt: skip
# Vectors in memory that are learned from without drawing some.
_MOST = 2**14
# Steps of a compiled program.
_STRIDE = 25


class RateReductionClustering(VectorClustering):
    """Clusters embeddings by a small network that spreads all vectors and compresses each cluster.

    Vectors count by their direction, on principal components. Neighbours are drawn together, with a little
    noise. The first third of the steps learns features alone; then clusters begin by k-means of the vectors
    or of the features, whichever has the larger rate reduction there. Of many vectors some are learned from.
    Clusters come out about equally large: the method balances them.

    Args:
      n_clusters: clusters.
      n_components: principal components that the network sees, at most. Of more features than these, where
        most directions hold nothing but noise of the same size, only those that vary more are seen.
      hidden_size: of the network's two hidden layers.
      num_features: of the embedding.
      n_neighbors: nearest vectors, one of which a vector is drawn to in a step.
      noise: standard deviation of what is added to vectors, in that of a component on average.
      batch_size: vectors of a step; spread over the devices of this process where their number divides it.
      max_steps: of Adam.
      learning_rate: of Adam.
      eps_squared: squared distortion of the coding rates.
      invariance_weight: λ, how much neighbours are drawn together.
      temperature: τ of the memberships: the smaller, the sharper they are; 0.175 as published.
      random_state: an integer for the same result every time, on one machine with as many threads and
        devices.
      verbose: show progress.

    Attributes:
      labels_: int32 `[num_vectors]`, clusters of the vectors learned from, by the network's cluster head.
      cluster_centers_: float32 `[n_clusters, num_features]`, mean directions of the clusters' features; zero
        where a cluster is empty.
      rate_reduction_: of the features and clusters learned from, in nats: larger is better.

    Example:
      >>> import numpy as np
      >>> from sul_jax.estimators import RateReductionClustering
      >>> vectors = np.repeat(np.eye(3), 20, axis=0) + 0.1 * np.random.default_rng(0).random((60, 3))
      >>> labels = RateReductionClustering(3, max_steps=75, random_state=0).fit_predict(vectors)
      >>> len(set(labels[:20])), len(set(labels))
      (1, 3)
    """

    _kept = ("labels_", "cluster_centers_", "mean_", "components_")

    def __init__(
        self,
        n_clusters: int = 8,
        *,
        n_components: int = 64,
        hidden_size: int = 256,
        num_features: int = 32,
        n_neighbors: int = 10,
        noise: float = 0.7,
        batch_size: int = 1000,
        max_steps: int = 300,
        learning_rate: float = 1e-3,
        eps_squared: float = 0.1,
        invariance_weight: float = 20.0,
        temperature: float = 0.3,
        random_state: Any = None,
        verbose: bool = False,
    ):
        self.n_clusters = n_clusters
        self.n_components = n_components
        self.hidden_size = hidden_size
        self.num_features = num_features
        self.n_neighbors = n_neighbors
        self.noise = noise
        self.batch_size = batch_size
        self.max_steps = max_steps
        self.learning_rate = learning_rate
        self.eps_squared = eps_squared
        self.invariance_weight = invariance_weight
        self.temperature = temperature
        self.random_state = random_state
        self.verbose = verbose

    def fit(self, X: ArrayLike, y: object = None) -> Self:  # noqa: N803
        """Learns clusters.

        Args:
          X: `[num_vectors, num_features]`, a memory map, a file of vectors or a folder of them; see
            `sul_jax.vectors.read`.
          y: ignored.

        Returns:
          The estimator itself.

        Raises:
          ValueError: vectors that are not finite or fewer than clusters, or an option out of range.

        Warns:
          ConvergenceWarning: fewer clusters than asked for.
        """
        for name in _INTEGERS:
            check_integer(name, getattr(self, name), low=1)
        for name in ("noise", "learning_rate", "invariance_weight"):
            check_number(name, getattr(self, name), low=0)
        for name in ("eps_squared", "temperature"):
            check_number(name, getattr(self, name), above=0)
        self._draw_seed()
        given = self._given(X, least=2)
        number = given.source.num_vectors
        check_integer("n_clusters", self.n_clusters, low=1, high=number, why=", n_samples")
        # Neighbours cost the square of the number.
        some = given.array
        if some is None or number > _MOST:
            some = self._sample(given)[0]
        unit = whitening.normalize(jnp.asarray(some))
        pca = _pca(unit, num_components=unit.shape[1])
        variances = np.asarray(_variances(unit, pca))
        kept = min(self.n_components, len(variances))
        if kept < len(variances):
            kept = min(kept, _above_noise(variances, len(unit), self.n_clusters))
        spread = float(np.sqrt(np.mean(variances[:kept])))
        self.mean_ = np.asarray(pca.mean)
        self.components_ = np.asarray(pca.components)[:, :kept] / (spread or 1.0)
        seen = np.asarray(self._seen(some))
        self.learned_ = self._learn(seen)
        features, own = self._each(vectors.read(some), self._features_and_labels)
        members = np.eye(self.n_clusters, dtype=np.float32)[own]
        self.cluster_centers_ = np.asarray(whitening.normalize(jnp.asarray(members.T @ features)))
        self.rate_reduction_ = float(_reduction(features, members, eps_squared=self.eps_squared))
        self._set_labels(self._each(given.source, self._labels))
        return self

    def _learn(self, seen: np.ndarray) -> Any:
        """The network's state after all steps."""
        key, number = jax.random.key(self.seed_), len(seen)
        nearest = min(self.n_neighbors, number - 1)
        neighbours = (
            NearestNeighbors(n_neighbors=nearest, algorithm="brute")
            .fit(seen)
            .kneighbors(return_distance=False)
        )
        batch = min(self.batch_size, number)
        order = training.shuffled(self.seed_, number, batch, num_steps=self.max_steps, drop_last=False)
        generator = np.random.default_rng((self.seed_, 1))
        chosen = neighbours[order, generator.integers(0, nearest, order.shape)]
        rule, warmup = self._rule(), self.max_steps // 3
        steps = _steps(rule)

        def inputs(first: int, end: int) -> _Batch:
            views = np.stack([seen[order[first:end]], seen[chosen[first:end]]], axis=1)
            views += self.noise * generator.standard_normal(views.shape, np.float32)
            weights = (np.arange(first, end) >= warmup).astype(np.float32)
            return _Batch(views if split is None else jax.device_put(views, split), weights)

        state, split = rule.init(key, None), _split(batch)
        if split is not None:
            state = jax.device_put(state, NamedSharding(split.mesh, PartitionSpec()))
        state = training.train(steps, state, inputs, num_steps=warmup, stride=_STRIDE)
        state = rate_reduction.begin_clusters(state, self._first_centers(key, rule, state, seen))
        state = training.train(steps, state, inputs, num_steps=self.max_steps, start=warmup, stride=_STRIDE)
        state = _learning.learned(state)
        return state if split is None else jax.device_put(state, jax.local_devices()[0])

    def _first_centers(self, key: Array, rule: LearningRule, state: Any, seen: np.ndarray) -> Array:
        """By k-means of the features or of the vectors, whichever has the larger rate reduction."""
        features = _learning.encoder(rule)(state, seen)
        found = []
        for place, values in enumerate((features, seen)):
            own = jax.random.fold_in(key, place)
            labels = _fit(own, values, num_clusters=self.n_clusters, num_init=10).labels
            members = jax.nn.one_hot(labels, self.n_clusters)
            gain = _reduction(features, members, eps_squared=self.eps_squared)
            found.append((float(gain), place, jnp.matmul(members.T, features, precision="highest")))
        return max(found)[2]

    def _rule(self) -> LearningRule:
        return _rule(
            len(self.components_[0]),
            self.hidden_size,
            self.num_features,
            self.n_clusters,
            self.learning_rate,
            self.eps_squared,
            self.invariance_weight,
            self.temperature,
        )

    def _template(self) -> Any:
        return _learning.learned(jax.eval_shape(self._rule().init, jax.random.key(0), None))

    def _arrays(self) -> dict[str, Any]:
        return super()._arrays() | _saved.leaves(self)

    def _restore(self, arrays: dict[str, np.ndarray], path: str | Path) -> None:
        super()._restore({name: arrays.pop(name) for name in self._kept}, path)
        self.learned_ = _saved.tree(self, arrays, path)

    def _seen(self, inputs: ArrayLike) -> Array:
        """What the network sees of vectors."""
        state = whitening.PCAState(jnp.asarray(self.mean_), jnp.asarray(self.components_))
        return _projected(state, jnp.asarray(inputs, jnp.float32))

    def _features_and_labels(self, inputs: Array) -> tuple[Array, Array]:
        sizes = (len(self.components_[0]), self.hidden_size, self.num_features, self.n_clusters)
        features, logits = _outputs(_graph(*sizes), self.learned_, self._seen(inputs))
        return features, jnp.argmax(logits, axis=1).astype(jnp.int32)

    def _codes(self, inputs: Array) -> Array:
        return self._features_and_labels(inputs)[0]

    def _labels(self, inputs: Array) -> Array:
        return self._features_and_labels(inputs)[1]

    def _own_and_margin(self, inputs: Array) -> tuple[Array, Array]:
        features, labels = self._features_and_labels(inputs)
        cosines = features @ jnp.asarray(self.cluster_centers_).T
        distances = jnp.sqrt(jnp.maximum(2 - 2 * cosines, 0))
        is_own = labels[:, None] == jnp.arange(self.n_clusters)
        own = jnp.max(jnp.where(is_own, distances, 0), axis=1)
        return own, jnp.min(jnp.where(is_own, jnp.inf, distances), axis=1) - own

    @property
    def _n_features_out(self) -> int:
        return int(self.cluster_centers_.shape[1])


def _split(batch: int) -> NamedSharding | None:
    """Of steps' views: over this process's devices, where they divide a minibatch."""
    devices = jax.local_devices()
    if len(devices) == 1 or batch % len(devices):
        return None
    return NamedSharding(Mesh(np.array(devices), ("batch",)), PartitionSpec(None, None, "batch"))


def _above_noise(variances: np.ndarray, number: int, clusters: int) -> int:
    """How many principal components vary more than noise that is alike in all directions.

    The variances of noise end at (1 + √β)² σ² (Marchenko & Pastur 1967), and their median tells σ², if most
    components are noise. It is here as the thresholds λ*(β) σ and ω(β) times the median singular value of
    Gavish & Donoho (2014) imply it. All count where more than a quarter stand out, for the median is hardly
    noise then, or fewer than half as many as clusters.

    Args:
      variances: along all components, the largest first.
      number: of vectors.
      clusters: their number.
    """
    least, most = sorted((len(variances), number))
    share = least / most
    by_median = 0.56 * share**3 - 0.95 * share**2 + 1.82 * share + 1.43
    by_noise = np.sqrt(2 * (share + 1) + 8 * share / (share + 1 + np.sqrt(share**2 + 14 * share + 1)))
    edge = ((1 + np.sqrt(share)) * by_median / by_noise) ** 2
    above = int(np.sum(variances > edge * np.median(variances[:least])))
    return above if clusters <= 2 * above <= least / 2 else len(variances)


class _Batch(NamedTuple):
    """Of steps: vectors and their neighbours `[steps, 2, batch, features]`, and weights γ."""

    views: Any
    weight: Any


def _build(num_seen: int, hidden: int, num_features: int, num_clusters: int, rngs: nnx.Rngs) -> NMCE:
    mlp = MLP(num_seen, hidden, num_layers=2, activation=jax.nn.relu, rngs=rngs)
    return NMCE(mlp, hidden, num_features=num_features, num_clusters=num_clusters, rngs=rngs)


@lru_cache(maxsize=8)
def _graph(num_seen: int, hidden: int, num_features: int, num_clusters: int) -> Any:
    build = partial(_build, num_seen, hidden, num_features, num_clusters)
    return nnx.graphdef(nnx.eval_shape(lambda: build(nnx.Rngs(0))))


@lru_cache(maxsize=8)  # so that compiled programs are found again
def _rule(
    num_seen: int,
    hidden: int,
    num_features: int,
    num_clusters: int,
    learning_rate: float,
    eps_squared: float,
    invariance_weight: float,
    temperature: float,
) -> LearningRule:
    return rate_reduction.rule(
        partial(_build, num_seen, hidden, num_features, num_clusters),
        optimizer=optax.adam(learning_rate),
        eps_squared=eps_squared,
        invariance_weight=invariance_weight,
        temperature=temperature,
    )


@lru_cache(maxsize=8)
def _steps(rule: LearningRule) -> training.Step:
    def step(state: Any, batch: _Batch) -> tuple[Any, Any]:
        vectors, neighbours = batch.views
        return rule.update(state, vectors, neighbours=neighbours, compression_weight=batch.weight)

    return training.compiled(step)


@jax.jit
def _variances(inputs: Array, state: whitening.PCAState) -> Array:
    return jnp.mean(jnp.square(whitening.pca_whiten(inputs, state)), axis=0)


@jax.jit
def _projected(state: whitening.PCAState, inputs: Array) -> Array:
    return whitening.pca_whiten(whitening.normalize(inputs), state)


@partial(jax.jit, static_argnums=0)
def _outputs(graph: Any, learned: Any, seen: Array) -> tuple[Array, Array]:
    network = nnx.merge(graph, learned.params, learned.rest)
    return network(seen)
