"""Neural manifold clustering and embedding (Li et al. 2022).

A network with two heads learns from random views. One head makes an embedding in which manifolds are spread
out and each is compact; the other makes memberships, which say which point lies on which manifold. The
objectives are coding rates (`coding_rate`): the total coding rate alone for features (eq. 5), together with
the clusters' coding rate for both (eq. 4).
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import Array

from sul_jax import coding_rate
from sul_jax._check import as_array
from sul_jax._parallel import of_whole_batch
from sul_jax.learning_rule import LearningRule, gradient_rule

if TYPE_CHECKING:
    import optax
    from flax import nnx

Views = Callable[[Array, Array], Array]
"""From a key and inputs `[batch, ...]` to random views of them, `[2, batch, ...]`."""


def rule(
    build: "Callable[[nnx.Rngs], nnx.Module]",
    *,
    views: Views,
    optimizer: "optax.GradientTransformation | None" = None,
    clusters: bool = True,
    eps_squared: float | Array = 0.2,
    invariance_weight: float | Array = 20.0,
    temperature: float | Array = 1.0,
    average_views: bool = True,
    trained: Sequence[str] | None = None,
    dtype: Any = None,
) -> LearningRule:
    """NMCE as a `LearningRule`: the NMCE loss (eq. 4), or the total coding rate alone (eq. 5).

    `update(state, inputs, *, key, compression_weight=1)` draws the views and the memberships' noise;
    `compression_weight` is γ of eq. 4, 0 for features before clusters. `encode` gives the embedding; clusters
    are the network's `predict`.

    Args:
      build: makes the untrained network, from views to features `[batch, num_features]` and cluster logits
        `[batch, num_clusters]`, such as `nn.NMCE`.
      views: makes two random views of each input.
      optimizer: by default Adam at a rate of 1e-3.
      clusters: False descends the total coding rate, in which the cluster head has no part.
      eps_squared: ε², the squared error that is allowed.
      invariance_weight: λ, the weight of the two views being alike.
      temperature: τ of the Gumbel softmax.
      average_views: of the total coding rate, as in `coding_rate.tcr_loss`.
      trained: names of the network's parts that learn, such as `("feature_head", "cluster_head")` on a fixed
        backbone; by default all.
      dtype: in which the network computes; the losses are float32.

    Returns:
      A `LearningRule` with a `GradientState`.

    Raises:
      ValueError: a name in `trained` that the network lacks.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from sul_jax import nmce, nn
      >>> def build(rngs):
      ...     mlp = nn.MLP(2, 16, num_layers=2, rngs=rngs)
      ...     return nn.NMCE(mlp, 16, num_features=6, num_clusters=2, rngs=rngs)
      >>> def views(key, points):
      ...     return points + 0.1 * jax.random.normal(key, (2, *points.shape))
      >>> rule = nmce.rule(build, views=views, eps_squared=0.01)
      >>> points = jax.random.normal(jax.random.key(0), (50, 2))
      >>> state = rule.init(jax.random.key(1), points)
      >>> state, info = jax.jit(rule.update)(state, points, key=jax.random.key(2))
      >>> rule.encode(state, points).shape
      (50, 6)
    """
    import optax

    def loss(
        network: Any,
        inputs: Array,
        *,
        key: Array,
        compression_weight: float | Array = 1.0,
        axis_name: str | None = None,
    ) -> Array:
        both = of_whole_batch(views, axis_name, batch_axis=1)(key, as_array("inputs", inputs))
        flat = both.reshape(-1, *both.shape[2:])
        outputs = network(flat if dtype is None else flat.astype(dtype))
        features, logits = (v.astype(jnp.float32).reshape(2, -1, v.shape[-1]) for v in outputs)
        common: dict[str, Any] = {
            "eps_squared": eps_squared,
            "invariance_weight": invariance_weight,
            "axis_name": axis_name,
        }
        if not clusters:
            return coding_rate.tcr_loss(features, average_views=average_views, **common)
        memberships = coding_rate.gumbel_softmax(
            jax.random.fold_in(key, 2), logits, temperature=temperature, axis_name=axis_name
        )
        return coding_rate.nmce_loss(features, memberships, compression_weight=compression_weight, **common)

    return gradient_rule(
        build,
        loss,
        optax.adam(1e-3) if optimizer is None else optimizer,
        encode=lambda network, inputs: network(as_array("inputs", inputs))[0],
        trained=trained,
        dtype=dtype,
    )


def lars(
    learning_rate: "optax.Schedule",
    *,
    trust_coefficient: float = 0.02,
    weight_decay: float = 0.0,
    momentum: float = 0.9,
) -> "optax.GradientTransformation":
    """LARS as the authors train images with: biases and scales descend plainly, and do not decay.

    Args:
      learning_rate: by step.
      trust_coefficient: as in `clipped_trust`.
      weight_decay: as there.
      momentum: of the descent.

    Example:
      >>> import optax
      >>> from sul_jax import nmce
      >>> optimizer = nmce.lars(optax.cosine_decay_schedule(1.0, 1000), weight_decay=1e-6)
    """
    import optax

    trust = clipped_trust(learning_rate, trust_coefficient=trust_coefficient, weight_decay=weight_decay)
    return optax.chain(optax.masked(trust, matrices), optax.sgd(learning_rate, momentum=momentum))


def matrices(params: Any) -> Any:
    """Which parameters are weights: those of two axes and more; a mask for optax.

    Args:
      params: a tree of arrays.

    Example:
      >>> import jax.numpy as jnp
      >>> from sul_jax import nmce
      >>> nmce.matrices({"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)})
      {'bias': False, 'kernel': True}
    """
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


def clipped_trust(
    learning_rate: "optax.Schedule", *, trust_coefficient: float = 0.02, weight_decay: float = 0.0
) -> "optax.GradientTransformation":
    """The scaling of LARS with the clip of the authors' code, to be chained before a descent.

    (g + d·w) · min(1, η ‖w‖ / (‖g‖ + d ‖w‖) / η_t): no tensor moves faster than by plain descent. Without
    the clip (`optax.lars`) a tensor's step does not depend on the size of its gradient.

    Args:
      learning_rate: η_t, by step, of the descent that follows.
      trust_coefficient: η, the share of a weight's norm that a step may take.
      weight_decay: d, an L2 penalty added to the gradients.

    Example:
      >>> import optax
      >>> from sul_jax import nmce
      >>> rate = optax.cosine_decay_schedule(1.0, 1000)
      >>> optimizer = optax.chain(nmce.clipped_trust(rate), optax.sgd(rate, momentum=0.9))
    """
    import optax

    def init(params: Any) -> Any:
        del params
        return optax.ScaleByScheduleState(count=jnp.zeros((), jnp.int32))

    def update(gradients: Any, state: Any, params: Any) -> tuple[Any, Any]:
        rate = jnp.maximum(learning_rate(state.count), 1e-12)

        def scaled(gradient: Array, weight: Array) -> Array:
            size = jnp.linalg.norm(weight)
            slope = jnp.linalg.norm(gradient) + weight_decay * size
            usable = (size > 0) & (slope > 0)
            trust = trust_coefficient * size / jnp.where(usable, slope, 1) / rate
            return (gradient + weight_decay * weight) * jnp.where(usable, jnp.minimum(trust, 1), 1)

        changed = jax.tree.map(scaled, gradients, params)
        return changed, optax.ScaleByScheduleState(count=optax.safe_increment(state.count))

    return optax.GradientTransformation(init, update)
