"""SoftHebb: Hebbian learning among units that compete softly (Journé, Rodriguez, Guo & Moraitis 2023).

Every unit answers each input with its share of a softmax. The winner learns towards the input, all others
away from it, each in proportion to its answer; a decay pulls weights to unit norm. Layers are convolutions
between batch normalisation and pooling, and learn one on top of the other in a single pass over the images,
without labels, gradients or feedback.
"""

from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from sul_jax import patches
from sul_jax._check import check_choice, check_images, check_integer, check_number, check_vectors
from sul_jax._linalg import at_least_float32
from sul_jax._parallel import sum_over
from sul_jax.hebbian import HebbianInfo, HebbianState
from sul_jax.learning_rule import LearningRule

# As in the authors' code: the least divisor of an update, the least distance of a norm from 1, the norm that
# weights begin with, the share of a batch in the running statistics, what is added to variances.
_PRECISION, _LEAST_DISTANCE = 1e-30, 1e-10
_NORM = 25.0
_MOMENTUM, _EPSILON = 0.1, 1e-5


def init(key: Array, inputs: Array, *, num_units: int, norm: float | Array = _NORM) -> HebbianState:
    """Weights from a normal distribution, of a norm far beyond the one that learning draws them to.

    Args:
      key: `jax.random.key`.
      inputs: an example batch `[batch, features]`.
      num_units: number of units, at least 2.
      norm: about which the units' norms lie.

    Raises:
      ValueError: wrong rank of `inputs`, or fewer than 2 units.

    Example:
      >>> import jax
      >>> from sul_jax import soft_hebb
      >>> inputs = jax.random.uniform(jax.random.key(0), (10, 6))
      >>> soft_hebb.init(jax.random.key(1), inputs, num_units=4).weights.shape
      (4, 6)
    """
    inputs = check_vectors("inputs", inputs)
    check_integer("num_units", num_units, low=2, why=": units compete")
    check_number("norm", norm, low=0)
    shape = (num_units, inputs.shape[1])
    dtype = at_least_float32(inputs).dtype
    return HebbianState(norm / jnp.sqrt(shape[1]).astype(dtype) * jax.random.normal(key, shape, dtype))


def update(
    state: HebbianState,
    inputs: Array,
    *,
    learning_rate: float | Array = 0.01,
    inverse_temperature: float | Array = 1.0,
    norm_power: float | Array = 0.5,
    axis_name: str | None = None,
) -> tuple[HebbianState, HebbianInfo]:
    """One step: ΔW_i = Σ_x y_i(x) (x − u_i(x) W_i), u = W x.

    y is the softmax of u over the units, negative but for the unit driven most. ΔW is divided by its largest
    entry and multiplied with a unit's own rate, `η |‖W_i‖ − 1|^p`: units that have converged stay.

    Args:
      state: the weights.
      inputs: `[batch, features]`.
      learning_rate: η, the step size.
      inverse_temperature: of the softmax; a large one lets the winner alone learn.
      norm_power: p, the power of a norm's distance from 1.
      axis_name: mapped axis over which the batch is split; the step is that of the whole batch.

    Returns:
      The new state and a `HebbianInfo`.

    Raises:
      ValueError: inputs of another number of features, or an argument out of range.

    Example:
      >>> import jax
      >>> from sul_jax import soft_hebb
      >>> inputs = jax.random.normal(jax.random.key(0), (100, 6))
      >>> state = soft_hebb.init(jax.random.key(1), inputs, num_units=4, norm=5.0)
      >>> for _ in range(300):
      ...     state, info = soft_hebb.update(state, inputs, learning_rate=0.05)
      >>> bool((abs(info.norms - 1) < 0.1).all())
      True
    """
    weights = state.weights
    inputs = at_least_float32(check_vectors("inputs", inputs, features=weights.shape[1]))
    check_number("learning_rate", learning_rate, low=0)
    check_number("inverse_temperature", inverse_temperature, low=0)
    drives = jnp.matmul(inputs, weights.T, precision="highest")
    winner = jnp.argmax(drives, axis=1)
    won = winner[:, None] == jnp.arange(weights.shape[0])[None]
    soft = jax.nn.softmax(inverse_temperature * drives, axis=1)
    activity = jnp.where(won, soft, -soft)
    towards = jnp.matmul(activity.T, inputs, precision="highest")
    decay = jnp.sum(activity * drives, axis=0)
    wins = jnp.sum(won & jnp.any(inputs != 0, axis=1)[:, None], axis=0, dtype=jnp.int32)
    towards, decay, wins = sum_over((towards, decay, wins), axis_name)
    change = towards - decay[:, None] * weights
    largest = jnp.max(jnp.abs(change))
    norms = jnp.linalg.norm(weights, axis=1)
    rates = learning_rate * (jnp.abs(norms - 1) + _LEAST_DISTANCE) ** norm_power
    scaled = rates[:, None] / jnp.maximum(largest, _PRECISION) * change
    return HebbianState(weights + scaled.astype(weights.dtype)), HebbianInfo(largest, wins, norms)


