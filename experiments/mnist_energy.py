"""Digits fall into clusters: stacked energy layers learned without labels (paper 000).

    python -m experiments.mnist_energy                      # MNIST if at hand, else bundled digits
    python -m experiments.mnist_energy --data-dir DIR --seeds 5
    python -m experiments.mnist_energy --architecture 1layer

ConvZCA, then energy layers trained one after the other by minibatch K-Subspaces in one pass over the
training images, 2×2 average pooling, k-means on the test codes. The paper reports 2.1 % clustering
error on MNIST for its three-layer network, the best of 2,000 searched configurations; README.md lists
what ours gives, with seeds, device and time.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from experiments import data
from experiments.common import architectures, evaluation, figures, training
from experiments.common.options import ConfigError, check_options, command_line
from experiments.common.runs import Outcome, SeedResult, Workdir, identity, peak_gib
from experiments.common.tables import format_table
from experiments.common.training import Checkpoints
from sul_jax import LearningRule, energy, k_subspaces, patches, stack, whitening
from sul_jax.learning_rule import scan_updates
from sul_jax.nn import EnergyNet

EXPERIMENT = "mnist_energy"
_WHITENED_COMPONENTS = 20
_CURVE_STEPS = 60  # of figure 5
# Test clustering error in percent: table 2 for the layers of the three-layer network, table 5 for depth.
PAPER_LAYERS = {"pixels": 46.2, "zca": 50.0, "layer1": 22.7, "layer2": 22.2, "layer3": 2.3}
# (architecture, ablations): test and training error. The paper searched new sizes for each ablation;
# ours keep those of the three-layer network.
PAPER = {
    ("1layer", ()): (20.2, 20.7),
    ("2layer", ()): (2.9, 3.3),
    ("3layer", ()): (2.1, 2.5),
    ("4layer", ()): (3.1, 3.6),
    ("3layer", ("zca",)): (4.0, 4.8),
    ("3layer", ("rescale",)): (4.1, 4.6),
    ("3layer", ("zca", "rescale")): (9.7, 10.1),
    ("3layer", ("rank_one",)): (16.0, 17.3),
    ("3layer", ("random_subspaces",)): (29.4, 31.1),
}


@dataclass(frozen=True)
class Config:
    """Options of the experiment."""

    dataset: str = "auto"
    """mnist, fashion_mnist, digits, FILE.npz, or auto: MNIST if at hand, else the bundled digits."""
    data_dir: Path | None = None
    """Folder of data sets; by default $SUL_JAX_DATA."""
    workdir: Path = Path("runs/mnist_energy")
    """Where everything is written; an earlier run there is set aside, not lost."""
    architecture: str = "auto"
    """1layer, 2layer, 3layer or 4layer, the paper's networks (table 6), the name of one that tune_energy
    found, or its FILE.json; auto: digits for the bundled digits, else 3layer."""
    zca: bool = True
    """Whiten the images first; --no-zca feeds pixels to the first layer."""
    rescale: bool = True
    """Rescale each code to the norm of its input patch."""
    rank_one: bool = False
    """Ablation: one-dimensional subspaces."""
    random_subspaces: bool = False
    """Ablation: random orthonormal subspaces, nothing is learned."""
    batch_size: int | None = None
    """Images in a minibatch; by default the paper's 512, on small data sets 128."""
    passes: int | None = None
    """Passes over the training images for each layer; by default 1, on small data sets 3."""
    warmup_steps: int = 10
    """First steps of each layer, in which vectors are assigned by one direction of each subspace."""
    networks: int | None = None
    """Networks trained independently, each in passes of its own, whose codes are put side by side; by default
    as many as the architecture was found with, else 1. A run resumed with more trains those that are
    missing."""
    code_power: float | None = None
    """Power of the pooled codes before clustering; 0.5 takes the square root. By default that with which the
    architecture was found, else 1."""
    code_whitening: float = 0.0
    """If positive, codes are normalised and their 20 leading principal components divided by their
    variance to this power before clustering; 0.5 would be full whitening."""
    num_train: int | None = None
    """Use only the first training images."""
    num_test: int | None = None
    """Use only the first test images."""
    num_train_evaluated: int = 10_000
    """Training images whose codes are clustered for the training error."""
    evaluate_layers: bool = True
    """Also cluster the pixels and, of a single network, every layer's codes (table 2)."""
    num_clusters: int | None = None
    """Clusters; by default the number of classes, or 10 without labels."""
    seed: int = 0
    """First seed."""
    seeds: int = 1
    """Number of seeds: seed, seed + 1, …"""
    seeds_together: int | None = None
    """Networks trained at the same time by vmap; by default as many as an accelerator's memory holds,
    and 1 on a CPU, where one keeps all cores busy."""
    devices: int = 1
    """Devices over which each minibatch is split."""
    learning_curve: bool | None = None
    """Draw the learning curve of figure 5 (60 steps of the paper's 234 of a layer of its own, with its own
    sizes; images of at least 11×11 pixels); by default on data sets of at least 10,000 images."""
    resume: bool = False
    """Continue the run in the workdir."""
    record: bool = False
    """Append the results to experiments/results/mnist_energy.json."""


