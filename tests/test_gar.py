"""Affinity, balance and the regulariser; the network; the experiment."""

import itertools
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiled import compiled
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import softmax
from sklearn.cluster import KMeans

from experiments import acol_pseudo, data
from experiments.acol_pseudo import Config
from sul_jax import LearningRule, acol, augment, gar, metrics
from sul_jax.nn import ACOL


def naive(activations: np.ndarray, num_parents: int) -> tuple[float, float]:
    """Eq. 5, 6, 11 and 12 with the matrices N and V written out, in float64."""
    affinities, balances = [], []
    for parent in range(num_parents):
        b = activations[:, parent::num_parents].astype(np.float64)
        gram = b.T @ b
        outer = np.outer(np.diag(gram), np.diag(gram))
        for matrix, ratios in ((gram, affinities), (outer, balances)):
            trace = np.trace(matrix)
            ratios.append((matrix.sum() - trace) / ((len(matrix) - 1) * trace))
    return float(np.mean(affinities)), float(np.mean(balances))


def affinity_and_balance(b: jax.Array, num_parents: int) -> tuple[jax.Array, ...]:
    return tuple(ratio(b, num_parents=num_parents) for ratio in (gar.affinity, gar.balance))


@settings(max_examples=20)
@given(st.integers(1, 4), st.integers(2, 5), st.integers(1, 30), st.integers(0, 2**31))
def test_against_the_matrices(num_parents: int, nodes: int, batch: int, seed: int) -> None:
    b = np.random.default_rng(seed).random((batch, nodes * num_parents), np.float32) ** 4
    found = compiled(affinity_and_balance)(b, num_parents)
    np.testing.assert_allclose(found, naive(b, num_parents), rtol=2e-5, atol=1e-6)


def test_solved_by_hand() -> None:
    b = np.array([[1, 0], [1, 1]], np.float32)  # N = [[2, 1], [1, 1]]
    affinity, balance = compiled(affinity_and_balance)(b, 1)
    assert affinity.item() == pytest.approx(2 / 3)
    assert balance.item() == pytest.approx(2 * 2 / 5)  # V = [[4, 2], [2, 1]]
    # A multiple of the identity: exactly no affinity and exact balance.
    spread = np.tile(0.3 * np.eye(6, dtype=np.float32), (5, 1))
    for num_parents in (1, 2, 3):
        affinity, balance = compiled(affinity_and_balance)(spread, num_parents)
        assert affinity.item() == 0
        assert balance.item() == 1


def test_nodes_of_a_parent_may_change_places() -> None:
    logits = np.random.default_rng(0).standard_normal((50, 12), np.float32)
    by_parent = logits.reshape(50, 4, 3)
    order = np.array([[2, 0, 3], [0, 1, 2], [1, 3, 0], [3, 2, 1]])
    moved = np.take_along_axis(by_parent, order[None], axis=1).reshape(50, 12)
    loss = jax.jit(partial(gar.gar_loss, num_parents=3))
    np.testing.assert_allclose(loss(moved), loss(logits), rtol=1e-5)


@pytest.mark.parametrize("frobenius", ["squared", "mean", "norm"])
def test_gradients_with_dead_nodes(frobenius: str) -> None:
    logits = np.random.default_rng(0).standard_normal((20, 6), np.float32)
    logits[:, 2] = -1
    dead_parent = logits.copy()
    dead_parent[:, 1::2] = -1
    huge, zeros = 1e12 * logits, np.zeros_like(logits)
    loss = partial(gar.gar_loss, num_parents=2, frobenius=frobenius)
    for z in (logits, dead_parent, huge, zeros, zeros - 1):
        value, gradient = jax.jit(jax.value_and_grad(loss))(z)
        assert np.isfinite(value)
        assert np.isfinite(gradient).all()


def test_terms_add_up() -> None:
    z = np.random.default_rng(0).standard_normal((20, 6), np.float32)
    b = np.maximum(z, 0)
    weights = {"affinity_weight": 0.3, "balance_weight": 2.0, "frobenius_weight": 0.01}
    affinity, balance = compiled(affinity_and_balance)(b, 2)
    expected, loss = 0.3 * affinity + 2 * (1 - balance), compiled(gar.gar_loss)
    squared = loss(z, num_parents=2, **weights)
    np.testing.assert_allclose(squared, expected + 0.01 * np.sum(z**2), rtol=1e-5)
    norm = loss(z, num_parents=2, **weights, frobenius="norm")
    np.testing.assert_allclose(norm, expected + 0.01 * np.linalg.norm(b), rtol=1e-5)


