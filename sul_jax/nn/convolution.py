"""Convolutions and pooling whose gradients are fast on a CPU too."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from sul_jax.nn import _winograd
from sul_jax.patches import reduce_windows

_LAYOUT = ("NHWC", "HWIO", "NHWC")
_xla = partial(lax.conv_general_dilated, dimension_numbers=_LAYOUT)
# jax 0.7 has the cast under its first name, jax 0.10 and newer under this one alone.
_varying = partial(lax.pcast, to="varying") if hasattr(lax, "pcast") else lax.pvary  # type: ignore[attr-defined]
_BLOCK_BYTES = 2**21  # patches held at a time while a kernel's gradient is summed: they stay in the cache


def conv_general_dilated(
    images: Array, kernel: Array, strides: Any, padding: Any, *, precision: Any = None, **options: Any
) -> Array:
    """`jax.lax.conv_general_dilated`, by matrix products on a CPU.

    There XLA takes the kernel's gradient as a convolution by an image-sized window, which costs two to
    three times as much as the products of patches and gradients, block by block. 3×3 kernels of stride 1 on
    32 channels and more take half the products, right to some 1e-6 of the largest value, and about half the
    time, in both directions. (Forward-mode derivatives are not defined there.)

    Args:
      images: `[batch, height, width, channels]`.
      kernel: `[kernel_height, kernel_width, channels, filters]`.
      strides: of the two spatial axes.
      padding: "SAME", "VALID", or a pair (low, high) for each spatial axis.
      precision: as of `jax.lax.conv_general_dilated`.
      **options: what `flax.nnx.Conv` passes besides; whatever is not the default is left to XLA.

    Returns:
      `[batch, out_height, out_width, filters]`.

    Example:
      >>> import jax.numpy as jnp
      >>> from sul_jax.nn.convolution import conv_general_dilated
      >>> conv_general_dilated(jnp.ones((2, 8, 8, 3)), jnp.ones((3, 3, 3, 5)), (2, 2), "SAME").shape
      (2, 4, 4, 5)
    """
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(images.shape[1:3], kernel.shape[:2], strides, padding)
    padding = tuple((int(low), int(high)) for low, high in padding)
    usual = all(_is_default(name, value, images) for name, value in options.items())
    if jax.default_backend() != "cpu" or not usual or not len(images) or np.min(padding) < 0:
        return _xla(images, kernel, strides, padding, precision=precision, **options)
    # Where shard_map splits the images alone, this cast's transpose is the sum of the shards' gradients.
    split = tuple(_mapped_axes(images) - _mapped_axes(kernel))
    if split:
        kernel = _varying(kernel, split)
    return _convolve(tuple(int(stride) for stride in strides), padding, precision, images, kernel)


def _mapped_axes(values: Array) -> frozenset[Any]:
    """Axes of shard_map over which an array differs."""
    kind: Any = jax.typeof(values)
    axes = kind.manual_axis_type.varying if hasattr(kind, "manual_axis_type") else kind.vma
    return frozenset(axes)


def _is_default(name: str, value: Any, images: Array) -> bool:
    """Whether an option says what goes without saying."""
    if name == "dimension_numbers":
        layout = lax.conv_dimension_numbers(images.shape, (1, 1, 1, 1), _LAYOUT)
        return value is None or value in (_LAYOUT, layout)
    if name == "preferred_element_type":
        return value is None or value == images.dtype
    return value is None or bool(np.all(np.asarray(value) == 1))  # dilations and groups


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _convolve(strides: Any, padding: Any, precision: Any, images: Array, kernel: Array) -> Array:
    if _winograd.pays(images, kernel, strides, padding):
        return _winograd.convolve(images, kernel, padding)
    return _xla(images, kernel, strides, padding, precision=precision)


def _forward(
    strides: Any, padding: Any, precision: Any, images: Array, kernel: Array
) -> tuple[Array, tuple[Array, Array]]:
    return _convolve(strides, padding, precision, images, kernel), (images, kernel)


def _backward(
    strides: Any, padding: Any, precision: Any, saved: tuple[Array, Array], gradient: Array
) -> tuple[Array, Array]:
    images, kernel = saved
    if _winograd.pays(images, kernel, strides, padding):
        turned = kernel[::-1, ::-1].swapaxes(2, 3)
        (top, bottom), (left, right) = padding
        of_images = _winograd.convolve(gradient, turned, ((2 - top, 2 - bottom), (2 - left, 2 - right)))
        return of_images, _winograd.kernel_gradient(images, gradient, padding)
    by_images = jax.linear_transpose(
        lambda values: _xla(values, kernel, strides, padding, precision=precision), images
    )
    (of_images,) = by_images(gradient)
    batch, height, width, filters = gradient.shape
    size = kernel[..., 0].size
    block = min(batch, max(1, _BLOCK_BYTES // (height * width * size * images.dtype.itemsize)))
    # Channels first: rows of the product's left side are then contiguous, which nearly doubles its speed.
    planes = jnp.pad(images.transpose(3, 0, 1, 2), ((0, 0), (0, 0), *padding))

    def product(start: int | Array, number: int) -> Array:
        part = lax.dynamic_slice_in_dim(planes, start, number, axis=1)
        windows = [
            part[:, :, row :: strides[0], column :: strides[1]][:, :, :height, :width]
            for row in range(kernel.shape[0])
            for column in range(kernel.shape[1])
        ]
        patches = jnp.concatenate(windows).reshape(size, -1)
        of_part = lax.dynamic_slice_in_dim(gradient, start, number).reshape(-1, filters)
        wide = jnp.promote_types(images.dtype, jnp.float32)
        return jnp.matmul(patches, of_part, precision=precision, preferred_element_type=wide)

    first = batch % block or block
    of_kernel, _ = lax.scan(
        lambda total, start: (total + product(start, block), None),
        product(0, first),
        jnp.arange(first, batch, block),
    )
    return of_images, of_kernel.reshape(kernel.shape).astype(kernel.dtype)


_convolve.defvjp(_forward, _backward)


def max_pool(values: Array, window: int, stride: int) -> Array:
    """Largest value of each window, without padding.

    By `patches.reduce_windows`. Equal largest values share the gradient.

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
    return reduce_windows(values, window, stride)