# Options that a resumed run may change: its networks are evaluated again.
EVALUATION = (
    "networks", "num_test", "num_train_evaluated", "evaluate_layers", "num_clusters", "code_power",
    "code_whitening", "learning_curve",
)  # fmt: skip


class Member(NamedTuple):
    """One of the networks of a seed."""

    seed: int
    network: int


class Trained(NamedTuple):
    """A network's states, each layer's energy per step, and the seconds of its training."""

    states: tuple[Any, ...]
    energies: list[np.ndarray]
    seconds: float


def run(config: Config) -> list[SeedResult[EnergyNet]]:
    """Trains and evaluates; see the module's docstring.

    Args:
      config: the options.

    Returns:
      One `SeedResult` a seed.

    Raises:
      ValueError: options or data that cannot be used.
    """
    _check(config)
    dataset = data.load(config.dataset, config.data_dir)
    train = dataset.train_images[: config.num_train]
    named = architectures.get(_architecture_name(config, dataset.name))
    # The search for a network has seen the labels of the first images.
    searched = 0
    if dataset.train_images is dataset.test_images and named.study.get("searched"):
        same = named.study["crc32"] == identity(dataset.train_images)["crc32"]
        searched = int(named.study["searched"]) if same else 0
    test = dataset.test_images[searched:][: config.num_test]
    test_labels = None if dataset.test_labels is None else dataset.test_labels[searched:][: len(test)]
    train_labels = None if dataset.train_labels is None else dataset.train_labels[: len(train)]
    config = _fill_in(config, dataset.name, len(train), test_labels, named.options)
    rules = energy.network_rules(architecture_of(config), rescale=config.rescale)
    _check_sizes(config, rules, train, test)
    if config.seeds_together is None:
        config = replace(config, seeds_together=_networks_that_fit(config, rules, train))
    told_apart = identity(train) | {"sizes": architecture_of(config).to_dict()}
    with Workdir(EXPERIMENT, config, data=told_apart, may_differ=EVALUATION) as workdir:
        unseen = "" if not searched else f"; tested on the {len(test)} whose labels the search did not see"
        print(f"{dataset.name}: {len(train)} training and {len(test)} test images ({dataset.source}{unseen})")
        results = _run_seeds(config, rules, workdir, dataset, train, train_labels, test, test_labels)
    print_table(config, results)
    print(f"\nfigures, checkpoints and results: {config.workdir}")
    return results


