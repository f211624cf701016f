from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import compiled
from hypothesis import given, settings
from hypothesis import strategies as st

from sul_jax import k_means, k_subspaces, metrics
from sul_jax.k_subspaces import KSubspacesState

INIT, FIT = compiled(k_subspaces.init), compiled(k_subspaces.fit)
UPDATE, ASSIGN, ENCODE = map(jax.jit, (k_subspaces.update, k_subspaces.assign, k_subspaces.encode))


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def orthonormal(bases: jax.Array) -> None:
    gram = np.einsum("krd,ksd->krs", bases, bases)
    np.testing.assert_allclose(gram, np.broadcast_to(np.eye(gram.shape[1]), gram.shape), atol=1e-5)


def naive_update(bases: np.ndarray, inputs: np.ndarray) -> tuple[np.ndarray, float]:
    """Algorithm 1, one vector at a time, in float64. Returns the projectors and the energy."""
    residuals = np.array([[np.sum((x - v.T @ v @ x) ** 2) for v in bases] for x in inputs])
    owner = residuals.argmin(1)
    projectors = []
    for k, v in enumerate(bases):
        x = inputs[owner == k]
        u, _, _ = np.linalg.svd(x.T @ x @ v.T, full_matrices=False)
        projectors.append(u @ u.T)
    return np.array(projectors), residuals.min(1).mean()


@pytest.mark.parametrize(("num_subspaces", "rank"), [(4, 2), (20, 7)])  # dense, gathered
def test_equals_naive_loop(num_subspaces: int, rank: int) -> None:
    inputs = normal(0, 1000, 10)
    state = INIT(jax.random.key(1), inputs, num_subspaces=num_subspaces, rank=rank)
    projectors, energy = naive_update(np.float64(state.bases), np.float64(inputs))
    new, info = UPDATE(state, inputs)
    got = np.einsum("krd,kre->kde", new.bases, new.bases)
    np.testing.assert_allclose(got, projectors, atol=2e-3)
    np.testing.assert_allclose(info.energy, energy, rtol=1e-5)
    assert sum(info.counts.tolist()) == 1000
    orthonormal(new.bases)


def test_case_by_hand() -> None:
    # Two lines in the plane; three vectors near the first axis, one on the second.
    state = KSubspacesState(jnp.array([[[1.0, 0.0]], [[0.0, 1.0]]]))
    inputs = jnp.array([[2.0, 1.0], [2.0, -1.0], [1.0, 0.0], [0.0, 3.0]])
    new, info = UPDATE(state, inputs)
    assert info.counts.tolist() == [3, 1]
    np.testing.assert_allclose(info.energy, (1 + 1 + 0 + 0) / 4)
    # X₀ᵀX₀v = (9, 0): the line stays where it is.
    np.testing.assert_allclose(np.abs(np.asarray(new.bases)[0, 0]), [1, 0], atol=1e-6)


@compiled
def six_updates(key: jax.Array, inputs: jax.Array, **sizes: int) -> tuple[jax.Array, jax.Array]:
    """Bases after each, and energies before."""

    def step(state: KSubspacesState, _: None) -> tuple[KSubspacesState, tuple[jax.Array, jax.Array]]:
        state, info = k_subspaces.update(state, inputs)
        return state, (state.bases, info.energy)

    return jax.lax.scan(step, k_subspaces.init(key, inputs, **sizes), length=6)[1]


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    sizes=st.sampled_from(  # batch, num_subspaces, rank; the last one gathers
        [(13, 1, 1), (13, 5, 6), (13, 13, 3), (60, 1, 6), (60, 5, 3), (60, 13, 1), (60, 22, 6)]
    ),
)
def test_full_batch_energy_rises_by_rounding_alone(seed: int, sizes: tuple[int, int, int]) -> None:
    batch, num_subspaces, rank = sizes
    inputs = normal(seed, batch, 6) * np.float32([5.0, 3, 1, 1, 0.1, 0])
    bases, energies = six_updates(jax.random.key(seed), inputs, num_subspaces=num_subspaces, rank=rank)
    for step in np.asarray(bases):
        orthonormal(step)
    scale = np.mean(np.sum(np.square(inputs), axis=1))
    assert np.all(np.diff(energies) <= 2e-6 * scale)


def test_a_small_energy_has_few_digits() -> None:
    """Near convergence: right to a millionth of the squared norms, while the subspaces never get worse."""
    inputs = np.einsum("krd,nkr->nkd", normal(0, 4, 3, 20), normal(1, 500, 4, 3)).reshape(-1, 20)
    inputs = inputs + np.float32(0.01) * normal(2, *inputs.shape)
    state = INIT(jax.random.key(3), inputs, num_subspaces=4, rank=3)
    vectors, reported, exact = np.float64(inputs), [], []
    for _ in range(100):
        bases = np.float64(state.bases)
        seen = np.einsum("krd,nd->nkr", bases, vectors)
        residuals = vectors[:, None] - np.einsum("nkr,krd->nkd", seen, bases)
        exact.append(np.square(residuals).sum(axis=2).min(axis=1).mean())
        state, info = UPDATE(state, inputs)
        reported.append(float(info.energy))
    size = np.square(vectors).sum(axis=1).mean()
    assert exact[-1] < 1e-4 * size
    np.testing.assert_allclose(reported, exact, rtol=0, atol=1e-6 * size)
    assert np.all(np.diff(exact) <= 1e-7 * np.array(exact[1:]))


