"""Every rule keeps the contract: one signature, one compilation, every parallel form exact."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sul_jax import (
    LearningRule,
    acol,
    augment,
    coding_rate,
    deep_cluster,
    energy,
    gradient_rule,
    hebbian,
    k_means,
    k_subspaces,
    nmce,
    nn,
    rate_reduction,
    soft_hebb,
    stack,
    whitening,
)


class Case(NamedTuple):
    rule: LearningRule
    inputs: Callable[[], jax.Array]
    module: Any = None
    traced: tuple[str, Any, Any] | None = None  # a hyperparameter and two of its values
    draws: bool = False  # whether update takes a key

    def update(self, state: Any, inputs: jax.Array, **options: Any) -> Any:
        key = {"key": jax.random.key(2)} if self.draws else {}
        return self.rule.update(state, inputs, **key, **options)


@jax.jit
def vectors() -> jax.Array:
    return jax.random.normal(jax.random.key(0), (64, 12))


@jax.jit
def many_vectors() -> jax.Array:
    """More for each of twenty subspaces than its rank: fewer leave directions to rounding."""
    return jax.random.normal(jax.random.key(0), (512, 12))


@jax.jit
def images() -> jax.Array:
    return jax.random.uniform(jax.random.key(0), (16, 8, 8, 2))


@jax.jit
def two_kinds() -> jax.Array:
    """Dark and bright images: clusters that no rounding moves."""
    images = jax.random.uniform(jax.random.key(0), (16, 8, 8, 2))
    return images * jnp.where(jnp.arange(16) % 2, 1.0, 0.1)[:, None, None, None]


def spread(network: Any, inputs: jax.Array, *, weight: Any = 1.0, axis_name: str | None = None) -> Any:
    """A loss with a hyperparameter and a term beside it, global under `axis_name`."""
    features = network(inputs)
    unit = whitening.normalize(features)
    memberships = jax.nn.softmax(features)
    rates = (coding_rate.coding_rate, coding_rate.class_coding_rate)
    whole = rates[0](unit, eps_squared=0.1, axis_name=axis_name)
    parts = rates[1](unit, memberships, eps_squared=0.1, axis_name=axis_name)
    return weight * parts - whole, {"whole": whole}


class Features(nnx.Module):
    """A little network with batch normalisation and dropout."""

    axis_name: str | None = None

    def __init__(self, rngs: nnx.Rngs):
        self.first, self.second = nnx.Linear(128, 10, rngs=rngs), nnx.Linear(10, 6, rngs=rngs)
        self.norm = nnx.BatchNorm(10, rngs=rngs)
        self.num_features = 6

    def __call__(self, inputs: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        hidden = jax.nn.relu(self.norm(self.first(inputs.reshape(len(inputs), -1))))
        return self.second(nn.backbones.dropout(key, 0, hidden, 0.3, axis_name=self.axis_name))


def manifolds(rngs: nnx.Rngs) -> nn.NMCE:
    return nn.NMCE(Features(rngs), 6, num_features=4, num_clusters=3, rngs=rngs)


def clusters_of_vectors(rngs: nnx.Rngs) -> nn.NMCE:
    mlp = nn.MLP(12, 10, num_layers=1, rngs=rngs)
    return nn.NMCE(mlp, 10, num_features=4, num_clusters=3, rngs=rngs)


def views(key: jax.Array, images: jax.Array) -> jax.Array:
    return images[None] + 0.1 * jax.random.normal(key, (2, *images.shape))


LAYER = energy.EnergyLayer(num_subspaces=5, rank=2, num_winners=3, kernel_size=3, padding=1)
SOFT_LAYER = soft_hebb.SoftHebbLayer(6, 3, learning_rate=0.02, inverse_temperature=1.0, power=1.4)
WARMUP, RATE = ("warmup", False, True), ("learning_rate", 0.02, 0.01)
CASES = {
    "k_subspaces": Case(k_subspaces.rule(num_subspaces=5, rank=2), vectors, k_subspaces, WARMUP),
    "k_subspaces gathered": Case(  # enough rows for the gathered second product
        k_subspaces.rule(num_subspaces=20, rank=7), many_vectors, k_subspaces, WARMUP
    ),
    "k_means": Case(k_means.rule(num_clusters=5), vectors, k_means, ("memory", 0.0, 1.0)),
    "k_means, cosine": Case(
        k_means.rule(num_clusters=5, metric="cosine"), vectors, None, ("memory", 0.0, 1.0)
    ),
    "hebbian": Case(hebbian.rule(num_units=6, learning_rate=0.02), vectors, hebbian, RATE),
    "hebbian layer": Case(
        hebbian.layer_rule(kernel_size=3, num_units=6, num_patches=50, learning_rate=0.02, power=4.0),
        images, None, RATE, True,
    ),
    "soft_hebb": Case(soft_hebb.rule(num_units=6, norm=2.0, learning_rate=0.02), vectors, soft_hebb, RATE),
    "soft_hebb layer": Case(soft_hebb.layer_rule(SOFT_LAYER), images, None, RATE),
    "energy layer": Case(energy.layer_rule(LAYER), images, energy, WARMUP),
    "energy layer, large kernels": Case(  # projected by spectra, gathered, thresholds in a loop
        energy.layer_rule(energy.EnergyLayer(40, 7, 20, kernel_size=8, padding=5)), images, energy, WARMUP
    ),
    "gradient": Case(
        gradient_rule(Features, spread, optax.sgd(0.1), trained=("second",)),
        images, None, ("weight", 1.0, 0.5),
    ),
    "acol": Case(
        acol.rule(
            (8, 8, 2), transformations=augment.FLIPS_AND_ROTATIONS[3:5], nodes_per_parent=3, num_features=10,
            num_filters=3, optimizer=optax.sgd(0.1), balance_over=64,
        ),
        images, None, None, True,
    ),
    "nmce": Case(
        nmce.rule(manifolds, views=views, optimizer=optax.sgd(0.1)),
        images, None, ("compression_weight", 1.0, 0.5), True,
    ),
    "rate_reduction": Case(
        rate_reduction.rule(clusters_of_vectors, optimizer=optax.sgd(0.1)),
        vectors, None, ("compression_weight", 1.0, 0.5),
    ),
    "deep_cluster": Case(
        deep_cluster.rule(
            Features, num_clusters=2, optimizer=optax.sgd(0.1), augmentation=augment.horizontal_flip
        ),
        two_kinds, None, None, True,
    ),
    "conv_zca": Case(whitening.conv_zca_rule(kernel_size=3, num_components=4), images),
    "stack": Case(
        stack(
            whitening.conv_zca_rule(kernel_size=3, num_components=4),
            energy.layer_rule(LAYER),
            energy.layer_rule(LAYER._replace(kernel_size=5, padding=0)),
        ),
        images, None, WARMUP,
    ),
}  # fmt: skip
# Of these `shard_map` and `vmap` show every time that a step may be divided; the rest is slow.
LARGE = ("energy layer, large kernels", "acol", "nmce", "rate_reduction", "deep_cluster", "stack")
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
every_case_large_ones_slowly = pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=[pytest.mark.slow] * (name in LARGE)) for name, case in CASES.items()],
    ids=CASES.keys(),
)


@cache
def _begin(case: Case) -> tuple[Any, jax.Array]:
    inputs = case.inputs()
    return jax.jit(case.rule.init)(jax.random.key(1), inputs), inputs


def begin(case: Case) -> tuple[Any, jax.Array]:
    """A state and a batch, the same ones for every test of a case."""
    return jax.tree.map(lambda leaf: leaf, _begin(case))


@cache
def compiled(case: Case) -> Callable[..., Any]:
    """The plain compiled step, traced once for every test of a case."""
    return jax.jit(case.update)


@cache
def encoder(case: Case) -> Callable[..., jax.Array]:
    return jax.jit(case.rule.encode)


@cache
def one_step(case: Case) -> Any:
    """What the plain compiled step gives, with which every other form is compared."""
    return jax.device_get(compiled(case)(*_begin(case)))


def invariant(state: Any) -> Any:
    """A subspace's projector instead of its basis, whose rows may turn with rounding."""

    def projector(leaf: np.ndarray) -> np.ndarray:
        return np.einsum("krd,kre->kde", leaf, leaf) if leaf.ndim == 3 else leaf

    return jax.tree.map(projector, jax.device_get(state))