def _run_seeds(
    config: Config,
    rules: tuple[LearningRule, ...],
    workdir: Workdir,
    dataset: data.Dataset,
    train: np.ndarray,
    train_labels: np.ndarray | None,
    test: np.ndarray,
    test_labels: np.ndarray | None,
) -> list[SeedResult[EnergyNet]]:
    """Trains and evaluates seed by seed; what a finished seed left behind is read instead."""
    architecture = architecture_of(config)
    images = jnp.asarray(train)
    zca = jax.jit(lambda images: rules[0].init(jax.random.key(0), evaluation.to_float(images)))(images)
    if config.devices > 1:
        images, zca = jax.device_put((images, zca), NamedSharding(_mesh(config), PartitionSpec()))
    seeds = workdir.seeds
    assert config.seeds_together is not None
    assert config.networks is not None
    size = config.seeds_together
    groups = [
        [Member(seed, network) for seed in seeds[start : start + size]]
        for network in range(config.networks)
        for start in range(0, len(seeds), size)
    ]
    trained: dict[Member, Trained] = {}
    results: list[SeedResult[EnergyNet]] = []
    keep = partial(
        Outcome, dataset=dataset, num_train=len(train), num_test=len(test), paper=paper_numbers(config)
    )
    for seed in seeds:
        finished = workdir.finished(seed)
        if finished is not None:
            network = EnergyNet.load(config.workdir / f"network-seed{seed}", architecture=architecture)
            workdir.finish(seed, keep(finished["metrics"], seconds=finished["seconds"]))
            results.append(SeedResult(seed, network, finished["metrics"]))
            continue
        workdir.discard(seed)
        own = [Member(seed, network) for network in range(config.networks)]
        for group in groups:
            if any(member in own and member not in trained for member in group):
                trained |= train_group(config, rules, zca, images, group, workdir)
        start = time.perf_counter()
        nets = [trained.pop(member) for member in own]
        result, clustering = evaluate(
            config, architecture, seed, [n.states for n in nets], test, test_labels, train, train_labels
        )
        seconds = sum(n.seconds for n in nets)
        result.metrics["training_seconds"] = round(seconds, 1)
        result.metrics["peak_gib"] = round(peak_gib(), 2)
        seconds += time.perf_counter() - start
        if seed == config.seed:  # before the seed counts as finished: a resumed run draws too
            draw(config, result.network, nets[0].energies, clustering, train, test, test_labels)
        workdir.finish(seed, keep(result.metrics, seconds=seconds))
        results.append(result)
    return results


def architecture_of(config: Config) -> energy.EnergyArchitecture:
    """The named architecture with the config's ablations."""
    architecture = architectures.get(config.architecture).architecture
    if not config.zca:
        architecture = architecture._replace(zca_num_components=0)
    if config.rank_one:
        layers = tuple(layer._replace(rank=1) for layer in architecture.layers)
        architecture = architecture._replace(layers=layers)
    return architecture


