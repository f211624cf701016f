"""How fast the rules run, as ratios measured in one run on this machine.

    python -m experiments.benchmark                  # some minutes on 2 cores
    python -m experiments.benchmark --data-dir DIR   # k-means rows on MNIST's test images
    python -m experiments.benchmark --tables energy k_means

Each row is compared with the limit: the multiply-adds of the direct computation, at the rate that
`jnp.matmul` reaches in this run. The rules are also compared with what a user would choose instead: the
formula in NumPy, scikit-learn, and faiss and PyTorch if they are installed. Times are the shortest of several
repetitions; between machines, compare only the ratios.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm

from experiments import data
from experiments.common import peers
from experiments.common.options import ConfigError, check_options, command_line
from experiments.common.runs import device_name
from experiments.data import atomic_path
from sul_jax import (
    acol,
    augment,
    coding_rate,
    energy,
    hebbian,
    k_means,
    k_subspaces,
    nmce,
    patches,
    probes,
    whitening,
)
from sul_jax.cli.ranges import PositiveInt, Range
from sul_jax.cli.tables import format_table
from sul_jax.energy import EnergyArchitecture, EnergyLayer
from sul_jax.estimators import EnergyClustering
from sul_jax.nn import ACOL, NMCE, AlexNet, LeNet5, ResNet

Table = Literal[
    "energy", "k_subspaces", "growth", "k_means", "deep_cluster", "coding_rate", "resnet", "hebbian", "acol"
]
# Seconds of a call.
Timed = Callable[..., float]


@dataclass(frozen=True)
class Config:
    """Options of the benchmark."""

    dataset: str = "auto"
    """Data of the k-means rows."""
    data_dir: Path | None = None
    """Folder of data sets; by default $SUL_JAX_DATA."""
    batch_size: PositiveInt = 512
    """Images in a minibatch of the energy network."""
    repetitions: PositiveInt = 3
    """Repetitions of each measurement; the shortest time counts."""
    features: PositiveInt = 60_000
    """Vectors of 256 features for the clustering of paper 004."""
    acol_batch: PositiveInt = 400
    """Images of 28×28 pixels in a step of paper 002."""
    image_batch: Annotated[int, Range(2)] | None = None
    """Images in a ResNet-18 step of paper 003, two views of each; by default 16, or 1,024 on an
    accelerator."""
    tables: tuple[Table, ...] = get_args(Table)
    """What to measure."""
    workdir: Path | None = None
    """Where to write the tables as benchmark.md; by default they are only printed."""


def run(config: Config) -> str:
    """Measures and prints; returns the tables."""
    check_options(config)
    if not config.tables:
        raise ConfigError(f"tables is empty; accepted: {', '.join(get_args(Table))}")
    timed = partial(seconds, repetitions=config.repetitions)
    rate = matmul_rate(timed)
    print(f"{device_name()}, jax {jax.__version__}: jnp.matmul runs at {rate / 1e9:.0f} GFLOP/s\n")
    of_name: dict[Table, Callable[[], str]] = {
        "energy": lambda: network_table(config, timed),
        "k_subspaces": lambda: k_subspaces_table(timed),
        "growth": lambda: growth_table(rate, timed),
        "k_means": lambda: k_means_tables(config, timed),
        "deep_cluster": lambda: deep_cluster_table(config, timed) + "\n\n" + convnets_table(timed),
        "coding_rate": lambda: coding_rate_table(timed),
        "resnet": lambda: resnet_table(config, timed),
        "hebbian": lambda: hebbian_table(timed),
        "acol": lambda: acol_table(config, timed),
    }
    tables = [of_name[name]() for name in dict.fromkeys(config.tables)]
    text = "\n\n".join(tables)
    print(text)
    if config.workdir is not None:
        with atomic_path(config.workdir / "benchmark.md") as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")
    return text


def seconds(function: Callable[..., Any], *arguments: Any, repetitions: int, **named: Any) -> float:
    """Smallest wall time of a call after a first one that compiles."""
    jax.block_until_ready(function(*arguments, **named))
    times = []
    for _ in range(repetitions):
        start = time.perf_counter()
        jax.block_until_ready(function(*arguments, **named))
        times.append(time.perf_counter() - start)
    return min(times)


def matmul_rate(timed: Timed) -> float:
    """Floating-point operations a second of a float32 product of 2048×2048 matrices."""
    x = jax.random.normal(jax.random.key(0), (2048, 2048))
    product = jax.jit(partial(jnp.matmul, precision="highest"))
    return 2 * 2048**3 / timed(product, x, x)


def layer_operations(layer: EnergyLayer, shape: tuple[int, ...]) -> tuple[float, float]:
    """Operations of a batch of codes `shape` through a layer by plain products, and of a training step.

    A step needs all responses, and a second product for the rows of the winning subspace alone.
    """
    height, width = (
        patches.output_size(size, kernel_size=layer.kernel_size, padding=layer.padding) for size in shape[1:3]
    )
    per_row = 2 * shape[0] * height * width * layer.kernel_size**2 * shape[3]
    inference = per_row * layer.num_subspaces * layer.rank
    return inference, inference + per_row * layer.rank


def network_table(config: Config, timed: Timed) -> str:
    """One row for each layer of the three-layer network, and the whole training.

    The rate of `jnp.matmul` is measured again beside every layer: on shared machines it drifts by a fourth
    within a minute.
    """
    architecture: EnergyArchitecture = energy.ARCHITECTURES["3layer"]
    codes = jax.random.uniform(jax.random.key(0), (config.batch_size, 28, 28, 1))
    # Seconds and limit: of a step of training, and of the inference of the layers below.
    total, below = np.zeros(2), np.zeros(2)
    rows = []
    for index, layer in enumerate(tqdm(architecture.layers, desc="energy layers"), 1):
        rule = energy.layer_rule(layer)
        state = jax.jit(rule.init)(jax.random.key(index), codes)
        before = matmul_rate(timed)
        update_time = timed(jax.jit(rule.update), state, codes)
        encode_time = timed(jax.jit(rule.encode), state, codes)
        rate = max(before, matmul_rate(timed))
        encode, step = layer_operations(layer, codes.shape)
        update, inference = np.array([update_time, step / rate]), np.array([encode_time, encode / rate])
        rows.append(_row(f"energy layer {index}, step", *update))
        rows.append(_row(f"energy layer {index}, inference", *inference))
        total += update + below
        below += inference
        codes = jax.jit(rule.encode)(state, codes)
    steps = 60_000 // config.batch_size
    rows.append(_row(f"3layer, training on 60,000 ({steps} steps a layer)", *(steps * total)))
    return format_table(["", "seconds", "limit", "ratio"], rows)


def _row(what: str, taken: float, limit: float) -> list[str]:
    return [what, f"{taken:.3f}", f"{limit:.3f}", f"{taken / limit:.2f}"]


def _compared(title: str, times: list[tuple[Any, ...]], *columns: str, digits: int = 4) -> str:
    """A table of names and times, each also over the first, and the cells of further columns."""
    first = times[0][1]
    rows = [[name, f"{taken:.{digits}f}", f"{taken / first:.2f}", *rest] for name, taken, *rest in times]
    return format_table([title, "seconds", "ratio", *columns], rows)


def _fitted(timed: Timed, fit: Callable[[], float]) -> tuple[float, str]:
    """Seconds of a k-means that gives its inertia, and the inertia."""
    inertias: list[float] = []
    taken = timed(lambda: inertias.append(float(fit())))
    return taken, f"{inertias[-1]:.6g}"


def k_subspaces_table(timed: Timed) -> str:
    """A K-Subspaces step beside algorithm 1 in float32 NumPy."""
    inputs = jax.random.normal(jax.random.key(0), (8192, 500))
    state = k_subspaces.init(jax.random.key(1), inputs, num_subspaces=32, rank=8)
    ours = timed(jax.jit(k_subspaces.update), state, inputs)
    peer = timed(peers.k_subspaces_numpy, np.asarray(state.bases), np.asarray(inputs))
    title = "K-Subspaces step, 8,192 vectors of 500 features, 32 subspaces of rank 8"
    return _compared(title, [("sul_jax", ours), ("NumPy, float32", peer)])


def coding_rate_table(timed: Timed) -> str:
    """Coding-rate reduction and its gradient beside the published formula in PyTorch."""
    features = whitening.normalize(jax.random.normal(jax.random.key(0), (1024, 128)))
    memberships = jax.nn.softmax(3 * jax.random.normal(jax.random.key(1), (1024, 10)))
    reduction = partial(coding_rate.coding_rate_reduction, eps_squared=0.2)
    ours = timed(jax.jit(jax.value_and_grad(reduction, (0, 1))), features, memberships)
    peer = peers.torch_coding_rate(np.asarray(features), np.asarray(memberships))
    times = [("sul_jax", ours)]
    times += [] if peer is None else [("PyTorch, the published formula", timed(peer))]
    return _compared("coding-rate reduction and gradient, 1,024 × 128 features, 10 clusters", times)


def resnet_table(config: Config, timed: Timed) -> str:
    """A step of paper 003's first stage on 32×32 images, bfloat16 on a GPU; beside PyTorch without views."""
    lower = jax.default_backend() != "cpu"
    number = config.image_batch or (1024 if lower else 16)
    images = jax.random.uniform(jax.random.key(0), (number, 32, 32, 3))
    rule = nmce.rule(
        _resnet,
        views=lambda key, images: jnp.stack([augment.random_view(k, images) for k in jax.random.split(key)]),
        optimizer=optax.sgd(0.1, momentum=0.9),
        clusters=False,
        average_views=False,
        dtype=jnp.bfloat16 if lower else None,
    )
    state = rule.init(jax.random.key(0), images)
    ours = timed(jax.jit(rule.update), state, images, key=jax.random.key(2))
    features = jax.random.normal(jax.random.key(1), (2, number, 128))
    loss = partial(coding_rate.tcr_loss, eps_squared=0.2, average_views=False)
    share = timed(jax.jit(jax.value_and_grad(loss)), features) / ours
    times = [("sul_jax, with its augmentation", ours, f"{number / ours:.0f}", f"{share:.1%}")]
    step = peers.torch_resnet(number, lower)
    if step is not None:
        peer = timed(step)
        times.append(("PyTorch, without augmentation", peer, f"{number / peer:.0f}", ""))
    title = f"ResNet-18 step on {number} images, two views, {'bfloat16' if lower else 'float32'}"
    return _compared(title, times, "images/s", "loss's share", digits=3)


