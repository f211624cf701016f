"""Every loss keeps the contract: one signature, values and gradients exact under every mapped axis."""

import inspect
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from sul_jax import coding_rate, gar, rate_reduction


class Case(NamedTuple):
    loss: Callable[..., Array]
    hyperparameter: str | None
    options: dict[str, Any]
    more: tuple[str, ...] = ()  # arguments beside the activations, by name in `batch`
    views: bool = False


CASES = {
    "gar": Case(gar.gar_loss, "affinity_weight", {"num_parents": 2}),
    "gar, as printed": Case(gar.gar_loss, "balance_weight", {"num_parents": 2, "frobenius": "norm"}),
    "parents": Case(gar.parent_loss, None, {"num_parents": 3}, ("parents",)),
    "coding-rate reduction": Case(coding_rate.coding_rate_reduction, "eps_squared", {}, ("memberships",)),
    "total coding rate": Case(coding_rate.tcr_loss, "eps_squared", {"invariance_weight": 2.0}, (), True),
    "total coding rate of each view": Case(
        coding_rate.tcr_loss, "invariance_weight", {"eps_squared": 0.1, "average_views": False}, (), True
    ),
    "nmce": Case(
        coding_rate.nmce_loss, "invariance_weight", {"eps_squared": 0.1}, ("memberships",), True
    ),
    "rate reduction": Case(
        rate_reduction.rate_reduction_loss, "compression_weight", {"invariance_weight": 2.0},
        ("memberships",), True,
    ),
}  # fmt: skip
pytestmark = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
WEIGHT = 0.3


@cache
@jax.jit
def batch() -> dict[str, Array]:
    """Sixteen inputs of two views; soft memberships and parents that stay as they are."""
    keys = jax.random.split(jax.random.key(0))
    parents = jnp.arange(32).reshape(16, 2) % 3
    memberships = jax.nn.softmax(jax.random.normal(keys[0], (16, 2, 3)))
    return {"inputs": jax.random.normal(keys[1], (16, 2, 6)), "memberships": memberships, "parents": parents}


@cache
def matrix() -> Array:
    return jax.random.normal(jax.random.key(2), (6, 6))


def value(case: Case, weight: Any, parameters: Array, data: dict[str, Array], **options: Any) -> Array:
    """The loss of linear activations."""

    def seen(values: Array) -> Array:
        return values.swapaxes(0, 1) if case.views else values[:, 0]

    activations = seen(data["inputs"] @ parameters)
    more = [seen(data[name]) for name in case.more]
    chosen = {case.hyperparameter: weight} if case.hyperparameter else {}
    return case.loss(activations, *more, **chosen, **case.options, **options)


def mean_over_shards(case: Case, parameters: Array, data: dict[str, Array]) -> tuple[Array, Array]:
    loss = jax.value_and_grad(partial(value, case, WEIGHT, axis_name="batch"))
    return jax.lax.pmean(loss(parameters, data), "batch")


def shards() -> dict[str, np.ndarray]:
    return {name: np.asarray(v).reshape(4, 4, *v.shape[1:]) for name, v in batch().items()}


def whole(case: Case) -> Any:
    return jax.jit(jax.value_and_grad(partial(value, case, WEIGHT)))(matrix(), batch())


def assert_same(got: tuple[Array, Array], expected: tuple[Array, Array]) -> None:
    assert np.isfinite(expected[0])
    assert np.abs(expected[1]).max() > 1e-3
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-5)
    np.testing.assert_allclose(got[1], expected[1], rtol=1e-4, atol=1e-5)


def test_signature(case: Case) -> None:
    parameters = list(inspect.signature(case.loss).parameters.values())
    assert parameters[-1].name == "axis_name"
    assert parameters[-1].default is None
    assert all(p.kind is p.KEYWORD_ONLY for p in parameters[1 + len(case.more) :])


def test_jit_equals_eager_with_a_traced_hyperparameter(case: Case) -> None:
    expected = whole(case)
    assert expected[0].shape == ()
    np.testing.assert_allclose(value(case, WEIGHT, matrix(), batch()), expected[0], rtol=1e-5)
    several = jax.jit(jax.vmap(partial(value, case), (0, None, None)))
    found = several(jnp.array([0.1, WEIGHT]), matrix(), batch())
    np.testing.assert_allclose(found[1], expected[0], rtol=1e-5)
    assert np.isclose(found[0], found[1]) == (case.hyperparameter is None)


def test_strict_promotion(case: Case) -> None:
    gradient = jax.value_and_grad(partial(value, case))
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        jax.eval_shape(gradient, WEIGHT, matrix(), batch())
        # More must not be asked of a shard than of the whole.
        shard = jax.vmap(partial(mean_over_shards, case), (None, 0), axis_name="batch")
        jax.eval_shape(shard, matrix(), shards())


def test_lists(case: Case) -> None:
    activations, *more = (
        np.asarray(batch()[name]).swapaxes(0, 1) if case.views else np.asarray(batch()[name])[:, 0]
        for name in ("inputs", *case.more)
    )
    options = case.options | ({case.hyperparameter: WEIGHT} if case.hyperparameter else {})
    expected = case.loss(jnp.asarray(activations), *map(jnp.asarray, more), **options)
    found = case.loss(activations.tolist(), *(v.tolist() for v in more), **options)
    assert found.dtype == expected.dtype
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("form", ["vmap", "pmap", "shard_map"])
def test_global_under_axis_name(case: Case, form: str) -> None:
    """The value is the whole batch's, and so is the mean of the shards' gradients."""
    split = partial(mean_over_shards, case)
    if form == "shard_map":
        mesh = Mesh(np.array(jax.devices()[:4]), ("batch",))
        mapped = jax.shard_map(split, mesh=mesh, in_specs=(P(), P("batch")), out_specs=P(), check_vma=False)
        got = jax.jit(mapped)(matrix(), batch())
    else:
        options = {"in_axes": (None, 0), "axis_name": "batch"}
        mapped = jax.jit(jax.vmap(split, **options)) if form == "vmap" else jax.pmap(split, **options)
        got = [leaf[0] for leaf in jax.device_get(mapped(matrix(), shards()))]
    assert_same(jax.device_get(got), jax.device_get(whole(case)))
