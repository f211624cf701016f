"""Clustering of codes and its agreement with labels: the same for every experiment."""

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax
from tqdm import tqdm

from sul_jax import k_means, k_subspaces, metrics, whitening

# Compiled once for each shape, however often `cluster` is called.
_fit = jax.jit(k_means.fit, static_argnames=("num_clusters", "num_init"))


# Rounds in which vectors may be added to those that express another one.
_ACTIVE_SET_ROUNDS = 40


class Clustering(NamedTuple):
    """A k-means clustering of codes, in percent against labels where there are any.

    Attributes:
      labels: `[num_examples]`, clusters.
      centroids: `[num_clusters, features]`.
      clustering_error: 100 less the one-to-one accuracy.
      purity, normalized_mutual_info, adjusted_rand_index: as in `sul_jax.metrics`, in percent.
    """

    labels: np.ndarray
    centroids: Array
    clustering_error: float | None
    purity: float | None
    normalized_mutual_info: float | None
    adjusted_rand_index: float | None


def to_float(images: Array) -> Array:
    """Pixels in [0, 1] from uint8; floating images stay as they are."""
    return images / jnp.float32(255) if images.dtype == jnp.uint8 else images


def map_batches(
    function: Callable[[Array], Any], images: np.ndarray | Array, *, batch_size: int = 500
) -> Any:
    """Applies a compiled function to images batch by batch; it sees batches of one size.

    Args:
      function: maps `[batch, ...]` to an array `[batch, ...]` or a tree of such arrays, image by image.
      images: `[num_images, ...]`.
      batch_size: images at a time.

    Returns:
      The concatenated results.
    """
    number = len(images)
    if number <= batch_size:
        return function(jnp.asarray(images))
    starts = range(0, number, batch_size)
    # Slicing an array on the device would compile a program for each place.
    cut = (
        (lambda s: jnp.asarray(images[s : s + batch_size]))
        if isinstance(images, np.ndarray)
        else (lambda s: _window(images, s, size=batch_size))
    )
    # The last batch ends with the last image; those that the one before has had already are cut off.
    parts = [function(cut(min(s, number - batch_size))) for s in starts]
    repeated = len(starts) * batch_size - number
    parts[-1] = jax.tree.map(lambda array: array[repeated:], parts[-1])
    return jax.tree.map(lambda *arrays: jnp.concatenate(arrays), *parts)


