"""Experiments of paper 001 on little data."""

import json
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments import cifar10_hebbian, data, imagenet32_hebbian, mnist_hebbian
from experiments.common import hebbian_filters
from experiments.common.options import ConfigError
from sul_jax.nn import NNLConv


@pytest.fixture
def stripes(tmp_path: Path) -> Path:
    """Two classes of colour images that one filter tells apart: stripes that lie or stand."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 120)
    phase, color = rng.random((120, 1, 1, 1)) * 6, rng.random((120, 1, 1, 3)) * 0.5 + 0.5
    rows, columns = np.arange(16)[None, :, None, None], np.arange(16)[None, None, :, None]
    along = np.where(labels[:, None, None, None] == 0, rows, columns)
    images = ((1 + np.sin(1.6 * along + phase)) / 2 * color * 255).astype(np.uint8)
    np.savez(tmp_path / "stripes.npz", images=images, labels=labels)
    return tmp_path / "stripes.npz"


def config(stripes: Path, tmp_path: Path, **options: object) -> cifar10_hebbian.Config:
    defaults = cifar10_hebbian.Config(
        dataset=str(stripes),
        workdir=tmp_path / "run",
        num_units=16,
        filter_steps=60,
        patch_batch=100,
        epochs=4,
        probe_every=2,
        batch_size=30,
        learning_rate=0.02,
    )
    return replace(defaults, **options)  # type: ignore[arg-type]


def test_filters_and_classifier(stripes: Path, tmp_path: Path) -> None:
    (result,) = cifar10_hebbian.run(config(stripes, tmp_path, num_validation=48, powers=(10.0, 30.0)))
    assert result.metrics["test_error"] <= 5
    assert result.metrics["shadowed_test_error"] <= 15
    assert result.metrics["patch_cosine"] > 0.9
    assert result.metrics["start_cosine"] < 0.999
    assert result.metrics["power"] in (10, 30)
    stored = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"figure1_filters.png", "figure2_errors.png", "figure6_shadows.png", "network-0"} <= stored
    assert 50 < result.metrics["winning_units"] <= 100
    network = NNLConv.load(tmp_path / "run" / "network-0")
    dataset = data.load(str(stripes))
    found = np.argmax(network(dataset.test_images[4::5] / np.float32(255)), axis=1)
    assert 100 * np.mean(found != dataset.test_labels[4::5]) == pytest.approx(
        result.metrics["test_error"], abs=1e-3
    )

    # Its filters serve another run; a larger cache than allowed changes nothing but memory.
    borrowed = config(
        stripes,
        tmp_path,
        workdir=tmp_path / "two",
        filters_from=tmp_path / "run" / "network-0",
        cache_gib=1e-6,
    )
    (second,) = cifar10_hebbian.run(borrowed)
    assert second.metrics["test_error"] <= 5
    with pytest.raises(ConfigError, match="holds filters of"):
        cifar10_hebbian.run(replace(borrowed, num_units=12, workdir=tmp_path / "three"))


def test_filters_that_do_not_learn(stripes: Path, tmp_path: Path) -> None:
    """The control: a classifier above the patches that filters start from."""
    setting = config(stripes, tmp_path, filter_steps=0)
    (result,) = cifar10_hebbian.run(setting)
    filters = np.asarray(result.network.filters[0][...])
    np.testing.assert_allclose(np.linalg.norm(filters, axis=1), 1, rtol=1e-5)
    assert result.metrics["start_cosine"] == pytest.approx(1)
    # A rate of almost nothing keeps them too: both begin at the same patches.
    still = replace(setting, filter_steps=60, filter_learning_rate=1e-9, workdir=tmp_path / "still")
    (kept,) = cifar10_hebbian.run(still)
    np.testing.assert_allclose(filters, np.asarray(kept.network.filters[0][...]), atol=1e-6)
    (learned,) = cifar10_hebbian.run(replace(still, filter_learning_rate=0.004, workdir=tmp_path / "learned"))
    assert not np.allclose(filters, np.asarray(learned.network.filters[0][...]), atol=0.01)


@pytest.mark.parametrize("start", ["random_patches", "k_means"])
def test_other_filters_to_start_from(stripes: Path, tmp_path: Path, start: str) -> None:
    (result,) = cifar10_hebbian.run(config(stripes, tmp_path, filter_steps=0, filter_start=start))
    weights = np.asarray(result.network.filters[0][...])
    np.testing.assert_allclose(np.linalg.norm(weights, axis=1), 1, rtol=1e-5)
    assert result.metrics["test_error"] <= 20


@pytest.mark.slow
def test_filters_beside_their_controls(
    stripes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hebbian_filters, "_SWEPT_UNITS", (4,))
    setting = config(stripes, tmp_path, sweep=True, num_units=None, epochs=1)
    results = cifar10_hebbian.run(setting)
    assert (tmp_path / "run" / "filters_and_controls.png").exists()
    stored = json.loads((tmp_path / "run" / "sweep.json").read_text())
    assert [one["num_units"] for one in stored] == [4] * 7
    assert [len(one.network.filters[0][...]) for one in results] == [4] * 7
    for one, result in zip(stored, results, strict=True):
        assert (result.metrics["start_cosine"] < 0.9999) == (one.get("filter_steps", 60) > 0)
        assert (result.metrics["negative_weights"] > 20) == (one.get("filter_start") == "normal")
        assert result.network.blocks[0].power == one.get("powers", [40])[0]
    assert (tmp_path / "run" / "learned-less-anti-hebbian-4").is_dir()
    with pytest.raises(ConfigError, match="filter_start is not accepted with sweep"):
        cifar10_hebbian.run(replace(setting, filter_start="normal"))


@pytest.mark.slow
def test_kept_cosines_serve_steep_powers(stripes: Path, tmp_path: Path) -> None:
    """As responses that are not kept; half precision would be off by 2 percent, and 0 below 0.66."""
    setting = config(stripes, tmp_path, powers=(40.0,), filter_steps=0, epochs=1)
    (result,) = cifar10_hebbian.run(setting)
    network, images = result.network, jnp.asarray(data.load(str(stripes)).test_images[:20])
    kept = hebbian_filters._cosines(*nnx.split(network), images)
    assert kept.dtype == jnp.uint16
    found = network.respond(kept / jnp.float32(hebbian_filters._PARTS))
    expected = network.features(images / jnp.float32(255))
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=1e-12)
    # The classifier sees the same where they do not fit into the cache.
    (again,) = cifar10_hebbian.run(
        config(
            stripes,
            tmp_path,
            workdir=tmp_path / "again",
            powers=(40.0,),
            filter_steps=0,
            epochs=1,
            cache_gib=1e-6,
        )
    )
    assert result.metrics["train_loss"] == pytest.approx(again.metrics["train_loss"], rel=1e-4)


def test_end_to_end_twin_and_resume(stripes: Path, tmp_path: Path) -> None:
    setting = config(stripes, tmp_path, response="relu", seeds=2)
    whole = cifar10_hebbian.run(setting)
    assert whole[0].metrics["test_error"] <= 20
    again = cifar10_hebbian.run(replace(setting, resume=True))
    for one, other in zip(whole, again, strict=True):
        assert one.metrics["test_error"] == other.metrics["test_error"]
    assert json.loads((tmp_path / "run" / "results.json").read_text())[1]["seed"] == 1
    twin = config(stripes, tmp_path, workdir=tmp_path / "two", filters_from=tmp_path / "run" / "network-0")
    with pytest.raises(ConfigError, match="holds a twin trained end to end"):
        cifar10_hebbian.run(twin)


@pytest.mark.slow
def test_photographs_and_digits(tmp_path: Path) -> None:
    """Without data: filters of the photographs only, units that see whole digits."""
    (result,) = imagenet32_hebbian.run(
        imagenet32_hebbian.Config(
            dataset="photographs", workdir=tmp_path / "a", filter_steps=20, patch_batch=50, num_units=8
        )
    )
    assert set(result.metrics) == {
        "filter_seconds", "winning_units", "patch_cosine", "start_cosine", "negative_weights",
        "separated_units",
    }  # fmt: skip
    assert [block.kernel_size for block in result.network.blocks] == [3, 4, 5, 8]
    (whole,) = mnist_hebbian.run(
        mnist_hebbian.Config(
            dataset="digits", workdir=tmp_path / "b", filter_steps=200, num_units=40, epochs=10,
            learning_rate=0.05, num_train=1000, patch_batch=100,
        )
    )  # fmt: skip
    assert whole.network.filters[0].shape == (40, 784)
    assert whole.metrics["test_error"] < 40


def test_shadow_and_colour() -> None:
    images = np.full((1, 4, 32, 3), 255, np.uint8)
    np.testing.assert_allclose(hebbian_filters.shadowed(images)[0, 0, 24:26, 0], [0.3, 1])
    noise = np.random.default_rng(0).normal(size=(500, 48))
    assert np.mean(np.abs(hebbian_filters.color_share(noise) - 0.5) > 0.3) < 0.2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 1}, "rank=1 is not accepted: it must be at least 2"),
        ({"rank": 17}, "rank=17 is not accepted"),
        ({"powers": (-1.0,)}, "each must be above 0"),
        ({"powers": (3.0,), "response": "relu"}, "powers is not accepted with response='relu'"),
        ({"powers": (3.0, 4.0), "num_validation": 500}, "num_validation=500 is not accepted"),
        ({"architecture": "five", "num_units": 8}, "does not fit images of 16×16"),
        ({"filters_from": Path("nowhere"), "response": "relu"}, "filters_from is not accepted with"),
        ({"filters_from": Path("nowhere")}, "path='.*nowhere' is not a folder"),
        ({"filter_learning_rate": 1e30, "normalize_update": False}, "is not finite"),
    ],
)
def test_bad_input(stripes: Path, tmp_path: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cifar10_hebbian.run(config(stripes, tmp_path, **options))


def test_black_images_make_no_filters(tmp_path: Path) -> None:
    np.savez(tmp_path / "black.npz", images=np.zeros((9, 16, 16, 3), np.uint8))
    setting = config(tmp_path / "black.npz", tmp_path, workdir=tmp_path / "run")
    with pytest.raises(ConfigError, match="needs 16 patches that are not black, but found 0"):
        cifar10_hebbian.run(setting)
