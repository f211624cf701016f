"""Pseudo supervision with an auto-clustering output layer (Kilinc & Uysal 2018).

A network learns to tell how an image was flipped or turned, with several softmax nodes for each way. Nothing
says which of its nodes an image should use: Graph-based Activity Regularization (`gar`) spreads the images
over them, and so over their own classes.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from sul_jax import augment, gar
from sul_jax._check import check_integer
from sul_jax._parallel import of_whole_batch
from sul_jax.augment import Transformation
from sul_jax.learning_rule import LearningRule, gradient_rule

if TYPE_CHECKING:
    import optax


def rule(
    image_shape: tuple[int, int, int],
    *,
    transformations: Sequence[Transformation] = augment.FLIPS_AND_ROTATIONS,
    num_parents: int | None = None,
    nodes_per_parent: int = 20,
    num_features: int = 2048,
    num_filters: int = 32,
    optimizer: "optax.GradientTransformation | None" = None,
    affinity_weight: float | Array = 0.1,
    balance_weight: float | Array = 1.0,
    frobenius_weight: float | Array = 1e-6,
    frobenius: gar.Frobenius = "squared",
    balance_over: int = 0,
) -> LearningRule:
    """ACOL as a `LearningRule` over images: cross-entropy of the parents and eq. 13's regularisation.

    `update(state, images, *, key, parents=None)` transforms the images at random and teaches in which way, or
    with `parents` (integers `[batch]`) leaves them as they are and teaches those. `encode` gives F, the layer
    below the nodes, in which k-means finds the classes (section 3.4).

    Args:
      image_shape: height, width, channels; sides of at least 4.
      transformations: the ways; the first is usually the image as it is.
      num_parents: classes that are taught; by default one a transformation.
      nodes_per_parent: k_s, the softmax nodes of each parent.
      num_features: size of F.
      num_filters: of the first two convolutions; the next have twice as many.
      optimizer: by default Adam at a rate of 1e-3, the paper's.
      affinity_weight: c_α, the weight of affinity.
      balance_weight: c_β, the weight of missing balance.
      frobenius_weight: c_F, the weight of the squared logits.
      frobenius: as in `gar.gar_loss`.
      balance_over: images over which the nodes' activity is averaged for the balance, those of earlier
        minibatches among them, so that small minibatches ask of the nodes what large ones do; where the
        minibatch has as many, and by default, it alone counts.

    Returns:
      A `LearningRule` with a `GradientState` of an `nn.ACOL`; the `terms` of its info are `cross_entropy`,
      `affinity` (α) and `balance` (β).

    Raises:
      ValueError: a size out of range.

    Example:
      >>> import jax
      >>> from sul_jax import acol
      >>> rule = acol.rule((8, 8, 1), num_features=16, num_filters=4)
      >>> images = jax.random.uniform(jax.random.key(0), (10, 8, 8, 1))
      >>> state = jax.jit(rule.init)(jax.random.key(1), images)
      >>> state, info = jax.jit(rule.update)(state, images, key=jax.random.key(2))
      >>> jax.jit(rule.encode)(state, images).shape, sorted(info.terms)
      ((10, 16), ['affinity', 'balance', 'cross_entropy'])
    """
    import optax
    from flax import nnx

    from sul_jax.nn import ACOL

    check_integer("balance_over", balance_over, low=0)
    number = len(transformations) if num_parents is None else num_parents

    def loss(
        network: Any, images: Array, *, key: Array, parents: Array | None = None, axis_name: str | None = None
    ) -> tuple[Array, dict[str, Array]]:
        turn_key, dropout_key = jax.random.split(key)
        if parents is None:
            images, parents = of_whole_batch(
                lambda key, images: augment.random_transformation(
                    key, images, transformations=transformations
                ),
                axis_name,
            )(turn_key, images)
        logits = network(images, key=dropout_key)
        active, energy = jax.nn.relu(logits), None
        if balance_over:
            batch = len(images) * (1 if axis_name is None else lax.axis_size(axis_name))
            new = min(1.0, batch / balance_over)
            energy = new * gar.node_energy(active, axis_name=axis_name) + (1 - new) * network.energy[...]
            network.energy[...] = energy
        regularization = gar.gar_loss(
            logits,
            num_parents=number,
            affinity_weight=affinity_weight,
            balance_weight=balance_weight,
            frobenius_weight=frobenius_weight,
            frobenius=frobenius,
            energy=energy,
            axis_name=axis_name,
        )
        taught = gar.parent_loss(logits, parents, num_parents=number, axis_name=axis_name)
        return regularization + taught, {
            "cross_entropy": taught,
            "affinity": gar.affinity(active, num_parents=number, axis_name=axis_name),
            "balance": gar.balance(active, num_parents=number, energy=energy, axis_name=axis_name),
        }

    def build(rngs: nnx.Rngs) -> nnx.Module:
        network: Any = ACOL(
            image_shape,
            num_parents=number,
            nodes_per_parent=nodes_per_parent,
            num_features=num_features,
            num_filters=num_filters,
            rngs=rngs,
        )
        if balance_over:
            network.energy = nnx.BatchStat(jnp.zeros(number * nodes_per_parent))
        return network

    return gradient_rule(
        build,
        loss,
        optax.adam(1e-3) if optimizer is None else optimizer,
        encode=lambda network, images: network.features(images),
    )
