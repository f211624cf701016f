"""Scikit-learn's own checks, and what the estimators add to them."""

import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.utils.estimator_checks import parametrize_with_checks

from sul_jax import energy, estimators, metrics
from sul_jax.estimators import (
    ACOLClustering,
    DeepClustering,
    EnergyClustering,
    NMCEClustering,
    PixelClustering,
    _base,
    fit_together,
)
from sul_jax.nn import backbones

SMALL = energy.EnergyArchitecture(3, 2, (energy.EnergyLayer(4, 2, 2, 4, 0),))
ESTIMATORS = [
    PixelClustering(2, image_size=4, random_state=0),
    EnergyClustering(2, architecture=SMALL, image_size=8, batch_size=8, max_steps=2, random_state=0),
    ACOLClustering(
        2,
        image_size=4,
        num_filters=2,
        num_features=16,
        nodes_per_parent=2,
        batch_size=8,
        max_steps=2,
        random_state=0,
    ),
    NMCEClustering(
        2, image_size=8, num_filters=2, num_features=16, batch_size=8, max_steps=2, random_state=0
    ),
    DeepClustering(2, cycles=1, steps_per_cycle=1, batch_size=8, random_state=0),
]


@pytest.fixture(autouse=True, scope="module")
def _shallow() -> Iterator[None]:
    """A ResNet of one block in place of four: what is tested is around the network."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(backbones.RESNET_BLOCKS, 10, (1,))
        yield


def untrained(estimator: Any) -> dict[str, str]:
    """Checks that two steps of learning cannot pass."""
    if isinstance(estimator, NMCEClustering):
        return {"check_clustering": "blobs in the plane are not images, and two steps learn nothing"}
    return {}


@parametrize_with_checks(ESTIMATORS[:3], expected_failed_checks=untrained)
def test_scikit_learns_checks(estimator: Any, check: Any) -> None:
    check(estimator)


@pytest.mark.slow
@parametrize_with_checks(ESTIMATORS[3:], expected_failed_checks=untrained)
def test_scikit_learns_checks_of_larger_networks(estimator: Any, check: Any) -> None:
    check(estimator)


@pytest.mark.parametrize(
    "estimator",
    [*ESTIMATORS[:3], *(pytest.param(estimator, marks=pytest.mark.slow) for estimator in ESTIMATORS[3:])],
    ids=lambda e: type(e).__name__,
)
def test_images_pipelines_and_pickles(estimator: Any) -> None:
    images = np.random.default_rng(0).random((30, 9, 8, 3)).astype(np.float32)
    model = clone(estimator).fit(images)
    assert model.image_shape_ == (9, 8, 3)
    codes = model.transform(images)
    assert codes.dtype == np.float32
    np.testing.assert_array_equal(model.predict(images), model.labels_)
    # The answer for an image does not depend on its batch.
    np.testing.assert_array_equal(model.transform(images[7:9]), codes[7:9])
    again = pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(again.predict(images), model.labels_)
    np.testing.assert_array_equal(clone(estimator).fit_transform(images), codes)
    flat = clone(estimator).set_params(image_shape=(9, 8, 3)).fit(images.reshape(30, -1))
    np.testing.assert_array_equal(flat.transform(images.reshape(30, -1)), codes)
    assert model.distances(images).shape == (30, 2)
    pipeline = make_pipeline(FunctionTransformer(), clone(estimator))
    assert set(pipeline.fit_predict(images)) <= {0, 1}
    assert "<style>" in model._repr_html_()
    assert len(model.get_feature_names_out()) == codes.shape[1]
    if hasattr(model, "first_kernels"):
        number, height, width, channels = model.first_kernels().shape
        assert number > 1
        assert (height, channels) == (width, 3)
        with pytest.raises(NotFittedError):
            clone(estimator).first_kernels()


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ESTIMATORS[1:], ids=lambda e: type(e).__name__)
def test_seeds_learn_together_what_each_learns_alone(estimator: Any) -> None:
    images = np.random.default_rng(0).random((30, 9, 8, 3)).astype(np.float32)
    models = [clone(estimator).set_params(random_state=seed) for seed in (3, 4)]
    together = list(fit_together(models, images))
    for model, codes in zip(models, together, strict=True):
        alone = clone(model)
        np.testing.assert_allclose(codes, alone.fit_transform(images), rtol=2e-3, atol=2e-4)
        np.testing.assert_array_equal(model.labels_, alone.labels_)
    assert np.abs(together[0] - together[1]).max() > 1e-2
    with pytest.raises(ValueError, match="more than random_state"):
        next(fit_together([estimator, clone(estimator).set_params(n_clusters=3)], images))


def test_bytes_are_the_same_as_their_floats() -> None:
    images = np.random.default_rng(0).integers(0, 256, (20, 6, 6), np.uint8)
    model = PixelClustering(3, image_size=6, random_state=0)
    np.testing.assert_allclose(model.fit_transform(images), images.reshape(20, -1) / 255, rtol=1e-6)
    np.testing.assert_allclose(model.transform(images / 255), model.transform(images), rtol=1e-6)
    with pytest.raises(ValueError, match="not on the scale of the training images"):
        model.transform(images.astype(float))
    other = PixelClustering(3, image_size=6, random_state=0).fit(images.astype(float))
    with pytest.raises(ValueError, match="uint8"):
        other.transform(images)
    with pytest.raises(ValueError, match="images have shape"):
        model.transform(images.reshape(20, 4, 9))


class Frame:
    """Of columns, as data frames offer them: no `dtype`, values through NumPy's protocol."""

    def __init__(self, values: np.ndarray):
        self._values, self.shape = values, values.shape

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self._values if dtype is None else self._values.astype(dtype)

    def __len__(self) -> int:
        return len(self._values)


