"""K-Subspaces by minibatch power iteration (Luther & Seung 2022, eq. 1 and algorithm 1).

K-Subspaces explains every vector by one of k linear subspaces of rank r:

    min over V, q of  Σₙ ‖xₙ − V_qₙᵀ V_qₙ xₙ‖²,      V_k V_kᵀ = I.

A step assigns each vector to the subspace with the smallest residual, then turns each subspace by
one orthogonal power iteration with the vectors that it won.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from sul_jax import k_means
from sul_jax._check import check_choice, check_finite, check_integer, check_number, check_vectors
from sul_jax._linalg import at_least_float32, each, fix_signs, root
from sul_jax.learning_rule import LearningRule

# Scale of the identity added to a subspace's second moment, relative to its size: directions without
# data keep their old basis instead of taking rounding noise. C + δI has C's eigenvectors, so that a step
# still does not raise the energy.
_SHIFT = 1e-4
# Rows (num_subspaces · rank) from which it pays to gather each subspace's own vectors before the
# second product, instead of multiplying all vectors with masked responses.
_GATHER_FROM_ROWS = 128
_GATHER_BLOCK = 64
_CACHED_BYTES = 2**20
# First steps of `fit` that assign by one direction of each subspace, as the paper's training does.
_WARMUP_STEPS = 10


class KSubspacesState(NamedTuple):
    """Learned subspaces.

    Attributes:
      bases: `[num_subspaces, rank, features]`; the rows of each subspace are orthonormal.
    """

    bases: Array


class KSubspacesInfo(NamedTuple):
    """What a step saw, before it changed the bases.

    Attributes:
      energy: mean squared residual, eq. 1 divided by the number of vectors. It is a difference of squared
        norms, in float32 right to a millionth of their mean: a small energy has few digits.
      counts: `[num_subspaces]`, vectors won by each subspace. A zero vector lies in every subspace
        and is counted for none.
    """

    energy: Array
    counts: Array


class Statistics(NamedTuple):
    """Sums over vectors that a step needs; those of two sets add up to those of their union.

    Attributes:
      scatter: `[num_subspaces, rank, features]`, V_k X_kᵀ X_k.
      residual: summed squared residual.
      counts: `[num_subspaces]`, non-zero vectors assigned.
      total: number of vectors.
    """

    scatter: Array
    residual: Array
    counts: Array
    total: Array


class _Start(NamedTuple):
    state: KSubspacesState
    energy: Array  # of the state before
    steps: Array
    rests: Array


class KSubspacesResult(NamedTuple):
    """The best of all starts of `fit`.

    Attributes:
      bases: `[num_subspaces, rank, features]`.
      labels: int32 `[batch]`, the nearest subspace of each vector.
      energy: mean squared distance to it.
      num_iterations: steps until this start converged.
    """

    bases: Array
    labels: Array
    energy: Array
    num_iterations: Array


def init(key: Array, inputs: Array, *, num_subspaces: int, rank: int) -> KSubspacesState:
    """Subspaces around randomly chosen vectors.

    The first direction of each subspace is a random vector of `inputs` (blank ones only when there
    are too few others), the rest is small Gaussian noise (σ = 0.01), orthonormalised.

    Args:
      key: `jax.random.key`.
      inputs: `[batch, features]`.
      num_subspaces: k, the number of subspaces.
      rank: r, at most `features`.

    Returns:
      A `KSubspacesState`.

    Raises:
      ValueError: fewer vectors than subspaces, or `rank` above `features`.

    Example:
      >>> import jax
      >>> from sul_jax import k_subspaces
      >>> inputs = jax.random.normal(jax.random.key(0), (50, 6))
      >>> k_subspaces.init(jax.random.key(1), inputs, num_subspaces=3, rank=2).bases.shape
      (3, 2, 6)
    """
    inputs = check_vectors("inputs", inputs)
    inputs = at_least_float32(inputs)
    batch, features = inputs.shape
    check_integer("num_subspaces", num_subspaces, low=1, high=batch, why=f": inputs holds {batch} vectors")
    check_integer("rank", rank, low=1, high=features, why=f": inputs has {features} features")
    check_finite("inputs", inputs)
    choice_key, noise_key = jax.random.split(key)
    size = jnp.linalg.norm(inputs, axis=1)
    order = jnp.where(size > 0, jax.random.uniform(choice_key, (batch,)), 2.0)
    chosen = jnp.argsort(order)[:num_subspaces]
    return _around(noise_key, inputs[chosen], size[chosen], rank)


def _around(key: Array, vectors: Array, size: Array, rank: int) -> KSubspacesState:
    """A subspace for each vector of some norm, which is its first direction; the others are noise."""
    first = vectors / jnp.where(size > 0, size, 1)[:, None]
    rest = 0.01 * jax.random.normal(key, (len(vectors), rank - 1, vectors.shape[1]), vectors.dtype)
    rows = jnp.concatenate([first[:, None], rest], axis=1)
    basis = each(lambda columns: jnp.linalg.qr(columns)[0], rows.mT)
    # QR leaves signs open; keep the first direction the vector itself.
    sign = jnp.where(jnp.sum(basis[..., 0] * first, axis=1) < 0, -1.0, 1.0).astype(vectors.dtype)
    return KSubspacesState(basis.mT * sign[:, None, None])


def update(
    state: KSubspacesState,
    inputs: Array,
    *,
    warmup: bool | Array = False,
    axis_name: str | None = None,
) -> tuple[KSubspacesState, KSubspacesInfo]:
    """One step of algorithm 1: assign, then one orthogonal power iteration a subspace.

    Args:
      state: the subspaces.
      inputs: `[batch, features]`.
      warmup: assign by the first direction of each subspace alone, as the paper does in its first
        ten steps (the power iteration has full rank all the same); may be traced.
      axis_name: mapped axis over which the batch is split; the step is that of the whole batch.

    Returns:
      The new state and the `KSubspacesInfo` of the old one. On the same batch, after warmup, the energy of
      the subspaces does not rise from step to step; as given it may, by its rounding.

    Raises:
      ValueError: `inputs` does not have the state's number of features.

    Example:
      >>> import jax
      >>> from sul_jax import k_subspaces
      >>> inputs = jax.random.normal(jax.random.key(0), (50, 6))
      >>> state = k_subspaces.init(jax.random.key(1), inputs, num_subspaces=3, rank=2)
      >>> state, before = k_subspaces.update(state, inputs)
      >>> state, after = k_subspaces.update(state, inputs)
      >>> bool(after.energy <= before.energy)
      True
    """
    return apply(state, statistics(state, inputs, warmup=warmup), axis_name=axis_name)


def assign(state: KSubspacesState, inputs: Array, *, warmup: bool | Array = False) -> Array:
    """The subspace with the smallest residual for each vector, the lowest index on ties.

    Args:
      state: the subspaces.
      inputs: `[batch, features]`.
      warmup: compare first directions only.

    Returns:
      int32 `[batch]`.

    Example:
      >>> import jax.numpy as jnp
      >>> from sul_jax import k_subspaces
      >>> state = k_subspaces.KSubspacesState(jnp.eye(2)[:, None])  # the two axes of the plane
      >>> k_subspaces.assign(state, jnp.array([[3.0, 1.0], [0.0, -2.0]])).tolist()
      [0, 1]
    """
    inputs = _check_inputs(state, inputs)
    return winners(_responses(state.bases, inputs), warmup)


def encode(state: KSubspacesState, inputs: Array) -> Array:
    """Norm of each vector's projection onto each subspace, ‖V_k x‖.

    Args:
      state: the subspaces.
      inputs: `[batch, features]`.

    Returns:
      `[batch, num_subspaces]`.

    Example:
      >>> import jax.numpy as jnp
      >>> from sul_jax import k_subspaces
      >>> state = k_subspaces.KSubspacesState(jnp.eye(3)[None, :2])  # the x-y plane
      >>> k_subspaces.encode(state, jnp.array([[3.0, 4.0, 9.0]])).tolist()
      [[5.0]]
    """
    inputs = _check_inputs(state, inputs)
    return norms(_responses(state.bases, inputs)).T


def fit(
    key: Array,
    inputs: Array,
    *,
    num_subspaces: int,
    rank: int,
    num_init: int = 10,
    max_iterations: int = 300,
    tolerance: float | Array = 1e-5,
    init: Literal["k-means", "random"] = "k-means",
    axis_name: str | None = None,
) -> KSubspacesResult:
    """Clusters vectors by the subspaces that explain them best: `update` on all of them until it rests.

    As in the paper, the first ten steps assign by the first direction of each subspace alone.

    Args:
      key: `jax.random.key`.
      inputs: `[batch, features]`.
      num_subspaces: k, the number of subspaces.
      rank: r, at most `features`.
      num_init: starts, of which the one with the least energy is returned.
      max_iterations: bound on the steps of a start.
      tolerance: a start has converged when a step lowers its energy by less than this share of it.
      init: first directions: `"k-means"`, the centroids of a k-means of one start each; or `"random"`,
        vectors drawn from the inputs, which suits subspaces whose vectors lie all around the origin.
      axis_name: mapped axis over which the batch is split; `labels` are then the shard's own and everything
        else is that of the whole batch. With `"k-means"` only.

    Returns:
      A `KSubspacesResult`.

    Raises:
      ValueError: more subspaces than vectors, an argument out of range, or (outside jit) values that are
        not finite.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from sul_jax import k_subspaces
      >>> lines = jnp.array([[1.0, 0.1], [-2.0, 0.0], [0.1, 3.0], [0.0, -1.0]])  # near the two axes
      >>> result = k_subspaces.fit(jax.random.key(0), lines, num_subspaces=2, rank=1, init="random")
      >>> bool(result.labels[0] == result.labels[1] != result.labels[2] == result.labels[3])
      True
    """
    inputs = check_vectors("inputs", inputs)
    check_integer("rank", rank, low=1, high=inputs.shape[1], why=f": inputs has {inputs.shape[1]} features")
    check_integer("num_init", num_init, low=1)
    check_integer("max_iterations", max_iterations, low=1)
    check_number("tolerance", tolerance, low=0)
    check_choice("init", init, ("k-means", "random"))
    if init == "random" and axis_name is not None:
        raise ValueError(
            "init='random' is not accepted with axis_name: each device would draw its own vectors"
        )
    inputs = at_least_float32(inputs)

    def begin(key: Array) -> KSubspacesState:
        if init == "random":
            return rule(num_subspaces=num_subspaces, rank=rank).init(key, inputs)
        centroids = k_means.fit(
            key, inputs, num_clusters=num_subspaces, num_init=1, axis_name=axis_name
        ).centroids
        return _around(jax.random.fold_in(key, 1), centroids, jnp.linalg.norm(centroids, axis=1), rank)

    def step(start: _Start) -> _Start:
        state, info = update(start.state, inputs, warmup=start.steps < _WARMUP_STEPS, axis_name=axis_name)
        gain = start.energy - info.energy
        rests = (start.steps > _WARMUP_STEPS) & (gain <= tolerance * info.energy)
        return _Start(state, info.energy, start.steps + 1, rests)

    def run(key: Array) -> tuple[KSubspacesState, Array, Array]:
        first = _Start(begin(key), jnp.asarray(jnp.inf, inputs.dtype), jnp.asarray(0), jnp.asarray(False))
        last = lax.while_loop(lambda s: ~s.rests & (s.steps < max_iterations), step, first)
        # `update` tells of the state before it.
        _, info = update(last.state, inputs, axis_name=axis_name)
        return last.state, info.energy, last.steps

    states, energies, steps = each(run, jax.random.split(key, num_init))
    best = jnp.argmin(energies)
    state, energy, steps = jax.tree.map(lambda leaf: leaf[best], (states, energies, steps))
    return KSubspacesResult(state.bases, assign(state, inputs), energy, steps)


def rule(*, num_subspaces: int, rank: int) -> LearningRule:
    """K-Subspaces as a `LearningRule`.

    Args:
      num_subspaces: k, the number of subspaces.
      rank: r, the dimensions of each subspace.

    Returns:
      A `LearningRule` of `init`, `update` and `encode`.

    Example:
      >>> import jax
      >>> from sul_jax import k_subspaces
      >>> inputs = jax.random.normal(jax.random.key(0), (50, 6))
      >>> rule = k_subspaces.rule(num_subspaces=3, rank=2)
      >>> state, info = rule.update(rule.init(jax.random.key(1), inputs), inputs)
      >>> rule.encode(state, inputs).shape
      (50, 3)
    """
    return LearningRule(partial(init, num_subspaces=num_subspaces, rank=rank), update, encode)


def winners(responses: Array, warmup: bool | Array = False) -> Array:
    """`assign` from responses `[num_subspaces, rank, batch]`."""
    # Rows are orthonormal: the smallest residual is the largest projection.
    squares = jnp.square(responses)
    captured = jnp.where(jnp.asarray(warmup), squares[:, 0], jnp.sum(squares, axis=1))
    return jnp.argmax(captured, axis=0).astype(jnp.int32)


def norms(responses: Array) -> Array:
    """‖V_k x‖ from responses `[num_subspaces, rank, batch]`: `[num_subspaces, batch]`.

    Subspaces come first, here and within a step: reductions over few subspaces vectorise only when
    the long batch axis is the minor one.
    """
    return root(jnp.sum(jnp.square(responses), axis=1))


def statistics(state: KSubspacesState, inputs: Array, *, warmup: bool | Array = False) -> Statistics:
    """Assigns vectors and sums what `apply` needs; add up the results of chunks of a batch.

    Args:
      state: the subspaces.
      inputs: `[batch, features]`.
      warmup: as in `update`.

    Returns:
      A `Statistics`.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from sul_jax import k_subspaces
      >>> inputs = jax.random.normal(jax.random.key(0), (50, 6))
      >>> state = k_subspaces.init(jax.random.key(1), inputs, num_subspaces=3, rank=2)
      >>> parts = [k_subspaces.statistics(state, part) for part in (inputs[:20], inputs[20:])]
      >>> state, info = k_subspaces.apply(state, jax.tree.map(jnp.add, *parts))
    """
    inputs = _check_inputs(state, inputs)
    inputs = at_least_float32(inputs)
    responses = _responses(state.bases, inputs)
    assignment = winners(responses, warmup)
    if gathers(state.bases):
        own = own_responses(responses, assignment)
        scatter = gathered_scatter(own, assignment, inputs.__getitem__, num_subspaces=state.bases.shape[0])
    else:
        own = masked_responses(responses, assignment)
        scatter = jnp.matmul(own, inputs, precision="highest").reshape(state.bases.shape)
    return collect(jnp.sum(jnp.square(own)), assignment, jnp.sum(jnp.square(inputs), axis=1), scatter)


def gathers(bases: Array) -> bool:
    """Whether the scatter is better summed over each subspace's own vectors (see `statistics`)."""
    return bases.shape[0] * bases.shape[1] >= _GATHER_FROM_ROWS


