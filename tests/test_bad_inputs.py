"""Bad input gives one clear line that names the argument, what was given and what is accepted."""

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from experiments import mnist_energy
from sul_jax import (
    acol,
    augment,
    coding_rate,
    deep_cluster,
    energy,
    estimators,
    gar,
    gradient_rule,
    hebbian,
    k_means,
    k_subspaces,
    metrics,
    nn,
    patches,
    stack,
    subspace_clustering,
    training,
    whitening,
)
from sul_jax.cli import assign, cluster
from sul_jax.estimators import ACOLClustering, EnergyClustering, PixelClustering

KEY = jax.random.key(0)
PIXELS = np.random.default_rng(0).random((30, 8, 8))
VECTORS = jnp.asarray(PIXELS[:, 0], jnp.float32)
IMAGES = jnp.asarray(PIXELS.reshape(15, 8, 8, 2), jnp.float32)
SIZES = {"zca_kernel_size": 3, "zca_num_components": 2}


def k_means_of(inputs: Any = VECTORS, **options: Any) -> Any:
    return k_means.fit(KEY, inputs, **{"num_clusters": 2} | options)


def subspaces(inputs: Any = VECTORS, **options: Any) -> Any:
    return k_subspaces.init(KEY, inputs, **{"num_subspaces": 2, "rank": 1} | options)


def energy_layer(images: Any = IMAGES, **options: Any) -> Any:
    sizes = {"num_subspaces": 2, "rank": 1, "kernel_size": 3, "padding": 0}
    return energy.init(KEY, images, **sizes | options)


def units(inputs: Any = VECTORS, **options: Any) -> Any:
    state = hebbian.init(KEY, VECTORS, num_units=3)
    return hebbian.update(state, inputs, **{"learning_rate": 0.1} | options)


def acol_rule(shape: tuple[int, ...] = (8, 8, 2), **options: Any) -> Any:
    defaults = {"transformations": augment.FLIPS_AND_ROTATIONS[:2], "nodes_per_parent": 2}
    sizes = {"num_features": 4, "num_filters": 2, "optimizer": optax.sgd(0.1)}
    return acol.rule(shape, **defaults | sizes | options).init(KEY, IMAGES)


def linear(rngs: nnx.Rngs) -> nnx.Linear:
    return nnx.Linear(8, 3, rngs=rngs)


def mean(network: Any, inputs: Any) -> Any:
    return jnp.mean(network(inputs)), {}


def pixel_clusters(images: Any = PIXELS, **options: Any) -> Any:
    return PixelClustering(**{"n_clusters": 3, "random_state": 0} | options).fit(images)