def _resnet(rngs: nnx.Rngs) -> NMCE:
    backbone = ResNet(18, rngs=rngs)
    return NMCE(backbone, backbone.num_features, num_features=128, num_clusters=10, rngs=rngs)


def hebbian_table(timed: Timed) -> str:
    """A ranked Hebbian step on vectors of 784 features beside the authors' formula in NumPy."""
    rows = []
    for units, batch in ((100, 100), (2000, 1000)):
        inputs = jax.random.uniform(jax.random.key(0), (batch, 784))
        state = hebbian.init(jax.random.key(1), inputs, num_units=units)
        rate = matmul_rate(timed)
        ours = timed(jax.jit(partial(hebbian.update, learning_rate=0.02)), state, inputs)
        ratios = []
        for number in (np.float64, np.float32):
            x, weights = np.asarray(inputs.T, number), np.asarray(state.weights, number)
            peer = timed(peers.hebbian_numpy, weights, x, plain=number is np.float64)
            ratios.append(f"{peer / ours:.2f}")
        limit = 4 * units * batch * 784 / rate
        size = f"{units} units, batch {batch}"
        rows.append([size, f"{1e3 * ours:.2f} ms", *ratios, f"{limit / ours:.0%}"])
    header = ["Hebbian step", "sul_jax", "authors' formula ×", "best float32 NumPy ×", "of matmul's rate"]
    return format_table(header, rows)


