"""Square patches of channels-last images: extraction, norms and sampling."""

from collections.abc import Callable
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from sul_jax._check import check_array, check_images, check_integer
from sul_jax._linalg import at_least_float32, root


def chunk_bytes() -> int:
    """Bound on the patches that are held at a time, by kind of device.

    On a CPU, chunks that stay near the caches run up to twice as fast; elsewhere few launches do.
    """
    return 2**24 if jax.default_backend() == "cpu" else 2**28


def output_size(size: int, *, kernel_size: int, padding: int = 0) -> int:
    """Number of positions a window has along an axis of `size` pixels (stride 1)."""
    return size + 2 * padding - kernel_size + 1


def check_window(images: Any, *, kernel_size: int, padding: int) -> tuple[Array, int, int]:
    """Returns the images and the output height and width; raises `ValueError` if no window fits."""
    images = check_images("images", images)
    check_integer("kernel_size", kernel_size, low=1)
    check_integer("padding", padding, low=0)
    height, width = (
        output_size(size, kernel_size=kernel_size, padding=padding) for size in images.shape[1:3]
    )
    if min(height, width) < 1:
        largest = min(images.shape[1:3]) + 2 * padding
        raise ValueError(
            f"kernel_size={kernel_size} is larger than the padded image: images of "
            f"{images.shape[1]}×{images.shape[2]} pixels with padding={padding} accept a "
            f"kernel_size of at most {largest}"
        )
    return images, height, width


def check_kernels(name: str, kernels: Any, images: Array, *, kernel_size: int, ndim: int, axes: str) -> Array:
    """Returns `kernels`; raises unless their last axis has the size of a patch of `images`."""
    kernels = check_array(name, kernels, ndim=ndim, axes=axes)
    channels = images.shape[-1]
    if kernels.shape[-1] != kernel_size**2 * channels:
        raise ValueError(
            f"{name} has {kernels.shape[-1]} features (shape {tuple(kernels.shape)}), but patches of "
            f"kernel_size={kernel_size} with {channels} channels have {kernel_size**2 * channels} features"
        )
    return kernels


def extract(images: Array, *, kernel_size: int, padding: int = 0) -> Array:
    """Every `kernel_size`×`kernel_size` patch of zero-padded images, stride 1.

    Args:
      images: `[batch, height, width, channels]`.
      kernel_size: side of the patch in pixels.
      padding: zeros added on each side of the image.

    Returns:
      `[batch, out_height, out_width, kernel_size * kernel_size * channels]`; the last axis runs
      over patch row, patch column and channel, as the flattened kernel of a convolution does.

    Raises:
      ValueError: `images` is not four-dimensional or no window fits.

    Example:
      >>> import jax.numpy as jnp
      >>> from sul_jax import patches
      >>> patches.extract(jnp.ones((2, 5, 5, 3)), kernel_size=3, padding=1).shape
      (2, 5, 5, 27)
    """
    images, height, _ = check_window(images, kernel_size=kernel_size, padding=padding)
    # Two passes write long contiguous runs (a whole patch row at a time) where a single pass over
    # the kernel_size² offsets would copy `channels` numbers at a time: 10× on a CPU.
    rows = _rows(images, kernel_size, padding)
    return jnp.concatenate([rows[:, i : i + height] for i in range(kernel_size)], axis=-1)


def taker(images: Array, *, kernel_size: int, padding: int = 0) -> Callable[[Array], Array]:
    """Patches at given positions, without extracting the others.

    Args:
      images: `[batch, height, width, channels]`.
      kernel_size: side of the patch in pixels.
      padding: zeros added on each side of the image.

    Returns:
      A function from indices `[num]` into the positions, in the order of `extract`, to patches
      `[num, kernel_size * kernel_size * channels]`.

    Example:
      >>> import jax.numpy as jnp
      >>> from sul_jax import patches
      >>> image = jnp.arange(9.0).reshape(1, 3, 3, 1)
      >>> patches.taker(image, kernel_size=2)(jnp.array([3])).tolist()
      [[4.0, 5.0, 7.0, 8.0]]
    """
    images, height, width = check_window(images, kernel_size=kernel_size, padding=padding)
    # With columns before rows the rows of a patch lie one after the other: a patch is one run of numbers.
    rows = jnp.moveaxis(_rows(images, kernel_size, padding), 2, 1)
    step = rows.shape[-1]
    columns = rows.reshape(images.shape[0] * width, -1)

    def take(indices: Array) -> Array:
        image, row, column = jnp.unravel_index(indices, (images.shape[0], height, width))

        def cut(place: Array, start: Array) -> Array:
            return lax.dynamic_slice(columns, (place, start), (1, kernel_size * step))[0]

        return jax.vmap(cut)(image * width + column, row * step)

    return take


