"""How fast the rules run, as ratios measured in one run on this machine.

    python -m experiments.benchmark                  # some minutes on 2 cores
    python -m experiments.benchmark --data-dir DIR   # k-means rows on MNIST's test images
    python -m experiments.benchmark --tables energy k_means

Each row is set against the limit: the multiply-adds of the direct computation, at the rate that
`jnp.matmul` reaches here and now. The rules are also set against what a user would pick instead: the
formula in NumPy, scikit-learn, and faiss and PyTorch where they are installed. Times are the smallest of
several repetitions; only the ratios mean anything across machines.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm

from experiments import data
from experiments.common.options import ConfigError, check_options, command_line
from experiments.common.runs import device_name
from experiments.data import atomic_path
from sul_jax import (
    acol,
    augment,
    coding_rate,
    energy,
    gradient_rule,
    hebbian,
    k_means,
    k_subspaces,
    nmce,
    patches,
    whitening,
)
from sul_jax.cli.tables import format_table
from sul_jax.energy import EnergyArchitecture, EnergyLayer
from sul_jax.estimators import EnergyClustering
from sul_jax.nn import ACOL, NMCE, AlexNet, LeNet5, ResNet

Table = Literal[
    "energy", "k_subspaces", "growth", "k_means", "deep_cluster", "coding_rate", "resnet", "hebbian", "acol"
]


@dataclass(frozen=True)
class Config:
    """Options of the benchmark."""

    dataset: str = "auto"
    """Data of the k-means rows."""
    data_dir: Path | None = None
    """Folder of data sets; by default $SUL_JAX_DATA."""
    batch_size: int = 512
    """Images in a minibatch of the energy network."""
    repetitions: int = 3
    """Of each measurement; the smallest counts."""
    features: int = 60_000
    """Vectors of 256 features that paper 004's clustering is given."""
    acol_batch: int = 400
    """28×28 images in a step of paper 002."""
    image_batch: int | None = None
    """Images in a ResNet-18 step of paper 003, two views of each; by default 16, on an accelerator 1,024."""
    tables: tuple[Table, ...] = get_args(Table)
    """What to measure."""
    workdir: Path | None = None
    """Where to write the tables as benchmark.md; by default they are only printed."""


def run(config: Config) -> str:
    """Measures and prints; returns the tables."""
    check_options(
        config, at_least={"batch_size": 1, "repetitions": 1, "features": 1, "image_batch": 2, "acol_batch": 1}
    )
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
            temporary.write_text(text + "\n")
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


def matmul_rate(timed: Callable[..., float]) -> float:
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


def network_table(config: Config, timed: Callable[..., float]) -> str:
    """One row for each layer of the three-layer network, and the whole training.

    The rate of `jnp.matmul` is measured again beside every layer: on shared machines it drifts by a fourth
    within a minute.
    """
    architecture: EnergyArchitecture = energy.ARCHITECTURES["3layer"]
    codes = jax.random.uniform(jax.random.key(0), (config.batch_size, 28, 28, 1))
    below_time = below_limit = total_time = total_limit = 0.0
    rows = []
    for index, layer in enumerate(tqdm(architecture.layers, desc="energy layers"), 1):
        rule = energy.layer_rule(layer)
        state = jax.jit(rule.init)(jax.random.key(index), codes)
        encode, step = layer_operations(layer, codes.shape)
        before = matmul_rate(timed)
        update_time = timed(jax.jit(rule.update), state, codes)
        encode_time = timed(jax.jit(rule.encode), state, codes)
        rate = max(before, matmul_rate(timed))
        for what, taken, operations in (
            ("step", update_time, step),
            ("inference", encode_time, encode),
        ):
            rows.append(_row(f"energy layer {index}, {what}", taken, operations / rate))
        total_time += update_time + below_time
        total_limit += step / rate + below_limit
        below_time += encode_time
        below_limit += encode / rate
        codes = jax.jit(rule.encode)(state, codes)
    steps = 60_000 // config.batch_size
    rows.append(
        _row(
            f"3layer, training on 60,000 ({steps} steps a layer)",
            steps * total_time,
            steps * total_limit,
        )
    )
    return format_table(["", "seconds", "limit", "ratio"], rows)


