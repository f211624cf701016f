"""A linear layer on a network's features, as DeepCluster trains it."""

from typing import Any

import jax
from flax import nnx
from jax import Array


class Classifier(nnx.Module):
    """Logits of classes from the rectified features of a network.

    Attributes:
      network: maps inputs, and perhaps a `key` for dropout, to `[batch, network.num_features]`.
      head: the linear layer.
    """

    def __init__(self, network: Any, num_classes: int, *, rngs: nnx.Rngs):
        """Puts a head of small random weights (standard deviation 0.01, no bias yet) on a network.

        Args:
          network: with an attribute `num_features`, such as a `LeNet5`.
          num_classes: of the logits.
          rngs: Flax's random number streams.

        Example:
          >>> import jax.numpy as jnp
          >>> from flax import nnx
          >>> from sul_jax import nn
          >>> net = nn.Classifier(nn.LeNet5(rngs=nnx.Rngs(0)), 5, rngs=nnx.Rngs(1))
          >>> net(jnp.ones((2, 32, 32, 1))).shape
          (2, 5)
        """
        self.network = network
        small = nnx.initializers.normal(0.01)
        self.head = nnx.Linear(network.num_features, num_classes, kernel_init=small, rngs=rngs)

    def __call__(self, inputs: Array, *, key: Array | None = None) -> Array:
        """`[batch, num_classes]`."""
        features = self.network(inputs) if key is None else self.network(inputs, key=key)
        return self.head(jax.nn.relu(features))
