"""Ranked Hebbian learning and normalised non-linear responses (Grinberg, Hopfield & Krotov 2019).

Units compete for each input. The unit that answers most strongly learns towards it, the unit of rank m away
from it, and a decay keeps the weights of learning units at unit norm. No gradient is propagated, and no label
is used. In inference the cosine of input and weights is raised to a steep power, so that few units answer.
"""

from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax import Array, lax

from sul_jax import k_means, patches
from sul_jax._check import (
    as_array,
    check_choice,
    check_finite,
    check_floating,
    check_integer,
    check_number,
    check_vectors,
)
from sul_jax._linalg import at_least_float32, directions, inverse_norm
from sul_jax._parallel import sum_over
from sul_jax.learning_rule import LearningRule
from sul_jax.whitening import normalize

Spread = Literal["far", "even", "k_means"]
# Least divisor of an update, as in the authors' code.
_PRECISION = 1e-30


class HebbianState(NamedTuple):
    """State of the rule.

    Attributes:
      weights: `[num_units, features]`.
    """

    weights: Array


class HebbianInfo(NamedTuple):
    """What one step did, over the whole batch.

    Attributes:
      largest_update: max `|ΔW|` before normalisation, a scalar.
      wins: int32 `[num_units]`, inputs, zeros apart, for which each unit was driven most.
      norms: `[num_units]`, of the weights before the step; 1 for a unit that has converged.
    """

    largest_update: Array
    wins: Array
    norms: Array


def init(key: Array, inputs: Array, *, num_units: int) -> HebbianState:
    """Weights from a standard normal distribution, as in the authors' code.

    Args:
      key: `jax.random.key`.
      inputs: an example batch `[batch, features]`.
      num_units: number of units, at least 2.

    Raises:
      ValueError: wrong rank of `inputs`, or fewer than 2 units.

    Example:
      >>> import jax
      >>> from sul_jax import hebbian
      >>> inputs = jax.random.uniform(jax.random.key(0), (10, 6))
      >>> hebbian.init(jax.random.key(1), inputs, num_units=4).weights.shape
      (4, 6)
    """
    inputs = check_vectors("inputs", inputs)
    check_integer("num_units", num_units, low=2, why=": units compete")
    return HebbianState(jax.random.normal(key, (num_units, inputs.shape[1]), at_least_float32(inputs).dtype))