@partial(jax.jit, static_argnames="size")
def _window(images: Array, start: int | Array, *, size: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(images, start, size)


def cluster(
    key: Array,
    codes: Array,
    labels_true: np.ndarray | None,
    *,
    num_clusters: int,
    num_init: int = 10,
) -> Clustering:
    """k-means (k-means++, best of `num_init`) on the codes themselves, then the metrics.

    Args:
      key: `jax.random.key`.
      codes: `[num_examples, ...]`, flattened.
      labels_true: `[num_examples]` or None.
      num_clusters: k.
      num_init: starts of k-means.

    Returns:
      A `Clustering`.
    """
    flat = codes.reshape(codes.shape[0], -1)
    result = _fit(key, flat, num_clusters=num_clusters, num_init=num_init)
    found = np.asarray(result.labels)
    if labels_true is None:
        return Clustering(found, result.centroids, None, None, None, None)
    return Clustering(found, result.centroids, **agreement(labels_true, found))


def agreement(labels_true: np.ndarray, found: np.ndarray) -> dict[str, float]:
    """Clustering error, purity, NMI and ARI in percent.

    Args:
      labels_true: `[num_examples]`.
      found: `[num_examples]`, clusters.

    Example:
      >>> import numpy as np
      >>> from experiments.common import evaluation
      >>> evaluation.agreement(np.array([0, 0, 1, 1]), np.array([1, 1, 0, 1]))["clustering_error"]
      25.0
    """
    return {
        "clustering_error": 100 * (1 - metrics.clustering_accuracy(labels_true, found)),
        "purity": 100 * metrics.purity(labels_true, found),
        "normalized_mutual_info": 100 * metrics.normalized_mutual_info(labels_true, found),
        "adjusted_rand_index": 100 * metrics.adjusted_rand_index(labels_true, found),
    }


def scores(labels_true: np.ndarray, found: np.ndarray) -> dict[str, float]:
    """One-to-one accuracy, NMI and ARI in percent: what methods are compared by.

    Args:
      labels_true: `[num_examples]`.
      found: `[num_examples]`, clusters.

    Example:
      >>> import numpy as np
      >>> from experiments.common import evaluation
      >>> evaluation.scores(np.array([0, 0, 1, 1]), np.array([1, 1, 0, 1]))["clustering_accuracy"]
      75.0
    """
    judged = agreement(labels_true, found)
    return {
        "clustering_accuracy": 100 - judged["clustering_error"],
        "normalized_mutual_info": judged["normalized_mutual_info"],
        "adjusted_rand_index": judged["adjusted_rand_index"],
    }


class SubspaceClusters(NamedTuple):
    """What `subspace_clustering` finds.

    Attributes:
      labels: `[num_examples]`, clusters.
      gamma: the value taken.
      num_parts: connected parts of the graph.
    """

    labels: np.ndarray
    gamma: float
    num_parts: int


def subspace_clustering(
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
    vectors X, λ = max |⟨x, X⟩| / (γ τ) (You et al. 2016).

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
            fitted, found = support, model.fit(features[support].T, x).coef_
            violation = np.abs(features @ (x - found @ features[support]))
            violation[[index, *support]] = 0
            missing = np.flatnonzero(violation > 1.01 * penalty * l1_ratio)
            if not missing.size:
                break
            used = support[found != 0]
            support = np.concatenate([used, missing[np.argsort(-violation[missing])][:num_candidates]])
        largest = np.argsort(-np.abs(found))[:num_kept]
        coefficients[index, fitted[largest]] = np.abs(found[largest])
    norms = np.linalg.norm(coefficients, axis=1, keepdims=True)
    return coefficients / np.where(norms > 0, norms, 1)


def classifiers(
    train: np.ndarray,
    train_labels: np.ndarray,
    test: np.ndarray,
    test_labels: np.ndarray,
    *,
    names: Sequence[str] = ("svm", "knn", "nearest_subspace"),
    num_neighbors: int = 20,
    subspace_rank: int = 10,
) -> dict[str, float]:
    """Test accuracies in percent of simple classifiers on features scaled to unit norm.

    Args:
      train: `[num_train, features]`.
      train_labels: `[num_train]`.
      test: `[num_test, features]`.
      test_labels: `[num_test]`.
      names: which of `svm` (linear), `knn` (by cosine), `nearest_subspace` (each class's leading singular
        vectors; the largest projection wins).
      num_neighbors: of `knn`, at most as many as there are vectors.
      subspace_rank: of `nearest_subspace`, at most the size of the smallest class.

    Example:
      >>> import numpy as np
      >>> from experiments.common import evaluation
      >>> codes, labels = np.repeat(np.eye(2, dtype=np.float32), 30, axis=0), np.repeat([0, 1], 30)
      >>> evaluation.classifiers(codes, labels, codes, labels, subspace_rank=1)
      {'svm': 100.0, 'knn': 100.0, 'nearest_subspace': 100.0}
    """
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.svm import LinearSVC

    train, test = (np.asarray(whitening.normalize(jnp.asarray(values))) for values in (train, test))

    def predict(name: str) -> np.ndarray:
        if name == "nearest_subspace":
            classes, counts = np.unique(train_labels, return_counts=True)
            rank = min(subspace_rank, train.shape[1], counts.min())
            parts = [np.linalg.svd(train[train_labels == c], full_matrices=False)[2][:rank] for c in classes]
            state = k_subspaces.KSubspacesState(jnp.asarray(np.stack(parts)))
            return classes[np.asarray(k_subspaces.assign(state, jnp.asarray(test)))]
        neighbors = min(num_neighbors, len(train))
        model = (
            LinearSVC(random_state=0) if name == "svm" else KNeighborsClassifier(neighbors, metric="cosine")
        )
        return np.asarray(model.fit(train, train_labels).predict(test))

    return {name: float(100 * np.mean(predict(name) == test_labels)) for name in names}


def linear_probe(
    key: Array,
    train: Array,
    train_labels: np.ndarray,
    test: Array,
    test_labels: np.ndarray,
    *,
    num_epochs: int = 20,
    batch_size: int = 256,
    learning_rate: float = 0.01,
    momentum: float = 0.9,
    weight_decay: float = 1e-4,
) -> float:
    """Test accuracy in percent of a linear classifier on fixed features.

    Multinomial logistic regression by stochastic gradient descent, with the learning rate
    η / √(1 + ηλt) at step t as in DeepCluster's evaluation.

    Args:
      key: `jax.random.key`, of the order of the examples.
      train: `[num_train, features]`.
      train_labels: `[num_train]`, from 0 on.
      test: `[num_test, features]`.
      test_labels: `[num_test]`.
      num_epochs: passes over the training features.
      batch_size: features in a minibatch; a last partial one is dropped.
      learning_rate: η.
      momentum: of the descent.
      weight_decay: λ, an L2 penalty added to the gradients.

    Example:
      >>> import jax
      >>> import numpy as np
      >>> from experiments.common import evaluation
      >>> codes, labels = np.repeat(np.eye(2, dtype=np.float32), 50, axis=0), np.repeat([0, 1], 50)
      >>> evaluation.linear_probe(jax.random.key(0), codes, labels, codes, labels, batch_size=10)
      100.0
    """
    weights = _probe(
        key,
        jnp.asarray(train),
        jnp.asarray(train_labels),
        num_classes=int(max(train_labels.max(), test_labels.max())) + 1,
        num_epochs=num_epochs,
        batch_size=min(batch_size, len(train)),
        learning_rate=learning_rate,
        momentum=momentum,
        weight_decay=weight_decay,
    )
    found = np.argmax(np.asarray(test @ weights[0] + weights[1]), axis=1)
    return float(100 * np.mean(found == test_labels))


@partial(jax.jit, static_argnames=("num_classes", "num_epochs", "batch_size"))
def _probe(
    key: Array,
    codes: Array,
    labels: Array,
    *,
    num_classes: int,
    num_epochs: int,
    batch_size: int,
    learning_rate: float | Array,
    momentum: float | Array,
    weight_decay: float | Array,
) -> tuple[Array, Array]:
    """Kernel and bias of `linear_probe`."""
    steps = len(codes) // batch_size
    optimizer = optax.chain(
        optax.add_decayed_weights(weight_decay),
        optax.sgd(lambda t: learning_rate / jnp.sqrt(1 + learning_rate * weight_decay * t), momentum),
    )

    def loss(weights: tuple[Array, Array], codes: Array, labels: Array) -> Array:
        logits = jnp.matmul(codes, weights[0], precision="highest") + weights[1]
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))

    def epoch(index: Array, carry: Any) -> Any:
        order = jax.random.permutation(jax.random.fold_in(key, index), len(codes))

        def step(carry: Any, chosen: Array) -> tuple[Any, None]:
            weights, memory = carry
            gradients = jax.grad(loss)(weights, codes[chosen], labels[chosen])
            changes, memory = optimizer.update(gradients, memory, weights)
            return (optax.apply_updates(weights, changes), memory), None

        return lax.scan(step, carry, order[: steps * batch_size].reshape(steps, batch_size))[0]

    weights = jnp.zeros((codes.shape[1], num_classes)), jnp.zeros(num_classes)
    last: tuple[tuple[Array, Array], Any]
    last = lax.fori_loop(0, num_epochs, epoch, (weights, optimizer.init(weights)))
    return last[0]
