import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sul_jax import coding_rate, whitening

REDUCTION = jax.jit(coding_rate.coding_rate_reduction, static_argnames="eps_squared")


def unit(key: int, *shape: int) -> jax.Array:
    return whitening.normalize(jax.random.normal(jax.random.key(key), shape))


def soft(key: int, *shape: int) -> jax.Array:
    return jax.nn.softmax(jax.random.normal(jax.random.key(key), shape))


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
    rate = coding_rate.coding_rate(z, eps_squared=eps_squared)
    np.testing.assert_allclose(rate, naive_rate(np.asarray(z), eps_squared), rtol=1e-5)
    of_classes = coding_rate.class_coding_rate(z, memberships, eps_squared=eps_squared)
    expected = naive_class_rate(np.asarray(z), np.asarray(memberships), eps_squared)
    np.testing.assert_allclose(of_classes, expected, rtol=1e-5)
    reduction = coding_rate.coding_rate_reduction(z, memberships, eps_squared=eps_squared)
    np.testing.assert_allclose(reduction, rate - of_classes, rtol=1e-4, atol=1e-4)


def test_golden_values_of_the_published_code() -> None:
    """ryanchankh/mcr2 at 1e9e740, loss.py, CompressibleLoss(eps=0.5), its two `theoretical` terms in float64.

    Its `eps` is ε². Vectors sin(1 + i + j²/2), i < 12, j < 5, normalised; clusters i mod 3.
    """
    i, j = np.meshgrid(np.arange(12), np.arange(5), indexing="ij")
    z = whitening.normalize(jnp.sin(1.0 + i + 0.5 * j**2))
    memberships = jax.nn.one_hot(np.arange(12) % 3, 3)
    np.testing.assert_allclose(coding_rate.coding_rate(z, eps_squared=0.5), 1.79073592, rtol=1e-5)
    of_classes = coding_rate.class_coding_rate(z, memberships, eps_squared=0.5)
    np.testing.assert_allclose(of_classes, 1.30065927, rtol=1e-5)


def test_orthogonal_clusters_add_up() -> None:
    """Two planes in four dimensions: the rate of the whole is that of the parts, with their mass."""
    flat = unit(0, 60, 2)
    zero = jnp.zeros_like(flat)
    z = jnp.concatenate([jnp.concatenate([flat, zero], 1), jnp.concatenate([zero, flat], 1)])
    whole = coding_rate.coding_rate(z, eps_squared=0.1)
    # d = 4 and n = 120 for the whole give the same factor d/n as d = 2 and n = 60 for a part.
    np.testing.assert_allclose(whole, 2 * coding_rate.coding_rate(flat, eps_squared=0.1), rtol=1e-5)
    # Knowing the clusters pays most for orthogonal ones.
    labels = jnp.repeat(jnp.eye(2), 60, axis=0)
    mixed = jnp.tile(jnp.eye(2), (60, 1))
    right = coding_rate.coding_rate_reduction(z, labels, eps_squared=0.1)
    assert right > coding_rate.coding_rate_reduction(z, mixed, eps_squared=0.1) + 0.1


@given(st.sampled_from([(2, 1), (3, 12), (12, 12), (30, 1), (30, 7)]), st.integers(0, 10**6))
def test_invariances(shape: tuple[int, int], seed: int) -> None:
    batch, dimension = shape
    z, memberships = unit(seed, batch, dimension), soft(seed + 1, batch, 3)
    rotation = jnp.linalg.qr(jax.random.normal(jax.random.key(seed + 2), (dimension, dimension)))[0]
    order = jax.random.permutation(jax.random.key(seed), batch)
    value = REDUCTION(z, memberships, eps_squared=0.1)
    assert value > -1e-3
    for other in (
        REDUCTION(z @ rotation, memberships, eps_squared=0.1),
        REDUCTION(z[order], memberships[order], eps_squared=0.1),
        REDUCTION(z, memberships[:, ::-1], eps_squared=0.1),
    ):
        np.testing.assert_allclose(other, value, rtol=1e-3, atol=1e-3)