def norms(images: Array, *, kernel_size: int, padding: int = 0) -> Array:
    """Euclidean norm of every patch, by box sums: no patch is extracted.

    Args:
      images: `[batch, height, width, channels]`.
      kernel_size: side of the patch in pixels.
      padding: zeros added on each side of the image.

    Returns:
      `[batch, out_height, out_width]`, equal to the norm of `extract(...)` over its last axis.

    Example:
      >>> import jax.numpy as jnp
      >>> from sul_jax import patches
      >>> patches.norms(jnp.ones((1, 4, 4, 1)), kernel_size=2)[0, 0, 0].item()
      2.0
    """
    return root(squared_norms(images, kernel_size=kernel_size, padding=padding))


def squared_norms(images: Array, *, kernel_size: int, padding: int = 0) -> Array:
    """Squares of `norms`: sparing a root that would be squared again.

    Args:
      images: as in `norms`.
      kernel_size: as in `norms`.
      padding: as in `norms`.

    Returns:
      `[batch, out_height, out_width]`.

    Example:
      >>> import jax.numpy as jnp
      >>> from sul_jax import patches
      >>> patches.squared_norms(jnp.ones((1, 4, 4, 1)), kernel_size=2)[0, 0, 0].item()
      4.0
    """
    images, _, _ = check_window(images, kernel_size=kernel_size, padding=padding)
    energy = _pad(jnp.sum(jnp.square(at_least_float32(images)), axis=-1), padding)
    window = (1, kernel_size, 1), (1, 1, kernel_size)  # separable: 2p instead of p² additions
    # With a traced zero JAX does not see the sum, nor its gradient under jit.
    zero = np.zeros((), energy.dtype)
    for size in window:
        energy = lax.reduce_window(energy, zero, lax.add, size, (1, 1, 1), "VALID")
    return energy


def project(images: Array, kernels: Array, *, kernel_size: int, padding: int = 0) -> Array:
    """Inner product of every patch with every kernel: a convolution, by matrix products.

    Args:
      images: `[batch, height, width, channels]`.
      kernels: `[num_kernels, kernel_size * kernel_size * channels]`.
      kernel_size: side of the patch.
      padding: zeros added on each side of the image.

    Returns:
      `[num_kernels, batch * out_height * out_width]`, positions as `extract` orders them.

    Example:
      >>> import jax.numpy as jnp
      >>> from sul_jax import patches
      >>> patches.project(jnp.ones((2, 4, 4, 1)), jnp.ones((5, 9)), kernel_size=3).shape
      (5, 8)
    """
    return projector(images, kernels, kernel_size=kernel_size, padding=padding)(images)


def projector(
    images: Array, kernels: Array, *, kernel_size: int, padding: int = 0
) -> Callable[[Array], Array]:
    """`project` for chunks of a batch: what depends on the kernels alone is computed once.

    Args:
      images: `[batch, height, width, channels]`; only the shape counts.
      kernels: as in `project`.
      kernel_size: side of the patch.
      padding: zeros added on each side of the image.

    Returns:
      A function from `[chunk, height, width, channels]` to `[num_kernels, chunk * out_height * out_width]`.

    Example:
      >>> import jax.numpy as jnp
      >>> from sul_jax import patches
      >>> images = jnp.ones((6, 4, 4, 1))
      >>> responses = patches.projector(images, jnp.ones((5, 9)), kernel_size=3)
      >>> responses(images[:2]).shape
      (5, 8)
    """
    images, height, _width = check_window(images, kernel_size=kernel_size, padding=padding)
    axes = "[num_kernels, features]"
    kernels = check_kernels("kernels", kernels, images, kernel_size=kernel_size, ndim=2, axes=axes)
    number = kernels.shape[0]
    if _spectra_pay(images, number, kernel_size, padding):
        return _spectral_projector(images, kernels, kernel_size, padding)

    def by_patches(chunk: Array) -> Array:
        vectors = extract(chunk, kernel_size=kernel_size, padding=padding)
        flat = vectors.reshape(-1, vectors.shape[-1])
        return jnp.matmul(kernels, flat.T, precision="highest")

    def by_rows(chunk: Array) -> Array:
        rows = _rows(chunk, kernel_size, padding)
        by_row = kernels.reshape(number, kernel_size, rows.shape[-1]).swapaxes(0, 1)
        products = jnp.matmul(
            by_row.reshape(-1, rows.shape[-1]), rows.reshape(-1, rows.shape[-1]).T, precision="highest"
        ).reshape(kernel_size, number, *rows.shape[:3])
        shifted = (products[i, :, :, i : i + height] for i in range(kernel_size))
        return sum(shifted, jnp.zeros((), products.dtype)).reshape(number, -1)

    return by_rows if _rows_pay(images, number, kernel_size, padding) else by_patches