def acol_table(config: Config, timed: Timed) -> str:
    """A step of paper 002 beside the same network's without regularisation and augmentation."""
    number, key = config.acol_batch, jax.random.key(2)
    images = jax.random.uniform(jax.random.key(0), (number, 28, 28, 1))
    classes = jax.random.randint(jax.random.key(1), (number,), 0, 8)

    def build(rngs: nnx.Rngs) -> ACOL:
        return ACOL((28, 28, 1), num_parents=8, rngs=rngs)

    rule = acol.rule((28, 28, 1))
    plain = probes.softmax_rule(build, optax.adam(1e-3), logits=lambda net, x, key: net(x, key=key))
    state = rule.init(key, images)
    ours = timed(jax.jit(rule.update), state, images, key=key)
    alone = timed(jax.jit(plain.update), state, images, key=key, labels=classes)
    times = [("sul_jax", ours), ("… the network alone", alone)]
    if jax.default_backend() != "cpu":  # there seeds are trained one after another
        three = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), state)
        several = jax.jit(jax.vmap(lambda state, key: rule.update(state, images, key=key)))
        times.append(("… 3 seeds together", timed(several, three, jax.random.split(key, 3))))
    for name, step in zip(("PyTorch", "… the network alone"), peers.torch_acol(number), strict=False):
        times.append((name, timed(step)))
    return _compared(f"ACOL step on {number} images of 28×28", times, digits=3)