def test_a_frame_is_the_same_as_an_array() -> None:
    rows = np.random.default_rng(0).integers(0, 256, (20, 36), np.uint8)
    model = PixelClustering(3, image_size=6, random_state=0)
    codes = model.fit_transform(rows)
    framed = clone(model)
    np.testing.assert_array_equal(framed.fit_transform(Frame(rows)), codes)
    assert framed.is_uint8_
    np.testing.assert_array_equal(framed.predict(rows), model.predict(Frame(rows)))
    for given in (Frame(codes), codes.tolist(), codes.astype(">f8")):
        np.testing.assert_array_equal(model.with_clusters(given, 3).labels_, model.labels_)
        np.testing.assert_allclose(model.distances_of(given), model.distances_of(codes), rtol=1e-6)
    exact = np.linalg.norm(codes[:, None] - np.float64(model.cluster_centers_), axis=2)
    np.testing.assert_allclose(model.distances(rows), exact, rtol=1e-6)
    at_centers = model.distances_of(model.cluster_centers_)
    np.testing.assert_allclose(np.diag(at_centers), 0, atol=1e-6)


SCALES: dict[str, Any] = {
    "uint8": np.uint8,
    "[0, 1]": lambda x: x / 255,
    "[0, 255]": lambda x: x.astype(np.float32),
    "16 bits": lambda x: x * 257.0,
    "tiny": lambda x: x * 1e-20,
    "huge": lambda x: x * 1e30,
}
SAME = {"uint8", "[0, 1]"}


