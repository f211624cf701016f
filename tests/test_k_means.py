from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import compiled
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits, make_blobs
from sklearn.metrics import adjusted_rand_score

from sul_jax import k_means, whitening

FIT, ASSIGN = compiled(k_means.fit), compiled(k_means.assign)


def blobs() -> tuple[np.ndarray, np.ndarray]:
    x, y = make_blobs(400, 5, centers=6, cluster_std=0.4, random_state=0)
    return x.astype(np.float32), y


def test_four_points_by_hand() -> None:
    x = jnp.array([[0.0, 0], [0, 2], [10, 0], [10, 2]])
    result = FIT(jax.random.key(0), x, num_clusters=2)
    centroids = np.asarray(result.centroids)
    np.testing.assert_allclose(centroids[centroids[:, 0].argsort()], [[0, 1], [10, 1]], atol=1e-6)
    assert result.inertia == 4
    labels = result.labels.tolist()
    assert labels[0] == labels[1] != labels[2] == labels[3]


@pytest.mark.parametrize("init", ["k-means++", "random"])
def test_inertia_within_a_percent_of_scikit_learn(init: str) -> None:
    x = load_digits().data.astype(np.float32)
    ours = FIT(jax.random.key(0), x, num_clusters=10, init=init)
    theirs = KMeans(10, n_init=10, random_state=0).fit(x)
    assert float(ours.inertia) <= 1.01 * theirs.inertia_
    exact = np.sum((x - np.asarray(ours.centroids)[np.asarray(ours.labels)]) ** 2)
    np.testing.assert_allclose(ours.inertia, exact, rtol=1e-4)
    np.testing.assert_array_equal(ASSIGN(ours.centroids, x), ours.labels)


def test_given_centroids_are_where_it_starts() -> None:
    x, _ = blobs()
    first = x[:7]
    for iterations in (1, 20):
        ours = FIT(jax.random.key(0), x, num_clusters=7, init=first, max_iterations=iterations)
        theirs = KMeans(7, init=first, n_init=1, max_iter=iterations).fit(x)
        np.testing.assert_allclose(ours.inertia, theirs.inertia_, rtol=1e-4)
    with pytest.raises(ValueError, match=r"init has shape \(7, 5\), but 6 clusters of 5 features"):
        k_means.fit(jax.random.key(0), x, num_clusters=6, init=first)


