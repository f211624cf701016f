"""Random image transformations on the device, one draw for every image.

Each takes a key and floating images `[batch, height, width, channels]` with values in [0, 1], and can
stand inside `jit` and `scan`: a batch is transformed at once, nothing returns to the host.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from sul_jax._check import check_floating, check_images, check_integer, check_number

Transformation = Callable[[Array], Array]


def _turned(quarters: int, flip: bool) -> Transformation:
    def transform(images: Array) -> Array:
        turned = jnp.rot90(images, quarters, axes=(1, 2))
        return turned[:, :, ::-1] if flip else turned

    return transform


# The eight symmetries of the square (Kilinc & Uysal 2018, eq. 15, in the order of their code): turned by 0 to
# 3 quarters counter-clockwise, then the same mirrored. Only square images keep their shape.
FLIPS_AND_ROTATIONS = tuple(_turned(quarters, flip) for flip in (False, True) for quarters in range(4))

# ITU-R 601 luma, as in Pillow and torchvision.
_LUMA = (0.299, 0.587, 0.114)


def gaussian_noise(key: Array, images: Array, *, scale: float | Array) -> Array:
    """Adds Gaussian noise; values may leave [0, 1].

    Args:
      key: `jax.random.key`.
      images: any floating array.
      scale: standard deviation.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from sul_jax import augment
      >>> augment.gaussian_noise(jax.random.key(0), jnp.ones((2, 8, 8, 1)), scale=0.1).shape
      (2, 8, 8, 1)
    """
    images = check_floating("images", images)
    return images + scale * jax.random.normal(key, images.shape, images.dtype)


def horizontal_flip(key: Array, images: Array, *, probability: float | Array = 0.5) -> Array:
    """Mirrors left and right.

    Args:
      key: `jax.random.key`.
      images: `[batch, height, width, channels]`.
      probability: of an image being flipped.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from sul_jax import augment
      >>> row = jnp.arange(3.0).reshape(1, 1, 3, 1)
      >>> augment.horizontal_flip(jax.random.key(0), row, probability=1.0).ravel().tolist()
      [2.0, 1.0, 0.0]
    """
    images = check_images("images", images)
    return jnp.where(_chosen(key, images, probability), images[:, :, ::-1], images)


def random_transformation(
    key: Array, images: Array, *, transformations: Sequence[Transformation] = ()
) -> tuple[Array, Array]:
    """Transforms each image in one of several ways and says in which: pseudo supervision's labels.

    Args:
      key: `jax.random.key`.
      images: `[batch, height, width, channels]`.
      transformations: functions of a batch of images that keep its shape; by default `FLIPS_AND_ROTATIONS`.

    Returns:
      The images, and int32 `[batch]`, the places of their transformations in the list, drawn uniformly.

    Raises:
      ValueError: a transformation changes the shape.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from sul_jax import augment
      >>> images = jnp.arange(4.0).reshape(1, 2, 2, 1)
      >>> turned, label = augment.random_transformation(jax.random.key(0), images)
      >>> bool((turned == augment.FLIPS_AND_ROTATIONS[label[0]](images)).all())
      True
    """
    images = check_images("images", images)
    ways = tuple(transformations) or FLIPS_AND_ROTATIONS
    labels = jax.random.randint(key, (images.shape[0],), 0, len(ways), jnp.int32)
    changed = images
    # Each for the whole batch: much cheaper than a program per image, for what only moves pixels.
    for index, way in enumerate(ways):
        turned = way(images)
        if turned.shape != images.shape:
            raise ValueError(
                f"transformations[{index}] makes images of shape {turned.shape} from {images.shape}; it must "
                "keep the shape"
            )
        changed = jnp.where((labels == index)[:, None, None, None], turned, changed)
    return changed, labels


def random_resized_crop(
    key: Array,
    images: Array,
    *,
    size: tuple[int, int] | None = None,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Array:
    """Cuts out a random rectangle and resizes it, bilinear with antialiasing.

    Args:
      key: `jax.random.key`.
      images: `[batch, height, width, channels]`.
      size: height and width of the result; by default those of the images.
      scale: smallest and largest share of the area.
      ratio: smallest and largest aspect ratio, width over height; drawn uniformly in its logarithm.

    Returns:
      `[batch, *size, channels]`. Of ten random rectangles the first that fits into the image is taken; where
      none does, the largest in the middle that has an accepted aspect ratio.

    Raises:
      ValueError: an interval out of order or not positive.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from sul_jax import augment
      >>> crops = augment.random_resized_crop(jax.random.key(0), jnp.ones((2, 9, 9, 3)), size=(5, 5))
      >>> crops.shape, round(crops.min().item(), 5)
      ((2, 5, 5, 3), 1.0)
    """
    images = check_images("images", images)
    for name, (low, high) in {"scale": scale, "ratio": ratio}.items():
        if not 0 < low <= high:
            raise ValueError(f"{name}=({low}, {high}) is not accepted: it must be 0 < low <= high")
    batch, height, width, _ = images.shape
    keys = jax.random.split(key, 4)
    tries = (10, batch)
    area = jax.random.uniform(keys[0], tries, minval=scale[0], maxval=scale[1]) * height * width
    log_low, log_high = jnp.log(jnp.array(ratio))
    aspect = jnp.exp(jax.random.uniform(keys[1], tries, minval=log_low, maxval=log_high))
    tall, wide = jnp.sqrt(area / aspect), jnp.sqrt(area * aspect)
    slack = 1 + 1e-6  # for rounding
    fits = (tall <= height * slack) & (wide <= width * slack)
    any_fits, first = jnp.any(fits, axis=0), jnp.argmax(fits, axis=0)[None]

    def chosen(sides: Array, side: int, widest: float) -> Array:
        own = jnp.take_along_axis(sides, first, axis=0)[0]
        return jnp.where(any_fits, jnp.clip(own, 1, side), min(side, widest))

    tall, wide = chosen(tall, height, width / ratio[0]), chosen(wide, width, height * ratio[1])
    top, left = (jnp.where(any_fits, jax.random.uniform(k, (batch,)), 0.5) for k in keys[2:])
    top, left = top * (height - tall), left * (width - wide)
    out_height, out_width = (height, width) if size is None else size
    dtype = jnp.result_type(images)
    rows = _resize_weights(top, tall, height, out_height, dtype)
    columns = _resize_weights(left, wide, width, out_width, dtype)
    # Two small products an image instead of a gather: fast on CPUs and GPUs alike.
    stretched = jnp.einsum("boh,bhwc->bowc", rows, images, precision="highest")
    return jnp.einsum("bpw,bowc->bopc", columns, stretched, precision="highest")


def color_jitter(
    key: Array,
    images: Array,
    *,
    brightness: float = 0.0,
    contrast: float = 0.0,
    saturation: float = 0.0,
    hue: float = 0.0,
    probability: float | Array = 1.0,
) -> Array:
    """Random brightness, contrast, saturation and hue, in this order.

    Each strength s but hue's draws a factor from [max(0, 1 − s), 1 + s]; hue draws a turn of the colour
    circle from [−hue, hue]. Saturation and hue leave images with one channel unchanged.

    Args:
      key: `jax.random.key`.
      images: `[batch, height, width, channels]` in [0, 1], one or three channels.
      brightness: strength.
      contrast: strength, around the image's mean luma.
      saturation: strength.
      hue: at most 0.5.
      probability: of an image being changed at all.

    Returns:
      An array of the same shape in [0, 1].

    Raises:
      ValueError: neither one nor three channels, a negative strength, or hue above 0.5.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from sul_jax import augment
      >>> gray = jnp.full((2, 4, 4, 1), 0.5)
      >>> augment.color_jitter(jax.random.key(0), gray, brightness=0.4).shape
      (2, 4, 4, 1)
    """
    images = _check_color(images)
    for name, strength in {"brightness": brightness, "contrast": contrast, "saturation": saturation}.items():
        check_number(name, strength, low=0)
    check_number("hue", hue, low=0, high=0.5)
    keys = jax.random.split(key, 5)

    def factor(index: int, strength: float) -> Array:
        shape = (images.shape[0], 1, 1, 1)
        return jax.random.uniform(keys[index], shape, minval=max(0.0, 1 - strength), maxval=1 + strength)

    changed = images
    if brightness:
        changed = jnp.clip(changed * factor(0, brightness), 0, 1)
    if contrast:
        mean = jnp.mean(_luma(changed), axis=(1, 2, 3), keepdims=True)
        changed = jnp.clip(mean + (changed - mean) * factor(1, contrast), 0, 1)
    if saturation and images.shape[-1] == 3:
        gray = _luma(changed)
        changed = jnp.clip(gray + (changed - gray) * factor(2, saturation), 0, 1)
    if hue and images.shape[-1] == 3:
        turn = jax.random.uniform(keys[3], (images.shape[0], 1, 1), minval=-hue, maxval=hue)
        changed = _turn_hue(changed, turn)
    return jnp.where(_chosen(keys[4], images, probability), changed, images).astype(images.dtype)


def grayscale(key: Array, images: Array, *, probability: float | Array = 1.0) -> Array:
    """Replaces all three channels by the luma.

    Args:
      key: `jax.random.key`.
      images: `[batch, height, width, channels]`, one or three channels.
      probability: of an image being changed.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from sul_jax import augment
      >>> red = jnp.array([1.0, 0.0, 0.0]).reshape(1, 1, 1, 3)
      >>> [round(v, 3) for v in augment.grayscale(jax.random.key(0), red).ravel().tolist()]
      [0.299, 0.299, 0.299]
    """
    images = _check_color(images)
    return jnp.where(_chosen(key, images, probability), _luma(images), images)


def random_perspective(
    key: Array, images: Array, *, distortion: float, probability: float | Array = 0.5
) -> Array:
    """Moves the four corners inwards by random amounts and fills the rest with zeros, bilinear.

    Args:
      key: `jax.random.key`.
      images: `[batch, height, width, channels]`.
      distortion: largest shift of a corner as a share of half the side, in [0, 1].
      probability: of an image being changed.

    Returns:
      An array of the same shape.

    Raises:
      ValueError: `distortion` out of range, or images a single pixel high or wide.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from sul_jax import augment
      >>> images = jnp.ones((2, 8, 8, 1))
      >>> augment.random_perspective(jax.random.key(0), images, distortion=0.3).shape
      (2, 8, 8, 1)
    """
    images = check_images("images", images)
    if not 0 <= distortion <= 1:
        raise ValueError(f"distortion={distortion} is not accepted: it must be between 0 and 1")
    batch, height, width, _ = images.shape
    if min(height, width) < 2:
        raise ValueError(f"images has shape {tuple(images.shape)}: sides of at least 2 pixels are needed")
    corner_key, chosen_key = jax.random.split(key)
    corners = jnp.array([[[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]]])
    extent = jnp.array([[[height - 1.0, width - 1.0]]])
    inwards = (1 - 2 * corners) * jax.random.uniform(corner_key, (batch, 4, 2)) * distortion / 2
    targets = (corners + inwards) * extent
    sides = (jnp.arange(side, dtype=float) for side in (height, width))
    positions = jnp.stack(jnp.meshgrid(*sides, indexing="ij"), -1)
    homogeneous = jnp.concatenate([positions, jnp.ones((height, width, 1))], -1).reshape(-1, 3)

    def warp(image: Array, target: Array) -> Array:
        source = jnp.matmul(homogeneous, _homography(target, (corners * extent)[0]).T, precision="highest")
        return _bilinear(image, source[:, :2] / source[:, 2:]).reshape(image.shape)

    warped = jax.vmap(warp)(images, targets)
    return jnp.where(_chosen(chosen_key, images, probability), warped, images).astype(images.dtype)


def gaussian_blur(
    key: Array, images: Array, *, kernel_size: int = 9, sigma: tuple[float, float] = (0.1, 2.0)
) -> Array:
    """Blurs each image by a Gaussian of its own random width; borders are mirrored.

    Args:
      key: `jax.random.key`.
      images: `[batch, height, width, channels]`, sides longer than half the kernel.
      kernel_size: odd side of the kernel in pixels.
      sigma: smallest and largest standard deviation in pixels, above 0.

    Returns:
      An array of the same shape.

    Raises:
      ValueError: an even or too large `kernel_size`, or `sigma` out of range.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from sul_jax import augment
      >>> dot = jnp.zeros((1, 15, 15, 1)).at[0, 7, 7, 0].set(1.0)
      >>> blurred = augment.gaussian_blur(jax.random.key(0), dot, sigma=(1.0, 1.0))
      >>> round(float(blurred.sum()), 3), round(float(blurred.max()), 3)
      (1.0, 0.159)
    """
    images = check_images("images", images)
    check_integer("kernel_size", kernel_size, low=1, high=2 * min(images.shape[1:3]) - 1)
    if kernel_size % 2 == 0:
        raise ValueError(f"kernel_size={kernel_size} is not accepted: it must be odd")
    if not 0 < sigma[0] <= sigma[1]:
        raise ValueError(f"sigma={sigma} is not accepted: it must be (low, high), 0 < low <= high")
    radius = kernel_size // 2
    widths = jax.random.uniform(key, (images.shape[0], 1), minval=sigma[0], maxval=sigma[1])
    weights = jnp.exp(-jnp.square(jnp.arange(-radius, radius + 1.0)[None] / widths) / 2)
    weights = (weights / jnp.sum(weights, axis=1, keepdims=True)).astype(images.dtype)
    for axis in (1, 2):
        side = images.shape[axis]
        mirrored = jnp.pad(
            images, [(radius, radius) if a == axis else (0, 0) for a in range(4)], mode="reflect"
        )
        shifted = (
            weights[:, i, None, None, None] * lax.slice_in_dim(mirrored, i, i + side, axis=axis)
            for i in range(kernel_size)
        )
        images = sum(shifted, start=jnp.zeros_like(images))
    return images


def random_view(
    key: Array,
    images: Array,
    *,
    scale: tuple[float, float] = (0.08, 1.0),
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.1),
    blur: int | None = None,
) -> Array:
    """A random view of colour images: cropped, flipped, of changed colours, and sometimes gray.

    The transformations are those of Li et al. (2022), the default strengths their code's for CIFAR; for
    larger images it has `jitter=(0.8, 0.8, 0.8, 0.2), blur=9`.

    Args:
      key: `jax.random.key`.
      images: `[batch, height, width, 3]` in [0, 1]; with one channel colours have no part.
      scale: smallest and largest share of the area that is kept.
      jitter: brightness, contrast, saturation and hue, as in `color_jitter`.
      blur: kernel size of a final `gaussian_blur`; none if None.

    Returns:
      An array of the same shape.

    Raises:
      ValueError: images of another number of channels than 1 or 3.

    Example:
      >>> import jax
      >>> from sul_jax import augment
      >>> images = jax.random.uniform(jax.random.key(0), (2, 8, 8, 3))
      >>> augment.random_view(jax.random.key(1), images).shape
      (2, 8, 8, 3)
    """
    keys = jax.random.split(key, 4)
    changed = random_resized_crop(keys[0], images, scale=scale)
    changed = horizontal_flip(keys[1], changed)
    brightness, contrast, saturation, hue = jitter
    changed = color_jitter(
        keys[2],
        changed,
        brightness=brightness,
        contrast=contrast,
        saturation=saturation,
        hue=hue,
        probability=0.8,
    )
    changed = grayscale(keys[3], changed, probability=0.2)
    return changed if blur is None else gaussian_blur(jax.random.fold_in(key, 4), changed, kernel_size=blur)


def _chosen(key: Array, images: Array, probability: float | Array) -> Array:
    return jax.random.uniform(key, (images.shape[0], 1, 1, 1)) < probability


def _check_color(images: Any) -> Array:
    images = check_images("images", images)
    if images.shape[-1] not in (1, 3):
        raise ValueError(f"images has {images.shape[-1]} channels; 1 or 3 are accepted")
    return images


def _luma(images: Array) -> Array:
    if images.shape[-1] == 1:
        return images
    return jnp.sum(images * jnp.array([[[_LUMA]]], images.dtype), axis=-1, keepdims=True)


def _turn_hue(images: Array, turn: Array) -> Array:
    """Shifts the hue by `turn` of a full circle at the same saturation and value (HSV)."""
    high, low = jnp.max(images, axis=-1), jnp.min(images, axis=-1)
    chroma = high - low
    safe = jnp.where(chroma > 0, chroma, 1)
    red, green, blue = jnp.moveaxis(images, -1, 0)
    # Which channel is the largest, not which equals `high`: in a compiled program the two may be computed
    # apart and differ in the last bit. Between near ties the formulas agree.
    sector = jnp.where(
        (red >= green) & (red >= blue),
        (green - blue) / safe,
        jnp.where(green >= blue, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    # The same numbers as by `%`, which is slow on floats.
    hue = sector / 6 + turn
    hue = hue - jnp.floor(hue)
    distance = jnp.array([[[[5.0, 3.0, 1.0]]]]) + 6 * hue[..., None]
    distance = jnp.where(distance >= 6, distance - 6, distance)
    fall = jnp.clip(jnp.minimum(distance, 4 - distance), 0, 1)
    return high[..., None] - chroma[..., None] * fall


def _resize_weights(start: Array, length: Array, size: int, out_size: int, dtype: jnp.dtype) -> Array:
    """Bilinear weights `[batch, out_size, size]` that stretch [start, start + length) to `out_size`."""
    step = (length / out_size)[:, None, None]
    centre = start[:, None, None] + (jnp.arange(out_size, dtype=float)[None, :, None] + 0.5) * step
    reach = jnp.maximum(step, 1)  # shrinking averages over what falls together
    pixel = jnp.arange(size, dtype=float)[None, None]
    distance = jnp.abs(pixel + 0.5 - centre) / reach
    inside = (pixel + 1 > start[:, None, None]) & (pixel < (start + length)[:, None, None])
    weights = jnp.where(inside, jnp.maximum(1 - distance, 0), 0)
    return (weights / jnp.maximum(jnp.sum(weights, axis=-1, keepdims=True), 1e-6)).astype(dtype)


def _homography(sources: Array, targets: Array) -> Array:
    """The 3×3 projective map of four points `[4, 2]` onto four others."""
    (a, b), (u, v) = sources.T, targets.T
    one, zero = jnp.ones(4), jnp.zeros(4)
    first = jnp.stack([a, b, one, zero, zero, zero, -a * u, -b * u], axis=1)
    second = jnp.stack([zero, zero, zero, a, b, one, -a * v, -b * v], axis=1)
    coefficients = jnp.linalg.solve(jnp.concatenate([first, second]), jnp.concatenate([u, v]))
    return jnp.append(coefficients, 1.0).reshape(3, 3)


def _bilinear(image: Array, places: Array) -> Array:
    """Values of `image` at fractional (row, column) places `[num, 2]`; zero outside."""
    height, width, _ = image.shape
    low = jnp.floor(places)
    share = places - low
    low = low.astype(jnp.int32)
    total = jnp.zeros((places.shape[0], image.shape[2]), image.dtype)
    for row in (0, 1):
        for column in (0, 1):
            y, x = low[:, 0] + row, low[:, 1] + column
            weight = jnp.abs(1 - row - share[:, 0]) * jnp.abs(1 - column - share[:, 1])
            inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
            value = image[jnp.clip(y, 0, height - 1), jnp.clip(x, 0, width - 1)]
            total = total + jnp.where(inside, weight, 0)[:, None] * value
    return total
