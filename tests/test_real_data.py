"""What the papers print about real data, where it takes seconds to check."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.cluster import KMeans

from experiments.data import originals
from sul_jax import k_means, whitening

Splits = dict[str, tuple[np.ndarray, np.ndarray]]
pytestmark = pytest.mark.data


@pytest.fixture
def mnist(data_dir: Path) -> Splits:
    """Images and labels of each split; their way through tfds and the cache is test_data's."""
    if not (data_dir / "mnist").is_dir():
        pytest.skip(f"no mnist in {data_dir}")
    return originals.read_originals("mnist", data_dir / "mnist")


def test_zca_kernel_has_the_printed_dc_ratio(mnist: Splits) -> None:
    """Eq. 8 and figure 6: 0.10 for a 9×9 kernel with n = 9."""
    images, labels = mnist["train"]
    assert labels[:5].tolist() == [5, 0, 4, 1, 9]
    images = jnp.asarray(images[:20_000, ..., None]) / 255
    fit = jax.jit(lambda x: whitening.conv_zca_kernel(x, kernel_size=9, num_components=9))
    assert whitening.dc_ratio(fit(images)) == pytest.approx(0.10, abs=0.005)


def test_k_means_on_pixels_is_as_good_as_scikit_learns(
    mnist: Splits,
) -> None:
    x = mnist["test"][0].reshape(10_000, -1)[:5000].astype(np.float32) / 255
    ours = jax.jit(lambda key, x: k_means.fit(key, x, num_clusters=10))(jax.random.key(0), x)
    theirs = KMeans(10, n_init=10, random_state=0).fit(x)
    assert float(ours.inertia) <= 1.01 * theirs.inertia_