def own_responses(responses: Array, assignment: Array) -> Array:
    """S-cells of the winning subspace.

    Args:
      responses: `[num_subspaces, rank, batch]`.
      assignment: `[batch]`.

    Returns:
      `[batch, rank]`.
    """
    return jnp.take_along_axis(responses, assignment[None, None], axis=0)[0].T


def masked_responses(responses: Array, assignment: Array) -> Array:
    """S-cells of the winning subspace, zero elsewhere.

    Args:
      responses: `[num_subspaces, rank, batch]`.
      assignment: `[batch]`.

    Returns:
      `[num_subspaces * rank, batch]`.
    """
    num_subspaces, rank, batch = responses.shape
    won = jax.nn.one_hot(assignment, num_subspaces, axis=0, dtype=bool)
    return jnp.where(won[:, None], responses, 0).reshape(num_subspaces * rank, batch)


def collect(captured: Array, assignment: Array, squares: Array, scatter: Array) -> Statistics:
    """`Statistics` from what `statistics` computes of the vectors.

    Args:
      captured: summed squares of `own_responses`, which are those of `masked_responses` too.
      assignment: `[batch]`.
      squares: `[batch]`, squared norms of the vectors.
      scatter: `[num_subspaces, rank, features]`.
    """
    won = jax.nn.one_hot(assignment, scatter.shape[0], axis=0, dtype=bool)
    return Statistics(
        scatter=scatter,
        residual=jnp.sum(squares) - captured,
        counts=jnp.sum(won & (squares > 0)[None], axis=1, dtype=jnp.int32),
        total=jnp.asarray(len(assignment), jnp.int32),
    )


