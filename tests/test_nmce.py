import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiled import compiled
from flax import nnx

from experiments import data, nmce_coil, nmce_images, nmce_manifolds, nmce_spiral
from experiments.common import features, generated, runs, training
from experiments.nmce_spiral import Config
from sul_jax import (
    coding_rate,
    gradient_rule,
    k_subspaces,
    metrics,
    nmce,
    stack,
    subspace_clustering,
    whitening,
)
from sul_jax.nn import MLP, NMCE, ResNet, backbones
from sul_jax.training import Minibatches

CALL = nnx.jit(lambda net, inputs: net(inputs))


def small(workdir: Path, **options: Any) -> Config:
    """A run of seconds."""
    return Config(
        workdir=workdir, steps=4, batch_size=64, hidden_size=16, num_layers=2, num_test=200, **options
    )


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return small(tmp_path / "run")


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, runs.SeedResult]:
    """A run whose results are recorded in the folder above its own."""
    config = small(tmp_path_factory.mktemp("recorded") / "run", record=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "RESULTS", config.workdir.parent)
        (result,) = nmce_spiral.run(config)
    return config, result


def params(result: runs.SeedResult) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(result.network))]


def test_run_leaves_everything_behind(
    recorded: tuple[Config, runs.SeedResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, result = recorded
    monkeypatch.setattr(runs, "RESULTS", config.workdir.parent)
    assert (config.workdir / "figure1_spiral.png").stat().st_size > 1000
    stored = json.loads((config.workdir / "results.json").read_text())
    assert stored == [{"seed": 0, "metrics": result.metrics}]
    (one,) = json.loads((config.workdir.parent / "nmce_spiral.json").read_text())
    assert one["dataset"]["name"] == "spiral"
    assert 50 <= one["metrics"]["clustering_accuracy"] <= 100
    # Nothing is recorded twice.
    nmce_spiral.run(replace(config, resume=True))
    assert len(json.loads((config.workdir.parent / "nmce_spiral.json").read_text())) == 1
    (again,) = nmce_spiral.run(replace(config, workdir=config.workdir.with_name("again"), record=False))
    for first, second in zip(params(result), params(again), strict=True):
        np.testing.assert_array_equal(first, second)


def test_stopped_and_resumed(
    recorded: tuple[Config, runs.SeedResult], config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, whole = recorded
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 0.0)
    stopped = replace(config, workdir=config.workdir.with_name("stopped"))
    save = training.Checkpoints.save

    def save_and_stop(self: training.Checkpoints, position: tuple[int, ...], tree: object) -> None:
        save(self, position, tree)
        if position[0] < config.steps:
            raise KeyboardInterrupt

    monkeypatch.setattr(training.Checkpoints, "save", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        nmce_spiral.run(stopped)
    assert not (stopped.workdir / "results.json").exists()
    monkeypatch.setattr(training.Checkpoints, "save", save)
    (resumed,) = nmce_spiral.run(replace(stopped, resume=True))
    for first, second in zip(params(whole), params(resumed), strict=True):
        np.testing.assert_array_equal(first, second)


def test_spirals_are_mirror_images() -> None:
    points, labels = map(
        np.asarray, compiled(nmce_spiral.spirals)(jax.random.key(0), num_points=2000, noise=0.0)
    )
    radius = np.linalg.norm(points, axis=1)
    assert 4.7 < radius.min() < 4.9
    assert 14.0 < radius.max() < 14.2
    side = 1 - 2 * labels
    np.testing.assert_allclose(points[:, 0] * side, radius * np.cos(radius), atol=1e-3)


@pytest.mark.parametrize("biases", [True, False])
def test_manifolds(tmp_path: Path, biases: bool) -> None:
    config = nmce_manifolds.Config(
        workdir=tmp_path, steps=2, tcr_steps=1, batch_size=64, hidden_size=16, num_layers=1, num_test=100,
        biases=biases,
    )  # fmt: skip
    (result,) = nmce_manifolds.run(config)
    assert 50 <= result.metrics["clustering_accuracy"] <= 100
    drawn = compiled(nmce_manifolds.manifolds)(
        *jax.random.split(jax.random.key(0)),
        num_points=400, num_dimensions=20, num_layers=1, biases=biases,
    )  # fmt: skip
    points, labels = map(np.asarray, drawn)
    for cluster, rank in ((0, 3), (1, 6)):
        own = points[labels == cluster]
        own = own - own.mean(0) if biases else own
        assert np.linalg.matrix_rank(own, rtol=1e-4) == rank
    assert bool(np.linalg.norm(points.mean(0)) > 0.4) == biases


def test_cosines_of_orthogonal_clusters() -> None:
    features = np.repeat(np.eye(2), 5, axis=0)
    labels = np.repeat([0, 1], 5)
    found = generated.evaluate(generated.Embedded(features, labels), labels)
    assert found == {
        "clustering_accuracy": 100, "cosine_true_clusters": 0, "cosine_found_clusters": 0,
        "cosine_within_cluster": 1,
    }  # fmt: skip
    collapsed = generated.evaluate(generated.Embedded(features, np.zeros(10, int)), labels)
    assert collapsed == {"clustering_accuracy": 50, "cosine_true_clusters": 0, "cosine_within_cluster": 0.5}


def test_points_are_fresh_in_every_step_and_features_come_first(config: Config) -> None:
    """A step by hand: data and step key from the seed's, and γ = 0 in the first steps."""
    config = replace(config, steps=60, tcr_steps=5)
    spirals = compiled(nmce_spiral.spirals)
    seen = []

    def sample(seed_key: jax.Array, key: jax.Array, number: int) -> tuple[jax.Array, jax.Array]:
        seen.append(spirals(key, num_points=number, noise=config.noise))
        return seen[-1]

    source = generated.Source("spiral", 2, sample)
    rule = generated.learning_rule(config, 2)
    rule = rule._replace(update=jax.jit(rule.update))
    state, key = rule.init(jax.random.key(3), None), jax.random.key(3)
    for index, weight in ((4, 0.0), (5, 1.0)):
        found, _ = generated._step(config, rule, source, state, jnp.asarray(index), key)
        data_key, step_key = jax.random.split(jax.random.fold_in(key, index))
        points, _ = spirals(data_key, num_points=config.batch_size, noise=config.noise)
        expected, _ = rule.update(state, points, key=step_key, compression_weight=weight)
        for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(one, other, atol=1e-6)
    assert (np.asarray(seen[0][0]) != np.asarray(seen[1][0])).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"eps_squared": 0.0}, "eps_squared=0.0 is not accepted"),
        ({"steps": 0}, "steps=0 is not accepted"),
        ({"noise": -1.0}, "noise=-1.0 is not accepted"),
        ({"tcr_steps": 4}, "tcr_steps=4 leaves no steps of 4 for clusters"),
        ({"learning_rate": 1e30, "steps": 2}, "the loss is not finite"),
    ],
)
def test_bad_options(config: Config, change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        nmce_spiral.run(replace(config, **change))


def test_module_is_normalised() -> None:
    @nnx.jit
    def build() -> NMCE:
        rngs = nnx.Rngs(0)
        return NMCE(MLP(3, 8, num_layers=2, rngs=rngs), 8, num_features=4, num_clusters=3, rngs=rngs)

    net = build()
    x = np.random.default_rng(0).standard_normal((10, 3), np.float32)
    codes, logits = map(np.asarray, CALL(net, x))
    np.testing.assert_allclose(np.linalg.norm(codes, axis=1), 1, rtol=1e-5)
    clusters = nnx.jit(lambda net, x: net.predict(x))(net, x)
    np.testing.assert_array_equal(clusters, np.argmax(logits, axis=1))
    with pytest.raises(ValueError, match="num_layers=0 is not accepted"):
        MLP(3, 8, num_layers=0, rngs=nnx.Rngs(0))


def test_a_coding_rate_layer_on_top_of_k_subspaces() -> None:
    """gradient_rule in a stack, on views of the same vectors, greedy and all at once."""

    def loss(network: nnx.Module, inputs: jax.Array, *, axis_name: str | None = None) -> jax.Array:
        features = network(inputs)
        views = features.reshape(-1, 2, features.shape[-1]).swapaxes(0, 1)
        return coding_rate.tcr_loss(views, eps_squared=0.1, invariance_weight=5.0, axis_name=axis_name)

    def build(rngs: nnx.Rngs) -> nnx.Linear:
        return nnx.Linear(6, 3, use_bias=False, rngs=rngs)

    below = k_subspaces.rule(num_subspaces=6, rank=2)
    net = stack(below, gradient_rule(build, loss, optax.adam(0.02)))
    generator = np.random.default_rng(0)
    clean, noise = (generator.standard_normal((40, number, 8), np.float32) for number in (1, 2))
    inputs = (clean + np.float32(0.05) * noise).reshape(80, 8)
    states = jax.jit(net.init)(jax.random.key(2), inputs)
    losses = []
    update = jax.jit(net.update, static_argnames="layer")
    for _ in range(30):
        states, info = update(states, inputs, layer=1)
        losses.append(float(info.loss))
    assert losses[-1] < losses[0] - 0.1
    assert whitening.normalize(jax.jit(net.encode)(states, inputs)).shape == (80, 3)


@pytest.fixture
def shallow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A ResNet of one block in place of four: what is tested is around the network."""
    monkeypatch.setitem(backbones.RESNET_BLOCKS, 10, (1,))


@pytest.fixture
def objects(tmp_path: Path) -> Path:
    """Three images of noise, each with small changes, as a user's file."""
    kinds = jax.random.uniform(jax.random.key(0), (3, 1, 16, 16))
    images = np.asarray(kinds) + 0.05 * np.asarray(jax.random.normal(jax.random.key(1), (3, 10, 16, 16)))
    path = tmp_path / "objects.npz"
    np.savez(path, images=np.clip(images, 0, 1).reshape(30, 16, 16), labels=np.repeat(np.arange(3), 10))
    return path


@pytest.mark.usefixtures("shallow")
def test_coil(objects: Path, tmp_path: Path) -> None:
    config = nmce_coil.Config(
        dataset=str(objects), workdir=tmp_path / "coil", image_size=12, depth=10, num_filters=4,
        num_pre_features=16, num_features=8, steps=3,
    )  # fmt: skip
    (result,) = nmce_coil.run(config)
    # Three kinds of noise lie far apart, with and without a network that has learned.
    for name in ("clustering_error", "untrained_clustering_error", "pixel_clustering_error"):
        assert result.metrics[name] == 0
    for name in ("clusters", "figure_a3_singular_values"):
        assert (config.workdir / f"{name}.png").stat().st_size > 1000
    # Evaluated again with another number of clusters: nothing is trained anew.
    (again,) = nmce_coil.run(replace(config, resume=True, num_clusters=4))
    for first, second in zip(params(result), params(again), strict=True):
        np.testing.assert_array_equal(first, second)
    assert not nmce_coil._paper(nmce_coil.Filled(**{**vars(config), "num_clusters": 20}))
    with pytest.raises(ValueError, match="num_clusters=31 exceeds the 30 images"):
        nmce_coil.run(replace(config, num_clusters=31))
    with pytest.raises(data.DataError, match="coil20 is not in the data directory"):
        nmce_coil.run(replace(config, dataset="coil20", data_dir=tmp_path))


def test_errors_of_coil_are_the_papers_in_its_own_setting() -> None:
    filled = nmce_coil.Filled(num_clusters=20, seeds=3, workdir=Path("elsewhere"))
    assert nmce_coil._paper(filled) == {"clustering_error": 0.0}
    for change in ({"depth": 10}, {"image_size": 32}, {"num_clusters": 21}, {"dataset": "coil100"}):
        assert not nmce_coil._paper(replace(filled, **change))


@pytest.mark.slow
@pytest.mark.usefixtures("shallow")
def test_images_in_three_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "_DRAWS", 2)
    generator = np.random.default_rng(0)
    kinds = generator.random((3, 1, 8, 8, 3), np.float32)
    images = kinds + np.float32(0.05) * generator.standard_normal((3, 6, 8, 8, 3), np.float32)
    images = images.clip(0, 1)
    np.savez(tmp_path / "x.npz", images=images.reshape(18, 8, 8, 3), labels=np.repeat(np.arange(3), 6))
    config = nmce_images.Config(
        dataset=str(tmp_path / "x.npz"), workdir=tmp_path / "images", depth=10, num_filters=4,
        num_pre_features=16, num_features=8, batch_size=9, epochs=(1, 1, 1), num_views=2, seed=3,
    )  # fmt: skip
    (first,) = nmce_images.run(replace(config, stage=1, judge_features=True))
    assert {"knn_accuracy", "svm_proj", "nearest_subspace_pool_2_views"} <= set(first.metrics)
    assert "clustering_accuracy" not in first.metrics
    (last,) = nmce_images.run(replace(config, resume=True))
    # Stage 2 anew on the same features, with another decay.
    borrowed = replace(
        config, features_from=config.workdir, stage=2, weight_decays=(0, 0.1, 0), workdir=tmp_path / "again"
    )
    (other,) = nmce_images.run(borrowed)
    assert "clustering_accuracy_stage2" in other.metrics
    assert "knn_accuracy" not in other.metrics
    both = (
        NMCE.load(folder)
        for folder in (config.workdir / "network-seed3-stage1", *borrowed.workdir.glob("network*"))
    )
    backbones = [jax.tree.leaves(nnx.state(network.backbone, nnx.Param)) for network in both]
    for one, same in zip(*backbones, strict=True):
        np.testing.assert_array_equal(one, same)
    with pytest.raises(ValueError, match="has other sizes"):
        nmce_images.run(replace(borrowed, num_filters=2, workdir=tmp_path / "wrong"))
    assert {"clustering_accuracy_stage2", "adjusted_rand_index"} <= set(last.metrics)
    for name in ("clusters", "figure2", "figure_a1_few_labels", "figure_a2_covariance", "knn"):
        assert (config.workdir / f"{name}.png").stat().st_size > 1000


