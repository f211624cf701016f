"""The networks of DeepCluster's deep dive: LeNet-5 and AlexNet, with batch normalisation.

Inside, the batch is the last axis, `[channels, height, width, batch]`: their maps are small, and a CPU then
normalises and pools long rows of numbers.
"""

from functools import reduce
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from sul_jax._check import check_images
from sul_jax.nn._saved import Saved
from sul_jax.nn.backbones import dropout
from sul_jax.nn.convolution import conv_general_dilated, max_pool


class _Convolution(NamedTuple):
    filters: int
    kernel_size: int
    strides: int
    padding: int
    pool: tuple[int, int] | None  # window and strides of the max pooling that follows

    def size_of_result(self, size: int) -> int:
        """Before pooling."""
        return (size + 2 * self.padding - self.kernel_size) // self.strides + 1


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

# On a CPU: pairs of channels below which a product with a banded matrix is faster than one with patches, and
# numbers in an image's patches above which XLA's convolution takes less memory.
_FEW, _LARGE = 128, 2**16

# Horizontal and vertical derivatives.
_SOBEL = np.stack([across := np.outer([1, 2, 1], [1, 0, -1]), across.T], axis=-1).astype(np.float32)


class Fixed(nnx.Variable):  # type: ignore[misc, type-arg]
    """Values that belong to a network and are not learned."""


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
    images = check_images("images", images)
    grey = jnp.full(images.shape[3], 1 / images.shape[3], images.dtype)
    return _swapped(_edges(_swapped(images), grey, jnp.asarray(_SOBEL, images.dtype)))


