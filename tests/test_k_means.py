from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits, make_blobs

from sul_jax import k_means


def blobs() -> tuple[jax.Array, np.ndarray]:
    x, y = make_blobs(400, 5, centers=6, cluster_std=0.4, random_state=0)
    return jnp.asarray(x, jnp.float32), y


def test_four_points_by_hand() -> None:
    x = jnp.array([[0.0, 0], [0, 2], [10, 0], [10, 2]])
    result = k_means.fit(jax.random.key(0), x, num_clusters=2)
    centroids = np.asarray(result.centroids)
    np.testing.assert_allclose(centroids[centroids[:, 0].argsort()], [[0, 1], [10, 1]], atol=1e-6)
    assert result.inertia == 4
    assert result.labels[0] == result.labels[1] != result.labels[2] == result.labels[3]


@pytest.mark.parametrize("init", ["k-means++", "random"])
def test_inertia_within_a_percent_of_scikit_learn(init: str) -> None:
    x = load_digits().data.astype(np.float32)
    ours = k_means.fit(jax.random.key(0), jnp.asarray(x), num_clusters=10, init=init)
    theirs = KMeans(10, n_init=10, random_state=0).fit(x)
    assert float(ours.inertia) <= 1.01 * theirs.inertia_
    exact = np.sum((x - np.asarray(ours.centroids)[np.asarray(ours.labels)]) ** 2)
    np.testing.assert_allclose(ours.inertia, exact, rtol=1e-4)
    np.testing.assert_array_equal(k_means.assign(ours.centroids, jnp.asarray(x)), ours.labels)


def test_given_centroids_are_where_it_starts() -> None:
    x, _ = blobs()
    first = np.asarray(x[:7])
    for iterations in (1, 20):
        ours = k_means.fit(jax.random.key(0), x, num_clusters=7, init=first, max_iterations=iterations)
        theirs = KMeans(7, init=first, n_init=1, max_iter=iterations).fit(np.asarray(x))
        np.testing.assert_allclose(ours.inertia, theirs.inertia_, rtol=1e-4)
    with pytest.raises(ValueError, match=r"init has shape \(7, 5\), but 6 clusters of 5 features"):
        k_means.fit(jax.random.key(0), x, num_clusters=6, init=first)