def _row(what: str, taken: float, limit: float) -> list[str]:
    return [what, f"{taken:.3f}", f"{limit:.3f}", f"{taken / limit:.2f}"]


def k_subspaces_table(timed: Callable[..., float]) -> str:
    """A K-Subspaces step beside algorithm 1 in float32 NumPy."""
    inputs = jax.random.normal(jax.random.key(0), (8192, 500))
    state = k_subspaces.init(jax.random.key(1), inputs, num_subspaces=32, rank=8)
    ours = timed(jax.jit(k_subspaces.update), state, inputs)
    x, bases = np.asarray(inputs), np.asarray(state.bases)

    def with_numpy() -> np.ndarray:
        responses = x @ bases.reshape(-1, x.shape[1]).T
        winners = np.square(responses.reshape(len(x), *bases.shape[:2])).sum(2).argmax(1)
        new = bases.copy()
        for k in range(len(bases)):
            own = x[winners == k]
            if len(own):
                new[k] = np.linalg.svd(own.T @ (own @ bases[k].T), full_matrices=False)[0].T
        return new

    peer = timed(with_numpy)
    title = "K-Subspaces step, 8,192 vectors of 500 features, 32 subspaces of rank 8"
    rows = [["sul_jax", f"{ours:.4f}", "1.00"], ["NumPy, float32", f"{peer:.4f}", f"{peer / ours:.2f}"]]
    return format_table([title, "seconds", "ratio"], rows)


def coding_rate_table(timed: Callable[..., float]) -> str:
    """Coding-rate reduction and its gradient beside the published formula in PyTorch."""
    features = whitening.normalize(jax.random.normal(jax.random.key(0), (1024, 128)))
    memberships = jax.nn.softmax(3 * jax.random.normal(jax.random.key(1), (1024, 10)))
    reduction = partial(coding_rate.coding_rate_reduction, eps_squared=0.2)
    ours = timed(jax.jit(jax.value_and_grad(reduction, (0, 1))), features, memberships)
    rows = [["sul_jax", f"{ours:.4f}", "1.00"]]
    try:
        import torch
    except ImportError:
        pass
    else:
        z, pi = (torch.tensor(np.asarray(a), requires_grad=True) for a in (features, memberships))
        eye = torch.eye(128)

        def with_torch() -> Any:
            n, d = z.shape
            value = torch.logdet(eye + d / (n * 0.2) * z.T @ z) / 2
            # MCR²'s code multiplies by n×n diagonal matrices, cluster by cluster; NMCE's, as here, by rows.
            mass = pi.sum(0) + 1e-8
            grams = (z * pi.T[:, :, None]).mT @ z
            rates = torch.logdet(eye + (d / (mass * 0.2))[:, None, None] * grams)
            value = value - (mass / (2 * n) * rates).sum()
            return torch.autograd.grad(value, (z, pi))

        peer = timed(with_torch)
        rows.append(["PyTorch, the published formula", f"{peer:.4f}", f"{peer / ours:.2f}"])
    title = "coding-rate reduction and gradient, 1,024 × 128 features, 10 clusters"
    return format_table([title, "seconds", "ratio"], rows)


def resnet_table(config: Config, timed: Callable[..., float]) -> str:
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
    rows = [["sul_jax, with its augmentation", f"{ours:.3f}", f"{number / ours:.0f}", "1.00", f"{share:.1%}"]]
    peer = _torch_resnet_seconds(number, lower, timed)
    if peer is not None:
        rows.append(
            ["PyTorch, without augmentation", f"{peer:.3f}", f"{number / peer:.0f}", f"{peer / ours:.2f}", ""]
        )
    title = f"ResNet-18 step on {number} images, two views, {'bfloat16' if lower else 'float32'}"
    return format_table([title, "seconds", "images/s", "ratio", "loss's share"], rows)


