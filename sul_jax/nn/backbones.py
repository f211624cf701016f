"""Backbones that are trained by gradient descent."""

import itertools
from collections.abc import Callable

import jax
from flax import nnx
from jax import Array


class MLP(nnx.Module):
    """Fully connected layers, each followed by the activation.

    Attributes:
      num_features: size of the output.
    """

    def __init__(
        self,
        in_features: int,
        num_features: int,
        *,
        num_layers: int,
        activation: Callable[[Array], Array] = jax.nn.elu,
        rngs: nnx.Rngs,
    ):
        """Random weights.

        Args:
          in_features: size of the input.
          num_features: size of every layer.
          num_layers: number of layers, at least 1.
          activation: after every layer.
          rngs: Flax's random number streams.

        Raises:
          ValueError: `num_layers` below 1.

        Example:
          >>> import jax.numpy as jnp
          >>> from flax import nnx
          >>> from sul_jax import nn
          >>> nn.MLP(2, 128, num_layers=5, rngs=nnx.Rngs(0))(jnp.ones((7, 2))).shape
          (7, 128)
        """
        if num_layers < 1:
            raise ValueError(f"num_layers={num_layers} is not accepted: it must be at least 1")
        sizes = [in_features] + [num_features] * num_layers
        self.num_features = num_features
        self.activation = activation
        self.layers = nnx.List([nnx.Linear(i, o, rngs=rngs) for i, o in itertools.pairwise(sizes)])

    def __call__(self, inputs: Array) -> Array:
        """`[batch, in_features]` to `[batch, num_features]`."""
        for layer in self.layers:
            inputs = self.activation(layer(inputs))
        return inputs
