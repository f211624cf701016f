from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import compiled
from sklearn.decomposition import PCA

from sul_jax import whitening

KERNEL = compiled(whitening.conv_zca_kernel)


@compiled
def whitened(x: jax.Array, **options: float) -> jax.Array:
    return whitening.pca_whiten(x, whitening.pca(x, **options))


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def inputs() -> np.ndarray:
    return normal(0, 300, 6) @ normal(1, 6, 9) + np.float32(0.1) * normal(2, 300, 9) + 3


def test_pca_is_that_of_scikit_learn() -> None:
    x = inputs()
    expected = PCA(5, whiten=True, svd_solver="full").fit_transform(np.float64(x))
    got = whitened(x, num_components=5)
    # scikit-learn divides by n − 1; signs are open.
    np.testing.assert_allclose(np.abs(got), np.abs(expected) * np.sqrt(300 / 299), atol=2e-3)


def test_small_components_are_whitened() -> None:
    """Variances down to 1e-5 of the largest, among more features than that times the machine epsilon."""
    x = normal(0, 4000, 120) * np.logspace(0, -2.5, 120, dtype=np.float32)
    white = whitened(x, num_components=120)
    np.testing.assert_allclose(np.std(np.float64(white), axis=0), 1, rtol=0.05)


def test_exponent_between_rotation_and_whitening() -> None:
    x = inputs()
    variances = [np.var(whitened(x, num_components=4, exponent=e), axis=0) for e in (0.0, 0.25, 0.5)]
    np.testing.assert_allclose(variances[1], np.sqrt(variances[0]), rtol=1e-3)
    np.testing.assert_allclose(variances[2], 1, rtol=1e-3)


def test_components_without_variance_are_zero() -> None:
    x = np.concatenate([inputs(), np.ones((300, 3), np.float32)], axis=1)
    white = whitened(x, num_components=12)
    assert np.all(np.isfinite(white))
    np.testing.assert_allclose(np.var(white, axis=0)[9:], 0, atol=1e-6)


def test_sharded_pca_is_that_of_the_whole() -> None:
    x = inputs()[:296]
    pca = partial(whitening.pca, num_components=3)
    whole = jax.jit(pca)(x)
    parts = jax.jit(jax.vmap(partial(pca, axis_name="batch"), axis_name="batch"))(x.reshape(8, 37, 9))
    found = np.asarray(parts.components)[0]
    np.testing.assert_allclose(np.abs(found), np.abs(whole.components), atol=1e-4)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="num_components=10 is not accepted.*9 features"):
        whitening.pca(inputs(), num_components=10)
    state = compiled(whitening.pca)(inputs(), num_components=2)
    with pytest.raises(ValueError, match="8 features .* made for 9"):
        whitening.pca_whiten(inputs()[:, :8], state)


def test_unit_norm_in_half_precision() -> None:
    """Squares of 300 exceed float16."""
    found = jax.jit(whitening.normalize)(jnp.array([300.0, 400.0], jnp.float16))
    assert found.dtype == jnp.float16
    np.testing.assert_allclose(found, [0.6, 0.8], rtol=1e-3)


@pytest.mark.parametrize("gain", [0.1, 0.5])
def test_dc_ratio_of_brightness_and_noise(gain: float) -> None:
    """Eq. 8 where it is known: one component, the brightness, is levelled to the noise of each pixel.

    Of k² pixels W = I − (1 − g)/k² 11ᵀ then, where g² is the noise's share in the second moment along 1.
    """
    brightness, noise = normal(0, 400, 1, 1, 1), normal(1, 400, 16, 16, 1)
    brightness = brightness / np.std(brightness) * np.float32(np.sqrt((gain**-2 - 1) / 9))
    kernel = KERNEL(brightness + noise, kernel_size=3, num_components=2)
    expected = np.eye(9)[4].reshape(3, 3) - (1 - gain) / 9
    np.testing.assert_allclose(np.asarray(kernel)[..., 0, 0], expected, atol=0.01)
    np.testing.assert_allclose(whitening.dc_ratio(kernel), gain / (1 - (1 - gain) / 9), atol=0.02)


@pytest.mark.parametrize("constant", [3.3, 1e6])
def test_rounding_of_a_mean_is_no_component(constant: float) -> None:
    x = np.full((1000, 5), constant, np.float32)
    np.testing.assert_array_equal(whitened(x, num_components=2), 0)
