from itertools import permutations

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


@pytest.mark.parametrize("pair", [([], []), ([0, 1], [0]), ([[0]], [[0]])])
def test_bad_input(pair: tuple) -> None:
    with pytest.raises(ValueError, match="non-empty vectors of one length"):
        metrics.clustering_accuracy(*pair)