def _resnet(rngs: nnx.Rngs) -> NMCE:
    backbone = ResNet(18, rngs=rngs)
    return NMCE(backbone, backbone.num_features, num_features=128, num_clusters=10, rngs=rngs)


def _torch_resnet_seconds(number: int, lower: bool, timed: Callable[..., float]) -> float | None:
    """The same network and loss with plain descent in PyTorch, on the same kind of device, or None."""
    try:
        import torch
        from torch import nn
    except ImportError:
        return None
    if lower and not torch.cuda.is_available():
        return None

    class Block(nn.Module):  # type: ignore[misc]
        def __init__(self, inputs: int, outputs: int, stride: int):
            super().__init__()
            self.body = nn.Sequential(
                nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
                nn.BatchNorm2d(outputs),
                nn.ReLU(),
                nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
                nn.BatchNorm2d(outputs),
            )
            self.shortcut = nn.Identity()
            if stride > 1:
                straight = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
                self.shortcut = nn.Sequential(straight, nn.BatchNorm2d(outputs))

        def forward(self, x: Any) -> Any:
            return torch.relu(self.body(x) + self.shortcut(x))

    sizes = [(64, 64, 1), (64, 64, 1)]
    for outputs in (128, 256, 512):
        sizes += [(outputs // 2, outputs, 2), (outputs, outputs, 1)]
    device = "cuda" if lower else "cpu"
    torch.backends.cudnn.benchmark = True
    network = nn.Sequential(
        *[nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU()],
        *[Block(*size) for size in sizes],
        *[nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 4096), nn.BatchNorm1d(4096), nn.ReLU()],
        nn.Linear(4096, 128),
    ).to(device, memory_format=torch.channels_last)
    descent = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9)
    images = torch.rand(2 * number, 3, 32, 32, device=device).to(memory_format=torch.channels_last)
    eye = torch.eye(128, device=device)

    def step() -> None:
        descent.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16, enabled=lower):
            z = network(images)
        views = torch.nn.functional.normalize(z.float(), dim=1).reshape(2, number, 128)
        grams = eye + 128 / (number * 0.2) * views.mT @ views
        loss = -torch.logdet(grams).mean() / 2 - (views[0] * views[1]).sum(1).mean()
        loss.backward()
        descent.step()
        if lower:
            torch.cuda.synchronize()

    return timed(step)


def hebbian_table(timed: Callable[..., float]) -> str:
    """A ranked Hebbian step on vectors of 784 features beside the authors' formula in NumPy."""
    rows = []
    for units, batch in ((100, 100), (2000, 1000)):
        inputs = jax.random.uniform(jax.random.key(0), (batch, 784))
        state = hebbian.init(jax.random.key(1), inputs, num_units=units)
        rate = matmul_rate(timed)
        ours = timed(jax.jit(partial(hebbian.update, learning_rate=0.02)), state, inputs)
        peers = []
        for number in (np.float64, np.float32):
            x, weights = np.asarray(inputs.T, number), np.asarray(state.weights, number)
            peers.append(timed(partial(_hebbian_numpy, weights, x, plain=number is np.float64)))
        limit = 4 * units * batch * 784 / rate
        size = f"{units} units, batch {batch}"
        ratios = (f"{peer / ours:.2f}" for peer in peers)
        rows.append([size, f"{1e3 * ours:.2f} ms", *ratios, f"{limit / ours:.0%}"])
    header = ["Hebbian step", "sul_jax", "authors' formula ×", "best float32 NumPy ×", "of matmul's rate"]
    return format_table(header, rows)


