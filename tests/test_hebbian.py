"""The ranked Hebbian rule against plain NumPy, and steep responses."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import compiled

from sul_jax import hebbian, k_means, patches, whitening
from sul_jax.hebbian import HebbianState

INIT, UPDATE, ENCODE, CONVOLVE = map(
    compiled, (hebbian.init, hebbian.update, hebbian.encode, hebbian.convolve)
)


def uniform(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).random(shape, np.float32)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def naive(
    weights: np.ndarray, inputs: np.ndarray, rate: float, anti: float, rank: int, scaled: bool
) -> np.ndarray:
    """Eq. 1 and 2, one input after the other in float64."""
    change = np.zeros_like(weights)
    for x in inputs.astype(np.float64):
        drives = weights @ x
        order = np.argsort(-drives, kind="stable")
        for unit, g in ((order[0], 1.0), (order[rank - 1], -anti)):
            change[unit] += g * (x - drives[unit] * weights[unit])
    return weights + rate * change / (np.abs(change).max() if scaled else 1)


@pytest.mark.parametrize("rank", [2, 5])
@pytest.mark.parametrize("scaled", [True, False])
def test_fifty_steps_against_numpy(rank: int, scaled: bool) -> None:
    rate = 0.02 if scaled else 1e-3
    data = uniform(0, 50, 40, 12)
    state = INIT(jax.random.key(1), data[0], num_units=8)
    expected = np.asarray(state.weights, np.float64)
    step = jax.jit(partial(hebbian.update, rank=rank, normalize_update=scaled))
    for batch in data:
        state, info = step(state, batch, learning_rate=rate, anti_hebbian=0.3)
        expected = naive(expected, batch, rate, 0.3, rank, scaled)
    np.testing.assert_allclose(state.weights, expected, atol=1e-5)
    assert sum(info.wins.tolist()) == 40


def test_solved_by_hand() -> None:
    """Unit 0 is driven most and learns towards the input, unit 1 away from it, unit 2 rests."""
    state = HebbianState(jnp.array([[1.0, 0.0], [0.5, 0.0], [0.0, 0.1]]))
    new, info = UPDATE(
        state, jnp.array([[1.0, 1.0]]), learning_rate=1.0, anti_hebbian=0.5, normalize_update=False
    )
    # x - 1·W_0 = (0, 1); -0.5 (x - 0.5·W_1) = (-0.375, -0.5)
    np.testing.assert_allclose(new.weights, [[1, 1], [0.125, -0.5], [0, 0.1]], atol=1e-6)
    assert info.wins.tolist() == [1, 0, 0]
    assert info.largest_update == 1


def test_starts_that_are_drawn_evenly_or_by_k_means() -> None:
    inputs = 3 * uniform(5, 30, 4)
    start = compiled(hebbian.init_from_inputs)
    even = np.asarray(start(jax.random.key(0), inputs, num_units=30, spread="even").weights)
    unit = inputs / np.linalg.norm(inputs, axis=1, keepdims=True)
    np.testing.assert_allclose(even[np.lexsort(even.T)], unit[np.lexsort(unit.T)], rtol=1e-5)
    options = {"num_init": 1, "metric": "cosine", "num_clusters": 5}
    expected = compiled(k_means.fit)(jax.random.key(0), inputs, **options).centroids
    found = start(jax.random.key(0), inputs, num_units=5, spread="k_means").weights
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("inputs", "spread", "message"),
    [
        (np.eye(3), "near", "spread='near' is not accepted: it must be one of"),
        (np.diag([1.0, 0, 1]), "far", "weights of unit norm need norms above 0"),
        (np.diag([1.0, 0, 1]), "even", "inputs: 1 of 3 vectors have norm 0, the first one in row 1"),
        (np.diag([1.0, 0, 1]), "k_means", "weights of unit norm need norms above 0"),
        (np.full((3, 3), np.nan), "far", "inputs holds NaN or infinite values"),
        (np.full((3, 3), np.inf), "even", "inputs holds NaN or infinite values"),
    ],
)
def test_inputs_that_no_weights_are_made_of(inputs: np.ndarray, spread: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hebbian.init_from_inputs(jax.random.key(0), inputs, num_units=2, spread=spread)


def test_black_inputs_change_nothing() -> None:
    inputs = np.zeros((5, 4), np.float32)
    state = INIT(jax.random.key(0), inputs, num_units=3)
    new, _ = UPDATE(state, inputs, learning_rate=0.1)
    np.testing.assert_array_equal(new.weights, state.weights)


def test_units_that_learn_reach_unit_norm() -> None:
    """Inputs around four directions: some units take them, at norm 1."""
    centres = np.eye(4, dtype=np.float32)[np.random.default_rng(0).integers(0, 4, 400)]
    inputs = centres + np.float32(0.02) * normal(1, 400, 4)
    state = INIT(jax.random.key(2), inputs, num_units=12)
    step = jax.jit(hebbian.update)
    for index in range(600):
        state, _ = step(state, inputs, learning_rate=0.02 * (1 - index / 600), anti_hebbian=0.1)
    converged = np.asarray(state.weights)[~np.asarray(jax.jit(hebbian.unconverged)(state))]
    codes = ENCODE(HebbianState(converged), np.eye(4), power=1)
    assert (np.max(codes, axis=1) > 0.95).all()


def test_a_start_from_inputs_finds_what_is_rare() -> None:
    """Unit vectors of the inputs, each another one, among them the few that differ from all others."""
    common = np.eye(4)[0] + 0.01 * normal(0, 500, 4)
    inputs = np.float32(np.concatenate([3 * common, 0.2 * np.eye(4)[1:]]))
    state = compiled(hebbian.init_from_inputs)(jax.random.key(1), inputs, num_units=6)
    cosines = np.asarray(state.weights) @ np.asarray(jax.jit(whitening.normalize)(inputs)).T
    np.testing.assert_allclose(cosines.max(axis=1), 1, atol=1e-6)
    assert len(set(cosines.argmax(axis=1).tolist())) == 6
    np.testing.assert_allclose(cosines[:, -3:].max(axis=0), 1, atol=1e-6)


def test_traced_settings_and_seeds_at_once() -> None:
    inputs = uniform(0, 30, 6)
    keys = jax.random.split(jax.random.key(1), 3)
    states = jax.jit(jax.vmap(lambda key: hebbian.init(key, inputs, num_units=4)))(keys)
    deltas = np.float32([0.1, 0.2, 0.4])
    step = lambda state, delta: hebbian.update(  # noqa: E731
        state, inputs, learning_rate=0.02, anti_hebbian=delta
    )
    together, _ = jax.jit(jax.vmap(step))(states, deltas)
    alone = jax.jit(step)
    for index, weights in enumerate(np.asarray(states.weights)):
        expected, _ = alone(HebbianState(weights), deltas[index])
        np.testing.assert_allclose(np.asarray(together.weights)[index], expected.weights, atol=1e-6)


def test_steep_powers_are_stable() -> None:
    state = INIT(jax.random.key(0), np.zeros((1, 48), np.float32), num_units=20)
    inputs = uniform(1, 30, 48)
    inputs[0] = 0
    inputs[1] *= np.float32(1e-20)

    def total(weights: jax.Array, inputs: jax.Array) -> jax.Array:
        return jnp.sum(hebbian.encode(HebbianState(weights), inputs, power=40))

    codes = np.asarray(ENCODE(state, inputs, power=40))
    assert np.isfinite(codes).all()
    assert (codes[0] == 0).all()
    for gradient in jax.jit(jax.grad(total, (0, 1)))(state.weights, inputs):
        assert np.isfinite(gradient).all()
    own = ENCODE(state, 7 * np.asarray(state.weights), power=40)
    np.testing.assert_allclose(np.diag(own), 1, rtol=1e-4)


def test_gradients_at_black_patches_are_finite() -> None:
    images = np.zeros((1, 6, 6, 1), np.float32)
    images[0, :2, :2] = 0.5
    weights = normal(0, 4, 4)
    total = lambda x: jnp.sum(hebbian.convolve(x, weights, kernel_size=2, power=3.0))  # noqa: E731
    gradient = jax.jit(jax.grad(total))(images)
    assert np.isfinite(gradient).all()
    assert np.abs(gradient).max() > 0


@pytest.mark.parametrize("padding", [0, 1])
def test_convolution_is_the_code_of_every_patch(padding: int) -> None:
    images, weights = uniform(0, 3, 7, 9, 3), normal(1, 6, 48)
    images[0, :5, :5] = 0
    vectors = np.asarray(compiled(patches.extract)(images, kernel_size=4, padding=padding))
    expected = ENCODE(HebbianState(weights), vectors.reshape(-1, 48), power=4.5)
    found = CONVOLVE(images, weights, kernel_size=4, power=4.5, padding=padding)
    np.testing.assert_allclose(found, np.reshape(expected, found.shape), atol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s, x: hebbian.update(s, x, learning_rate=0.1, rank=1), "rank=1 is not accepted"),
        (lambda s, x: hebbian.update(s, x, learning_rate=0.1, rank=5), "rank=5 .* there are 4 units"),
        (lambda s, x: hebbian.update(s, x[:, :3], learning_rate=0.1), "inputs has 3 features"),
        (lambda s, x: hebbian.encode(s, x, power=0), "power=0 is not accepted"),
        (lambda s, x: hebbian.init(jax.random.key(0), x, num_units=1), "num_units=1 is not accepted"),
        (
            lambda s, x: hebbian.init_from_inputs(jax.random.key(0), x, num_units=6),
            "between 2 and 5, the num",
        ),
        (
            lambda s, x: hebbian.convolve(jnp.ones((1, 2, 2, 1)), s.weights, kernel_size=3, power=1),
            "kernel_size",
        ),
        (
            lambda s, x: hebbian.convolve(jnp.ones((1, 9, 9, 1)), s.weights, kernel_size=3, power=1),
            r"weights has 6 features \(shape \(4, 6\)\), but patches of kernel_size=3 with 1 channels have 9",
        ),
    ],
)
def test_bad_input(call: object, message: str) -> None:
    inputs = jnp.ones((5, 6))
    state = INIT(jax.random.key(0), inputs, num_units=4)
    with pytest.raises(ValueError, match=message):
        call(state, inputs)


def test_inputs_of_zeros_are_won_by_nobody() -> None:
    state = INIT(jax.random.key(0), np.ones((5, 6), np.float32), num_units=3)
    inputs = np.concatenate([np.zeros((5, 6), np.float32), np.ones((2, 6), np.float32)])
    _, info = UPDATE(state, inputs, learning_rate=0.1)
    assert sum(info.wins.tolist()) == 2


def test_faint_patches_are_blank_in_both_forms() -> None:
    images = np.float32(1e-9) * uniform(0, 1, 4, 4, 1)
    state = INIT(jax.random.key(1), np.ones((1, 16), np.float32), num_units=3)
    maps = CONVOLVE(images, state.weights, kernel_size=4, power=1)
    codes = ENCODE(state, images.reshape(1, 16), power=1)
    np.testing.assert_array_equal(np.ravel(maps), np.ravel(codes))