def train_group(
    config: Config,
    rules: tuple[LearningRule, ...],
    zca: Any,
    images: Array,
    members: Sequence[Member],
    workdir: Workdir,
) -> dict[Member, Trained]:
    """Trains networks at the same time, layer after layer; continues from their checkpoint."""
    together = len(members) > 1
    name = "-".join(map(str, members[0]))
    checkpoints = Checkpoints(config.workdir / f"checkpoints-{name}")
    layers: list[k_subspaces.KSubspacesState] = []
    energies: list[np.ndarray] = []
    (current, done), stored = checkpoints.newest() or ((0, 0), None)
    clock = time.monotonic()
    if stored is not None:
        layers = [k_subspaces.KSubspacesState(jnp.asarray(bases)) for bases in stored["bases"]]
        energies = [np.asarray(curve) for curve in stored["energies"]]
        clock -= float(stored["seconds"])

    def stacked(values: list[Any]) -> Any:
        return jnp.stack(values) if together else values[0]

    for index in range(max(current, 1), len(rules)):
        orders = stacked([_minibatches(config, len(images), member, index) for member in members])
        steps = orders.shape[-2]
        below = tuple(layers[: index - 1])
        if index > current:
            begin = _compiled_begin(config, rules, index, together)
            keys = stacked([_key(member, index) for member in members])
            layers.append(begin(keys, zca, below, images, orders[..., 0, :]))
            energies.append(np.zeros((0, len(members))))
            done = 0
        if config.random_subspaces:
            continue
        step = _compiled_steps(config, rules, index, together)
        stride = 1 if jax.default_backend() == "cpu" else 10  # a short step is mostly its launch
        last_saved = time.monotonic()
        title = f"seed {members[0].seed}, layer {index}"
        bar = tqdm(total=steps, initial=done, desc=title, unit="step")
        while done < steps:
            end = min(done + stride, steps)
            warmup = jnp.arange(done, end) < config.warmup_steps
            chosen = orders[..., done:end, :]
            layers[-1], info = step(layers[-1], zca, below, images, chosen, warmup)
            found = np.asarray(info.energy).reshape(len(members), end - done).T
            if not np.all(np.isfinite(found)):
                raise ConfigError(f"the energy of layer {index} is not finite at step {done}")
            energies[-1] = np.concatenate([energies[-1], found])
            bar.update(end - done)
            bar.set_postfix(energy=f"{found.mean():.4g}")
            done = end
            if time.monotonic() - last_saved >= training.CHECKPOINT_SECONDS or done == steps:
                checkpoints.save(
                    (index, done),
                    {
                        "bases": [layer.bases for layer in layers],
                        "energies": energies,
                        "seconds": np.float64(time.monotonic() - clock),
                    },
                )
                last_saved = time.monotonic()
        bar.close()
        for place, member in enumerate(members):
            final = float(energies[-1][-1, place])
            workdir.log(**member._asdict(), layer=index, final_energy=final)
    seconds = (time.monotonic() - clock) / len(members)

    def of_member(tree: Any, place: int) -> Any:
        return jax.tree.map(lambda leaf: leaf[place], tree) if together else tree

    return {
        member: Trained(
            (zca, *(of_member(layer, place) for layer in layers)),
            [curve[:, place] for curve in energies],
            seconds,
        )
        for place, member in enumerate(members)
    }


def _key(member: Member, layer: int) -> Array:
    """The key of a layer's initial state; a first network has the key of a single one."""
    key = jax.random.fold_in(jax.random.key(member.seed), layer)
    return jax.random.fold_in(key, member.network) if member.network else key


def _begin_layer(
    config: Config,
    rules: Sequence[LearningRule],
    index: int,
    key: Array,
    zca: Any,
    below: tuple[Any, ...],
    images: Array,
    chosen: Array,
) -> k_subspaces.KSubspacesState:
    """The initial state of a layer from a first minibatch of the codes below."""
    codes = stack(*rules).encode((zca, *below), evaluation.to_float(images[chosen]))
    rule = random_rule(rules[index]) if config.random_subspaces else rules[index]
    state: k_subspaces.KSubspacesState = rule.init(key, codes)
    return state


def random_rule(rule: LearningRule) -> LearningRule:
    """An energy layer whose subspaces begin, and without updates stay, random and orthonormal."""

    def init(key: Array, images: Array) -> k_subspaces.KSubspacesState:
        shapes = jax.eval_shape(rule.init, key, images)
        num_subspaces, rank, features = shapes.bases.shape
        noise = jax.random.normal(key, (num_subspaces, features))
        return k_subspaces.init(key, noise, num_subspaces=num_subspaces, rank=rank)

    return rule._replace(init=init)


def _over_members(function: Callable[..., Any], together: bool, in_axes: Any) -> Callable[..., Any]:
    return jax.vmap(function, in_axes=in_axes) if together else function