FUNCTIONS: dict[str, tuple[Callable[[], Any], str]] = {
    # arrays
    "words": (lambda: k_means_of(["a", "b"]), "inputs must be an array of numbers, got list"),
    "nothing": (lambda: k_means_of(None), "inputs must be an array of numbers, got NoneType"),
    "objects": (lambda: k_means_of(np.array([[None, 1.0]] * 5, object)), "inputs must be an array of number"),
    "one vector": (lambda: k_means_of(jnp.ones(5)), "inputs must have shape [batch, features], got 1 axes"),
    "integers": (lambda: k_means_of(jnp.ones((5, 2), int)), "inputs must be floating point, got int32"),
    "complex": (lambda: k_means_of(jnp.ones((5, 2), complex)), "inputs must be floating point"),
    "no vectors": (lambda: k_means_of(VECTORS[:0]), "inputs is empty: its shape is (0, 8)"),
    "NaN": (lambda: k_means_of(VECTORS.at[0].set(jnp.nan)), "inputs holds NaN or infinite values"),
    "images for vectors": (
        lambda: k_subspaces.encode(subspaces(), IMAGES), "inputs must have shape [batch, features], got 4 ax",
    ),
    "other features": (
        lambda: k_subspaces.update(subspaces(), VECTORS[:, :3]), "inputs has 3 features (shape (30, 3)), but",
    ),
    "nothing to assign": (lambda: k_subspaces.assign(subspaces(), None), "inputs must be an array of number"),
    "vectors for images": (lambda: energy_layer(VECTORS), "images must have shape [batch, height, width, ch"),
    "bytes": (lambda: energy_layer(IMAGES.astype(jnp.uint8)), "images / 255"),
    "other vectors": (lambda: units(VECTORS[:, :2]), "inputs has 2 features (shape (30, 2)), but"),
    # k-means
    "too many clusters": (lambda: k_means_of(num_clusters=31), "num_clusters=31 is not accepted"),
    "half a cluster": (lambda: k_means_of(num_clusters=2.5), "num_clusters must be an integer, got 2.5"),
    "clusters by yes": (lambda: k_means_of(num_clusters=True), "num_clusters must be an integer, got True"),
    "k-means' init": (lambda: k_means_of(init="kmeans"), "init='kmeans' is not accepted"),
    "init's shape": (lambda: k_means_of(init=jnp.ones((2, 3))), "init has shape (2, 3), but"),
    "init's NaN": (lambda: k_means_of(init=jnp.full((2, 8), jnp.nan)), "init holds NaN"),
    "no starts": (lambda: k_means_of(num_init=0), "num_init=0 is not accepted"),
    "no iterations": (lambda: k_means_of(max_iterations=0), "max_iterations=0 is not accepted"),
    "tolerance NaN": (lambda: k_means_of(tolerance=float("nan")), "tolerance=nan is not accepted"),
    "tolerance": (lambda: k_means_of(tolerance=-1.0), "tolerance=-1.0 is not accepted: it must be at least"),
    "empty clusters": (lambda: k_means_of(empty_clusters="drop"), "empty_clusters='drop' is not accepted"),
    "centroids": (lambda: k_means.assign(VECTORS[0], VECTORS), "centroids must have shape [batch, features]"),
    # rules
    "rank": (lambda: subspaces(rank=9), "rank=9 is not accepted: it must be between 1 and 8"),
    "rank 0": (lambda: subspaces(rank=0), "rank=0 is not accepted"),
    "too many subspaces": (lambda: subspaces(num_subspaces=31), "num_subspaces=31 is not accepted"),
    "one unit": (lambda: hebbian.init(KEY, VECTORS, num_units=1), "num_units=1 is not accepted"),
    "rate": (lambda: units(learning_rate=-1.0), "learning_rate=-1.0 is not accepted: it must be at least 0"),
    "rate NaN": (lambda: units(learning_rate=float("nan")), "learning_rate=nan is not accepted"),
    "rate as a word": (lambda: units(learning_rate="0.1"), "learning_rate must be a number, got '0.1'"),
    "random patches": (
        lambda: hebbian.random_patches(KEY, IMAGES, num_patches=2, kernel_size=9), "kernel_size=9 is no",
    ),
    "ranked below": (lambda: units(rank=4), "rank=4 is not accepted: it must be between 2 and 3"),
    "power": (
        lambda: hebbian.encode(hebbian.init(KEY, VECTORS, num_units=3), VECTORS, power=0.0),
        "power=0.0 is not accepted: it must be above 0",
    ),
    "kernel": (lambda: energy_layer(kernel_size=9), "kernel_size=9 is larger than the padded image"),
    "padding": (lambda: energy_layer(padding=-1), "padding=-1 is not accepted: it must be at least 0"),
    "winners": (
        lambda: energy.layer_rule(energy.EnergyLayer(2, 1, 3, 3, 0)).init(KEY, IMAGES), "num_winners=3 is no",
    ),
    "maps": (lambda: energy.average_pool(VECTORS), "images must have shape [batch, height, width, channels]"),
    "quadrants": (lambda: energy.pooled_codes(IMAGES[:, :1]), "cannot be cut into quadrants"),
    "architecture": (
        lambda: energy.EnergyArchitecture.from_dict({}),
        "this is not an architecture of energy layers: 'l",
    ),
    "architecture's type": (lambda: energy.EnergyArchitecture.from_dict([1]), "is not an architecture"),  # type: ignore[arg-type]
    "no layers": (lambda: energy.EnergyArchitecture.from_dict(SIZES | {"layers": []}), "layers must be a li"),
    "unknown sizes": (
        lambda: energy.EnergyArchitecture.from_dict(SIZES | {"layers": [{"size": 3}]}), "unexpected keyword",
    ),
    "listed sizes": (
        lambda: energy.EnergyArchitecture.from_dict(SIZES | {"layers": [[1, 2], 3, 4, 5, 6]}),
        "each layer must have named sizes",
    ),
    "whitening kernel": (
        lambda: whitening.conv_zca_kernel(IMAGES, kernel_size=9, num_components=2), "kernel_size=9 is larger",
    ),
    "components": (
        lambda: whitening.conv_zca_kernel(IMAGES, kernel_size=3, num_components=99), "num_components=99 is n",
    ),
    "components of vectors": (lambda: whitening.pca(VECTORS, num_components=9), "num_components=9 is not ac"),
    "patches": (lambda: patches.extract(IMAGES, kernel_size=9), "kernel_size=9 is larger than the padded im"),
    "patches of nothing": (lambda: patches.norms(IMAGES, kernel_size=0), "kernel_size=0 is not accepted"),
    "ε²": (lambda: coding_rate.coding_rate(VECTORS, eps_squared=0.0), "eps_squared=0.0 is not accepted"),
    "ε² below 0": (lambda: coding_rate.coding_rate(VECTORS, eps_squared=-1.0), "eps_squared=-1.0 is not acc"),
    "memberships": (
        lambda: coding_rate.class_coding_rate(VECTORS, jnp.ones((3, 2)), eps_squared=0.1), "memberships hold",
    ),
    "a vector for classes": (
        lambda: coding_rate.class_coding_rate(VECTORS[0], VECTORS, eps_squared=0.1), "features must have sh",
    ),
    "one view": (lambda: coding_rate.tcr_loss(VECTORS, eps_squared=0.1), "must have shape [views, batch, fe"),
    "views of other sizes": (
        lambda: coding_rate.nmce_loss(jnp.ones((2, 5, 3)), jnp.ones((2, 4, 3)), eps_squared=0.1), "membershi",
    ),
    "parents": (lambda: gar.gar_loss(VECTORS, num_parents=5), "num_parents=5 is not accepted"),
    "no parents": (lambda: gar.gar_loss(VECTORS, num_parents=0), "num_parents=0 is not accepted"),
    "activity": (lambda: gar.gar_loss(VECTORS[0], num_parents=2), "activations must have shape [batch, num_"),
    "ACOL's images": (lambda: acol_rule((8, 8)), "image_shape=(8, 8) is not accepted"),
    "ACOL's nodes": (lambda: acol_rule(nodes_per_parent=0), "nodes_per_parent=0 is not accepted"),
    "ACOL's parents": (lambda: acol_rule(transformations=()), "num_parents=0 is not accepted"),
    "no pseudo-labels": (
        lambda: deep_cluster.rule(linear, num_clusters=0, optimizer=optax.sgd(0.1)), "num_clusters=0 is not",
    ),
    "trained parts": (
        lambda: gradient_rule(linear, mean, optax.sgd(0.1), trained=("head",)).init(KEY, VECTORS),
        "trained=('head',) is not accepted",
    ),
    "a stack of nothing": (lambda: stack(), "stack() needs at least one rule"),
    "steps": (
        lambda: training.train(lambda s, b: (s, None), 0, lambda a, b: None, num_steps=-1),
        "num_steps=-1 is not accepted",
    ),
    "stride": (
        lambda: training.train(lambda s, b: (s, None), 0, lambda a, b: None, num_steps=1, stride=0),
        "stride=0 is not accepted",
    ),
    "minibatches": (lambda: training.shuffled((0,), 5, 6), "batch_size=6 is not accepted"),
    "colours": (lambda: augment.color_jitter(KEY, IMAGES), "images has 2 channels; 1 or 3 are accepted"),
    "hue": (
        lambda: augment.color_jitter(KEY, IMAGES[..., :1], hue=0.6), "hue=0.6 is not accepted: it must be at",
    ),
    "layers of a network": (
        lambda: nn.MLP(2, 3, num_layers=0, rngs=nnx.Rngs(0)), "num_layers=0 is not accepted",
    ),
    "γ": (lambda: subspace_clustering.self_expression(PIXELS[:, 0], gamma=-1.0), "gamma=-1.0 is not accepte"),
    # labels
    "labels of two lengths": (lambda: metrics.clustering_accuracy([0, 1], [0, 1, 2]), "shapes (2,) and (3,)"),
    "no labels": (lambda: metrics.purity([], []), "labels_true and labels_pred must be non-empty vectors"),
    "labels None": (lambda: metrics.clustering_accuracy(None, [0]), "must be non-empty vectors of one lengt"),  # type: ignore[arg-type]
    "labels NaN": (lambda: metrics.adjusted_rand_index([0.0, np.nan], [0, 1]), "lacks 1 of 2 labels"),
    "labels in a table": (lambda: metrics.purity([[0, 1]], [[0, 1]]), "shapes (1, 2) and (1, 2)"),
    "labels to match": (lambda: metrics.match_clusters([0, 1], [0]), "shapes (2,) and (1,)"),
    "labels' information": (lambda: metrics.normalized_mutual_info([0, 1], [0]), "shapes (2,) and (1,)"),
}  # fmt: skip

