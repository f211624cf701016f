"""The networks of DeepCluster's deep dive: LeNet-5 and AlexNet, with batch normalisation."""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax

from sul_jax.nn._checkpoint import Saved
from sul_jax.nn.backbones import dropout
from sul_jax.nn.convolution import conv_general_dilated, max_pool


class _Convolution(NamedTuple):
    filters: int
    kernel_size: int
    strides: int
    padding: int
    pool: tuple[int, int] | None  # window and strides of the max pooling that follows


# Mustapha et al. 2022, section 3.2, for 32×32 images, and DeepCluster's own for 224×224.
_ALEXNETS = {
    "small": (
        _Convolution(48, 8, 3, 0, (2, 1)),
        _Convolution(126, 2, 1, 0, (2, 1)),
        _Convolution(192, 3, 1, 0, None),
        _Convolution(192, 2, 1, 0, None),
        _Convolution(128, 2, 1, 0, (2, 1)),
    ),
    "original": (
        _Convolution(96, 11, 4, 2, (3, 2)),
        _Convolution(256, 5, 1, 2, (3, 2)),
        _Convolution(384, 3, 1, 1, None),
        _Convolution(384, 3, 1, 1, None),
        _Convolution(256, 3, 1, 1, (3, 2)),
    ),
}
_LENET = (_Convolution(6, 5, 1, 0, (2, 2)), _Convolution(16, 5, 1, 0, (2, 2)))

# Pairs of channels below which XLA's CPU convolution is slower than a product with a banded matrix: about
# half as fast in LeNet-5's first layer.
_FEW = 128


def sobel(images: Array) -> Array:
    """Horizontal and vertical derivatives of the mean over channels; colour and brightness are gone.

    Args:
      images: `[batch, height, width, channels]`.

    Returns:
      `[batch, height, width, 2]`, zeros assumed around the image.

    Example:
      >>> import jax.numpy as jnp
      >>> from sul_jax import nn
      >>> nn.sobel(jnp.ones((1, 5, 5, 3)))[0, 2, 2].tolist()
      [0.0, 0.0]
    """
    across = np.array([[1, 0, -1], [2, 0, -2], [1, 0, -1]], np.float32)
    kernel = jnp.asarray(np.stack([across, across.T], axis=-1)[:, :, None], images.dtype)
    grey = jnp.mean(images, axis=-1, keepdims=True)
    return lax.conv_general_dilated(
        grey, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), precision="highest"
    )


class _ConvNet(Saved):
    """Convolutions, each with batch normalisation, ReLU and perhaps pooling; linear layers on top."""

    def __init__(
        self,
        layers: tuple[_Convolution, ...],
        hidden: tuple[int, ...],
        *,
        image_size: int,
        channels: int,
        use_sobel: bool,
        dropout: float,
        rngs: nnx.Rngs,
    ):
        self.use_sobel, self.dropout = use_sobel, dropout
        self.image_shape = (image_size, image_size, channels)
        self.pools = tuple(layer.pool for layer in layers)
        inputs, size = 2 if use_sobel else channels, image_size
        convolutions, norms = [], []
        for layer in layers:
            plain = layer.strides == 1 and not layer.padding
            banded = plain and inputs * layer.filters < _FEW and jax.default_backend() == "cpu"
            # Standard deviation √(2 / (kernel_size² · filters)), as the authors'.
            convolutions.append(
                nnx.Conv(
                    inputs,
                    layer.filters,
                    (layer.kernel_size,) * 2,
                    strides=layer.strides,
                    padding=((layer.padding,) * 2,) * 2,
                    conv_general_dilated=_banded if banded else conv_general_dilated,
                    kernel_init=nnx.initializers.normal((2 / (layer.kernel_size**2 * layer.filters)) ** 0.5),
                    rngs=rngs,
                )
            )
            norms.append(nnx.BatchNorm(layer.filters, momentum=0.9, epsilon=1e-5, rngs=rngs))
            inputs = layer.filters
            size = (size + 2 * layer.padding - layer.kernel_size) // layer.strides + 1
            if layer.pool is not None:
                size = (size - layer.pool[0]) // layer.pool[1] + 1
            if size < 1:
                raise ValueError(f"image_size={image_size} is not accepted: nothing is left of the image")
        self.convolutions, self.norms = nnx.List(convolutions), nnx.List(norms)
        sizes = (inputs * size**2, *hidden)
        self.hidden = nnx.List(
            [
                nnx.Linear(i, o, kernel_init=nnx.initializers.normal(0.01), rngs=rngs)
                for i, o in zip(sizes, hidden, strict=False)
            ]
        )
        self.num_features = hidden[-1]

    def layers(self, images: Array) -> dict[str, Array]:
        """What every convolution gives, `conv_1` … before and `relu_1` … after normalisation and ReLU.

        Args:
          images: `[batch, image_size, image_size, channels]`.

        Raises:
          ValueError: images of another size or number of channels.
        """
        if images.shape[1:] != self.image_shape:
            raise ValueError(f"images must have shape [batch, *{self.image_shape}], got {images.shape}")
        found = {}
        values = sobel(images) if self.use_sobel else images
        below = (None, *self.pools[:-1])
        parts = zip(below, self.convolutions, self.norms, strict=True)
        for index, (pool, convolution, norm) in enumerate(parts, 1):
            found[f"conv_{index}"] = convolution(_pool(values, pool))
            values = found[f"relu_{index}"] = jax.nn.relu(norm(found[f"conv_{index}"]))
        return found

    def __call__(self, images: Array, *, key: Array | None = None) -> Array:
        """Features before the last ReLU.

        Args:
          images: `[batch, image_size, image_size, channels]`.
          key: for dropout, which is left out without one.

        Returns:
          `[batch, num_features]`.
        """
        last = self.layers(images)[f"relu_{len(self.pools)}"]
        values = _pool(last, self.pools[-1]).reshape(images.shape[0], -1)
        for index, linear in enumerate(self.hidden):
            if index:
                values = jax.nn.relu(values)
            values = dropout(key, index, values, self.dropout)
            values = linear(values)
        return values