class _ConvNet(Saved):
    """Convolutions, each with batch normalisation, ReLU and perhaps pooling; linear layers on top."""

    axis_name: str | None = None  # over which batches are split, for dropout

    def __init__(
        self,
        layers: tuple[_Convolution, ...],
        hidden: tuple[int, ...],
        *,
        image_size: int,
        channels: int,
        use_sobel: bool | Literal["random"],
        dropout: float,
        rngs: nnx.Rngs,
    ):
        if use_sobel not in (True, False, "random"):
            raise ValueError(f"use_sobel={use_sobel!r} is not accepted: it must be True, False or 'random'")
        self.use_sobel = use_sobel if use_sobel == "random" else bool(use_sobel)
        self.dropout = dropout
        if use_sobel == "random":
            # The standard deviations of the convolutions below.
            self.grey = Fixed(2**0.5 * jax.random.normal(rngs.params(), (channels,)))
            self.edges = Fixed(jax.random.normal(rngs.params(), _SOBEL.shape) / 3)
        self.image_shape = (image_size, image_size, channels)
        self.specifications = layers
        inputs, size = 2 if use_sobel else channels, image_size
        convolutions, norms = [], []
        for layer in layers:
            # Standard deviation √(2 / (kernel_size² · filters)), as the authors'.
            convolutions.append(
                nnx.Conv(
                    inputs,
                    layer.filters,
                    (layer.kernel_size,) * 2,
                    strides=layer.strides,
                    padding=((layer.padding,) * 2,) * 2,
                    kernel_init=nnx.initializers.normal((2 / (layer.kernel_size**2 * layer.filters)) ** 0.5),
                    rngs=rngs,
                )
            )
            norms.append(nnx.BatchNorm(layer.filters, axis=0, momentum=0.9, epsilon=1e-5, rngs=rngs))
            inputs = layer.filters
            size = layer.size_of_result(size)
            if layer.pool is not None:
                size = (size - layer.pool[0]) // layer.pool[1] + 1
            if size < 1:
                raise ValueError(f"image_size={image_size} is not accepted: nothing is left of the image")
        self.convolutions, self.norms = nnx.data(convolutions), nnx.data(norms)
        sizes = (inputs * size**2, *hidden)
        self.hidden = nnx.data(
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
          TypeError: images that are not floating point.
        """
        return {name: _swapped(values) for name, values in self._planes(images).items()}

    def _planes(self, images: Array) -> dict[str, Array]:
        """`layers` as they are computed, `[channels, height, width, batch]`."""
        images = check_images("images", images)
        if images.shape[1:] != self.image_shape:
            raise ValueError(f"images must have shape [batch, *{self.image_shape}], got {images.shape}")
        layers = {}
        values = _swapped(sobel(images) if self.use_sobel is True else images)
        if self.use_sobel == "random":
            values = _edges(values, self.grey[...], self.edges[...])
        pool = None
        parts = zip(self.specifications, self.convolutions, self.norms, strict=True)
        for index, (layer, convolution, norm) in enumerate(parts, 1):
            layers[f"conv_{index}"] = _convolve(layer, convolution, _pool(values, pool))
            values = layers[f"relu_{index}"] = jax.nn.relu(norm(layers[f"conv_{index}"]))
            pool = layer.pool
        return layers

    def __call__(self, images: Array, *, key: Array | None = None) -> Array:
        """Features before the last ReLU.

        Args:
          images: `[batch, image_size, image_size, channels]`.
          key: for dropout, which is left out without one.

        Returns:
          `[batch, num_features]`.

        Raises:
          ValueError: images of another size or number of channels.
          TypeError: images that are not floating point.
        """
        last = self._planes(images)[f"relu_{len(self.specifications)}"]
        values = _swapped(_pool(last, self.specifications[-1].pool)).reshape(images.shape[0], -1)
        for index, linear in enumerate(self.hidden):
            if index:
                values = jax.nn.relu(values)
            values = dropout(key, index, values, self.dropout, axis_name=self.axis_name)
            values = linear(values)
        return values


class LeNet5(_ConvNet):
    """LeNet-5 with batch normalisation, for 32×32 images: 6 and 16 filters, 120 and 84 units.

    `train()` and `eval()` switch between the statistics of the batch and the running ones; those of an
    untrained network are 0 and 1, so that nothing is normalised.

    Attributes:
      num_features: 84.
    """

    def __init__(self, *, channels: int = 1, use_sobel: bool | Literal["random"] = False, rngs: nnx.Rngs):
        """Random weights.

        Args:
          channels: of the images.
          use_sobel: True puts `sobel` below the network, False nothing. `"random"` puts channels mixed by
            normal weights (standard deviation √2) and two 3×3 filters (1/3) there, drawn from `rngs`; they
            are no `nnx.Param`, stay as they are and are saved with the network. The code of Mustapha et al.
            has them, since it initialises its Sobel filters anew with the rest.
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

    `train()` and `eval()` switch between the statistics of the batch and the running ones; those of an
    untrained network are 0 and 1, so that nothing is normalised.

    Attributes:
      num_features: 1,024, or 4,096 of the original.
    """

    def __init__(
        self,
        variant: Literal["small", "original"] = "small",
        *,
        channels: int = 3,
        use_sobel: bool | Literal["random"] = True,
        rngs: nnx.Rngs,
    ):
        """Random weights.

        Args:
          variant: `"small"` for 32×32 images, `"original"` for 224×224.
          channels: of the images.
          use_sobel: True puts `sobel` below the network, False nothing. `"random"` puts channels mixed by
            normal weights (standard deviation √2) and two 3×3 filters (1/3) there, drawn from `rngs`; they
            are no `nnx.Param`, stay as they are and are saved with the network. The code of Mustapha et al.
            has them, since it initialises its Sobel filters anew with the rest.
          rngs: Flax's random number streams.

        Raises:
          ValueError: unknown `variant` or `use_sobel`.

        Example:
          >>> import jax.numpy as jnp
          >>> from flax import nnx
          >>> from sul_jax import nn
          >>> net = nn.AlexNet(rngs=nnx.Rngs(0))
          >>> nnx.jit(lambda net, images: net(images))(net, jnp.ones((2, 32, 32, 3))).shape
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


def _swapped(values: Array) -> Array:
    """The batch last instead of first, or first again."""
    return jnp.swapaxes(values, 0, 3)


def _edges(planes: Array, grey: Array, filters: Array) -> Array:
    """Weighted channels filtered by `[3, 3, 2]`, zeros assumed around the image."""
    height, width = planes.shape[1:3]
    flat = jnp.pad(jnp.sum(grey[:, None, None, None] * planes, 0), ((1, 1), (1, 1), (0, 0)))
    places = [(row, column) for row in range(3) for column in range(3)]
    parts = (filters[i, j][:, None, None, None] * flat[i : i + height, j : j + width] for i, j in places)
    return reduce(jnp.add, parts)


def _convolve(layer: _Convolution, values: nnx.Conv, planes: Array) -> Array:
    """A convolution of `[channels, height, width, batch]` by the kernel and bias that Flax keeps."""
    assert values.bias is not None
    kernel, bias = values.kernel[...], values.bias[...]
    stride, padding = layer.strides, (layer.padding,) * 2
    height, width = (layer.size_of_result(side) for side in planes.shape[1:3])
    if jax.default_backend() != "cpu" or kernel[..., 0].size * height * width > _LARGE:
        images = conv_general_dilated(_swapped(planes), kernel, (stride,) * 2, (padding,) * 2)
        return _swapped(images + bias)
    planes = jnp.pad(planes, ((0, 0), padding, padding, (0, 0)))
    product = _banded if len(planes) * layer.filters < _FEW else _by_patches
    return product(planes, kernel, stride, (height, width)) + bias[:, None, None, None]


def _by_patches(planes: Array, kernel: Array, stride: int, shape: tuple[int, int]) -> Array:
    """One product with all patches."""
    height, width = shape
    windows = [
        planes[:, row::stride, column::stride][:, :height, :width]
        for row in range(len(kernel))
        for column in range(len(kernel))
    ]
    flat = kernel.reshape(-1, kernel.shape[3])
    patches = jnp.concatenate(windows).reshape(len(flat), -1)
    return jnp.matmul(flat.T, patches, precision="highest").reshape(-1, height, width, planes.shape[3])


def _banded(planes: Array, kernel: Array, stride: int, shape: tuple[int, int]) -> Array:
    """A product for each row of the result, with the rows that it depends on."""
    size, _, channels, filters = kernel.shape
    height, width = shape
    shift = np.arange(planes.shape[2])[:, None] - stride * np.arange(width)
    places = jnp.asarray(shift[..., None] == np.arange(size), kernel.dtype)
    matrix = jnp.einsum("vwj,ijcf->fwciv", places, kernel, precision="highest")
    matrix = matrix.reshape(filters * width, channels * size * planes.shape[2])
    starts = range(0, height * stride, stride)
    rows = [planes[:, start : start + size].reshape(matrix.shape[1], -1) for start in starts]
    products = [jnp.matmul(matrix, row, precision="highest") for row in rows]
    return jnp.stack([product.reshape(filters, width, -1) for product in products], axis=1)


def _pool(values: Array, pool: tuple[int, int] | None) -> Array:
    return values if pool is None else max_pool(values, *pool)
