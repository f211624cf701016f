"""Digits fall into clusters: stacked energy layers learned without labels (paper 000).

    python -m experiments.mnist_energy                      # MNIST if available, else bundled digits
    python -m experiments.mnist_energy --data-dir DIR --seeds 5
    python -m experiments.mnist_energy --architecture 1layer

The steps: ConvZCA; energy layers, trained one after the other by minibatch K-Subspaces in one pass over the
training images; 2×2 average pooling; k-means on the test codes. The paper reports 2.1 % clustering error on
MNIST for its three-layer network, the best of 2,000 searched configurations. experiments/results/README.md
lists our results, with seeds, device and time.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from experiments import data
from experiments.common import architectures, energy_curve, evaluation, figures
from experiments.common.options import ConfigError, RunOptions, check_at_most, check_options, command_line
from experiments.common.runs import Learned, SeedResult, Workdir, identity, peak_gib, run_seeds
from experiments.common.training import Checkpoints, Timer
from experiments.data import Split
from sul_jax import LearningRule, energy, k_subspaces, patches, stack, training, whitening
from sul_jax.cli.ranges import NonNegativeInt, PositiveFloat, PositiveInt, Range
from sul_jax.nn import EnergyNet
from sul_jax.seeds import of_seed

EXPERIMENT = "mnist_energy"
_WHITENED_COMPONENTS = 20
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


@dataclass(frozen=True, kw_only=True)
class Config(RunOptions):
    """Options of the experiment."""

    dataset: str = "auto"
    """mnist, fashion_mnist, digits, FILE.npz, or auto: MNIST if available, else the bundled digits."""
    workdir: Path = Path("runs/mnist_energy")
    """Where everything is written; a folder previous-… in it keeps an earlier run."""
    architecture: str = "auto"
    """1layer, 2layer, 3layer or 4layer are the paper's networks (table 6); or the name or FILE.json of a
    network that tune_energy found; or auto: digits for the bundled digits, else 3layer."""
    zca: bool = True
    """Whiten the images first; --no-zca feeds pixels to the first layer."""
    rescale: bool = True
    """Rescale each code to the norm of its input patch."""
    rank_one: bool = False
    """Ablation: one-dimensional subspaces."""
    random_subspaces: bool = False
    """Ablation: random orthonormal subspaces, nothing is learned."""
    batch_size: PositiveInt | None = None
    """Images in a minibatch; by default the paper's 512, or 128 on small data sets."""
    passes: PositiveInt | None = None
    """Passes over the training images for each layer; by default 1, or 3 on small data sets."""
    warmup_steps: NonNegativeInt = 10
    """First steps of each layer, in which only one direction of each subspace decides which vectors it
    gets."""
    networks: PositiveInt | None = None
    """Networks trained independently, each in its own passes; their codes are put side by side. By default as
    many as the architecture was found with, else 1. A run resumed with more networks trains only the missing
    ones."""
    code_power: PositiveFloat | None = None
    """Power of the pooled codes before clustering; 0.5 takes the square root. By default the power with which
    the architecture was found, else 1."""
    code_whitening: Annotated[float, Range(0, 0.5)] = 0.0
    """If positive: before clustering, codes are normalised, and their 20 leading principal components are
    divided by their variance to this power; 0.5 would be full whitening."""
    cluster_by: Literal["k_means", "k_subspaces"] = "k_means"
    """What clusters the pooled codes: k_means, as in the paper, or k_subspaces, the paper's own local rule,
    on codes of unit norm. It starts from k-means' clusters; of ten starts, the one of least energy is
    taken."""
    cluster_rank: PositiveInt = 3
    """Rank of the subspaces of k_subspaces, one subspace for each cluster."""
    num_train: PositiveInt | None = None
    """Use only this many training images, the first ones."""
    num_test: PositiveInt | None = None
    """Use only this many test images, the first ones."""
    num_train_evaluated: NonNegativeInt = 10_000
    """Training images whose codes are clustered for the training error."""
    evaluate_layers: bool = True
    """Also cluster the pixels and, with a single network, the codes of every layer (table 2)."""
    num_clusters: PositiveInt | None = None
    """Clusters; by default the number of classes, or 10 without labels."""
    seeds_together: PositiveInt | None = None
    """Networks trained at the same time by vmap; by default as many as an accelerator's memory holds, and 1
    on a CPU, where one network keeps all cores busy."""
    devices: PositiveInt = 1
    """Devices over which each minibatch is split."""
    learning_curve: bool | None = None
    """Draw the learning curve of figure 5. It comes from a separate layer with its own sizes (60 steps, the
    paper's 234), and needs images of at least 11×11 pixels. By default on data sets of at least 10,000
    images."""


