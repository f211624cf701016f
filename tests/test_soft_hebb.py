"""SoftHebb against NumPy, and the experiment from end to end."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import compiled
from flax import nnx

from experiments import cifar10_soft_hebb
from experiments.cifar10_soft_hebb import Config
from sul_jax import hebbian, soft_hebb, stack
from sul_jax.nn import SoftHebbNet

UPDATE = compiled(soft_hebb.update)
SMALL = tuple(
    layer._replace(num_units=number) for layer, number in zip(soft_hebb.CIFAR10, (5, 6, 7), strict=True)
)


def step_in_numpy(w: np.ndarray, x: np.ndarray, rate: float, heat: float, power: float) -> np.ndarray:
    total = np.zeros_like(w)
    for one in x:
        u = w @ one
        y = np.exp(heat * (u - u.max()))
        y /= y.sum()
        y[np.arange(len(u)) != u.argmax()] *= -1
        total += y[:, None] * (one[None] - u[:, None] * w)
    rates = rate * np.abs(np.linalg.norm(w, axis=1) - 1) ** power
    return w + rates[:, None] * total / np.abs(total).max()


@pytest.mark.parametrize("heat", [0.3, 1.0, 20.0])
def test_update_against_numpy(heat: float) -> None:
    rng = np.random.default_rng(0)
    w, x = rng.normal(size=(5, 8)), rng.normal(size=(30, 8))
    state = hebbian.HebbianState(jnp.asarray(w, jnp.float32))
    after, info = UPDATE(state, np.float32(x), learning_rate=0.1, inverse_temperature=heat, norm_power=0.7)
    np.testing.assert_allclose(after.weights, step_in_numpy(w, x, 0.1, heat, 0.7), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(info.wins, np.bincount((x @ w.T).argmax(axis=1), minlength=5))
    np.testing.assert_allclose(info.norms, np.linalg.norm(w, axis=1), rtol=1e-5)


def test_units_find_the_directions_of_the_data() -> None:
    """Three directions and three units: each unit becomes one of them, at unit norm."""
    rng = np.random.default_rng(0)
    directions = np.linalg.qr(rng.normal(size=(10, 3)))[0].T
    x = np.float32(4 * directions[rng.integers(0, 3, 300)] + 0.1 * rng.normal(size=(300, 10)))
    state = soft_hebb.init(jax.random.key(1), x, num_units=3, norm=5.0)
    train = jax.jit(
        lambda state: jax.lax.fori_loop(
            0, 500, lambda _, s: soft_hebb.update(s, x, learning_rate=0.1, inverse_temperature=2.0)[0], state
        )
    )
    weights = np.asarray(train(state).weights)
    cosines = weights @ directions.T / np.linalg.norm(weights, axis=1, keepdims=True)
    assert sorted(cosines.argmax(axis=1)) == [0, 1, 2]
    assert (cosines.max(axis=1) > 0.99).all()
    np.testing.assert_allclose(np.linalg.norm(weights, axis=1), 1, atol=0.05)


def layer_in_numpy(state: Any, images: np.ndarray, layer: soft_hebb.SoftHebbLayer) -> np.ndarray:
    unit = (images - np.asarray(state.mean)) / np.sqrt(np.asarray(state.variance) + 1e-5)
    edge = layer.kernel_size // 2
    padded = np.pad(unit, ((0, 0), (edge, edge), (edge, edge), (0, 0)), mode="reflect")
    size = layer.kernel_size
    windows = np.lib.stride_tricks.sliding_window_view(padded, (size, size), axis=(1, 2))
    patches = windows.transpose(0, 1, 2, 4, 5, 3).reshape(*images.shape[:3], -1)
    u = patches @ np.asarray(state.weights).T
    maps = np.maximum(u - u.mean(axis=-1, keepdims=True), 0) ** layer.power
    edge = (layer.pool_size - layer.pool_stride) // 2
    padded = np.pad(maps, ((0, 0), (edge, edge), (edge, edge), (0, 0)))
    cut = np.lib.stride_tricks.sliding_window_view(padded, (layer.pool_size,) * 2, axis=(1, 2))
    cut = cut[:, :: layer.pool_stride, :: layer.pool_stride]
    return np.asarray(cut.max(axis=(-2, -1)) if layer.pool == "max" else cut.mean(axis=(-2, -1)))


@pytest.mark.parametrize("layer", [SMALL[0], SMALL[1], SMALL[2]], ids=["first", "second", "third"])
def test_layer_against_numpy(layer: soft_hebb.SoftHebbLayer) -> None:
    images = np.random.default_rng(0).normal(2, 3, (9, 8, 10, 3)).astype(np.float32)
    rule = soft_hebb.layer_rule(layer)
    state = jax.jit(rule.init)(jax.random.key(0), images)
    np.testing.assert_allclose(state.mean, images.mean(axis=(0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(state.variance, images.var(axis=(0, 1, 2)), rtol=1e-5)
    expected = layer_in_numpy(state, images, layer)
    got = jax.jit(rule.encode)(state, images)
    assert got.shape == (9, 4, 5, layer.num_units)
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())
    # A step of the vector rule on all patches; the running statistics move by a tenth.
    after, _ = jax.jit(rule.update)(state, images + 1)
    np.testing.assert_allclose(after.mean, images.mean(axis=(0, 1, 2)) + 0.1, rtol=1e-4)
    vectors = soft_hebb._vectors(
        (images - images.mean(axis=(0, 1, 2))) / np.sqrt(images.var(axis=(0, 1, 2)) + 1e-5), layer
    )
    wanted, _ = UPDATE(
        hebbian.HebbianState(state.weights),
        vectors,
        learning_rate=layer.learning_rate,
        inverse_temperature=layer.inverse_temperature,
    )
    np.testing.assert_allclose(after.weights, wanted.weights, rtol=2e-3, atol=2e-3)


def test_module_is_the_rules(tmp_path: Path) -> None:
    images = np.float32(np.random.default_rng(0).random((6, 16, 16, 3)))
    net = SoftHebbNet((16, 16, 3), SMALL, num_classes=4, rngs=nnx.Rngs(0))
    rule = stack(*soft_hebb.network_rules(SMALL))
    states, _ = jax.jit(rule.update)(jax.jit(rule.init)(jax.random.key(3), images), images)
    net.set_states(states)
    chex.assert_trees_all_equal(net.learned_states(), states)
    np.testing.assert_allclose(
        net.features(images), jax.jit(rule.encode)(states, images).reshape(6, -1), rtol=1e-4, atol=1e-4
    )
    assert net.num_features == 2 * 2 * 7
    net.save(tmp_path / "net")
    np.testing.assert_array_equal(SoftHebbNet.load(tmp_path / "net")(images), net(images))
    with pytest.raises(ValueError, match=r"images has shape \(6, 8, 8, 3\), expected"):
        net(np.zeros((6, 8, 8, 3), np.float32))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kernel_size": 4}, "kernel_size=4 is not accepted: it must be odd"),
        ({"pool": "median"}, "pool='median' is not accepted"),
        ({"pool_size": 1}, "pool_size=1 is not accepted: it must be at least 2: pool_stride"),
    ],
)
def test_bad_layers(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        soft_hebb.layer_rule(SMALL[0]._replace(**changes))


def test_images_too_small_to_be_mirrored() -> None:
    rule = soft_hebb.layer_rule(SMALL[0])
    with pytest.raises(ValueError, match="too small to be mirrored for kernel_size=5"):
        rule.init(jax.random.key(0), jnp.ones((4, 9, 2, 3)))


def test_two_units_are_enough() -> None:
    made = jax.eval_shape(lambda key: soft_hebb.init(key, jnp.ones((4, 6)), num_units=2), jax.random.key(0))
    assert made.weights.shape == (2, 6)
    with pytest.raises(ValueError, match="num_units=1 is not accepted: it must be at least 2"):
        soft_hebb.init(jax.random.key(0), jnp.ones((4, 6)), num_units=1)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return Config(
        dataset="digits", num_units=(6, 8), num_train=100, num_test=60, epochs=3, workdir=tmp_path / "run"
    )


def test_run_and_resume(config: Config) -> None:
    (first,) = cifar10_soft_hebb.run(config)
    assert set(first.metrics) == {
        "test_error", "train_error", "converged_units", "filter_seconds", "classifier_seconds"
    }  # fmt: skip
    assert (config.workdir / "filters.png").exists()
    loaded = SoftHebbNet.load(config.workdir / "network-0")
    chex.assert_trees_all_equal(loaded.learned_states(), first.network.learned_states())
    # From the checkpoints of filters and classifier.
    for file in config.workdir.glob("seed0.json"):
        file.unlink()
    (again,) = cifar10_soft_hebb.run(replace(config, resume=True))
    chex.assert_trees_all_equal(nnx.state(again.network), nnx.state(first.network))


def test_filters_that_stay_as_they_start(config: Config) -> None:
    (result,) = cifar10_soft_hebb.run(replace(config, learn=False, epochs=1))
    states = result.network.learned_states()
    assert result.metrics["converged_units"] == 100
    (learned,) = cifar10_soft_hebb.run(replace(config, epochs=1, workdir=config.workdir / "learned"))
    for own, moved in zip(states, learned.network.learned_states(), strict=True):
        assert not np.allclose(own.weights, moved.weights, atol=0.1)
    # Both begin at the same random directions, and see the same minibatches.
    chex.assert_trees_all_close(states[0].mean, learned.network.learned_states()[0].mean)


def test_dropout_of_one_half() -> None:
    kept = np.asarray(cifar10_soft_hebb.half_dropped(jnp.ones((50, 70)), jax.random.key(0)))
    assert set(np.unique(kept)) == {0, 2}
    assert abs(kept.mean() - 1) < 0.1
    assert not (kept[:, :32] == kept[:, 32:64]).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_units": ()}, r"num_units=\(\) is not accepted: it must have one to three layers"),
        ({"num_units": (1,)}, "num_units"),
        ({"dataset": "photographs"}, "dataset='photographs' has no labels"),
        ({"batch_size": 101}, "batch_size=101 exceeds the 100 training images"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str, config: Config) -> None:
    with pytest.raises(ValueError, match=message):
        cifar10_soft_hebb.run(replace(config, **options))
