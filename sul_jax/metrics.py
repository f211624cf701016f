"""How well clusters agree with classes, computed on the host; arguments are in scikit-learn's order.

Values are between 0 and 1. The papers differ: 000 and 003 report the one-to-one accuracy, the code
of 002 the purity, 004 the normalised mutual information.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

# SciPy and scikit-learn are imported where they are called: `import sul_jax` takes half the time.


def clustering_accuracy(labels_true: ArrayLike, labels_pred: ArrayLike) -> float:
    """Share of examples that agree under the best one-to-one map of clusters to classes.

    Args:
      labels_true: `[num_examples]`, classes.
      labels_pred: `[num_examples]`, clusters; their number may differ from that of the classes.

    Returns:
      Between 0 and 1; the clustering error is one minus this.

    Raises:
      ValueError: lengths differ, there are no examples, a label is missing (NaN, None), or labels are not all
        numbers or all strings; so it is for all functions here.

    Example:
      >>> from sul_jax import metrics
      >>> metrics.clustering_accuracy([0, 0, 1, 1], [7, 7, 7, 3])
      0.75
    """
    table = _contingency(*_labels(labels_true, labels_pred))
    return float(table[_best_match(table)].sum() / table.sum())


def clustering_error(labels_true: ArrayLike, labels_pred: ArrayLike) -> float:
    """One minus the `clustering_accuracy`, as papers 000 and 003 (on COIL) print it.

    Example:
      >>> from sul_jax import metrics
      >>> metrics.clustering_error([0, 0, 1, 1], [7, 7, 7, 3])
      0.25
    """
    return 1 - clustering_accuracy(labels_true, labels_pred)


def purity(labels_true: ArrayLike, labels_pred: ArrayLike) -> float:
    """Share of examples that belong to the majority class of their cluster (many-to-one).

    Example:
      >>> from sul_jax import metrics
      >>> metrics.purity([0, 0, 1, 1], [0, 1, 2, 2])
      1.0
    """
    table = _contingency(*_labels(labels_true, labels_pred))
    return float(table.max(axis=0).sum() / table.sum())


def normalized_mutual_info(labels_true: ArrayLike, labels_pred: ArrayLike) -> float:
    """Mutual information over the mean of the two entropies.

    Example:
      >>> from sul_jax import metrics
      >>> metrics.normalized_mutual_info([0, 0, 1, 1], [1, 1, 0, 0])
      1.0
    """
    from sklearn.metrics import normalized_mutual_info_score

    return float(normalized_mutual_info_score(*_labels(labels_true, labels_pred)))


def adjusted_rand_index(labels_true: ArrayLike, labels_pred: ArrayLike) -> float:
    """Pairs of examples on which the two agree, adjusted so that chance gives 0.

    Example:
      >>> from sul_jax import metrics
      >>> metrics.adjusted_rand_index([0, 0, 1, 1], [1, 1, 0, 0])
      1.0
    """
    from sklearn.metrics import adjusted_rand_score

    return float(adjusted_rand_score(*_labels(labels_true, labels_pred)))


def in_percent(
    labels_true: ArrayLike,
    labels_pred: ArrayLike,
    measures: Sequence[Callable[[ArrayLike, ArrayLike], float]] = (
        clustering_accuracy,
        normalized_mutual_info,
        adjusted_rand_index,
    ),
) -> dict[str, float]:
    """Several measures of how clusters agree with classes, by name.

    Args:
      labels_true: `[num_examples]`, classes.
      labels_pred: `[num_examples]`, clusters.
      measures: functions of this file; by default what methods are compared by.

    Returns:
      Their values in percent, unrounded.

    Example:
      >>> from sul_jax import metrics
      >>> metrics.in_percent([0, 0, 1, 1], [1, 1, 0, 1], [metrics.clustering_accuracy, metrics.purity])
      {'clustering_accuracy': 75.0, 'purity': 75.0}
    """
    return {measure.__name__: 100 * measure(labels_true, labels_pred) for measure in measures}


def agreement(clusterings: Sequence[ArrayLike]) -> np.ndarray:
    """Adjusted Rand index between every two clusterings of the same examples.

    Clusterings from different seeds that agree are stable; they need not be right.

    Args:
      clusterings: each `[num_examples]`.

    Returns:
      `[num_clusterings, num_clusterings]`, with ones on the diagonal.

    Raises:
      ValueError: lengths differ, or there are no examples.

    Example:
      >>> from sul_jax import metrics
      >>> metrics.agreement([[0, 0, 1, 1], [1, 1, 0, 0]]).tolist()
      [[1.0, 1.0], [1.0, 1.0]]
    """
    table = np.ones((len(clusterings), len(clusterings)))
    for (i, one), (j, other) in itertools.combinations(enumerate(clusterings), 2):
        table[i, j] = table[j, i] = adjusted_rand_index(one, other)
    return table


def mean_agreement(table: np.ndarray) -> float:
    """The mean of all pairs in a table of `agreement`; 0 where there is a single clustering.

    Example:
      >>> import numpy as np
      >>> from sul_jax import metrics
      >>> metrics.mean_agreement(np.array([[1.0, 0.5], [0.5, 1.0]]))
      0.5
    """
    between = table[~np.eye(len(table), dtype=bool)]
    return float(between.mean()) if between.size else 0.0


def match_clusters(labels_true: ArrayLike, labels_pred: ArrayLike) -> dict[Any, Any]:
    """The map of clusters to classes behind `clustering_accuracy`; surplus clusters are left out.

    Example:
      >>> from sul_jax import metrics
      >>> metrics.match_clusters([0, 0, 1, 1], [7, 7, 7, 3])
      {7: 0, 3: 1}
      >>> metrics.match_clusters(["cat", "cat", "dog"], [1, 1, 0])
      {1: 'cat', 0: 'dog'}
    """
    rows, columns = _best_match(_contingency(*_labels(labels_true, labels_pred)))
    classes, clusters = (np.unique(np.asarray(labels)).tolist() for labels in (labels_true, labels_pred))
    return {clusters[c]: classes[r] for r, c in zip(rows, columns, strict=True)}


def _best_match(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Classes and clusters, one to one."""
    from scipy.optimize import linear_sum_assignment

    classes, clusters = linear_sum_assignment(table, maximize=True)
    return classes, clusters


