"""Images as estimators are given them: flattened or not, bytes or floats on a scale of their own."""

import operator
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

# Values of a row from which on it has to be said whether it is an image; scikit-learn's checks give fewer.
_IMAGE = 64


class Images(NamedTuple):
    """Flattened images of any type, and how they are to be seen."""

    rows: np.ndarray  # [num_images, features]
    shape: tuple[int, int, int]
    size: int
    scale: float

    def take(self, indices: np.ndarray) -> Array:
        """Images `[*indices.shape, size, size, channels]` in float32."""
        return _seen(jnp.asarray(self.rows[indices]), self.scale, shape=self.shape, size=self.size)


@partial(jax.jit, static_argnames=("shape", "size"))
def _seen(rows: Array, scale: float, *, shape: tuple[int, int, int], size: int) -> Array:
    missing = int(np.prod(shape)) - rows.shape[-1]
    flat = rows.reshape(-1, rows.shape[-1])
    images = jnp.pad(flat.astype(jnp.float32) / scale, ((0, 0), (0, missing))).reshape(-1, *shape)
    seen = jax.image.resize(images, (len(flat), size, size, shape[2]), "linear")
    return seen.reshape(*rows.shape[:-1], *seen.shape[1:])


def shape_of(
    given: tuple[int, ...] | None, own: tuple[int, ...] | None, num_features: int
) -> tuple[int, int, int]:
    """Height, width and channels of images.

    Args:
      given: by the user, or None.
      own: the images' own, or None where they are rows.
      num_features: values of a row.

    Raises:
      ValueError: shapes that contradict each other or the number of values, channels that come first, or rows
        of 64 values or more without a shape.
    """
    if given is None and own is None:
        if num_features >= _IMAGE:
            raise ValueError(
                f"X has rows of {num_features} values. If they are images, give image_shape=(height, width) "
                "or (height, width, channels), or X in that shape. If they are vectors such as embeddings, "
                "take KMeans, KSubspaces, RateReductionClustering or HebbianFeatures from sul_jax.estimators"
            )
        side = int(np.ceil(np.sqrt(num_features)))  # the smallest square that holds so few, row by row
        return side, side, 1
    try:
        shape = tuple(operator.index(n) for n in (own if given is None else given) or ())
    except TypeError:  # neither numbers nor something that has some
        shape = ()
    shape += (1,) * (len(shape) == 2)
    if len(shape) != 3 or int(np.prod(shape)) != num_features:
        raise ValueError(
            f"image_shape={given!r} does not fit images of {num_features} values; it must be "
            "(height, width) or (height, width, channels)"
        )
    if given is None and shape[0] in (1, 3, 4) and min(shape[1:]) > 4:
        raise ValueError(
            f"images of shape {shape} seem to have their channels first; they come last here. "
            f"If they do, give image_shape={shape}"
        )
    if given is not None and own is not None and shape != own:
        raise ValueError(f"image_shape={given!r} does not fit images of shape {own}")
    return shape[0], shape[1], shape[2]