def test_many_clusters_and_vectors_take_another_way_to_the_same_result(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = jax.random.normal(jax.random.key(0), (203, 5))
    expected = k_means.fit(jax.random.key(1), x, num_clusters=9, num_init=3)
    monkeypatch.setattr(k_means, "_MANY_CLUSTERS", 2)
    monkeypatch.setattr(k_means, "_MAX_SCORES", 27 * 20)
    got = k_means.fit(jax.random.key(1), x, num_clusters=9, num_init=3)
    np.testing.assert_array_equal(got.labels, expected.labels)
    np.testing.assert_allclose(got.centroids, expected.centroids, atol=1e-5)


def test_fixed_point_of_lloyd() -> None:
    x, _ = blobs()
    result = k_means.fit(jax.random.key(1), x, num_clusters=6, tolerance=0.0)
    means = [np.asarray(x)[np.asarray(result.labels) == k].mean(0) for k in range(6)]
    np.testing.assert_allclose(result.centroids, means, atol=1e-4)


def test_far_from_the_origin() -> None:
    x, _y = blobs()
    near = k_means.fit(jax.random.key(0), x, num_clusters=6)
    far = k_means.fit(jax.random.key(0), x + 3000, num_clusters=6)
    np.testing.assert_allclose(near.inertia, far.inertia, rtol=1e-2)


@pytest.mark.parametrize("policy", ["relocate", "split"])
def test_duplicates_leave_no_cluster_unusable(policy: str) -> None:
    x = jnp.repeat(jnp.array([[0.0], [1.0], [5.0]]), 10, axis=0)
    result = k_means.fit(jax.random.key(0), x, num_clusters=5, num_init=2, empty_clusters=policy)
    assert np.all(np.isfinite(result.centroids))
    np.testing.assert_allclose(result.inertia, 0, atol=1e-3)


@pytest.mark.parametrize("policy", ["relocate", "split"])
def test_empty_clusters_are_refilled(policy: str) -> None:
    """Random starts on heavy duplicates make empty clusters; afterwards all values have their own."""
    x = jnp.concatenate([jnp.zeros((200, 2)), jnp.eye(2) * 10, -jnp.eye(2) * 10])
    x = x + 0.01 * jax.random.normal(jax.random.key(9), x.shape)
    result = k_means.fit(
        jax.random.key(0), x, num_clusters=5, num_init=1, init="random", empty_clusters=policy
    )
    assert len(np.unique(result.labels)) == 5


def test_same_key_same_result_and_seeds_together() -> None:
    x, _ = blobs()
    fit = partial(k_means.fit, inputs=x, num_clusters=6, num_init=2)
    one, again = fit(jax.random.key(3)), jax.jit(fit)(jax.random.key(3))
    np.testing.assert_allclose(one.inertia, again.inertia, rtol=1e-5)
    both = jax.vmap(fit)(jax.random.split(jax.random.key(0), 2))
    assert both.labels.shape == (2, 400)


@pytest.mark.parametrize("init", ["k-means++", "random"])
@pytest.mark.parametrize("policy", ["relocate", "split"])
def test_sharded_is_the_whole_batch(init: str, policy: str) -> None:
    x, _ = blobs()
    options = {"num_clusters": 6, "num_init": 3, "init": init, "empty_clusters": policy}
    expected = k_means.fit(jax.random.key(5), x, **options)
    mesh = Mesh(np.array(jax.devices()), ("batch",))
    sharded = jax.shard_map(
        lambda key, x: k_means.fit(key, x, axis_name="batch", **options),
        mesh=mesh,
        in_specs=(P(), P("batch")),
        out_specs=k_means.KMeansResult(P(), P("batch"), P(), P()),
    )
    got = jax.jit(sharded)(jax.random.key(5), x)
    np.testing.assert_allclose(got.centroids, expected.centroids, atol=1e-3)
    np.testing.assert_array_equal(got.labels, expected.labels)
    np.testing.assert_allclose(got.inertia, expected.inertia, rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_clusters": 401}, "num_clusters=401 .* between 1 and 400: inputs holds 400 vectors"),
        ({"num_init": 0}, "num_init=0"),
        ({"max_iterations": 0}, "max_iterations=0"),
        ({"init": "best"}, "init='best' is not accepted"),
        ({"empty_clusters": "keep"}, "empty_clusters='keep' is not accepted"),
    ],
)
def test_bad_input(change: dict, message: str) -> None:
    x, _ = blobs()
    with pytest.raises(ValueError, match=message):
        k_means.fit(jax.random.key(0), x, **({"num_clusters": 3} | change))


def test_values_that_are_not_finite() -> None:
    with pytest.raises(ValueError, match="NaN or infinite"):
        k_means.fit(jax.random.key(0), jnp.array([[1.0], [jnp.nan]]), num_clusters=1)


def test_candidates_drawn_ahead_are_as_good(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 300 clusters candidates are drawn three steps at a time."""
    x = jax.random.normal(jax.random.key(0), (2000, 8))

    def inertias(share: float) -> np.ndarray:
        monkeypatch.setattr(k_means, "_AHEAD", share)
        start = jax.jit(
            jax.vmap(lambda key: k_means.fit(key, x, num_clusters=300, num_init=1, max_iterations=1).inertia)
        )
        return np.asarray(start(jax.random.split(jax.random.key(1), 8)))

    ahead, alone = inertias(0.01), inertias(0.0)
    assert not np.array_equal(ahead, alone)
    np.testing.assert_allclose(ahead.mean(), alone.mean(), rtol=0.01)
    expected = [KMeans(300, n_init=1, max_iter=1, random_state=i).fit(x).inertia_ for i in range(4)]
    np.testing.assert_allclose(ahead.mean(), np.mean(expected), rtol=0.02)