def _hebbian_numpy(weights: np.ndarray, x: np.ndarray, *, plain: bool) -> np.ndarray:
    """A step: by sorting all drives, as the authors, or by what NumPy does fastest."""
    number, examples = len(weights), np.arange(x.shape[1])
    drives = weights @ x
    if plain:
        order = np.argsort(drives, axis=0)
        first, second = order[number - 1], order[number - 2]
    else:
        first = drives.argmax(axis=0)
        rest = drives.copy()
        rest[first, examples] = -np.inf
        second = rest.argmax(axis=0)
    activity = np.zeros_like(drives)
    activity[first, examples] = 1
    activity[second, examples] = -0.2
    change = activity @ x.T - np.sum(activity * drives, axis=1)[:, None] * weights
    return np.asarray(weights + 0.02 / max(np.abs(change).max(), 1e-30) * change)


def acol_table(config: Config, timed: Callable[..., float]) -> str:
    """A step of paper 002 beside the same network's without regularisation and augmentation."""
    number, key = config.acol_batch, jax.random.key(2)
    images = jax.random.uniform(jax.random.key(0), (number, 28, 28, 1))
    classes = jax.random.randint(jax.random.key(1), (number,), 0, 8)

    def build(rngs: nnx.Rngs) -> ACOL:
        return ACOL((28, 28, 1), num_parents=8, rngs=rngs)

    def cross_entropy(network: Any, images: jax.Array, *, key: jax.Array, axis_name: str | None) -> jax.Array:
        logits = network(images, key=key)
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, classes))

    rule = acol.rule((28, 28, 1))
    plain = gradient_rule(build, cross_entropy, optax.adam(1e-3))
    state = rule.init(key, images)
    ours, alone = (timed(jax.jit(one.update), state, images, key=key) for one in (rule, plain))
    rows = [
        ["sul_jax", f"{ours:.3f}", "1.00"],
        ["… the network alone", f"{alone:.3f}", f"{alone / ours:.2f}"],
    ]
    if jax.default_backend() != "cpu":  # there seeds are trained one after another
        three = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), state)
        several = jax.jit(jax.vmap(lambda state, key: rule.update(state, images, key=key)))
        together = timed(several, three, jax.random.split(key, 3))
        rows.append(["… 3 seeds together", f"{together:.3f}", f"{together / ours:.2f}"])
    for name, whole in (("PyTorch", True), ("… the network alone", False)):
        peer = _torch_acol_seconds(number, timed, whole=whole)
        if peer is not None:
            rows.append([name, f"{peer:.3f}", f"{peer / ours:.2f}"])
    return format_table([f"ACOL step on {number} images of 28×28", "seconds", "ratio"], rows)


def _torch_acol_seconds(number: int, timed: Callable[..., float], *, whole: bool) -> float | None:
    """A step in PyTorch on a CPU: the same, or the network's without regularisation and augmentation."""
    try:
        import torch
        from torch import nn
    except ImportError:
        return None
    if jax.default_backend() != "cpu":
        return None
    layers: list[Any] = []
    for inputs, outputs in ((1, 32), (32, 32), (32, 64), (64, 64)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU()]
        if inputs == outputs:
            layers += [nn.MaxPool2d(2), nn.Dropout(0.2 if outputs == 32 else 0.3)]
    layers += [nn.Flatten(), nn.Linear(3136, 2048), nn.ReLU(), nn.Dropout(0.5), nn.Linear(2048, 160)]
    network = nn.Sequential(*layers).to(memory_format=torch.channels_last)
    descent = torch.optim.Adam(network.parameters())
    images = torch.rand(number, 1, 28, 28).to(memory_format=torch.channels_last)
    parents = torch.randint(0, 8, (number,))

    def turned() -> Any:
        ways = torch.randint(0, 8, (number,))
        found = images
        for way in range(1, 8):
            one = torch.rot90(images, way % 4, (2, 3))
            one = one.flip(3) if way >= 4 else one
            found = torch.where((ways == way)[:, None, None, None], one, found)
        return found, ways

    def regularised() -> Any:
        views, ways = turned()
        logits = network(views)
        pooled = logits.softmax(1).reshape(number, 20, 8).sum(1)
        active = logits.relu().reshape(number, 20, 8)
        gram = torch.einsum("bip,bjp->pij", active, active)
        diagonal = torch.diagonal(gram, dim1=1, dim2=2)
        outer = diagonal[:, :, None] * diagonal[:, None, :]
        ratios = []
        for matrix in (gram, outer):
            trace = torch.diagonal(matrix, dim1=1, dim2=2).sum(1)
            ratios.append(((matrix.sum((1, 2)) - trace) / (19 * trace + 1e-7)).mean())
        taught = -pooled.gather(1, ways[:, None]).clamp_min(1e-7).log().mean()
        return taught + 0.1 * ratios[0] + (1 - ratios[1]) + 1e-6 * logits.square().sum()

    def step() -> None:
        descent.zero_grad(set_to_none=True)
        loss = regularised() if whole else nn.functional.cross_entropy(network(images), parents)
        loss.backward()
        descent.step()

    return timed(step)


