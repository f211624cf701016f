import json
from dataclasses import replace
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
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from sklearn.decomposition import PCA
from sklearn.metrics import normalized_mutual_info_score
from sklearn.preprocessing import normalize

from experiments import data, deepcluster, deepcluster_alignment
from experiments.common import deep_cluster as common
from experiments.common import runs, training
from experiments.common.options import ConfigError
from experiments.deepcluster import Config
from sul_jax import deep_cluster, nn, probes
from sul_jax.nn import convnets

BALANCED = jax.jit(deep_cluster.balanced_indices, static_argnames=("num_clusters", "num_samples"))
PREPROCESS = compiled(deep_cluster.preprocess)
PSEUDO_LABELS = compiled(deep_cluster.pseudo_labels)


@partial(jax.jit, static_argnames="number")
def _blobs(number: int) -> jax.Array:
    centres = 5 * jax.random.normal(jax.random.key(0), (3, 8))
    return centres[np.arange(number) % 3] + 0.1 * jax.random.normal(jax.random.key(1), (number, 8))


def blobs(number: int = 60) -> tuple[jax.Array, np.ndarray]:
    return _blobs(number), np.arange(number) % 3


@partial(nnx.jit, static_argnames="use_sobel")
def alexnet(use_sobel: bool | str = True) -> nn.AlexNet:
    return nn.AlexNet(use_sobel=use_sobel, rngs=nnx.Rngs(0))


@nnx.jit
def lenet() -> nn.LeNet5:
    return nn.LeNet5(rngs=nnx.Rngs(0))


def test_preprocess_is_that_of_scikit_learn() -> None:
    draw = np.random.default_rng(0).standard_normal
    x = np.float32(draw((200, 9)) @ draw((9, 9)))
    expected = normalize(PCA(4, whiten=True, svd_solver="full").fit_transform(np.float64(x)))
    got = PREPROCESS(x, num_components=4)
    np.testing.assert_allclose(np.abs(got), np.abs(expected), atol=2e-3)
    np.testing.assert_allclose(PREPROCESS(x), normalize(x), atol=1e-6)


def test_preprocess_of_features_without_variance() -> None:
    x = np.concatenate([blobs()[0], np.full((60, 2), 3, np.float32)], axis=1)
    assert np.isfinite(PREPROCESS(x, num_components=10)).all()
    for constant in (1.0, 3.3):  # the mean of the latter is rounded
        assert not np.any(PREPROCESS(np.full((1000, 5), constant, np.float32), num_components=2))
    assert not np.any(PREPROCESS(np.zeros((5, 3), np.float32)))


def test_pseudo_labels_find_blobs_and_are_those_of_the_whole_batch() -> None:
    x, labels = blobs()
    found = PSEUDO_LABELS(jax.random.key(0), x, num_clusters=3)
    assert normalized_mutual_info_score(labels, found) == pytest.approx(1)
    find = partial(deep_cluster.pseudo_labels, jax.random.key(0), num_clusters=3, axis_name="b")
    sharded = jax.jit(jax.vmap(find, axis_name="b"))(np.asarray(x).reshape(6, 10, 8))
    np.testing.assert_array_equal(np.ravel(sharded), found)


