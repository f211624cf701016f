"""Backbones that are trained by gradient descent."""

import itertools
from collections.abc import Callable
from typing import Any, Literal, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from sul_jax._check import as_array, check_images
from sul_jax._parallel import drawn
from sul_jax.nn._saved import Saved
from sul_jax.nn.convolution import conv_general_dilated

# Blocks in each of the four stages.
RESNET_BLOCKS = {10: (1, 1, 1, 1), 18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}


class MLP(Saved):
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
        name = getattr(activation, "__name__", "")
        self.arguments = (
            ("in_features", in_features),
            ("num_features", num_features),
            ("num_layers", num_layers),
            ("activation", name if getattr(jax.nn, name, None) is activation else None),
        )
        self.layers = nnx.data([linear(i, o, rngs) for i, o in itertools.pairwise(sizes)])

    @classmethod
    def _build(cls, arguments: dict[str, Any]) -> Self:
        if arguments["activation"] is None:
            raise ValueError(
                "the activation is not a function of jax.nn: the network cannot be loaded by its name"
            )
        return super()._build({**arguments, "activation": getattr(jax.nn, arguments["activation"])})

    def __call__(self, inputs: Array) -> Array:
        """`[batch, in_features]` to `[batch, num_features]`."""
        inputs = as_array("inputs", inputs)
        for layer in self.layers:
            inputs = self.activation(layer(inputs))
        return inputs


class ResNet(Saved):
    """ResNet-10, -18 or -34 with the stems of Li et al. (2022), ending in pre-features.

    Statistics of batch normalisation change while `train()` is in effect and are used after `eval()`,
    in which an answer does not depend on the batch.

    Attributes:
      num_features: size of the output.
    """

    def __init__(
        self,
        depth: int,
        *,
        channels: int = 3,
        num_filters: int = 64,
        stem: Literal["3x3", "5x5"] = "3x3",
        num_pre_features: int | None = 4096,
        rngs: nnx.Rngs,
    ):
        """Random weights.

        Args:
          depth: 10 (one block a stage), 18 or 34.
          channels: of the images.
          num_filters: of the first stage; doubled in each further one.
          stem: `"3x3"` keeps the size, as for CIFAR; `"5x5"` halves it twice, by stride and by max
            pooling.
          num_pre_features: size of a linear layer with batch normalisation and ReLU on top of the
            average pooling; None leaves it out.
          rngs: Flax's random number streams.

        Raises:
          ValueError: unknown `depth` or `stem`.

        Example:
          >>> import jax.numpy as jnp
          >>> from flax import nnx
          >>> from sul_jax import nn
          >>> net = nn.ResNet(10, num_filters=4, num_pre_features=32, rngs=nnx.Rngs(0))
          >>> net.eval()
          >>> net(jnp.ones((2, 8, 8, 3))).shape
          (2, 32)
        """
        if depth not in RESNET_BLOCKS:
            raise ValueError(f"depth={depth} is not accepted: it must be one of {tuple(RESNET_BLOCKS)}")
        if stem not in ("3x3", "5x5"):
            raise ValueError(f"stem={stem!r} is not accepted: it must be '3x3' or '5x5'")
        self.arguments = (
            ("depth", depth),
            ("channels", channels),
            ("num_filters", num_filters),
            ("stem", stem),
            ("num_pre_features", num_pre_features),
        )
        self.pools = stem == "5x5"
        size, strides = (5, 2) if self.pools else (3, 1)
        self.stem = _convolution(channels, num_filters, size, strides, rngs)
        self.stem_norm = _batch_norm(num_filters, rngs)
        blocks, inputs = [], num_filters
        for stage, number in enumerate(RESNET_BLOCKS[depth]):
            outputs = num_filters * 2**stage
            for block in range(number):
                blocks.append(_BasicBlock(inputs, outputs, 2 if stage and not block else 1, rngs))
                inputs = outputs
        self.blocks = nnx.data(blocks)
        top = num_pre_features
        self.num_features = inputs if top is None else top
        self.pre_features = nnx.data(None if top is None else nnx.Linear(inputs, top, rngs=rngs))
        self.pre_norm: Any = nnx.data(None if top is None else _batch_norm(top, rngs))

    def __call__(self, images: Array) -> Array:
        """`[batch, height, width, channels]` to `[batch, num_features]`."""
        pooled = self.pool(images)
        if self.pre_features is None:
            return pooled
        return jax.nn.relu(self.pre_norm(self.pre_features(pooled)))

    def pool(self, images: Array) -> Array:
        """`[batch, height, width, channels]` to the last stage's averages `[batch, filters]`."""
        hidden = jax.nn.relu(self.stem_norm(self.stem(check_images("images", images))))
        if self.pools:
            window = {"window_shape": (3, 3), "strides": (2, 2), "padding": ((1, 1), (1, 1))}
            hidden = nnx.max_pool(hidden, **window)  # type: ignore[no-untyped-call]
        for block in self.blocks:
            hidden = block(hidden)
        return jnp.mean(hidden, axis=(1, 2))