# Networks trained one after the other share their compiled programs.
@lru_cache(maxsize=16)
def _compiled_begin(
    config: Config, rules: tuple[LearningRule, ...], index: int, together: bool
) -> Callable[..., Any]:
    """A jitted `_begin_layer`."""
    begin = partial(_begin_layer, config, rules, index)
    return jax.jit(_over_members(begin, together, (0, None, 0, None, 0)))


@lru_cache(maxsize=16)
def _compiled_steps(
    config: Config, rules: tuple[LearningRule, ...], index: int, together: bool
) -> Callable[..., Any]:
    """A jitted function that takes several minibatch steps of one layer."""
    net = stack(*rules)
    axis_name = "batch" if config.devices > 1 else None

    def update(
        state: Any, batch: Array, below: tuple[Any, ...], warmup: Array
    ) -> tuple[Any, k_subspaces.KSubspacesInfo]:
        codes = net.encode(below, evaluation.to_float(batch))
        return rules[index].update(state, codes, warmup=warmup, axis_name=axis_name)

    if axis_name is not None:
        update = jax.shard_map(
            update,
            mesh=_mesh(config),
            in_specs=(PartitionSpec(), PartitionSpec(axis_name), PartitionSpec(), PartitionSpec()),
            out_specs=PartitionSpec(),
        )

    def steps(
        state: Any, zca: Any, below: tuple[Any, ...], images: Array, chosen: Array, warmup: Array
    ) -> tuple[Any, k_subspaces.KSubspacesInfo]:
        def one(state: Any, batch: Array, warmup: Array) -> tuple[Any, Any]:
            return update(state, batch, (zca, *below), warmup)

        return scan_updates(one, state, images, chosen, warmup=warmup)

    compiled: Callable[..., Any] = jax.jit(
        _over_members(steps, together, (0, None, 0, None, 0, None)), donate_argnums=0
    )
    return compiled


def _mesh(config: Config) -> Mesh:
    return Mesh(np.array(jax.devices()[: config.devices]), ("batch",))


def evaluate(
    config: Config,
    architecture: energy.EnergyArchitecture,
    seed: int,
    networks: Sequence[tuple[Any, ...]],
    test: np.ndarray,
    test_labels: np.ndarray | None,
    train: np.ndarray,
    train_labels: np.ndarray | None,
) -> tuple[SeedResult[EnergyNet], evaluation.Clustering]:
    """Clusters pixels, every layer's codes (of a single network) and the pooled codes."""
    rules = energy.network_rules(architecture, rescale=config.rescale)
    assert config.num_clusters is not None
    assert config.code_power is not None
    key = jax.random.key(seed)
    cluster = partial(evaluation.cluster, key, num_clusters=config.num_clusters)
    metrics: dict[str, float] = {}
    pixels = jax.jit(evaluation.to_float)(jnp.asarray(test))
    names = ["zca", *(f"layer{i}" for i in range(1, len(rules)))]
    build = partial(EnergyNet, networks, architecture, rescale=config.rescale, code_power=config.code_power)
    each_layer = config.evaluate_layers and len(networks) == 1
    bar = tqdm(total=2 + len(names) * each_layer, desc="clustering the codes", unit="layer")
    if config.evaluate_layers:
        _note(metrics, "pixels_clustering_error", cluster(pixels, test_labels).clustering_error)
    if each_layer:
        codes = pixels
        for name, rule, state in zip(names, rules, networks[0], strict=True):
            codes = evaluation.map_batches(partial(jax.jit(rule.encode), state), codes)
            _note(metrics, f"{name}_clustering_error", cluster(codes, test_labels).clustering_error)
            bar.update()
        pooled = energy.pooled_codes(codes, power=config.code_power)
        del codes
    else:
        pooled = evaluation.map_batches(build(), pixels)
    found, whitening_state = cluster_codes(config, key, pooled, test_labels)
    _note(metrics, "test_clustering_error", found.clustering_error)
    _note(metrics, "test_purity", found.purity)
    _note(metrics, "test_normalized_mutual_info", found.normalized_mutual_info)
    _note(metrics, "test_adjusted_rand_index", found.adjusted_rand_index)
    bar.update()
    network = build(whitening=whitening_state, centroids=found.centroids)
    network.save(config.workdir / f"network-seed{seed}")
    some = train[: config.num_train_evaluated]
    if train_labels is not None and len(some):
        plain = build()
        train_codes = evaluation.map_batches(lambda batch: plain(evaluation.to_float(batch)), some)
        on_train, _ = cluster_codes(config, key, train_codes, train_labels[: len(some)])
        _note(metrics, "train_clustering_error", on_train.clustering_error)
    bar.update()
    bar.close()
    metrics["zca_dc_ratio"] = float(whitening.dc_ratio(networks[0][0].kernel))
    return SeedResult(seed, network, metrics), found


