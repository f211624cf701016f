"""k-means: Lloyd's algorithm from k-means++ or random starts, best of several.

All starts run side by side, so that one matrix product serves them all. Sums have a fixed order: the same key
gives the same result, up to rounding on another kind of device.

Numbers of any size that float32 holds are clustered alike. Outside jit, float64 vectors of the host (NumPy,
lists) are centred before float32 rounds them: there a common offset costs no precision, however large.

`fit` does it all at once on vectors that fit into memory. For more, `rule` is a Lloyd step whose `statistics`
of chunks add up; with `memory` its steps are those of mini-batch k-means.
"""

import math
import warnings
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from sul_jax._check import (
    check_choice,
    check_finite,
    check_integer,
    check_number,
    check_vectors,
    check_weights,
    is_known,
    on_host,
)
from sul_jax._linalg import at_least_float32, directions, root, unit
from sul_jax._parallel import sum_over
from sul_jax.learning_rule import LearningRule

# Scores of vectors against centroids held at a time: they should stay in a CPU's cache.
_MAX_SCORES = 2**21
# Share of the clusters for which k-means++ draws candidates at a time: one product serves them all.
_AHEAD = 0.01
# Powers of two between which the largest number may lie: of squares and their sums nothing is lost then.
_COMFORT = (-32, 50)
# Clusters from which, on a CPU, adding each vector to its cluster beats a product with memberships.
_MANY_CLUSTERS = 64

Metric = Literal["euclidean", "cosine"]


class KMeansResult(NamedTuple):
    """The best of all starts.

    Attributes:
      centroids: `[num_clusters, features]`.
      labels: int32 `[batch]`, the nearest centroid of each vector.
      inertia: summed squared distance to it; infinite or 0 where float32 cannot hold it.
      num_iterations: Lloyd iterations until this start converged.
    """

    centroids: Array
    labels: Array
    inertia: Array
    num_iterations: Array


class KMeansState(NamedTuple):
    """What a step of k-means changes.

    Attributes:
      centroids: `[num_clusters, features]`.
      counts: `[num_clusters]`, weight of the vectors that each centroid is the mean of.
    """

    centroids: Array
    counts: Array


class KMeansInfo(NamedTuple):
    """What a step saw, before it moved the centroids.

    Attributes:
      inertia: summed squared distance of the vectors to their nearest centroid, times their weights.
      counts: `[num_clusters]`, weight of the vectors nearest to each centroid.
    """

    inertia: Array
    counts: Array


class Statistics(NamedTuple):
    """Sums over vectors that a step needs; those of two sets add up to those of their union.

    Attributes:
      sums: `[num_clusters, features]`, of the vectors nearest to each centroid, less the centroids' mean.
      counts: `[num_clusters]`, their weight.
      inertia: their summed squared distance, times their weights.
    """

    sums: Array
    counts: Array
    inertia: Array


class _Lloyd(NamedTuple):
    centroids: Array  # [starts, clusters, features]
    labels: Array  # [starts, batch]
    iterations: Array  # [starts]
    done: Array  # [starts]
    step: Array