@settings(max_examples=30)
@given(st.integers(0, 10**6), st.sampled_from([(40, 3, 40), (40, 7, 25), (5, 9, 30)]))
def test_balanced_indices(seed: int, sizes: tuple[int, int, int]) -> None:
    batch, clusters, samples = sizes
    # Uneven clusters, some of them empty.
    random = np.random.default_rng(seed)
    weights = np.exp(3 * random.standard_normal(clusters))
    labels = random.choice(clusters, batch, p=weights / weights.sum()).astype(np.int32)
    indices = np.asarray(BALANCED(jax.random.key(seed), labels, num_clusters=clusters, num_samples=samples))
    assert indices.shape == (samples,)
    counts = np.bincount(labels[indices], minlength=clusters)
    filled = np.bincount(labels, minlength=clusters) > 0
    assert not counts[~filled].any()
    assert np.ptp(counts[filled]) <= 1
    share = -(-samples // filled.sum())
    for cluster in np.flatnonzero(np.bincount(labels, minlength=clusters) >= share):
        drawn = indices[labels[indices] == cluster]
        assert len(set(drawn.tolist())) == len(drawn)


def test_balanced_indices_are_in_random_order_and_reach_every_example() -> None:
    labels = np.repeat(np.arange(2), 50)
    indices = BALANCED(jax.random.key(0), labels, num_clusters=2, num_samples=100)
    assert sorted(indices.tolist()) == list(range(100))
    assert 0.3 < np.mean(labels[indices][:50]) < 0.7


def test_balanced_indices_of_a_cluster_just_below_its_share() -> None:
    """Three of seven examples go round once and a half: none of another cluster takes the place."""
    labels = np.array([0] * 3 + [1] * 8)
    for seed in range(5):
        indices = np.asarray(BALANCED(jax.random.key(seed), labels, num_clusters=2, num_samples=7))
        small, large = (indices[labels[indices] == cluster].tolist() for cluster in range(2))
        assert (len(small), len(large), len(set(large))) == (4, 3, 3)


def test_initial_alignment() -> None:
    x, labels = blobs()
    assert deep_cluster.initial_alignment(jax.random.key(0), x, labels, num_clusters=3) == pytest.approx(1)
    ready = PREPROCESS(x, num_components=3)
    found = PSEUDO_LABELS(jax.random.key(0), ready, num_clusters=5)
    got = deep_cluster.initial_alignment(jax.random.key(0), x, labels, num_clusters=5, num_components=3)
    assert got == pytest.approx(normalized_mutual_info_score(labels, found))


def test_initial_alignment_is_that_of_the_clusters_found_with_its_options() -> None:
    x, labels = blobs()
    x = x + 5 * np.random.default_rng(2).standard_normal(x.shape, np.float32)
    own: list[float] = []
    for init, empty_clusters, tolerance in (("k-means++", "relocate", 1e-4), ("random", "split", 0.0)):
        options = {"init": init, "empty_clusters": empty_clusters, "tolerance": tolerance}
        found = compiled(deep_cluster.feature_clusters)(
            jax.random.key(0), x, num_clusters=20, num_components=3, **options
        )
        ready = PREPROCESS(x, num_components=3)
        again = PSEUDO_LABELS(jax.random.key(0), ready, num_clusters=20, **options)
        np.testing.assert_array_equal(found, again)
        own.append(
            deep_cluster.initial_alignment(
                jax.random.key(0), x, labels, num_clusters=20, num_components=3, **options
            )
        )
        assert own[-1] == pytest.approx(normalized_mutual_info_score(labels, found))
    assert own[0] != own[1]


def test_initial_alignment_refuses_values_that_are_not_finite() -> None:
    x, labels = blobs()
    with pytest.raises(ValueError, match="features holds NaN"):
        deep_cluster.initial_alignment(jax.random.key(0), x.at[0, 0].set(jnp.nan), labels, num_clusters=3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: deep_cluster.preprocess(x, num_components=9), "num_components=9 is not accepted"),
        (lambda x: deep_cluster.preprocess(x.at[0, 0].set(jnp.nan)), "features holds NaN"),
        (lambda x: deep_cluster.preprocess(x[0]), "features must have shape"),
        (lambda x: deep_cluster.preprocess(x, num_components=9), "num_components=9 .* there are 8 features"),
        (
            lambda x: deep_cluster.pseudo_labels(jax.random.key(0), x * jnp.nan, num_clusters=2),
            "features holds NaN",
        ),
        (
            lambda x: deep_cluster.balanced_indices(
                jax.random.key(0), jnp.array([0, 5]), num_clusters=2, num_samples=3
            ),
            "labels go from 0 to 5; 0 to 1 are accepted",
        ),
        (lambda _: alexnet()(np.ones((2, 32, 32, 1), np.float32)), "images must have shape"),
        (
            lambda x: deep_cluster.pseudo_labels(jax.random.key(0), x, num_clusters=61),
            "num_clusters=61 .* 60 vectors",
        ),
        (
            lambda x: deep_cluster.balanced_indices(
                jax.random.key(0), jnp.zeros(0, int), num_clusters=2, num_samples=3
            ),
            "labels must be a vector of at least one",
        ),
        (
            lambda x: deep_cluster.balanced_indices(
                jax.random.key(0), jnp.zeros(4, int), num_clusters=2, num_samples=0
            ),
            "num_samples=0",
        ),
    ],
)
def test_bad_input(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(blobs()[0])


def test_sobel_is_scipys() -> None:
    x = np.random.default_rng(0).random((2, 9, 8, 3)).astype(np.float32)
    got = nn.sobel(jnp.asarray(x))
    for image, found in zip(x.mean(-1), got, strict=True):
        for axis, channel in ((1, 0), (0, 1)):
            expected = -ndimage.sobel(image, axis=axis, mode="constant")
            np.testing.assert_allclose(found[..., channel], expected, atol=1e-5)


def test_random_filters_below_the_network_stay_as_they_are() -> None:
    net = alexnet("random")
    images = np.random.default_rng(0).standard_normal((2, 32, 32, 3), np.float32)
    grey, edges = np.asarray(net.grey[...]), np.asarray(net.edges[...])
    filtered = [
        np.stack([ndimage.correlate(image @ grey, edges[..., i], mode="constant") for i in range(2)], -1)
        for image in images
    ]
    found, expected = nnx.jit(
        lambda net, x, filtered: (net.layers(x)["conv_1"], net.convolutions[0](filtered))
    )(net, images, np.stack(filtered))
    np.testing.assert_allclose(found, expected, atol=1e-4)
    learned = nnx.state(net, nnx.Param)
    assert "grey" not in learned
    assert "edges" not in learned
    assert len(nnx.state(net, convnets.Fixed)) == 2

    @jax.jit
    @jax.vmap
    def draw(seed: jax.Array) -> jax.Array:
        net = nn.LeNet5(channels=3, use_sobel="random", rngs=nnx.Rngs(jax.random.key(seed)))
        return jnp.concatenate([net.grey[...], net.edges[...].ravel()])

    drawn = np.asarray(draw(np.arange(100)))
    np.testing.assert_allclose(drawn[:, :3].std(), 2**0.5, rtol=0.1)
    np.testing.assert_allclose(drawn[:, 3:].std(), 1 / 3, rtol=0.1)
    with pytest.raises(ValueError, match="use_sobel='sobel' is not accepted"):
        nn.LeNet5(use_sobel="sobel", rngs=nnx.Rngs(0))  # type: ignore[arg-type]


def test_networks_have_the_published_sizes() -> None:
    net = nnx.eval_shape(lenet)
    layers = nnx.eval_shape(lambda x: lenet().layers(x), jnp.ones((1, 32, 32, 1)))
    assert layers["conv_2"].shape == (1, 10, 10, 16)
    # 6·25 + 16·150 weights, 400·120 and 120·84, biases and normalisation.
    expected = 150 + 2400 + 48_000 + 10_080 + (6 + 16) * 3 + 120 + 84
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(net, nnx.Param))) == expected
    layers = nnx.eval_shape(lambda x: alexnet().layers(x), jnp.ones((1, 32, 32, 3)))
    assert layers["relu_5"].shape == (1, 2, 2, 128)
    original = nnx.eval_shape(lambda: nn.AlexNet("original", rngs=nnx.Rngs(0)))
    assert original.hidden[0].kernel.shape == (256 * 6 * 6, 4096)
    with pytest.raises(ValueError, match="variant='big' is not accepted"):
        nn.AlexNet("big", rngs=nnx.Rngs(0))  # type: ignore[arg-type]