def test_recovers_planted_subspaces() -> None:
    planted, _ = np.linalg.qr(normal(0, 4, 20, 3))
    inputs = np.einsum("kdr,knr->knd", planted, normal(1, 4, 200, 3)).reshape(-1, 20)
    best = np.inf
    for seed in range(8):  # a local method: the best of a few starts
        state = INIT(jax.random.key(seed), inputs, num_subspaces=4, rank=3)
        for step in range(60):
            state, info = UPDATE(state, inputs, warmup=step < 5)
        best = min(best, float(info.energy))
        if best < 1e-3:
            break
    assert best < 1e-3
    labels = np.asarray(ASSIGN(state, inputs)).reshape(4, 200)
    assert all(len(set(row.tolist())) == 1 for row in labels)
    assert len(set(labels[:, 0].tolist())) == 4


def test_warmup_assigns_by_first_direction() -> None:
    # Both subspaces hold (0, 0, 1); only the first's leading row does.
    state = KSubspacesState(jnp.array([[[0.0, 0, 1], [1, 0, 0]], [[0.0, 1, 0], [0, 0, 1]]]))
    inputs = jnp.array([[0.0, 0.5, 1.0]])
    assert k_subspaces.assign(state, inputs).tolist() == [1]
    assert k_subspaces.assign(state, inputs, warmup=True).tolist() == [0]
    assert ASSIGN(state, inputs, warmup=jnp.array(True)).tolist() == [0]


def test_empty_subspace_keeps_its_span() -> None:
    state = KSubspacesState(jnp.asarray(np.eye(4, dtype=np.float32).reshape(2, 2, 4)))
    inputs = jnp.array([[1.0, 0.5, 0, 0], [0.5, -1.0, 0, 0]])
    new, info = UPDATE(state, inputs)
    assert info.counts.tolist() == [2, 0]
    basis = np.asarray(new.bases)[1]
    np.testing.assert_allclose(np.abs(basis @ np.eye(4)[2:].T @ np.eye(4)[2:]), np.abs(basis), atol=1e-6)


def test_blank_vectors_change_nothing() -> None:
    inputs = normal(0, 50, 6)
    state = INIT(jax.random.key(1), inputs, num_subspaces=3, rank=2)
    new, info = UPDATE(state, inputs)
    padded, padded_info = UPDATE(state, np.pad(inputs, ((0, 14), (0, 0))))
    np.testing.assert_allclose(new.bases, padded.bases, atol=1e-5)
    assert info.counts.tolist() == padded_info.counts.tolist()


def test_init_takes_inputs_and_avoids_blank_ones() -> None:
    inputs = np.zeros((40, 5), np.float32)
    inputs[[3, 17]] = np.eye(5)[:2] * 7
    state = INIT(jax.random.key(0), inputs, num_subspaces=2, rank=2)
    orthonormal(state.bases)
    assert {tuple(np.round(row, 4).tolist()) for row in np.asarray(state.bases)[:, 0]} == {
        (1, 0, 0, 0, 0),
        (0, 1, 0, 0, 0),
    }


def test_encode_is_projection_norm() -> None:
    inputs = normal(0, 50, 6)
    state = INIT(jax.random.key(1), inputs, num_subspaces=3, rank=2)
    expected = np.linalg.norm(np.einsum("krd,nd->nkr", state.bases, inputs), axis=2)
    np.testing.assert_allclose(ENCODE(state, inputs), expected, rtol=1e-5)
    assert ASSIGN(state, inputs).tolist() == expected.argmax(1).tolist()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 7}, r"rank=7 .* between 1 and 6: inputs has 6 features"),
        ({"rank": 0}, r"rank=0"),
        ({"num_subspaces": 51}, r"num_subspaces=51 .* between 1 and 50: inputs holds 50 vectors"),
        ({"inputs": jnp.zeros((50,))}, r"inputs must have shape \[batch, features\], got 1 axes"),
        ({"inputs": jnp.zeros((0, 6))}, r"inputs is empty"),
    ],
)
def test_bad_init(change: dict, message: str) -> None:
    arguments = {"inputs": jnp.ones((50, 6)), "num_subspaces": 3, "rank": 2} | change
    inputs = arguments.pop("inputs")
    with pytest.raises(ValueError, match=message):
        k_subspaces.init(jax.random.key(0), inputs, **arguments)


def test_bad_inputs() -> None:
    with pytest.raises(ValueError, match="inputs holds NaN or infinite values"):
        k_subspaces.init(jax.random.key(0), jnp.full((50, 6), jnp.nan), num_subspaces=3, rank=2)
    state = KSubspacesState(jnp.eye(4).reshape(2, 2, 4))
    for function in (k_subspaces.update, k_subspaces.assign, k_subspaces.encode):
        with pytest.raises(ValueError, match="5 features .* made for 4"):
            function(state, jnp.ones((3, 5)))
        with pytest.raises(TypeError, match="floating point, got uint8"):
            function(state, jnp.ones((3, 4), jnp.uint8))