def fit(
    key: Array,
    inputs: Array,
    *,
    num_clusters: int,
    num_init: int = 10,
    max_iterations: int = 300,
    tolerance: float | Array = 1e-4,
    init: Literal["k-means++", "random"] | Array = "k-means++",
    empty_clusters: Literal["relocate", "split"] = "relocate",
    metric: Metric = "euclidean",
    weights: Array | None = None,
    axis_name: str | None = None,
) -> KMeansResult:
    """Minimises Σₙ wₙ ‖xₙ − c_qₙ‖² over centroids c and labels q.

    Args:
      key: `jax.random.key`.
      inputs: `[batch, features]`.
      num_clusters: k, the number of clusters.
      num_init: starts, of which the one with the smallest inertia is returned.
      max_iterations: bound on Lloyd iterations.
      tolerance: a start has converged when no label changes, or when its centroids move by a summed
        squared distance of at most `tolerance` times the mean variance of the features.
      init: `"k-means++"` (greedy, 2 + ⌊ln k⌋ candidates a step, as scikit-learn's; from 200 clusters on,
        candidates of up to 8 successive steps are drawn at once), `"random"`
        (distinct vectors), or the first centroids themselves, `[num_clusters, features]`, of a single start.
      empty_clusters: `"relocate"` moves an empty cluster to the vector farthest from its centroid,
        as scikit-learn does; `"split"` cuts a cluster in two, drawn with probability proportional to
        its size less one, as faiss does.
      metric: `"cosine"` takes vectors and centroids at unit norm (spherical k-means); squared distances are
        then 2 − 2 · cosine.
      weights: `[batch]`, of the vectors, not negative; by default 1. A vector of weight 2 counts as two.
      axis_name: mapped axis over which the batch is split; `labels` are then the shard's own and
        everything else is that of the whole batch.

    Returns:
      A `KMeansResult`.

    Raises:
      ValueError: more clusters than vectors, an argument out of range, or (outside jit) values that are not
        finite or beyond float32, or vectors of zero norm under cosine.

    Warns:
      UserWarning: outside jit, an inertia that float32 cannot hold; centroids that it rounds, because the
        clusters differ by less than a thousand of its steps from their common offset.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from sul_jax import k_means
      >>> inputs = jnp.array([[0.0], [1.0], [10.0], [11.0]])
      >>> result = k_means.fit(jax.random.key(0), inputs, num_clusters=2)
      >>> sorted(result.centroids[:, 0].tolist()), result.inertia.item()
      ([0.5, 10.5], 1.0)
    """
    given = inputs if isinstance(inputs, jax.Array) else on_host("inputs", inputs)
    inputs, offset = check_vectors("inputs", given), None
    check_choice("metric", metric, ("euclidean", "cosine"))
    if isinstance(given, np.ndarray) and given.dtype == np.float64 and metric == "euclidean":
        inputs, offset = _centred(given)
    batch = inputs.shape[0] * (1 if axis_name is None else lax.axis_size(axis_name))
    check_integer("num_clusters", num_clusters, low=1, high=batch, why=f": inputs holds {batch} vectors")
    check_integer("num_init", num_init, low=1)
    check_integer("max_iterations", max_iterations, low=1)
    check_number("tolerance", tolerance, low=0)
    check_finite("inputs", inputs)
    if isinstance(init, str):
        check_choice("init", init, ("k-means++", "random"))
    else:
        init = init if isinstance(init, jax.Array) else on_host("init", init)
        if init.shape != (num_clusters, inputs.shape[1]):
            raise ValueError(
                f"init has shape {init.shape}, but {num_clusters} clusters of {inputs.shape[1]} features "
                f"need {(num_clusters, inputs.shape[1])}"
            )
        check_finite("init", init)
        num_init = 1
    check_choice("empty_clusters", empty_clusters, ("relocate", "split"))
    weights = None if weights is None else check_weights("weights", weights, len(inputs))

    inputs = at_least_float32(inputs)
    inputs = inputs if metric == "euclidean" else directions("inputs", inputs)
    share: Array | float = 1.0
    if weights is not None:  # of mean 1: what follows may then take them for numbers of vectors
        share = sum_over(jnp.sum(weights.astype(inputs.dtype)), axis_name) / batch
        weights = weights.astype(inputs.dtype) / share
    inputs, mean, scale = _near_one(inputs, weights, axis_name)
    squares = jnp.sum(jnp.square(inputs), axis=1)
    variance = sum_over(jnp.sum(_weighed(squares, weights)), axis_name) / (batch * inputs.shape[1])
    start_key, split_key = jax.random.split(key)
    if not isinstance(init, str):
        init = (init if offset is None else init - offset).astype(inputs.dtype)
        init = init if metric == "euclidean" else directions("init", init)
        centroids = (init * scale - mean[None])[None]
    elif init == "k-means++":
        centroids = _plus_plus(start_key, inputs, squares, weights, num_clusters, num_init, axis_name)
    else:
        centroids = _random_rows(start_key, inputs, weights, num_clusters, num_init, axis_name)

    last = _lloyd(
        inputs,
        squares,
        weights,
        centroids,
        split_key,
        max_iterations=max_iterations,
        least_shift=tolerance * variance,
        empty_clusters=empty_clusters,
        mean=mean if metric == "cosine" else None,
        axis_name=axis_name,
    )
    labels, distances = _nearest(last.centroids, inputs, squares)
    inertia = sum_over(jnp.sum(_weighed(distances, weights), axis=1), axis_name)
    best = jnp.argmin(inertia)
    back = 1 / scale  # a product, which XLA joins with the sum: the same bits as without it
    centroids = (last.centroids[best] + mean[None]) * back
    result = KMeansResult(
        centroids=centroids if offset is None else centroids + jnp.asarray(offset, centroids.dtype),
        labels=labels[best],
        inertia=inertia[best] * back * back * share,
        num_iterations=last.iterations[best],
    )
    if is_known(result.inertia) and inertia[best] * share != result.inertia * scale * scale:
        warnings.warn(
            f"the inertia is too large for {inputs.dtype} and given as {result.inertia}: scale the inputs",
            stacklevel=2,
        )
    return result