def k_means_tables(config: Config, timed: Timed) -> str:
    """k-means on test pixels and on codes of the energy network: ours and what a user would pick instead."""
    dataset = data.load(config.dataset, config.data_dir)
    images = dataset.test_images
    pixels = images.reshape(len(images), -1).astype(np.float32) / 255
    network = EnergyClustering(10, architecture="1layer", batch_size=128, max_steps=10, random_state=0)
    what = f"of {len(images)} test images of {dataset.name}"
    tables = {"pixels": pixels, "one layer's codes": network.fit_transform(images)}
    return "\n\n".join(_k_means_table(f"{name} {what}", x, timed) for name, x in tables.items())


def _k_means_table(what: str, x: np.ndarray, timed: Timed) -> str:
    from sklearn.cluster import KMeans

    ours = jax.jit(partial(k_means.fit, num_clusters=10))
    fits = {
        "sul_jax": lambda: ours(jax.random.key(0), jnp.asarray(x)).inertia,
        "scikit-learn": lambda: KMeans(10, n_init=10, random_state=0).fit(x).inertia_,
        "faiss, 50 iterations": peers.faiss_k_means(x, 10, 50, starts=10),
    }
    times = [(name, *_fitted(timed, fit)) for name, fit in fits.items() if fit is not None]
    return _compared(f"k-means on {what}, k = 10, best of 10", times, "inertia", digits=2)


def deep_cluster_table(config: Config, timed: Timed) -> str:
    """Paper 004's clustering, from the same first centroids as faiss's, against the products it needs.

    One more assignment than iterations gives the labels, here and by faiss.
    """
    clusters, iterations = min(1000, config.features), 20
    # Of many overlapping groups, as features are; unit norm as `deep_cluster.preprocess` leaves them.
    keys = jax.random.split(jax.random.key(0), 3)
    group = jax.random.randint(keys[0], (config.features,), 0, 300)
    centres = jax.random.normal(keys[1], (300, 256))
    noise = jax.random.normal(keys[2], (config.features, 256))
    x = jax.jit(whitening.normalize)(centres[group] + 2 * noise)
    whole = partial(k_means.fit, tolerance=0.0, empty_clusters="split")
    ours = jax.jit(partial(whole, num_clusters=clusters, max_iterations=iterations))
    vectors = np.asarray(x)
    fits = {
        "sul_jax": lambda: ours(keys[0], x, init=x[:clusters]).inertia,
        "faiss": peers.faiss_k_means(vectors, clusters, iterations, init=vectors[:clusters]),
    }
    limit = 2 * (iterations + 1) * config.features * clusters * 256 / matmul_rate(timed)
    fitted = [(name, *_fitted(timed, fit)) for name, fit in fits.items() if fit is not None]
    times = [(name, taken, f"{limit / taken:.0%}", inertia) for name, taken, inertia in fitted]
    title = f"{iterations} iterations of k-means on {config.features} × 256, k = {clusters}"
    return _compared(title, times, "of matmul's rate", "inertia", digits=2)