def test_evaluation_does_not_depend_on_the_batch_and_dropout_on_the_key() -> None:
    net, call = alexnet(), nnx.jit(lambda net, x, key: net(x, key=key))
    x = np.random.default_rng(0).random((6, 32, 32, 3), np.float32)
    net.eval()
    np.testing.assert_allclose(call(net, x, None)[:2], call(net, x[:2], None), atol=1e-5)
    # Untrained statistics change nothing.
    layers = nnx.jit(lambda net, x: net.layers(x))(net, x)
    np.testing.assert_allclose(layers["relu_1"], np.maximum(layers["conv_1"], 0), rtol=1e-4, atol=1e-5)
    one, other = (call(net, x, jax.random.key(k)) for k in (0, 1))
    assert not np.allclose(one, other)


def test_units_on_top_of_the_convolutions() -> None:
    x = np.random.default_rng(0).random((3, 32, 32, 1), np.float32)

    @nnx.jit
    def both(net: nn.LeNet5, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        maps = net.layers(x)["relu_2"]
        pooled = nnx.max_pool(maps, (2, 2), (2, 2)).reshape(3, -1)  # type: ignore[no-untyped-call]
        first, second = net.hidden
        return net(x), second(jax.nn.relu(first(pooled)))

    found, expected = both(lenet(), x)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


class Tiny(nnx.Module):
    num_features = 2

    def __init__(self, rngs: nnx.Rngs):
        self.layer = nnx.Linear(3, 2, rngs=rngs)


def test_a_new_head_has_learned_nothing_and_the_rest_stays() -> None:
    rule = deep_cluster.rule(Tiny, num_clusters=50)
    old = jax.tree.map(lambda leaf: leaf + 1, jax.jit(rule.init)(jax.random.key(0), None))
    new = deep_cluster.new_head(jax.random.key(1), old)
    kernel, bias = new.params["head"]["kernel"][...], new.params["head"]["bias"][...]
    assert abs(np.std(kernel) / 0.01 - 1) < 0.2
    assert abs(np.mean(kernel)) < 0.005
    assert not np.any(bias)
    before, after = (
        {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(state)}
        for state in (old, new)
    )
    of_head = {name for name in before if "head" in name}
    assert len(of_head) == 4  # kernel and bias, and their momentum
    for name, leaf in after.items():
        if name not in of_head:
            np.testing.assert_array_equal(leaf, before[name])
        elif "optimizer" in name:
            assert not np.any(leaf)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """A run of seconds."""
    return Config(
        dataset="digits", workdir=tmp_path / "run", num_train=128, num_test=64, cycles=3, batch_size=32,
        num_clusters=4, probe_epochs=2,
    )  # fmt: skip


def leaves(result: runs.SeedResult) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(result.network))]


