from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import compiled
from hypothesis import given, settings
from hypothesis import strategies as st

from sul_jax import energy, k_subspaces, patches, stack, whitening
from sul_jax.k_subspaces import KSubspacesState

EXTRACT, INIT, LAYER, THRESHOLD, WHITEN, ZCA_KERNEL = map(
    compiled,
    (
        patches.extract,
        energy.init,
        energy.energy_layer,
        energy.adaptive_threshold,
        whitening.conv_zca,
        whitening.conv_zca_kernel,
    ),
)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def images(shape: tuple[int, ...] = (3, 7, 6, 2)) -> np.ndarray:
    return normal(0, *shape)


@compiled
def extract_and_norms(x: jax.Array, **window: int) -> tuple[jax.Array, jax.Array]:
    return patches.extract(x, **window), patches.norms(x, **window)


@compiled
def products(
    x: jax.Array, kernels: jax.Array, weights: jax.Array, **window: int
) -> tuple[jax.Array, jax.Array]:
    return patches.project(x, kernels, **window), patches.back_project(x, weights, **window)


def naive_patches(x: np.ndarray, size: int, padding: int) -> np.ndarray:
    x = np.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    b, h, w, _ = x.shape
    rows = [
        [x[:, i : i + size, j : j + size].reshape(b, -1) for j in range(w - size + 1)]
        for i in range(h - size + 1)
    ]
    return np.moveaxis(np.array(rows), 2, 0)


@settings(max_examples=20, deadline=None)
@given(size=st.integers(1, 6), padding=st.integers(0, 3))
def test_patches_against_loop(size: int, padding: int) -> None:
    x = images()
    expected = naive_patches(x, size, padding)
    got, norms = extract_and_norms(x, kernel_size=size, padding=padding)
    np.testing.assert_array_equal(got, expected)
    np.testing.assert_allclose(norms, np.linalg.norm(expected, axis=-1), rtol=1e-4, atol=1e-4)


# By patch rows, by whole patches, by the spectra of rows.
@pytest.mark.parametrize("number", [1, 50, 300])
@pytest.mark.parametrize(("size", "padding"), [(5, 1), (4, 2), (1, 0), (13, 1), (12, 2)])
def test_products_with_all_patches(number: int, size: int, padding: int) -> None:
    x = images(shape=(3, 22, 23, 7))
    if size > 10:
        assert patches._spectra_pay(x, number, size, padding) == (number == 300)
    window = {"kernel_size": size, "padding": padding}
    vectors = np.asarray(EXTRACT(x, **window)).reshape(-1, size**2 * 7)
    kernels, weights = normal(1, number, vectors.shape[1]), normal(2, number, vectors.shape[0])
    projected, back = products(x, kernels, weights, **window)
    np.testing.assert_allclose(projected, kernels @ vectors.T, atol=1e-3)
    np.testing.assert_allclose(back, weights @ vectors, atol=1e-3)


@pytest.mark.parametrize("padding", [0, 2])
def test_taken_patches_are_the_extracted(padding: int) -> None:
    x = images(shape=(3, 7, 6, 2))
    window = {"kernel_size": 4, "padding": padding}
    vectors = np.asarray(EXTRACT(x, **window)).reshape(-1, 32)
    chosen = np.random.default_rng(1).permutation(len(vectors))
    taken = jax.jit(lambda x, chosen: patches.taker(x, **window)(chosen))(x, chosen)
    np.testing.assert_array_equal(taken, vectors[chosen])


def test_sample_takes_distinct_patches_that_are_not_blank() -> None:
    x = np.zeros((2, 6, 6, 1), np.float32)
    x[1, 2, 3, 0] = 1.0  # nine 3×3 patches see the pixel
    taken = compiled(patches.sample)(jax.random.key(0), x, num_patches=9, kernel_size=3, padding=1)
    np.testing.assert_array_equal(np.sort(np.argmax(taken, axis=1)), np.arange(9))
    every = partial(patches.sample, num_patches=72, kernel_size=3, padding=1)
    assert jax.eval_shape(every, jax.random.key(0), x).shape == (72, 9)
    with pytest.raises(ValueError, match="num_patches=73 exceeds the 72 patches"):
        patches.sample(jax.random.key(0), x, num_patches=73, kernel_size=3, padding=1)


