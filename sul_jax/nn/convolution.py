"""Convolutions and pooling whose gradients are fast on a CPU too."""

from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

_LAYOUT = ("NHWC", "HWIO", "NHWC")
_BLOCK_BYTES = 2**21  # patches held at a time while a kernel's gradient is summed: they stay in the cache


def conv_general_dilated(
    images: Array, kernel: Array, strides: Any, padding: Any, *, precision: Any = None, **options: Any
) -> Array:
    """`jax.lax.conv_general_dilated`, with a kernel gradient by matrix products on a CPU.

    There XLA takes the kernel's gradient as a convolution by an image-sized window, which costs two to
    three times as much as the products of patches and gradients, block by block.

    Args:
      images: `[batch, height, width, channels]`.
      kernel: `[kernel_height, kernel_width, channels, filters]`.
      strides: of the two spatial axes.
      padding: "SAME", "VALID", or a pair (low, high) for each spatial axis.
      precision: as of `jax.lax.conv_general_dilated`.
      **options: what `flax.nnx.Conv` passes besides; dilations and groups other than one are left to XLA.

    Returns:
      `[batch, out_height, out_width, filters]`.

    Example:
      >>> import jax.numpy as jnp
      >>> from sul_jax.nn.convolution import conv_general_dilated
      >>> conv_general_dilated(jnp.ones((2, 8, 8, 3)), jnp.ones((3, 3, 3, 5)), (2, 2), "SAME").shape
      (2, 4, 4, 5)
    """
    dilations = (*(options.get("lhs_dilation") or ()), *(options.get("rhs_dilation") or ()))
    plain = all(size == 1 for size in (*dilations, options.get("feature_group_count", 1)))
    if jax.default_backend() != "cpu" or not plain:
        options = {"dimension_numbers": _LAYOUT, **options}
        return lax.conv_general_dilated(images, kernel, strides, padding, precision=precision, **options)
    strides = tuple(strides)
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(images.shape[1:3], kernel.shape[:2], strides, padding)
    padding = tuple((int(low), int(high)) for low, high in padding)
    return _convolve(strides, padding, precision, images, kernel)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _convolve(strides: Any, padding: Any, precision: Any, images: Array, kernel: Array) -> Array:
    return lax.conv_general_dilated(
        images, kernel, strides, padding, dimension_numbers=_LAYOUT, precision=precision
    )


def _forward(
    strides: Any, padding: Any, precision: Any, images: Array, kernel: Array
) -> tuple[Array, tuple[Array, Array]]:
    return _convolve(strides, padding, precision, images, kernel), (images, kernel)


def _backward(
    strides: Any, padding: Any, precision: Any, saved: tuple[Array, Array], gradient: Array
) -> tuple[Array, Array]:
    images, kernel = saved
    by_images = jax.linear_transpose(
        lambda values: lax.conv_general_dilated(
            values, kernel, strides, padding, dimension_numbers=_LAYOUT, precision=precision
        ),
        images,
    )
    (of_images,) = by_images(gradient)
    batch, height, width, filters = gradient.shape
    bytes_per_image = height * width * kernel[..., 0].size * images.dtype.itemsize
    most = min(batch, max(1, _BLOCK_BYTES // bytes_per_image))
    block = next(size for size in range(most, 0, -1) if batch % size == 0)
    padded = jnp.pad(images, ((0, 0), *padding, (0, 0)))

    def add(total: Array, start: Array) -> tuple[Array, None]:
        part, of_part = (lax.dynamic_slice_in_dim(values, start, block) for values in (padded, gradient))
        columns = [
            part[:, row :: strides[0], column :: strides[1]][:, :height, :width]
            for row in range(kernel.shape[0])
            for column in range(kernel.shape[1])
        ]
        patches = jnp.concatenate(columns, axis=-1).reshape(-1, kernel[..., 0].size)
        product = jnp.matmul(patches.T, of_part.reshape(-1, filters), precision=precision)
        return total + product, None

    empty = jnp.zeros_like(kernel, shape=(kernel[..., 0].size, filters))
    of_kernel, _ = lax.scan(add, empty, jnp.arange(0, batch, block))
    return of_images, of_kernel.reshape(kernel.shape)


_convolve.defvjp(_forward, _backward)


def max_pool(values: Array, window: int, stride: int) -> Array:
    """Largest value of each window, without padding.

    Along one axis after the other, as maxima of shifted images: on a CPU XLA's windowed reduction and above
    all its gradient take several times as long. Equal largest values share the gradient.

    Args:
      values: `[batch, height, width, channels]`.
      window: side in pixels.
      stride: distance of neighbouring windows in pixels.

    Returns:
      `[batch, out_height, out_width, channels]`.

    Raises:
      ValueError: the window is larger than the image.

    Example:
      >>> import jax.numpy as jnp
      >>> from sul_jax.nn.convolution import max_pool
      >>> max_pool(jnp.arange(16.0).reshape(1, 4, 4, 1), 2, 2).ravel().tolist()
      [5.0, 7.0, 13.0, 15.0]
    """
    if window > min(values.shape[1:3]):
        raise ValueError(f"window={window} is not accepted: the images have shape {values.shape[1:3]}")
    for axis in (2, 1):
        span = values.shape[axis] - window + 1
        shifted = (
            lax.slice_in_dim(values, start, start + span, stride, axis=axis) for start in range(window)
        )
        values = reduce(jnp.maximum, shifted)
    return values