def test_gradients_are_those_of_finite_differences() -> None:
    views, memberships = unit(0, 2, 9, 4), soft(1, 2, 9, 3)
    with jax.enable_x64(True):
        views, memberships = (jnp.asarray(np.asarray(v), jnp.float64) for v in (views, memberships))

        def loss(features: jax.Array, logits: jax.Array) -> jax.Array:
            return coding_rate.nmce_loss(
                features, jax.nn.softmax(logits), eps_squared=0.1, invariance_weight=3.0
            )

        jax.test_util.check_grads(jax.jit(loss), (views, jnp.log(memberships)), order=2, rtol=1e-4)


@pytest.mark.parametrize("average_views", [True, False])
def test_a_collapsed_batch_is_finite(average_views: bool) -> None:
    tcr = jax.jit(
        jax.value_and_grad(lambda z: coding_rate.tcr_loss(z, eps_squared=0.01, average_views=average_views))
    )
    nmce = jax.jit(jax.value_and_grad(lambda z, m: coding_rate.nmce_loss(z, m, eps_squared=0.01), (0, 1)))
    for point in (jnp.ones(6), jnp.zeros(6), jnp.eye(6)[0]):
        features = jnp.broadcast_to(point, (2, 20, 6))
        memberships = jnp.broadcast_to(jnp.eye(3)[0], (2, 20, 3))
        chex.assert_tree_all_finite((tcr(features), nmce(features, memberships)))
    opposite = jnp.stack([features[0], -features[0]])  # their mean is zero
    chex.assert_tree_all_finite(jax.grad(lambda z: coding_rate.tcr_loss(z, eps_squared=0.01))(opposite))


def test_terms_add_up() -> None:
    views, memberships = unit(0, 3, 30, 5), soft(1, 3, 30, 4)
    mean = whitening.normalize(views.mean(0))
    rate = coding_rate.coding_rate(mean, eps_squared=0.1)
    similarity = coding_rate.view_similarity(views)
    np.testing.assert_allclose(
        coding_rate.tcr_loss(views, eps_squared=0.1, invariance_weight=7.0), -rate - 7 * similarity, rtol=1e-5
    )
    separate = np.mean([coding_rate.coding_rate(v, eps_squared=0.1) for v in views])
    np.testing.assert_allclose(
        coding_rate.tcr_loss(views, eps_squared=0.1, invariance_weight=7.0, average_views=False),
        -separate - 7 * similarity,
        rtol=1e-5,
    )
    compressed = coding_rate.class_coding_rate(mean, memberships.mean(0), eps_squared=0.1)
    np.testing.assert_allclose(
        coding_rate.nmce_loss(
            views, memberships, eps_squared=0.1, invariance_weight=7.0, compression_weight=2.0
        ),
        2 * compressed - rate - 7 * similarity,
        rtol=1e-5,
    )


def test_gumbel_softmax_draws_with_the_probabilities() -> None:
    logits = jnp.log(jnp.array([0.7, 0.2, 0.1]))
    drawn = coding_rate.gumbel_softmax(
        jax.random.key(0), jnp.broadcast_to(logits, (20_000, 3)), temperature=0.1
    )
    np.testing.assert_allclose(drawn.sum(-1), 1, rtol=1e-4)
    share = jnp.mean(jax.nn.one_hot(jnp.argmax(drawn, -1), 3), 0)
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
    tcr = coding_rate.tcr_loss(views, eps_squared=0.1)
    mean = whitening.normalize(views.mean(0))
    rate = coding_rate.coding_rate(mean, eps_squared=0.1)
    np.testing.assert_allclose(tcr, -rate - coding_rate.view_similarity(views), rtol=1e-5)
    compressed = coding_rate.class_coding_rate(mean, memberships.mean(0), eps_squared=0.1)
    nmce = coding_rate.nmce_loss(views, memberships, eps_squared=0.1)
    np.testing.assert_allclose(nmce, tcr + compressed, rtol=1e-5)
