from itertools import permutations
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sul_jax import metrics

labelings = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=30).map(
    lambda pairs: np.array(pairs).T
)


@given(labelings)
def test_accuracy_is_the_best_permutation(pair: np.ndarray) -> None:
    true, pred = pair
    best = max(np.mean(np.array(p)[pred] == true) for p in permutations(range(4)))
    assert metrics.clustering_accuracy(true, pred) == pytest.approx(best)


@given(labelings)
def test_order_and_invariances(pair: np.ndarray) -> None:
    true, pred = pair
    assert metrics.purity(true, pred) >= metrics.clustering_accuracy(true, pred) - 1e-12
    for measure in (
        metrics.clustering_accuracy,
        metrics.purity,
        metrics.normalized_mutual_info,
        metrics.adjusted_rand_index,
    ):
        assert measure(true, pred) == pytest.approx(measure(true, 10 - pred))  # names do not matter
        assert measure(true, true) == pytest.approx(1)


def test_more_clusters_than_classes() -> None:
    assert metrics.clustering_accuracy([0, 0, 0, 1], [0, 0, 2, 1]) == 0.75
    assert metrics.match_clusters([0, 0, 0, 1], [0, 0, 2, 1]) == {0: 0, 1: 1}


@pytest.mark.parametrize(
    ("true", "pred", "expected"),
    [
        (["cat", "cat", "dog", "dog"], [7, 7, 7, 3], {7: "cat", 3: "dog"}),
        ([0, 0, 1, 1], ["b", "b", "b", "a"], {"b": 0, "a": 1}),
        ([0.5, 0.5, 0.25, 0.25], [1.0, 1.0, 1.0, 2.5], {1.0: 0.5, 2.5: 0.25}),
        (np.array(["x", "x", "y", "y"], object), [True, True, True, False], {True: "x", False: "y"}),
    ],
)
def test_labels_of_other_types(true: Any, pred: Any, expected: dict) -> None:
    assert metrics.match_clusters(true, pred) == expected
    assert {type(key) for key in metrics.match_clusters(true, pred)} == {type(key) for key in expected}
    for measure in (
        metrics.clustering_accuracy,
        metrics.purity,
        metrics.normalized_mutual_info,
        metrics.adjusted_rand_index,
    ):
        assert measure(true, pred) == measure([0, 0, 1, 1], [0, 0, 0, 1])
        assert metrics.agreement([true, pred])[0, 1] == metrics.adjusted_rand_index(true, pred)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, np.nan, np.nan, 1], r"lacks 2 of 4 labels \(NaN or None\): leave these examples out$"),
        ([0, None, 1, 1], r"lacks 1 of 4 labels"),
        (["a", None, "b", "b"], r"lacks 1 of 4 labels"),
        (["a", float("nan"), "b", "b"], r"lacks 1 of 4 labels"),
        (np.array(["a", 1, "b", 2], object), "must be all numbers or all strings"),
    ],
)
def test_labels_that_are_missing_or_mixed(labels: Any, message: str) -> None:
    for measure in (metrics.clustering_accuracy, metrics.normalized_mutual_info, metrics.match_clusters):
        with pytest.raises(ValueError, match=f"^labels_true {message}"):
            measure(labels, [0, 0, 1, 1])
        with pytest.raises(ValueError, match=f"^labels_pred {message}"):
            measure([0, 0, 1, 1], labels)


@pytest.mark.parametrize("pair", [([], []), ([0, 1], [0]), ([[0]], [[0]])])
def test_bad_input(pair: tuple) -> None:
    with pytest.raises(ValueError, match="non-empty vectors of one length"):
        metrics.clustering_accuracy(*pair)


def test_purity_is_that_of_the_clusters() -> None:
    assert metrics.purity([0, 0, 1, 1], [0, 1, 2, 2]) == 1
    assert metrics.purity([0, 0, 1, 1], [0, 0, 0, 0]) == 0.5
