"""A backbone with the two heads of neural manifold clustering and embedding."""

from collections.abc import Callable
from typing import Any, Self

import jax.numpy as jnp
from flax import nnx
from jax import Array

from sul_jax import whitening
from sul_jax.nn._saved import Saved
from sul_jax.nn.backbones import MLP, ResNet, linear

_BACKBONES: dict[str, type[MLP] | type[ResNet]] = {"MLP": MLP, "ResNet": ResNet}


class NMCE(Saved):
    """Features on the unit sphere and cluster logits over a backbone (Li et al. 2022, section 3).

    Attributes:
      backbone: maps inputs to `[batch, num_features]`.
      feature_head: the embedding, linear.
      cluster_head: the logits, linear.
    """

    def __init__(
        self,
        backbone: Callable[[Array], Array],
        in_features: int,
        *,
        num_features: int,
        num_clusters: int,
        rngs: nnx.Rngs,
    ):
        """Puts linear heads on a backbone.

        Args:
          backbone: a module with outputs `[batch, in_features]`; an `MLP` or a `ResNet` if `load` is to build
            it again.
          in_features: size of the backbone's output.
          num_features: size of the embedding.
          num_clusters: number of clusters.
          rngs: Flax's random number streams.

        Example:
          >>> import jax.numpy as jnp
          >>> from flax import nnx
          >>> from sul_jax import nn
          >>> rngs = nnx.Rngs(0)
          >>> mlp = nn.MLP(2, 16, num_layers=2, rngs=rngs)
          >>> net = nn.NMCE(mlp, 16, num_features=6, num_clusters=2, rngs=rngs)
          >>> features, logits = net(jnp.ones((5, 2)))
          >>> features.shape, logits.shape
          ((5, 6), (5, 2))
        """
        self.backbone = backbone
        self.arguments = (
            ("backbone", (type(backbone).__name__, getattr(backbone, "arguments", ()))),
            ("in_features", in_features),
            ("num_features", num_features),
            ("num_clusters", num_clusters),
        )
        self.feature_head = linear(in_features, num_features, rngs)
        self.cluster_head = linear(in_features, num_clusters, rngs)

    @classmethod
    def _build(cls, arguments: dict[str, Any]) -> Self:
        name, pairs = arguments["backbone"]
        if name not in _BACKBONES:
            raise ValueError(f"the backbone {name!r} cannot be loaded by name: only {tuple(_BACKBONES)} can")
        return super()._build({**arguments, "backbone": _BACKBONES[name]._build(dict(pairs))})

    def __call__(self, inputs: Array) -> tuple[Array, Array]:
        """Features of unit norm `[batch, num_features]` and logits `[batch, num_clusters]`."""
        hidden = self.backbone(inputs)
        return whitening.normalize(self.feature_head(hidden)), self.cluster_head(hidden)

    def predict(self, inputs: Array) -> Array:
        """The cluster of each input, int32 `[batch]`."""
        return jnp.argmax(self(inputs)[1], axis=-1).astype(jnp.int32)
