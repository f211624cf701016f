from collections.abc import Iterator
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import compiled
from hypothesis import given
from hypothesis import strategies as st

from sul_jax import coding_rate, whitening

RATE = compiled(coding_rate.coding_rate)
OF_CLASSES = compiled(coding_rate.class_coding_rate)
REDUCTION = compiled(coding_rate.coding_rate_reduction)
TCR = compiled(coding_rate.tcr_loss)
NMCE = compiled(coding_rate.nmce_loss)
LENGTH = compiled(coding_rate.coding_length)
SIMILARITY = jax.jit(coding_rate.view_similarity)


def unit(key: int, *shape: int) -> np.ndarray:
    values = np.random.default_rng(key).standard_normal(shape, np.float32)
    return values / np.linalg.norm(values, axis=-1, keepdims=True)


def soft(key: int, *shape: int) -> np.ndarray:
    weights = np.exp(np.random.default_rng(key).standard_normal(shape, np.float32))
    return weights / weights.sum(-1, keepdims=True)


def mean_of(views: np.ndarray) -> np.ndarray:
    """The views' mean, of unit norm."""
    return np.asarray(whitening.normalize(views.mean(0)))


def naive_rate(z: np.ndarray, eps_squared: float) -> float:
    """Eq. 2 in float64."""
    z = z.astype(np.float64)
    n, d = z.shape
    return 0.5 * np.linalg.slogdet(np.eye(d) + d / (n * eps_squared) * z.T @ z)[1]


def naive_class_rate(z: np.ndarray, memberships: np.ndarray, eps_squared: float) -> float:
    """Eq. 3's second term with the weights of the clusters' masses, class by class, in float64."""
    z, memberships = z.astype(np.float64), memberships.astype(np.float64)
    n, d = z.shape
    rate = 0.0
    for weights in memberships.T:
        mass = weights.sum()
        gram = np.eye(d) + d / (mass * eps_squared) * z.T @ np.diag(weights) @ z
        rate += mass / (2 * n) * np.linalg.slogdet(gram)[1]
    return rate


@pytest.mark.parametrize("shape", [(200, 12), (5, 40), (64, 64)])
@pytest.mark.parametrize("eps_squared", [0.01, 0.2])
def test_equals_numpy_in_float64(shape: tuple[int, int], eps_squared: float) -> None:
    z, memberships = unit(0, *shape), soft(1, shape[0], 4)
    rate = RATE(z, eps_squared=eps_squared)
    np.testing.assert_allclose(rate, naive_rate(z, eps_squared), rtol=1e-5)
    of_classes = OF_CLASSES(z, memberships, eps_squared=eps_squared)
    expected = naive_class_rate(z, memberships, eps_squared)
    np.testing.assert_allclose(of_classes, expected, rtol=1e-5)
    reduction = REDUCTION(z, memberships, eps_squared=eps_squared)
    np.testing.assert_allclose(reduction, rate - of_classes, rtol=1e-4, atol=1e-4)


def test_golden_values_of_the_published_code() -> None:
    """ryanchankh/mcr2 at 1e9e740, loss.py, CompressibleLoss(eps=0.5), its two `theoretical` terms in float64.

    Its `eps` is ε². Vectors sin(1 + i + j²/2), i < 12, j < 5, normalised; clusters i mod 3.
    """
    i, j = np.meshgrid(np.arange(12), np.arange(5), indexing="ij")
    z = np.sin(1.0 + i + 0.5 * j**2)
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    memberships = np.eye(3)[np.arange(12) % 3]
    np.testing.assert_allclose(RATE(z, eps_squared=0.5), 1.79073592, rtol=1e-5)
    of_classes = OF_CLASSES(z, memberships, eps_squared=0.5)
    np.testing.assert_allclose(of_classes, 1.30065927, rtol=1e-5)


def test_orthogonal_clusters_add_up() -> None:
    """Two planes in four dimensions: the rate of the whole is that of the parts, with their mass."""
    flat = unit(0, 60, 2)
    z = np.kron(np.eye(2, dtype=np.float32), flat)
    whole = RATE(z, eps_squared=0.1)
    # d = 4 and n = 120 for the whole give the same factor d/n as d = 2 and n = 60 for a part.
    np.testing.assert_allclose(whole, 2 * np.asarray(RATE(flat, eps_squared=0.1)), rtol=1e-5)
    # Knowing the clusters pays most for orthogonal ones.
    labels = np.repeat(np.eye(2), 60, axis=0)
    mixed = np.tile(np.eye(2), (60, 1))
    right = float(REDUCTION(z, labels, eps_squared=0.1))
    assert right > REDUCTION(z, mixed, eps_squared=0.1) + 0.1