def test_pooling_is_interleaved() -> None:
    probabilities = np.random.default_rng(0).dirichlet(np.ones(6), 7).astype(np.float32)
    identities = np.tile(np.eye(3), (2, 1))  # W of the paper: identity matrices one below the other
    pooled = gar.acol_pool(probabilities, num_parents=3)
    np.testing.assert_allclose(pooled, probabilities @ identities, rtol=1e-6)
    np.testing.assert_allclose(gar.acol_pool(probabilities, num_parents=6), probabilities)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gar.affinity(jnp.ones((5, 7)), num_parents=2), "num_parents=2 is not accepted"),
        (lambda: gar.balance(jnp.ones((5, 4)), num_parents=4), "at least 2 for each parent"),
        (lambda: gar.affinity(jnp.ones(5)), r"activations must have shape \[batch, num_nodes\]"),
        (lambda: gar.gar_loss(jnp.ones((5, 4)), frobenius="sum"), "frobenius='sum' is not accepted"),
        (lambda: gar.acol_pool(jnp.ones((5, 4)), num_parents=0), "num_parents=0 is not accepted"),
        (lambda: ACOL((3, 8, 1), num_parents=2, rngs=nnx.Rngs(0)), "sides must be at least 4"),
    ],
)
def test_bad_input(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_flips_and_rotations() -> None:
    """Eq. 15 in the order of the authors' code: quarter turns, then the same mirrored."""
    images = np.random.default_rng(0).random((200, 5, 5, 2), np.float32)
    changed, labels = jax.jit(augment.random_transformation)(jax.random.key(1), images)
    assert set(labels.tolist()) == set(range(8))
    for image, got, label in zip(images, np.asarray(changed), labels.tolist(), strict=True):
        turned = np.rot90(image, label % 4)
        np.testing.assert_array_equal(got, np.fliplr(turned) if label >= 4 else turned)


def test_own_transformations() -> None:
    images = np.random.default_rng(0).random((20, 4, 6, 1), np.float32)
    ways = [lambda x: x, lambda x: 1 - x]
    transform = jax.jit(partial(augment.random_transformation, transformations=ways))
    changed, labels = transform(jax.random.key(1), images)
    expected = np.where(np.asarray(labels == 1)[:, None, None, None], 1 - images, images)
    np.testing.assert_array_equal(changed, expected)
    with pytest.raises(ValueError, match=r"transformations\[1\] makes images of shape \(20, 6, 4, 1\)"):
        augment.random_transformation(jax.random.key(1), images)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"image_shape": (8, 8)}, r"image_shape=\(8, 8\) is not accepted"),
        ({"num_parents": 0}, "num_parents=0 is not accepted"),
        ({"num_features": -4}, "num_features=-4 is not accepted"),
    ],
)
def test_bad_sizes(sizes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ACOL(**{"image_shape": (8, 8, 1), "num_parents": 2} | sizes, rngs=nnx.Rngs(0))


def built(**sizes: int) -> ACOL:
    """A network for images of 8×8 pixels and two parents."""
    return nnx.jit(lambda: ACOL((8, 8, 1), num_parents=2, **sizes, rngs=nnx.Rngs(0)))()


def test_bad_images() -> None:
    net = built(num_features=4, num_filters=2)
    with pytest.raises(ValueError, match=r"images has shape \(2, 9, 8, 1\)"):
        net(np.ones((2, 9, 8, 1), np.float32))
    with pytest.raises(TypeError, match="images must be floating point"):
        net(np.ones((2, 8, 8, 1), np.uint8))


def test_published_network() -> None:
    """Table 2 on MNIST: 6,490,944 parameters from 784 pixels to 160 nodes, counted by hand."""
    net = nnx.eval_shape(lambda: ACOL((28, 28, 1), num_parents=8, rngs=nnx.Rngs(0)))
    convolutions = 9 * (1 * 32 + 32 * 32 + 32 * 64 + 64 * 64) + 2 * (32 + 64)
    linear = 7 * 7 * 64 * 2048 + 2048 + 2048 * 160 + 160
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(net))) == convolutions + linear


def test_network_drops_only_with_a_key() -> None:
    net = built(nodes_per_parent=3, num_features=32, num_filters=4)
    images = np.random.default_rng(0).random((5, 8, 8, 1), np.float32)
    graph, state = nnx.split(net)
    logits = jax.jit(lambda key: nnx.merge(graph, state)(images, key=key))
    np.testing.assert_array_equal(logits(None), logits(None))
    assert np.any(np.asarray(logits(jax.random.key(1))) != logits(None))
    parents = jax.jit(lambda: nnx.merge(graph, state).parents(images))
    np.testing.assert_allclose(np.sum(parents(), axis=1), 1, rtol=1e-5)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """A run of seconds on a few digits."""
    return Config(
        dataset="digits", workdir=tmp_path / "run", num_train=60, num_test=50, batch_size=25, epochs=2,
        num_features=16, num_filters=4, nodes_per_parent=3,
    )  # fmt: skip