def planted(num_subspaces: int, rank: int, features: int, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Noisy vectors of random subspaces, and the subspace of each."""
    rng = np.random.default_rng(0)
    bases = [np.linalg.qr(rng.standard_normal((features, rank)))[0] for _ in range(num_subspaces)]
    owner = rng.integers(0, num_subspaces, number)
    inputs = np.stack([bases[k] @ rng.standard_normal(rank) for k in owner])
    return np.float32(inputs + 0.02 * rng.standard_normal(inputs.shape)), owner


def test_fit_finds_planted_subspaces_that_k_means_does_not_see() -> None:
    inputs, owner = planted(6, 3, 40, 900)
    best = FIT(jax.random.key(0), inputs, num_subspaces=6, rank=3, init="random")
    assert metrics.clustering_accuracy(owner, best.labels) > 0.99
    centres = compiled(k_means.fit)(jax.random.key(0), inputs, num_clusters=6)
    assert metrics.clustering_accuracy(owner, centres.labels) < 0.8
    orthonormal(best.bases)
    state = KSubspacesState(best.bases)
    np.testing.assert_array_equal(best.labels, ASSIGN(state, inputs))
    _, info = UPDATE(state, inputs)
    np.testing.assert_allclose(best.energy, info.energy, rtol=1e-3)
    # The best of ten: no worse than any of fewer from the same keys.
    one = FIT(jax.random.key(0), inputs, num_subspaces=6, rank=3, init="random", num_init=1)
    assert best.energy <= one.energy
    assert 10 < best.num_iterations < 300


def test_fit_from_k_means_sees_bundles_apart() -> None:
    """Two bundles about one mean, and one elsewhere: first directions are those of the centroids."""
    rng = np.random.default_rng(0)
    means = np.eye(8)[:3] * 3
    owner = rng.integers(0, 3, 300)
    inputs = np.float32(means[owner] + 0.1 * rng.standard_normal((300, 8)))
    best = FIT(jax.random.key(0), inputs, num_subspaces=3, rank=2, num_init=3)
    assert metrics.clustering_accuracy(owner, best.labels) == 1
    assert best.energy < 0.1


def test_fit_over_a_mapped_axis_is_that_of_the_whole_batch() -> None:
    inputs, _ = planted(3, 2, 10, 64)
    inputs += 1  # off the origin, where k-means sees something
    fit = partial(k_subspaces.fit, jax.random.key(0), num_subspaces=3, rank=2, num_init=2)
    whole = jax.jit(fit)(inputs)
    mapped = jax.vmap(partial(fit, axis_name="batch"), axis_name="batch")
    parts = jax.jit(mapped)(inputs.reshape(4, 16, 10))
    np.testing.assert_allclose(parts.energy, np.full(4, whole.energy), rtol=1e-3)
    np.testing.assert_array_equal(np.ravel(parts.labels), whole.labels)


def test_fit_bad_input() -> None:
    inputs = jnp.ones((9, 4))
    with pytest.raises(ValueError, match="rank=5 is not accepted"):
        k_subspaces.fit(jax.random.key(0), inputs, num_subspaces=2, rank=5)
    with pytest.raises(ValueError, match="inputs must have shape"):
        k_subspaces.fit(jax.random.key(0), inputs[0], num_subspaces=2, rank=1)
    for name, value in {"num_init": 0, "max_iterations": 0, "tolerance": -1.0}.items():
        with pytest.raises(ValueError, match=f"{name}={value} is not accepted"):
            k_subspaces.fit(jax.random.key(0), inputs, num_subspaces=2, rank=1, **{name: value})
    with pytest.raises(ValueError, match="init='random' is not accepted with axis_name"):
        k_subspaces.fit(jax.random.key(0), inputs, num_subspaces=2, rank=1, init="random", axis_name="batch")


def test_a_direction_without_data_keeps_its_old_basis() -> None:
    state = KSubspacesState(jnp.array([[[1.0, 0, 0, 0], [0.0, 0, 0.6, 0.8]]]))
    new, _ = UPDATE(state, jnp.array([[2.0, 0, 0, 0], [1.0, 0, 0, 0]]))
    np.testing.assert_allclose(new.bases, state.bases, atol=1e-6)


@pytest.mark.parametrize("scale", [1, 1e-4])
def test_the_old_basis_hardly_holds_back_a_step(scale: float) -> None:
    """With a second moment of diag(4, 1) a line at 45° goes to (4, 1)."""
    state = KSubspacesState(jnp.full((1, 1, 2), np.sqrt(0.5)))
    new, _ = UPDATE(state, np.float32(scale) * np.float32([[2.0, 0], [0, 1]]))
    np.testing.assert_allclose(np.asarray(new.bases)[0, 0], np.array([4, 1]) / np.sqrt(17), atol=2e-4)
