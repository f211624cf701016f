"""k-means: Lloyd's algorithm from k-means++ or random starts, best of several.

All starts run side by side, so that one matrix product serves them all. Sums have a fixed order: the same key
gives the same result, on another kind of device but for rounding.

Numbers of any size that float32 holds are clustered alike. Outside jit, float64 vectors of the host (NumPy,
lists) are centred before float32 rounds them: there a common offset costs no precision, however large.
"""

import math
import warnings
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
    is_known,
    on_host,
)
from sul_jax._linalg import at_least_float32
from sul_jax._parallel import sum_over

# Scores of vectors against centroids held at a time: they should stay in a CPU's cache.
_MAX_SCORES = 2**21
# Share of the clusters for which k-means++ draws candidates at a time: one product serves them all.
_AHEAD = 0.01
# Powers of two between which the largest number may lie: of squares and their sums nothing is lost then.
_COMFORT = (-32, 50)
# Clusters from which, on a CPU, adding each vector to its cluster beats a product with memberships.
_MANY_CLUSTERS = 64


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
    axis_name: str | None = None,
) -> KMeansResult:
    """Minimises Σₙ ‖xₙ − c_qₙ‖² over centroids c and labels q.

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
      axis_name: mapped axis over which the batch is split; `labels` are then the shard's own and
        everything else is that of the whole batch.

    Returns:
      A `KMeansResult`.

    Raises:
      ValueError: more clusters than vectors, an argument out of range, or (outside jit) values that are not
        finite or beyond float32.

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
    if isinstance(given, np.ndarray) and given.dtype == np.float64:
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

    inputs = at_least_float32(inputs)
    scale = _scale(jnp.max(jnp.abs(inputs)), axis_name)
    inputs = inputs * scale
    # Centring changes no distance and spares float32 the cancellation of large common offsets.
    mean = sum_over(jnp.sum(inputs, axis=0), axis_name) / batch
    inputs = inputs - mean[None]
    squares = jnp.sum(jnp.square(inputs), axis=1)
    variance = sum_over(jnp.sum(squares), axis_name) / (batch * inputs.shape[1])
    start_key, split_key = jax.random.split(key)
    if not isinstance(init, str):
        init = (init if offset is None else init - offset).astype(inputs.dtype)
        centroids = (init * scale - mean[None])[None]
    elif init == "k-means++":
        centroids = _plus_plus(start_key, inputs, squares, num_clusters, num_init, axis_name)
    else:
        centroids = _random_rows(start_key, inputs, num_clusters, num_init, axis_name)

    last = _lloyd(
        inputs,
        squares,
        centroids,
        split_key,
        max_iterations=max_iterations,
        least_shift=tolerance * variance,
        empty_clusters=empty_clusters,
        axis_name=axis_name,
    )
    labels, distances = _nearest(last.centroids, inputs, squares)
    inertia = sum_over(jnp.sum(distances, axis=1), axis_name)
    best = jnp.argmin(inertia)
    back = 1 / scale  # a product, which XLA joins with the sum: the same bits as without it
    centroids = (last.centroids[best] + mean[None]) * back
    result = KMeansResult(
        centroids=centroids if offset is None else centroids + jnp.asarray(offset, centroids.dtype),
        labels=labels[best],
        inertia=inertia[best] * back * back,
        num_iterations=last.iterations[best],
    )
    if is_known(result.inertia) and inertia[best] != result.inertia * scale * scale:
        warnings.warn(
            f"the inertia is beyond {inputs.dtype} and given as {result.inertia}: scale the inputs",
            stacklevel=2,
        )
    return result


def _lloyd(
    inputs: Array,
    squares: Array,
    centroids: Array,
    key: Array,
    *,
    max_iterations: int,
    least_shift: Array,
    empty_clusters: Literal["relocate", "split"],
    axis_name: str | None,
) -> _Lloyd:
    """Lloyd's iterations from `[starts, num_clusters, features]`, of all starts until the last is done."""

    def body(state: _Lloyd) -> _Lloyd:
        labels, distances = _nearest(state.centroids, inputs, squares)
        sums, counts = sum_over(_sums(labels, inputs, centroids.shape[1]), axis_name)
        weights = counts.astype(inputs.dtype)

        def refill() -> tuple[Array, Array]:
            if empty_clusters == "relocate":
                return _relocate(sums, weights, labels, distances, inputs, axis_name)
            return _split(jax.random.fold_in(key, state.step), sums, weights)

        # The refilled sums equal the others where nothing is empty, so a batched `cond` is right too.
        sums, weights = lax.cond(jnp.any(counts == 0), refill, lambda: (sums, weights))
        moved = sums / jnp.maximum(weights, 1)[..., None]
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
            f"inputs go up to {largest:.3g} and vary by {spread:.3g}, beyond {limits.dtype}: scale them"
        )
    if varies and spread < 1000 * limits.eps * largest:
        warnings.warn(
            f"inputs vary by {spread:.3g} around {largest:.3g}, where {limits.dtype} goes in steps of "
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


def _sums(labels: Array, inputs: Array, clusters: int) -> tuple[Array, Array]:
    """Sum `[starts, clusters, features]` and number `[starts, clusters]` of each cluster's vectors."""
    if clusters >= _MANY_CLUSTERS and jax.default_backend() == "cpu":
        # Elsewhere scattered additions come in no fixed order.

        def add(values: Array) -> Array:
            empty = jnp.zeros((clusters, *values.shape[1:]), values.dtype)
            return jax.vmap(lambda owner: empty.at[owner].add(values))(labels)

        return add(inputs), add(jnp.ones(inputs.shape[0], jnp.int32))
    members = jax.nn.one_hot(labels, clusters, axis=1, dtype=bool)
    flat = members.reshape(-1, inputs.shape[0]).astype(inputs.dtype)
    sums = jnp.matmul(flat, inputs, precision="highest").reshape(labels.shape[0], clusters, -1)
    return sums, jnp.sum(members, axis=2, dtype=jnp.int32)


def _plus_plus(
    key: Array, inputs: Array, squares: Array, clusters: int, starts: int, axis_name: str | None
) -> Array:
    candidates = 2 + int(math.log(clusters))
    ahead = max(1, min(8, int(_AHEAD * clusters)))
    blocks = -(-(clusters - 1) // ahead)
    first_key, key = jax.random.split(key)
    ones = jnp.ones_like(squares)[None] * jnp.ones((starts, 1))
    first = _draw(first_key, ones, inputs, 1, axis_name)[:, 0]
    centroids = jnp.zeros((starts, 1 + blocks * ahead, inputs.shape[1]), inputs.dtype)

    def distances(rows: Array) -> Array:
        flat = rows.reshape(-1, rows.shape[-1])
        products = jnp.matmul(flat, inputs.T, precision="highest")
        result = jnp.sum(jnp.square(flat), axis=1)[:, None] - 2 * products + squares[None]
        return jnp.maximum(result, 0).reshape(*rows.shape[:-1], -1)

    def body(block: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        centroids, closest = carry
        drawn = _draw(jax.random.fold_in(key, block), closest, inputs, ahead * candidates, axis_name)
        to_drawn = distances(drawn)
        for step in range(ahead):
            own = slice(step * candidates, (step + 1) * candidates)
            nearer = jnp.minimum(to_drawn[:, own], closest[:, None])
            potential = sum_over(jnp.sum(nearer, axis=2), axis_name)
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


def _random_rows(key: Array, inputs: Array, clusters: int, starts: int, axis_name: str | None) -> Array:
    """Distinct rows: the smallest of uniform numbers attached to the positions in the whole batch."""
    batch = inputs.shape[0]
    shards = 1 if axis_name is None else lax.axis_size(axis_name)
    numbers = jax.random.uniform(key, (starts, batch * shards))
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
    axis_name: str | None,
) -> tuple[Array, Array]:
    """The m-th empty cluster becomes the m-th farthest vector, which leaves its old cluster."""
    clusters = counts.shape[1]
    number = min(clusters, distances.shape[1])
    far, index = lax.top_k(distances, number)
    rows, owners = inputs[index], jnp.take_along_axis(labels, index, axis=1)
    if axis_name is not None:
        # psum of disjoint slots: an all_gather whose result is known to be the same everywhere.
        def gather(values: Array) -> Array:
            slots = jnp.zeros((lax.axis_size(axis_name), *values.shape), values.dtype)
            slots = lax.psum(slots.at[lax.axis_index(axis_name)].set(values), axis_name)
            return jnp.moveaxis(slots, 0, 1).reshape(values.shape[0], -1, *values.shape[2:])

        far, rows, owners = gather(far), gather(rows), gather(owners)
        far, place = lax.top_k(far, min(clusters, far.shape[1]))
        rows = jnp.take_along_axis(rows, place[..., None], axis=1)
        owners = jnp.take_along_axis(owners, place, axis=1)
    empty = counts == 0
    rank = jnp.cumsum(empty, axis=1) - 1  # which of the farthest vectors an empty cluster takes
    taken = jnp.arange(far.shape[1])[None] < jnp.sum(empty, axis=1, keepdims=True)
    lost = (jax.nn.one_hot(owners, clusters, axis=1, dtype=bool) & taken[:, None]).astype(sums.dtype)
    sums = sums - jnp.matmul(lost, rows, precision="highest")
    counts = counts - jnp.sum(lost, axis=2)
    gained = jnp.take_along_axis(rows, jnp.clip(rank, 0, rows.shape[1] - 1)[..., None], axis=1)
    return jnp.where(empty[..., None], gained, sums), jnp.where(empty, 1, counts)


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

    centroids = sums / jnp.maximum(counts, 1)[..., None]
    centroids, counts = lax.fori_loop(0, clusters, body, (centroids, counts))
    # Fractional sizes below one would be lost on `maximum(counts, 1)`; sizes are at least one.
    counts = jnp.maximum(counts, 1)
    return centroids * counts[..., None], counts