def parameters(result: object) -> list:
    return jax.tree.leaves(nnx.state(result.network))


def test_run_and_resume(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(config, epochs=4)
    (whole,) = acol_pseudo.run(config)
    assert {"clustering_accuracy", "purity", "spectral_accuracy"} <= set(whole.metrics)
    assert {"untrained_clustering_accuracy", "untrained_spectral_accuracy"} <= set(whole.metrics)
    for name in (
        "figure3_while_learning", "figure4_activity", "figure5_representations", "figure6_graphs",
        "figure7_clusters", "figure7_7_clusters", "figure7_20_clusters",
    ):  # fmt: skip
        assert (config.workdir / f"{name}.png").stat().st_size > 1000
    with_arguments = ACOL.load(config.workdir / "network-seed0")
    np.testing.assert_array_equal(jax.tree.leaves(nnx.state(with_arguments))[0], parameters(whole)[0])
    # Interrupted in the middle and resumed: the same network, bit for bit.
    stopped = replace(config, workdir=config.workdir.parent / "stopped")
    original = acol_pseudo.run_steps

    def interrupted(steps: object, *arguments: object, **options: object) -> object:
        calls = itertools.count()

        def stop(*own: object) -> object:
            if next(calls) >= 7:
                raise KeyboardInterrupt
            return steps(*own)

        return original(stop, *arguments, **options)

    monkeypatch.setattr("experiments.common.training.CHECKPOINT_SECONDS", 0)
    monkeypatch.setattr(acol_pseudo, "run_steps", interrupted)
    with pytest.raises(KeyboardInterrupt):
        acol_pseudo.run(stopped)
    monkeypatch.setattr(acol_pseudo, "run_steps", original)
    monkeypatch.setattr(acol_pseudo, "_draw", lambda *_: None)
    (resumed,) = acol_pseudo.run(replace(stopped, resume=True))
    for one, other in zip(parameters(resumed), parameters(whole), strict=True):
        np.testing.assert_array_equal(one, other)
    # Another representation is only another evaluation.
    (again,) = acol_pseudo.run(replace(config, resume=True, representation="logits"))
    np.testing.assert_array_equal(parameters(again)[0], parameters(whole)[0])


@pytest.mark.slow
def test_rate_falls_in_the_last_epochs(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same network before the fall, another one after it, and one that stands still at the end."""
    monkeypatch.setattr(acol_pseudo, "_draw", lambda *_: None)

    def learned(epochs: int, decay_epochs: int) -> list:
        setting = replace(config, epochs=epochs, decay_epochs=decay_epochs, workdir=config.workdir / "x")
        (result,) = acol_pseudo.run(setting)
        return jax.device_get(parameters(result))

    before, level, falling = learned(1, 0), learned(2, 0), learned(2, 1)
    assert (level[-1] != falling[-1]).any()
    steps = [np.abs(one - other).max() for one, other in zip(before, falling, strict=True)]
    assert max(steps) < max(np.abs(a - b).max() for a, b in zip(before, level, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sweep", "values", "picture"),
    [
        ("width", (8, 16), "figure4_width"),
        ("transformations", ("permutation", (1, 2)), "figure8_transformations"),
    ],
)
def test_sweep(
    config: Config, sweep: str, values: tuple[Any, ...], picture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(acol_pseudo, "_draw", lambda *_: None)
    option, _ = acol_pseudo._SWEEPS[sweep]
    monkeypatch.setitem(acol_pseudo._SWEEPS, sweep, (option, values))
    own = {"num_features": 2048} if sweep == "width" else {}
    found = acol_pseudo.run(replace(config, sweep=sweep, epochs=1, **own))
    assert len(found) == 2
    assert len(json.loads((config.workdir / "sweep.json").read_text())) == 2
    assert (config.workdir / f"{picture}.png").stat().st_size > 1000


@pytest.mark.slow
def test_seeds_together_are_the_seeds_alone(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(acol_pseudo, "_draw", lambda *_: None)
    alone = acol_pseudo.run(replace(config, seeds=2))
    together = acol_pseudo.run(replace(config, seeds=2, seeds_together=2))
    for one, other in zip(alone, together, strict=True):
        for a, b in zip(parameters(one), parameters(other), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-3)


def test_parents_are_taught() -> None:
    """The loss of the parents' probabilities falls, on images as they are."""
    parents = np.arange(10) % 2
    images = np.random.default_rng(0).random((10, 8, 8, 1), np.float32)
    images *= 1 + 3 * parents[:, None, None, None]
    sizes = {"nodes_per_parent": 4, "num_features": 32, "num_filters": 4}
    rule = acol.rule((8, 8, 1), num_parents=2, **sizes, optimizer=optax.adam(0.01))
    state, losses = jax.jit(rule.init)(jax.random.key(0), images), []
    update = jax.jit(rule.update)
    for index in range(100):
        state, info = update(state, images, key=jax.random.key(index), parents=parents)
        losses.append(float(info.loss))
    assert losses[-1] < losses[0]
    assert info.loss >= info.terms["cross_entropy"] + 0.1 * info.terms["affinity"]
    network = built(**sizes)
    nnx.update(network, state.params)
    found = nnx.jit(lambda network: network.parents(images))(network)
    np.testing.assert_array_equal(np.argmax(found, axis=1), parents)


@pytest.mark.parametrize("kind", get_args(acol_pseudo.Other))
def test_other_transformations(kind: str) -> None:
    images = np.random.default_rng(0).random((3, 8, 8, 2), np.float32)
    ways = acol_pseudo._ways(Config(transformations=kind), (8, 8, 2))
    changed = [np.asarray(way(images)) for way in ways]
    assert len(changed) == 8
    for index, one in enumerate(changed):
        assert one.shape == images.shape
        assert all((one != other).any() for other in changed[:index])
    if kind == "permutation":
        np.testing.assert_array_equal(
            np.sort(changed[0].reshape(3, 64, 2), axis=1), np.sort(images.reshape(3, 64, 2), axis=1)
        )
    same = acol_pseudo._affine(np.eye(2), np.zeros(2), images)
    np.testing.assert_allclose(same, images, atol=1e-6)
    down = acol_pseudo._affine(np.eye(2), np.array([1.0, 0.0]), images)
    np.testing.assert_allclose(down[:, :-1], images[:, 1:], atol=1e-6)
    np.testing.assert_allclose(down[:, -1], 0, atol=1e-6)


@pytest.mark.slow
def test_a_run_taught_by_parents(config: Config) -> None:
    (result,) = acol_pseudo.run(replace(config, supervision="parents"))
    assert result.network.num_parents == 2
    assert (config.workdir / "figure6_graphs.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"transformations": (1, 9)},
            "different numbers from 1 to 8",
        ),
        ({"transformations": ()}, "is not accepted"),
        ({"nodes_per_parent": 1}, "nodes_per_parent=1 is not accepted"),
        ({"num_clusters": 51}, "num_clusters=51 exceeds the 50 images"),
        ({"batch_size": 61}, "batch_size=61 exceeds the 60 images"),
        ({"transformations": "squeezing"}, "transformations='squeezing' is not one of scaling"),
        ({"sweep": "width", "num_features": 64}, "num_features is not accepted with sweep='width'"),
        ({"sweep": "transformations", "supervision": "parents"}, "needs supervision='pseudo'"),
    ],
)
def test_bad_options(config: Config, change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        acol_pseudo.run(replace(config, **change))


def test_parents_of_any_labels() -> None:
    split = data.Split(jnp.zeros((4, 8, 8, 1)), np.array([40, 10, 30, 20]))
    parents = acol_pseudo._parents(split)
    assert parents.tolist() == [1, 0, 1, 0]


def test_street_numbers_are_standardised() -> None:
    images = np.random.default_rng(0).integers(0, 256, (20, 4, 4, 3), np.uint8)
    found = np.asarray(acol_pseudo._prepare(data.Split(images[:15], None), "svhn_cropped").images)
    assert found.shape == (15, 4, 4, 3)
    np.testing.assert_allclose(found.mean(axis=(1, 2, 3)), 0, atol=1e-5)
    np.testing.assert_allclose(found.std(axis=(1, 2, 3)), 1, atol=1e-4)


def test_quarter_turns_need_square_images(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", images=np.zeros((9, 6, 8), np.uint8), labels=np.arange(9) % 2)
    config = Config(dataset=str(tmp_path / "x.npz"), workdir=tmp_path / "run", batch_size=9)
    with pytest.raises(ValueError, match="quarter turns change the shape of 6×8 images"):
        acol_pseudo.run(config)


def test_parent_loss_is_the_cross_entropy_of_the_sums() -> None:
    logits = np.random.default_rng(0).standard_normal((8, 6), np.float32)
    parents = np.arange(8) % 3
    probabilities = softmax(logits, axis=1).reshape(8, 2, 3).sum(axis=1)
    expected = -np.mean(np.log(probabilities[np.arange(8), parents]))
    loss = partial(gar.parent_loss, num_parents=3)
    assert float(loss(logits, parents)) == pytest.approx(expected, rel=1e-5)
    split = jax.jit(jax.vmap(partial(loss, axis_name="batch"), axis_name="batch"))
    np.testing.assert_allclose(split(logits.reshape(4, 2, 6), parents.reshape(4, 2)), expected, rtol=1e-5)
    np.testing.assert_allclose(jax.jit(lambda z: loss(z, parents))(logits), expected, rtol=1e-5)
    with pytest.raises(ValueError, match="parents go from 0 to 3; 0 to 2 are accepted"):
        loss(logits, np.arange(8) % 4)
    with pytest.raises(ValueError, match=r"parents must be integers of shape \[8\]"):
        loss(logits, parents[:7])


@pytest.mark.slow
def test_street_numbers_through_tfds(
    config: Config, street_numbers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(acol_pseudo, "_draw", lambda *_: None)
    change = {"dataset": "svhn_cropped", "data_dir": street_numbers, "num_train": None, "num_test": None}
    config = replace(config, **change, batch_size=10, num_clusters=3, epochs=1)
    (result,) = acol_pseudo.run(config)
    assert result.network.image_shape == (32, 32, 3)
    _, _, test = acol_pseudo._load(config)
    codes = np.asarray(result.network.features(test.images))
    clusters = KMeans(3, n_init=10, random_state=0).fit_predict(codes)
    accuracy = 100 * metrics.clustering_accuracy(np.arange(20, 30) % 3, clusters)
    assert result.metrics["clustering_accuracy"] == pytest.approx(accuracy)


def test_parent_loss_of_the_impossible_still_teaches() -> None:
    """A probability that float32 rounds to 0 counts as its logarithm does, with its gradient."""
    loss = partial(gar.parent_loss, parents=np.array([1, 0]), num_parents=2)
    value, gradient = jax.jit(jax.value_and_grad(loss))(np.array([[200, 0], [0, 0]], np.float32))
    np.testing.assert_allclose(value, (200 + np.log(2)) / 2, rtol=1e-6)
    np.testing.assert_allclose(gradient, [[0.5, -0.5], [-0.25, 0.25]], atol=1e-6)


def test_balance_of_small_batches_with_the_energy_of_many() -> None:
    """Forty times ten examples, each at one node: as one batch of 400, gradients too."""
    nodes = np.random.default_rng(0).permutation(np.repeat(np.arange(4), [130, 110, 90, 70]))
    b = np.eye(4, dtype=np.float32)[nodes]
    energy = gar.node_energy(b)
    np.testing.assert_allclose(energy, [0.325, 0.275, 0.225, 0.175], rtol=1e-6)
    value, gradient = jax.value_and_grad(gar.balance)(b)
    small = jax.jit(jax.vmap(jax.value_and_grad(partial(gar.balance, energy=energy))))
    values, gradients = small(b.reshape(40, 10, 4))
    np.testing.assert_allclose(values, value, rtol=1e-6)
    np.testing.assert_allclose(gradients.reshape(400, 4) / 40, gradient, atol=1e-8)
    # A mean over the batch itself changes nothing.
    np.testing.assert_allclose(
        jax.grad(partial(gar.balance, num_parents=2, energy=energy))(b),
        jax.grad(partial(gar.balance, num_parents=2))(b),
        atol=1e-8,
    )


def test_small_batches_and_large() -> None:
    """The rule remembers activity over `balance_over` images; a minibatch of as many needs no memory."""
    images = jax.random.uniform(jax.random.key(0), (12, 8, 8, 1))
    small = partial(acol.rule, (8, 8, 1), nodes_per_parent=3, num_features=8, num_filters=2)

    def first_two(rule: LearningRule) -> tuple[Any, Any]:
        state = rule.init(jax.random.key(1), images)
        update = jax.jit(rule.update)
        state, _ = update(state, images, key=jax.random.key(2))
        return state, update(state, images, key=jax.random.key(3))[1]

    _, alone = first_two(small())
    state, same = first_two(small(balance_over=12))
    _, longer = first_two(small(balance_over=120))
    np.testing.assert_allclose(same.loss, alone.loss, rtol=1e-5)
    assert longer.terms["balance"] != alone.terms["balance"]
    assert state.rest["energy"][...].shape == (24,)
