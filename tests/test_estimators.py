"""Scikit-learn's own checks, and what the estimators add to them."""

import pickle
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.utils.estimator_checks import parametrize_with_checks

from sul_jax import energy, metrics
from sul_jax.estimators import (
    ACOLClustering,
    DeepClustering,
    EnergyClustering,
    NMCEClustering,
    PixelClustering,
    fit_together,
)
from sul_jax.nn import backbones

SMALL = energy.EnergyArchitecture(3, 2, (energy.EnergyLayer(6, 2, 2, 4, 0),))
ESTIMATORS = [
    PixelClustering(2, image_size=8, random_state=0),
    EnergyClustering(2, architecture=SMALL, image_size=8, batch_size=8, max_steps=2, random_state=0),
    ACOLClustering(
        2,
        image_size=4,
        num_filters=2,
        num_features=8,
        nodes_per_parent=2,
        batch_size=8,
        max_steps=2,
        random_state=0,
    ),
    NMCEClustering(2, image_size=8, num_filters=2, num_features=4, batch_size=8, max_steps=2, random_state=0),
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
    if isinstance(estimator, NMCEClustering | ACOLClustering | DeepClustering):
        return {"check_clustering": "blobs in the plane are not images, and two steps learn nothing"}
    return {}


@parametrize_with_checks(ESTIMATORS, expected_failed_checks=untrained)
def test_scikit_learns_checks(estimator: Any, check: Any) -> None:
    check(estimator)


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda e: type(e).__name__)
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
    with pytest.raises(ValueError, match="beyond"):
        model.transform(images.astype(float))
    other = PixelClustering(3, image_size=6, random_state=0).fit(images.astype(float))
    with pytest.raises(ValueError, match="uint8"):
        other.transform(images)
    with pytest.raises(ValueError, match="images of shape"):
        model.transform(images.reshape(20, 4, 9))


def test_other_numbers_of_clusters_take_the_same_codes() -> None:
    images = np.random.default_rng(0).random((40, 8, 8))
    model = clone(ESTIMATORS[1])
    codes = model.fit_transform(images)
    np.testing.assert_array_equal(model.with_clusters(codes, 2).labels_, model.labels_)
    other = model.with_clusters(codes, 5)
    assert (model.n_clusters, other.n_clusters, len(other.cluster_centers_)) == (2, 5, 5)
    np.testing.assert_array_equal(other.predict(images), other.labels_)
    with pytest.raises(ValueError, match="learns its clusters"):
        clone(ESTIMATORS[4]).with_clusters(codes, 3)


def test_a_single_step() -> None:
    images = np.random.default_rng(0).random((8, 8, 8)).astype(np.float32)
    model = NMCEClustering(2, image_size=8, num_filters=2, num_features=4, batch_size=8, max_steps=1)
    assert model.fit_predict(images).shape == (8,)


def test_digits_fall_into_clusters() -> None:
    digits = load_digits()
    # 8×8 images, so the paper's kernels are taken at two sevenths.
    layers = (energy.EnergyLayer(20, 2, 5, 3, 1), energy.EnergyLayer(40, 8, 2, 5, 0))
    model = EnergyClustering(
        10,
        architecture=energy.EnergyArchitecture(3, 3, layers),
        image_size=8,
        random_state=0,
    )
    found = model.fit_predict(digits.data)
    pixels = PixelClustering(10, image_size=8, random_state=0).fit_predict(digits.data)
    assert metrics.clustering_accuracy(digits.target, found) > 0.7
    assert metrics.clustering_accuracy(digits.target, pixels) > 0.7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_clusters": 0}, "n_clusters=0"),
        ({"n_clusters": 31}, "n_clusters=31"),
        ({"image_shape": (5, 5)}, "image_shape=\\(5, 5\\)"),
        ({"image_size": 1}, "image_size=1"),
        ({"architecture": "5layer"}, "architecture='5layer'"),
        ({"image_size": 22}, "image_size=22 is too small for the architecture: it must be at least 23"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    model = EnergyClustering(2, image_size=28).set_params(**options)
    with pytest.raises(ValueError, match=message):
        model.fit(np.random.default_rng(0).random((30, 64)))


def test_misread_images_are_named() -> None:
    images = np.random.default_rng(0).random((30, 3, 16, 16))
    with pytest.raises(ValueError, match="channels first"):
        PixelClustering(2).fit(images)
    for name in ("fit", "fit_predict", "fit_transform"):
        with pytest.warns(UserWarning, match=r"28×28: give image_shape.*image_shape=\(16, 16, 3\)") as found:
            getattr(PixelClustering(2), name)(images.reshape(30, -1))
        assert found[0].filename == __file__
    maps = np.ones((6, 4, 4, 5))
    maps[3:] = 0
    assert PixelClustering(2, image_size=4).fit(maps).image_shape_ == (4, 4, 5)
    with pytest.raises(ValueError, match=r"image_shape=\(6, 6\) does not fit images of shape \(4, 9, 1\)"):
        PixelClustering(2, image_shape=(6, 6)).fit(np.ones((10, 4, 9)))


def test_lists_of_images() -> None:
    images = np.random.default_rng(0).random((10, 4, 4))
    one, other = (PixelClustering(2, image_size=4, random_state=0).fit(x) for x in (images, images.tolist()))
    np.testing.assert_array_equal(one.labels_, other.labels_)