@given(st.sampled_from([(2, 1), (3, 12), (12, 12), (30, 1), (30, 7)]), st.integers(0, 10**6))
def test_invariances(shape: tuple[int, int], seed: int) -> None:
    batch, dimension = shape
    z, memberships = unit(seed, batch, dimension), soft(seed + 1, batch, 3)
    generator = np.random.default_rng(seed + 2)
    rotation = np.linalg.qr(generator.standard_normal((dimension, dimension), np.float32))[0]
    order = generator.permutation(batch)
    value = np.asarray(REDUCTION(z, memberships, eps_squared=0.1))
    assert value > -1e-3
    for other in (
        REDUCTION(z @ rotation, memberships, eps_squared=0.1),
        REDUCTION(z[order], memberships[order], eps_squared=0.1),
        REDUCTION(z, memberships[:, ::-1], eps_squared=0.1),
    ):
        np.testing.assert_allclose(other, value, rtol=1e-3, atol=1e-3)


@pytest.fixture
def double_precision() -> Iterator[None]:
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


def test_gradients_are_those_of_finite_differences(double_precision: None) -> None:
    views, memberships = (part.astype(np.float64) for part in (unit(0, 2, 9, 4), soft(1, 2, 9, 3)))

    def loss(features: jax.Array, logits: jax.Array) -> jax.Array:
        return coding_rate.nmce_loss(features, jax.nn.softmax(logits), eps_squared=0.1, invariance_weight=3.0)

    jax.test_util.check_grads(jax.jit(loss), (views, np.log(memberships)), order=2, rtol=1e-4)