def test_map_chunks_is_exact_with_a_ragged_last_chunk() -> None:
    x = images(shape=(7, 4, 4, 1))
    doubled = jax.jit(lambda x: patches.map_chunks(lambda c: 2 * c, x, bytes_per_image=64, max_bytes=200))(x)
    assert doubled.shape[0] == 3
    np.testing.assert_array_equal(np.asarray(doubled).reshape(-1, 4, 4, 1)[:7], 2 * x)


@pytest.mark.parametrize("num_winners", [1, 3, 4, 7, 8])
def test_adaptive_threshold_against_sort(num_winners: int) -> None:
    f = np.random.default_rng(0).random((5, 3, 8)).astype(np.float32)
    f[0, 0] = 0  # blank
    f[1, 1] = 0.5  # all tied
    f[2, 2, :4] = 0.9  # ties across the threshold
    ordered = np.sort(f, axis=-1)[..., ::-1]
    tau = ordered[..., num_winners : num_winners + 1] if num_winners < 8 else 0
    got = THRESHOLD(f, num_winners=num_winners)
    np.testing.assert_array_equal(got, np.maximum(f - tau, 0))


def test_adaptive_threshold_of_many_features() -> None:
    f = np.random.default_rng(0).random((3, 400)).astype(np.float32)
    tau = np.sort(f, axis=-1)[:, -101, None]
    got = THRESHOLD(f, num_winners=100)
    np.testing.assert_array_equal(got, np.maximum(f - tau, 0))


def test_adaptive_threshold_of_one_vector() -> None:
    got = THRESHOLD(jnp.array([1.0, 4.0, 2.0, 3.0]), num_winners=2)
    assert got.tolist() == [0, 2, 0, 1]


@pytest.mark.parametrize("num_winners", [0, 9])
def test_bad_num_winners(num_winners: int) -> None:
    with pytest.raises(ValueError, match=f"num_winners={num_winners} .* between 1 and 8"):
        energy.adaptive_threshold(jnp.ones((2, 8)), num_winners=num_winners)


@pytest.mark.parametrize("rescale", [True, False])
def test_layer_against_loop(rescale: bool) -> None:
    x = images()
    x[0] = 0
    key = jax.random.key(1)
    sizes = {"kernel_size": 3, "padding": 1}
    bases = INIT(key, x, num_subspaces=5, rank=2, **sizes).bases
    options = {} if rescale else {"rescale": False}  # rescaled by default
    got = np.asarray(LAYER(x, bases, num_winners=2, **options, **sizes))
    vectors = naive_patches(x, 3, 1)
    expected = np.zeros((*vectors.shape[:3], 5))
    for index in np.ndindex(*vectors.shape[:3]):
        norms = np.array([np.linalg.norm(v @ vectors[index]) for v in np.asarray(bases)])
        f = np.maximum(norms - np.sort(norms)[-3], 0)
        if rescale and np.linalg.norm(f) > 0:
            f = f / np.linalg.norm(f) * np.linalg.norm(vectors[index])
        expected[index] = f
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-4)
    assert (np.count_nonzero(got, axis=-1) <= 2).all()
    assert not np.any(got[0])


def test_layer_is_scale_equivariant() -> None:
    x = images()
    sizes = {"kernel_size": 3, "padding": 1}
    bases = INIT(jax.random.key(1), x, num_subspaces=5, rank=2, **sizes).bases
    one, ten = (np.asarray(LAYER(scale * x, bases, num_winners=2, **sizes)) for scale in (1, 10))
    np.testing.assert_allclose(ten, 10 * one, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("num_subspaces", "rank"), [(5, 2), (20, 7)])  # the second gathers
