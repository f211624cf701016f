"""3×3 convolutions in half the products: Winograd's F(4, 3) along the rows (Lavin & Gray 2016, section 4).

Four neighbouring outputs of a row take three kernel columns from six inputs. Six products of sums of the
inputs by sums of the kernel give them, where twelve would be needed; the kernel rows are added up within
the products, which are matrix products over all channels. Blocks of images stay in the cache.
"""

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

Padding = tuple[tuple[int, int], tuple[int, int]]

# Sums of six inputs, of three kernel columns, and of six products, by the points 0, ±1, ±2 and infinity.
_INPUTS = np.array(
    [
        [4, 0, -5, 0, 1, 0], [0, -4, -4, 1, 1, 0], [0, 4, -4, -1, 1, 0],
        [0, -2, -1, 2, 1, 0], [0, 2, -1, -2, 1, 0], [0, 4, 0, -5, 0, 1],
    ]
)  # fmt: skip
_COLUMNS = np.array([[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]]) / 24
_OUTPUTS = np.array([[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]])
_BLOCK_BYTES = 5 * 2**20  # sums of inputs held at a time


def pays(images: Array, kernel: Array, strides: tuple[int, ...], padding: Padding) -> bool:
    """Whether this is such a convolution, and fewer products outweigh the sums, as measured on two cores."""
    return (
        kernel.shape[:2] == (3, 3)
        and strides == (1, 1)
        and max(map(max, padding)) <= 2
        and images.dtype == kernel.dtype == np.float32
        and min(kernel.shape[2:]) >= 32
        and min(images.shape[1:3]) >= 4
    )


def convolve(images: Array, kernel: Array, padding: Padding) -> Array:
    """The convolution with stride 1 of `[batch, height, width, channels]` by `[3, 3, channels, filters]`."""
    height, width, groups = _sizes(images, padding)
    sums = jnp.einsum("fk,rkcn->frcn", _COLUMNS, kernel, precision="highest").astype(kernel.dtype)
    sums = sums.reshape(6, -1, kernel.shape[-1])

    def block(some: Array) -> Array:
        products = [jnp.matmul(*pair) for pair in zip(_input_sums(some, padding), sums, strict=True)]
        rows = jnp.stack(_combined(_OUTPUTS, products), axis=3)
        return rows.reshape(len(some), height, 4 * groups, -1)[:, :, :width]

    number = len(images)
    size = _block_size(images, padding)
    blocks = _padded(images, size).reshape(-1, size, *images.shape[1:])
    return lax.map(block, blocks).reshape(-1, height, width, kernel.shape[-1])[:number]


def kernel_gradient(images: Array, gradient: Array, padding: Padding) -> Array:
    """The kernel's gradient, `[3, 3, channels, filters]`, by that of the convolution's result."""
    height, width, groups = _sizes(images, padding)
    size = _block_size(images, padding)
    images = _padded(images, size)
    gradient = jnp.pad(_padded(gradient, size), ((0, 0), (0, 0), (0, 4 * groups - width), (0, 0)))

    def products(start: int | Array) -> Array:
        some = lax.dynamic_slice_in_dim(images, start, size)
        of_some = lax.dynamic_slice_in_dim(gradient, start, size)
        fours = of_some.reshape(size, height, groups, 4, -1)
        of_products = _combined(_OUTPUTS.T, [fours[..., place, :] for place in range(4)])
        # As matrices: over three axes at once the product would be a plain loop.
        sums, of_sums = (
            [part.reshape(-1, part.shape[-1]).T for part in parts]
            for parts in (_input_sums(some, padding), of_products)
        )
        return jnp.stack([left @ right.T for left, right in zip(sums, of_sums, strict=True)])

    total, _ = lax.scan(
        lambda total, start: (total + products(start), None),
        products(0),
        jnp.arange(size, len(images), size),
    )
    total = total.reshape(6, 3, images.shape[-1], -1)
    return jnp.einsum("fk,frcn->rkcn", _COLUMNS, total, precision="highest").astype(total.dtype)


def _sizes(images: Array, padding: Padding) -> tuple[int, int, int]:
    """Height and width of the result, and groups of four in its width."""
    height, width = (size + sum(pad) - 2 for size, pad in zip(images.shape[1:3], padding, strict=True))
    return height, width, -(-width // 4)


def _input_sums(images: Array, padding: Padding) -> list[Array]:
    """`[batch, height, groups, 3 · channels]`: of three rows, each of the six sums for each group."""
    height, _, groups = _sizes(images, padding)
    rows, (left, _) = padding
    right = 4 * (groups + 1) - left - images.shape[2]
    padded = jnp.pad(images, ((0, 0), rows, (left, right), (0, 0)))
    fours = padded.reshape(*padded.shape[:2], groups + 1, 4, -1)
    six = [fours[:, :, :-1, place] for place in range(4)] + [fours[:, :, 1:, place] for place in range(2)]
    return [
        jnp.concatenate([part[:, row : row + height] for row in range(3)], axis=-1)
        for part in _combined(_INPUTS, six)
    ]


def _combined(matrix: np.ndarray, parts: list[Array]) -> list[Array]:
    """Sums of arrays by each row's coefficients, without the zeros."""
    return [
        sum(float(weight) * part for weight, part in zip(row, parts, strict=True) if weight)  # type: ignore[misc]
        for row in matrix
    ]


def _block_size(images: Array, padding: Padding) -> int:
    """Images in a block: what stays in the cache, and as near as can be a divisor of their number."""
    height, _, groups = _sizes(images, padding)
    one = 4 * 6 * 3 * height * groups * images.shape[-1]
    most = max(1, min(len(images), _BLOCK_BYTES // one))
    return max(range(-(-most // 2), most + 1), key=lambda size: (len(images) % size == 0, size))


def _padded(images: Array, size: int) -> Array:
    """With blank images to whole blocks."""
    missing = -len(images) % size
    return jnp.pad(images, ((0, missing), (0, 0), (0, 0), (0, 0))) if missing else images