@dataclass(frozen=True, kw_only=True)
class Filled(Config):
    """The options with nothing left open."""

    batch_size: int
    passes: int
    networks: int
    code_power: float
    num_clusters: int
    seeds_together: int
    learning_curve: bool


# Options that a resumed run may change: its networks are evaluated again.
EVALUATION = (
    "networks", "num_test", "num_train_evaluated", "evaluate_layers", "num_clusters", "code_power",
    "code_whitening", "learning_curve", "cluster_by", "cluster_rank",
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
    if config.architecture == "auto":
        config = replace(config, architecture="digits" if dataset.name == "digits" else "3layer")
    named = architectures.get(config.architecture)
    train = dataset.train[: config.num_train]
    # The search for a network has seen the labels of the first images.
    searched = 0
    if dataset.is_one_set and named.study.get("searched"):
        same = named.study["crc32"] == identity(dataset.train_images)["crc32"]
        searched = int(named.study["searched"]) if same else 0
    test = dataset.test[searched:][: config.num_test]
    filled = fill_in(config, dataset.name, train, test, named.options)
    told_apart = identity(train.images) | {"sizes": architecture_of(filled).to_dict()}
    with Workdir(EXPERIMENT, filled, data=told_apart, may_differ=EVALUATION) as workdir:
        number = len(test.images)
        if searched:
            print(f"tested on the {number} images whose labels the search of this network did not see")
        return run_seeds(
            workdir,
            partial(_learned, filled, workdir, train, test),
            dataset,
            num_train=len(train.images),
            num_test=number,
            paper=paper_numbers(filled),
            together=len(workdir.seeds),
        )


def _learned(
    config: Filled, workdir: Workdir, train: Split, test: Split, seeds: range
) -> Iterator[Learned[EnergyNet]]:
    """Trains and evaluates seed by seed; what a finished seed left behind is read instead."""
    trainer, size = Trainer(config, train.images, workdir), config.seeds_together
    groups = [
        [Member(seed, network) for seed in seeds[start : start + size]]
        for network in range(config.networks)
        for start in range(0, len(seeds), size)
    ]
    trained: dict[Member, Trained] = {}
    for seed in seeds:
        finished = workdir.finished(seed)
        if finished is not None:
            folder = config.workdir / f"network-seed{seed}"
            network = EnergyNet.load(folder, architecture=architecture_of(config))
            yield Learned(network, finished["metrics"], finished["seconds"])
            continue
        workdir.discard(seed)
        own = [Member(seed, network) for network in range(config.networks)]
        for group in groups:
            if any(member in own and member not in trained for member in group):
                trained |= trainer.train(group)
        start = time.perf_counter()
        nets = [trained.pop(member) for member in own]
        network, metrics, clustering = evaluate(config, seed, [net.states for net in nets], train, test)
        seconds = sum(net.seconds for net in nets)
        metrics["training_seconds"] = round(seconds, 1)
        metrics["peak_gib"] = round(peak_gib(), 2)
        seconds += time.perf_counter() - start
        if seed == config.seed:  # before the seed counts as finished: a resumed run draws too
            draw(config, network, nets[0].energies, clustering, train, test)
        yield Learned(network, metrics, seconds)


def architecture_of(config: Config) -> energy.EnergyArchitecture:
    """The named architecture with the config's ablations."""
    architecture = architectures.get(config.architecture).architecture
    if not config.zca:
        architecture = architecture._replace(zca_num_components=0)
    if config.rank_one:
        layers = tuple(layer._replace(rank=1) for layer in architecture.layers)
        architecture = architecture._replace(layers=layers)
    return architecture


def rules_of(config: Config) -> tuple[LearningRule, ...]:
    """Whitening and energy layers."""
    options = {"rescale": config.rescale, "random_subspaces": config.random_subspaces}
    return energy.network_rules(architecture_of(config), **options)


class Trainer:
    """Trains networks on images that are whitened once for all of them; they share compiled programs."""

    def __init__(self, config: Filled, images: np.ndarray, workdir: Workdir):
        self.config, self.workdir, self.number = config, workdir, len(images)
        self.steps = config.passes * (self.number // config.batch_size)
        whiten, *self.layers = rules_of(config)
        self.images = jnp.asarray(images)
        learn = jax.jit(lambda images: whiten.init(jax.random.key(0), evaluation.to_float(images)))
        self.zca = learn(self.images)
        mesh = None
        if config.devices > 1:
            mesh = Mesh(np.array(jax.devices()[: config.devices]), ("batch",))
            everywhere = NamedSharding(mesh, PartitionSpec())
            self.images, self.zca = jax.device_put((self.images, self.zca), everywhere)
        self.programs = training.LayerPrograms(
            self.layers,
            lambda chosen, images, zca: whiten.encode(zca, evaluation.to_float(images[chosen])),
            mesh,
        )

    def train(self, members: Sequence[Member]) -> dict[Member, Trained]:
        """Trains networks at the same time, layer after layer; continues from their checkpoint."""
        checkpoints = Checkpoints(self.config.workdir / f"checkpoints-{'-'.join(map(str, members[0]))}")
        (_, done), stored = checkpoints.newest() or ((0, 0), {"bases": [], "energies": [], "seconds": 0})
        states = [k_subspaces.KSubspacesState(jnp.asarray(bases)) for bases in stored["bases"]]
        # Of each layer `[steps, members]`.
        energies = {i: np.asarray(curve) for i, curve in enumerate(stored["energies"])}
        timer = Timer(float(stored["seconds"]))
        bar = tqdm(unit="step", initial=done)

        def look(place: int, done: int, states: tuple[Any, ...], infos: Any) -> None:
            curves = np.asarray(infos.energy)
            if not np.all(np.isfinite(curves)):
                raise ConfigError(f"the energy of layer {place + 1} is not finite at step {done}")
            energies[place] = np.concatenate([energies.get(place, curves[:0]), curves])
            bar.set_description(f"seed {members[0].seed}, layer {place + 1}", refresh=False)
            bar.total, bar.n = self.steps, done
            bar.set_postfix(energy=f"{curves.mean():.4g}")
            if done == self.steps or timer.is_due():
                tree = {
                    "bases": [state.bases for state in states],
                    "energies": [*energies.values()],
                    "seconds": np.float64(timer.seconds()),
                }
                checkpoints.save((place, done), tree)
                timer.saved()

        with bar:
            learned = training.train_layers(
                self.layers,
                states[:-1],
                partial(self._plan, members),
                self.images,
                self.zca,
                hyperparameters=lambda steps: {"warmup": steps < self.config.warmup_steps},
                unfinished=(states[-1], done) if states else None,
                stride=1 if jax.default_backend() == "cpu" else 10,  # a short step is mostly its launch
                callback=look,
                programs=self.programs,
            )
        for index, member in enumerate(members):
            for layer, curve in energies.items():
                self.workdir.log(**member._asdict(), layer=layer + 1, final_energy=float(curve[-1, index]))
        return {
            member: Trained(
                (self.zca, *(of_seed(state, index) for state in learned)),
                [energies[layer][:, index] for layer in sorted(energies)],
                timer.seconds() / len(members),
            )
            for index, member in enumerate(members)
        }

    def _plan(self, members: Sequence[Member], place: int) -> training.LayerTraining:
        # A first network has the order of a single one.
        entropies = [[m.seed, *([m.network] if m.network else []), place + 1] for m in members]
        size, steps = self.config.batch_size, self.steps
        orders = [training.shuffled(own, self.number, size, num_steps=steps) for own in entropies]
        chosen = np.stack(orders, axis=1).astype(np.int32)
        keys = jnp.stack([_key(member, place + 1) for member in members])
        steps = 0 if self.config.random_subspaces else steps
        return training.LayerTraining(lambda first, end: chosen[first:end], steps, keys)


def _key(member: Member, layer: int) -> Array:
    """The key of a layer's initial state; a first network has the key of a single one."""
    key = jax.random.fold_in(jax.random.key(member.seed), layer)
    return jax.random.fold_in(key, member.network) if member.network else key


def evaluate(
    config: Filled, seed: int, networks: Sequence[tuple[Any, ...]], train: Split, test: Split
) -> tuple[EnergyNet, dict[str, float], evaluation.Clustering]:
    """Clusters pixels, every layer's codes (of a single network) and the pooled codes."""
    rules = rules_of(config)
    key = jax.random.key(seed)
    cluster = partial(evaluation.cluster, key, num_clusters=config.num_clusters)
    metrics: dict[str, float] = {}

    def note(
        prefix: str, clustering: evaluation.Clustering, names: Sequence[str] = ("clustering_error",)
    ) -> None:
        scores = clustering.scores
        metrics.update({f"{prefix}_{name}": round(scores[name], 4) for name in names if name in scores})

    pixels = jax.jit(evaluation.to_float)(jnp.asarray(test.images))
    names = ["zca", *(f"layer{i}" for i in range(1, len(rules)))]
    build = partial(
        EnergyNet, networks, architecture_of(config), rescale=config.rescale, code_power=config.code_power
    )
    each_layer = config.evaluate_layers and len(networks) == 1
    with tqdm(total=2 + len(names) * each_layer, desc="clustering the codes", unit="layer") as bar:
        if config.evaluate_layers:
            note("pixels", cluster(pixels, test.labels))
        if each_layer:
            codes = pixels
            for name, rule, state in zip(names, rules, networks[0], strict=True):
                codes = training.map_batches(partial(jax.jit(rule.encode), state), codes)
                note(name, cluster(codes, test.labels))
                bar.update()
            pooled = energy.pooled_codes(codes, power=config.code_power)
            del codes
        else:
            pooled = training.map_batches(build(), pixels)
        clustering, whitening_state = cluster_codes(config, key, pooled, test.labels)
        note(
            "test",
            clustering,
            ("clustering_error", "purity", "normalized_mutual_info", "adjusted_rand_index"),
        )
        bar.update()
        network = build(whitening=whitening_state, **clustering.model)
        network.save(config.workdir / f"network-seed{seed}")
        some = train[: config.num_train_evaluated]
        if some.labels is not None and len(some):
            plain = build()
            codes = training.map_batches(lambda batch: plain(evaluation.to_float(batch)), some.images)
            on_train, _ = cluster_codes(config, key, codes, some.labels)
            note("train", on_train)
        bar.update()
    metrics["zca_dc_ratio"] = float(whitening.dc_ratio(networks[0][0].kernel))
    return network, metrics, clustering


def cluster_codes(
    config: Filled, key: Array, codes: Array, labels: np.ndarray | None
) -> tuple[evaluation.Clustering, whitening.PCAState | None]:
    """Clusters of pooled codes, and the whitening that they went through."""
    state = None
    if config.code_whitening:
        codes = whitening.normalize(codes)
        components = min(_WHITENED_COMPONENTS, codes.shape[1])
        fit = jax.jit(partial(whitening.pca, num_components=components, exponent=config.code_whitening))
        state = fit(codes)
        codes = whitening.pca_whiten(codes, state)
    rank = config.cluster_rank if config.cluster_by == "k_subspaces" else None
    return evaluation.cluster(key, codes, labels, num_clusters=config.num_clusters, rank=rank), state


def draw(
    config: Filled,
    network: EnergyNet,
    energies: Sequence[np.ndarray],
    clustering: evaluation.Clustering,
    train: Split,
    test: Split,
) -> None:
    """Writes the figures of the first seed to the workdir."""
    folder = config.workdir
    states, layers = network.learned_states()[0], network.architecture.layers
    bases, channels = np.asarray(states[1].bases), train.images.shape[-1]
    figures.kernels(bases, layers[0].kernel_size, channels, folder / "figure3_kernels.png")
    first = evaluation.to_float(jnp.asarray(test.images[:3]))
    maps = [np.asarray(network.feature_maps(first, num_layers=n)) for n in range(1, len(layers) + 1)]
    figures.feature_maps(np.asarray(first), maps, folder / "figure4_feature_maps.png")
    figures.zca_kernel(np.asarray(states[0].kernel), folder / "figure6_zca_kernel.png")
    if energies:
        figures.energies(energies, folder / "energies.png")
    figures.gallery(test.images, clustering.labels, test.labels, folder / "clusters.png")
    if test.labels is not None:
        figures.confusion(test.labels, clustering.labels, folder / "confusion.png")
    if config.learning_curve and min(train.images.shape[1:3]) >= 11:
        curve = energy_curve.learning_curve(
            train.images, test.images, seed=config.seed, warmup_steps=config.warmup_steps
        )
        figures.learning_curve(*curve, config.warmup_steps, folder / "figure5_learning_curve.png")


def paper_numbers(config: Filled) -> dict[str, float]:
    """What the paper prints for this configuration (tables 2 and 5); empty where it has none."""
    switches = ("zca", "rescale", "rank_one", "random_subspaces")
    ablations = tuple(name for name in switches if getattr(config, name) != getattr(Config, name))
    errors = PAPER.get((config.architecture, ablations))
    published = (config.networks, config.code_power, config.code_whitening) == (1, 1.0, 0.0)
    if config.dataset != "mnist" or errors is None or not published or config.cluster_by != "k_means":
        return {}
    numbers = dict(zip(("test_clustering_error", "train_clustering_error"), errors, strict=True))
    if (config.architecture, ablations) == ("3layer", ()):
        numbers |= {f"{name}_clustering_error": value for name, value in PAPER_LAYERS.items()}
    return numbers


def _check(config: Config) -> None:
    check_options(config)
    available = jax.device_count()
    if config.devices > available:
        hint = "; set JAX_NUM_CPU_DEVICES for more on a CPU" if jax.default_backend() == "cpu" else ""
        raise ConfigError(f"devices={config.devices} is not accepted: there are {available}{hint}")


def fill_in(config: Config, name: str, train: Split, test: Split, options: Mapping[str, Any]) -> Filled:
    """The defaults that depend on the data and on the network, and the data set's own name."""
    number = len(train.images)
    small = number < 10_000
    if unknown := options.keys() - vars(config).keys():
        raise ConfigError(f"architecture={config.architecture!r} names unknown options: {', '.join(unknown)}")
    left = {key: value for key, value in options.items() if getattr(config, key) == getattr(Config, key)}
    check_options(replace(config, **left))
    if left.get("batch_size", 1) > number:
        del left["batch_size"]
    config = replace(config, dataset=name, **left)
    defaults = {
        "batch_size": config.batch_size or min(128 if small else 512, number),
        "passes": config.passes or (3 if small else 1),
        "networks": config.networks or 1,
        "code_power": config.code_power or 1.0,
        "learning_curve": not small if config.learning_curve is None else config.learning_curve,
        "num_clusters": config.num_clusters or test.num_classes or 10,
        "seeds_together": config.seeds_together or 1,
    }
    filled = Filled(**{**vars(config), **defaults})
    _check_sizes(filled, train, test)
    if config.seeds_together is None:
        filled = replace(filled, seeds_together=_networks_that_fit(filled, train))
    return filled


def _check_sizes(config: Filled, train: Split, test: Split) -> None:
    """Every shape of the run is derived without computing: the library's checks speak first."""
    number = len(train.images)
    evaluated = min(config.num_train_evaluated, number)
    for what, images in {"test": len(test.images), "evaluated training": evaluated}.items():
        if images:
            check_at_most("num_clusters", config.num_clusters, images, f"{what} images")
    check_at_most("batch_size", config.batch_size, number, "training images")
    if config.devices > 1 and config.seeds_together > 1 and jax.default_backend() == "cpu":
        # Factorisations mapped over seeds and devices wait for each other's threads there, without end.
        raise ConfigError(f"seeds_together={config.seeds_together} is not accepted on a CPU with devices > 1")
    if config.batch_size % config.devices:
        raise ConfigError(f"batch_size={config.batch_size} cannot be split over devices={config.devices}")
    maps = _shapes(config, train)[-1]
    pooled = jax.eval_shape(energy.pooled_codes, jax.ShapeDtypeStruct(maps, jnp.float32)).shape[1]
    codes = min(_WHITENED_COMPONENTS, pooled) if config.code_whitening else pooled * config.networks
    if config.cluster_by == "k_subspaces":
        check_at_most("cluster_rank", config.cluster_rank, codes, "codes of an image")


def _shapes(config: Filled, train: Split) -> list[tuple[int, ...]]:
    """Of every layer's codes of a minibatch."""
    batch = jax.ShapeDtypeStruct((config.batch_size, *train.images.shape[1:]), jnp.float32)
    rules = rules_of(config)
    nets = [stack(*rules[:depth]) for depth in range(1, len(rules) + 1)]
    return [
        jax.eval_shape(lambda x, net=net: net.encode(net.init(jax.random.key(0), x), x), batch).shape
        for net in nets
    ]


def _networks_that_fit(config: Filled, train: Split) -> int:
    device = jax.devices()[0]
    if device.platform == "cpu":
        return 1
    limit = (device.memory_stats() or {}).get("bytes_limit", 8 * 2**30)
    codes = sum(4 * int(np.prod(shape)) for shape in _shapes(config, train))
    # Codes of all layers, their copies, and the chunks of patches with their responses.
    return max(1, int(0.6 * limit) // (3 * codes + 8 * patches.chunk_bytes()))


main = partial(command_line, run, Config, description=__doc__)


if __name__ == "__main__":
    main()
