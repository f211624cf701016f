from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiled import compiled
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from sul_jax import coding_rate, k_means, metrics, nn, rate_reduction, training, whitening

SINKHORN = compiled(rate_reduction.sinkhorn)
TERMS = compiled(rate_reduction.terms)
LOSS = compiled(rate_reduction.rate_reduction_loss)
REDUCTION = compiled(coding_rate.coding_rate_reduction)


def normal(key: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(key).standard_normal(shape, np.float32)


def unit(values: np.ndarray) -> np.ndarray:
    return values / np.linalg.norm(values, axis=-1, keepdims=True)


def naive_sinkhorn(logits: np.ndarray, temperature: float, num_iterations: int) -> np.ndarray:
    """Rows and columns divided by their sums in turn, in float64."""
    plan = np.exp(logits.astype(np.float64) / temperature)
    for _ in range(num_iterations):
        plan /= plan.sum(1, keepdims=True)
        plan *= len(plan) / plan.shape[1] / plan.sum(0)
    return plan / plan.sum(1, keepdims=True)


def naive_terms(
    features: np.ndarray, logits: np.ndarray, eps_squared: float, temperature: float, num_iterations: int
) -> tuple[float, float, float]:
    """R, R_c and similarity of two views by determinants of n×n matrices, in float64."""
    views = unit(features.astype(np.float64))
    z = unit(views.mean(0))
    n, d = z.shape
    plan = naive_sinkhorn(unit(logits.astype(np.float64).mean(0)), temperature, num_iterations)

    def log_det(weights: np.ndarray) -> float:
        own = np.sqrt(weights)[:, None] * z
        return np.linalg.slogdet(np.eye(n) + d / (weights.sum() * eps_squared) * own @ own.T)[1]

    class_rate = sum(weights.sum() / (2 * n) * log_det(weights) for weights in plan.T)
    return log_det(np.ones(n)) / 2, class_rate, float((views[0] * views[1]).sum(1).mean())


def test_two_rows_by_hand() -> None:
    """Logits (a, 0) and (b, 0): halves of both columns leave p₁₁ with log-odds (a − b)/2τ."""
    logits = np.array([[3.0, 0.0], [1.0, 0.0]], np.float32)
    expected = 1 / (1 + np.exp(-(3.0 - 1.0) / 2 / 0.5))
    found = SINKHORN(logits, temperature=0.5, num_iterations=30)
    np.testing.assert_allclose(found, [[expected, 1 - expected], [1 - expected, expected]], rtol=1e-5)


@pytest.mark.parametrize("num_iterations", [0, 1, 5])
@pytest.mark.parametrize("shape", [(12, 4), (3, 5)])
def test_sinkhorn_equals_numpy(shape: tuple[int, int], num_iterations: int) -> None:
    logits = normal(0, *shape)
    found = SINKHORN(logits, temperature=0.3, num_iterations=num_iterations)
    np.testing.assert_allclose(found, naive_sinkhorn(logits, 0.3, num_iterations), rtol=1e-4, atol=1e-7)


def test_shares_are_equal_and_offsets_of_no_account() -> None:
    logits = normal(1, 20, 4)
    balance = partial(SINKHORN, temperature=0.5, num_iterations=60)
    found = balance(logits)
    np.testing.assert_allclose(found.sum(1), 1, rtol=1e-5)
    np.testing.assert_allclose(found.sum(0), 5, rtol=1e-4)
    moved = logits + normal(2, 20, 1) + 3 * normal(3, 4)
    np.testing.assert_allclose(balance(moved), found, rtol=1e-3, atol=1e-6)


def test_logits_of_any_size_and_type() -> None:
    large = SINKHORN(1e4 * normal(0, 6, 3), temperature=0.1, num_iterations=5)
    assert np.isfinite(large).all()
    np.testing.assert_allclose(large.sum(1), 1, rtol=1e-5)
    half = jnp.asarray(normal(0, 6, 3), jnp.bfloat16)
    assert SINKHORN(half, temperature=1.0, num_iterations=2).dtype == np.float32


def test_terms_equal_numpy() -> None:
    features, logits = normal(0, 2, 15, 6), normal(1, 2, 15, 3)
    found = TERMS(features, logits, eps_squared=0.2, temperature=0.3, num_iterations=4)
    expected = naive_terms(features, logits, 0.2, 0.3, 4)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    loss = LOSS(
        features, logits, eps_squared=0.2, temperature=0.3, num_iterations=4,
        compression_weight=0.5, invariance_weight=2.0,
    )  # fmt: skip
    np.testing.assert_allclose(loss, 0.5 * expected[1] - expected[0] - 2 * expected[2], rtol=1e-5)


def test_one_view_and_sure_logits_give_the_rate_reduction() -> None:
    """Balanced clusters that the logits are sure of: −ΔR but for the constant similarity."""
    z, labels = unit(normal(0, 12, 5)), np.arange(12) % 3
    logits = np.eye(3, dtype=np.float32)[labels]
    loss = LOSS(z[None], logits[None], eps_squared=0.1, temperature=0.02, invariance_weight=0.0)
    np.testing.assert_allclose(loss, -REDUCTION(z, logits, eps_squared=0.1), rtol=1e-4)
    rest = {"eps_squared": 0.1, "invariance_weight": 1.0}
    # Neither the size of what the heads give counts, nor the order of vectors, nor a rotation.
    order, turn = np.random.default_rng(0).permutation(12), np.linalg.qr(normal(1, 5, 5))[0]
    views, noisy = np.stack([z, z + 0.1 * normal(2, 12, 5)]), normal(3, 2, 12, 3)
    expected = LOSS(views, noisy, **rest)
    found = LOSS(3 * views[:, order] @ turn, 7 * noisy[:, order], **rest)
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def build(rngs: nnx.Rngs) -> nn.NMCE:
    mlp = nn.MLP(24, 64, num_layers=1, activation=jax.nn.relu, rngs=rngs)
    return nn.NMCE(mlp, 64, num_features=6, num_clusters=3, rngs=rngs)


def network(state: Any) -> nn.NMCE:
    net = build(nnx.Rngs(0))
    nnx.update(net, state.params, state.rest)
    return net


PREDICT = nnx.jit(lambda net, inputs: net.predict(inputs))


def test_a_step_with_neighbours_over_eight_devices() -> None:
    rule = rate_reduction.rule(build, optimizer=optax.sgd(0.01))
    inputs = normal(0, 32, 24)
    neighbours = inputs + 0.1 * normal(1, 32, 24)
    state = jax.jit(rule.init)(jax.random.key(0), inputs)
    expected = jax.jit(rule.update)(state, inputs, neighbours=neighbours)
    assert expected[1].terms.similarity < 0.999

    def step(state: Any, inputs: jax.Array, neighbours: jax.Array) -> Any:
        return rule.update(state, inputs, neighbours=neighbours, axis_name="batch")

    mesh = Mesh(np.array(jax.devices()), ("batch",))
    sharded = jax.shard_map(step, mesh=mesh, in_specs=(P(), P("batch"), P("batch")), out_specs=P())
    found = jax.jit(sharded)(state, inputs, neighbours)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-5)