def cluster_codes(
    config: Config, key: Array, codes: Array, labels: np.ndarray | None
) -> tuple[evaluation.Clustering, whitening.PCAState | None]:
    """k-means on pooled codes, and the whitening that they went through."""
    assert config.num_clusters is not None
    state = None
    if config.code_whitening:
        codes = whitening.normalize(codes)
        components = min(_WHITENED_COMPONENTS, codes.shape[1])
        fit = jax.jit(partial(whitening.pca, num_components=components, exponent=config.code_whitening))
        state = fit(codes)
        codes = whitening.pca_whiten(codes, state)
    return evaluation.cluster(key, codes, labels, num_clusters=config.num_clusters), state


def _note(metrics: dict[str, float], name: str, value: float | None) -> None:
    if value is not None:
        metrics[name] = round(value, 4)


def draw(
    config: Config,
    network: EnergyNet,
    energies: Sequence[np.ndarray],
    clustering: evaluation.Clustering,
    train: np.ndarray,
    test: np.ndarray,
    test_labels: np.ndarray | None,
) -> None:
    """Writes the figures of the first seed to the workdir."""
    folder = config.workdir
    states = network.learned_states()[0]
    layers = network.architecture.layers
    channels = train.shape[-1]
    figures.kernels(
        np.asarray(states[1].bases), layers[0].kernel_size, channels, folder / "figure3_kernels.png"
    )
    first = evaluation.to_float(jnp.asarray(test[:3]))
    maps = [np.asarray(network.feature_maps(first, num_layers=n)) for n in range(1, len(layers) + 1)]
    figures.feature_maps(np.asarray(first), maps, folder / "figure4_feature_maps.png")
    figures.zca_kernel(np.asarray(states[0].kernel), folder / "figure6_zca_kernel.png")
    if not config.random_subspaces:
        figures.energies(energies, folder / "energies.png")
    figures.gallery(test, clustering.labels, test_labels, folder / "clusters.png")
    if test_labels is not None:
        figures.confusion(test_labels, clustering.labels, folder / "confusion.png")
    if config.learning_curve and min(train.shape[1:3]) >= 11:
        curve = learning_curve(config, train, test)
        figures.learning_curve(*curve, config.warmup_steps, folder / "figure5_learning_curve.png")