def probed(config: Config, network: nn.LeNet5 | nn.AlexNet, layer: str, converged: bool = False) -> float:
    """The accuracy of seed 0's linear probe of a layer."""
    dataset = data.load(config.dataset, config.data_dir)
    train = common.prepare(dataset.train[: config.num_train])
    test = common.prepare(dataset.test[: config.num_test], train.scale)
    seen, unseen = (common.features(network, split.seen, layer) for split in (train, test))
    labels = train.labels, test.labels
    told = jax.random.key(0), seen, labels[0], unseen, labels[1]
    if converged:
        return probes.logistic_regression(*told)
    return probes.linear_probe(*told, num_epochs=config.probe_epochs)


def test_run_leaves_everything_behind(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "RESULTS", config.workdir.parent)
    (result,) = deepcluster.run(replace(config, record=True, probe_every=1, every_layer=True))
    for name in ("cycles", "clusters"):
        assert (config.workdir / f"{name}.png").stat().st_size > 1000
    (one,) = json.loads((config.workdir.parent / "deepcluster.json").read_text())
    assert one["config"]["architecture"] == "lenet5"
    untrained, accuracies = nn.LeNet5(rngs=nnx.Rngs(0)), one["metrics"]
    for name, network, layer in (
        ("probe_accuracy", result.network, "conv_2"),
        ("probe_accuracy_relu_1", result.network, "relu_1"),
        ("random_probe_accuracy", untrained, "conv_2"),
    ):
        assert accuracies[name] == pytest.approx(probed(config, network, layer), abs=1e-3)
    name, converged = "converged_probe_accuracy_relu_1", probed(config, result.network, "relu_1", True)
    assert accuracies[name] == pytest.approx(converged, abs=1e-3)
    assert accuracies["converged_probe_accuracy"] > 50 < accuracies["random_converged_probe_accuracy"]
    # Same seed, same result, also after an interruption.
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 0.0)
    stopped = replace(config, workdir=config.workdir.with_name("stopped"), probe_every=1)
    save = training.Checkpoints.save

    def save_and_stop(self: training.Checkpoints, position: tuple[int, ...], tree: object) -> None:
        save(self, position, tree)
        if position == (2,):
            raise KeyboardInterrupt

    monkeypatch.setattr(training.Checkpoints, "save", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        deepcluster.run(stopped)
    monkeypatch.setattr(training.Checkpoints, "save", save)
    (resumed,) = deepcluster.run(replace(stopped, resume=True))
    for first, second in zip(leaves(result), leaves(resumed), strict=True):
        np.testing.assert_array_equal(first, second)
    assert {"probe_accuracy", "converged_probe_accuracy"} <= set(resumed.metrics)
    for name in set(resumed.metrics) - {"training_seconds"}:
        assert resumed.metrics[name] == result.metrics[name], name


@pytest.mark.slow
def test_seeds_together_are_the_seeds_alone(config: Config) -> None:
    config = replace(config, seeds=2, cycles=2, halt=1)
    alone = deepcluster.run(config)
    together = deepcluster.run(
        replace(config, seeds_together=2, workdir=config.workdir.with_name("together"))
    )
    for one, other in zip(alone, together, strict=True):
        for first, second in zip(leaves(one), leaves(other), strict=True):
            np.testing.assert_allclose(first, second, atol=1e-3)


@pytest.mark.parametrize("augmentation", ["code", "crops", "text"])
def test_augmentation_keeps_images_apart(augmentation: str) -> None:
    shades = np.linspace(0, 1, 6, dtype=np.float32).reshape(3, 1, 1, 2)
    images = np.broadcast_to(shades, (3, 32, 32, 2))
    transform = jax.jit(partial(deepcluster.transform, augmentation))
    found = transform(jax.random.key(0), images)
    np.testing.assert_allclose(found, images, atol=1e-6)


def test_halted_clusters_stay(config: Config, tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (200, 28, 28), np.uint8)
    np.savez(tmp_path / "plain.npz", images=images)
    config = replace(config, dataset=str(tmp_path / "plain.npz"))
    (result,) = deepcluster.run(replace(config, halt=1, fresh_head=False, augmentation="text"))
    assert "probe_accuracy" not in result.metrics  # there are no labels
    lines = [json.loads(line) for line in (config.workdir / "metrics.jsonl").read_text().splitlines()]
    changes = [line["cluster_change_nmi"] for line in lines if "cluster_change_nmi" in line]
    np.testing.assert_allclose(changes[:2], 1)


@pytest.mark.slow
def test_street_numbers_through_tfds_take_alexnet(street_numbers: Path, config: Config) -> None:
    config = replace(
        config, dataset="svhn_cropped", data_dir=street_numbers, num_components=5, cycles=1,
        batch_size=10, num_train=None, num_test=None,
    )  # fmt: skip
    (result,) = deepcluster.run(config)
    assert isinstance(result.network, nn.AlexNet)
    assert result.network.use_sobel == "random"
    before = nn.AlexNet(use_sobel="random", rngs=nnx.Rngs(0))  # not compiled, as in a run: the same bits
    chex.assert_trees_all_equal(*(nnx.state(net, convnets.Fixed) for net in (result.network, before)))
    assert result.metrics["probe_accuracy"] == pytest.approx(probed(config, result.network, "relu_5"))


def test_alignment_experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "RESULTS", tmp_path)
    config = deepcluster_alignment.Config(
        dataset="digits", workdir=tmp_path / "run", num_networks=3, num_train=200, record=True
    )
    (result,) = deepcluster_alignment.run(config)
    assert result.network.shape == (3,)
    assert 0 < result.metrics["initial_alignment_mean"] < 1
    assert (config.workdir / "figure6_alignment.png").stat().st_size > 1000
    (one,) = json.loads((tmp_path / "deepcluster_alignment.json").read_text())
    assert one["metrics"]["initial_alignment_std"] == result.metrics["initial_alignment_std"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sweep", "values", "pictures"),
    [("clusters", (2, 4), ("figure3_alignment", "figure4_clusters")), ("halt", (1, 2), ("figure5_halting",))],
)
def test_sweep(config: Config, sweep: str, values: tuple[int, ...], pictures: tuple[str, ...]) -> None:
    own = {"num_clusters": None, "seeds": 2} if sweep == "clusters" else {}
    found = deepcluster.run(replace(config, sweep=sweep, sweep_values=values, cycles=2, **own))
    assert [result.seed for result in found] == ([0, 1, 0, 1] if sweep == "clusters" else [0, 0])
    for name in pictures:
        assert (config.workdir / f"{name}.png").stat().st_size > 1000
    stored = json.loads((config.workdir / "sweep.json").read_text())
    option = "num_clusters" if sweep == "clusters" else "halt"
    # Halting at the last cycle is not halting.
    assert [one[option] for one in stored] == ([2, 2, 4, 4] if sweep == "clusters" else [1, None])