def test_clusters_begin_at_centroids() -> None:
    rule = rate_reduction.rule(build)
    inputs, centroids = normal(0, 50, 24), 3 * normal(1, 3, 6)
    state = jax.jit(rule.init)(jax.random.key(0), inputs)
    net = network(state)
    net.feature_head.bias[...] = jnp.asarray(normal(2, 6))
    state = state._replace(params=nnx.state(net, nnx.Param))
    before = jax.tree.map(np.asarray, state.params)
    begun = rate_reduction.begin_clusters(state, centroids)
    nearest = np.argmax(np.asarray(rule.encode(begun, inputs)) @ unit(centroids).T, axis=1)
    np.testing.assert_array_equal(PREDICT(network(begun), inputs), nearest)
    for one, other in zip(jax.tree.leaves(state.params), jax.tree.leaves(before), strict=True):
        np.testing.assert_array_equal(one, other)


def planted(seed: int, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Three subspaces of rank 4 in 24 dimensions, the same ones for every seed."""
    generator = np.random.default_rng(seed)
    labels = np.arange(number) % 3
    points = np.einsum("nr,nrd->nd", generator.standard_normal((number, 4)), normal(9, 3, 4, 24)[labels])
    points = unit(points) * np.sqrt(24) + 0.05 * generator.standard_normal((number, 24))
    return points.astype(np.float32), labels


def test_planted_subspaces_where_k_means_fails() -> None:
    """Warm-up, clusters by k-means on its features, then both; new vectors too."""
    inputs, labels = planted(0, 300)
    similarity = unit(inputs) @ unit(inputs).T - 2 * np.eye(300, dtype=np.float32)
    nearest = np.argsort(-similarity, axis=1)[:, :3]
    rule = rate_reduction.rule(build, optimizer=optax.adam(5e-3))
    generator = np.random.default_rng(0)

    def batches(first: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        of_each = generator.integers(0, 3, (end - first, 300))
        return inputs[nearest[np.arange(300), of_each]], np.arange(first, end)

    def step(state: Any, batch: Any, inputs: jax.Array) -> Any:
        neighbours, number = batch
        weight = jnp.where(number < 80, 0.0, 1.0)
        return rule.update(state, inputs, neighbours=neighbours, compression_weight=weight)

    steps = training.compiled(step)
    options: dict[str, Any] = {"num_steps": 80, "stride": 20}
    state = training.train(steps, jax.jit(rule.init)(jax.random.key(0), inputs), batches, inputs, **options)
    cluster = jax.jit(partial(k_means.fit, num_clusters=3, num_init=5, metric="cosine"))
    plain = cluster(jax.random.key(1), inputs)
    found = cluster(jax.random.key(1), rule.encode(state, inputs))
    assert metrics.clustering_accuracy(labels, plain.labels) < 0.8
    state = rate_reduction.begin_clusters(state, found.centroids)
    state = training.train(steps, state, batches, inputs, num_steps=100, start=80, stride=20)
    net = network(state)
    assert metrics.clustering_accuracy(labels, PREDICT(net, inputs)) > 0.97
    new, new_labels = planted(1, 100)
    assert metrics.clustering_accuracy(new_labels, PREDICT(net, new)) > 0.95


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rate_reduction.sinkhorn(np.ones(3)), r"logits must have shape \[batch, num_columns\]"),
        (lambda: rate_reduction.sinkhorn(np.ones((2, 2)), temperature=0), "temperature=0 is not accepted"),
        (
            lambda: rate_reduction.sinkhorn(np.ones((2, 2)), num_iterations=-1),
            "num_iterations=-1 is not accepted: it must be at least 0",
        ),
        (
            lambda: rate_reduction.terms(np.ones((2, 5, 3)), np.ones((1, 5, 2))),
            r"logits has shape \(1, 5, 2\), but features has \(2, 5, 3\)",
        ),
        (
            lambda: rate_reduction.rate_reduction_loss(np.ones((1, 5, 3)), np.ones((1, 5, 2)), eps_squared=0),
            "eps_squared=0 is not accepted",
        ),
    ],
)
def test_bad_arguments(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_bad_arguments_of_the_rule() -> None:
    rule = rate_reduction.rule(build)
    inputs = whitening.normalize(jnp.ones((4, 24)))
    state = jax.eval_shape(rule.init, jax.random.key(0), inputs)
    step = partial(jax.eval_shape, rule.update, state, inputs)
    with pytest.raises(ValueError, match=r"neighbours has shape \(3, 24\), but inputs has \(4, 24\)"):
        step(neighbours=inputs[:3])
    with pytest.raises(ValueError, match=r"centroids has shape \(2, 8\), expected .* \[3, 6\]"):
        rate_reduction.begin_clusters(rule.init(jax.random.key(0), inputs), np.ones((2, 8)))
