"""Whitening: convolutional ZCA (Luther & Seung 2022, sections 3 and D), PCA, unit norm."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from sul_jax import patches
from sul_jax._check import (
    as_array,
    check_finite,
    check_floating,
    check_images,
    check_integer,
    check_vectors,
)
from sul_jax._linalg import at_least_float32, fix_signs, unit
from sul_jax.learning_rule import LearningRule


class ConvZCAState(NamedTuple):
    """The whitening kernel: `[kernel_size, kernel_size, channels, channels]`, input channel third."""

    kernel: Array


def conv_zca_kernel(
    images: Array, *, kernel_size: int, num_components: int, axis_name: str | None = None
) -> Array:
    """Convolution kernel that whitens each pixel against its neighbourhood.

    With eigenvalues λ₁ ≥ λ₂ ≥ … and eigenvectors uᵢ of the uncentred second moment of all
    un-padded patches, W = I + Σ_{i<n} (√(λₙ/λᵢ) − 1) uᵢuᵢᵀ sets the n − 1 largest eigenvalues equal
    to the n-th and passes the rest unchanged; the kernel is the row of W that gives the patch's
    central pixel. Of the readings that the paper's "pixel-pixel correlation matrix" allows, this
    one gives its printed ratio of DC to centre (eq. 8): 0.0995 against 0.10 on MNIST.

    Args:
      images: `[batch, height, width, channels]`.
      kernel_size: side of the patch; 1 to the image's side.
      num_components: n, from 0 to `kernel_size² · channels`; 0 and 1 leave images unchanged.
      axis_name: mapped axis over which the batch is split.

    Returns:
      `[kernel_size, kernel_size, channels, channels]`, for `conv_zca`.

    Raises:
      ValueError: no patch fits, or `num_components` is out of range.

    Example:
      >>> import jax
      >>> from sul_jax import whitening
      >>> images = jax.random.uniform(jax.random.key(0), (20, 12, 12, 1))
      >>> whitening.conv_zca_kernel(images, kernel_size=5, num_components=4).shape
      (5, 5, 1, 1)
    """
    images, height, width = patches.check_window(images, kernel_size=kernel_size, padding=0)
    check_finite("images", images)
    images = at_least_float32(images)
    channels = images.shape[-1]
    size = kernel_size**2 * channels
    check_integer(
        "num_components", num_components, low=0, high=size,
        why=f" (kernel_size² · channels = {kernel_size}² · {channels})",
    )  # fmt: skip

    def second_moment(chunk: Array) -> Array:
        vectors = patches.extract(chunk, kernel_size=kernel_size).reshape(-1, size)
        return jnp.matmul(vectors.T, vectors, precision="highest")

    per_image = height * width * size * images.dtype.itemsize
    moments = patches.map_chunks(second_moment, images, bytes_per_image=per_image)
    moment = jnp.sum(moments, axis=0) / (images.shape[0] * height * width)
    if axis_name is not None:
        moment = lax.pmean(moment, axis_name)
    values, vectors = jnp.linalg.eigh(moment)
    values, vectors = values[::-1], vectors[:, ::-1]
    smallest = np.finfo(values.dtype).tiny
    values = jnp.maximum(values, smallest)
    target = values[max(num_components - 1, 0)]
    attenuated = jnp.arange(size) < num_components - 1
    gains = jnp.where(attenuated, jnp.sqrt(target / values), 1.0)
    whiten = jnp.matmul(vectors * gains[None], vectors.T, precision="highest")
    centre = kernel_size // 2
    rows = whiten.reshape(kernel_size, kernel_size, channels, size)[centre, centre]
    return rows.T.reshape(kernel_size, kernel_size, channels, channels)


def conv_zca(images: Array, kernel: Array) -> Array:
    """Convolves reflection-padded images with a whitening kernel; the size is kept.

    Args:
      images: `[batch, height, width, channels]`.
      kernel: from `conv_zca_kernel`.

    Returns:
      `[batch, height, width, channels]`.

    Raises:
      ValueError: channels differ, or the kernel reaches past the reflected image.

    Example:
      >>> import jax.numpy as jnp
      >>> from sul_jax import whitening
      >>> whitening.conv_zca(jnp.ones((2, 8, 8, 1)), jnp.ones((3, 3, 1, 1)) / 9).shape
      (2, 8, 8, 1)
    """
    images, kernel = check_images("images", images), as_array("kernel", kernel)
    if images.shape[-1] != kernel.shape[2]:
        raise ValueError(
            f"images has {images.shape[-1]} channels, but the kernel was made for {kernel.shape[2]}"
        )
    before = kernel.shape[0] // 2
    after = kernel.shape[0] - 1 - before
    if before >= min(images.shape[1:3]):
        raise ValueError(
            f"a kernel of {kernel.shape[0]} pixels needs images larger than {before} pixels for "
            f"reflection padding, got {images.shape[1]}×{images.shape[2]}"
        )
    images, kernel = at_least_float32(images), at_least_float32(kernel)
    padded = jnp.pad(images, ((0, 0), (before, after), (before, after), (0, 0)), mode="reflect")
    return lax.conv_general_dilated(
        padded, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision="highest",
    )  # fmt: skip


def dc_ratio(kernel: Array) -> Array:
    """What the negative surround leaves of the kernel's centre, as a share of it (eq. 8).

    Args:
      kernel: from `conv_zca_kernel`.

    Returns:
      A scalar: 1 for the identity, 0 for a kernel without response to constant images; the mean over
      channels.

    Example:
      >>> import jax.numpy as jnp
      >>> from sul_jax import whitening
      >>> kernel = jnp.full((3, 3, 1, 1), -0.1).at[1, 1].set(1.0)
      >>> round(whitening.dc_ratio(kernel).item(), 3)
      0.2
    """
    kernel = as_array("kernel", kernel)
    centre = kernel.shape[0] // 2
    own = jnp.diagonal(kernel, axis1=2, axis2=3)
    surround = jnp.sum(jnp.maximum(0, -own), axis=(0, 1))
    return jnp.mean((own[centre, centre] - surround) / own[centre, centre])


def conv_zca_rule(*, kernel_size: int, num_components: int) -> LearningRule:
    """ConvZCA as the bottom of a stack: learned once by `init` from all the images it is given.

    Example:
      >>> import jax
      >>> from sul_jax import whitening
      >>> rule = whitening.conv_zca_rule(kernel_size=5, num_components=4)
      >>> images = jax.random.uniform(jax.random.key(0), (20, 12, 12, 1))
      >>> rule.encode(rule.init(jax.random.key(1), images), images).shape
      (20, 12, 12, 1)
    """

    def init(key: Array, images: Array) -> ConvZCAState:
        del key  # nothing is random here; the argument is the rules' common signature
        return ConvZCAState(conv_zca_kernel(images, kernel_size=kernel_size, num_components=num_components))

    def update(
        state: ConvZCAState, images: Array, *, axis_name: str | None = None, **hyperparameters: Any
    ) -> tuple[ConvZCAState, tuple[()]]:
        del images, axis_name, hyperparameters  # those of a stack are for the rules above
        return state, ()

    def encode(state: ConvZCAState, images: Array) -> Array:
        return conv_zca(images, state.kernel)

    return LearningRule(init, update, encode)


class PCAState(NamedTuple):
    """A learned projection onto principal components, to be used by `pca_whiten`.

    Attributes:
      mean: `[features]`.
      components: `[features, num_components]`, scaled, the one of largest variance first.
    """

    mean: Array
    components: Array


def pca(
    inputs: Array, *, num_components: int, exponent: float | Array = 0.5, axis_name: str | None = None
) -> PCAState:
    """Principal components, each divided by its variance to the power of `exponent`.

    Args:
      inputs: `[batch, features]`.
      num_components: from 1 to the number of features.
      exponent: 0.5 whitens; 0 only rotates; between them large components are damped.
      axis_name: mapped axis over which the batch is split.

    Returns:
      A `PCAState`. Components whose variance is rounding noise (below 32 machine epsilons, 4e-6 in float32,
      of the largest, or below the square of that share of the mean vector's length) are zero.

    Raises:
      ValueError: `num_components` out of range.

    Example:
      >>> import jax
      >>> from sul_jax import whitening
      >>> inputs = jax.random.normal(jax.random.key(0), (500, 4)) * jax.numpy.arange(1.0, 5.0)
      >>> white = whitening.pca_whiten(inputs, whitening.pca(inputs, num_components=2))
      >>> [round(v, 3) for v in white.std(axis=0).tolist()]
      [1.0, 1.0]
    """
    inputs = check_vectors("inputs", inputs)
    features = inputs.shape[1]
    check_integer(
        "num_components", num_components, low=1, high=features, why=f": inputs has {features} features"
    )
    inputs = at_least_float32(inputs)
    mean = jnp.mean(inputs, axis=0)
    mean = mean if axis_name is None else lax.pmean(mean, axis_name)
    centred = inputs - mean[None]
    covariance = jnp.matmul(centred.T, centred, precision="highest") / inputs.shape[0]
    covariance = covariance if axis_name is None else lax.pmean(covariance, axis_name)
    values, vectors = jnp.linalg.eigh(covariance)
    values, vectors = values[::-1][:num_components], vectors[:, ::-1][:, :num_components]
    # Below this, a variance is rounding noise that must not be blown up: of the largest, or of the mean.
    noise = 32 * float(np.finfo(values.dtype).eps)
    floor = jnp.maximum(values[0] * noise, jnp.sum(jnp.square(mean)) * noise**2)
    kept = values > floor
    gains = jnp.where(kept, jnp.where(kept, values, 1) ** -jnp.asarray(exponent), 0)
    return PCAState(mean, fix_signs(vectors.T).T * gains[None])


def pca_whiten(inputs: Array, state: PCAState) -> Array:
    """Coordinates along the components of `pca`.

    Args:
      inputs: `[batch, features]`.
      state: from `pca`.

    Returns:
      `[batch, num_components]`.

    Raises:
      ValueError: `inputs` does not have the state's number of features.

    Example:
      >>> import jax.numpy as jnp
      >>> from sul_jax import whitening
      >>> state = whitening.PCAState(mean=jnp.ones(2), components=jnp.array([[2.0], [0.0]]))
      >>> whitening.pca_whiten(jnp.array([[3.0, 5.0]]), state).tolist()
      [[4.0]]
    """
    inputs = check_vectors("inputs", inputs, features=state.mean.shape[0])
    return jnp.matmul(inputs - state.mean[None], state.components, precision="highest")


def normalize(inputs: Array) -> Array:
    """Vectors of unit norm; a vector shorter than 1e-8 becomes zero, with a gradient of zero.

    Args:
      inputs: `[..., features]`.

    Returns:
      An array of the same shape and type.

    Raises:
      TypeError: `inputs` are integers.

    Example:
      >>> import jax.numpy as jnp
      >>> from sul_jax import whitening
      >>> whitening.normalize(jnp.array([[0.0, 2.0], [0.0, 0.0]])).tolist()
      [[0.0, 1.0], [0.0, 0.0]]
    """
    inputs = check_floating("inputs", inputs)
    return unit(at_least_float32(inputs)).astype(inputs.dtype)