def encode(state: HebbianState, inputs: Array, *, power: float | Array = 1.0) -> Array:
    """The triangle activation ReLU(u_i − mean_j u_j)^p.

    Args:
      state: the weights.
      inputs: `[batch, features]`.
      power: p, positive.

    Returns:
      `[batch, num_units]`, not negative.

    Raises:
      ValueError: inputs of another number of features, or `power` not positive.

    Example:
      >>> import jax.numpy as jnp
      >>> from sul_jax import hebbian, soft_hebb
      >>> state = hebbian.HebbianState(jnp.eye(2))
      >>> soft_hebb.encode(state, jnp.array([[4.0, 1.0]])).tolist()
      [[1.5, 0.0]]
    """
    inputs = at_least_float32(check_vectors("inputs", inputs, features=state.weights.shape[1]))
    check_number("power", power, above=0)
    drives = jnp.matmul(inputs, state.weights.T, precision="highest")
    return jax.nn.relu(drives - jnp.mean(drives, axis=1, keepdims=True)) ** power


def rule(
    *,
    num_units: int,
    norm: float | Array = _NORM,
    learning_rate: float | Array = 0.01,
    inverse_temperature: float | Array = 1.0,
    norm_power: float | Array = 0.5,
    power: float | Array = 1.0,
) -> LearningRule:
    """SoftHebb as a `LearningRule` over vectors.

    Args:
      num_units: number of units, at least 2.
      norm: of `init`.
      learning_rate: η; `update` takes another one as a keyword, which may be traced.
      inverse_temperature: of `update`.
      norm_power: of `update`.
      power: of `encode`.

    Returns:
      A `LearningRule`; its `update` takes the hyperparameters of this module's `update`.

    Example:
      >>> import jax
      >>> from sul_jax import soft_hebb
      >>> inputs = jax.random.uniform(jax.random.key(0), (100, 6))
      >>> rule = soft_hebb.rule(num_units=4)
      >>> state, info = rule.update(rule.init(jax.random.key(1), inputs), inputs, learning_rate=0.1)
      >>> rule.encode(state, inputs).shape
      (100, 4)
    """
    step = partial(
        update,
        learning_rate=learning_rate,
        inverse_temperature=inverse_temperature,
        norm_power=norm_power,
    )
    return LearningRule(partial(init, num_units=num_units, norm=norm), step, partial(encode, power=power))


class SoftHebbLayer(NamedTuple):
    """A layer of a convolutional network.

    Attributes:
      num_units: filters, at least 2.
      kernel_size: odd side of the filters in pixels; images are mirrored at their edges to keep their size.
      learning_rate: η, the step size.
      inverse_temperature: of the competition.
      power: of the triangle activation.
      pool: how windows of the responses are pooled.
      pool_size: side of these windows in pixels; at the edges they reach beyond by half of their overlap.
      pool_stride: distance of neighbouring windows in pixels.
    """

    num_units: int
    kernel_size: int
    learning_rate: float
    inverse_temperature: float
    power: float
    pool: Literal["max", "average"] = "max"
    pool_size: int = 4
    pool_stride: int = 2


# The network of 80.3 % on CIFAR-10: filters four times as many with each layer, images half as wide.
CIFAR10 = (
    SoftHebbLayer(96, 5, learning_rate=0.08, inverse_temperature=1.0, power=0.7),
    SoftHebbLayer(384, 3, learning_rate=0.005, inverse_temperature=0.65, power=1.4),
    SoftHebbLayer(1536, 3, 0.01, inverse_temperature=0.25, power=1.0, pool="average", pool_size=2),
)


class SoftHebbLayerState(NamedTuple):
    """State of a layer.

    Attributes:
      weights: `[num_units, kernel_size² · channels]`.
      mean: `[channels]`, running mean of the layer's inputs.
      variance: `[channels]`, their running variance.
    """

    weights: Array
    mean: Array
    variance: Array