@pytest.mark.parametrize("sharded", [False, True])
def test_many_clusters_some_at_a_time(sharded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven clusters, three at a time: values and gradients are those of all at once."""
    features, memberships = jnp.asarray(unit(0, 16, 5)), jnp.asarray(soft(1, 16, 7))

    def both(most: int) -> Any:
        monkeypatch.setattr(coding_rate, "_MAX_PRODUCTS", most)

        def loss(features: jax.Array, memberships: jax.Array) -> jax.Array:
            axis_name = "batch" if sharded else None
            return coding_rate.class_coding_rate(features, memberships, eps_squared=0.1, axis_name=axis_name)

        step = jax.value_and_grad(loss, (0, 1))
        if not sharded:
            return jax.jit(step)(features, memberships)
        parts = [values.reshape(4, 4, -1) for values in (features, memberships)]
        return jax.jit(jax.vmap(step, axis_name="batch"))(*parts)

    chunk = (4 if sharded else 16) * 5
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), both(3 * chunk), both(2**25))


@pytest.mark.parametrize("average_views", [True, False])
def test_a_collapsed_batch_is_finite(average_views: bool) -> None:
    tcr = jax.jit(
        jax.value_and_grad(lambda z: coding_rate.tcr_loss(z, eps_squared=0.01, average_views=average_views))
    )
    nmce = jax.jit(jax.value_and_grad(lambda z, m: coding_rate.nmce_loss(z, m, eps_squared=0.01), (0, 1)))
    for point in np.array([[1] * 6, [0] * 6, [1, 0, 0, 0, 0, 0]], np.float32):
        features = np.broadcast_to(point, (2, 20, 6))
        memberships = np.broadcast_to(np.eye(3, dtype=np.float32)[0], (2, 20, 3))
        chex.assert_tree_all_finite((tcr(features), nmce(features, memberships)))
    opposite = np.stack([features[0], -features[0]])  # their mean is zero
    gradient = jax.jit(jax.grad(lambda z: coding_rate.tcr_loss(z, eps_squared=0.01)))
    chex.assert_tree_all_finite(gradient(opposite))


def test_terms_add_up() -> None:
    views, memberships = unit(0, 3, 30, 5), soft(1, 3, 30, 4)
    mean = mean_of(views)
    rate = np.asarray(RATE(mean, eps_squared=0.1))
    similarity = np.mean([np.vecdot(views[0], other) for other in views[1:]])
    np.testing.assert_allclose(SIMILARITY(views), similarity, rtol=1e-5)
    np.testing.assert_allclose(
        TCR(views, eps_squared=0.1, invariance_weight=7.0), -rate - 7 * similarity, rtol=1e-5
    )
    separate = np.mean([RATE(v, eps_squared=0.1) for v in views])
    np.testing.assert_allclose(
        TCR(views, eps_squared=0.1, invariance_weight=7.0, average_views=False),
        -separate - 7 * similarity,
        rtol=1e-5,
    )
    compressed = np.asarray(OF_CLASSES(mean, memberships.mean(0), eps_squared=0.1))
    np.testing.assert_allclose(
        NMCE(views, memberships, eps_squared=0.1, invariance_weight=7.0, compression_weight=2.0),
        2 * compressed - rate - 7 * similarity,
        rtol=1e-5,
    )


def test_gumbel_softmax_draws_with_the_probabilities() -> None:
    logits = np.broadcast_to(np.log([0.7, 0.2, 0.1]).astype(np.float32), (20_000, 3))
    drawn = np.asarray(compiled(coding_rate.gumbel_softmax)(jax.random.key(0), logits, temperature=0.1))
    np.testing.assert_allclose(drawn.sum(-1), 1, rtol=1e-4)
    share = np.bincount(np.argmax(drawn, -1)) / len(drawn)
    np.testing.assert_allclose(share, [0.7, 0.2, 0.1], atol=0.015)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda z, m: coding_rate.coding_rate(z[0], eps_squared=0.0), "eps_squared=0.0 is not accepted"),
        (lambda z, m: coding_rate.coding_rate(z, eps_squared=0.1), "features must have shape"),
        (lambda z, m: coding_rate.tcr_loss(z[:1], eps_squared=0.1), "features has 1 view"),
        (lambda z, m: coding_rate.nmce_loss(z, m[:1], eps_squared=0.1), "memberships has 1 view"),
        (lambda z, m: coding_rate.nmce_loss(z, 2 * m, eps_squared=0.1), "sums between 2 and 2"),
        (lambda z, m: coding_rate.nmce_loss(z, m[:, :3], eps_squared=0.1), "memberships holds 3 rows"),
        (
            lambda z, m: coding_rate.gumbel_softmax(jax.random.key(0), m, temperature=-1.0),
            "temperature=-1.0 is not accepted",
        ),
    ],
)
def test_bad_input(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(unit(0, 2, 8, 4), soft(1, 2, 8, 3))


def test_all_terms_count_once_by_default() -> None:
    views, memberships = unit(0, 2, 30, 5), soft(1, 2, 30, 4)
    tcr = np.asarray(TCR(views, eps_squared=0.1))
    mean = mean_of(views)
    rate = np.asarray(RATE(mean, eps_squared=0.1))
    np.testing.assert_allclose(tcr, -rate - np.asarray(SIMILARITY(views)), rtol=1e-5, atol=1e-5)
    compressed = OF_CLASSES(mean, memberships.mean(0), eps_squared=0.1)
    nmce = NMCE(views, memberships, eps_squared=0.1)
    np.testing.assert_allclose(nmce, tcr + np.asarray(compressed), rtol=1e-5, atol=1e-5)


def naive_length(z: np.ndarray, labels: np.ndarray, eps_squared: float) -> float:
    """Cluster by cluster in float64."""
    z = z.astype(np.float64)
    n, d = z.shape
    length = 0.0
    for label in np.unique(labels):
        own = z[labels == label]
        gram = np.eye(d) + d / (len(own) * eps_squared) * own.T @ own
        length += (len(own) + d) / 2 * np.linalg.slogdet(gram)[1] - len(own) * np.log(len(own) / n)
    return length


def test_length_by_hand() -> None:
    """Two pairs of equal vectors in d = 2: each (2 + 2)/2 · log(1 + 2/ε²), and 2 log 2 to say which."""
    z, labels = np.eye(2, dtype=np.float32)[[0, 0, 1, 1]], np.array([1, 1, 0, 0])
    found = LENGTH(z, labels, num_clusters=2, eps_squared=0.5)
    np.testing.assert_allclose(found, 2 * (2 * np.log(5) + 2 * np.log(2)), rtol=1e-5)


def test_length_equals_numpy_and_empty_clusters_cost_nothing() -> None:
    z, labels = unit(0, 40, 6), np.random.default_rng(1).integers(0, 4, 40)
    expected = naive_length(z, labels, 0.1)
    np.testing.assert_allclose(LENGTH(z, labels, num_clusters=4, eps_squared=0.1), expected, rtol=1e-5)
    other = np.array([7, 2, 0, 5])[labels]
    np.testing.assert_allclose(LENGTH(z, other, num_clusters=9, eps_squared=0.1), expected, rtol=1e-5)
    split = jax.vmap(
        lambda z, labels: coding_rate.coding_length(
            z, labels, num_clusters=4, eps_squared=0.1, axis_name="batch"
        ),
        axis_name="batch",
    )
    found = jax.jit(split)(z.reshape(8, 5, 6), labels.reshape(8, 5))
    np.testing.assert_allclose(found, np.full(8, expected), rtol=1e-5)


def test_length_is_least_for_the_planted_number() -> None:
    """Planted subspaces, merged into one, as they are, and each cut into halves."""
    generator = np.random.default_rng(0)
    labels = np.repeat(np.arange(4), 60)
    bases = generator.standard_normal((4, 2, 16))
    z = np.einsum("nr,nrd->nd", generator.standard_normal((240, 2)), bases[labels])
    z = (z / np.linalg.norm(z, axis=1, keepdims=True)).astype(np.float32)
    halves = 2 * labels + np.arange(240) % 2
    cuts = (labels // 2, labels, halves)
    lengths = [LENGTH(z, cut, num_clusters=8, eps_squared=0.1) for cut in cuts]
    assert np.argmin(lengths) == 1
    with pytest.raises(ValueError, match="labels go from 0 to 3; 0 to 2 are accepted"):
        coding_rate.coding_length(z, labels, num_clusters=3, eps_squared=0.1)