def k_means_tables(config: Config, timed: Callable[..., float]) -> str:
    """k-means on test pixels and on codes of the energy network: ours and what a user would pick instead."""
    dataset = data.load(config.dataset, config.data_dir)
    images = dataset.test_images
    pixels = images.reshape(len(images), -1).astype(np.float32) / 255
    network = EnergyClustering(10, architecture="1layer", max_steps=10, code_whitening=0, random_state=0)
    what = f"of {len(images)} test images of {dataset.name}"
    tables = [_k_means_table(f"pixels {what}", pixels, config, timed)]
    tables.append(_k_means_table(f"one layer's codes {what}", network.fit_transform(images), config, timed))
    return "\n\n".join(tables)


def _k_means_table(what: str, x: np.ndarray, config: Config, timed: Callable[..., float]) -> str:
    from sklearn.cluster import KMeans

    fit = jax.jit(partial(k_means.fit, num_clusters=10))
    ours = timed(fit, jax.random.key(0), jnp.asarray(x))
    inertia = float(fit(jax.random.key(0), jnp.asarray(x)).inertia)
    rows = [["sul_jax", f"{ours:.2f}", "1.00", f"{inertia:.6g}"]]

    def row(name: str, fitted: Callable[[], float]) -> None:
        times, found = [], 0.0
        for _ in range(config.repetitions):
            start = time.perf_counter()
            found = fitted()
            times.append(time.perf_counter() - start)
        rows.append([name, f"{min(times):.2f}", f"{min(times) / ours:.2f}", f"{found:.6g}"])

    row("scikit-learn", lambda: float(KMeans(10, n_init=10, random_state=0).fit(x).inertia_))
    try:
        import faiss
    except ImportError:
        pass
    else:

        def with_faiss() -> float:
            found = faiss.Kmeans(x.shape[1], 10, niter=50, nredo=10, max_points_per_centroid=len(x))
            found.train(x)
            return float(found.index.search(x, 1)[0].sum())

        row("faiss, 50 iterations", with_faiss)
    title = f"k-means on {what}, k = 10, best of 10"
    return format_table([title, "seconds", "ratio", "inertia"], rows)


def deep_cluster_table(config: Config, timed: Callable[..., float]) -> str:
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
    fit = jax.jit(
        partial(
            k_means.fit,
            num_clusters=clusters,
            max_iterations=iterations,
            tolerance=0.0,
            empty_clusters="split",
        )
    )
    ours = timed(fit, keys[0], x, init=x[:clusters])
    inertia = float(fit(keys[0], x, init=x[:clusters]).inertia)
    limit = 2 * (iterations + 1) * config.features * clusters * 256 / matmul_rate(timed)
    rows = [["sul_jax", f"{ours:.2f}", "1.00", f"{limit / ours:.0%}", f"{inertia:.6g}"]]
    try:
        import faiss
    except ImportError:
        pass
    else:
        vectors, found = np.asarray(x), 0.0

        def with_faiss() -> None:
            nonlocal found
            model = faiss.Kmeans(256, clusters, niter=iterations, max_points_per_centroid=len(vectors))
            model.train(vectors, init_centroids=vectors[:clusters])
            found = float(model.index.search(vectors, 1)[0].sum())

        peer = timed(with_faiss)
        rows.append(["faiss", f"{peer:.2f}", f"{peer / ours:.2f}", f"{limit / peer:.0%}", f"{found:.6g}"])
    title = f"{iterations} iterations of k-means on {config.features} × 256, k = {clusters}"
    return format_table([title, "seconds", "ratio", "of matmul's rate", "inertia"], rows)


