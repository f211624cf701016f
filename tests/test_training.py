"""How rules are trained: minibatches, compiled steps, layers."""

import inspect
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from sul_jax import (
    LearningRule,
    acol,
    coding_rate,
    deep_cluster,
    energy,
    estimators,
    gar,
    gradient_rule,
    hebbian,
    k_means,
    k_subspaces,
    nmce,
    nn,
    patches,
    soft_hebb,
    training,
)
from sul_jax.seeds import over_seeds, stacked


def images() -> jax.Array:
    return jax.random.uniform(jax.random.key(0), (24, 8, 8, 1))


def views(key: jax.Array, images: jax.Array) -> jax.Array:
    return images + 0.1 * jax.random.normal(key, (2, *images.shape))


class Small(nnx.Module):
    num_features = 5

    def __init__(self, rngs: nnx.Rngs):
        self.layer = nnx.Linear(64, 5, rngs=rngs)

    def __call__(self, inputs: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        return self.layer(inputs.reshape(len(inputs), -1))


def manifolds(rngs: nnx.Rngs) -> nn.NMCE:
    return nn.NMCE(Small(rngs), 5, num_features=4, num_clusters=3, rngs=rngs)


def moved(state: Any, after: Any) -> bool:
    pairs = zip(*map(jax.tree.leaves, (state, after)), strict=True)
    return any(np.any(np.asarray(a) != np.asarray(b)) for a, b in pairs)


METHODS = {
    "energy": energy.layer_rule(energy.EnergyLayer(6, 2, 2, 5, 0)),
    "hebbian": hebbian.layer_rule(kernel_size=4, num_units=5, num_patches=20),
    "acol": acol.rule((8, 8, 1), num_features=10, num_filters=3),
    "nmce": nmce.rule(manifolds, views=views),
    "deep_cluster": deep_cluster.rule(Small, num_clusters=3),
}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_in_the_same_words(method: str) -> None:
    """README's ten lines: build, init, scan over minibatches, encode."""
    rule, data = METHODS[method], images()
    state = jax.jit(rule.init)(jax.random.key(1), data)
    order = training.shuffled(0, len(data), 12, num_steps=3)
    keys = {} if method == "energy" else {"key": jax.random.split(jax.random.key(2), len(order))}
    after, infos = jax.jit(lambda state: training.scan_updates(rule.update, state, data, order, **keys))(
        state
    )
    chex.assert_trees_all_equal_shapes_and_dtypes(state, after)
    assert all(len(leaf) == len(order) for leaf in jax.tree.leaves(infos))
    assert moved(state, after)
    codes = jax.jit(rule.encode)(after, data)
    assert len(codes) == len(data)
    assert np.isfinite(codes).all()


PLACES = {
    "energy": [energy],
    "hebbian": [hebbian],
    "soft_hebb": [soft_hebb],
    "acol": [acol.rule, nn.ACOL, estimators.ACOLClustering],
    "gar": [gar],
    "nmce": [nmce.rule, estimators.NMCEClustering],
    "coding_rate": [coding_rate],
    "deep_cluster": [deep_cluster],
    "k_subspaces": [k_subspaces],
    "patches": [patches],
    "clustering": [k_means.fit, k_subspaces.fit],
}
OWN = {"hebbian": {"learning_rate", "power"}, "clustering": {"tolerance", "init"}}


@pytest.mark.parametrize("method", PLACES)
def test_an_argument_has_one_default_wherever_it_is_taken(method: str) -> None:
    defaults: dict[str, set[str]] = {}
    for place in PLACES[method]:
        functions = vars(place).values() if inspect.ismodule(place) else [place]
        for function in functions:
            if callable(function) and (place is function or function.__module__ == place.__name__):
                for name, parameter in inspect.signature(function).parameters.items():
                    if parameter.default is not parameter.empty:
                        defaults.setdefault(name, set()).add(repr(parameter.default))
    several = {name for name, values in defaults.items() if len(values) > 1}
    assert several <= OWN.get(method, set())


def test_shuffled_sees_every_example_once_in_a_pass() -> None:
    order = training.shuffled([3, 1], 10, 5, num_steps=4)
    for half in (order[:2], order[2:]):
        assert sorted(half.ravel()) == list(range(10))
    assert not np.array_equal(order[:2], order[2:])
    filled = training.shuffled([3, 1], 10, 4, num_steps=5, drop_last=False)
    assert sorted(filled.ravel()[:10]) == list(range(10)) == sorted(filled.ravel()[10:])
    assert np.bincount(training.shuffled(0, 3, 5, num_steps=3, drop_last=False).ravel()).tolist() == [5] * 3
    with pytest.raises(ValueError, match="batch_size=11 is not accepted: it must be between 1 and 10"):
        training.shuffled(0, 10, 11)


def test_minibatches_are_epochs_of_each_seed() -> None:
    keys = jnp.stack([jax.random.key(seed) for seed in (5, 6)])
    batches = training.Minibatches(keys, 10, 4, fill_last=True)
    found = batches(0, 6)
    assert found.indices.shape == (6, 2, 4)
    epoch = found.indices[:3, 0].ravel()
    assert sorted(epoch[:10]) == list(range(10))
    np.testing.assert_array_equal(epoch[10:], epoch[:2])
    assert not np.array_equal(found.indices[:3, 0], found.indices[:3, 1])
    assert not np.array_equal(found.indices[:3], found.indices[3:])
    alone = training.Minibatches(keys[1], 10, 4, fill_last=True)(4, 5)  # begun in the middle
    np.testing.assert_array_equal(alone.indices, found.indices[4:5, 1])
    expected = jax.random.fold_in(jax.random.fold_in(keys[1], 1), 4)
    assert jnp.array_equal(jax.random.key_data(alone.key[0]), jax.random.key_data(expected))
    assert training.Minibatches(keys, 10, 4).per_epoch == 2
    with pytest.raises(ValueError, match="batch_size=11 is not accepted"):
        training.Minibatches(keys, 10, 11)


@pytest.mark.parametrize("scan", [True, False])
def test_train_calls_back_at_strides_and_stops(scan: bool) -> None:
    def step(state: jax.Array, number: jax.Array, factor: jax.Array) -> tuple[jax.Array, jax.Array]:
        return state + factor * number, state

    seen: list[tuple[int, float, list[float]]] = []
    last = training.train(
        training.compiled(step, scan=scan), jnp.zeros(()), lambda first, end: jnp.arange(first, end) * 1.0,
        jnp.array(2.0), num_steps=7, start=1, stride=3, stops=(2, 9),
        callback=lambda done, state, infos: seen.append((done, float(state), infos.tolist())),
    )  # fmt: skip
    assert [done for done, _, _ in seen] == [2, 5, 7]
    assert float(last) == seen[-1][1] == 2 * sum(range(1, 7))
    assert [value for _, _, infos in seen for value in infos] == [0, 2, 6, 12, 20, 30]
    steps, count = training.compiled(step, scan=scan), lambda first, end: jnp.arange(first, end) + 1.0
    assert training.train(steps, jnp.zeros(()), count, jnp.array(1.0), num_steps=3) == 1 + 2 + 3


def layers() -> list[LearningRule]:
    sizes = (energy.EnergyLayer(6, 2, 2, 5, 0), energy.EnergyLayer(4, 2, 2, 3, 1))
    return [energy.layer_rule(size) for size in sizes]


def test_layers_are_trained_by_updates_one_after_the_other() -> None:
    data = np.random.default_rng(0).random((20, 12, 12, 1), np.float32)
    rules, keys = layers(), jax.random.split(jax.random.key(1), 4).reshape(2, 2)
    orders = [
        np.stack([training.shuffled([seed, i], 20, 5, num_steps=6) for seed in (0, 1)], 1) for i in (0, 1)
    ]

    def plan(place: int) -> training.LayerTraining:
        return training.LayerTraining(lambda first, end: orders[place][first:end], 6, keys[place])

    options: dict[str, Any] = {
        "see": lambda chosen, data: data[chosen],
        "hyperparameters": lambda steps: {"warmup": steps < 3},
    }
    reports: list[tuple[int, int]] = []
    halfway: list[Any] = []

    def look(place: int, done: int, states: tuple[Any, ...], infos: Any) -> None:
        reports.append((place, done))
        if (place, done) == (1, 4):
            halfway.append(jax.tree.map(jnp.copy, states))

    found = training.train_layers(rules, (), plan, data, stride=2, callback=look, **options)
    assert reports == [(0, 2), (0, 4), (0, 6), (1, 2), (1, 4), (1, 6)]
    compiled_rules = [[jax.jit(part) for part in (rule.init, rule.update, rule.encode)] for rule in rules]
    for seed in (0, 1):
        codes = data
        for place in (0, 1):
            init, update, encode = compiled_rules[place]
            expected = init(keys[place, seed], codes[orders[place][0, seed]])
            for step in range(6):
                expected, _ = update(expected, codes[orders[place][step, seed]], warmup=step < 3)
            own = jax.tree.map(lambda leaf, seed=seed: np.asarray(leaf)[seed], found[place])
            chex.assert_trees_all_close(own, expected, atol=1e-3)
            codes = np.asarray(encode(expected, codes))
    ((below, state),) = halfway
    again = training.train_layers(rules, (below,), plan, data, stride=2, unfinished=(state, 4), **options)
    chex.assert_trees_all_equal(again, found)


def test_layers_without_steps_stay_as_they_begin() -> None:
    data = np.random.default_rng(0).random((20, 12, 12, 1), np.float32)
    keys = jax.random.key(1)[None]

    def plan(place: int) -> training.LayerTraining:
        return training.LayerTraining(lambda first, end: jnp.arange(5)[None, None], 0, keys)

    (state,) = training.train_layers(layers()[:1], (), plan, data, see=lambda chosen, data: data[chosen])
    expected = jax.jit(layers()[0].init)(keys[0], data[:5])
    chex.assert_trees_all_close(state.bases[0], expected.bases, atol=1e-5)


def test_random_subspaces_do_not_look_at_the_images() -> None:
    rule = energy.layer_rule(energy.EnergyLayer(6, 2, 2, 5, 0), random_subspaces=True)
    init = jax.jit(rule.init)
    one, other = (init(jax.random.key(0), np.full((2, 8, 8, 1), value, np.float32)) for value in (0, 1))
    chex.assert_trees_all_equal(one, other)
    products = np.einsum("krd,ksd->krs", one.bases, one.bases)
    np.testing.assert_allclose(products, np.broadcast_to(np.eye(2), (6, 2, 2)), atol=1e-5)


def quadratic(network: nnx.Linear, inputs: jax.Array, *, axis_name: str | None = None) -> jax.Array:
    return jnp.mean(jnp.square(network(inputs)))


def linear(rngs: nnx.Rngs) -> nnx.Linear:
    return nnx.Linear(3, 2, rngs=rngs)


OPTIMIZERS = {
    "a line search": optax.lbfgs(),
    "a plateau": optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau()),
    "steps from the loss": optax.polyak_sgd(),
    "gradients alone": optax.adam(0.1),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_optimizers_are_handed_what_they_need(optimizer: Any) -> None:
    rule = gradient_rule(linear, quadratic, optimizer)
    inputs = np.random.default_rng(0).standard_normal((20, 3), np.float32)
    state = jax.jit(rule.init)(jax.random.key(1), inputs)
    update = jax.jit(rule.update)
    state, first = update(state, inputs)
    for _ in range(5):
        state, last = update(state, inputs)
    assert last.loss < first.loss


def test_parts_of_a_network_may_stay_fixed() -> None:
    class Two(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.below, self.above = nnx.Linear(3, 4, rngs=rngs), nnx.Linear(4, 2, rngs=rngs)

        def __call__(self, inputs: jax.Array) -> jax.Array:
            return self.above(self.below(inputs))

    rule = gradient_rule(Two, quadratic, optax.sgd(0.1), trained=("above",), dtype=jnp.bfloat16)
    inputs = np.ones((5, 3), np.float32)
    state = jax.jit(rule.init)(jax.random.key(0), inputs)
    after, _ = jax.jit(rule.update)(state, inputs)
    chex.assert_trees_all_equal(state.rest, after.rest)
    assert jax.tree.leaves(after.params)[1].dtype == jnp.float32
    assert moved(state.params, after.params)
    with pytest.raises(ValueError, match="the network has no"):
        gradient_rule(Two, quadratic, optax.sgd(0.1), trained=("middle",))


def test_seeds_of_a_rule_side_by_side() -> None:
    rule = gradient_rule(linear, quadratic, optax.adam(0.1))
    inputs = np.random.default_rng(0).standard_normal((2, 20, 3), np.float32)
    init, update = jax.jit(rule.init), jax.jit(rule.update)
    states = [init(jax.random.key(seed), inputs) for seed in (0, 1)]
    together, _ = jax.jit(lambda states, inputs: over_seeds(rule.update)(stacked(states), inputs))(
        states, inputs
    )
    for seed in (0, 1):
        alone, _ = update(states[seed], inputs[seed])
        own = jax.tree.map(lambda leaf, seed=seed: np.asarray(leaf)[seed], together)
        chex.assert_trees_all_close(own, alone, rtol=1e-5)


def test_numpy_arrays_are_as_good() -> None:
    inputs = np.random.default_rng(0).random((20, 6))
    rule = k_subspaces.rule(num_subspaces=3, rank=2)
    state = rule.init(jax.random.key(0), inputs)
    state, _ = training.scan_updates(rule.update, state, inputs, np.arange(20).reshape(2, 10))
    assert np.isfinite(state.bases).all()


def test_batches_from_the_device_and_the_host() -> None:
    images = np.random.default_rng(0).random((23, 3)).astype(np.float32)
    sizes = []

    def twice(x: Any) -> Any:
        sizes.append(len(x))
        return {"twice": 2 * x}

    for source in (images, jnp.asarray(images)):
        found = training.map_batches(jax.jit(twice), source, batch_size=5)
        np.testing.assert_array_equal(found["twice"], 2 * images)
    assert set(sizes) == {5}
    assert training.map_batches(twice, images)["twice"].shape == images.shape
    with pytest.raises(ValueError, match=r"len\(inputs\)=0"):
        training.map_batches(twice, images[:0])
    with pytest.raises(ValueError, match="batch_size=0"):
        training.map_batches(twice, images, batch_size=0)
