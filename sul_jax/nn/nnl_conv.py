"""Blocks of convolutional filters side by side, with normalised non-linear responses or plain ones."""

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from sul_jax import hebbian
from sul_jax._check import check_array, check_images
from sul_jax.nn._saved import Saved
from sul_jax.nn.convolution import conv_general_dilated, max_pool

Response = Literal["nnl", "relu"]


class NNLBlock(NamedTuple):
    """Sizes of a block.

    Attributes:
      kernel_size: W, side of the filters in pixels.
      num_units: K, number of filters.
      power: n of the response ReLU(cosine)^n; of no account for plain responses.
      pool: side of the windows of which the largest response is kept.
      pool_stride: distance of neighbouring windows.
    """

    kernel_size: int
    num_units: int
    power: float
    pool: int
    pool_stride: int = 2


class NNLConv(Saved):
    """Blocks of filters, each pooled, under one softmax layer (Grinberg, Hopfield & Krotov 2019, figure 2).

    With the response `"nnl"` the filters are weights that `hebbian.update` learned and the response to a
    patch is ReLU(cosine)^n (eq. 3); gradients are not meant for them. With `"relu"` it is the paper's twin:
    convolutions with biases and ReLU, trained end to end.

    Attributes:
      image_shape: height, width, channels.
      blocks: the sizes.
      response: `"nnl"` or `"relu"`.
      num_features: size of the pooled responses of all blocks.
      filters: of each block, `[num_units, kernel_size² · channels]`.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        blocks: Sequence[NNLBlock],
        *,
        num_classes: int,
        response: Response = "nnl",
        rngs: nnx.Rngs,
    ):
        """Random filters: standard normal for `"nnl"`, as `hebbian.init`, He's for `"relu"`.

        Args:
          image_shape: height, width, channels.
          blocks: at least one.
          num_classes: of the softmax layer.
          response: `"nnl"` or `"relu"`.
          rngs: Flax's random number streams.

        Raises:
          ValueError: no block, an unknown response, sizes below 1, a power that is not positive, or a block
            whose windows do not fit the image.

        Example:
          >>> import jax.numpy as jnp
          >>> from flax import nnx
          >>> from sul_jax import nn
          >>> blocks = [nn.NNLBlock(4, 30, 40, 11), nn.NNLBlock(6, 20, 30, 9)]
          >>> net = nn.NNLConv((32, 32, 3), blocks, num_classes=10, rngs=nnx.Rngs(0))
          >>> images = jnp.ones((2, 32, 32, 3))
          >>> nnx.jit(net)(images).shape, net.num_features
          ((2, 10), 5000)
        """
        if not blocks:
            raise ValueError("blocks is empty: at least one is needed")
        if response not in get_args(Response):
            raise ValueError(f"response={response!r} is not accepted: it must be 'nnl' or 'relu'")
        height, width, channels = image_shape
        self.image_shape, self.response = (height, width, channels), response
        self.blocks = tuple(NNLBlock(*block) for block in blocks)
        self.arguments = (
            ("image_shape", self.image_shape),
            ("blocks", self.blocks),
            ("num_classes", num_classes),
            ("response", response),
        )
        keys, filters, sizes = rngs.params, [], []
        for block in self.blocks:
            whole = (block.kernel_size, block.num_units, block.pool, block.pool_stride)
            if min(whole) < 1 or not block.power > 0:
                raise ValueError(f"{block} is not accepted: sizes are at least 1 and the power positive")
            sides = [
                (side - block.kernel_size + 1 - block.pool) // block.pool_stride + 1
                for side in (height, width)
            ]
            if min(sides) < 1:
                raise ValueError(f"{block} does not fit images of {height}×{width} pixels")
            sizes.append(sides[0] * sides[1] * block.num_units)
            size = block.kernel_size**2 * channels
            scale = 1.0 if response == "nnl" else (2 / size) ** 0.5
            filters.append(nnx.Param(scale * jax.random.normal(keys(), (block.num_units, size))))
        self._sizes, self.num_features = tuple(sizes), sum(sizes)
        self.filters = nnx.data(filters)
        plain = response == "relu"
        self.biases = nnx.data([nnx.Param(jnp.zeros(b.num_units)) for b in self.blocks] if plain else [])
        self.classifier = nnx.Linear(self.num_features, num_classes, rngs=rngs)

    def features(self, images: Array) -> Array:
        """Pooled responses of all blocks, `[batch, num_features]`: `respond(pooled(images))`.

        Args:
          images: floating `[batch, height, width, channels]`, usually in [0, 1].

        Raises:
          ValueError: images of another shape.
          TypeError: images of integers.
        """
        return self.respond(self.pooled(images))

    def pooled(self, images: Array) -> Array:
        """What `respond` makes responses of: the largest cosine, or the largest sum, of each window.

        Responses grow with them, so that pooling first gives the same and leaves fewer numbers to respond to.

        Args:
          images: as for `features`.

        Returns:
          `[batch, num_features]`; for `"nnl"` cosines from 0 to 1, which do not depend on the power.
        """
        images = check_images("images", images, image_shape=self.image_shape)
        parts = []
        for block, filters in zip(self.blocks, self.filters, strict=True):
            weights = filters[...]
            if self.response == "nnl":
                values = hebbian.convolve(images, weights, kernel_size=block.kernel_size, power=1)
            else:
                kernel = weights.reshape(-1, block.kernel_size, block.kernel_size, images.shape[-1])
                kernel = kernel.transpose(1, 2, 3, 0).astype(images.dtype)
                values = conv_general_dilated(images, kernel, (1, 1), "VALID")
            parts.append(max_pool(values, block.pool, block.pool_stride).reshape(len(images), -1))
        return jnp.concatenate(parts, axis=1)

    def respond(self, pooled: Array) -> Array:
        """ReLU(cosine)^n (eq. 3), or the twin's ReLU of the sum and the unit's bias.

        Args:
          pooled: floating `[batch, num_features]`, as `pooled` gives them.

        Returns:
          `[batch, num_features]`.

        Raises:
          ValueError: `pooled` of another shape.
          TypeError: integers.

        Example:
          >>> import jax.numpy as jnp
          >>> from flax import nnx
          >>> from sul_jax import nn
          >>> net = nn.NNLConv((2, 2, 1), [nn.NNLBlock(2, 3, 2, 1)], num_classes=2, rngs=nnx.Rngs(0))
          >>> net.respond(jnp.array([[-0.5, 0.5, 1.0]])).tolist()
          [[0.0, 0.25, 1.0]]
        """
        pooled = check_array("pooled", pooled, ndim=2, axes="[batch, num_features]")
        if pooled.shape[1] != self.num_features:
            raise ValueError(f"pooled has shape {pooled.shape}, expected [batch, {self.num_features}]")
        parts = jnp.split(pooled, np.cumsum(self._sizes)[:-1], axis=1)
        for index, (block, values) in enumerate(zip(self.blocks, parts, strict=True)):
            if self.response == "nnl":
                parts[index] = hebbian.steepen(values, power=block.power)
            else:
                biases = self.biases[index][...]
                parts[index] = jax.nn.relu(values + jnp.tile(biases, values.shape[1] // block.num_units))
        return jnp.concatenate(parts, axis=1)

    def __call__(self, images: Array) -> Array:
        """Logits, `[batch, num_classes]`."""
        return self.classifier(self.features(images))