def assert_same(got: Any, expected: Any) -> None:
    (state, info), (expected_state, expected_info) = got, expected
    chex.assert_trees_all_close(invariant(state), invariant(expected_state), rtol=2e-3, atol=2e-4)
    chex.assert_trees_all_close(info, expected_info, rtol=1e-4, atol=1e-5)


@every_case
def test_signature(case: Case) -> None:
    if case.module is None:
        pytest.skip("a rule built from parts has no module of its own")
    init = inspect.signature(case.module.init).parameters
    assert next(iter(init)) == "key"
    update = list(inspect.signature(case.module.update).parameters.values())
    assert update[0].name == "state"
    assert update[-1].name == "axis_name"
    assert update[-1].default is None
    assert all(p.kind is p.KEYWORD_ONLY for p in update[2:])


@every_case
def test_types_and_finite(case: Case) -> None:
    state, inputs = begin(case)
    new_state, info = one_step(case)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, new_state)
    chex.assert_tree_all_finite((new_state, info))
    codes = encoder(case)(new_state, inputs)
    assert codes.shape[0] == inputs.shape[0]
    chex.assert_tree_all_finite(codes)


@every_case_large_ones_slowly
def test_jit_equals_eager(case: Case) -> None:
    state, inputs = begin(case)
    assert_same(one_step(case), case.update(state, inputs))
    chex.assert_trees_all_close(
        encoder(case)(state, inputs), case.rule.encode(state, inputs), rtol=1e-5, atol=1e-5
    )