def _spectral_projector(
    images: Array, kernels: Array, kernel_size: int, padding: int
) -> Callable[[Array], Array]:
    """Projection by the spectra of image rows: a product for every frequency instead of every shift.

    With out_width shifts of a kernel_size-wide kernel, out_width · kernel_size products become
    4 · (padded_width / 2 + 1) real ones.
    """
    number, channels = kernels.shape[0], images.shape[3]
    tall, wide = (size + 2 * padding for size in images.shape[1:3])
    height, width = tall - kernel_size + 1, wide - kernel_size + 1
    frequencies = np.arange(wide // 2 + 1)
    angles = 2 * np.pi * np.outer(frequencies, np.arange(wide)) / wide
    twice = np.where((frequencies == 0) | (2 * frequencies == wide), 1, 2)[:, None]
    # Real and imaginary part as an axis: X = Σ x e^(-iωx), and back at the first `width` shifts.
    forth = np.stack([np.cos(angles), -np.sin(angles)], axis=1).astype(kernels.dtype)
    back = np.stack([np.cos(angles), -np.sin(angles)], axis=1)[..., :width] * twice[..., None] / wide
    grid = kernels.reshape(number, kernel_size, kernel_size, channels)
    spectra = jnp.einsum("nijc,fpj->fpnic", grid, forth[..., :kernel_size], precision="highest")
    real, imaginary = spectra[:, 0], -spectra[:, 1]  # correlation takes the conjugate
    matrices = jnp.stack(
        [jnp.stack([real, -imaginary], axis=3), jnp.stack([imaginary, real], axis=3)], axis=1
    ).reshape(len(frequencies), 2 * number, -1)

    def project_spectra(chunk: Array) -> Array:
        rows = jnp.einsum("bhwc,fpw->fbhpc", _pad(chunk, padding), forth, precision="highest")
        rows = rows.reshape(len(frequencies), chunk.shape[0], tall, 2 * channels)
        rows = jnp.concatenate([rows[:, :, i : i + height] for i in range(kernel_size)], axis=-1)
        rows = rows.reshape(len(frequencies), chunk.shape[0] * height, -1)

        def term(matrix: Array, row: Array, weights: Array) -> Array:
            both = jnp.matmul(matrix, row.T, precision="highest").reshape(2, number, -1)
            return both[:1] * weights[0, :, None, None] + both[1:] * weights[1, :, None, None]

        def add(total: Array, one: tuple[Array, ...]) -> tuple[Array, None]:
            return total + term(*one), None

        parts = (matrices, rows, jnp.asarray(back, kernels.dtype))
        first, rest = (part[0] for part in parts), tuple(part[1:] for part in parts)
        total, _ = lax.scan(add, term(*first), rest)  # [width, number, chunk * height]
        return jnp.moveaxis(total, 0, -1).reshape(number, -1)

    return project_spectra


def _spectra_pay(images: Array, number: int, kernel_size: int, padding: int) -> bool:
    """Whether the products saved outweigh the larger intermediate results (measured on CPUs only)."""
    wide = images.shape[2] + 2 * padding
    products = 4 * (wide // 2 + 1)
    direct = (wide - kernel_size + 1) * kernel_size
    return jax.default_backend() == "cpu" and number >= 256 and 2 * products < direct


def back_project(images: Array, weights: Array, *, kernel_size: int, padding: int = 0) -> Array:
    """Weighted sums of all patches: the transpose of `project`.

    Args:
      images: `[batch, height, width, channels]`.
      weights: `[num_sums, batch * out_height * out_width]`.
      kernel_size: side of the patch.
      padding: zeros added on each side of the image.

    Returns:
      `[num_sums, kernel_size * kernel_size * channels]`.

    Example:
      >>> import jax.numpy as jnp
      >>> from sul_jax import patches
      >>> patches.back_project(jnp.ones((2, 4, 4, 1)), jnp.ones((5, 8)), kernel_size=3).shape
      (5, 9)
    """
    images, height, width = check_window(images, kernel_size=kernel_size, padding=padding)
    weights = check_array("weights", weights, ndim=2, axes="[num_sums, positions]")
    if weights.shape[1] != len(images) * height * width:
        raise ValueError(
            f"weights has {weights.shape[1]} positions (shape {tuple(weights.shape)}), but "
            f"{len(images)} images have {len(images) * height * width}"
        )
    number = weights.shape[0]
    if not _rows_pay(images, number, kernel_size, padding):
        vectors = extract(images, kernel_size=kernel_size, padding=padding)
        return jnp.matmul(weights, vectors.reshape(-1, vectors.shape[-1]), precision="highest")
    rows = _rows(images, kernel_size, padding)
    placed = weights.reshape(number, -1, height, width)
    shifts = [jnp.pad(placed, ((0, 0), (0, 0), (i, kernel_size - 1 - i), (0, 0))) for i in range(kernel_size)]
    by_row = jnp.matmul(
        jnp.stack(shifts).reshape(kernel_size * number, -1),
        rows.reshape(-1, rows.shape[-1]),
        precision="highest",
    )
    return by_row.reshape(kernel_size, number, -1).swapaxes(0, 1).reshape(number, -1)


def _rows(images: Array, kernel_size: int, padding: int) -> Array:
    """Patches one pixel high, `[batch, padded_height, out_width, kernel_size * channels]`."""
    images = _pad(images, padding)
    width = output_size(images.shape[2], kernel_size=kernel_size)
    return jnp.concatenate([images[:, :, j : j + width] for j in range(kernel_size)], axis=-1)


def _rows_pay(images: Array, number: int, kernel_size: int, padding: int) -> bool:
    """Whether products go by patch rows, shifted and added, instead of by whole patches.

    Whole patches copy every pixel kernel_size² times; rows copy it kernel_size times, but give
    kernel_size partial products a kernel. Both are bound by memory where kernels are few.
    """
    images, height, _ = check_window(images, kernel_size=kernel_size, padding=padding)
    row = kernel_size * images.shape[-1]
    tall = images.shape[1] + 2 * padding
    return tall * (row + kernel_size * number) < height * kernel_size * row


def sample(key: Array, images: Array, *, num_patches: int, kernel_size: int, padding: int = 0) -> Array:
    """Random patches, uniform over those that are not blank (all zero).

    Args:
      key: `jax.random.key`.
      images: `[batch, height, width, channels]`.
      num_patches: how many, drawn without replacement.
      kernel_size: side of the patch in pixels.
      padding: zeros added on each side of the image.

    Returns:
      `[num_patches, kernel_size * kernel_size * channels]`. Blank patches appear only when there
      are fewer than `num_patches` others.

    Raises:
      ValueError: the images hold fewer than `num_patches` patches.

    Example:
      >>> import jax
      >>> from sul_jax import patches
      >>> images = jax.random.normal(jax.random.key(0), (4, 8, 8, 1))
      >>> patches.sample(jax.random.key(1), images, num_patches=10, kernel_size=3).shape
      (10, 9)
    """
    images = check_images("images", images)
    size = norms(images, kernel_size=kernel_size, padding=padding)
    check_integer("num_patches", num_patches, low=1)
    if num_patches > size.size:
        raise ValueError(
            f"num_patches={num_patches} exceeds the {size.size} patches that images of shape "
            f"{images.shape} hold with kernel_size={kernel_size} and padding={padding}"
        )
    # Blank patches come last, the order of the others is uniformly random.
    noise = jax.random.uniform(key, (size.size,))
    order = jnp.argsort(jnp.where(size.ravel() > 0, noise, 2.0))[:num_patches]
    image, row, column = jnp.unravel_index(order, size.shape)
    return cut(_pad(images, padding), image, row, column, kernel_size=kernel_size)


def cut(images: Array, image: Array, row: Array, column: Array, *, kernel_size: int) -> Array:
    """Patches at given places, each cut out by itself.

    Args:
      images: `[batch, height, width, channels]`.
      image: integers `[num]`, which image.
      row: integers `[num]`, of the patch's upper left pixel.
      column: integers `[num]`, of the same.
      kernel_size: side of the patch in pixels.

    Returns:
      `[num, kernel_size * kernel_size * channels]`.

    Example:
      >>> import jax.numpy as jnp
      >>> from sul_jax import patches
      >>> image = jnp.arange(9.0).reshape(1, 3, 3, 1)
      >>> patches.cut(image, jnp.array([0]), jnp.array([1]), jnp.array([1]), kernel_size=2).tolist()
      [[4.0, 5.0, 7.0, 8.0]]
    """
    shape = (1, kernel_size, kernel_size, images.shape[-1])

    def one(*place: Array) -> Array:
        return lax.dynamic_slice(images, (*place, 0), shape).ravel()

    return jax.vmap(one)(image, row, column)


def map_chunks(
    function: Callable[[Array], Any],
    images: Array,
    *,
    bytes_per_image: int,
    max_bytes: int | None = None,
) -> Any:
    """Applies `function` to chunks of images small enough that its patches stay within `max_bytes`.

    The batch is filled up to a whole number of equal chunks with blank images, which is exact for
    every statistic to which a zero patch contributes nothing. Under plain `jit` a batch that is
    sharded over devices is gathered for this; `shard_map` with `axis_name` is the form that scales.

    Args:
      function: maps `[chunk, height, width, channels]` to a tree of arrays.
      images: `[batch, height, width, channels]`.
      bytes_per_image: size of one image's patches.
      max_bytes: bound on a chunk's patches, by default `chunk_bytes()`; at least one image is taken.

    Returns:
      The tree of results with a leading axis of chunks.

    Example:
      >>> import jax.numpy as jnp
      >>> from sul_jax import patches
      >>> images = jnp.ones((5, 2, 2, 1))
      >>> patches.map_chunks(jnp.sum, images, bytes_per_image=16, max_bytes=32).tolist()
      [8.0, 8.0, 4.0]
    """
    batch = images.shape[0]
    limit = chunk_bytes() if max_bytes is None else max_bytes
    most = max(1, limit // bytes_per_image)
    chunk = -(-batch // -(-batch // most))
    # One that divides the batch spares two copies of it, but small chunks cost more than they do.
    divisor = max(size for size in range(1, min(most, batch) + 1) if batch % size == 0)
    chunk = divisor if divisor >= 0.8 * chunk else chunk
    num_chunks = -(-batch // chunk)
    if num_chunks == 1:
        return jax.tree.map(lambda result: result[None], function(images))
    filled = jnp.pad(images, ((0, num_chunks * chunk - batch),) + ((0, 0),) * (images.ndim - 1))
    return lax.map(function, filled.reshape(num_chunks, chunk, *images.shape[1:]))


def reduce_windows(
    values: Array, window: int, stride: int, combine: Callable[[Array, Array], Array] = jnp.maximum
) -> Array:
    """Pools windows without padding, along one axis after the other, as shifted images.

    On a CPU XLA's windowed reduction, and above all its gradient, take several times as long.

    Args:
      values: `[batch, height, width, channels]`.
      window: side in pixels, at most that of the images.
      stride: distance of neighbouring windows in pixels.
      combine: of two arrays, such as their maximum or sum.

    Returns:
      `[batch, out_height, out_width, channels]`.

    Example:
      >>> import jax.numpy as jnp
      >>> from sul_jax import patches
      >>> patches.reduce_windows(jnp.arange(16.0).reshape(1, 4, 4, 1), 2, 2, jnp.add).ravel().tolist()
      [10.0, 18.0, 42.0, 50.0]
    """
    for axis in (2, 1):
        span = values.shape[axis] - window + 1
        shifted = (
            lax.slice_in_dim(values, start, start + span, stride, axis=axis) for start in range(window)
        )
        values = reduce(combine, shifted)
    return values


def _pad(images: Array, padding: int) -> Array:
    widths = [(0, 0), (padding, padding), (padding, padding)] + [(0, 0)] * (images.ndim - 3)
    return jnp.pad(images, widths)