def _lloyd(
    inputs: Array,
    squares: Array,
    weights: Array | None,
    centroids: Array,
    key: Array,
    *,
    max_iterations: int,
    least_shift: Array,
    empty_clusters: Literal["relocate", "split"],
    mean: Array | None,
    axis_name: str | None,
) -> _Lloyd:
    """Lloyd's iterations from `[starts, num_clusters, features]`, of all starts until the last is done.

    Where a mean is given, what it was subtracted from has unit norm, and so have centroids.
    """

    def body(state: _Lloyd) -> _Lloyd:
        labels, distances = _nearest(state.centroids, inputs, squares)
        sums, counts = sum_over(_sums(labels, inputs, weights, centroids.shape[1]), axis_name)
        sizes = counts.astype(inputs.dtype)

        def refill() -> tuple[Array, Array]:
            if empty_clusters == "relocate":
                return _relocate(sums, sizes, labels, distances, inputs, weights, axis_name)
            return _split(jax.random.fold_in(key, state.step), sums, sizes)

        # The refilled sums equal the others where nothing is empty, so a batched `cond` is right too.
        sums, sizes = lax.cond(jnp.any(counts == 0), refill, lambda: (sums, sizes))
        moved = sums / jnp.where(sizes > 0, sizes, 1)[..., None]
        moved = moved if mean is None else unit(moved + mean[None, None]) - mean[None, None]
        shift = jnp.sum(jnp.square(moved - state.centroids), axis=(1, 2))
        same = sum_over(jnp.sum(labels != state.labels, axis=1), axis_name) == 0
        done = state.done | same | (shift <= least_shift)
        return _Lloyd(
            centroids=jnp.where(state.done[:, None, None], state.centroids, moved),
            labels=labels,
            iterations=jnp.where(state.done, state.iterations, state.iterations + 1),
            done=done,
            step=state.step + 1,
        )

    starts = centroids.shape[0]
    first = _Lloyd(
        centroids=centroids,
        # Taken from the inputs, the carry varies over `axis_name` as the labels do.
        labels=jnp.zeros_like(squares, jnp.int32)[None] - jnp.ones((starts, 1), jnp.int32),
        iterations=jnp.zeros(starts, jnp.int32),
        done=jnp.zeros(starts, bool),
        step=jnp.zeros((), jnp.int32),
    )
    return lax.while_loop(lambda s: (s.step < max_iterations) & ~jnp.all(s.done), body, first)


def assign(centroids: Array, inputs: Array) -> Array:
    """The nearest centroid of each vector, the lowest index on ties.

    Args:
      centroids: `[num_clusters, features]`.
      inputs: `[batch, features]`.

    Returns:
      int32 `[batch]`.

    Example:
      >>> import jax.numpy as jnp
      >>> from sul_jax import k_means
      >>> k_means.assign(jnp.array([[0.0], [10.0]]), jnp.array([[2.0], [9.0]])).tolist()
      [0, 1]
    """
    centroids = check_vectors("centroids", centroids)
    inputs = check_vectors("inputs", inputs, features=centroids.shape[-1])
    check_finite("inputs", inputs)
    centroids, inputs = at_least_float32(centroids), at_least_float32(inputs)
    # Relative to one centroid, for the reason that `fit` centres.
    centroids, inputs = centroids - centroids[:1], inputs - centroids[:1]
    scale = _scale(jnp.maximum(jnp.max(jnp.abs(centroids)), jnp.max(jnp.abs(inputs))))
    centroids, inputs = centroids * scale, inputs * scale
    labels, _ = _nearest(centroids[None], inputs, jnp.sum(jnp.square(inputs), axis=1))
    return labels[0]