def test_one_set_of_images_is_not_judged_on_itself(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", images=np.arange(40, dtype=np.uint8).reshape(10, 2, 2), labels=np.arange(10))
    config = nmce_images.Config(num_images=9)
    splits = nmce_images._splits(data.load(str(tmp_path / "x.npz")), config)
    assert splits.images.shape == (9, 2, 2, 1)
    assert splits.judge is not None
    known, asked = splits.judge
    assert (asked.labels.tolist(), known.labels.tolist()) == ([0, 5], [1, 2, 3, 4, 6, 7, 8])
    np.savez(tmp_path / "wide.npz", images=np.full((9, 4, 4, 3), 2.0), labels=np.arange(9))
    for experiment in (nmce_images, nmce_coil):
        wide = experiment.Config(dataset=str(tmp_path / "wide.npz"), workdir=tmp_path / "run")
        with pytest.raises(data.DataError, match=r"must be in \[0, 1\], not 2 to 2"):
            experiment.run(wide)


def test_sweep_over_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fake(config: nmce_images.Config, *_: object) -> tuple:
        return None, {"knn_accuracy": config.invariance_weights[0]}, 1.0

    monkeypatch.setattr(nmce_images, "_run_seed", fake)
    config = nmce_images.Config(
        dataset="digits", workdir=tmp_path, batch_size=10, sweep=(20.0, 30.0), seeds=2
    )
    found = nmce_images.run(config)
    assert [result.metrics["knn_accuracy"] for result in found] == [20, 20, 30, 30]
    assert (tmp_path / "table_a3.png").exists()
    assert (tmp_path / "lambda-30" / "results.json").exists()


def test_clipped_trust_against_plain_numpy() -> None:
    """Of a steep tensor the trust ratio counts, of a flat one the plain gradient."""
    weights = {"steep": np.array([[3.0, 4.0]]), "flat": np.array([[3.0, 4.0]])}
    gradients = {"steep": np.array([[60.0, 80.0]]), "flat": np.array([[0.0, 1e-3]])}
    change = nmce.clipped_trust(lambda _: 0.5, trust_coefficient=0.02, weight_decay=0.1)
    found, _ = jax.jit(change.update)(gradients, change.init(weights), weights)
    for name, clip in (("steep", 0.02 * 5 / (100 + 0.1 * 5) / 0.5), ("flat", 0.02 * 5 / (1e-3 + 0.5) / 0.5)):
        expected = (gradients[name] + 0.1 * weights[name]) * min(1, clip)
        np.testing.assert_allclose(found[name], expected, rtol=1e-5)


class Halves(nnx.Module):
    """Takes the first four numbers for the embedding, the others for logits."""

    def __init__(self, rngs: nnx.Rngs):
        self.scale = nnx.Param(jnp.ones(()))

    def __call__(self, inputs: jax.Array) -> tuple[jax.Array, jax.Array]:
        return self.scale * inputs[:, :4], inputs[:, 4:]


def test_losses_of_the_stages() -> None:
    """Logits so far apart that no noise changes the memberships."""
    memberships = np.tile(np.eye(3, dtype=np.float32)[np.arange(20) % 3], (2, 1, 1))
    features = np.random.default_rng(0).standard_normal((2, 20, 4), np.float32)
    both = np.concatenate([features, 1000 * memberships], axis=2)
    weights = {"eps_squared": 0.1, "invariance_weight": 3.0}

    def found(**options: bool) -> jax.Array:
        rule = nmce.rule(Halves, views=lambda key, x: both, optimizer=optax.sgd(0.1), **weights, **options)
        return rule.update(rule.init(jax.random.key(0), None), both[0], key=jax.random.key(1))[1].loss

    @jax.jit
    def pairs() -> Any:
        tcr, whole = partial(coding_rate.tcr_loss, **weights), partial(coding_rate.nmce_loss, **weights)
        return (
            (found(clusters=False), tcr(features)),
            (found(clusters=False, average_views=False), tcr(features, average_views=False)),
            (found(), whole(features, memberships)),
        )

    for ours, expected in pairs():
        np.testing.assert_allclose(ours, expected, rtol=1e-5)


@pytest.mark.usefixtures("shallow")
def test_second_stage_trains_the_heads() -> None:
    """In lower precision, with parameters and loss in float32."""
    config = nmce_images.Config(
        depth=10, num_filters=2, num_pre_features=8, num_features=4, num_clusters=2, batch_size=4,
        epochs=(1, 1, 1), precision="bfloat16",
    )  # fmt: skip
    images = np.random.default_rng(0).random((8, 8, 8, 3), np.float32)
    filled = nmce_images.fill_in(config, images.shape, None)
    rule = nmce_images.learning_rule(filled, 2, nmce_images.build(filled, 0, 3), len(images))
    before = rule.init(jax.random.key(0), None)
    batch = jax.tree.map(lambda leaf: leaf[0], Minibatches(jax.random.key(0), len(images), 4)(0, 1))
    after, info = jax.jit(partial(nmce_images.training_step, rule))(before, batch, images)
    assert np.isfinite(info.loss)
    assert info.loss.dtype == np.float32
    assert set(after.params) == {"feature_head", "cluster_head"}
    for one, other in zip(jax.tree.leaves(before.params), jax.tree.leaves(after.params), strict=True):
        assert one.dtype == other.dtype
        assert (np.asarray(one) != np.asarray(other)).any()
    # The backbone stays to the last bit, but for its statistics.
    kept = [jax.tree.leaves(nnx.filter_state(state.rest, nnx.Param)) for state in (before, after)]
    moved = [jax.tree.leaves(nnx.filter_state(state.rest, nnx.BatchStat)) for state in (before, after)]
    for one, other in zip(*kept, strict=True):
        np.testing.assert_array_equal(one, other)
    for one, other in zip(*moved, strict=True):
        assert one.dtype == other.dtype
        assert (np.asarray(one) != np.asarray(other)).any()


def test_defaults_are_the_papers_for_the_data_set_and_the_depth() -> None:
    stl = nmce_images.fill_in(nmce_images.Config(dataset="stl10", depth=34), (1, 96, 96, 3), 10)
    assert (stl.stem, stl.augmentation, stl.epochs) == ("5x5", "imagenet", (2000, 400, 400))
    cifar = nmce_images.fill_in(nmce_images.Config(weight_decays=(0, 0, 0)), (1, 32, 32, 3), 10)
    assert (cifar.stem, cifar.invariance_weights, cifar.weight_decays) == ("3x3", (50, 50, 50), (0, 0, 0))
    assert cifar.num_clusters == 10
    assert nmce_images._paper(nmce_images.fill_in(nmce_images.Config(), (1, 32, 32, 3), 10))
    assert not nmce_images._paper(cifar)
    with pytest.raises(ValueError, match="num_clusters is needed"):
        nmce_images.fill_in(nmce_images.Config(), (1, 32, 32, 3), None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stage": 4}, "stage=4 is not accepted: it must be between 1 and 3"),
        ({"epochs": (1, 0, 1)}, "epochs=\\(1, 0, 1\\) is not accepted"),
        ({"batch_size": 10**6}, "batch_size=1000000 exceeds the 1797 images"),
        ({"depth": 11}, "depth=11 is not accepted"),
        ({"stage": 1, "features_from": Path("run")}, "features_from skips stage 1: it cannot"),
        ({"eps_squared": 0.0}, "eps_squared=0.0 is not accepted"),
    ],
)
def test_bad_options_of_images(tmp_path: Path, change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        nmce_images.run(nmce_images.Config(dataset="digits", workdir=tmp_path, **change))


@pytest.mark.parametrize("l1_ratio", [1.0, 0.7])
def test_subspace_clustering_finds_planted_subspaces(l1_ratio: float) -> None:
    generator = np.random.default_rng(0)
    points = [generator.normal(size=(30, 2)) @ generator.normal(size=(2, 8)) for _ in range(3)]
    features = np.concatenate(points)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    options = {"gamma": 50, "l1_ratio": l1_ratio, "num_candidates": 20}
    coefficients = subspace_clustering.self_expression(features, **options)
    np.testing.assert_allclose(np.linalg.norm(coefficients, axis=1), 1)
    assert not np.diag(coefficients).any()
    found = subspace_clustering.fit(features, num_clusters=3, **options)
    assert metrics.clustering_error(np.repeat(np.arange(3), 30), found.labels) == 0


def test_the_sparsest_graph_that_is_whole_enough() -> None:
    generator = np.random.default_rng(0)
    points = [generator.normal(size=(30, 3)) @ generator.normal(size=(3, 12)) for _ in range(3)]
    features = np.concatenate(points).astype(np.float32)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    # By how many parts the graphs fall into: 32, 7, 3, 3.
    gammas = (50, 1.001, 3, 1.5)
    found = subspace_clustering.fit(features, num_clusters=3, gamma=gammas)
    assert (found.gamma, found.num_parts) == (3, 3)
    assert metrics.clustering_error(np.repeat(np.arange(3), 30), found.labels) == 0


def test_coefficients_are_those_of_the_support_they_were_fitted_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted subspaces are found too when the rounds run out before every violation is mended."""
    monkeypatch.setattr(subspace_clustering, "_ACTIVE_SET_ROUNDS", 1)
    test_subspace_clustering_finds_planted_subspaces(1.0)


@pytest.mark.parametrize(("depth", "number"), [(18, 11_168_832), (34, 21_276_992)])
def test_resnets_have_the_published_size(depth: int, number: int) -> None:
    """torchvision's ResNets with a 3×3 stem and without the classifier."""
    net = nnx.eval_shape(lambda: ResNet(depth, num_pre_features=None, rngs=nnx.Rngs(0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(net, nnx.Param))) == number


def test_resnet_in_lower_precision_stays_there() -> None:
    net = nnx.eval_shape(lambda: ResNet(10, num_filters=2, num_pre_features=None, rngs=nnx.Rngs(0)))
    graph, params, statistics = nnx.split(net, nnx.Param, nnx.BatchStat)

    def features(params: Any, statistics: Any) -> Any:
        low = nnx.merge(graph, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params), statistics)
        low.train()
        return low(jnp.zeros((4, 8, 8, 3), jnp.bfloat16)), nnx.state(low, nnx.BatchStat)

    found, after = jax.eval_shape(features, params, statistics)
    assert found.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(after)} == {jnp.dtype("float32")}


@pytest.mark.parametrize("stem", ["3x3", "5x5"])
def test_resnet_in_evaluation_does_not_depend_on_the_batch(stem: str) -> None:
    net = ResNet(10, channels=1, num_filters=4, stem=stem, num_pre_features=8, rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).random((6, 16, 16, 1), np.float32)
    net.train()
    CALL(net, x)
    net.eval()

    @nnx.jit
    def both(net: ResNet, x: jax.Array) -> Any:
        hidden = jax.nn.relu(net.stem_norm(net.stem(x)))
        if stem == "5x5":
            window = (3, 3), (2, 2), ((1, 1), (1, 1))
            hidden = nnx.max_pool(hidden, *window)  # type: ignore[no-untyped-call]
        for block in net.blocks:
            hidden = block(hidden)
        return net(x), jax.nn.relu(net.pre_norm(net.pre_features(hidden.mean(axis=(1, 2)))))

    found, expected = map(np.asarray, both(net, x))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert found.shape == (6, net.num_features)
    np.testing.assert_allclose(found[:2], CALL(net, x[:2]), atol=1e-5)
    with pytest.raises(ValueError, match="depth=11 is not accepted"):
        ResNet(11, rngs=nnx.Rngs(0))
