"""Blocks of convolutional filters side by side, with normalised non-linear responses or plain ones."""

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from sul_jax import hebbian
from sul_jax._check import check_images
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
          >>> net.features(images).shape, net(images).shape
          ((2, 5000), (2, 10))
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
        keys, filters = rngs.params, []
        self.num_features = 0
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
            self.num_features += sides[0] * sides[1] * block.num_units
            size = block.kernel_size**2 * channels
            scale = 1.0 if response == "nnl" else (2 / size) ** 0.5
            filters.append(nnx.Param(scale * jax.random.normal(keys(), (block.num_units, size))))
        self.filters = nnx.data(filters)
        plain = response == "relu"
        self.biases = nnx.data([nnx.Param(jnp.zeros(b.num_units)) for b in self.blocks] if plain else [])
        self.classifier = nnx.Linear(self.num_features, num_classes, rngs=rngs)

    def features(self, images: Array) -> Array:
        """Pooled responses of all blocks, `[batch, num_features]`.

        Args:
          images: floating `[batch, height, width, channels]`, usually in [0, 1].

        Raises:
          ValueError: images of another shape.
          TypeError: images of integers.
        """
        images = check_images("images", images, image_shape=self.image_shape)
        features = []
        for index, block in enumerate(self.blocks):
            weights = self.filters[index][...]
            if self.response == "nnl":
                cosines = hebbian.convolve(images, weights, kernel_size=block.kernel_size, power=1)
                # The power grows with the cosine: the largest response is that of the largest cosine.
                values = hebbian.steepen(max_pool(cosines, block.pool, block.pool_stride), power=block.power)
            else:
                kernel = weights.reshape(-1, block.kernel_size, block.kernel_size, images.shape[-1])
                kernel = kernel.transpose(1, 2, 3, 0).astype(images.dtype)
                values = conv_general_dilated(images, kernel, (1, 1), "VALID")
                # The bias and ReLU grow too.
                values = jax.nn.relu(
                    max_pool(values, block.pool, block.pool_stride) + self.biases[index][...]
                )
            features.append(values.reshape(len(images), -1))
        return jnp.concatenate(features, axis=1)

    def __call__(self, images: Array) -> Array:
        """Logits, `[batch, num_classes]`."""
        return self.classifier(self.features(images))