@pytest.mark.parametrize("fitted", SCALES)
def test_scales(fitted: str) -> None:
    """Whatever the scale, the clusters are the same; images on another one are refused."""
    images = np.random.default_rng(0).integers(0, 256, (20, 6, 6))
    images[0] = 0
    expected = PixelClustering(3, image_size=6, random_state=0).fit(images / 255)
    model = PixelClustering(3, image_size=6, random_state=0).fit(SCALES[fitted](images))
    np.testing.assert_array_equal(model.labels_, expected.labels_)
    for asked, scaled in SCALES.items():
        if asked == fitted or {asked, fitted} == SAME:
            np.testing.assert_array_equal(model.predict(scaled(images)), expected.labels_)
        else:
            with pytest.raises(
                ValueError,
                match=r"^(images are uint8, but the model learned from|floating images go up to .*, not on "
                r"the scale of the training) images[^\n]*$",
            ):
                model.predict(scaled(images))
        if asked != "uint8":
            assert model.predict(scaled(images[:1])) == expected.labels_[0]  # black on any scale


@pytest.mark.parametrize("estimator", [ESTIMATORS[0], ESTIMATORS[3]], ids=lambda e: type(e).__name__)
def test_fewer_clusters_than_asked(estimator: Any) -> None:
    images = np.repeat(np.random.default_rng(0).random((1, 8, 8)), 20, axis=0)
    with pytest.warns(ConvergenceWarning, match="only 1 of n_clusters=2 clusters were found") as found:
        model = clone(estimator).fit(images)
    assert found[0].filename == __file__
    assert not model.labels_.any() or model.labels_.all()
    if not model.learns_clusters:
        with pytest.warns(ConvergenceWarning, match="only 1 of n_clusters=3"):
            model.with_clusters(model.transform(images), 3)


@pytest.mark.parametrize("estimator", ESTIMATORS[2:], ids=lambda e: type(e).__name__)
def test_learning_rates(estimator: Any) -> None:
    images = np.random.default_rng(0).random((20, 8, 8))
    for rate in (-1.0, float("nan"), float("inf"), "fast", None, True):
        words = "^learning_rate(=.* it must be at least 0| must be a number, got .*)$"
        with pytest.raises((ValueError, TypeError), match=words):
            clone(estimator).set_params(learning_rate=rate).fit(images)


def test_a_network_that_diverged() -> None:
    images = np.random.default_rng(0).random((20, 8, 8))
    with pytest.raises(
        ValueError, match="^DeepClustering diverged: its codes are not finite; a smaller learn"
    ):
        clone(ESTIMATORS[4]).set_params(learning_rate=1e30).fit(images)


