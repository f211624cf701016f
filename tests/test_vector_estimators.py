"""Estimators for vectors: scikit-learn's own checks, in memory as on disk, and what each is for."""

import pickle
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn import cluster
from sklearn.base import clone
from sklearn.datasets import make_blobs
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils.estimator_checks import parametrize_with_checks

from sul_jax import estimators, metrics, training, vectors
from sul_jax.estimators import (
    HebbianFeatures,
    KMeans,
    KSubspaces,
    RateReductionClustering,
    _vectors,
    rate_reduction,
)

ESTIMATORS = [
    KMeans(3, random_state=0),
    KMeans(3, metric="cosine", random_state=0),
    KSubspaces(3, n_init=2, random_state=0),
    HebbianFeatures(4, epochs=2, batch_size=16, random_state=0),
]


def expected(estimator: Any) -> dict[str, str]:
    """Checks that do not fit; scikit-learn's own KMeans is excused from the first as well."""
    if not isinstance(estimator, KMeans):
        return {}
    return {
        "check_sample_weight_equivalence_on_dense_data": "it shuffles, and starts are drawn by place; in the "
        "same order weights are repetitions (see test_k_means)"
    }


RATE_REDUCTION = RateReductionClustering(
    3, hidden_size=16, num_features=4, batch_size=32, max_steps=1, random_state=0
)


# Of k-means one metric: the checks are about conventions, which both share.
@parametrize_with_checks([ESTIMATORS[0], ESTIMATORS[3]], expected_failed_checks=expected)
def test_scikit_learns_checks(estimator: Any, check: Any) -> None:
    check(estimator)


@pytest.mark.slow
@parametrize_with_checks([ESTIMATORS[2], RATE_REDUCTION], expected_failed_checks=expected)
def test_scikit_learns_checks_of_larger_models(estimator: Any, check: Any) -> None:
    check(estimator)


def blobs(number: int = 600, clusters: int = 6) -> tuple[np.ndarray, np.ndarray]:
    x, y = make_blobs(number, 8, centers=clusters, cluster_std=0.4, random_state=0)
    return x.astype(np.float32), y