ESTIMATORS: dict[str, tuple[Callable[[], Any], str]] = {
    "n_clusters as yes": (lambda: pixel_clusters(n_clusters=True), "n_clusters must be an integer, got True"),
    "no clusters": (lambda: pixel_clusters(n_clusters=0), "n_clusters=0 is not accepted"),
    "half a cluster": (lambda: pixel_clusters(n_clusters=2.5), "n_clusters must be an integer, got 2.5"),
    "clusters as a word": (lambda: pixel_clusters(n_clusters="3"), "n_clusters must be an integer, got '3'"),
    "clusters None": (lambda: pixel_clusters(n_clusters=None), "n_clusters must be an integer, got None"),
    "more clusters than images": (lambda: pixel_clusters(n_clusters=31), "n_clusters=31 exceeds n_samples=3"),
    "no architecture": (lambda: EnergyClustering(3, architecture=None).fit(PIXELS), "is a NoneType; it must"),  # type: ignore[arg-type]
    "unknown architecture": (
        lambda: EnergyClustering(3, architecture="deep").fit(PIXELS), "architecture='deep' is unknown; accep",
    ),
    "architecture's type": (lambda: EnergyClustering(3, architecture=[1]).fit(PIXELS), "is a list; it must"),  # type: ignore[arg-type]
    "no images to predict": (lambda: pixel_clusters().predict(PIXELS[:0]), "0 sample"),
    "a path to predict": (lambda: pixel_clusters().predict("folder"), "X must be an array of numbers, got s"),
    "nothing to predict": (lambda: pixel_clusters().predict(None), "X must be an array of numbers, got None"),
    "images of another size": (lambda: pixel_clusters().predict(PIXELS[:, :4]), "32 features, but"),
    "nothing to fit": (lambda: pixel_clusters(None), "X must be an array of numbers, got NoneType"),
    "a path": (lambda: pixel_clusters("folder"), "X must be an array of numbers, got str"),
    "words": (lambda: pixel_clusters([["a"] * 4] * 9), "X must be an array of numbers, got list"),
    "NaN": (lambda: pixel_clusters(np.full((30, 8, 8), np.nan)), "X contains NaN"),
    "infinite": (lambda: pixel_clusters(np.full((30, 8, 8), np.inf)), "X contains infinity"),
    "image_shape": (lambda: pixel_clusters(PIXELS.reshape(30, -1), image_shape=28), "image_shape=28 does no"),
    "image_size": (lambda: pixel_clusters(image_size=0), "image_size=0 is not accepted"),
    "image_size as a word": (lambda: pixel_clusters(image_size="28"), "image_size must be an integer, got"),
    "image_size beyond memory": (lambda: pixel_clusters(image_size=1_000_000), "image_size=1000000 is too"),
    "learning rate": (lambda: ACOLClustering(3, learning_rate=-1.0).fit(PIXELS), "learning_rate=-1.0 is not"),
    "learning rate NaN": (lambda: ACOLClustering(3, learning_rate=np.nan).fit(PIXELS), "learning_rate=nan i"),
    "steps": (lambda: ACOLClustering(3, max_steps=0).fit(PIXELS), "max_steps=0 is not accepted"),
    "batch": (lambda: ACOLClustering(3, batch_size=0).fit(PIXELS), "batch_size=0 is not accepted"),
    "batch as a word": (lambda: ACOLClustering(3, batch_size="all").fit(PIXELS), "batch_size must be an"),  # type: ignore[arg-type]
    "not fitted": (lambda: PixelClustering(3).predict(PIXELS), "is not fitted yet"),
    "not fitted to save": (lambda: PixelClustering(3).save("model"), "is not fitted yet"),
    "other clusters": (lambda: pixel_clusters().with_clusters(np.ones((30, 784)), 0), "=0 is not accepted"),
    "no codes": (lambda: pixel_clusters().with_clusters("codes", 3), "codes must be an array of numbers, go"),
    "no estimators": (lambda: list(estimators.fit_together([], PIXELS)), "models is empty"),
    "two kinds": (
        lambda: list(estimators.fit_together([PixelClustering(3), EnergyClustering(3)], PIXELS)),
        "differs from PixelClustering(n_clusters=3) in more than random_state",
    ),
    "no model": (lambda: estimators.load("nowhere"), "is not a folder"),
}  # fmt: skip