def layer_rule(layer: SoftHebbLayer) -> LearningRule:
    """A convolutional layer over images, so that several can be put into a `stack`.

    A step normalises each channel by its mean and variance in the batch, learns from all patches, and moves
    the running statistics by a tenth; `encode` normalises by these, convolves and pools.

    Args:
      layer: its sizes and hyperparameters.

    Returns:
      A `LearningRule` over `[batch, height, width, channels]` with a `SoftHebbLayerState`; its `update` takes
      the hyperparameters of this module's `update`.

    Raises:
      ValueError: an even kernel, or windows that leave pixels out.

    Example:
      >>> import jax
      >>> from sul_jax import soft_hebb
      >>> images = jax.random.uniform(jax.random.key(0), (10, 12, 12, 3))
      >>> rule = soft_hebb.layer_rule(soft_hebb.CIFAR10[0]._replace(num_units=8))
      >>> state = jax.jit(rule.init)(jax.random.key(1), images)
      >>> state, info = jax.jit(rule.update)(state, images)
      >>> jax.jit(rule.encode)(state, images).shape
      (10, 6, 6, 8)
    """
    check_integer("kernel_size", layer.kernel_size, low=1)
    if layer.kernel_size % 2 == 0:
        raise ValueError(f"kernel_size={layer.kernel_size} is not accepted: it must be odd")
    check_choice("pool", layer.pool, ("max", "average"))
    check_integer("pool_stride", layer.pool_stride, low=1)
    check_integer("pool_size", layer.pool_size, low=layer.pool_stride, why=": pool_stride")

    def begin(key: Array, images: Array) -> SoftHebbLayerState:
        images = at_least_float32(_checked(images, layer))
        mean, variance = _statistics(images, None)
        state = init(key, _vectors(images[:1], layer), num_units=layer.num_units)
        return SoftHebbLayerState(state.weights, mean, variance)

    def step(
        state: SoftHebbLayerState, images: Array, *, axis_name: str | None = None, **others: Any
    ) -> tuple[SoftHebbLayerState, HebbianInfo]:
        images = at_least_float32(_checked(images, layer))
        mean, variance = _statistics(images, axis_name)
        vectors = _vectors(_normalized(images, mean, variance), layer)
        options = {"learning_rate": layer.learning_rate, "inverse_temperature": layer.inverse_temperature}
        learned, info = update(
            HebbianState(state.weights), vectors, axis_name=axis_name, **(options | others)
        )
        running = (
            old + _MOMENTUM * (new - old) for old, new in ((state.mean, mean), (state.variance, variance))
        )
        return SoftHebbLayerState(learned.weights, *running), info

    def respond(state: SoftHebbLayerState, images: Array) -> Array:
        images = at_least_float32(_checked(images, layer))
        weights = HebbianState(state.weights)

        def of_chunk(chunk: Array) -> Array:
            vectors = _vectors(_normalized(chunk, state.mean, state.variance), layer)
            codes = encode(weights, vectors, power=layer.power)
            return _pooled(codes.reshape(*chunk.shape[:3], layer.num_units), layer)

        number, height, width, _ = images.shape
        values = max(weights.weights.shape[1], 2 * layer.num_units)
        size = height * width * values * images.dtype.itemsize
        pooled = patches.map_chunks(of_chunk, images, bytes_per_image=size)
        return pooled.reshape(-1, *pooled.shape[2:])[:number]

    return LearningRule(begin, step, respond)


def network_rules(layers: tuple[SoftHebbLayer, ...]) -> tuple[LearningRule, ...]:
    """The rules of a network, to be put into a `stack`.

    Args:
      layers: from the images upwards, such as `CIFAR10`.

    Example:
      >>> import jax
      >>> from sul_jax import soft_hebb, stack
      >>> layers = tuple(layer._replace(num_units=8) for layer in soft_hebb.CIFAR10)
      >>> rule = stack(*soft_hebb.network_rules(layers))
      >>> images = jax.random.uniform(jax.random.key(0), (4, 32, 32, 3))
      >>> states = jax.jit(rule.init)(jax.random.key(1), images)
      >>> states, infos = jax.jit(rule.update)(states, images)  # all layers at once
      >>> jax.jit(rule.encode)(states, images).shape
      (4, 4, 4, 8)
    """
    return tuple(map(layer_rule, layers))


def _checked(images: Array, layer: SoftHebbLayer) -> Array:
    images = check_images("images", images)
    if min(images.shape[1:3]) <= layer.kernel_size // 2:
        raise ValueError(
            f"images has shape {images.shape}, too small to be mirrored for kernel_size={layer.kernel_size}"
        )
    return images


def _statistics(images: Array, axis_name: str | None) -> tuple[Array, Array]:
    """Mean and variance of each channel."""
    number = images.size // images.shape[3] * (1 if axis_name is None else lax.axis_size(axis_name))
    mean = sum_over(jnp.sum(images, axis=(0, 1, 2)), axis_name) / number
    variance = sum_over(jnp.sum(jnp.square(images - _of_channels(mean)), axis=(0, 1, 2)), axis_name) / number
    return mean, variance


def _normalized(images: Array, mean: Array, variance: Array) -> Array:
    return (images - _of_channels(mean)) * _of_channels(lax.rsqrt(variance + _EPSILON))


def _of_channels(values: Array) -> Array:
    return values[None, None, None]


def _vectors(images: Array, layer: SoftHebbLayer) -> Array:
    """All patches of mirrored images, `[batch · height · width, kernel_size² · channels]`."""
    edge = layer.kernel_size // 2
    mirrored = jnp.pad(images, ((0, 0), (edge, edge), (edge, edge), (0, 0)), mode="reflect")
    vectors = patches.extract(mirrored, kernel_size=layer.kernel_size)
    return vectors.reshape(-1, vectors.shape[-1])


def _pooled(maps: Array, layer: SoftHebbLayer) -> Array:
    """Of maps that are not negative: beyond their edges are zeros, which no maximum sees."""
    edge = (layer.pool_size - layer.pool_stride) // 2
    maps = jnp.pad(maps, ((0, 0), (edge, edge), (edge, edge), (0, 0)))
    combine = jnp.maximum if layer.pool == "max" else jnp.add
    pooled = patches.reduce_windows(maps, layer.pool_size, layer.pool_stride, combine)
    return pooled if layer.pool == "max" else pooled / layer.pool_size**2