def shards(folder: Path, x: np.ndarray) -> Path:
    for number, part in enumerate(np.array_split(x, 3)):
        np.save(folder / f"{number}.npy", part)
    return folder


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)
def test_on_disk_as_in_memory(estimator: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder, a memory map and an array that is too large at once give the same, in chunks on 8 devices."""
    monkeypatch.setattr(_vectors, "_CHUNK", 128)
    x, _ = blobs()
    folder = shards(tmp_path, x)
    np.save(tmp_path.with_suffix(".npy"), x)
    memory_map = np.load(tmp_path.with_suffix(".npy"), mmap_mode="r")
    model = clone(estimator).set_params(n_clusters=6) if "n_clusters" in estimator.get_params() else estimator
    here = clone(model).fit(x)
    for source in (folder, memory_map):
        there = clone(model).fit(source)
        codes = there.transform(source)
        np.testing.assert_allclose(codes, there.transform(x), rtol=1e-4, atol=1e-4)
        if hasattr(there, "labels_"):
            np.testing.assert_array_equal(there.predict(x), there.labels_)
            assert metrics.clustering_accuracy(here.labels_, there.labels_) == 1
            assert there.score(source) == pytest.approx(here.score(x), rel=1e-3)
    monkeypatch.setattr(_vectors, "_AT_ONCE", 0)
    np.testing.assert_allclose(clone(model).fit(x).transform(x), codes, rtol=1e-4, atol=1e-4)
    again = pickle.loads(pickle.dumps(there))
    np.testing.assert_array_equal(again.transform(x), there.transform(x))
    there.save(tmp_path / "model")
    loaded = estimators.load(tmp_path / "model")
    np.testing.assert_array_equal(loaded.transform(x), there.transform(x))
    assert repr(loaded) == repr(there)


def test_scale_of_float64_is_kept(tmp_path: Path) -> None:
    x, y = blobs()
    far = x.astype(np.float64) + 1e8
    model = KMeans(6, random_state=0).fit(far)
    assert metrics.clustering_accuracy(y, model.labels_) == 1
    means = np.stack([far[model.labels_ == k].mean(axis=0) for k in range(6)])
    np.testing.assert_allclose(model.cluster_centers_ - 1e8, means - 1e8, atol=1e-5)
    model.save(tmp_path / "model")
    loaded = estimators.load(tmp_path / "model")
    np.testing.assert_array_equal(loaded.cluster_centers_, model.cluster_centers_)
    np.testing.assert_array_equal(loaded.predict(far), model.labels_)


def test_k_means_is_scikit_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    x, _ = blobs()
    weights = np.random.default_rng(0).integers(0, 3, len(x))
    theirs = cluster.KMeans(6, n_init=10, random_state=0).fit(x, sample_weight=weights)
    for at_once in (2**28, 0):
        monkeypatch.setattr(_vectors, "_AT_ONCE", at_once)
        monkeypatch.setattr(_vectors, "_CHUNK", 96)
        ours = KMeans(6, random_state=0).fit(x, sample_weight=weights)
        assert ours.inertia_ == pytest.approx(theirs.inertia_, rel=1e-4)
        assert metrics.clustering_accuracy(theirs.labels_, ours.labels_) == 1
        np.testing.assert_allclose(np.sort(ours.counts_), np.sort(np.bincount(theirs.labels_, weights)))
        assert ours.score(x, sample_weight=weights) == pytest.approx(-ours.inertia_, rel=1e-6)
        exact = np.linalg.norm(x[:, None] - ours.cluster_centers_, axis=2)
        np.testing.assert_allclose(ours.transform(x), exact, atol=1e-3)


@pytest.mark.slow
def test_noisy_embeddings() -> None:
    """Directions of ten kinds in noise: as right as scikit-learn, and cosine where lengths mislead."""
    rng = np.random.default_rng(0)
    means = rng.standard_normal((10, 512))
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    y = rng.integers(0, 10, 2000)
    x = (means[y] + 0.13 * rng.standard_normal((2000, 512))).astype(np.float32)
    accuracy = [
        metrics.clustering_accuracy(y, model.fit_predict(x))
        for model in (KMeans(10, random_state=0), cluster.KMeans(10, n_init=10, random_state=0))
    ]
    assert accuracy[0] >= accuracy[1] > 0.9
    learned = RateReductionClustering(10, batch_size=500, max_steps=60, random_state=0).fit_predict(x)
    assert metrics.clustering_accuracy(y, learned) >= accuracy[1]
    lengths = np.exp(rng.standard_normal((2000, 1))).astype(np.float32)
    cosine = KMeans(10, metric="cosine", random_state=0).fit(x * lengths)
    assert metrics.clustering_accuracy(y, cosine.labels_) >= accuracy[1] - 0.01
    np.testing.assert_allclose(np.linalg.norm(cosine.cluster_centers_, axis=1), 1, rtol=1e-5)


def test_planted_subspaces() -> None:
    """Of 512 dimensions, through one origin: k-means cannot tell them apart."""
    rng = np.random.default_rng(0)
    bases = np.linalg.qr(rng.standard_normal((5, 512, 4)))[0]
    y = rng.integers(0, 5, 1000)
    x = np.einsum("nfr,nr->nf", bases[y], rng.standard_normal((1000, 4)))
    x = (x + 0.02 * rng.standard_normal(x.shape)).astype(np.float32)
    model = KSubspaces(5, rank=4, init="random", random_state=0).fit(x)
    assert metrics.clustering_accuracy(y, model.labels_) >= 0.99
    assert metrics.clustering_accuracy(y, KMeans(5, random_state=0).fit_predict(x)) < 0.7
    outside = x - (x @ model.bases_[0].T) @ model.bases_[0]
    np.testing.assert_allclose(model.transform(x)[:, 0], np.linalg.norm(outside, axis=1), atol=1e-2)
    assert model.energy_ == pytest.approx(-model.score(x), rel=1e-6)


def test_files_of_float64_far_from_zero(tmp_path: Path) -> None:
    """As exact as in memory, whichever is learned from and whichever is asked."""
    x = blobs()[0].astype(np.float64) + 1e8
    np.save(tmp_path / "x.npy", x)
    memory_map = np.load(tmp_path / "x.npy", mmap_mode="r")
    here, there = KMeans(6, random_state=0).fit(x), KMeans(6, random_state=0).fit(tmp_path / "x.npy")
    assert metrics.clustering_accuracy(here.labels_, there.labels_) == 1
    for model in (here, there):
        assert model.cluster_centers_.dtype == np.float64
        for source in (tmp_path / "x.npy", memory_map):
            np.testing.assert_array_equal(model.predict(source), model.labels_)
            assert model.score(source) == pytest.approx(-model.inertia_, rel=1e-5)


def test_cosine_depends_on_no_length(tmp_path: Path) -> None:
    """In chunks too, where steps end by how far the centres move on the sphere."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3000, 16), np.float32)
    found = []
    for scale in (1.0, 30.0, 1e-9):
        np.save(tmp_path / "x.npy", np.float32(scale) * x)
        model = KMeans(9, metric="cosine", n_init=1, random_state=0).fit(tmp_path / "x.npy")
        found.append((model.n_iter_, round(model.inertia_, 1)))
        np.testing.assert_array_equal(model.predict(x), model.labels_)
    assert len(set(found)) == 1


def test_starts_have_weight(tmp_path: Path) -> None:
    """Of many vectors without weight, none becomes a centre."""
    rng = np.random.default_rng(0)
    heavy = np.repeat([[5.0, 0], [0, 5], [-5, 0]], 10, axis=0) + 0.1 * rng.standard_normal((30, 2))
    x = np.float32(np.concatenate([100 * rng.standard_normal((900, 2)), heavy]))
    weights = np.float32([0] * 900 + [1] * 30)
    np.save(tmp_path / "x.npy", x)
    for model in (
        KMeans(3, random_state=0).fit(tmp_path / "x.npy", sample_weight=weights),
        KMeans(3, random_state=0).partial_fit(x, sample_weight=weights),
    ):
        np.testing.assert_array_equal(model.counts_, [10, 10, 10])


def test_learning_at_once_is_bounded_by_what_it_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    x, _ = blobs()
    model = KMeans(6, random_state=0).fit(x)
    assert model._given(x).array is not None
    monkeypatch.setattr(_vectors, "_AT_ONCE", x.nbytes)
    assert model._bytes_of_a_vector() == 4 * 10 * 3
    assert model._given(x).array is not None
    assert model.set_params(n_init=20)._given(x).array is None


def test_partial_fit_takes_the_mean_of_all_that_was_won() -> None:
    x, y = blobs(1200)
    model = KMeans(6, random_state=1)
    first = clone(model).partial_fit(x[:300])
    for start in range(0, 1200, 300):
        model.partial_fit(x[start : start + 300])
    assert model.counts_.sum() == 1200
    assert (model.n_iter_, first.n_iter_) == (4, 1)
    assert len(model.labels_) == 300
    assert metrics.clustering_accuracy(y, model.predict(x)) > 0.8
    whole = KMeans(6, random_state=0).fit(x[:600])
    counts, centers = whole.counts_.copy(), whole.cluster_centers_.copy()
    labels = whole.predict(x[600:])
    whole.partial_fit(x[600:])
    for k in range(6):
        won = x[600:][labels == k]
        expected = (counts[k] * centers[k] + won.sum(axis=0)) / (counts[k] + len(won))
        np.testing.assert_allclose(whole.cluster_centers_[k], expected, atol=1e-4)


def test_hebbian_features_tell_kinds_apart() -> None:
    rng = np.random.default_rng(0)
    means = np.abs(rng.standard_normal((6, 40)))
    y = rng.integers(0, 6, 600)
    x = (means[y] + 0.2 * rng.random((600, 40))).astype(np.float32)
    model = HebbianFeatures(6, random_state=0).fit(x)
    codes = model.transform(x)
    assert metrics.clustering_accuracy(y, codes.argmax(axis=1)) == 1
    assert codes.min() >= 0
    assert codes.max() <= 1 + 1e-5


def test_hebbian_units_driven_off_all_vectors() -> None:
    """Nearly all vectors point one way: a large Δ leaves few units."""
    rng = np.random.default_rng(0)
    x = (1 + 0.1 * rng.standard_normal((2000, 20))).astype(np.float32)
    model = HebbianFeatures(20, anti_hebbian=0.9, learning_rate=0.2, random_state=0)
    with pytest.warns(ConvergenceWarning, match="of n_units=20 units won a vector in the last epoch"):
        model.fit(x)


@pytest.mark.parametrize(
    ("model", "x", "message"),
    [
        (KMeans(9), np.ones((5, 2)), "n_clusters=9 is not accepted: it must be between 1 and 5, n_samples"),
        (KMeans(0), np.ones((5, 2)), "n_clusters=0"),
        (KMeans(2, metric="manhattan"), np.ones((5, 2)), "metric='manhattan' is not accepted"),
        (
            KMeans(2, metric="cosine"),
            np.eye(4) * [1, 1, 0, 1],
            "X, row 2: norm 0; cosines need norms above 0",
        ),
        (KMeans(2, n_init=0), np.ones((5, 2)), "n_init=0"),
        (KMeans(2, tol=-1), np.ones((5, 2)), "tol=-1"),
        (KSubspaces(2, rank=3), np.ones((5, 2)), "rank=3 .* X has 2 features"),
        (RateReductionClustering(2, noise=-1.0), np.ones((5, 2)), "noise=-1.0 is not accepted"),
        (RateReductionClustering(6), np.ones((5, 2)), "n_clusters=6 .* n_samples"),
        (KSubspaces(2, init="best"), np.ones((5, 2)), "init='best'"),
        (HebbianFeatures(9), np.ones((5, 2)), "n_units=9"),
        (HebbianFeatures(3, rank=4), np.ones((5, 2)), "rank=4"),
        (KMeans(2), np.full((3, 2), np.nan), "NaN"),
        (KMeans(2), "missing.npy", "is neither a file nor a folder of vectors"),
    ],
)
def test_bad_input(model: Any, x: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model.fit(x)


def test_bad_weights_and_widths(tmp_path: Path) -> None:
    x, _ = blobs(60)
    with pytest.raises(ValueError, match=r"sample_weight must have shape \[60\]"):
        KMeans(2).fit(x, sample_weight=np.ones(3))
    model = KMeans(2, random_state=0).fit(x)
    np.save(tmp_path / "a.npy", x[:, :5])
    with pytest.raises(ValueError, match="X has 5 features, but KMeans is expecting 8 features as input"):
        model.predict(tmp_path)
    with pytest.warns(ConvergenceWarning, match="only 1 of n_clusters=2 clusters were found: vectors differ"):
        KMeans(2, random_state=0).fit(np.ones((9, 3)))


def test_little_of_the_vectors_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No more than two chunks at a time are asked for, and none is kept."""
    monkeypatch.setattr(_vectors, "_CHUNK", 64)
    x, _ = blobs()
    taken = []
    inner = vectors.Vectors._filled

    def counted(self: Any, size: int) -> Any:
        for chunk in inner(self, size):
            taken.append(len(chunk))
            yield chunk

    monkeypatch.setattr(vectors.Vectors, "_filled", counted)
    KMeans(6, random_state=0).fit(shards(tmp_path, x))
    assert max(taken[1:]) == 64


@pytest.mark.slow
def test_rate_reduction_of_planted_subspaces(tmp_path: Path) -> None:
    """Where k-means fails; for new vectors and from disk too."""
    rng = np.random.default_rng(0)
    bases = np.linalg.qr(rng.standard_normal((3, 64, 4)))[0]
    y = rng.integers(0, 3, 400)
    x = np.einsum("nfr,nr->nf", bases[y], rng.standard_normal((400, 4)))
    x = (x + 0.03 * rng.standard_normal(x.shape)).astype(np.float32)
    model = RateReductionClustering(
        3, n_components=24, hidden_size=64, num_features=6, n_neighbors=3, noise=0.1, batch_size=300,
        learning_rate=5e-3, max_steps=120, random_state=0,
    ).fit(x[:300])  # fmt: skip
    plain = KMeans(3, random_state=0).fit(x[:300])
    assert metrics.clustering_accuracy(y[:300], plain.labels_) < 0.8
    assert metrics.clustering_accuracy(y[:300], model.labels_) > 0.97
    assert metrics.clustering_accuracy(y[300:], model.predict(x[300:])) > 0.95
    assert 1 < model.rate_reduction_ < 6
    np.testing.assert_allclose(np.linalg.norm(model.transform(x), axis=1), 1, rtol=1e-4)
    distances, margins = model.places(x[:300])
    assert (distances < 1.5).all()
    assert (margins > 0).mean() > 0.9
    np.save(tmp_path / "x.npy", x[:300])
    there = clone(model).fit(tmp_path / "x.npy")
    assert metrics.clustering_accuracy(there.labels_, model.labels_) > 0.97
    model.save(tmp_path / "model")
    loaded = estimators.load(tmp_path / "model")
    np.testing.assert_array_equal(loaded.predict(x), model.predict(x))
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(model)).transform(x), model.transform(x))
    assert loaded.rate_reduction_ == model.rate_reduction_


def test_rate_reduction_over_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """A minibatch on eight devices gives what it gives on one, within rounding."""
    x, _ = blobs(200, 3)
    options = {"hidden_size": 16, "num_features": 4, "batch_size": 80, "max_steps": 30, "random_state": 0}
    sizes = set()
    train = training.train

    def watched(steps: Any, state: Any, inputs: Any, **more: Any) -> Any:
        def placed(first: int, end: int) -> Any:
            batch = inputs(first, end)
            sizes.add(len(jnp.asarray(batch.views).sharding.device_set))
            return batch

        return train(steps, state, placed, **more)

    monkeypatch.setattr(rate_reduction.training, "train", watched)
    split = RateReductionClustering(3, **options).fit(x)
    assert sizes == {8}
    assert split.learned_.params["cluster_head"]["kernel"][...].devices() == {jax.local_devices()[0]}
    monkeypatch.setattr(rate_reduction, "_split", lambda batch: None)
    whole = RateReductionClustering(3, **options).fit(x)
    assert sizes == {8, 1}
    np.testing.assert_allclose(split.transform(x), whole.transform(x), atol=1e-3)
    assert metrics.clustering_accuracy(split.labels_, whole.labels_) > 0.99


def test_rate_reduction_sees_components_above_noise() -> None:
    rng = np.random.default_rng(0)
    centres = np.linalg.qr(rng.standard_normal((64, 5)))[0].T
    x = centres[rng.integers(0, 5, 500)] + 0.15 * rng.standard_normal((500, 64))
    options = {"hidden_size": 8, "batch_size": 100, "max_steps": 3, "random_state": 0}
    model = RateReductionClustering(5, n_components=32, **options).fit(x)
    assert model.components_.shape == (64, 4)  # five centres lie in four dimensions about their mean
    few = clone(model).set_params(n_components=2).fit(x)
    assert few.components_.shape == (64, 2)
    every = clone(model).set_params(n_components=64).fit(x)  # nothing has to be left out
    assert every.components_.shape == (64, 64)


@pytest.mark.parametrize(("dimensions", "clusters"), [(64, 40), (64, 5), (40, 10)])
def test_rate_reduction_sees_what_is_no_noise(dimensions: int, clusters: int) -> None:
    """Where classes fill half of the dimensions, or all vary alike, nothing tells what noise is."""
    rng = np.random.default_rng(0)
    noise = 0.15 * rng.standard_normal((500, dimensions))
    x = noise if clusters == 5 else np.eye(dimensions)[rng.integers(0, clusters, 500)] + noise
    model = RateReductionClustering(
        clusters, n_components=32, hidden_size=8, batch_size=100, max_steps=3, random_state=0
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        seen = model.fit(x).components_.shape[1]
    assert seen == (9 if clusters == 10 else 32)