def check(call: Callable[[], Any], words: str) -> None:
    with pytest.raises((ValueError, TypeError)) as caught:
        call()
    message = str(caught.value)
    assert words in message
    first, *rest = message.splitlines()
    assert len(first) <= 300
    assert not rest or "scikit-learn" in message or "sklearn" in message  # whose checks say more below


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name: str) -> None:
    check(*FUNCTIONS[name])


@pytest.mark.parametrize("name", ESTIMATORS)
def test_estimators(name: str) -> None:
    check(*ESTIMATORS[name])


def damaged_header(folder: Path, shape: tuple[int, ...] | None) -> Path:
    """An archive whose array claims a shape that is not there, or breaks off in its header."""
    content = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        content, {"descr": "|u1", "fortran_order": False, "shape": shape or (9, 8, 8)}
    )
    with zipfile.ZipFile(folder / "mine.npz", "w") as archive:
        archive.writestr("images.npy", content.getvalue() if shape else content.getvalue()[:50])
    return folder / "mine.npz"


def archive(folder: Path, **arrays: Any) -> Path:
    images = (255 * PIXELS).astype(np.uint8)
    np.savez(folder / "mine.npz", **{"images": images} | arrays)
    return folder / "mine.npz"


def text(path: Path, content: bytes = b"abc") -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    return path


