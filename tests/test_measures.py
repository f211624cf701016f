"""Measures of clusters without labels, on vectors whose number of clusters is known."""

import numpy as np
import pytest
from sklearn import metrics
from sklearn.datasets import make_blobs

from sul_jax.cli import figures, measures
from sul_jax.estimators import KMeans


@pytest.fixture(scope="module")
def blobs() -> np.ndarray:
    x, _ = make_blobs(400, 6, centers=5, cluster_std=0.5, random_state=3)
    return x.astype(np.float32)


def test_the_planted_number_is_chosen(blobs: np.ndarray) -> None:
    clusterings = {n: KMeans(n, random_state=0).fit_predict(blobs) for n in (3, 5, 9)}
    found = measures.label_free(blobs, clusterings)
    assert measures.best(found) == {"silhouette": 5, "gap": 5, "coding_length": 5}
    for n, labels in clusterings.items():
        assert found[n]["silhouette"] == pytest.approx(metrics.silhouette_score(blobs, labels), abs=1e-4)


def test_clusters_that_measures_cannot_judge() -> None:
    """One cluster alone, empty clusters, equal codes, a cluster for each code: numbers all the same."""
    varied = np.random.default_rng(0).random((20, 3))
    clusterings = {2: np.zeros(20, int), 4: np.arange(20) % 2, 20: np.arange(20)}
    for codes in (varied, np.ones((20, 3)), 1 + varied[:, :1], np.zeros((20, 2))):
        found = measures.label_free(codes, clusterings)
        assert all(np.isfinite(list(own.values())).all() for own in found.values())
        assert found[2]["silhouette"] == found[20]["silhouette"] == found[20]["gap"] == 0
    assert measures.label_free(varied, clusterings)[4]["silhouette"] != 0


def test_directions_alone() -> None:
    """Vectors of very different norms, whose clusters are directions."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, 5, 300)
    x = (np.eye(5)[y] + 0.05 * rng.standard_normal((300, 5))) * np.exp(rng.normal(size=(300, 1)))
    clusterings = {n: KMeans(n, metric="cosine", random_state=0).fit_predict(x) for n in (3, 5, 8)}
    found = measures.best(measures.label_free(x, clusterings, directions=True))
    assert found["silhouette"] == found["gap"] == 5
    assert measures.label_free(x, clusterings)[5]["silhouette"] < 0.5


def test_some_of_many(blobs: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    labels = KMeans(5, random_state=0).fit_predict(blobs)
    every = measures.label_free(blobs, {5: labels})[5]
    monkeypatch.setattr(measures, "_SOME", 150)  # more than five for each cluster
    some = measures.label_free(blobs, {5: labels})[5]
    assert some == measures.label_free(blobs, {5: labels})[5] != every
    assert some["silhouette"] == pytest.approx(every["silhouette"], abs=0.05)


def test_a_gap_that_falls_is_enough() -> None:
    """Whatever larger numbers give, and in whatever order they were asked for."""
    gaps = {12: 1.1, 20: 1.5, 5: 0.4, 10: 1.2}
    assert measures.best({n: {"gap": gap} for n, gap in gaps.items()}) == {"gap": 10}
    assert measures.best({n: {"gap": n / 10} for n in (8, 5)}) == {"gap": 8}


def test_a_figure_has_a_column_for_each_measure() -> None:
    of = {name: {n: {"gap": n / 10, "coding_length": float(n)} for n in (2, 3, 4)} for name in ("a", "b")}
    axes = figures.measures_grid(of, 3).axes
    assert len(axes) == 4
    assert [one.get_title() for one in axes[:2]] == ["gap statistic", "coding length"]
