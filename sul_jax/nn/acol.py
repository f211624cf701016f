"""The convolutional network with an auto-clustering output layer."""

import itertools

import jax
from flax import nnx
from jax import Array

from sul_jax import gar
from sul_jax._check import check_images, check_integer
from sul_jax.nn._saved import Saved
from sul_jax.nn.backbones import dropout
from sul_jax.nn.convolution import conv_general_dilated, max_pool

# Dropout after each pair of convolutions and after the linear layer.
_DROPOUT = (0.2, 0.3, 0.5)


class ACOL(Saved):
    """Two pairs of 3×3 convolutions, each pooled, a linear layer F and the nodes Z (Kilinc & Uysal, table 2).

    Attributes:
      image_shape: height, width, channels.
      num_parents: classes that are taught; node j belongs to parent j mod `num_parents`.
      num_features: size of F.
      axis_name: mapped axis over which batches are split, for dropout; usually None.
    """

    axis_name: str | None = None

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        *,
        num_parents: int,
        nodes_per_parent: int = 20,
        num_features: int = 2048,
        num_filters: int = 32,
        rngs: nnx.Rngs,
    ):
        """Random weights: uniform by Glorot, zero biases.

        Args:
          image_shape: height, width, channels; sides of at least 4.
          num_parents: classes that are taught.
          nodes_per_parent: k_s, the softmax nodes of each parent.
          num_features: size of F.
          num_filters: of the first two convolutions; the next have twice as many.
          rngs: Flax's random number streams.

        Raises:
          ValueError: images too small, or sizes below 1.

        Example:
          >>> import jax.numpy as jnp
          >>> from flax import nnx
          >>> from sul_jax import nn
          >>> net = nn.ACOL((16, 16, 1), num_parents=8, num_features=64, rngs=nnx.Rngs(0))
          >>> images = jnp.ones((2, 16, 16, 1))
          >>> net.features(images).shape, net(images).shape, net.parents(images).shape
          ((2, 64), (2, 160), (2, 8))
        """
        if len(image_shape) != 3 or min(image_shape[:2]) < 4 or image_shape[2] < 1:
            raise ValueError(
                f"image_shape={image_shape} is not accepted: sides must be at least 4, as (height, width, "
                "channels)"
            )
        height, width, channels = (int(size) for size in image_shape)
        self.image_shape = (height, width, channels)
        self.num_parents, self.num_features = num_parents, num_features
        for name, size in (
            ("num_parents", num_parents), ("nodes_per_parent", nodes_per_parent),
            ("num_features", num_features), ("num_filters", num_filters),
        ):  # fmt: skip
            check_integer(name, size, low=1)
        self.arguments = (
            ("image_shape", self.image_shape),
            ("num_parents", num_parents),
            ("nodes_per_parent", nodes_per_parent),
            ("num_features", num_features),
            ("num_filters", num_filters),
        )
        glorot = nnx.initializers.glorot_uniform()
        sizes = (channels, num_filters, num_filters, 2 * num_filters, 2 * num_filters)
        self.convolutions = nnx.data(
            [
                nnx.Conv(
                    inputs,
                    outputs,
                    (3, 3),
                    padding="SAME",
                    conv_general_dilated=conv_general_dilated,
                    kernel_init=glorot,
                    rngs=rngs,
                )
                for inputs, outputs in itertools.pairwise(sizes)
            ]
        )
        flat = (height // 4) * (width // 4) * sizes[-1]
        self.feature_layer = nnx.Linear(flat, num_features, kernel_init=glorot, rngs=rngs)
        nodes = num_parents * nodes_per_parent
        self.nodes = nnx.Linear(num_features, nodes, kernel_init=glorot, rngs=rngs)

    def features(self, images: Array, *, key: Array | None = None) -> Array:
        """F, `[batch, num_features]`, at least 0; with a key, for training, dropout is on.

        Args:
          images: floating `[batch, height, width, channels]`, usually in [0, 1].
          key: `jax.random.key`, or None.

        Raises:
          ValueError: images of another shape.
          TypeError: images of integers.
        """
        images = check_images("images", images, image_shape=self.image_shape)
        values = images
        for index, convolution in enumerate(self.convolutions):
            values = jax.nn.relu(convolution(values))
            if index % 2:
                values = max_pool(values, 2, 2)
                values = dropout(key, index, values, _DROPOUT[index // 2], axis_name=self.axis_name)
        values = jax.nn.relu(self.feature_layer(values.reshape(len(values), -1)))
        return dropout(key, len(self.convolutions), values, _DROPOUT[-1], axis_name=self.axis_name)

    def __call__(self, images: Array, *, key: Array | None = None) -> Array:
        """Z, the logits of the nodes, `[batch, num_parents · nodes_per_parent]`."""
        return self.nodes(self.features(images, key=key))

    def probabilities(self, images: Array) -> Array:
        """softmax(Z), `[batch, num_parents · nodes_per_parent]`."""
        return jax.nn.softmax(self(images))

    def parents(self, images: Array) -> Array:
        """Probabilities of the parents, `[batch, num_parents]`: a softmax over all nodes, pooled."""
        return gar.acol_pool(self.probabilities(images), num_parents=self.num_parents)
