"""Coding-rate objectives (Li, Chen, LeCun & Sommer 2022; Yu et al. 2020).

The coding rate R(Z, ε) of vectors on the unit sphere is the number of nats a vector takes up to a
distortion ε: large for a set that fills its space, small for one in a low-dimensional subspace. Neural
manifold clustering spreads all features, compresses those of each cluster, and keeps two views of one
image together.

Every function is global under `axis_name`: Gram matrices are summed over the axis before their determinants.
The papers' tables list ε² under the name ε; here it is called `eps_squared`.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from sul_jax._check import (
    check_array,
    check_floating,
    check_integer,
    check_labels,
    check_number,
    check_vectors,
)
from sul_jax._linalg import at_least_float32
from sul_jax._parallel import drawn, sum_over
from sul_jax.whitening import normalize

_TINY = 1e-8
# Numbers of a cluster's products with all vectors, or of its Gram matrix, times clusters held at a time.
_MAX_PRODUCTS = 2**25


def coding_rate(features: Array, *, eps_squared: float | Array, axis_name: str | None = None) -> Array:
    """R(Z, ε) = ½ log det(I + d/(n ε²) ZᵀZ) in nats (eq. 2).

    The determinant is taken on the smaller side, d×d or n×n.

    Args:
      features: `[batch, features]`, usually of unit norm.
      eps_squared: ε², positive.
      axis_name: mapped axis over which the batch is split.

    Returns:
      A scalar, at least 0.

    Raises:
      ValueError: wrong rank, or `eps_squared` not positive.

    Example:
      >>> import jax.numpy as jnp
      >>> from sul_jax import coding_rate
      >>> round(coding_rate.coding_rate(jnp.eye(2), eps_squared=1.0).item(), 4)  # log det(2 I) / 2
      0.6931
    """
    features = check_vectors("features", features)
    check_number("eps_squared", eps_squared, above=0)
    features = at_least_float32(features)
    batch, dimension = features.shape
    if axis_name is None and batch < dimension:
        gram = jnp.matmul(features, features.T, precision="highest")
        total: Array | int = batch
    else:
        gram = sum_over(jnp.matmul(features.T, features, precision="highest"), axis_name)
        total = batch * _axis_size(axis_name)
    return 0.5 * _log_det_shifted(gram * (dimension / (total * eps_squared)))


def class_coding_rate(
    features: Array,
    memberships: Array,
    *,
    eps_squared: float | Array,
    axis_name: str | None = None,
) -> Array:
    """Coding rates of the clusters, each weighted by its share of the batch.

    R_c = Σ_k tr(Π_k)/(2n) log det(I + d/(tr(Π_k) ε²) Zᵀ Π_k Z). Eq. 3 and 4 omit the weights tr(Π_k)/n;
    without them an even spread over clusters would cost as many full rates.

    Args:
      features: `[batch, features]`, usually of unit norm.
      memberships: `[batch, num_clusters]`, non-negative, rows sum to one.
      eps_squared: ε², positive.
      axis_name: mapped axis over which the batch is split.

    Returns:
      A scalar, at least 0.

    Raises:
      ValueError: shapes that do not fit, `eps_squared` not positive, or (outside jit) rows that do
        not sum to one.

    Example:
      >>> import jax.numpy as jnp
      >>> from sul_jax import coding_rate
      >>> z = jnp.eye(2)  # two vectors, each a cluster of its own: log(1 + 2) / 2 on average
      >>> round(coding_rate.class_coding_rate(z, jnp.eye(2), eps_squared=1.0).item(), 4)
      0.5493
    """
    features = check_vectors("features", features)
    check_number("eps_squared", eps_squared, above=0)
    memberships = _check_memberships(memberships, features.shape[0])
    features, memberships = at_least_float32(features), at_least_float32(memberships)
    masses = sum_over(jnp.sum(memberships, axis=0), axis_name)
    scale = features.shape[1] / ((masses + _TINY) * eps_squared)
    rates = _log_dets_in_parts(axis_name, features, memberships, scale)
    return jnp.sum(masses * rates) / (2 * features.shape[0] * _axis_size(axis_name))


def coding_rate_reduction(
    features: Array,
    memberships: Array,
    *,
    eps_squared: float | Array,
    axis_name: str | None = None,
) -> Array:
    """ΔR = R − R_c (eq. 3, MCR²): what knowing the clusters saves; to be maximised.

    Args:
      features: `[batch, features]`, usually of unit norm.
      memberships: `[batch, num_clusters]`, rows sum to one.
      eps_squared: ε², positive.
      axis_name: mapped axis over which the batch is split.

    Returns:
      A scalar, at least 0 up to rounding.

    Example:
      >>> import jax.numpy as jnp
      >>> from sul_jax import coding_rate
      >>> round(coding_rate.coding_rate_reduction(jnp.eye(2), jnp.eye(2), eps_squared=1.0).item(), 4)
      0.1438
    """
    whole = coding_rate(features, eps_squared=eps_squared, axis_name=axis_name)
    return whole - class_coding_rate(features, memberships, eps_squared=eps_squared, axis_name=axis_name)


def coding_length(
    features: Array,
    labels: Array,
    *,
    num_clusters: int,
    eps_squared: float | Array,
    axis_name: str | None = None,
) -> Array:
    """Nats to code all vectors cluster by cluster, up to a distortion ε, and to say whose each is.

    L = Σ_j (n_j + d)/2 log det(I + d/(n_j ε²) Z_jᵀ Z_j) − n_j log(n_j/n) (Ma et al. 2007), summed over
    clusters that are not empty. Of several clusterings, be it into different numbers, the one of least length
    explains the vectors best.

    Args:
      features: `[batch, features]`, usually of unit norm.
      labels: int `[batch]`, each in [0, num_clusters).
      num_clusters: k.
      eps_squared: ε², positive.
      axis_name: mapped axis over which the batch is split.

    Returns:
      A scalar, at least 0.

    Raises:
      ValueError: shapes that do not fit, an argument out of range, or (outside jit) labels out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> from sul_jax import coding_rate
      >>> z = jnp.repeat(jnp.eye(2), 50, axis=0)  # two directions
      >>> def length(labels, number):
      ...     return coding_rate.coding_length(z, labels, num_clusters=number, eps_squared=0.01).item()
      >>> two, four = jnp.repeat(jnp.arange(2), 50), jnp.arange(100) // 25
      >>> length(two, 2) < length(two * 0, 1), length(two, 2) < length(four, 4)
      (True, True)
    """
    features = check_vectors("features", features)
    check_integer("num_clusters", num_clusters, low=1)
    check_number("eps_squared", eps_squared, above=0)
    labels = check_labels("labels", labels, num_examples=features.shape[0], num_classes=num_clusters)
    features = at_least_float32(features)
    batch, dimension = features.shape
    total = batch * _axis_size(axis_name)

    def of_cluster(cluster: Array) -> Array:
        own = (labels == cluster).astype(features.dtype)
        gram = jnp.matmul((features * own[:, None]).T, features, precision="highest")
        number, gram = sum_over((jnp.sum(own), gram), axis_name)
        some = jnp.maximum(number, 1)
        rate = _log_det_shifted(gram * (dimension / (some * eps_squared)))
        return 0.5 * (number + dimension) * rate - number * jnp.log(some / total)

    # One cluster after the other: all Gram matrices at once may not fit.
    return jnp.sum(lax.map(of_cluster, jnp.arange(num_clusters, dtype=labels.dtype)))


def view_similarity(features: Array, *, axis_name: str | None = None) -> Array:
    """Mean cosine between the first view of each example and its other views (D of eq. 4 is its negative).

    Args:
      features: `[views, batch, features]`, at least two views.
      axis_name: mapped axis over which the batch is split.

    Returns:
      A scalar between −1 and 1.

    Raises:
      ValueError: fewer than two views.

    Example:
      >>> import jax.numpy as jnp
      >>> from sul_jax import coding_rate
      >>> z = jnp.array([[1.0, 0.0]])
      >>> coding_rate.view_similarity(jnp.stack([z, z, -z])).item()
      0.0
    """
    return _similarity(_unit_views(features), axis_name)


def tcr_loss(
    features: Array,
    *,
    eps_squared: float | Array,
    invariance_weight: float | Array = 1.0,
    average_views: bool = True,
    axis_name: str | None = None,
) -> Array:
    """Total coding rate: −R(Z̄, ε) − λ · similarity of views (eq. 5).

    Args:
      features: `[views, batch, features]`; rows need not be normalised.
      eps_squared: ε², positive.
      invariance_weight: λ, the weight of the two views being alike.
      average_views: the rate of the re-normalised mean of the views, as for COIL and in NMCE; False
        takes the mean of the views' rates, as for CIFAR's first stage.
      axis_name: mapped axis over which the batch is split.

    Returns:
      A scalar.

    Raises:
      ValueError: fewer than two views, or `eps_squared` not positive.

    Example:
      >>> import jax
      >>> from sul_jax import coding_rate
      >>> z = jax.random.normal(jax.random.key(0), (2, 50, 8))
      >>> loss = coding_rate.tcr_loss(z, eps_squared=0.1, invariance_weight=20.0)
    """
    unit = _unit_views(features)
    if average_views:
        rate = coding_rate(_mean_view(unit), eps_squared=eps_squared, axis_name=axis_name)
    else:
        rates = [coding_rate(view, eps_squared=eps_squared, axis_name=axis_name) for view in unit]
        rate = jnp.mean(jnp.stack(rates))
    return -rate - invariance_weight * _similarity(unit, axis_name)


def nmce_loss(
    features: Array,
    memberships: Array,
    *,
    eps_squared: float | Array,
    invariance_weight: float | Array = 1.0,
    compression_weight: float | Array = 1.0,
    axis_name: str | None = None,
) -> Array:
    """Neural manifold clustering and embedding: γ R_c − R − λ · similarity of views (eq. 4).

    Features are averaged over views and normalised again, memberships are averaged.

    Args:
      features: `[views, batch, features]`; rows need not be normalised.
      memberships: `[views, batch, num_clusters]`, rows sum to one; see `gumbel_softmax`.
      eps_squared: ε², positive.
      invariance_weight: λ, the weight of the two views being alike.
      compression_weight: γ, 1 in the paper.
      axis_name: mapped axis over which the batch is split.

    Returns:
      A scalar.

    Raises:
      ValueError: fewer than two views, shapes that do not fit, `eps_squared` not positive, or (outside
        jit) memberships that do not sum to one.

    Example:
      >>> import jax
      >>> from sul_jax import coding_rate
      >>> z = jax.random.normal(jax.random.key(0), (2, 50, 8))
      >>> memberships = jax.nn.softmax(jax.random.normal(jax.random.key(1), (2, 50, 3)))
      >>> loss = coding_rate.nmce_loss(z, memberships, eps_squared=0.1)
    """
    unit = _unit_views(features)
    memberships = _check_views("memberships", memberships)
    if memberships.shape[0] != unit.shape[0]:
        raise ValueError(
            f"memberships has {memberships.shape[0]} views (shape {tuple(memberships.shape)}), but "
            f"features has {unit.shape[0]}"
        )
    mean = _mean_view(unit)
    soft = jnp.mean(memberships, axis=0)
    compressed = class_coding_rate(mean, soft, eps_squared=eps_squared, axis_name=axis_name)
    spread = coding_rate(mean, eps_squared=eps_squared, axis_name=axis_name)
    similarity = _similarity(unit, axis_name)
    return compression_weight * compressed - spread - invariance_weight * similarity


def gumbel_softmax(
    key: Array, logits: Array, *, temperature: float | Array = 1.0, axis_name: str | None = None
) -> Array:
    """Noisy memberships softmax((log softmax(logits) + g)/τ), g standard Gumbel.

    The noise lets every example try other clusters; a low temperature makes the choice nearly hard.

    Args:
      key: `jax.random.key`.
      logits: `[..., batch, num_clusters]`.
      temperature: τ, positive.
      axis_name: mapped axis over which the batch is split; the noise is that of the whole batch.

    Returns:
      An array of the same shape; the last axis sums to one.

    Raises:
      ValueError: `temperature` not positive.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from sul_jax import coding_rate
      >>> coding_rate.gumbel_softmax(jax.random.key(0), jnp.zeros((5, 3))).shape
      (5, 3)
    """
    logits = check_floating("logits", logits)
    check_number("temperature", temperature, above=0)
    draw = partial(jax.random.gumbel, key, dtype=logits.dtype)
    noise = drawn(draw, logits.shape, axis_name, batch_axis=max(logits.ndim - 2, 0))
    return jax.nn.softmax((jax.nn.log_softmax(logits) + noise) / temperature)


def _similarity(unit: Array, axis_name: str | None) -> Array:
    mean = jnp.mean(jnp.sum(unit[:1] * unit[1:], axis=-1))
    return mean if axis_name is None else lax.pmean(mean, axis_name)


def _mean_view(unit: Array) -> Array:
    return normalize(jnp.mean(unit, axis=0))


@jax.custom_jvp
def _log_det_shifted(gram: Array) -> Array:
    """log det(I + G) of symmetric positive semi-definite `[..., d, d]` by Cholesky."""
    return _log_det_and_factor(gram)[0]


@_log_det_shifted.defjvp
def _log_det_shifted_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    # d log det A = tr(A⁻¹ dA): one triangular inverse instead of differentiating the factorisation.
    (gram,), (change,) = primals, tangents
    value, factor = _log_det_and_factor(gram)
    return value, jnp.sum(_inverse(factor) * change, axis=(-2, -1))


def _log_dets_in_parts(axis_name: str | None, features: Array, memberships: Array, scale: Array) -> Array:
    """`_class_log_dets` of so many clusters at a time that they fit into memory."""
    clusters, largest = memberships.shape[1], max(features.shape) * features.shape[1]
    together = max(1, _MAX_PRODUCTS // largest)
    if clusters <= together:
        return _class_log_dets(axis_name, features, memberships, scale)
    parts = -(-clusters // together)
    filled = parts * together - clusters  # with clusters of nothing
    members = jnp.pad(memberships, ((0, 0), (0, filled))).T.reshape(parts, together, -1)
    scales = jnp.pad(scale, (0, filled)).reshape(parts, together)

    # For gradients a part is computed anew, instead of all being kept.
    @jax.checkpoint
    def of_part(own: tuple[Array, Array]) -> Array:
        return _class_log_dets(axis_name, features, own[0].T, own[1])

    return lax.map(of_part, (members, scales)).ravel()[:clusters]


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _class_log_dets(axis_name: str | None, features: Array, memberships: Array, scale: Array) -> Array:
    """log det(I + s_k Σₙ π_nk zₙ zₙᵀ) of every cluster, `[num_clusters]`."""
    grams = _class_grams(axis_name, features, memberships)
    return _log_det_and_factor(grams * scale[:, None, None])[0]


@_class_log_dets.defjvp
def _class_log_dets_jvp(
    axis_name: str | None, primals: tuple[Array, Array, Array], tangents: tuple[Array, Array, Array]
) -> tuple[Array, Array]:
    # With A⁻¹ symmetric, zₙᵀ A⁻¹ serves the derivatives by zₙ and by π_nk: one product where there were two.
    features, memberships, scale = primals
    of_features, of_memberships, of_scale = tangents
    grams = _class_grams(axis_name, features, memberships)
    values, factors = _log_det_and_factor(grams * scale[:, None, None])
    inverses = _inverse(factors)
    clusters, dimension, _ = grams.shape
    side_by_side = jnp.moveaxis(inverses, 0, 1).reshape(dimension, clusters * dimension)
    projected = jnp.matmul(features, side_by_side, precision="highest").reshape(-1, clusters, dimension)
    changes = 2 * jnp.sum(memberships[..., None] * projected * of_features[:, None], axis=(0, 2))
    changes += jnp.sum(of_memberships * jnp.sum(projected * features[:, None], axis=2), axis=0)
    changes = scale * sum_over(changes, axis_name)
    return values, changes + of_scale * jnp.sum(inverses * grams, axis=(1, 2))


def _class_grams(axis_name: str | None, features: Array, memberships: Array) -> Array:
    """Σₙ π_nk zₙ zₙᵀ, `[num_clusters, features, features]`."""
    clusters, dimension = memberships.shape[1], features.shape[1]
    # Features first: a CPU takes twice as long for a product whose left side is transposed.
    weighted = (features.T[None] * memberships.T[:, None]).reshape(clusters * dimension, -1)
    grams = jnp.matmul(weighted, features, precision="highest")
    return sum_over(grams, axis_name).reshape(clusters, dimension, dimension)


def _inverse(factor: Array) -> Array:
    """(L Lᵀ)⁻¹ of Cholesky factors `[..., d, d]`."""
    half = lax.linalg.triangular_solve(factor, _identities(factor), left_side=True, lower=True)
    return jnp.matmul(half.mT, half, precision="highest")


def _identities(matrices: Array) -> Array:
    return jnp.broadcast_to(jnp.eye(matrices.shape[-1], dtype=matrices.dtype), matrices.shape)


def _log_det_and_factor(gram: Array) -> tuple[Array, Array]:
    factor = lax.linalg.cholesky(gram + _identities(gram), symmetrize_input=False)
    return 2 * jnp.sum(jnp.log(jnp.diagonal(factor, axis1=-2, axis2=-1)), axis=-1), factor


def _axis_size(axis_name: str | None) -> int:
    return 1 if axis_name is None else lax.axis_size(axis_name)


def _unit_views(features: Array) -> Array:
    """Checked features of unit norm, at least in float32."""
    return normalize(at_least_float32(_check_views("features", features)))


def _check_views(name: str, values: Any) -> Array:
    last = "features" if name == "features" else "num_clusters"
    values = check_array(name, values, ndim=3, axes=f"[views, batch, {last}]")
    if values.shape[0] < 2:
        raise ValueError(
            f"{name} has {values.shape[0]} view (shape {tuple(values.shape)}); at least 2 needed"
        )
    return values


def _check_memberships(memberships: Any, batch: int) -> Array:
    memberships = check_array("memberships", memberships, ndim=2, axes="[batch, num_clusters]")
    if memberships.shape[0] != batch:
        raise ValueError(
            f"memberships holds {memberships.shape[0]} rows (shape {tuple(memberships.shape)}), but "
            f"features holds {batch}"
        )
    if isinstance(memberships, jax.core.Tracer):
        return memberships
    values = np.asarray(memberships)
    sums = values.sum(axis=1, dtype=np.float64)
    rounding = 1e-3 if values.dtype.itemsize > 2 else 1e-2
    if not (np.all(values >= 0) and np.allclose(sums, 1, atol=rounding)):
        raise ValueError(
            "memberships must be non-negative rows that sum to one, got sums between "
            f"{sums.min():.4g} and {sums.max():.4g} and a smallest value of {values.min():.4g}"
        )
    return memberships
