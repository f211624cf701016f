"""Rate reduction: features and clusters of embeddings (Chu et al. 2024, after Ding et al. 2023).

A small network takes vectors that another model made, such as CLIP or DINO. It spreads them over the unit
sphere and compresses each cluster (`coding_rate`). The published method links vectors with vectors, by a
doubly stochastic matrix, and splits it by spectral clustering; here memberships link vectors with clusters,
so new vectors can be assigned too. Neighbours, if given, are pulled together: they separate structure from
noise.

A training goes like this: the first steps learn features by their coding rate alone; `begin_clusters` sets
the cluster head by a clustering, such as k-means'; further steps learn both. If you have several clusterings
to start from, the one with the largest `coding_rate.coding_rate_reduction` on these features is the best
guess, without labels.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from sul_jax import coding_rate
from sul_jax._check import check_array, check_integer, check_number, check_vectors
from sul_jax._linalg import at_least_float32
from sul_jax._parallel import sum_over
from sul_jax.learning_rule import GradientState, LearningRule, gradient_rule
from sul_jax.whitening import normalize

if TYPE_CHECKING:
    import optax
    from flax import nnx


def sinkhorn(
    logits: Array,
    *,
    temperature: float | Array = 0.175,
    num_iterations: int = 5,
    axis_name: str | None = None,
) -> Array:
    """Memberships exp((l_nk + u_n + v_k)/τ) whose rows sum to one and whose columns have equal shares.

    Sinkhorn's iterations scale columns and rows in turn, in logarithms, and end with the rows. Columns reach
    batch/num_columns as `num_iterations` grows; without iterations the memberships are softmax(l/τ).

    Args:
      logits: `[batch, num_columns]`.
      temperature: τ, positive.
      num_iterations: scalings of the columns, at least 0.
      axis_name: mapped axis over which the batch is split; the shares are those of the whole batch.

    Returns:
      Memberships, `[batch, num_columns]`.

    Raises:
      ValueError: wrong rank, or an argument out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> from sul_jax import rate_reduction
      >>> logits = jnp.array([[1.0, 0.0], [3.0, 0.0]])  # both prefer the first column
      >>> rate_reduction.sinkhorn(logits, temperature=0.1, num_iterations=90).round(1).tolist()
      [[0.0, 1.0], [1.0, 0.0]]
    """
    logits = at_least_float32(check_array("logits", logits, ndim=2, axes="[batch, num_columns]"))
    check_number("temperature", temperature, above=0)
    check_integer("num_iterations", num_iterations, low=0)
    scaled = logits / temperature
    batch, columns = logits.shape
    share = batch * (1 if axis_name is None else lax.axis_size(axis_name)) / columns

    def scale_columns(bias: Array, _: None) -> tuple[Array, None]:
        rows = jax.nn.log_softmax(scaled + bias[None], axis=1)
        return bias + jnp.log(jnp.asarray(share, bias.dtype)) - _log_sums(rows, axis_name), None

    bias, _ = lax.scan(scale_columns, jnp.zeros(columns, scaled.dtype), length=num_iterations)
    return jax.nn.softmax(scaled + bias[None], axis=1)


class Terms(NamedTuple):
    """Parts of `rate_reduction_loss`, scalars over the whole batch.

    Attributes:
      rate: R of the features' mean over views, to be large.
      class_rate: R_c of its clusters, to be small.
      similarity: mean cosine of the views, to be large; 1 with a single view.
    """

    rate: Array
    class_rate: Array
    similarity: Array


def terms(
    features: Array,
    logits: Array,
    *,
    eps_squared: float | Array = 0.1,
    temperature: float | Array = 0.175,
    num_iterations: int = 5,
    axis_name: str | None = None,
) -> Terms:
    """What `rate_reduction_loss` is the weighted sum of; its arguments are told there.

    Example:
      >>> import jax.numpy as jnp
      >>> from sul_jax import rate_reduction
      >>> z = jnp.eye(2)[None]
      >>> parts = rate_reduction.terms(z, z, eps_squared=1.0, temperature=0.01)
      >>> [round(float(part), 4) for part in parts]  # log 2, and log(1 + 2) / 2 for a vector of its own
      [0.6931, 0.5493, 1.0]
    """
    features = check_array("features", features, ndim=3, axes="[views, batch, features]")
    logits = check_array("logits", logits, ndim=3, axes="[views, batch, num_clusters]")
    if features.shape[:2] != logits.shape[:2]:
        raise ValueError(
            f"logits has shape {tuple(logits.shape)}, but features has {tuple(features.shape)}: views and "
            "batch must be the same"
        )
    unit = normalize(at_least_float32(features))
    mean = unit[0] if len(unit) == 1 else normalize(jnp.mean(unit, axis=0))
    memberships = sinkhorn(
        normalize(jnp.mean(at_least_float32(logits), axis=0)),
        temperature=temperature,
        num_iterations=num_iterations,
        axis_name=axis_name,
    )
    one = jnp.ones((), unit.dtype)
    return Terms(
        coding_rate.coding_rate(mean, eps_squared=eps_squared, axis_name=axis_name),
        coding_rate.class_coding_rate(mean, memberships, eps_squared=eps_squared, axis_name=axis_name),
        one if len(unit) == 1 else coding_rate.view_similarity(unit, axis_name=axis_name),
    )


def rate_reduction_loss(
    features: Array,
    logits: Array,
    *,
    eps_squared: float | Array = 0.1,
    compression_weight: float | Array = 1.0,
    invariance_weight: float | Array = 20.0,
    temperature: float | Array = 0.175,
    num_iterations: int = 5,
    axis_name: str | None = None,
) -> Array:
    """γ R_c(Z, Π) − R(Z) − λ · similarity, with memberships Π by Sinkhorn's iterations.

    Z and the logits are means over views; logits are scaled to unit norm, as the published code does, so that
    τ alone says how sharp memberships may get.

    Args:
      features: `[views, batch, features]`, one view or more; rows need not be normalised.
      logits: `[views, batch, num_clusters]`.
      eps_squared: ε², positive.
      compression_weight: γ; 0 for features without clusters.
      invariance_weight: λ; of no account with one view.
      temperature: τ of `sinkhorn`.
      num_iterations: of `sinkhorn`; 0 lets clusters differ in size as they may.
      axis_name: mapped axis over which the batch is split.

    Returns:
      A scalar.

    Raises:
      ValueError: shapes that do not fit, or an argument out of range.

    Example:
      >>> import jax
      >>> from sul_jax import rate_reduction
      >>> z = jax.random.normal(jax.random.key(0), (2, 50, 8))
      >>> loss = rate_reduction.rate_reduction_loss(z, z[..., :3])
    """
    parts = terms(
        features,
        logits,
        eps_squared=eps_squared,
        temperature=temperature,
        num_iterations=num_iterations,
        axis_name=axis_name,
    )
    return _weighted(parts, compression_weight, invariance_weight)


def rule(
    build: "Callable[[nnx.Rngs], nnx.Module]",
    *,
    optimizer: "optax.GradientTransformation | None" = None,
    eps_squared: float | Array = 0.1,
    invariance_weight: float | Array = 20.0,
    temperature: float | Array = 0.175,
    num_iterations: int = 5,
) -> LearningRule:
    """Rate reduction as a `LearningRule`.

    `update(state, inputs, *, neighbours=None, compression_weight=1)`: `neighbours` are like `inputs`, each a
    vector that should lie in the same cluster, such as one of the nearest of all or another view;
    `compression_weight` is γ, 0 while features are learned before clusters. `encode` gives the features, of
    unit norm; clusters are the network's `predict`.

    Args:
      build: makes the untrained network, from vectors to features `[batch, num_features]` and cluster logits
        `[batch, num_clusters]`, such as `nn.NMCE` over `nn.MLP`.
      optimizer: by default Adam at a rate of 1e-3.
      eps_squared: ε².
      invariance_weight: λ.
      temperature: τ of `sinkhorn`.
      num_iterations: of `sinkhorn`.

    Returns:
      A `LearningRule` with a `GradientState`; the terms of its info are `Terms`.

    Example:
      >>> from functools import partial
      >>> import jax
      >>> from sul_jax import k_means, nn, rate_reduction
      >>> def build(rngs):
      ...     mlp = nn.MLP(12, 16, num_layers=1, activation=jax.nn.relu, rngs=rngs)
      ...     return nn.NMCE(mlp, 16, num_features=6, num_clusters=3, rngs=rngs)
      >>> rule = rate_reduction.rule(build)
      >>> update = jax.jit(rule.update)
      >>> vectors = jax.random.normal(jax.random.key(0), (60, 12))
      >>> state = jax.jit(rule.init)(jax.random.key(1), vectors)
      >>> state, info = update(state, vectors, compression_weight=0.0)  # warm-up: features alone
      >>> features = jax.jit(rule.encode)(state, vectors)
      >>> fit = jax.jit(partial(k_means.fit, num_clusters=3, metric="cosine"))
      >>> state = rate_reduction.begin_clusters(state, fit(jax.random.key(2), features).centroids)
      >>> state, info = update(state, vectors, compression_weight=1.0)  # features and clusters
      >>> info.terms.class_rate < info.terms.rate
      Array(True, dtype=bool)
    """
    import optax

    def loss(
        network: Any,
        inputs: Array,
        *,
        neighbours: Array | None = None,
        compression_weight: float | Array = 1.0,
        axis_name: str | None = None,
    ) -> tuple[Array, Terms]:
        views = [check_vectors("inputs", inputs)]
        if neighbours is not None:
            views.append(check_vectors("neighbours", neighbours))
            if views[1].shape != views[0].shape:
                raise ValueError(
                    f"neighbours has shape {tuple(views[1].shape)}, but inputs has {tuple(views[0].shape)}"
                )
        features, logits = (v.reshape(len(views), -1, v.shape[1]) for v in network(jnp.concatenate(views)))
        parts = terms(
            features,
            logits,
            eps_squared=eps_squared,
            temperature=temperature,
            num_iterations=num_iterations,
            axis_name=axis_name,
        )
        return _weighted(parts, compression_weight, invariance_weight), parts

    return gradient_rule(
        build,
        loss,
        optax.adam(1e-3) if optimizer is None else optimizer,
        encode=lambda network, inputs: network(check_vectors("inputs", inputs))[0],
    )


def begin_clusters(state: GradientState, centroids: Array) -> GradientState:
    """Sets the cluster head: each vector begins in the cluster of the centroid nearest to its features.

    Both heads are linear, so that cosines with centroids are a cluster head, up to the scale of each vector.

    Args:
      state: of a rule whose network has the heads of `nn.NMCE`.
      centroids: `[num_clusters, num_features]`, such as those of `k_means.fit` with `metric="cosine"`.

    Returns:
      The state with another cluster head.

    Raises:
      ValueError: centroids of another shape than the network's heads ask for.

    Example: see `rule`.
    """
    features, clusters = (state.params[name] for name in ("feature_head", "cluster_head"))
    expected = (clusters["kernel"][...].shape[1], features["kernel"][...].shape[1])
    centroids = check_vectors("centroids", centroids)
    if centroids.shape != expected:
        raise ValueError(
            f"centroids has shape {tuple(centroids.shape)}, expected [num_clusters, num_features] = "
            f"{list(expected)}"
        )
    directions = normalize(centroids).T
    params = jax.tree.map(lambda leaf: leaf, state.params)  # the caller's stays as it is
    for name in ("kernel", "bias"):
        seen = jnp.matmul(features[name][...], directions, precision="highest")
        params["cluster_head"][name][...] = seen.astype(clusters[name][...].dtype)
    return state._replace(params=params)


def _weighted(parts: Terms, compression_weight: float | Array, invariance_weight: float | Array) -> Array:
    return compression_weight * parts.class_rate - parts.rate - invariance_weight * parts.similarity


def _log_sums(values: Array, axis_name: str | None) -> Array:
    """log Σ exp over the batch, `[num_columns]`."""
    largest = lax.stop_gradient(jnp.max(values, axis=0))
    if axis_name is not None:
        largest = lax.pmax(largest, axis_name)
    return largest + jnp.log(sum_over(jnp.sum(jnp.exp(values - largest[None]), axis=0), axis_name))