def test_update_is_k_subspaces_on_all_patches(
    num_subspaces: int, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = images(shape=(5, 7, 6, 2))
    sizes = {"kernel_size": 3, "padding": 1}
    state = INIT(jax.random.key(1), x, num_subspaces=num_subspaces, rank=rank, **sizes)
    assert k_subspaces.gathers(state.bases) == (num_subspaces == 20)
    vectors = np.asarray(EXTRACT(x, **sizes)).reshape(-1, 18)
    expected, expected_info = jax.jit(k_subspaces.update)(state, vectors)
    # Two images at a time: three chunks, the last one filled up.
    monkeypatch.setattr(patches, "chunk_bytes", lambda: 2 * 7 * 6 * 18 * 4)
    got, info = jax.jit(partial(energy.update, **sizes))(state, x)
    projectors = [np.einsum("krd,kre->kde", s.bases, s.bases) for s in (got, expected)]
    np.testing.assert_allclose(projectors[0], projectors[1], atol=1e-3)
    np.testing.assert_allclose(info.energy, expected_info.energy, rtol=1e-4)
    assert info.counts.tolist() == expected_info.counts.tolist()


def test_average_pool() -> None:
    y = np.arange(49.0).reshape(7, 7)
    expected = [[y[:4, :4].mean(), y[:4, 4:].mean()], [y[4:, :4].mean(), y[4:, 4:].mean()]]
    pooled = jax.jit(energy.average_pool)(y.reshape(1, 7, 7, 1))
    np.testing.assert_allclose(np.asarray(pooled)[0, :, :, 0], expected)
    np.testing.assert_allclose(energy.pooled_codes(y.reshape(1, 7, 7, 1)), [np.ravel(expected)])
    with pytest.raises(ValueError, match="at least 2×2"):
        energy.average_pool(jnp.ones((1, 1, 4, 1)))


@pytest.mark.parametrize("name", energy.ARCHITECTURES)
def test_published_architectures_fit_28_by_28_images(name: str) -> None:
    architecture = energy.ARCHITECTURES[name]
    net = stack(*energy.network_rules(architecture))
    image = jax.ShapeDtypeStruct((4, 28, 28, 1), jnp.float32)
    out = jax.eval_shape(lambda x: net.encode(net.init(jax.random.key(0), x), x), image)
    assert out.shape[-1] == architecture.layers[-1].num_subspaces
    assert len(architecture.layers) == int(name[0])


def test_greedy_update_touches_one_layer() -> None:
    layer = energy.EnergyLayer(4, 2, 2, 3, 0)
    net = stack(energy.layer_rule(layer), energy.layer_rule(layer))
    x = images()
    states = jax.jit(net.init)(jax.random.key(0), x)

    @jax.jit
    def update_and_expected(states: Any, x: jax.Array) -> Any:
        new, info = net.update(states, x, layer=1, warmup=True)
        assert new[0] is states[0]
        below = net.encode(states[:1], x)
        expected, _ = energy.update(states[1], below, kernel_size=3, padding=0, warmup=True)
        return new[1], info, expected

    new, info, expected = update_and_expected(states, x)
    np.testing.assert_allclose(new.bases, expected.bases, atol=1e-5)
    assert info.counts.shape == (4,)
    with pytest.raises(ValueError, match="layer=2 is not accepted"):
        net.update(states, x, layer=2)
    for use in (net.update, net.encode):
        with pytest.raises(ValueError, match="got 3 states for a stack of 2 rules"):
            use((*states, states[0]), x)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, v: energy.energy_layer(x[0], v, kernel_size=3, padding=0, num_winners=1),
         r"images must have shape \[batch, height, width, channels\], got 3 axes"),
        (lambda x, v: energy.energy_layer(x[..., :1], v, kernel_size=3, padding=0, num_winners=1),
         "18 features .* 1 channels have 9"),
        (lambda x, v: energy.energy_layer(x, v, kernel_size=9, padding=1, num_winners=1),
         "kernel_size=9 is larger than the padded image"),
        (lambda x, v: energy.energy_layer(x, v, kernel_size=3, padding=0, num_winners=6),
         "num_winners=6"),
        (lambda x, v: energy.init(jax.random.key(0), x, num_subspaces=2, rank=19, kernel_size=3, padding=0),
         "rank=19 .* between 1 and 18"),
        (lambda x, v: energy.init(jax.random.key(0), x, num_subspaces=61, rank=2, kernel_size=3, padding=0),
         "num_subspaces=61 .* hold 60 patches"),
        (lambda x, v: energy.init(jax.random.key(0), x[:0], num_subspaces=2, rank=2, kernel_size=3,
                                  padding=0),
         "images is empty"),
        (lambda x, v: energy.update(energy.KSubspacesState(v), x[..., :1], kernel_size=3, padding=0),
         "18 features"),
        (lambda x, v: whitening.conv_zca_kernel(x, kernel_size=3, num_components=19),
         "num_components=19 .* between 0 and 18"),
        (lambda x, v: whitening.conv_zca_kernel(x, kernel_size=8, num_components=1),
         "kernel_size=8 is larger than the padded image"),
        (lambda x, v: whitening.conv_zca(x, jnp.ones((3, 3, 1, 1))), "images has 2 channels"),
        (lambda x, v: whitening.conv_zca(x[:, :1], jnp.ones((3, 3, 2, 2))), "than 1 pixels .* got 1×6"),
    ],
)  # fmt: skip
def test_bad_input(call, message: str) -> None:
    x = images(shape=(3, 7, 6, 2))
    v = np.linalg.qr(normal(0, 5, 18, 2))[0].mT
    with pytest.raises(ValueError, match=message):
        call(x, v)


