"""Subspace clustering of many vectors by how they express each other (You et al. 2016).

A vector can be written as a sum of other vectors of its own subspace. The graph of these sums splits into the
subspaces. It runs on the host, with scikit-learn.
"""

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from sul_jax._check import check_number

# Rounds in which vectors may be added to those that express another one.
_ACTIVE_SET_ROUNDS = 40


class SubspaceClusters(NamedTuple):
    """What `fit` finds.

    Attributes:
      labels: `[num_examples]`, clusters.
      gamma: the value taken.
      num_parts: connected parts of the graph.
    """

    labels: np.ndarray
    gamma: float
    num_parts: int


def fit(
    features: np.ndarray,
    *,
    num_clusters: int,
    gamma: float | Sequence[float],
    l1_ratio: float = 1.0,
    num_candidates: int = 100,
    num_kept: int = 50,
    seed: int = 0,
) -> SubspaceClusters:
    """Sparse subspace clustering: each vector from the others, then spectral clustering.

    The larger γ, the more others a vector is expressed by. Of several values the smallest is taken whose
    graph has at most as many connected parts as there are clusters, or else the largest.

    Args:
      features: `[num_examples, features]`, of unit norm.
      num_clusters: number of clusters.
      gamma: γ of `self_expression`, or several.
      l1_ratio: τ there.
      num_candidates, num_kept: as there.
      seed: of the spectral clustering.

    Returns:
      A `SubspaceClusters`.

    Example:
      >>> import numpy as np
      >>> from sul_jax import subspace_clustering
      >>> generator = np.random.default_rng(0)
      >>> planes = generator.normal(size=(2, 60, 3)) @ generator.normal(size=(2, 3, 12))  # two subspaces
      >>> points = planes.reshape(120, 12)
      >>> points /= np.linalg.norm(points, axis=1, keepdims=True)
      >>> labels = subspace_clustering.fit(points, num_clusters=2, gamma=20.0).labels
      >>> len(set(labels[:60])), len(set(labels[60:])), bool(labels[0] != labels[60])
      (1, 1, True)
    """
    from scipy.sparse.csgraph import connected_components
    from sklearn.cluster import KMeans
    from sklearn.manifold import spectral_embedding
    from sklearn.preprocessing import normalize

    for value in sorted([gamma] if isinstance(gamma, float | int) else gamma):
        coefficients = self_expression(
            features, gamma=value, l1_ratio=l1_ratio, num_candidates=num_candidates, num_kept=num_kept
        )
        affinity = (coefficients + coefficients.T) / 2
        parts = connected_components(affinity > 0)[0]
        if parts <= num_clusters:
            break
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Graph is not fully connected")  # so much the better
        embedding = spectral_embedding(
            affinity, n_components=num_clusters, drop_first=False, random_state=seed
        )
    # Rows of unit norm: else a few vectors that few others are like take a centre each.
    model = KMeans(num_clusters, n_init=20, random_state=seed)
    return SubspaceClusters(np.asarray(model.fit_predict(normalize(embedding))), value, int(parts))


def self_expression(
    features: np.ndarray,
    *,
    gamma: float,
    l1_ratio: float = 1.0,
    num_candidates: int = 100,
    num_kept: int = 50,
) -> np.ndarray:
    """Coefficients of each vector in the others.

    Vector x is expressed by c, the minimiser of ½‖x − cX‖² + λ (τ‖c‖₁ + ½(1 − τ)‖c‖²) over the other
    vectors X, λ = max `|⟨x, X⟩|` / (γ τ) (You et al. 2016).

    Args:
      features: `[num_examples, features]`, of unit norm.
      gamma: γ; at 1 or below nothing is expressed.
      l1_ratio: τ in (0, 1]; 1 is the lasso.
      num_candidates: most similar vectors to start from; those that violate optimality are added.
      num_kept: coefficients kept of each vector, the largest.

    Returns:
      `[num_examples, num_examples]`, absolute values, rows of unit norm.
    """
    from sklearn.linear_model import ElasticNet, LassoLars

    check_number("gamma", gamma, above=0)
    check_number("l1_ratio", l1_ratio, above=0, high=1)
    number, dimension = features.shape
    features = features.astype(np.float64)
    coefficients = np.zeros((number, number))
    for index, x in enumerate(tqdm(features, desc="self-expression", unit="vector")):
        similarity = np.abs(features @ x)
        similarity[index] = 0
        penalty = similarity.max() / (gamma * l1_ratio)
        # scikit-learn divides the squared error by the number of rows.
        options = {"alpha": max(penalty / dimension, 1e-12), "fit_intercept": False, "max_iter": 5000}
        lasso = l1_ratio == 1
        model = LassoLars(**options) if lasso else ElasticNet(l1_ratio=l1_ratio, tol=1e-6, **options)
        support = np.argsort(-similarity)[: min(num_candidates, number - 1)]
        for _ in range(_ACTIVE_SET_ROUNDS):
            fitted, weights = support, model.fit(features[support].T, x).coef_
            violation = np.abs(features @ (x - weights @ features[support]))
            violation[[index, *support]] = 0
            missing = np.flatnonzero(violation > 1.01 * penalty * l1_ratio)
            if not missing.size:
                break
            used = support[weights != 0]
            support = np.concatenate([used, missing[np.argsort(-violation[missing])][:num_candidates]])
        largest = np.argsort(-np.abs(weights))[:num_kept]
        coefficients[index, fitted[largest]] = np.abs(weights[largest])
    norms = np.linalg.norm(coefficients, axis=1, keepdims=True)
    return coefficients / np.where(norms > 0, norms, 1)
