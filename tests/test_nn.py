from functools import partial
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import compiled
from flax import nnx

from sul_jax import energy, hebbian, k_means, k_subspaces, patches, stack, whitening
from sul_jax.nn import (
    ACOL,
    MLP,
    NMCE,
    AlexNet,
    EnergyNet,
    LeNet5,
    NNLBlock,
    NNLConv,
    ResNet,
    _winograd,
    convolution,
)

ARCHITECTURE = energy.EnergyArchitecture(
    3, 2, (energy.EnergyLayer(6, 2, 3, 3, 1), energy.EnergyLayer(5, 3, 2, 4, 0))
)
RULE = stack(*energy.network_rules(ARCHITECTURE))
INIT = jax.jit(RULE.init)
# Of any module.
CALL = nnx.jit(lambda net, images: net(images))
PREDICT = nnx.jit(lambda net, images: net.predict(images))


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.asarray(jax.random.uniform(jax.random.key(0), (20, 8, 8, 1)))


@pytest.fixture(scope="module")
def net(images: np.ndarray) -> EnergyNet:
    states = INIT(jax.random.key(1), images)
    return EnergyNet(states, ARCHITECTURE, centroids=jax.random.uniform(jax.random.key(2), (3, 20)))


def test_module_is_the_function(net: EnergyNet, images: np.ndarray) -> None:
    (states,) = net.learned_states()

    @jax.jit
    def expected(states: Any, images: jax.Array) -> Any:
        maps = [RULE.encode(states[: depth + 1], images) for depth in range(3)]
        return maps, energy.pooled_codes(maps[-1])

    maps, codes = expected(states, images)
    found = net(images)
    np.testing.assert_allclose(found, codes, rtol=1e-4, atol=1e-5)
    for depth in range(3):
        got = net.feature_maps(images, num_layers=depth)
        np.testing.assert_allclose(got, maps[depth], rtol=1e-3, atol=1e-5)
    np.testing.assert_array_equal(net.predict(images), jax.jit(k_means.assign)(net.centroids[...], found))
    np.testing.assert_allclose(CALL(net, images), found, rtol=1e-4)


def test_an_answer_does_not_depend_on_the_batch(net: EnergyNet, images: np.ndarray) -> None:
    np.testing.assert_allclose(np.asarray(net(images))[:3], net(images[:3]), rtol=1e-4, atol=1e-5)


def test_images_that_are_not_finite(net: EnergyNet, images: np.ndarray) -> None:
    broken = images.copy()
    broken[0, 0, 0, 0] = np.nan
    with pytest.raises(ValueError, match="images holds NaN or infinite values"):
        net.predict(broken)


def test_save_and_load(net: EnergyNet, images: np.ndarray, tmp_path: Path) -> None:
    net.save(tmp_path / "net")
    net.save(tmp_path / "net")  # replaces
    loaded = EnergyNet.load(tmp_path / "net", architecture=ARCHITECTURE)
    assert loaded.architecture == ARCHITECTURE
    np.testing.assert_array_equal(loaded(images), net(images))
    np.testing.assert_array_equal(loaded.predict(images), net.predict(images))