COMMANDS: dict[str, tuple[Callable[[Path], Any], dict[str, Any], str]] = {
    "2^40 images": (lambda f: damaged_header(f, (2**40, 8, 8)), {}, "mine.npz is not a readable .npz file"),
    "a header cut off": (lambda f: damaged_header(f, None), {}, "mine.npz is not a readable .npz file"),
    "no archive": (lambda f: text(f / "mine.npz"), {}, "mine.npz is not a readable .npz file"),
    "no images": (lambda f: archive(f, images=np.array(["a"] * 9)), {}, "images in"),
    "objects": (lambda f: archive(f, images=np.array([None] * 9)), {}, "mine.npz is not a readable .npz fil"),
    "NaN": (lambda f: archive(f, images=np.full((30, 8, 8), np.nan)), {}, "hold 1920 NaN or infinite pixels"),
    "few labels": (lambda f: archive(f, labels=np.arange(4)), {}, "must be 30 integers, one for each image"),
    "labels NaN": (lambda f: archive(f, labels=np.full(30, np.nan)), {}, "must be 30 integers, one for each"),
    "wide labels": (lambda f: archive(f, labels=np.arange(30) << 32), {}, "beyond 32 bits"),
    "nowhere": (lambda f: f / "nowhere", {}, "is neither a folder nor an .npz file"),
    "a number": (lambda f: 3, {}, "images=3 is not accepted"),
    "an empty folder": (lambda f: text(f / "mine" / ".hidden").parent, {}, "holds no pictures"),
    "text": (lambda f: text(f / "mine" / "a.txt").parent, {}, "none of the 1 files in"),
    "no pictures": (lambda f: text(f / "mine" / "a.png").parent, {}, "none of the 1 files in"),
    "no clusters": (archive, {"num_clusters": 0}, "num_clusters=(0,) is not accepted"),
    "words for clusters": (archive, {"num_clusters": (3, "x")}, "num_clusters=(3, 'x') is not accepted"),
    "too many clusters": (archive, {"num_clusters": 31}, "num_clusters=31 exceeds the 30 images"),
    "method": (archive, {"method": "kmeans"}, "method='kmeans' is not accepted"),
    "size": (archive, {"image_size": 0}, "image_size=0 is not accepted"),
    "size beyond memory": (archive, {"image_size": 1_000_000}, "image_size=1000000 is not accepted"),
    "no seeds": (archive, {"seeds": 0}, "seeds=0 is not accepted"),
    "a seed below 0": (archive, {"seed": -1}, "seed=-1 is not accepted"),
    "a seed beyond 32 bits": (archive, {"seed": 2**32}, "seed=4294967296 is not accepted"),
    "none together": (archive, {"seeds_together": 0}, "seeds_together=0 is not accepted"),
}  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_commands(name: str, tmp_path: Path) -> None:
    make, options, words = COMMANDS[name]
    defaults = {"num_clusters": 3, "method": "pixels", "seeds": 1, "workdir": tmp_path / "run"}
    check(lambda: cluster.run(cluster.Config(make(tmp_path), **defaults | options)), words)