class LeNet5(_ConvNet):
    """LeNet-5 with batch normalisation, for 32×32 images: 6 and 16 filters, 120 and 84 units.

    `train()` and `eval()` switch between the statistics of the batch and the running ones, which of an
    untrained network change nothing.

    Attributes:
      num_features: 84.
    """

    def __init__(self, *, channels: int = 1, use_sobel: bool = False, rngs: nnx.Rngs):
        """Random weights.

        Args:
          channels: of the images.
          use_sobel: put `sobel` below the network.
          rngs: Flax's random number streams.

        Example:
          >>> import jax.numpy as jnp
          >>> from flax import nnx
          >>> from sul_jax import nn
          >>> net = nn.LeNet5(rngs=nnx.Rngs(0))
          >>> net(jnp.ones((2, 32, 32, 1))).shape
          (2, 84)
        """
        self.arguments = (("channels", channels), ("use_sobel", use_sobel))
        super().__init__(
            _LENET, (120, 84), image_size=32, channels=channels, use_sobel=use_sobel, dropout=0.0, rngs=rngs
        )


class AlexNet(_ConvNet):
    """AlexNet with batch normalisation and Sobel filters, as in DeepCluster.

    `train()` and `eval()` switch between the statistics of the batch and the running ones, which of an
    untrained network change nothing.

    Attributes:
      num_features: 1,024, or 4,096 of the original.
    """

    def __init__(
        self,
        variant: Literal["small", "original"] = "small",
        *,
        channels: int = 3,
        use_sobel: bool = True,
        rngs: nnx.Rngs,
    ):
        """Random weights.

        Args:
          variant: `"small"` for 32×32 images, `"original"` for 224×224.
          channels: of the images.
          use_sobel: put `sobel` below the network.
          rngs: Flax's random number streams.

        Raises:
          ValueError: unknown `variant`.

        Example:
          >>> import jax.numpy as jnp
          >>> from flax import nnx
          >>> from sul_jax import nn
          >>> net = nn.AlexNet(rngs=nnx.Rngs(0))
          >>> net(jnp.ones((2, 32, 32, 3))).shape
          (2, 1024)
        """
        if variant not in _ALEXNETS:
            raise ValueError(f"variant={variant!r} is not accepted: it must be one of {tuple(_ALEXNETS)}")
        self.arguments = (("variant", variant), ("channels", channels), ("use_sobel", use_sobel))
        size, units = (32, 1024) if variant == "small" else (224, 4096)
        super().__init__(
            _ALEXNETS[variant],
            (units, units),
            image_size=size,
            channels=channels,
            use_sobel=use_sobel,
            dropout=0.5,
            rngs=rngs,
        )


def _banded(images: Array, kernel: Array, *settings: Any, **options: Any) -> Array:
    """A convolution without padding, for `nnx.Conv`: a row of the result from the rows it depends on."""
    del settings, options  # strides of 1 and no padding, as `_ConvNet` sees to
    size, _, channels, filters = kernel.shape
    height, width = (side - size + 1 for side in images.shape[1:3])
    shift = np.arange(images.shape[2])[:, None] - np.arange(width)
    places = jnp.asarray(shift[..., None] == np.arange(size), kernel.dtype)
    matrix = jnp.einsum("vwj,ijcf->ivcwf", places, kernel, precision="highest")
    matrix = matrix.reshape(size * images.shape[2] * channels, width * filters)
    flat = images.reshape(*images.shape[:2], -1)
    rows = jnp.concatenate([flat[:, i : i + height] for i in range(size)], axis=-1)
    return jnp.matmul(rows, matrix, precision="highest").reshape(len(images), height, width, filters)


def _pool(values: Array, pool: tuple[int, int] | None) -> Array:
    return values if pool is None else max_pool(values, *pool)