def test_networks_side_by_side(images: np.ndarray, tmp_path: Path) -> None:
    states = [INIT(jax.random.key(seed), images) for seed in range(2)]
    both = EnergyNet(states, ARCHITECTURE, code_power=0.5)
    each = [EnergyNet(s, ARCHITECTURE).feature_maps(images) for s in states]
    together = np.concatenate(each, axis=-1)
    maps, codes = both.feature_maps(images), np.asarray(both(images))
    np.testing.assert_allclose(maps, together, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(codes**2, jax.jit(energy.pooled_codes)(maps), rtol=1e-4)
    both.save(tmp_path / "both")
    np.testing.assert_array_equal(EnergyNet.load(tmp_path / "both")(images), codes)


def test_whitened_codes(net: EnergyNet, images: np.ndarray, tmp_path: Path) -> None:
    @jax.jit
    def learned(codes: jax.Array) -> Any:
        codes = whitening.normalize(codes)
        state = whitening.pca(codes, num_components=4, exponent=0.3)
        return state, whitening.pca_whiten(codes, state)

    state, expected = learned(net(images))
    whitened = EnergyNet(net.learned_states(), ARCHITECTURE, whitening=state, centroids=jnp.ones((2, 4)))
    np.testing.assert_allclose(CALL(whitened, images), expected, rtol=1e-4, atol=1e-5)
    whitened.save(tmp_path / "net")
    loaded = EnergyNet.load(tmp_path / "net")
    np.testing.assert_array_equal(PREDICT(loaded, images), PREDICT(whitened, images))


def test_clusters_that_are_subspaces(net: EnergyNet, images: np.ndarray, tmp_path: Path) -> None:
    subspaces = compiled(k_subspaces.init)(jax.random.key(3), net(images), num_subspaces=4, rank=2)
    by_rule = EnergyNet(net.learned_states(), ARCHITECTURE, subspaces=subspaces)
    by_rule.save(tmp_path / "net")
    expected = jax.jit(k_subspaces.assign)(subspaces, net(images))
    np.testing.assert_array_equal(EnergyNet.load(tmp_path / "net").predict(images), expected)
    with pytest.raises(ValueError, match="centroids and subspaces are both given"):
        EnergyNet(net.learned_states(), ARCHITECTURE, centroids=jnp.ones((3, 20)), subspaces=subspaces)


def test_bad_checkpoints(net: EnergyNet, tmp_path: Path) -> None:
    net.save(tmp_path / "net")
    with pytest.raises(ValueError, match="holds another architecture"):
        EnergyNet.load(tmp_path / "net", architecture=energy.ARCHITECTURES["1layer"])
    with pytest.raises(ValueError, match="is not a folder"):
        EnergyNet.load(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="is not a checkpoint"):
        EnergyNet.load(tmp_path / "empty")


def test_save_keeps_what_is_not_a_checkpoint(net: EnergyNet, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="is not a checkpoint"):
        net.save(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_states_must_fit(net: EnergyNet) -> None:
    (states,) = net.learned_states()
    with pytest.raises(ValueError, match="holds 2 states .* the architecture has ConvZCA and 2"):
        EnergyNet(states[:2], ARCHITECTURE)
    wrong = (*states[:2], energy.KSubspacesState(jnp.ones((5, 3, 7))))
    with pytest.raises(ValueError, match=r"layer 2 have shape \(5, 3, 7\)"):
        EnergyNet(wrong, ARCHITECTURE)
    bare = EnergyNet(states, ARCHITECTURE)
    with pytest.raises(ValueError, match="predict needs centroids"):
        bare.predict(jnp.ones((1, 8, 8, 1)))


@pytest.mark.parametrize(
    ("size", "kernel_size", "strides", "padding", "channels"),
    [
        (9, 3, 1, "SAME", 3),
        (9, 3, 2, ((1, 1), (1, 1)), 3),
        (11, 5, 2, "SAME", 3),
        (8, 1, 2, "VALID", 3),
        (10, 8, 3, ((0, 0),) * 2, 3),
        # By half the products:
        (9, 3, 1, "SAME", 32),
        (4, 3, 1, "VALID", 33),
        (6, 3, 1, ((2, 0), (1, 2)), 32),
    ],
)
def test_convolution_agrees_with_xla(
    size: int, kernel_size: int, strides: int, padding: Any, channels: int
) -> None:
    generator = np.random.default_rng(0)
    images = generator.standard_normal((6, size, size + 1, channels), np.float32)
    kernel = generator.standard_normal((kernel_size, kernel_size, channels, channels + 2), np.float32)
    kernel /= np.sqrt(channels)
    settings = ((strides, strides), padding)

    def ours(images: jax.Array, kernel: jax.Array) -> jax.Array:
        return jnp.sin(convolution.conv_general_dilated(images, kernel, *settings, precision="highest"))

    def xla(images: jax.Array, kernel: jax.Array) -> jax.Array:
        return jnp.sin(
            jax.lax.conv_general_dilated(
                images, kernel, *settings, dimension_numbers=("NHWC", "HWIO", "NHWC"), precision="highest"
            )
        )

    @jax.jit
    def values_and_gradients(images: jax.Array, kernel: jax.Array) -> Any:
        gradients = [jax.grad(lambda *a, f=f: jnp.sum(f(*a)), (0, 1))(images, kernel) for f in (ours, xla)]
        mapped = jax.vmap(jax.grad(lambda k: jnp.sum(ours(images, k))))(jnp.stack([kernel, 2 * kernel]))
        return (ours(images, kernel), xla(images, kernel)), gradients, mapped

    values, gradients, mapped = values_and_gradients(images, kernel)
    rounding = 1e-5 if channels == 3 else 1e-4  # of values up to 5, and of gradients up to 30
    chex.assert_trees_all_close(*values, atol=rounding)
    chex.assert_trees_all_close(*gradients, atol=10 * rounding)
    chex.assert_trees_all_close(mapped[0], gradients[0][1], atol=10 * rounding)


@pytest.mark.parametrize(("window", "stride"), [(2, 2), (3, 3), (3, 2), (2, 1)])
def test_max_pool_agrees_with_flax(window: int, stride: int) -> None:
    @jax.jit
    def both(values: jax.Array) -> Any:
        wanted = nnx.max_pool(values, (window, window), (stride, stride))  # type: ignore[no-untyped-call]
        return convolution.max_pool(values, window, stride), wanted

    values = np.random.default_rng(0).standard_normal((2, 9, 10, 3), np.float32)
    chex.assert_trees_all_equal(*both(values))


@pytest.mark.parametrize("response", ["nnl", "relu"])
def test_nnl_blocks(response: Any, tmp_path: Path) -> None:
    # More than ten blocks: their names do not sort as their numbers do.
    blocks = [NNLBlock(3, 6, 10, 4, 2), NNLBlock(5, 4, 20, 3, 3), *[NNLBlock(3, 2, 5, 2, 2)] * 10]
    net = NNLConv((12, 11, 3), blocks, num_classes=5, response=response, rngs=nnx.Rngs(0))
    images = np.random.default_rng(0).random((7, 12, 11, 3), np.float32)
    images[0] = 0

    @nnx.jit
    def both(net: NNLConv, images: jax.Array) -> Any:
        parts = []
        for block, weights in zip(blocks, net.filters, strict=True):
            if response == "nnl":
                responses = hebbian.convolve(
                    images, weights[...], kernel_size=block.kernel_size, power=block.power
                )
            else:
                patch = patches.extract(images, kernel_size=block.kernel_size)
                responses = jax.nn.relu(jnp.matmul(patch, weights[...].T, precision="highest"))
            window, strides = (block.pool,) * 2, (block.pool_stride,) * 2
            pooled = nnx.max_pool(responses, window, strides)  # type: ignore[no-untyped-call]
            parts.append(pooled.reshape(7, -1))
        return net.features(images), jnp.concatenate(parts, axis=1)

    found, expected = map(np.asarray, both(net, images))
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)
    assert net.num_features == found.shape[1]
    assert (found[0] == 0).all()
    net.save(tmp_path / "net")
    loaded = NNLConv.load(tmp_path / "net")
    np.testing.assert_array_equal(CALL(loaded, images), CALL(net, images))
    assert (loaded.blocks, loaded.response) == (tuple(blocks), response)
    with pytest.raises(ValueError, match="is not a checkpoint of an EnergyNet"):
        EnergyNet.load(tmp_path / "net")


@pytest.mark.parametrize(
    "build",
    [
        lambda rngs: ACOL((8, 8, 3), num_parents=2, num_features=8, num_filters=2, rngs=rngs),
        lambda rngs: LeNet5(channels=3, use_sobel="random", rngs=rngs),
        lambda rngs: NMCE(
            ResNet(10, num_filters=2, num_pre_features=None, rngs=rngs),
            16,
            num_features=3,
            num_clusters=2,
            rngs=rngs,
        ),
    ],
    ids=["ACOL", "LeNet5", "NMCE"],
)
def test_saved_with_its_arguments(build: Any, tmp_path: Path) -> None:
    net = build(nnx.Rngs(0))
    size = 32 if isinstance(net, LeNet5) else 8
    images = np.random.default_rng(0).random((4, size, size, 3), np.float32)
    net.train()
    CALL(net, images)  # moves the statistics of batch normalisation
    net.eval()
    net.save(tmp_path / "net")
    loaded = type(net).load(tmp_path / "net")
    chex.assert_trees_all_equal(CALL(loaded, images), CALL(net, images))
    with pytest.raises(ValueError, match="is not a checkpoint of an AlexNet"):
        AlexNet.load(tmp_path / "net")


def test_what_is_not_known_by_name_is_not_loaded(tmp_path: Path) -> None:
    rngs = nnx.Rngs(0)
    mlp = MLP(2, 3, num_layers=1, activation=partial(jax.nn.leaky_relu, negative_slope=0.2), rngs=rngs)
    mlp.save(tmp_path / "mlp")
    with pytest.raises(ValueError, match="the activation is not a function of jax.nn"):
        MLP.load(tmp_path / "mlp")
    NMCE(nnx.Linear(2, 3, rngs=rngs), 3, num_features=2, num_clusters=2, rngs=rngs).save(tmp_path / "nmce")
    with pytest.raises(ValueError, match="the backbone 'Linear' cannot be loaded by name"):
        NMCE.load(tmp_path / "nmce")


def test_nnl_bad_input() -> None:
    with pytest.raises(ValueError, match="does not fit images of 8×8 pixels"):
        NNLConv((8, 8, 3), [NNLBlock(4, 5, 10, 6)], num_classes=2, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="sizes are at least 1 and the power positive"):
        NNLConv((8, 8, 3), [NNLBlock(4, 5, 10, 2, 0)], num_classes=2, rngs=nnx.Rngs(0))
    net = NNLConv((8, 8, 3), [NNLBlock(4, 5, 10, 2)], num_classes=2, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="images has shape"):
        net(jnp.ones((1, 9, 8, 3)))
    with pytest.raises(TypeError, match="images must be floating point, got uint8"):
        net(jnp.ones((1, 8, 8, 3), jnp.uint8))
    with pytest.raises(ValueError, match=r"pooled has shape \(2, 24\), expected \[batch, 20\]"):
        net.respond(jnp.ones((2, 24)))
    with pytest.raises(TypeError, match="pooled must be floating point, got int32"):
        net.respond(jnp.ones((2, 20), jnp.int32))
    with pytest.raises(ValueError, match="blocks is empty"):
        NNLConv((8, 8, 3), [], num_classes=2, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("batch", [0, 7, 13])
def test_convolution_of_any_batch_and_lower_precision(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that do not divide the batch; sums of bfloat16 products do not lose what XLA's keep."""
    monkeypatch.setattr(convolution, "_BLOCK_BYTES", 4 * 36 * 27 * 2)
    images = np.random.default_rng(0).random((batch, 6, 6, 3), np.float32).astype(jnp.bfloat16)
    kernel = np.ones((3, 3, 3, 2), jnp.bfloat16)

    @jax.jit
    @jax.grad
    def gradient(kernel: jax.Array, images: jax.Array) -> jax.Array:
        return convolution.conv_general_dilated(images, kernel, (1, 1), "SAME").sum()

    ours = np.asarray(gradient(kernel, images))
    exact = gradient(kernel.astype(np.float32), images.astype(np.float32))
    assert ours.dtype == jnp.bfloat16
    np.testing.assert_allclose(ours.astype(np.float32), exact, rtol=5e-3)


@pytest.mark.parametrize("number", [1, 7, 12])
def test_half_the_products_in_any_blocks(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blank images that fill the last block change nothing; without images there is nothing to sum."""
    monkeypatch.setattr(_winograd, "_BLOCK_BYTES", 4 * (4 * 6 * 3 * 5 * 2 * 32))
    images = np.random.default_rng(0).random((number, 5, 5, 32), np.float32)
    kernel = np.random.default_rng(1).random((3, 3, 32, 32), np.float32)
    assert _winograd.pays(images, kernel, (1, 1), ((1, 1), (1, 1)))

    def loss(images: jax.Array, kernel: jax.Array, convolve: Any) -> jax.Array:
        return jnp.sum(jnp.sin(0.1 * convolve(images, kernel, (1, 1), "SAME")))

    gradient = jax.jit(jax.value_and_grad(loss, (0, 1)), static_argnums=2)
    ours = gradient(images, kernel, convolution.conv_general_dilated)
    exact = gradient(images, kernel, convolution._xla)
    chex.assert_trees_all_close(ours, exact, atol=1e-3, rtol=1e-4)
    empty = gradient(images[:0], kernel, convolution.conv_general_dilated)
    chex.assert_trees_all_equal(empty, (jnp.zeros(()), (jnp.zeros((0, 5, 5, 32)), jnp.zeros_like(kernel))))


def test_half_the_products_beside_float64() -> None:
    """Products of sums lose little: their error stays within a few times that of XLA's own sums."""
    images = np.random.default_rng(0).standard_normal((2, 16, 16, 64), np.float32)
    kernel = np.random.default_rng(1).standard_normal((3, 3, 64, 64), np.float32)
    windows = np.lib.stride_tricks.sliding_window_view(images.astype(np.float64), (3, 3), axis=(1, 2))
    exact = np.einsum("bhwcij,ijcn->bhwn", windows, kernel, optimize=True)
    ours = convolution.conv_general_dilated(jnp.asarray(images), jnp.asarray(kernel), (1, 1), "VALID")
    assert np.abs(ours - exact).max() < 1e-5 * np.abs(exact).max()


@pytest.mark.parametrize("channels", [3, 32])
def test_convolution_under_shard_map(channels: int) -> None:
    """The gradient of a kernel that all devices share is the sum of theirs."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("batch",))
    generator = np.random.default_rng(0)
    images = generator.standard_normal((4, 6, 6, channels), np.float32)
    kernel = generator.standard_normal((3, 3, channels, channels), np.float32) / np.float32(channels)

    def loss(kernel: jax.Array, images: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(convolution.conv_general_dilated(images, kernel, (1, 1), "SAME")))

    split = jax.sharding.PartitionSpec("batch")
    whole = jax.sharding.PartitionSpec()

    def shared(kernel: jax.Array, images: jax.Array) -> jax.Array:
        return jax.lax.psum(loss(kernel, images), "batch")

    sharded = jax.shard_map(shared, mesh=mesh, in_specs=(whole, split), out_specs=whole)
    within = jax.shard_map(jax.grad(shared), mesh=mesh, in_specs=(whole, split), out_specs=whole)
    wanted = jax.jit(jax.grad(loss))(kernel, images)
    rounding = 1e-4 if channels == 3 else 1e-3
    chex.assert_trees_all_close(jax.jit(jax.grad(sharded))(kernel, images), wanted, atol=rounding)
    chex.assert_trees_all_close(jax.jit(within)(kernel, images), wanted, atol=rounding)