class _BasicBlock(nnx.Module):
    def __init__(self, inputs: int, outputs: int, strides: int, rngs: nnx.Rngs):
        self.first = _convolution(inputs, outputs, 3, strides, rngs)
        self.first_norm = _batch_norm(outputs, rngs)
        self.second = _convolution(outputs, outputs, 3, 1, rngs)
        self.second_norm = _batch_norm(outputs, rngs)
        same = inputs == outputs and strides == 1
        self.shortcut = nnx.data(None if same else _convolution(inputs, outputs, 1, strides, rngs))
        self.shortcut_norm: Any = nnx.data(None if same else _batch_norm(outputs, rngs))

    def __call__(self, inputs: Array) -> Array:
        hidden = jax.nn.relu(self.first_norm(self.first(inputs)))
        hidden = self.second_norm(self.second(hidden))
        if self.shortcut is not None:
            inputs = self.shortcut_norm(self.shortcut(inputs))
        return jax.nn.relu(hidden + inputs)


def linear(inputs: int, outputs: int, rngs: nnx.Rngs) -> nnx.Linear:
    """A linear layer with weights and biases from [−1/√inputs, 1/√inputs], uniformly.

    Without biases that differ, a network of activations like ELU's starts out nearly homogeneous: it
    tells directions apart, but not distances from the origin.

    Example:
      >>> from flax import nnx
      >>> from sul_jax.nn import backbones
      >>> backbones.linear(2, 5, nnx.Rngs(0)).kernel.shape
      (2, 5)
    """
    uniform = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")

    def bias_init(key: Array, shape: Any, dtype: Any) -> Array:
        return jax.random.uniform(key, shape, dtype, -(inputs**-0.5), inputs**-0.5)

    return nnx.Linear(inputs, outputs, kernel_init=uniform, bias_init=bias_init, rngs=rngs)


def dropout(
    key: Array | None, index: int, values: Array, rate: float, *, axis_name: str | None = None
) -> Array:
    """Values with a share `rate` set to 0 and the others enlarged to keep the mean; unchanged without a key.

    Args:
      key: of the network's call, or None in evaluation.
      index: tells the network's dropouts apart.
      values: floating `[batch, ...]`.
      rate: in [0, 1).
      axis_name: mapped axis over which the batch is split; what is set to 0 is that of the whole batch.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from sul_jax.nn import backbones
      >>> sorted(set(backbones.dropout(jax.random.key(0), 0, jnp.ones(50), 0.5).tolist()))
      [0.0, 2.0]
    """
    if key is None or not rate:
        return values
    own = jax.random.fold_in(key, index)
    kept = drawn(lambda shape: jax.random.bernoulli(own, 1 - rate, shape), values.shape, axis_name)
    return jnp.where(kept, values / (1 - rate), 0)


def _convolution(inputs: int, outputs: int, size: int, strides: int, rngs: nnx.Rngs) -> nnx.Conv:
    edge = size // 2
    return nnx.Conv(
        inputs,
        outputs,
        (size, size),
        strides=strides,
        padding=((edge, edge), (edge, edge)),
        use_bias=False,
        conv_general_dilated=conv_general_dilated,
        kernel_init=nnx.initializers.variance_scaling(2.0, "fan_out", "normal"),
        rngs=rngs,
    )


class _BatchNorm(nnx.BatchNorm):
    """Statistics in float32, values in the type of the inputs: else all layers above take float32 too."""

    def __call__(self, x: Array, *arguments: Any, **options: Any) -> Array:
        return super().__call__(x, *arguments, **options).astype(x.dtype)


def _batch_norm(features: int, rngs: nnx.Rngs) -> nnx.BatchNorm:
    return _BatchNorm(features, momentum=0.9, epsilon=1e-5, rngs=rngs)