def init(
    key: Array,
    inputs: Array,
    *,
    num_clusters: int,
    metric: Metric = "euclidean",
    weights: Array | None = None,
) -> KMeansState:
    """First centroids by k-means++.

    Args:
      key: `jax.random.key`.
      inputs: `[batch, features]`.
      num_clusters: k.
      metric: as in `fit`.
      weights: `[batch]`, of the vectors; by default 1.

    Returns:
      A `KMeansState`, its counts 0.

    Raises:
      ValueError: as `fit`.

    Example:
      >>> import jax
      >>> from sul_jax import k_means
      >>> inputs = jax.random.normal(jax.random.key(0), (50, 6))
      >>> k_means.init(jax.random.key(1), inputs, num_clusters=3).centroids.shape
      (3, 6)
    """
    inputs = check_vectors("inputs", inputs)
    check_integer("num_clusters", num_clusters, low=1, high=len(inputs), why=f": inputs holds {len(inputs)}")
    check_choice("metric", metric, ("euclidean", "cosine"))
    check_finite("inputs", inputs)
    inputs = at_least_float32(inputs)
    inputs = inputs if metric == "euclidean" else directions("inputs", inputs)
    weights = None if weights is None else check_weights("weights", weights, len(inputs))
    inputs, mean, scale = _near_one(inputs, None, None)
    squares = jnp.sum(jnp.square(inputs), axis=1)
    centroids = _plus_plus(key, inputs, squares, weights, num_clusters, 1, None)[0]
    return KMeansState((centroids + mean[None]) / scale, jnp.zeros(num_clusters, inputs.dtype))


def update(
    state: KMeansState,
    inputs: Array,
    *,
    memory: float | Array = 0.0,
    metric: Metric = "euclidean",
    weights: Array | None = None,
    axis_name: str | None = None,
) -> tuple[KMeansState, KMeansInfo]:
    """One step: each vector goes to its nearest centroid, each centroid to the mean of its vectors.

    Args:
      state: the centroids.
      inputs: `[batch, features]`.
      memory: what the vectors of earlier steps count beside those of this one: 0 is a step of Lloyd's
        algorithm, 1 one of mini-batch k-means (Sculley 2010), where a centroid is the mean of all that it
        ever won (under cosine, of its earlier self, at unit norm, and what it wins now). May be traced.
      metric: as in `fit`.
      weights: `[batch]`, of the vectors; by default 1.
      axis_name: mapped axis over which the batch is split; the step is that of the whole batch.

    Returns:
      The new state and the `KMeansInfo` of the old one. A centroid that wins nothing stays.

    Raises:
      ValueError: `inputs` does not have the state's number of features.

    Example:
      >>> import jax
      >>> from sul_jax import k_means
      >>> inputs = jax.random.normal(jax.random.key(0), (50, 6))
      >>> state = k_means.init(jax.random.key(1), inputs, num_clusters=3)
      >>> state, before = k_means.update(state, inputs)
      >>> state, after = k_means.update(state, inputs)
      >>> bool(after.inertia <= before.inertia)
      True
    """
    sums = statistics(state, inputs, metric=metric, weights=weights)
    return apply(state, sums, memory=memory, metric=metric, axis_name=axis_name)


def statistics(
    state: KMeansState, inputs: Array, *, metric: Metric = "euclidean", weights: Array | None = None
) -> Statistics:
    """Assigns vectors and sums what `apply` needs; add up the results of chunks of a batch.

    Args:
      state: the centroids.
      inputs: `[batch, features]`.
      metric: as in `fit`.
      weights: `[batch]`, of the vectors; by default 1.

    Returns:
      A `Statistics`.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from sul_jax import k_means
      >>> inputs = jax.random.normal(jax.random.key(0), (50, 6))
      >>> state = k_means.init(jax.random.key(1), inputs, num_clusters=3)
      >>> parts = [k_means.statistics(state, part) for part in (inputs[:20], inputs[20:])]
      >>> state, info = k_means.apply(state, jax.tree.map(jnp.add, *parts))
    """
    inputs = check_vectors("inputs", inputs, features=state.centroids.shape[-1])
    check_choice("metric", metric, ("euclidean", "cosine"))
    weights = None if weights is None else check_weights("weights", weights, len(inputs))
    inputs = at_least_float32(inputs)
    inputs = inputs if metric == "euclidean" else directions("inputs", inputs)
    middle, scale = _frame(state)
    inputs, centroids = (inputs - middle) * scale, (state.centroids - middle) * scale
    squares = jnp.sum(jnp.square(inputs), axis=1)
    labels, distances = _nearest(centroids[None], inputs, squares)
    sums, counts = _sums(labels, inputs, weights, len(centroids))
    inertia = jnp.sum(_weighed(distances[0], weights)) / scale / scale
    return Statistics(sums[0], counts[0].astype(inputs.dtype), inertia)