def apply(
    state: KSubspacesState, statistics: Statistics, *, axis_name: str | None = None
) -> tuple[KSubspacesState, KSubspacesInfo]:
    """Second half of `update`: the power iteration V_k ← Uᵀ of U S Wᵀ = svd(X_kᵀ X_k V_kᵀ).

    Args:
      state: the subspaces.
      statistics: from `statistics`, summed over the chunks of a batch.
      axis_name: mapped axis over which they are summed as well.

    Returns:
      The new state and the `KSubspacesInfo` of the old one.
    """
    if axis_name is not None:
        statistics = lax.psum(statistics, axis_name)
    info = KSubspacesInfo(
        energy=jnp.maximum(statistics.residual, 0) / statistics.total.astype(statistics.residual.dtype),
        counts=statistics.counts,
    )
    size = jnp.linalg.norm(statistics.scatter, axis=(1, 2), keepdims=True)
    moved = statistics.scatter / jnp.where(size > 0, size, 1) + _SHIFT * state.bases
    bases = each(_left_singular, moved)
    return KSubspacesState(fix_signs(bases)), info


def gathered_scatter(
    own: Array,
    assignment: Array,
    take: Callable[[Array], Array],
    *,
    num_subspaces: int,
    max_vectors: int | None = None,
) -> Array:
    """V_k X_kᵀ X_k from each subspace's own vectors only.

    Vectors are ordered by subspace and cut into blocks of equal length, each filled up with zeros
    so that it belongs to one subspace: static shapes, and 1/num_subspaces of the dense product.

    Args:
      own: `[batch, rank]`, from `own_responses`.
      assignment: `[batch]`.
      take: from indices `[num]` to the vectors `[num, features]`.
      num_subspaces: k, the number of subspaces.
      max_vectors: bound on the vectors taken at a time by an accelerator.

    Returns:
      `[num_subspaces, rank, features]`.
    """
    batch, rank = own.shape
    order = jnp.argsort(assignment)
    counts = jnp.sum(jax.nn.one_hot(assignment, num_subspaces, axis=0, dtype=bool), axis=1, dtype=jnp.int32)
    blocks = -(-counts // _GATHER_BLOCK)
    last_block = jnp.cumsum(blocks)
    num_blocks = batch // _GATHER_BLOCK + num_subspaces  # the most that any assignment needs
    features = jax.eval_shape(take, order[:1]).shape[-1]
    if jax.default_backend() == "cpu":
        # Vectors that stay in the cache together with their products: 3× as fast.
        max_vectors = _CACHED_BYTES // (features * own.dtype.itemsize)
    group = num_blocks if max_vectors is None else min(num_blocks, max(1, max_vectors // _GATHER_BLOCK))
    num_groups = -(-num_blocks // group)
    block = jnp.arange(num_groups * group)
    owner = jnp.minimum(jnp.sum(block[:, None] >= last_block[None], axis=1), num_subspaces - 1)
    start = (block - (last_block - blocks)[owner]) * _GATHER_BLOCK
    place = start[:, None] + jnp.arange(_GATHER_BLOCK)[None]
    valid = (place < counts[owner][:, None]) & (block < last_block[-1])[:, None]
    first = (jnp.cumsum(counts) - counts)[owner][:, None]
    members = order[jnp.where(valid, first + place, 0)]

    def add(total: Array, one: tuple[Array, ...]) -> tuple[Array, None]:
        owner, members, valid = one
        weights = jnp.where(valid[..., None], own[members], 0)
        vectors = take(members.ravel()).reshape(group, _GATHER_BLOCK, -1)
        blockwise = jnp.einsum("nbr,nbd->nrd", weights, vectors, precision="highest")
        if group == 1:
            mine = lax.dynamic_index_in_dim(total, owner[0], keepdims=False) + blockwise[0]
            return lax.dynamic_update_index_in_dim(total, mine, owner[0], 0), None
        owned = jax.nn.one_hot(owner, num_subspaces, axis=0, dtype=own.dtype)
        return total + jnp.tensordot(owned, blockwise, 1, precision="highest"), None

    parts = [part.reshape(num_groups, group, *part.shape[1:]) for part in (owner, members, valid)]
    # Added to the first sum rather than to new zeros alone, the carry has its type under `shard_map` too.
    total, _ = add(jnp.zeros((num_subspaces, rank, features), own.dtype), tuple(part[0] for part in parts))
    if num_groups > 1:
        total, _ = lax.scan(add, total, tuple(part[1:] for part in parts))
    return total


def _check_inputs(state: KSubspacesState, inputs: Any) -> Array:
    return check_vectors("inputs", inputs, features=state.bases.shape[-1])


def _left_singular(rows: Array) -> Array:
    """Left singular vectors of `rows.mT`, as rows: many features and a small rank, so QR comes first."""
    tall, _ = jnp.linalg.qr(rows.mT)
    # Not the R of `qr`: the SVD would then run beside the computation of Q (see `each`).
    rotation, _, _ = jnp.linalg.svd(jnp.matmul(tall.mT, rows.mT, precision="highest"))
    return jnp.matmul(tall, rotation, precision="highest").mT


def _responses(bases: Array, inputs: Array) -> Array:
    """S-cells V_k x, `[num_subspaces, rank, batch]`."""
    num_subspaces, rank, features = bases.shape
    rows = bases.reshape(num_subspaces * rank, features)
    product = jnp.matmul(rows, inputs.T, precision="highest")
    return product.reshape(num_subspaces, rank, inputs.shape[0])