@contextmanager
def strict() -> Iterator[None]:
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@every_case
def test_strict_promotion(case: Case) -> None:
    """What jax refuses there it refuses while tracing: nothing needs to be compiled."""
    inputs = case.inputs()
    with strict():
        state = jax.eval_shape(case.rule.init, jax.random.key(1), inputs)
        jax.eval_shape(case.rule.encode, state, inputs)
        shard = partial(case.update, axis_name="batch")
        jax.eval_shape(case.update, state, inputs)
        jax.eval_shape(jax.vmap(shard, (None, 0), axis_name="batch"), state, split(inputs, 4))


@every_case
def test_what_numpy_converts(case: Case, request: pytest.FixtureRequest) -> None:
    """Lists in the place of arrays; see test_inputs.py for other kinds."""
    if request.node.callspec.id == "gradient":
        pytest.skip("its inputs are a tree for the loss")
    state, inputs = begin(case)
    listed = np.asarray(inputs).tolist()
    for function in (case.update, case.rule.encode):
        expected = jax.eval_shape(function, state, inputs)
        found = jax.eval_shape(lambda state, function=function: function(state, listed), state)
        # Flax 0.11 compares states by identity.
        assert jax.tree.flatten(found) == jax.tree.flatten(expected)
    made = jax.eval_shape(lambda key: case.rule.init(key, listed), jax.random.key(1))
    chex.assert_trees_all_equal_shapes_and_dtypes(made, state)


@every_case
def test_one_compilation(case: Case) -> None:
    state, inputs = begin(case)
    traces = []

    def update(state: Any, inputs: jax.Array) -> Any:  # by its name the compiled program is found again
        traces.append(None)
        return case.update(state, inputs)

    step = jax.jit(update)
    for _ in range(5):
        state, _ = step(state, inputs)
    assert len(traces) == 1


@every_case
def test_hyperparameters_may_be_traced(case: Case) -> None:
    state, inputs = begin(case)
    if case.traced is None:
        pytest.skip("it has none")
    name, default, other = case.traced
    step = jax.jit(lambda s, x, w: case.update(s, x, **{name: w}))
    assert_same(step(state, inputs, default), one_step(case))
    fixed = jax.jit(partial(case.update, **{name: other}))
    assert_same(step(state, inputs, other), fixed(state, inputs))


@every_case_large_ones_slowly
def test_scan(case: Case) -> None:
    state, inputs = begin(case)
    scanned, _ = jax.lax.scan(lambda s, _: case.update(s, inputs), state, length=3)
    step = compiled(case)
    for _ in range(3):
        state, _ = step(state, inputs)
    chex.assert_trees_all_close(invariant(scanned), invariant(state), rtol=2e-3, atol=2e-4)


@every_case_large_ones_slowly
def test_vmap_over_keys(case: Case, request: pytest.FixtureRequest) -> None:
    step, (_, inputs) = compiled(case), begin(case)
    keys = jax.random.split(jax.random.key(3), 3)
    states = jax.jit(jax.vmap(lambda key: case.rule.init(key, inputs)))(keys)
    if case.traced == WARMUP:  # subspaces: a near tie falls out otherwise in other programs
        request.getfixturevalue("optimized")
        step = jax.jit(lambda *given: case.update(*given))  # a program of its own: `optimized` holds for it
    together = jax.jit(jax.vmap(case.update, in_axes=(0, None)))(states, inputs)
    both = jax.device_get((states, together))
    for index in range(3):
        one = jax.tree.map(lambda leaf, i=index: leaf[i], both)
        assert_same(one[1], step(one[0], inputs))


def split(inputs: jax.Array, number: int) -> jax.Array:
    return inputs.reshape(number, -1, *inputs.shape[1:])


@every_case
def test_vmap_axis_name(case: Case) -> None:
    state, inputs = begin(case)
    step = partial(case.update, axis_name="batch")
    got = jax.jit(jax.vmap(step, in_axes=(None, 0), axis_name="batch"))(state, split(inputs, 8))
    first = jax.tree.map(lambda leaf: leaf[0], jax.device_get(got))
    assert_same(first, one_step(case))


@every_case_large_ones_slowly
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_pmap(case: Case) -> None:
    state, inputs = begin(case)
    step = partial(case.update, axis_name="batch")
    got = jax.pmap(step, in_axes=(None, 0), axis_name="batch")(state, split(inputs, 8))
    first = jax.tree.map(lambda leaf: leaf[0], jax.device_get(got))
    assert_same(first, one_step(case))


@every_case
def test_shard_map(case: Case) -> None:
    state, inputs = begin(case)
    mesh = Mesh(np.array(jax.devices()), ("batch",))
    step = jax.shard_map(
        partial(case.update, axis_name="batch"),
        mesh=mesh,
        in_specs=(P(), P("batch")),
        out_specs=P(),
    )
    assert_same(jax.jit(step)(state, inputs), one_step(case))


@every_case_large_ones_slowly
def test_jit_over_sharded_batch(case: Case) -> None:
    state, inputs = begin(case)
    mesh = Mesh(np.array(jax.devices()), ("batch",))
    sharded = jax.device_put(inputs, NamedSharding(mesh, P("batch")))
    got = compiled(case)(state, sharded)
    assert_same(got, one_step(case))