@pytest.mark.slow
def test_sweep_of_alignments(tmp_path: Path) -> None:
    config = deepcluster_alignment.Config(
        dataset="digits",
        workdir=tmp_path,
        num_networks=2,
        num_train=200,
        sweep="clusters",
        sweep_values=(3, 9),
    )
    few, many = deepcluster_alignment.run(config)
    assert few.metrics["initial_alignment_mean"] < many.metrics["initial_alignment_mean"]
    for name in ("figure6_clusters", "num_clusters-3/figure2_features"):
        assert (tmp_path / f"{name}.png").stat().st_size > 1000
    with pytest.raises(ConfigError, match="num_clusters is not accepted with sweep='clusters'"):
        deepcluster_alignment.run(replace(config, num_clusters=3))
    with pytest.raises(ConfigError, match=r"sweep_values=\(\) is not accepted"):
        deepcluster_alignment.run(replace(config, sweep_values=()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sweep": "clusters"}, "num_clusters is not accepted with sweep='clusters'"),
        ({"sweep": "halt", "sweep_values": (1, 1)}, r"sweep_values=\(1, 1\) is not accepted"),
        ({"sweep": "halt", "sweep_values": (1, 4)}, "halt=4 is not accepted: the run has 3 cycles"),
        ({"sweep_values": (1,)}, "needs sweep"),
        ({"num_clusters": 129}, "num_clusters=129 exceeds the 128 training images"),
        ({"num_components": 85}, "num_components=85 is not accepted: there are 84 features"),
        ({"halt": 3}, "halt=3 is not accepted: the run has 3 cycles"),
        ({"batch_size": 129}, "batch_size=129 exceeds the 128 training images"),
        ({"probe_layer": "conv_9"}, "probe_layer='conv_9' is unknown; accepted: conv_1, conv_2"),
        ({"learning_rate": 0.0}, "learning_rate=0.0 is not accepted"),
    ],
)
def test_bad_options(config: Config, change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        deepcluster.run(replace(config, **change))


@pytest.mark.parametrize(
    ("channels", "filters", "size", "stride", "padding", "large"),
    [
        (1, 6, 5, 1, 0, None),  # banded
        (2, 7, 4, 3, 2, None),  # banded, with strides and padding
        (6, 30, 3, 1, 0, None),  # patches
        (6, 30, 4, 2, 1, None),  # patches, with strides and padding
        (6, 30, 4, 2, 1, 0),  # XLA's
    ],
)
def test_every_form_of_the_convolution_is_the_convolution(
    channels: int,
    filters: int,
    size: int,
    stride: int,
    padding: int,
    large: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if large is not None:
        monkeypatch.setattr(convnets, "_LARGE", large)
    layer = nnx.jit(
        lambda: nnx.Conv(
            channels,
            filters,
            (size, size),
            strides=stride,
            padding=((padding, padding),) * 2,
            rngs=nnx.Rngs(0),
        )
    )()
    layer.bias[...] = np.arange(filters, dtype=np.float32)
    specification = convnets._Convolution(filters, size, stride, padding, None)
    graph, state = nnx.split(layer)
    images = np.random.default_rng(0).standard_normal((3, 11, 12, channels), np.float32)

    def flax(state: nnx.State, images: jax.Array) -> jax.Array:
        return jnp.sin(nnx.merge(graph, state)(images))

    def ours(state: nnx.State, images: jax.Array) -> jax.Array:
        planes = jnp.swapaxes(images, 0, 3)
        return jnp.sin(jnp.swapaxes(convnets._convolve(specification, nnx.merge(graph, state), planes), 0, 3))

    @jax.jit
    def both(state: nnx.State, images: jax.Array) -> Any:
        wanted, wanted_gradient = jax.vjp(flax, state, images)
        found, gradient = jax.vjp(ours, state, images)
        return (found, wanted), (gradient(wanted), wanted_gradient(wanted))

    values, gradients = both(state, images)
    np.testing.assert_allclose(*values, atol=1e-4)
    chex.assert_trees_all_close(*gradients, rtol=1e-3, atol=1e-3)
