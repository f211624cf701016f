import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.decomposition import PCA

from sul_jax import whitening

KEYS = jax.random.split(jax.random.key(0))


def inputs() -> jax.Array:
    mixed = jax.random.normal(jax.random.key(0), (300, 6)) @ jax.random.normal(jax.random.key(1), (6, 9))
    return mixed + 0.1 * jax.random.normal(jax.random.key(2), mixed.shape) + 3


def test_pca_is_that_of_scikit_learn() -> None:
    x = inputs()
    expected = PCA(5, whiten=True, svd_solver="full").fit_transform(np.float64(x))
    got = whitening.pca_whiten(x, whitening.pca(x, num_components=5))
    # scikit-learn divides by n − 1; signs are open.
    np.testing.assert_allclose(np.abs(got), np.abs(expected) * np.sqrt(300 / 299), atol=2e-3)


def test_small_components_are_whitened() -> None:
    """Variances down to 1e-5 of the largest, among more features than that times the machine epsilon."""
    scales = jnp.logspace(0, -2.5, 120)
    x = jax.random.normal(jax.random.key(0), (4000, 120)) * scales
    white = whitening.pca_whiten(x, whitening.pca(x, num_components=120))
    np.testing.assert_allclose(np.std(np.float64(white), axis=0), 1, rtol=0.05)


def test_exponent_between_rotation_and_whitening() -> None:
    x = inputs()
    variances = [
        np.var(whitening.pca_whiten(x, whitening.pca(x, num_components=4, exponent=e)), axis=0)
        for e in (0.0, 0.25, 0.5)
    ]
    np.testing.assert_allclose(variances[1], np.sqrt(variances[0]), rtol=1e-3)
    np.testing.assert_allclose(variances[2], 1, rtol=1e-3)


def test_components_without_variance_are_zero() -> None:
    x = jnp.concatenate([inputs(), jnp.ones((300, 3))], axis=1)
    white = whitening.pca_whiten(x, whitening.pca(x, num_components=12))
    assert np.all(np.isfinite(white))
    np.testing.assert_allclose(np.var(white, axis=0)[9:], 0, atol=1e-6)


def test_sharded_pca_is_that_of_the_whole() -> None:
    x = inputs()[:296]
    whole = whitening.pca(x, num_components=3)
    parts = jax.vmap(
        lambda part: whitening.pca(part, num_components=3, axis_name="batch"), axis_name="batch"
    )(x.reshape(8, 37, 9))
    np.testing.assert_allclose(np.abs(parts.components[0]), np.abs(whole.components), atol=1e-4)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="num_components=10 is not accepted.*9 features"):
        whitening.pca(inputs(), num_components=10)
    state = whitening.pca(inputs(), num_components=2)
    with pytest.raises(ValueError, match="8 features .* made for 9"):
        whitening.pca_whiten(inputs()[:, :8], state)


def test_unit_norm_in_half_precision() -> None:
    """Squares of 300 exceed float16."""
    found = whitening.normalize(jnp.array([300.0, 400.0], jnp.float16))
    assert found.dtype == jnp.float16
    np.testing.assert_allclose(found, [0.6, 0.8], rtol=1e-3)


@pytest.mark.parametrize("gain", [0.1, 0.5])
def test_dc_ratio_of_brightness_and_noise(gain: float) -> None:
    """Eq. 8 where it is known: one component, the brightness, is levelled to the noise of each pixel.

    Of k² pixels W = I − (1 − g)/k² 11ᵀ then, where g² is the noise's share in the second moment along 1.
    """
    brightness, noise = (jax.random.normal(k, (400, n, n, 1)) for k, n in zip(KEYS, (1, 16), strict=True))
    brightness = brightness / jnp.std(brightness) * np.sqrt((gain**-2 - 1) / 9)
    kernel = whitening.conv_zca_kernel(brightness + noise, kernel_size=3, num_components=2)
    expected = np.eye(9)[4].reshape(3, 3) - (1 - gain) / 9
    np.testing.assert_allclose(kernel[..., 0, 0], expected, atol=0.01)
    np.testing.assert_allclose(whitening.dc_ratio(kernel), gain / (1 - (1 - gain) / 9), atol=0.02)


@pytest.mark.parametrize("constant", [3.3, 1e6])
def test_rounding_of_a_mean_is_no_component(constant: float) -> None:
    x = jnp.full((1000, 5), constant)
    np.testing.assert_array_equal(whitening.pca_whiten(x, whitening.pca(x, num_components=2)), 0)