class TestWhitening:
    def test_levels_the_largest_eigenvalues(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Applied to whole patches, W gives eigenvalues λₙ, …, λₙ, λₙ₊₁, …: checked on its centre."""
        monkeypatch.setattr(patches, "chunk_bytes", lambda: 100 * 7 * 7 * 9 * 4)  # three chunks
        x = np.random.default_rng(0).normal(size=(300, 9, 9, 1)).cumsum(1).cumsum(2)
        x = x.astype(np.float32)
        n = 4
        kernel = np.asarray(ZCA_KERNEL(x, kernel_size=3, num_components=n))
        vectors = naive_patches(x, 3, 0).reshape(-1, 9).astype(np.float64)
        moment = vectors.T @ vectors / len(vectors)
        values, basis = np.linalg.eigh(moment)
        values, basis = values[::-1], basis[:, ::-1]
        gains = np.where(np.arange(9) < n - 1, np.sqrt(values[n - 1] / values), 1)
        expected = (basis * gains) @ basis.T
        np.testing.assert_allclose(kernel.ravel(), expected[4], rtol=1e-3, atol=1e-4)
        levelled = np.linalg.eigvalsh(expected @ moment @ expected.T)[::-1]
        np.testing.assert_allclose(levelled[:n], values[n - 1], rtol=1e-3)

    @pytest.mark.parametrize("num_components", [0, 1])
    def test_identity(self, num_components: int) -> None:
        x = images()
        kernel = ZCA_KERNEL(x, kernel_size=3, num_components=num_components)
        np.testing.assert_allclose(WHITEN(x, kernel), x, atol=1e-4)

    def test_reflection_padding(self) -> None:
        x = images()
        kernel = np.random.default_rng(0).normal(size=(4, 4, 2, 2)).astype(np.float32)
        padded = np.pad(x, ((0, 0), (2, 1), (2, 1), (0, 0)), mode="reflect")
        expected = naive_patches(padded, 4, 0) @ kernel.reshape(-1, 2)
        got = WHITEN(x, kernel)
        np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-4)

    def test_sharded_kernel_is_the_whole_batchs(self) -> None:
        x = images(shape=(16, 7, 6, 2))
        fit = partial(whitening.conv_zca_kernel, kernel_size=3, num_components=4)
        got = jax.jit(jax.vmap(partial(fit, axis_name="b"), axis_name="b"))(x.reshape(4, 4, 7, 6, 2))
        np.testing.assert_allclose(np.asarray(got)[0], jax.jit(fit)(x), atol=1e-4)


def test_gradients_at_blank_patches_are_zero() -> None:
    spot = np.zeros((1, 6, 6, 1), np.float32)
    spot[0, 2, 2, 0] = 1
    window = {"kernel_size": 3, "padding": 1}
    state = INIT(jax.random.key(0), normal(1, 2, 6, 6, 1), num_subspaces=5, rank=2, **window)

    def total(images: jax.Array) -> jax.Array:
        return jnp.sum(energy.energy_layer(images, state.bases, num_winners=2, **window))

    slope = np.asarray(jax.jit(jax.grad(total))(spot))
    assert np.isfinite(slope).all()
    np.testing.assert_array_equal(slope[0, 5, :, 0], 0)  # only blank patches see it

    @jax.jit
    def gradients(maps: jax.Array, vectors: jax.Array) -> tuple[jax.Array, jax.Array]:
        flat = KSubspacesState(jnp.eye(3)[None, :2])
        codes = lambda maps: jnp.sum(energy.pooled_codes(maps, power=0.5))  # noqa: E731
        norms = lambda vectors: jnp.sum(k_subspaces.encode(flat, vectors))  # noqa: E731
        return jax.grad(codes)(maps), jax.grad(norms)(vectors)

    for slope in gradients(jnp.zeros((1, 4, 4, 2)), jnp.zeros((1, 3))):
        np.testing.assert_array_equal(slope, 0)


def test_integers_and_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(TypeError, match="features must be floating"):
        energy.adaptive_threshold(jnp.arange(5), num_winners=2)
    images = jnp.ones((2, 4, 4, 1))
    with pytest.raises(ValueError, match="kernels has 8 features"):
        patches.project(images, jnp.ones((5, 8)), kernel_size=3)
    with pytest.raises(ValueError, match="weights has 7 positions"):
        patches.back_project(images, jnp.ones((5, 7)), kernel_size=3)