def convnets_table(timed: Callable[..., float]) -> str:
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
        peer = _torch_network_seconds(network, batch, timed) or ()
        for what, factor, own, theirs in zip_longest(("features", "step"), (1, 3), ours, peer):
            ratio = "" if theirs is None else f"{theirs / own:.2f}"
            rows.append([f"{name}, {what}", f"{1e6 * own:.0f} µs", f"{factor * limit / own:.0%}", ratio])
    return format_table(["an image of 32×32", "sul_jax", "of matmul's rate", "PyTorch's time"], rows)


def _network_seconds(
    network: LeNet5 | AlexNet, batch: int, timed: Callable[..., float]
) -> tuple[float, float]:
    """For an image, its features and its part of a step."""
    images = jax.random.uniform(jax.random.key(0), (400, *network.image_shape))

    def loss(network: Any, images: jax.Array, *, key: jax.Array, axis_name: str | None) -> jax.Array:
        found = network(images, key=key)
        labels = jnp.arange(batch) % found.shape[1]
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(found, labels))

    rule = gradient_rule(lambda rngs: type(network)(rngs=rngs), loss, optax.sgd(0.1, momentum=0.9))
    state, step = rule.init(jax.random.key(0), images), jax.jit(rule.update)
    return (
        timed(jax.jit(rule.encode), state, images) / len(images),
        timed(step, state, images[:batch], key=jax.random.key(1)) / batch,
    )


def _torch_network_seconds(
    network: LeNet5 | AlexNet, batch: int, timed: Callable[..., float]
) -> tuple[float, float] | None:
    """The same for the same network in PyTorch on a CPU, Sobel filters as a convolution, or None."""
    try:
        import torch
        from torch import nn
    except ImportError:
        return None
    if jax.default_backend() != "cpu":
        return None
    channels = network.image_shape[2]
    layers: list[Any] = [nn.Conv2d(channels, 2, 3, padding=1).requires_grad_(False)] if channels == 3 else []
    inputs = 2 if channels == 3 else channels
    for one in network.specifications:
        layers += [
            nn.Conv2d(inputs, one.filters, one.kernel_size, one.strides, one.padding),
            nn.BatchNorm2d(one.filters),
            nn.ReLU(),
        ]
        layers += [] if one.pool is None else [nn.MaxPool2d(*one.pool)]
        inputs = one.filters
    layers.append(nn.Flatten())
    for index, hidden in enumerate(network.hidden):
        layers += [nn.ReLU()] if index else []
        layers += [nn.Dropout(network.dropout), nn.Linear(*hidden.kernel[...].shape)]
    peer = nn.Sequential(*layers).to(memory_format=torch.channels_last)
    descent = torch.optim.SGD([p for p in peer.parameters() if p.requires_grad], 0.1, momentum=0.9)
    images = torch.rand(400, channels, 32, 32).to(memory_format=torch.channels_last)
    labels = torch.arange(batch) % network.num_features

    def features() -> None:
        with torch.no_grad():
            peer(images)

    def step() -> None:
        descent.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(peer(images[:batch]), labels).backward()
        descent.step()

    peer.eval()
    found = timed(features) / 400
    peer.train()
    return found, timed(step) / batch


def growth_table(rate: float, timed: Callable[..., float]) -> str:
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


def main() -> None:
    """The command line."""
    command_line(run, Config, description=__doc__)


if __name__ == "__main__":
    main()