def apply(
    state: KMeansState,
    statistics: Statistics,
    *,
    memory: float | Array = 0.0,
    metric: Metric = "euclidean",
    axis_name: str | None = None,
) -> tuple[KMeansState, KMeansInfo]:
    """Second half of `update`: moves the centroids.

    Args:
      state: the centroids.
      statistics: from `statistics`, summed over the chunks of a batch.
      memory: as in `update`.
      metric: as in `fit`.
      axis_name: mapped axis over which they are summed as well.

    Returns:
      The new state and the `KMeansInfo` of the old one.
    """
    statistics = sum_over(statistics, axis_name)
    middle, scale = _frame(state)
    kept = memory * state.counts
    counts = (kept + statistics.counts).astype(state.counts.dtype)
    own = (state.centroids - middle) * scale
    moved = (kept[:, None] * own + statistics.sums) / jnp.where(counts > 0, counts, 1)[:, None]
    moved = jnp.where(counts[:, None] > 0, moved / scale + middle, state.centroids)
    if metric == "cosine":
        directed = unit(moved)
        moved = jnp.where(jnp.any(directed != 0, axis=1, keepdims=True), directed, state.centroids)
    return KMeansState(moved, counts), KMeansInfo(statistics.inertia, statistics.counts)


def encode(state: KMeansState, inputs: Array) -> Array:
    """Distance of each vector to every centroid.

    Args:
      state: the centroids.
      inputs: `[batch, features]`.

    Returns:
      `[batch, num_clusters]`.

    Example:
      >>> import jax.numpy as jnp
      >>> from sul_jax import k_means
      >>> state = k_means.KMeansState(jnp.array([[0.0, 0.0], [3.0, 0.0]]), jnp.zeros(2))
      >>> k_means.encode(state, jnp.array([[3.0, 4.0]])).tolist()
      [[5.0, 4.0]]
    """
    inputs = at_least_float32(check_vectors("inputs", inputs, features=state.centroids.shape[-1]))
    middle, scale = _frame(state)
    inputs, centroids = (inputs - middle) * scale, (state.centroids - middle) * scale
    products = jnp.matmul(inputs, centroids.T, precision="highest")
    squares = jnp.sum(jnp.square(inputs), axis=1)[:, None] + jnp.sum(jnp.square(centroids), axis=1)[None]
    distances = jnp.maximum(squares - 2 * products, 0)
    # The difference of large numbers leaves little of a small distance: the smallest is taken exactly.
    nearest = jnp.argmin(distances, axis=1)
    exact = jnp.sum(jnp.square(inputs - centroids[nearest]), axis=1)
    own = nearest[:, None] == jnp.arange(len(centroids))[None]
    return root(jnp.where(own, exact[:, None], distances)) / scale


def rule(*, num_clusters: int, memory: float = 0.0, metric: Metric = "euclidean") -> LearningRule:
    """k-means as a `LearningRule`; its update also takes `weights`.

    Args:
      num_clusters: k.
      memory: as in `update`.
      metric: as in `fit`.

    Returns:
      A `LearningRule` of `init`, `update` and `encode`.

    Example:
      >>> import jax
      >>> from sul_jax import k_means
      >>> inputs = jax.random.normal(jax.random.key(0), (50, 6))
      >>> rule = k_means.rule(num_clusters=3, memory=1.0)
      >>> state, info = rule.update(rule.init(jax.random.key(1), inputs), inputs[:20])
      >>> rule.encode(state, inputs).shape
      (50, 3)
    """
    return LearningRule(
        partial(init, num_clusters=num_clusters, metric=metric),
        partial(update, memory=memory, metric=metric),
        encode,
    )


def _near_one(inputs: Array, weights: Array | None, axis_name: str | None) -> tuple[Array, Array, Array]:
    """Scaled vectors less their mean, the mean, `[features]`, and the scale."""
    scale = _scale(jnp.max(jnp.abs(inputs)), axis_name)
    inputs = inputs * scale
    # Centring changes no distance and spares float32 the cancellation of large common offsets.
    heavy = inputs if weights is None else inputs * weights[:, None]
    number = len(inputs) * (1 if axis_name is None else lax.axis_size(axis_name))
    mean = sum_over(jnp.sum(heavy, axis=0), axis_name) / number
    return inputs - mean[None], mean, scale


def _frame(state: KMeansState) -> tuple[Array, Array]:
    """What is subtracted from vectors and how they are scaled, for float32's sake: from the state alone."""
    middle = jnp.mean(state.centroids, axis=0, keepdims=True)
    return middle, _scale(jnp.max(jnp.abs(state.centroids)))