def init_from_inputs(key: Array, inputs: Array, *, num_units: int, spread: Spread = "far") -> HebbianState:
    """Weights of unit norm made from inputs: by default inputs that lie rather far from each other.

    Patches of images drawn evenly are nearly all smooth and gray. Those far from each other are drawn one
    after the other with probability ∝ d⁴, d the distance on the sphere from those drawn before: as in
    k-means++, but with rarer directions drawn more often. Every unit then has something to learn from the
    first step on.

    Args:
      key: `jax.random.key`.
      inputs: floating `[num_inputs, features]`, many more than units and none of them zeros.
      num_units: number of units, at least 2.
      spread: `"far"`; `"even"` draws evenly, without repetition; `"k_means"` takes the centroids of spherical
        k-means in place of inputs.

    Raises:
      ValueError: wrong rank of `inputs`; (outside jit) inputs that are zeros or not finite; fewer than 2
        units, or more than inputs; an unknown `spread`.
      TypeError: integers.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from sul_jax import hebbian
      >>> inputs = jnp.array([[2.0, 0.0]] * 50 + [[0.0, 3.0]])
      >>> sorted(hebbian.init_from_inputs(jax.random.key(0), inputs, num_units=2).weights.tolist())
      [[0.0, 1.0], [1.0, 0.0]]
    """
    inputs = check_vectors("inputs", inputs)
    check_integer("num_units", num_units, low=2, high=len(inputs), why=", the number of inputs")
    check_choice("spread", spread, get_args(Spread))
    check_finite("inputs", inputs)
    unit = directions("inputs", at_least_float32(inputs), why="weights of unit norm need")
    if spread == "k_means":
        found = k_means.fit(key, unit, num_clusters=num_units, num_init=1, metric="cosine")
        return HebbianState(found.centroids)
    if spread == "even":
        return HebbianState(jax.random.choice(key, unit, (num_units,), replace=False))

    def draw(index: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        weights, squares = carry
        chosen = unit[jax.random.categorical(jax.random.fold_in(key, index), 2 * jnp.log(squares))]
        squares = jnp.minimum(squares, jnp.maximum(2 - 2 * jnp.matmul(unit, chosen), 0))
        return weights.at[index].set(chosen), squares

    empty = jnp.zeros((num_units, unit.shape[1]), unit.dtype)
    return HebbianState(lax.fori_loop(0, num_units, draw, (empty, jnp.ones(len(unit))))[0])


def update(
    state: HebbianState,
    inputs: Array,
    *,
    learning_rate: float | Array,
    anti_hebbian: float | Array = 0.2,
    rank: int = 2,
    normalize_update: bool = True,
    axis_name: str | None = None,
) -> tuple[HebbianState, HebbianInfo]:
    """One step: ΔW_i = Σ_x g_i(x) (x − ⟨W_i, x⟩ W_i) (eq. 1 and 2).

    g is 1 for the unit driven most by an input, −Δ for the one of rank m, and 0 for the others; of equal
    drives the unit of lowest index counts as stronger.

    Where most inputs point in nearly one direction, as raw patches of images do, a unit may lose more as the
    second one than it gains as the first. In the end it is driven off all inputs, and then the next unit is:
    few units win, the others point away (`info.wins` tells). More units, a smaller Δ or a smaller sum of
    learning rates prevent it.

    Args:
      state: the weights.
      inputs: `[batch, features]`, usually raw pixels in [0, 1].
      learning_rate: ε, the largest change of a weight in this step where the update is normalised.
      anti_hebbian: Δ, how much the unit of rank m learns away.
      rank: m, from 2 to the number of units.
      normalize_update: divide by max `|ΔW|` over all weights, as the authors' code does; eq. 1 has no such
        factor.
      axis_name: mapped axis over which the batch is split; the step is that of the whole batch.

    Returns:
      The new state and a `HebbianInfo`.

    Raises:
      ValueError: `rank` or `learning_rate` out of range, or inputs of another number of features.

    Example:
      >>> import jax
      >>> from sul_jax import hebbian
      >>> inputs = jax.random.uniform(jax.random.key(0), (100, 6))
      >>> state = hebbian.init(jax.random.key(1), inputs, num_units=4)
      >>> for _ in range(300):
      ...     state, info = hebbian.update(state, inputs, learning_rate=0.02)
      >>> bool((abs(info.norms - 1) < 0.1).any())
      True
    """
    weights = state.weights
    num_units = weights.shape[0]
    inputs = check_vectors("inputs", inputs, features=weights.shape[1])
    check_integer("rank", rank, low=2, high=num_units, why=f": there are {num_units} units")
    check_number("learning_rate", learning_rate, low=0)
    inputs = at_least_float32(inputs)
    # Units on the major axis: reductions over them then vectorise over the batch.
    drives = jnp.matmul(weights, inputs.T, precision="highest")
    unit = jnp.arange(num_units)[:, None]
    rest, winner = drives, jnp.zeros((1, 1), jnp.int32)
    for place in range(rank):
        # An argmax as two plain reductions, several times as fast on a CPU.
        top = rest == jnp.max(rest, axis=0, keepdims=True)
        strongest = jnp.min(jnp.where(top, unit, num_units - 1), axis=0, keepdims=True)
        winner = strongest if place == 0 else winner
        if place < rank - 1:
            rest = jnp.where(unit == strongest, -jnp.inf, rest)
    won = unit == winner
    activity = won.astype(drives.dtype) - anti_hebbian * (unit == strongest).astype(drives.dtype)
    towards = jnp.matmul(activity, inputs, precision="highest")
    seen = jnp.any(inputs != 0, axis=1)
    decay = jnp.sum(activity * drives, axis=1)
    wins = jnp.sum(won & seen[None], axis=1, dtype=jnp.int32)
    towards, decay, wins = sum_over((towards, decay, wins), axis_name)
    change = towards - decay[:, None] * weights
    largest = jnp.max(jnp.abs(change))
    scale = learning_rate / jnp.maximum(largest, _PRECISION) if normalize_update else learning_rate
    info = HebbianInfo(largest, wins, jnp.linalg.norm(weights, axis=1))
    return HebbianState(weights + (scale * change).astype(weights.dtype)), info


def encode(state: HebbianState, inputs: Array, *, power: float | Array) -> Array:
    """ReLU(cos(x, W_i))^n, the normalised non-linear response (eq. 3).

    Args:
      state: the weights.
      inputs: `[batch, features]`.
      power: n, positive; steep ones such as 40 are stable in float32.

    Returns:
      `[batch, num_units]` in [0, 1]; 0 for an input of zeros.

    Raises:
      ValueError: inputs of another number of features, or `power` not positive.

    Example:
      >>> import jax.numpy as jnp
      >>> from sul_jax import hebbian
      >>> state = hebbian.HebbianState(jnp.eye(2))
      >>> [round(v, 2) for v in hebbian.encode(state, jnp.array([[3.0, 4.0]]), power=2)[0].tolist()]
      [0.36, 0.64]
    """
    inputs = check_vectors("inputs", inputs, features=state.weights.shape[1])
    cosines = jnp.matmul(normalize(inputs), normalize(state.weights).T, precision="highest")
    return steepen(cosines, power=power)


def rule(
    *,
    num_units: int,
    learning_rate: float | Array = 0.02,
    anti_hebbian: float | Array = 0.2,
    rank: int = 2,
    normalize_update: bool = True,
    power: float | Array = 4.5,
) -> LearningRule:
    """The ranked Hebbian rule as a `LearningRule` over vectors.

    Args:
      num_units: number of units, at least 2.
      learning_rate: ε; `update` takes another one as a keyword, which may be traced.
      anti_hebbian: Δ, how much the unit of rank m learns away.
      rank: m, the rank of the unit that learns away.
      normalize_update: as in `update`.
      power: n of `encode`.

    Returns:
      A `LearningRule`; its `update` takes the hyperparameters of this module's `update`.

    Example:
      >>> import jax
      >>> from sul_jax import hebbian
      >>> inputs = jax.random.uniform(jax.random.key(0), (100, 6))
      >>> rule = hebbian.rule(num_units=4)
      >>> state, info = rule.update(rule.init(jax.random.key(1), inputs), inputs, learning_rate=0.01)
      >>> rule.encode(state, inputs).shape
      (100, 4)
    """
    step = partial(
        update,
        learning_rate=learning_rate,
        anti_hebbian=anti_hebbian,
        rank=rank,
        normalize_update=normalize_update,
    )
    return LearningRule(partial(init, num_units=num_units), step, partial(encode, power=power))


def layer_rule(
    *,
    kernel_size: int,
    num_units: int,
    num_patches: int = 1000,
    learning_rate: float | Array = 4e-3,
    anti_hebbian: float | Array = 0.2,
    rank: int = 2,
    normalize_update: bool = True,
    power: float | Array = 40.0,
) -> LearningRule:
    """A layer of Hebbian filters over images, so that several can be put into a `stack`.

    A step learns from patches at random places; `encode` is `convolve`.

    Args:
      kernel_size: side of the patches.
      num_units: filters, at least 2.
      num_patches: patches of a step and of `init`.
      learning_rate: ε; `update` takes another one as a keyword, which may be traced.
      anti_hebbian: Δ, how much the unit of rank m learns away.
      rank: m, the rank of the unit that learns away.
      normalize_update: as in `update`.
      power: n of `encode`.

    Returns:
      A `LearningRule` over `[batch, height, width, channels]`. Its `update` needs a `key`; under `axis_name`
      the patches are those that the whole batch would give.

    Example:
      >>> import jax
      >>> from sul_jax import hebbian
      >>> images = jax.random.uniform(jax.random.key(0), (10, 12, 12, 3))
      >>> rule = hebbian.layer_rule(kernel_size=4, num_units=8, num_patches=50)
      >>> state = jax.jit(rule.init)(jax.random.key(1), images)
      >>> state, info = jax.jit(rule.update)(state, images, key=jax.random.key(2))
      >>> jax.jit(rule.encode)(state, images).shape
      (10, 9, 9, 8)
    """
    draw = partial(random_patches, num_patches=num_patches, kernel_size=kernel_size)
    options = {
        "learning_rate": learning_rate,
        "anti_hebbian": anti_hebbian,
        "rank": rank,
        "normalize_update": normalize_update,
    }

    def begin(key: Array, images: Array) -> HebbianState:
        return init(key, draw(key, images), num_units=num_units)

    def step(
        state: HebbianState, images: Array, *, key: Array, axis_name: str | None = None, **others: Any
    ) -> tuple[HebbianState, HebbianInfo]:
        vectors = draw(key, images, axis_name=axis_name)
        return update(state, vectors, axis_name=axis_name, **(options | others))

    def respond(state: HebbianState, images: Array) -> Array:
        return convolve(images, state.weights, kernel_size=kernel_size, power=power)

    return LearningRule(begin, step, respond)


def random_patches(
    key: Array, images: Array, *, num_patches: int, kernel_size: int, axis_name: str | None = None
) -> Array:
    """Patches at random places of random images.

    Args:
      key: `jax.random.key`.
      images: `[batch, height, width, channels]`, of any type.
      num_patches: how many, of the whole batch.
      kernel_size: side of the patches.
      axis_name: mapped axis over which the batch is split; each shard then has the patches whose places the
        whole batch would draw in its stead, and zeros for those of other shards' images.

    Returns:
      `[num_patches, kernel_size² · channels]`.

    Raises:
      ValueError: a kernel larger than the images.

    Example:
      >>> import jax
      >>> from sul_jax import hebbian
      >>> images = jax.random.uniform(jax.random.key(0), (10, 12, 12, 3))
      >>> hebbian.random_patches(jax.random.key(1), images, num_patches=5, kernel_size=4).shape
      (5, 48)
    """
    images = as_array("images", images)  # of any type
    check_integer("num_patches", num_patches, low=1)
    check_integer("kernel_size", kernel_size, low=1, high=min(images.shape[1:3]), why=", the images' side")
    height, width = (patches.output_size(n, kernel_size=kernel_size, padding=0) for n in images.shape[1:3])
    shards = 1 if axis_name is None else lax.axis_size(axis_name)
    bounds = (shards * len(images), height, width)
    image, row, column = (
        jax.random.randint(own, (num_patches,), 0, bound)
        for own, bound in zip(jax.random.split(key, 3), bounds, strict=True)
    )
    if axis_name is None:
        return patches.cut(images, image, row, column, kernel_size=kernel_size)
    # Zeros teach nothing: a shard learns from the patches of its own images alone.
    image = image - lax.axis_index(axis_name) * len(images)
    own = (image >= 0) & (image < len(images))
    cut = patches.cut(images, jnp.where(own, image, 0), row, column, kernel_size=kernel_size)
    return jnp.where(own[:, None], cut, 0)


def convolve(
    images: Array, weights: Array, *, kernel_size: int, power: float | Array, padding: int = 0
) -> Array:
    """`encode` of every patch of images, without extracting the patches (eq. 3).

    Args:
      images: `[batch, height, width, channels]`.
      weights: `[num_units, kernel_size² · channels]`.
      kernel_size: side of the patch.
      power: n, positive.
      padding: zeros around the image.

    Returns:
      `[batch, out_height, out_width, num_units]`; 0 where the patch is blank.

    Raises:
      ValueError: weights of other patches, a kernel larger than the padded image, or `power` not positive.

    Example:
      >>> import jax
      >>> from sul_jax import hebbian
      >>> images = jax.random.uniform(jax.random.key(0), (2, 8, 8, 3))
      >>> weights = jax.random.normal(jax.random.key(1), (5, 48))
      >>> hebbian.convolve(images, weights, kernel_size=4, power=40).shape
      (2, 5, 5, 5)
    """
    window = {"kernel_size": kernel_size, "padding": padding}
    images, height, width = patches.check_window(images, **window)
    axes = "[num_units, features]"
    weights = patches.check_kernels("weights", weights, images, kernel_size=kernel_size, ndim=2, axes=axes)
    num_units, features = weights.shape
    project = patches.projector(images, normalize(weights), **window)

    def of_chunk(chunk: Array) -> Array:
        squares = patches.squared_norms(chunk, **window).ravel()
        # Projections by spectra are rounded relative to the largest pixel: a cosine could exceed 1.
        cosines = jnp.minimum(project(chunk) * inverse_norm(squares)[None], 1)
        return steepen(cosines, power=power).T.reshape(chunk.shape[0], height, width, num_units)

    bytes_per_image = height * width * max(features, 2 * num_units) * images.dtype.itemsize
    codes = patches.map_chunks(of_chunk, images, bytes_per_image=bytes_per_image)
    return codes.reshape(-1, height, width, num_units)[: images.shape[0]]


def unconverged(state: HebbianState, *, tolerance: float | Array = 0.1) -> Array:
    """Units that have not learned: those whose norm is off 1 by more than the tolerance.

    Args:
      state: the weights.
      tolerance: largest deviation of a converged unit.

    Returns:
      bool `[num_units]`.

    Example:
      >>> import jax.numpy as jnp
      >>> from sul_jax import hebbian
      >>> hebbian.unconverged(hebbian.HebbianState(jnp.diag(jnp.array([1.0, 3.0])))).tolist()
      [False, True]
    """
    return ~(jnp.abs(jnp.linalg.norm(state.weights, axis=1) - 1) <= tolerance)  # true for NaN


def steepen(cosines: Array, *, power: float | Array) -> Array:
    """ReLU(c)^n of eq. 3; it and its gradient go to 0 where float32 ends.

    It grows with c, so that pooling the largest cosine first gives the same and raises fewer numbers.

    Args:
      cosines: any shape, at most 1.
      power: n, positive; whole numbers that are not traced take a few products, others logarithms.

    Raises:
      ValueError: `power` is not positive.

    Example:
      >>> import jax.numpy as jnp
      >>> from sul_jax import hebbian
      >>> hebbian.steepen(jnp.array([-0.5, 0.0, 0.5, 1.0]), power=2).tolist()
      [0.0, 0.0, 0.25, 1.0]
    """
    cosines = check_floating("cosines", cosines)
    check_number("power", power, above=0)
    if isinstance(power, int | float) and float(power).is_integer():
        return lax.integer_pow(jnp.maximum(cosines, 0), int(power))
    active = cosines > 0
    return jnp.where(active, jnp.exp(power * jnp.log(jnp.where(active, cosines, 1))), 0)