def test_batches_go_by_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large images are encoded a few at a time, and their k-means begins less often."""
    model = PixelClustering(2, image_size=28, random_state=0)
    images = np.random.default_rng(0).random((9, 8, 8))
    codes = model.fit_transform(images)
    assert model._encoded_together() == 256
    monkeypatch.setattr(_base, "_IMAGE_BYTES", 3 * 4 * 28**2)
    assert model._encoded_together() == 3
    np.testing.assert_allclose(model.transform(images), codes, rtol=1e-6)
    large = PixelClustering(2, image_size=2048, random_state=0)
    large.image_shape_ = (8, 8, 1)
    monkeypatch.undo()
    assert 4 * large._encoded_together() * 2048**2 <= _base._IMAGE_BYTES
    starts = []
    fit = _base._k_means
    monkeypatch.setattr(
        _base, "_k_means", lambda *a, num_init, **o: (starts.append(num_init), fit(*a, **o))[1]
    )
    model.fit(images)
    monkeypatch.setattr(_base, "_CLUSTERING_PRODUCTS", 3 * codes.size * 2)
    model.fit(images)
    assert starts == [10, 3]


def test_maps_beyond_the_memory() -> None:
    images = np.random.default_rng(0).random((30, 8, 8))
    with pytest.raises(
        ValueError, match=r"^image_size=200000 is too large for this machine: maps of 30 images"
    ):
        EnergyClustering(2, image_size=200_000).fit(images)


def test_other_numbers_of_clusters_take_the_same_codes() -> None:
    images = np.random.default_rng(0).random((40, 8, 8))
    model = clone(ESTIMATORS[1])
    codes = model.fit_transform(images)
    np.testing.assert_array_equal(model.with_clusters(codes, 2).labels_, model.labels_)
    other = model.with_clusters(codes, 5)
    assert (model.n_clusters, other.n_clusters, len(other.cluster_centers_)) == (2, 5, 5)
    np.testing.assert_array_equal(other.predict(images), other.labels_)
    for number in (0, 41):
        with pytest.raises(
            ValueError, match=f"^n_clusters={number} .* between 1 and 40, the number of codes$"
        ):
            model.with_clusters(codes, number)
    with pytest.raises(ValueError, match="^codes has 2 features"):
        model.with_clusters(codes[:, :2], 2)
    with pytest.raises(ValueError, match="learns its clusters"):
        clone(ESTIMATORS[4]).with_clusters(codes, 3)


_FIT = """
import hashlib, numpy as np
from sul_jax import energy, estimators
layer = energy.EnergyLayer(6, 2, 2, 4, 0)
model = estimators.EnergyClustering(
    3, architecture=energy.EnergyArchitecture(3, 2, (layer,)), image_size=8, batch_size=8, random_state=0
)
codes = model.fit_transform(np.random.default_rng(0).random((40, 8, 8)))
print(hashlib.sha256(codes.tobytes() + model.labels_.tobytes()).hexdigest())
"""


@pytest.mark.slow
def test_the_same_program_gives_the_same_bits() -> None:
    """In processes of their own, with as many threads, and with K-Subspaces, which amplify any rounding."""
    command = [sys.executable, "-c", _FIT]
    runs = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    hashes = {run.communicate(timeout=300)[0] for run in runs}
    assert len(hashes) == 1
    assert len(hashes.pop().strip()) == 64


def test_a_single_step() -> None:
    images = np.random.default_rng(0).random((8, 8, 8)).astype(np.float32)
    model = NMCEClustering(2, image_size=8, num_filters=2, num_features=4, batch_size=8, max_steps=1)
    codes = model.fit_transform(images)
    assert model.labels_.shape == (8,)
    for label in np.unique(model.labels_):
        mean = codes[model.labels_ == label].mean(axis=0)
        np.testing.assert_allclose(model.cluster_centers_[label], mean, rtol=1e-4, atol=1e-6)


def test_digits_fall_into_clusters() -> None:
    digits = load_digits()
    # 8×8 images, so the paper's kernels are taken at two sevenths.
    layers = (energy.EnergyLayer(20, 2, 5, 3, 1), energy.EnergyLayer(40, 8, 2, 5, 0))
    model = EnergyClustering(
        10,
        architecture=energy.EnergyArchitecture(3, 3, layers),
        image_size=8,
        batch_size=128,
        random_state=0,
    )
    found = model.fit_predict(digits.images)
    rows = PixelClustering(10, image_size=8, image_shape=(8, 8), random_state=0)
    pixels = rows.fit_predict(digits.data)
    assert metrics.clustering_accuracy(digits.target, found) > 0.7
    assert metrics.clustering_accuracy(digits.target, pixels) > 0.7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_clusters": 0}, "n_clusters=0"),
        ({"n_clusters": 31}, "n_clusters=31"),
        ({"image_shape": (5, 5)}, "image_shape=\\(5, 5\\)"),
        ({"image_shape": 28}, r"image_shape=28 does not fit .* it must be \(height, width\)"),
        ({"image_shape": "88"}, r"image_shape='88' does not fit .* it must be \(height, width\)"),
        ({"image_shape": (8.0, 8)}, r"image_shape=\(8.0, 8\) does not fit .* it must be \(height, width\)"),
        ({"architecture": None}, "architecture is a NoneType; it must be a name or"),
        ({"code_power": float("nan")}, "code_power=nan is not accepted: it must be above 0"),
        (
            {"code_whitening": 0.6},
            "code_whitening=0.6 is not accepted: it must be at least 0 and at most 0.5",
        ),
        ({"cluster_by": "k-means"}, "cluster_by='k-means' is not accepted"),
        ({"cluster_rank": 0}, "cluster_rank=0 is not accepted"),
        ({"image_size": 1}, "image_size=1"),
        ({"architecture": "5layer"}, "architecture='5layer'"),
        ({"image_size": 22}, "image_size=22 is too small for the architecture: it must be at least 23"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    model = EnergyClustering(2, image_size=28, image_shape=(8, 8)).set_params(**options)
    with pytest.raises(ValueError, match=message):
        model.fit(np.random.default_rng(0).random((30, 64)))


def test_energy_clusters_by_subspaces(tmp_path: Path) -> None:
    """Two kinds of stripes, at many strengths: subspaces through the origin tell them apart."""
    rng = np.random.default_rng(0)
    stripes = np.stack([np.tile([[1.0], [0.0]], (6, 12)), np.tile([1.0, 0.0], (12, 6))])
    kinds = np.arange(40) % 2
    images = (stripes[kinds] * rng.uniform(0.1, 1, (40, 1, 1)) + 0.02 * rng.random((40, 12, 12))).clip(0, 1)
    small = energy.EnergyArchitecture(3, 2, (energy.EnergyLayer(8, 2, 2, 5, 0),))
    model = EnergyClustering(
        2,
        architecture=small,
        image_size=12,
        max_steps=3,
        random_state=0,
        code_whitening=0,
        cluster_by="k_subspaces",
        cluster_rank=1,
    )
    codes = model.fit_transform(images)
    assert metrics.clustering_accuracy(kinds, model.labels_) == 1
    assert model.cluster_centers_.shape == (2, 1, codes.shape[1])
    np.testing.assert_array_equal(model.predict(images), model.labels_)
    # Of unit norm: as far from its subspace as its own length's share outside of it.
    unit = codes / np.linalg.norm(codes, axis=1, keepdims=True)
    outside = unit - (unit @ model.cluster_centers_[0].T) @ model.cluster_centers_[0]
    np.testing.assert_allclose(model.distances(images)[:, 0], np.linalg.norm(outside, axis=1), atol=1e-3)
    model.save(tmp_path / "model")
    loaded, others = estimators.load(tmp_path / "model"), model.with_clusters(codes, 3)
    np.testing.assert_array_equal(loaded.predict(images), model.labels_)
    assert others.cluster_centers_.shape == (3, 1, codes.shape[1])
    np.testing.assert_array_equal(loaded.with_clusters(codes, 3).labels_, others.labels_)


def test_misread_images_are_named() -> None:
    images = np.random.default_rng(0).random((30, 3, 16, 16))
    with pytest.raises(ValueError, match="channels first"):
        PixelClustering(2).fit(images)
    for width in (64, 512, 768, 784):
        for name in ("fit", "fit_predict", "fit_transform"):
            message = (
                rf"^X has rows of {width} values\. If they are images, give image_shape=\(height, width\) "
                r"or .* If they are vectors such as embeddings, take KMeans, .* from sul_jax\.estimators$"
            )
            with pytest.raises(ValueError, match=message):
                getattr(PixelClustering(2), name)(np.ones((30, width)))
    maps = np.ones((6, 4, 4, 5))
    maps[3:] = 0
    assert PixelClustering(2, image_size=4).fit(maps).image_shape_ == (4, 4, 5)
    with pytest.raises(ValueError, match=r"image_shape=\(6, 6\) does not fit images of shape \(4, 9, 1\)"):
        PixelClustering(2, image_shape=(6, 6)).fit(np.ones((10, 4, 9)))


def test_lists_of_images() -> None:
    images = np.random.default_rng(0).random((10, 4, 4))
    one, other = (PixelClustering(2, image_size=4, random_state=0).fit(x) for x in (images, images.tolist()))
    np.testing.assert_array_equal(one.labels_, other.labels_)