def convnets_table(timed: Timed) -> str:
    """Paper 004's networks: features of 400 images, and a step on a minibatch, beside PyTorch's."""
    rows = []
    networks: tuple[tuple[str, LeNet5 | AlexNet, int], ...] = (
        ("LeNet-5", LeNet5(rngs=nnx.Rngs(0)), 128),
        ("small AlexNet", AlexNet(rngs=nnx.Rngs(0)), 64),
    )
    for name, network, batch in networks:
        image = jax.ShapeDtypeStruct((1, *network.image_shape), jnp.float32)
        shapes = nnx.eval_shape(type(network).layers, network, image)
        operations = 2 * sum(layer.kernel[...].size for layer in network.hidden) + sum(
            2 * np.prod(shapes[f"conv_{index}"].shape[1:3]) * layer.kernel[...].size
            for index, layer in enumerate(network.convolutions, 1)
        )
        limit = operations / matmul_rate(timed)
        ours = _network_seconds(network, batch, timed)
        steps = peers.torch_convnet(network, batch) or (None, None)
        each = zip(("features", "step"), (1, 3), ours, steps, (400, batch), strict=True)
        for what, factor, own, peer, images in each:
            ratio = "" if peer is None else f"{timed(peer) / images / own:.2f}"
            rows.append([f"{name}, {what}", f"{1e6 * own:.0f} µs", f"{factor * limit / own:.0%}", ratio])
    return format_table(["an image of 32×32", "sul_jax", "of matmul's rate", "PyTorch's time"], rows)


def _network_seconds(network: LeNet5 | AlexNet, batch: int, timed: Timed) -> tuple[float, float]:
    """For an image, its features and its part of a step."""
    images = jax.random.uniform(jax.random.key(0), (400, *network.image_shape))

    labels = jnp.arange(batch) % network.num_features
    rule = probes.softmax_rule(
        lambda rngs: type(network)(rngs=rngs),
        optax.sgd(0.1, momentum=0.9),
        logits=lambda net, x, key: net(x, key=key),
    )
    state, step = rule.init(jax.random.key(0), images), jax.jit(rule.update)
    return (
        timed(jax.jit(rule.encode), state, images) / len(images),
        timed(step, state, images[:batch], key=jax.random.key(1), labels=labels) / batch,
    )


def growth_table(rate: float, timed: Timed) -> str:
    """Time of a K-Subspaces step on vectors of 1,000 features, rank 8, over its limit."""
    rows = []
    for num_subspaces in (8, 32, 128):
        cells = [f"{num_subspaces} subspaces"]
        for batch in (1024, 4096, 16384):
            inputs = jax.random.normal(jax.random.key(0), (batch, 1000))
            state = k_subspaces.init(jax.random.key(1), inputs, num_subspaces=num_subspaces, rank=8)
            limit = 2 * batch * 1000 * 8 * (num_subspaces + 1) / rate
            taken = timed(jax.jit(k_subspaces.update), state, inputs)
            cells.append(f"{1000 * taken:.0f} ms, {taken / limit:.1f}×")
        rows.append(cells)
    header = ["K-Subspaces step (rank 8, 1,000 features)"]
    return format_table([*header, "batch 1024", "4096", "16384"], rows)


main = partial(command_line, run, Config, description=__doc__)


if __name__ == "__main__":
    main()