def _weighed(values: Array, weights: Array | None) -> Array:
    """Values whose last axis is the vectors'."""
    return values if weights is None else values * weights.reshape((1,) * (values.ndim - 1) + (-1,))


def _centred(exact: np.ndarray) -> tuple[Array, np.ndarray]:
    """Float64 vectors less their mean, taken before float32 rounds them, and the mean, `[1, features]`."""
    offset = exact.mean(axis=0, keepdims=True)
    centred = exact - offset
    largest, spread = (max(values.max(), -values.min()) for values in (exact, centred))
    inputs = jnp.asarray(centred)
    limits = np.finfo(inputs.dtype)
    varies = spread > 1e-12 * largest  # else rounding alone
    if largest > limits.max or (varies and spread < limits.tiny):
        raise ValueError(
            f"inputs go up to {largest:.3g} and vary by {spread:.3g}, outside {limits.dtype}: scale them"
        )
    if varies and spread < 1000 * limits.eps * largest:
        warnings.warn(
            f"inputs vary by {spread:.3g} around {largest:.3g}, where {limits.dtype} has steps of "
            f"{limits.eps * largest:.1g}: labels and inertia are right, centroids are rounded. Subtract a "
            "common offset first",
            stacklevel=3,
        )
    return inputs, offset


def _scale(largest: Array, axis_name: str | None = None) -> Array:
    """A power of two that brings numbers near 1 if their squares could leave float32; otherwise 1."""
    largest = largest if axis_name is None else lax.pmax(largest, axis_name)
    _, exponent = jnp.frexp(largest)
    limits, (low, high) = np.finfo(largest.dtype), _COMFORT
    power = jnp.clip(exponent, limits.minexp, limits.maxexp - 2)
    power = jnp.where((exponent < low) | (exponent > high), power, 0)
    return jnp.ldexp(jnp.ones_like(largest), -power)