LAYER = {"num_subspaces": 4, "rank": 2, "num_winners": 2, "kernel_size": 3, "padding": 0}


def file(
    architecture: Any = SIZES | {"layers": [LAYER]}, options: Any = None
) -> Callable[[Path], dict[str, str]]:
    """What writes a file for `--architecture`."""

    def write(folder: Path) -> dict[str, str]:
        stored = {"architecture": architecture, "options": options or {}, "study": {}}
        return {"architecture": str(text(folder / "mine.json", json.dumps(stored).encode()))}

    return write


ENERGY: dict[str, tuple[Callable[[Path], dict[str, Any]], str]] = {
    "unknown options": (file(options={"no_such": 1}), "names unknown options: no_such"),
    "listed options": (
        file(options=[1]),
        "is not a file of tune_energy (options=[1] are not names and values)",
    ),
    "options of another type": (file(options={"networks": "many"}), "networks='many' is not accepted"),
    "options out of range": (file(options={"code_power": -1}), "code_power=-1 is not accepted"),
    "no layers": (file(SIZES | {"layers": []}), "layers must be a list of at least one layer"),
    "layers in words": (file(SIZES | {"layers": "abc"}), "layers must be a list of at least one layer"),
    "a rank in words": (file(SIZES | {"layers": [LAYER | {"rank": "2"}]}), "rank must be an integer, got '2"),
    "a rank too many": (file(SIZES | {"layers": [LAYER | {"rank": 99}]}), "rank=99 is not accepted"),
    "a list": (lambda f: {"architecture": str(text(f / "a.json", b"[1]"))}, "is not a file of tune_energy"),
    "cut off": (lambda f: {"architecture": str(text(f / "a.json", b'{"arch'))}, "a.json' is damaged or not"),
    "no file": (lambda f: {"architecture": "no.json"}, "architecture='no.json' is not a file of tune_energy"),
    "no name": (lambda f: {"architecture": "5layer"}, "architecture='5layer' is unknown; accepted: 1layer"),
    "clusters": (lambda f: {"num_clusters": 61}, "num_clusters=61 exceeds the 60 test images"),
    "devices": (lambda f: {"devices": 99}, "devices=99 is not accepted: there are"),
    "whitening": (lambda f: {"code_whitening": 0.7}, "code_whitening=0.7 is not accepted: it must be betwee"),
    "cluster_by": (lambda f: {"cluster_by": "kmeans"}, "cluster_by='kmeans' is not accepted"),
    "cluster_rank": (
        lambda f: file()(f) | {"cluster_by": "k_subspaces", "cluster_rank": 500}, "cluster_rank=500 exceeds",
    ),
    "batch": (lambda f: {"batch_size": 61}, "batch_size=61 exceeds the 60 training images"),
    "data": (lambda f: {"dataset": "nope"}, "dataset 'nope' is unknown; accepted: auto, mnist"),
    "data's file": (lambda f: {"dataset": "nope.npz"}, "'nope.npz' does not exist"),
}  # fmt: skip


@pytest.mark.parametrize("name", ENERGY)
def test_experiments(name: str, tmp_path: Path) -> None:
    options, words = ENERGY[name]
    defaults = {"dataset": "digits", "num_train": 60, "num_test": 60, "workdir": tmp_path / "run"}
    check(lambda: mnist_energy.run(mnist_energy.Config(**defaults | options(tmp_path))), words)


@pytest.mark.parametrize("within", ["run", "run/deeper"])
def test_a_file_in_the_place_of_a_folder(within: str, tmp_path: Path) -> None:
    text(tmp_path / "run")
    config = cluster.Config(archive(tmp_path), 3, method="pixels", workdir=tmp_path / within)
    check(lambda: cluster.run(config), "cannot be written")


def test_a_model_that_is_none(tmp_path: Path) -> None:
    config = assign.Config(tmp_path / "nowhere", archive(tmp_path), tmp_path / "out.csv")
    check(lambda: assign.run(config), "is not a model that sul-jax cluster wrote")