def test_many_clusters_and_vectors_take_another_way_to_the_same_result(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = np.random.default_rng(0).standard_normal((400, 5), np.float32)
    expected = k_means.fit(jax.random.key(1), x, num_clusters=6)
    monkeypatch.setattr(k_means, "_MANY_CLUSTERS", 2)
    monkeypatch.setattr(k_means, "_MAX_SCORES", 60 * 21)
    got = k_means.fit(jax.random.key(1), x, num_clusters=6)
    np.testing.assert_array_equal(got.labels, expected.labels)
    np.testing.assert_allclose(got.centroids, expected.centroids, atol=1e-5)


def test_fixed_point_of_lloyd() -> None:
    x, _ = blobs()
    result = k_means.fit(jax.random.key(1), x, num_clusters=6, tolerance=0.0)
    means = [x[np.asarray(result.labels) == k].mean(0) for k in range(6)]
    np.testing.assert_allclose(result.centroids, means, atol=1e-4)


def test_far_from_the_origin() -> None:
    x, _y = blobs()
    near = k_means.fit(jax.random.key(0), x, num_clusters=6)
    far = k_means.fit(jax.random.key(0), x + 3000, num_clusters=6)
    np.testing.assert_allclose(near.inertia, far.inertia, rtol=1e-2)


def far_blobs(size: float, offset: float) -> np.ndarray:
    """In float64."""
    x, _ = make_blobs(400, 5, centers=6, cluster_std=0.4, random_state=0)
    return x * size + offset


@pytest.mark.parametrize(("size", "offset"), [(1e30, 0.0), (1e-30, 0.0), (1.0, 1e8), (1.0, -1e12)])
@pytest.mark.parametrize("kind", [np.asarray, np.ndarray.tolist])
def test_float64_of_the_host_equals_scikit_learn(size: float, offset: float, kind: Any) -> None:
    x = far_blobs(size, offset)
    theirs = KMeans(6, n_init=10, random_state=0).fit(x / size)
    with pytest.warns(
        UserWarning, match="inertia is too large for" if offset == 0 else "centroids are rounded"
    ):
        ours = k_means.fit(jax.random.key(0), kind(x), num_clusters=6)
    assert adjusted_rand_score(ours.labels, theirs.labels_) == 1
    if offset:
        np.testing.assert_allclose(ours.inertia, theirs.inertia_, rtol=1e-5)
        np.testing.assert_allclose(np.sort(ours.centroids, 0), np.sort(theirs.cluster_centers_, 0), rtol=1e-6)
    else:
        assert ours.inertia == (np.inf if size > 1 else 0)
        np.testing.assert_allclose(
            np.sort(ours.centroids, 0) / size, np.sort(theirs.cluster_centers_, 0), rtol=1e-4
        )


@pytest.mark.parametrize("size", [1e30, 1e-30, 1e38])
def test_any_size_that_float32_holds_in_compiled_programs(size: float) -> None:
    x = far_blobs(1, 0) / 20
    near = FIT(jax.random.key(0), np.float32(x), num_clusters=6)
    far = FIT(jax.random.key(0), np.float32(x * size), num_clusters=6)
    assert adjusted_rand_score(near.labels, far.labels) == 1
    np.testing.assert_allclose(np.asarray(far.centroids) / size, near.centroids, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(ASSIGN(far.centroids, np.float32(x * size)), far.labels)
    given = FIT(jax.random.key(0), np.float32(x), num_clusters=6, init=near.centroids)
    np.testing.assert_array_equal(given.labels, near.labels)


def test_scaling_by_a_power_of_two_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    x, _ = blobs()
    plain = k_means.fit(jax.random.key(0), x, num_clusters=6)
    monkeypatch.setattr(k_means, "_COMFORT", (0, 0))
    scaled = k_means.fit(jax.random.key(0), x, num_clusters=6)
    for one, other in zip(plain, scaled, strict=True):
        np.testing.assert_array_equal(one, other)


def test_beyond_float32() -> None:
    for x in (far_blobs(1e40, 0), far_blobs(1e-45, 0)):
        with (
            pytest.raises(ValueError, match=r"inputs go up to .* outside float32: scale them$"),
            np.errstate(over="ignore"),
        ):
            k_means.fit(jax.random.key(0), x, num_clusters=6)
    same = k_means.fit(jax.random.key(0), np.full((400, 5), 0.1), num_clusters=6)  # nothing to warn of
    np.testing.assert_allclose(same.centroids, 0.1, rtol=1e-6)
    x = far_blobs(1, 1e8)
    with pytest.warns(UserWarning, match="centroids are rounded"):
        given = k_means.fit(jax.random.key(0), x, num_clusters=6, init=x[:6], max_iterations=1)
    theirs = KMeans(6, init=x[:6], n_init=1, max_iter=1).fit(x)
    assert adjusted_rand_score(given.labels, theirs.labels_) == 1
    np.testing.assert_allclose(given.inertia, theirs.inertia_, rtol=1e-4)


@pytest.mark.parametrize("policy", ["relocate", "split"])
def test_duplicates_leave_no_cluster_unusable(policy: str) -> None:
    x = np.repeat(np.array([[0.0], [1.0], [5.0]], np.float32), 10, axis=0)
    result = FIT(jax.random.key(0), x, num_clusters=5, num_init=2, empty_clusters=policy)
    assert np.all(np.isfinite(result.centroids))
    np.testing.assert_allclose(result.inertia, 0, atol=1e-3)


@pytest.mark.parametrize("policy", ["relocate", "split"])
def test_empty_clusters_are_refilled(policy: str) -> None:
    """Random starts on heavy duplicates make empty clusters; afterwards all values have their own."""
    x = np.concatenate([np.zeros((200, 2)), np.eye(2) * 10, -np.eye(2) * 10])
    x = np.float32(x + 0.01 * np.random.default_rng(9).standard_normal(x.shape))
    result = FIT(jax.random.key(0), x, num_clusters=5, num_init=1, init="random", empty_clusters=policy)
    assert len(np.unique(result.labels)) == 5


def test_same_key_same_result_and_seeds_together() -> None:
    x, _ = blobs()
    one = k_means.fit(jax.random.key(3), x, num_clusters=6)
    again = FIT(jax.random.key(3), x, num_clusters=6)
    np.testing.assert_allclose(one.inertia, again.inertia, rtol=1e-5)
    fit = partial(k_means.fit, inputs=x, num_clusters=6, num_init=2)
    both = jax.jit(jax.vmap(fit))(jax.random.split(jax.random.key(0), 2))
    assert both.labels.shape == (2, 400)


@pytest.mark.parametrize("init", ["k-means++", "random"])
@pytest.mark.parametrize("policy", ["relocate", "split"])
def test_sharded_is_the_whole_batch(init: str, policy: str) -> None:
    x, _ = blobs()
    options = {"num_clusters": 6, "init": init, "empty_clusters": policy}
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


@pytest.mark.slow
def test_candidates_drawn_ahead_are_as_good(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 300 clusters candidates are drawn three steps at a time."""
    x = np.random.default_rng(0).standard_normal((2000, 8), np.float32)

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


def test_relocation_by_hand() -> None:
    """The farthest vectors leave their cluster, and take their part of the sum and of the number along."""
    x, first = jnp.array([[0.0], [1.0], [2.0], [10.0], [30.0]]), np.array([[3.0], [1000.0], [2000.0]])
    result = FIT(jax.random.key(0), x, num_clusters=3, init=first, max_iterations=1)
    np.testing.assert_allclose(result.centroids, [[1], [30], [10]], atol=1e-5)


def test_split_by_hand() -> None:
    """The one cluster of two vectors, around (-3, -3), is cut: one coordinate parts up, the other down."""
    x = np.array([[-4.0, -4.0], [-2.0, -2.0], [6.0, 6.0]])  # their mean is zero
    first = np.array([[1000.0, 1000.0], [-3.0, -3.0], [6.0, 6.0]])
    options = {"num_clusters": 3, "init": first, "max_iterations": 1, "empty_clusters": "split"}
    result = FIT(jax.random.key(0), x, **options)
    up, down = -3 * (1 + 1 / 1024), -3 * (1 - 1 / 1024)
    np.testing.assert_allclose(result.centroids, [[up, down], [down, up], [6, 6]], rtol=1e-6)


@pytest.mark.parametrize(("tolerance", "iterations"), [(2.5, 1), (2.4, 2)])
def test_tolerance_is_a_share_of_the_variance(tolerance: float, iterations: int) -> None:
    """The second centroid goes from 1 to 20/3: a squared shift of 2.47 times the variance, 13."""
    x, first = jnp.array([[0.0], [4.0], [6.0], [10.0]]), np.array([[0.0], [1.0]])
    result = FIT(jax.random.key(0), x, num_clusters=2, init=first, tolerance=tolerance)
    assert result.num_iterations == iterations


@pytest.mark.parametrize("policy", ["relocate", "split"])
@pytest.mark.parametrize("first", ["k-means++", "given"])
def test_weights_are_repetitions(first: str, policy: str) -> None:
    x, _ = blobs()
    rng = np.random.default_rng(0)
    weights = rng.integers(0, 4, len(x))
    repeated = np.repeat(x, weights, axis=0)
    start = {"init": x[:6]} if first == "given" else {}
    ours = FIT(
        jax.random.key(0), x, num_clusters=6, weights=np.float32(weights), empty_clusters=policy, **start
    )
    theirs = FIT(jax.random.key(0), repeated, num_clusters=6, empty_clusters=policy, **start)
    np.testing.assert_allclose(ours.inertia, theirs.inertia, rtol=1e-4)
    np.testing.assert_array_equal(np.repeat(ours.labels, weights), theirs.labels)
    light = FIT(
        jax.random.key(0),
        x,
        num_clusters=6,
        weights=1e-3 * np.float32(weights),
        empty_clusters=policy,
        **start,
    )
    np.testing.assert_array_equal(light.labels, ours.labels)
    np.testing.assert_allclose(light.inertia, 1e-3 * ours.inertia, rtol=1e-4)
    oracle = KMeans(6, init=x[:6], n_init=1, tol=0).fit(x, sample_weight=weights)
    if first == "given":
        np.testing.assert_allclose(ours.inertia, oracle.inertia_, rtol=1e-4)


def test_a_vector_without_weight_moves_nothing() -> None:
    """Neither as a start, nor in a mean, nor by relocation."""
    x, _ = blobs()
    far = np.concatenate([x, np.full((5, 5), 1e3, np.float32)])
    weights = np.float32([1] * 400 + [0] * 5)
    for init in ("k-means++", "random"):
        result = FIT(jax.random.key(0), far, num_clusters=6, weights=weights, init=init)
        assert np.abs(result.centroids).max() < 100
    # Of two empty clusters each takes the farthest vector that counts, with its weight.
    x, first = jnp.array([[0.0], [1.0], [4.0], [90.0]]), np.array([[0.0], [1000.0]])
    result = FIT(
        jax.random.key(0), x, num_clusters=2, init=first, max_iterations=1, weights=jnp.array([1.0, 3, 2, 0])
    )
    np.testing.assert_allclose(result.centroids, [[0.75], [4]], atol=1e-5)


def test_cosine_is_k_means_on_the_sphere() -> None:
    rng = np.random.default_rng(0)
    means = np.linalg.qr(rng.standard_normal((16, 5)))[0].T
    kinds = rng.integers(0, 5, 300)
    x = np.float32(means[kinds] + 0.1 * rng.standard_normal((300, 16)))
    lengths = np.float32(np.exp(2 * rng.standard_normal((300, 1))))
    result = FIT(jax.random.key(0), x * lengths, num_clusters=5, metric="cosine")
    assert adjusted_rand_score(result.labels, kinds) == 1
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    means = np.stack([unit[np.asarray(result.labels) == k].sum(0) for k in range(5)])
    np.testing.assert_allclose(
        result.centroids, means / np.linalg.norm(means, axis=1, keepdims=True), atol=1e-5
    )
    own = np.sum(unit * np.asarray(result.centroids)[np.asarray(result.labels)], axis=1)
    np.testing.assert_allclose(result.inertia, np.sum(2 - 2 * own), rtol=1e-4)
    np.testing.assert_array_equal(ASSIGN(result.centroids, x * lengths), result.labels)
    x[[7, 9]] = 0
    with pytest.raises(ValueError, match="inputs: 2 of 300 vectors have norm 0, the first one in row 7"):
        k_means.fit(jax.random.key(0), x, num_clusters=5, metric="cosine")


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("offset", [0.0, 300.0])
def test_steps_from_chunks_end_where_fit_does(metric: k_means.Metric, offset: float) -> None:
    x, _ = blobs()
    x = x + np.float32(offset)
    weights = np.random.default_rng(0).random(len(x), np.float32)
    options = {"metric": metric, "weights": weights}
    first = x[[0, 50, 100, 150, 200, 250]]
    expected = FIT(jax.random.key(0), x, num_clusters=6, init=first, tolerance=0.0, **options)
    state = k_means.KMeansState(jnp.asarray(first), jnp.zeros(6))
    if metric == "cosine":
        state = state._replace(centroids=whitening.normalize(state.centroids))
    sums, apply = compiled(k_means.statistics), compiled(k_means.apply)
    for _ in range(expected.num_iterations):
        parts = [
            sums(state, x[i : i + 100], metric=metric, weights=weights[i : i + 100])
            for i in range(0, 400, 100)
        ]
        total = jax.tree.map(lambda *p: np.sum(np.float64(p), axis=0), *parts)
        state, info = apply(state, jax.tree.map(np.float32, total), metric=metric)
    np.testing.assert_allclose(state.centroids, expected.centroids, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(info.inertia, expected.inertia, rtol=1e-3)
    np.testing.assert_allclose(np.sum(info.counts), weights.sum(), rtol=1e-5)


def test_memory_makes_the_mean_of_all_vectors_won() -> None:
    state = k_means.KMeansState(jnp.array([[0.0], [10.0], [50.0]]), jnp.zeros(3))
    seen = [np.array([[1.0], [3.0], [11.0]], np.float32), np.array([[5.0], [12.0]], np.float32)]
    for batch in seen:
        state, _ = k_means.update(state, batch, memory=1.0)
    np.testing.assert_allclose(state.centroids, [[3], [11.5], [50]], rtol=1e-6)
    np.testing.assert_array_equal(state.counts, [3, 2, 0])


def test_a_centroid_of_opposite_directions_stays() -> None:
    state = k_means.KMeansState(jnp.array([[1.0, 0.0]]), jnp.zeros(1))
    state, _ = k_means.update(state, jnp.array([[0.0, 2.0], [0.0, -3.0]]), metric="cosine")
    np.testing.assert_array_equal(state.centroids, [[1, 0]])


def test_init_and_distances() -> None:
    x, _ = blobs()
    state = k_means.init(jax.random.key(0), x + 1000, num_clusters=6)
    gaps = np.abs(np.asarray(state.centroids)[:, None] - (x + 1000)[None]).max(-1).min(1)
    np.testing.assert_allclose(gaps, 0, atol=2e-3)  # vectors of the data
    exact = np.linalg.norm((x + 1000)[:, None] - np.float64(state.centroids), axis=2)
    np.testing.assert_allclose(k_means.encode(state, x + 1000), exact, atol=2e-2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metric": "manhattan"}, "metric='manhattan' is not accepted"),
        ({"weights": np.ones(3)}, r"weights must have shape \[400\], one for each vector, got \[3\]"),
        ({"weights": -np.ones(400)}, "^weights between -1 and -1 is not accepted: it must be at least 0$"),
        ({"weights": np.zeros(400)}, "weights: all weights are zero"),
    ],
)
def test_bad_weights_and_metrics(change: dict, message: str) -> None:
    x, _ = blobs()
    with pytest.raises(ValueError, match=message):
        k_means.fit(jax.random.key(0), x, **({"num_clusters": 3} | change))
