"""Inputs of other kinds than float32 of JAX."""

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import compiled
from scipy import sparse

from sul_jax import (
    coding_rate,
    energy,
    gar,
    hebbian,
    k_means,
    k_subspaces,
    patches,
    whitening,
)
from sul_jax.k_subspaces import KSubspacesState

HALF = jax.random.normal(jax.random.key(3), (2, 60, 6), jnp.bfloat16)
SOFT = jax.jit(lambda half: jax.nn.softmax(half[..., :3].astype(jnp.float32)))(HALF)
IN_FLOAT32: dict[str, Callable[[jax.Array], Any]] = {
    "k_means": lambda x: k_means.fit(jax.random.key(0), x[0], num_clusters=3).centroids,
    "k_subspaces": lambda x: k_subspaces.update(
        k_subspaces.init(jax.random.key(0), x[0], num_subspaces=3, rank=2), x[0]
    ),
    "energy": lambda x: energy.update(
        energy.init(jax.random.key(0), x[..., None], num_subspaces=3, rank=2, kernel_size=3, padding=0),
        x[..., None], kernel_size=3, padding=0,
    ),
    "pca": lambda x: whitening.pca(x[0], num_components=2),
    "conv_zca_kernel": lambda x: whitening.conv_zca_kernel(x[..., None], kernel_size=3, num_components=2),
    "conv_zca": lambda x: whitening.conv_zca(
        x[..., None], whitening.conv_zca_kernel(x[..., None], kernel_size=3, num_components=2)
    ),
    "hebbian": lambda x: hebbian.update(
        hebbian.init(jax.random.key(0), x[0], num_units=3), x[0], learning_rate=1e-3
    ),
    "norms": lambda x: patches.norms(x[..., None], kernel_size=3),
    "nmce_loss": lambda x: coding_rate.nmce_loss(x, SOFT, eps_squared=0.1),
    "tcr_loss": lambda x: coding_rate.tcr_loss(x, eps_squared=0.1),
    "gar_loss": lambda x: gar.gar_loss(x[0], num_parents=2),
}  # fmt: skip


@pytest.mark.parametrize("name", IN_FLOAT32)
def test_half_precision_is_computed_in_float32(name: str) -> None:
    """Sums of many bfloat16 numbers stop growing, and none of them can be factorised."""
    function = jax.jit(IN_FLOAT32[name])
    chex.assert_trees_all_close(function(HALF), function(HALF.astype(jnp.float32)), rtol=1e-5, atol=1e-6)


def test_what_is_not_a_number_stays_so() -> None:
    """Guarded roots must not hide a network that has diverged."""
    state = KSubspacesState(jnp.eye(3)[None, :2])
    assert np.isnan(jax.jit(k_subspaces.encode)(state, jnp.array([[jnp.nan, 1.0, 2.0]]))).all()
    assert np.isnan(compiled(patches.norms)(np.full((1, 3, 3, 1), np.nan), kernel_size=3)).all()
    with pytest.raises(TypeError, match="inputs must be floating"):
        whitening.normalize(jnp.array([[3, 4]]))


def test_half_precision_memberships() -> None:
    soft = SOFT.astype(jnp.bfloat16)
    nmce_loss = jax.jit(partial(coding_rate.nmce_loss, eps_squared=0.1))
    loss, whole = nmce_loss(HALF, soft), nmce_loss(HALF.astype(jnp.float32), SOFT)
    np.testing.assert_allclose(loss, whole, rtol=0.02)


class Host:
    """What offers its values in NumPy's way, as data frames and tensors do."""

    def __init__(self, values: np.ndarray):
        self._values = values

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self._values if dtype is None else self._values.astype(dtype)


class Exchanged:
    """What offers them by DLPack alone."""

    def __init__(self, values: np.ndarray):
        self._values = values

    def __dlpack__(self, **options: Any) -> Any:
        return self._values.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._values.__dlpack_device__()


class Unwilling:
    """As a tensor that wants a gradient or lies on another device."""

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        raise RuntimeError("Can't call numpy() on Tensor that requires grad.")


CONVERTED: dict[str, Callable[[np.ndarray], Any]] = {
    "list": np.ndarray.tolist,
    "rows": list,
    "big-endian": lambda x: x.astype(">f8"),
    "float64": lambda x: x.astype(np.float64),
    "memory order": np.asfortranarray,
    "__array__": Host,
    "__dlpack__": Exchanged,
}


@pytest.mark.parametrize("kind", CONVERTED)
def test_what_numpy_converts(kind: str) -> None:
    values = np.random.default_rng(0).random((20, 6)).astype(np.float32)
    given = CONVERTED[kind](values)
    state = hebbian.HebbianState(jnp.asarray(values[:4]))
    np.testing.assert_array_equal(
        hebbian.encode(state, given, power=2), hebbian.encode(state, jnp.asarray(values), power=2)
    )
    np.testing.assert_allclose(whitening.normalize(given), whitening.normalize(values), rtol=1e-6)
    found = k_means.fit(jax.random.key(0), given, num_clusters=2)
    assert found.centroids.dtype == jnp.float32
    expected = k_means.fit(jax.random.key(0), values, num_clusters=2)
    np.testing.assert_array_equal(found.labels, expected.labels)


NOT_CONVERTED: dict[str, Any] = {
    "list of object": [[None] * 6] * 20,
    "list of <U3": [["abc"] * 6] * 20,
    "list": [[1.5] * 6] * 19 + [[1.5] * 5],
    "ndarray of object": np.full((20, 6), 1.5, object),
    "NoneType of object": None,
    "csr_array of object": sparse.csr_array(np.eye(6)),
    "dict of object": {"column": [1.5] * 20},
    "ndarray of datetime64[s]": np.zeros((20, 6), "datetime64[s]"),
    "Unwilling": Unwilling(),
}  # fmt: skip


@pytest.mark.parametrize("kind", NOT_CONVERTED)
def test_what_numpy_does_not_convert(kind: str) -> None:
    """One line with the type and what is accepted, and no data."""
    state = hebbian.HebbianState(jnp.ones((2, 6)))
    pattern = rf"^inputs must be an array of numbers, got {re.escape(kind)}; accepted are [^\n]{{,200}}$"
    for function in (
        lambda x: hebbian.update(state, x, learning_rate=0.1),
        lambda x: k_means.fit(jax.random.key(0), x, num_clusters=2),
        whitening.normalize,
    ):
        with pytest.raises(TypeError, match=pattern):
            function(NOT_CONVERTED[kind])


def test_numpy_arrays_are_as_good() -> None:
    inputs = np.random.default_rng(0).random((20, 6))
    assert hebbian.init(jax.random.key(0), inputs, num_units=3).weights.dtype == jnp.float32
