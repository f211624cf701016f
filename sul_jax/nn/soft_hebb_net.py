"""Layers that SoftHebb learned, under a linear classifier."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from sul_jax import soft_hebb
from sul_jax._check import check_images
from sul_jax.learning_rule import stack
from sul_jax.nn._saved import Saved
from sul_jax.nn.energy_net import Learned
from sul_jax.soft_hebb import SoftHebbLayer, SoftHebbLayerState


class SoftHebbNet(Saved):
    """Convolutional layers of SoftHebb and a linear layer on their flattened codes.

    Attributes:
      image_shape: height, width, channels.
      layers: the sizes.
      num_features: size of the codes of an image.
      states: what the layers learned, a `SoftHebbLayerState` each; not parameters for gradient descent.
      classifier: the linear layer.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        layers: Sequence[SoftHebbLayer] = soft_hebb.CIFAR10,
        *,
        num_classes: int,
        rngs: nnx.Rngs,
    ):
        """Layers that have learned nothing; the classifier begins with even weights in [0, √(300/features)).

        Args:
          image_shape: height, width, channels.
          layers: from the images upwards, at least one.
          num_classes: of the classifier.
          rngs: Flax's random number streams.

        Raises:
          ValueError: no layer, or one that does not fit the images.

        Example:
          >>> import jax.numpy as jnp
          >>> from flax import nnx
          >>> from sul_jax import nn, soft_hebb
          >>> layers = [layer._replace(num_units=8) for layer in soft_hebb.CIFAR10]
          >>> net = nn.SoftHebbNet((32, 32, 3), layers, num_classes=10, rngs=nnx.Rngs(0))
          >>> net.features(jnp.ones((2, 32, 32, 3))).shape, net(jnp.ones((2, 32, 32, 3))).shape
          ((2, 128), (2, 10))
        """
        if not layers:
            raise ValueError("layers is empty: at least one is needed")
        height, width, channels = image_shape
        self.image_shape = (height, width, channels)
        self.layers = tuple(SoftHebbLayer(*layer) for layer in layers)
        self.arguments = (
            ("image_shape", self.image_shape),
            ("layers", self.layers),
            ("num_classes", num_classes),
        )
        rule = stack(*soft_hebb.network_rules(self.layers))
        images = jnp.zeros((1, *self.image_shape))
        states = jax.jit(rule.init)(rngs.params(), images)
        self.states = nnx.data([jax.tree.map(Learned, state) for state in states])
        self.num_features = jax.eval_shape(rule.encode, states, images).size
        self.classifier = nnx.Linear(
            self.num_features,
            num_classes,
            kernel_init=nnx.initializers.uniform((300 / self.num_features) ** 0.5),
            rngs=rngs,
        )

    def learned_states(self) -> tuple[SoftHebbLayerState, ...]:
        """The states as `stack(*soft_hebb.network_rules(layers))` takes them."""
        return tuple(SoftHebbLayerState(*(leaf[...] for leaf in state)) for state in self.states)

    def set_states(self, states: Sequence[SoftHebbLayerState]) -> None:
        """Takes over what the layers' rules have learned."""
        for own, new in zip(self.states, states, strict=True):
            for variable, value in zip(own, new, strict=True):
                variable[...] = value

    def features(self, images: Array) -> Array:
        """Codes of the last layer, `[batch, num_features]`.

        Args:
          images: floating `[batch, height, width, channels]`, on the scale learned from.

        Raises:
          ValueError: images of another shape.
          TypeError: images of integers.
        """
        images = check_images("images", images, image_shape=self.image_shape)
        return _codes(self.layers, self.learned_states(), images)

    def __call__(self, images: Array) -> Array:
        """Logits, `[batch, num_classes]`."""
        return self.classifier(self.features(images))


@partial(jax.jit, static_argnums=0)
def _codes(layers: tuple[SoftHebbLayer, ...], states: tuple[SoftHebbLayerState, ...], images: Array) -> Array:
    return stack(*soft_hebb.network_rules(layers)).encode(states, images).reshape(len(images), -1)