def _contingency(true: np.ndarray, pred: np.ndarray) -> np.ndarray:
    from sklearn.metrics.cluster import contingency_matrix

    return np.asarray(contingency_matrix(true, pred))


def _labels(labels_true: ArrayLike, labels_pred: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Places of the labels among the different ones, in their order."""
    true, pred = _plain(labels_true), _plain(labels_pred)
    if true.ndim != 1 or true.shape != pred.shape or true.size == 0:
        raise ValueError(
            "labels_true and labels_pred must be non-empty vectors of one length, got shapes "
            f"{true.shape} and {pred.shape}"
        )
    return _places("labels_true", true), _places("labels_pred", pred)


def _plain(labels: ArrayLike) -> np.ndarray:
    array = np.asarray(labels)
    # NumPy makes strings of NaN and numbers beside strings.
    return np.asarray(labels, object) if array.dtype.kind in "US" else array


def _places(name: str, labels: np.ndarray) -> np.ndarray:
    # What is missing differs from itself, or is None.
    missing = int(np.sum((labels != labels) | (labels == None)))  # noqa: E711
    if missing:
        raise ValueError(
            f"{name} lacks {missing} of {labels.size} labels (NaN or None): leave these examples out"
        )
    try:
        return np.unique(labels, return_inverse=True)[1]
    except TypeError:
        raise ValueError(f"{name} must be all numbers or all strings, got a mix or other types") from None