def _nearest(centroids: Array, inputs: Array, squares: Array) -> tuple[Array, Array]:
    """Labels and squared distances, `[starts, batch]` each."""
    starts, clusters, features = centroids.shape
    batch = inputs.shape[0]
    flat = centroids.reshape(starts * clusters, features)
    own = jnp.sum(jnp.square(centroids), axis=2)[..., None]

    def of_chunk(inputs: Array) -> tuple[Array, Array]:
        products = jnp.matmul(flat, inputs.T, precision="highest").reshape(starts, clusters, -1)
        scores = own - 2 * products
        # Clusters are the second axis and the batch the minor one: both reductions vectorise, which
        # `argmin` would not.
        least = jnp.min(scores, axis=1)
        places = jnp.where(scores <= least[:, None], jnp.arange(clusters)[None, :, None], clusters - 1)
        return jnp.min(places, axis=1).astype(jnp.int32), least

    chunk = max(1, _MAX_SCORES // (starts * clusters))
    if batch <= 2 * chunk:
        labels, scores = of_chunk(inputs)
    else:
        number = -(-batch // chunk)
        filled = jnp.pad(inputs, ((0, number * chunk - batch), (0, 0)))
        parts = lax.map(of_chunk, filled.reshape(number, chunk, features))
        labels, scores = (jnp.moveaxis(p, 0, 1).reshape(starts, -1)[:, :batch] for p in parts)
    return labels, jnp.maximum(scores + squares[None], 0)


def _sums(labels: Array, inputs: Array, weights: Array | None, clusters: int) -> tuple[Array, Array]:
    """Sum `[starts, clusters, features]` and number `[starts, clusters]` of each cluster's vectors."""
    if clusters >= _MANY_CLUSTERS and jax.default_backend() == "cpu":
        # Elsewhere scattered additions come in no fixed order.

        def add(values: Array) -> Array:
            empty = jnp.zeros((clusters, *values.shape[1:]), values.dtype)
            return jax.vmap(lambda owner: empty.at[owner].add(values))(labels)

        if weights is not None:
            return add(inputs * weights[:, None]), add(weights)
        return add(inputs), add(jnp.ones(inputs.shape[0], jnp.int32))
    members = jax.nn.one_hot(labels, clusters, axis=1, dtype=bool)
    flat = _weighed(members.reshape(-1, inputs.shape[0]).astype(inputs.dtype), weights)
    sums = jnp.matmul(flat, inputs, precision="highest").reshape(labels.shape[0], clusters, -1)
    if weights is not None:
        return sums, jnp.sum(flat, axis=1).reshape(labels.shape[0], clusters)
    return sums, jnp.sum(members, axis=2, dtype=jnp.int32)


def num_candidates(num_clusters: int) -> int:
    """Vectors that k-means++ compares with all others at a time, for each start: what its memory goes by.

    Args:
      num_clusters: k.

    Example:
      >>> from sul_jax import k_means
      >>> k_means.num_candidates(10), k_means.num_candidates(1000)
      (4, 64)
    """
    return math.prod(_candidates(num_clusters))


def _candidates(clusters: int) -> tuple[int, int]:
    """Of a step of k-means++, and steps whose candidates are drawn at once."""
    return 2 + int(math.log(clusters)), max(1, min(8, int(_AHEAD * clusters)))


def _plus_plus(
    key: Array,
    inputs: Array,
    squares: Array,
    weights: Array | None,
    clusters: int,
    starts: int,
    axis_name: str | None,
) -> Array:
    candidates, ahead = _candidates(clusters)
    blocks = -(-(clusters - 1) // ahead)
    first_key, key = jax.random.split(key)
    ones = jnp.ones_like(squares)[None] * jnp.ones((starts, 1))
    first = _draw(first_key, _weighed(ones, weights), inputs, 1, axis_name)[:, 0]
    centroids = jnp.zeros((starts, 1 + blocks * ahead, inputs.shape[1]), inputs.dtype)

    def distances(rows: Array) -> Array:
        flat = rows.reshape(-1, rows.shape[-1])
        products = jnp.matmul(flat, inputs.T, precision="highest")
        result = jnp.sum(jnp.square(flat), axis=1)[:, None] - 2 * products + squares[None]
        return jnp.maximum(result, 0).reshape(*rows.shape[:-1], -1)

    def body(block: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        centroids, closest = carry
        chances = _weighed(closest, weights)
        drawn = _draw(jax.random.fold_in(key, block), chances, inputs, ahead * candidates, axis_name)
        to_drawn = distances(drawn)
        for step in range(ahead):
            own = slice(step * candidates, (step + 1) * candidates)
            nearer = jnp.minimum(to_drawn[:, own], closest[:, None])
            potential = sum_over(jnp.sum(_weighed(nearer, weights), axis=2), axis_name)
            best = jnp.argmin(potential, axis=1)[:, None]
            row = jnp.take_along_axis(drawn[:, own], best[..., None], axis=1)
            closest = jnp.take_along_axis(nearer, best[..., None], axis=1)[:, 0]
            index = (block - 1) * ahead + step + 1
            centroids = lax.dynamic_update_slice_in_dim(centroids, row, index, axis=1)
        return centroids, closest

    centroids = lax.dynamic_update_slice_in_dim(centroids, first[:, None], 0, axis=1)
    centroids, _ = lax.fori_loop(1, blocks + 1, body, (centroids, distances(first)))
    return centroids[:, :clusters]


def _draw(key: Array, weights: Array, inputs: Array, number: int, axis_name: str | None) -> Array:
    """Rows of `inputs` drawn with probability proportional to `weights` `[starts, batch]`.

    Inverse transform over the whole batch: the same rows however the batch is split over devices.
    """
    cumulative = jnp.cumsum(weights, axis=1)
    share = cumulative[:, -1:]
    before, whole = jnp.zeros_like(share), share
    if axis_name is not None:
        shares = lax.all_gather(share, axis_name)
        shard = jnp.arange(shares.shape[0])[:, None, None]
        before = jnp.sum(jnp.where(shard < lax.axis_index(axis_name), shares, 0), axis=0)
        whole = lax.psum(share, axis_name)
    target = jax.random.uniform(key, (weights.shape[0], number)) * whole - before
    here = (target >= 0) & (target < share)
    index = jax.vmap(lambda c, t: jnp.searchsorted(c, t, side="right"))(cumulative, target)
    rows = inputs[jnp.minimum(index, inputs.shape[0] - 1)]
    if axis_name is None:
        return rows
    return lax.psum(jnp.where(here[..., None], rows, 0), axis_name)


def _random_rows(
    key: Array,
    inputs: Array,
    weights: Array | None,
    clusters: int,
    starts: int,
    axis_name: str | None,
) -> Array:
    """Distinct rows: the smallest of random numbers attached to the positions in the whole batch."""
    batch = inputs.shape[0]
    shards = 1 if axis_name is None else lax.axis_size(axis_name)
    numbers = jax.random.uniform(key, (starts, batch * shards))
    if weights is not None:  # the first of exponential clocks at these rates
        rates = weights if axis_name is None else lax.all_gather(weights, axis_name, tiled=True)
        numbers = -jnp.log1p(-numbers) / rates
    chosen = jnp.argsort(numbers, axis=1)[:, :clusters]
    if axis_name is None:
        return inputs[chosen]
    local = chosen - lax.axis_index(axis_name) * batch
    here = (local >= 0) & (local < batch)
    rows = jnp.where(here[..., None], inputs[jnp.clip(local, 0, batch - 1)], 0)
    return lax.psum(rows, axis_name)


def _relocate(
    sums: Array,
    counts: Array,
    labels: Array,
    distances: Array,
    inputs: Array,
    weights: Array | None,
    axis_name: str | None,
) -> tuple[Array, Array]:
    """The m-th empty cluster becomes the m-th farthest vector, which leaves its old cluster."""
    clusters = counts.shape[1]
    number = min(clusters, distances.shape[1])
    if weights is not None:
        distances = jnp.where(weights > 0, distances, -1)
    far, index = lax.top_k(distances, number)
    rows, owners = inputs[index], jnp.take_along_axis(labels, index, axis=1)
    heavy = jnp.ones_like(far) if weights is None else weights[index]
    if axis_name is not None:
        # psum of disjoint slots: an all_gather whose result is known to be the same everywhere.
        def gather(values: Array) -> Array:
            slots = jnp.zeros((lax.axis_size(axis_name), *values.shape), values.dtype)
            slots = lax.psum(slots.at[lax.axis_index(axis_name)].set(values), axis_name)
            return jnp.moveaxis(slots, 0, 1).reshape(values.shape[0], -1, *values.shape[2:])

        far, rows, owners, heavy = gather(far), gather(rows), gather(owners), gather(heavy)
        far, place = lax.top_k(far, min(clusters, far.shape[1]))
        rows = jnp.take_along_axis(rows, place[..., None], axis=1)
        owners, heavy = (jnp.take_along_axis(one, place, axis=1) for one in (owners, heavy))
    empty = counts == 0
    rank = jnp.cumsum(empty, axis=1) - 1  # which of the farthest vectors an empty cluster takes
    taken = jnp.arange(far.shape[1])[None] < jnp.sum(empty, axis=1, keepdims=True)
    lost = jax.nn.one_hot(owners, clusters, axis=1, dtype=bool) & taken[:, None]
    lost = jnp.where(lost, heavy[:, None], 0)
    sums = sums - jnp.matmul(lost, rows, precision="highest")
    counts = counts - jnp.sum(lost, axis=2)
    place = jnp.clip(rank, 0, rows.shape[1] - 1)
    gained, weight = (
        jnp.take_along_axis(rows, place[..., None], axis=1),
        jnp.take_along_axis(heavy, place, axis=1),
    )
    return jnp.where(empty[..., None], gained * weight[..., None], sums), jnp.where(empty, weight, counts)


def _split(key: Array, sums: Array, counts: Array) -> tuple[Array, Array]:
    """An empty cluster copies a large one; their coordinates part by ±1/1024, alternating."""
    _starts, clusters, features = sums.shape
    tilt = jnp.where(jnp.arange(features) % 2 == 0, 1 / 1024, -1 / 1024)[None, None]

    def body(cluster: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        centroids, counts = carry
        empty = counts[:, cluster] == 0
        spare = jnp.maximum(counts - 1, 0)
        noise = jax.random.gumbel(jax.random.fold_in(key, cluster), counts.shape)
        donor = jnp.argmax(jnp.where(spare > 0, jnp.log(jnp.maximum(spare, 1e-30)) + noise, -jnp.inf), 1)
        pick = jax.nn.one_hot(donor, clusters, dtype=bool)
        original = jnp.take_along_axis(centroids, donor[:, None, None], axis=1)
        half = jnp.take_along_axis(counts, donor[:, None], axis=1) / 2
        this = (jnp.arange(clusters) == cluster)[None] & empty[:, None]
        pick = pick & empty[:, None]
        centroids = jnp.where(this[..., None], original * (1 + tilt), centroids)
        centroids = jnp.where(pick[..., None], original * (1 - tilt), centroids)
        counts = jnp.where(this | pick, half, counts)
        return centroids, counts

    centroids = sums / jnp.where(counts > 0, counts, 1)[..., None]
    centroids, counts = lax.fori_loop(0, clusters, body, (centroids, counts))
    # Fractional sizes below one would be lost on `maximum(counts, 1)`; sizes are at least one.
    counts = jnp.maximum(counts, 1)
    return centroids * counts[..., None], counts