def learning_curve(
    config: Config, train: np.ndarray, test: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Energies of figure 5's layer: k = 64, r = 5, 9×9 patches of images whitened with 11×11, n = 16.

    Returns:
      Training energy of each step; the steps at which the energy of (up to 1,000) test images was
      measured; those energies.
    """
    zca = energy.network_rules(energy.EnergyArchitecture(11, 16, ()))[0]
    layer = energy.EnergyLayer(64, 5, 1, 9, 0)
    rule = energy.layer_rule(layer)
    net = stack(zca, rule)
    images = jnp.asarray(train)
    batch_size = min(256, len(train))
    passes = -(-_CURVE_STEPS * batch_size // len(train))
    order = _order(len(train), batch_size, passes=passes, entropy=(config.seed, 0))
    below = jax.jit(lambda images: zca.init(jax.random.key(0), evaluation.to_float(images)))(images)
    whiten = jax.jit(lambda images: net.encode((below,), evaluation.to_float(images)))
    state = jax.jit(rule.init)(jax.random.key(config.seed), whiten(images[order[0]]))
    update = jax.jit(lambda state, images, warmup: rule.update(state, whiten(images), warmup=warmup))
    held_out = jnp.asarray(test[:1000])
    every = max(1, len(order) // 16)
    train_energy, steps, test_energy = [], [], []
    for step, chosen in enumerate(tqdm(order, desc="learning curve", unit="step")):
        warmup = step < config.warmup_steps
        if step % every == 0 or step in (config.warmup_steps, len(order) - 1):
            steps.append(step)
            test_energy.append(float(update(state, held_out, warmup)[1].energy))
        state, info = update(state, images[chosen], warmup)
        train_energy.append(float(info.energy))
    return np.array(train_energy), np.array(steps), np.array(test_energy)


def paper_numbers(config: Config) -> dict[str, float]:
    """What the paper prints for this configuration (tables 2 and 5); empty where it has none."""
    switches = ("zca", "rescale", "rank_one", "random_subspaces")
    ablations = tuple(name for name in switches if getattr(config, name) != getattr(Config, name))
    found = PAPER.get((config.architecture, ablations))
    published = (config.networks, config.code_power, config.code_whitening) == (1, 1.0, 0.0)
    if config.dataset != "mnist" or found is None or not published:
        return {}
    numbers = dict(zip(("test_clustering_error", "train_clustering_error"), found, strict=True))
    if (config.architecture, ablations) == ("3layer", ()):
        numbers |= {f"{name}_clustering_error": value for name, value in PAPER_LAYERS.items()}
    return numbers


def print_table(config: Config, results: Sequence[SeedResult[EnergyNet]]) -> None:
    """Clustering errors of every representation beside the paper's."""
    paper = paper_numbers(config)
    names = [name for name in results[0].metrics if name.endswith("clustering_error")]
    if not names:
        print("no labels: see clusters.png for what was found")
        return
    header = ["clustering error in %"] + [f"seed {r.seed}" for r in results] + ["mean", "paper"]
    rows = []
    for name in names:
        values = [r.metrics[name] for r in results]
        title = {"test": "pooled", "train": "pooled, training images"}.get(
            name.removesuffix("_clustering_error"), name.removesuffix("_clustering_error")
        )
        cells = [f"{value:.2f}" for value in [*values, float(np.mean(values))]]
        rows.append([title, *cells, f"{paper[name]:.1f}" if name in paper else "–"])
    print("\n" + format_table(header, rows))


def _minibatches(config: Config, num_images: int, member: Member, layer: int) -> Array:
    """Image indices of each step, `[num_steps, batch_size]`; a last partial minibatch is dropped."""
    assert config.batch_size is not None
    assert config.passes is not None
    entropy = [*member] if member.network else [member.seed]  # a first network has that of a single one
    return _order(num_images, config.batch_size, passes=config.passes, entropy=(*entropy, layer))


def _order(num_images: int, batch_size: int, *, passes: int, entropy: Sequence[int]) -> Array:
    generator = np.random.default_rng(entropy)
    per_pass = num_images // batch_size
    used = per_pass * batch_size
    order = [generator.permutation(num_images)[:used] for _ in range(passes)]
    return jnp.asarray(np.concatenate(order).reshape(passes * per_pass, batch_size), jnp.int32)


def _check(config: Config) -> None:
    check_options(
        config,
        at_least={
            "batch_size": 1, "passes": 1, "warmup_steps": 0, "num_train": 1, "num_test": 1,
            "num_train_evaluated": 0, "num_clusters": 1, "seeds": 1, "seeds_together": 1, "devices": 1,
            "networks": 1, "seed": 0, "code_whitening": 0,
        },
        above={"code_power": 0},
    )  # fmt: skip
    if config.code_whitening > 0.5:
        raise ConfigError(f"code_whitening={config.code_whitening} is not accepted: it must be 0 to 0.5")
    available = jax.device_count()
    if config.devices > available:
        hint = "; set JAX_NUM_CPU_DEVICES for more on a CPU" if jax.default_backend() == "cpu" else ""
        raise ConfigError(f"devices={config.devices} is not accepted: there are {available}{hint}")


def _fill_in(
    config: Config, name: str, num_train: int, labels: np.ndarray | None, options: Mapping[str, Any]
) -> Config:
    """The defaults that depend on the data and on the network, and the data set's own name."""
    small = num_train < 10_000
    left = {key: value for key, value in options.items() if getattr(config, key) == getattr(Config, key)}
    if left.get("batch_size", 1) > num_train:
        del left["batch_size"]
    config = replace(config, **left)
    return replace(
        config,
        dataset=name,
        architecture=_architecture_name(config, name),
        batch_size=config.batch_size or min(128 if small else 512, num_train),
        passes=config.passes or (3 if small else 1),
        networks=config.networks or 1,
        code_power=config.code_power or 1.0,
        learning_curve=not small if config.learning_curve is None else config.learning_curve,
        num_clusters=config.num_clusters or (10 if labels is None else len(np.unique(labels))),
    )


def _architecture_name(config: Config, dataset: str) -> str:
    if config.architecture != "auto":
        return config.architecture
    return "digits" if dataset == "digits" else "3layer"


def _check_sizes(config: Config, rules: Sequence[LearningRule], train: np.ndarray, test: np.ndarray) -> None:
    """Every shape of the run is derived without computing: the library's checks speak first."""
    assert config.num_clusters is not None
    evaluated = min(config.num_train_evaluated, len(train))
    for what, number in {"test": len(test), "evaluated training": evaluated}.items():
        if 0 < number < config.num_clusters:
            raise ConfigError(f"num_clusters={config.num_clusters} exceeds the {number} {what} images")
    assert config.batch_size is not None
    if config.batch_size > len(train):
        raise ConfigError(f"batch_size={config.batch_size} exceeds the {len(train)} training images")
    if config.devices > 1 and (config.seeds_together or 1) > 1 and jax.default_backend() == "cpu":
        # Factorisations mapped over seeds and devices wait for each other's threads there, without end.
        raise ConfigError(f"seeds_together={config.seeds_together} is not accepted on a CPU with devices > 1")
    if config.batch_size % config.devices:
        raise ConfigError(f"batch_size={config.batch_size} cannot be split over devices={config.devices}")
    batch = jax.ShapeDtypeStruct((config.batch_size, *train.shape[1:]), jnp.float32)
    net = stack(*rules)
    jax.eval_shape(lambda x: energy.average_pool(net.encode(net.init(jax.random.key(0), x), x)), batch)


def _networks_that_fit(config: Config, rules: Sequence[LearningRule], train: np.ndarray) -> int:
    device = jax.devices()[0]
    if device.platform == "cpu":
        return 1
    stats = device.memory_stats() or {}
    limit = stats.get("bytes_limit", 8 * 2**30)
    assert config.batch_size is not None
    shape = jax.ShapeDtypeStruct((config.batch_size, *train.shape[1:]), jnp.float32)
    codes = 0
    for depth in range(1, len(rules) + 1):
        net = stack(*rules[:depth])
        out = jax.eval_shape(lambda x, n=net: n.encode(n.init(jax.random.key(0), x), x), shape)
        codes += out.size * 4
    # Codes of all layers, their copies, and the chunks of patches with their responses.
    per_network = 3 * codes + 8 * patches.chunk_bytes()
    return max(1, int(0.6 * limit) // per_network)


def main() -> None:
    """The command line."""
    command_line(run, Config, description=__doc__)


if __name__ == "__main__":
    main()
