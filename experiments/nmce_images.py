"""Natural images clustered by their manifolds: CIFAR-10, CIFAR-20, STL-10 (paper 003, section 4.2).

    python -m experiments.nmce_images --data-dir DIR                                # all three stages
    python -m experiments.nmce_images --data-dir DIR --stage 1 --judge-features     # table 2, figure A.1
    python -m experiments.nmce_images --data-dir DIR --stage 3 --resume             # goes on from there
    python -m experiments.nmce_images --data-dir DIR --stage 1 --sweep 20 30 40 50 60 70     # table A.3
    python -m experiments.nmce_images --data-dir DIR --features-from RUN --weight-decays 0 0.001 0.001
    python -m experiments.nmce_images --dataset ./imagenet10 --image-size 96

Stage 1 learns features by the total coding rate (eq. 5), stage 2 a new embedding and cluster head on the
fixed network by the NMCE loss (eq. 4), stage 3 all of it. The paper reports for CIFAR-10 with ResNet-18
accuracy 83.0, NMI 76.1 and ARI 71.0 after 600 + 100 + 100 epochs on a GPU (before stage 3: 81.9, 74.3, 69.0).
README.md lists what ours gives, with seeds, device and time.

The defaults are those of the paper's table B.1 for the data set and the depth, where the authors' code takes
other numbers (stage 1: rate 0.3, λ 30, decay 1e-4; later stages: λ 0). As in their code LARS is the clipped
one, the cluster head learns at a constant rate without it, the network's batch statistics move in stage 2 as
well, and the clusters are judged on the images learned from. Stage 3 trains every layer, as the text says;
their code leaves out the one below the embedding. Images stay in [0, 1], where their code standardises
CIFAR's channels. Figures 2 and A.3 show features of the images as they are, where the paper averages over 16
views. The paper finds stages 2 and 3 sensitive to the weight decay: --features-from tries them anew.
"""

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array

from experiments import data
from experiments.common import evaluation, figures
from experiments.common.options import ConfigError, check_options, command_line
from experiments.common.runs import Outcome, SeedResult, Workdir, identity, sweep
from experiments.common.tables import print_metrics
from experiments.common.training import compiled_steps, convolution_stride, run_steps
from sul_jax import augment, coding_rate
from sul_jax.nn import NMCE, ResNet
from sul_jax.nn.backbones import RESNET_BLOCKS

EXPERIMENT = "nmce_images"
_NAMES = ("clustering_accuracy", "normalized_mutual_info", "adjusted_rand_index")
# Table 3, in percent, by data set and depth; table A.2 before the third stage.
PAPER = {
    ("cifar10", 18): (83.0, 76.1, 71.0),
    ("cifar10", 34): (89.1, 81.2, 79.5),
    ("cifar20", 18): (43.7, 48.8, 32.2),
    ("cifar20", 34): (53.1, 52.4, 37.5),
    ("stl10", 18): (72.5, 61.4, 55.2),
    ("stl10", 34): (71.1, 60.0, 53.0),
}
PAPER_STAGE_2 = {("cifar10", 18): (81.9, 74.3, 69.0), ("cifar20", 18): (42.2, 47.1, 30.0)}
# Shares of the first stage after which its features are judged by their neighbours.
_LOOKS = (0, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1)
_LARGE = 64  # side from which images are ImageNet's kind rather than CIFAR's


class Schedule(NamedTuple):
    """What table B.1 gives for each stage."""

    epochs: tuple[int, int, int]
    learning_rates: tuple[float, float, float]
    weight_decays: tuple[float, float, float]
    invariance_weights: tuple[float, float, float]


_SMALL_RATES, _LARGE_RATES = (1.0, 0.5, 0.003), (1.0, 0.5, 0.0005)
_SCHEDULES = {
    ("cifar10", 18): Schedule((600, 100, 100), _SMALL_RATES, (1e-6, 0.005, 0.005), (50.0, 50.0, 50.0)),
    ("cifar10", 34): Schedule((1000, 100, 100), _SMALL_RATES, (1e-6, 0.001, 0.001), (50.0, 0.0, 0.0)),
    ("cifar20", 18): Schedule((600, 100, 100), _SMALL_RATES, (1e-6, 0.001, 0.001), (50.0, 0.0, 0.0)),
    ("cifar20", 34): Schedule((1000, 100, 100), _SMALL_RATES, (1e-6, 0.002, 0.002), (50.0, 0.0, 0.0)),
    ("stl10", 18): Schedule((1000, 400, 400), _LARGE_RATES, (1e-6, 0.002, 0.002), (30.0, 0.0, 30.0)),
    ("stl10", 34): Schedule((2000, 400, 400), _LARGE_RATES, (1e-6, 0.002, 0.002), (30.0, 0.0, 30.0)),
}
_LABELS = (1, 2, 5, 10, 20, 50, 100)  # of each class, for figure A.1
_DRAWS = 10
_NEIGHBOURS, _RANK = 11, 30  # of the authors' classifiers; ours scale all features to unit norm first


@dataclass(frozen=True)
class Config:
    """Options of the experiment; those that are not given are the paper's for the data set and the depth, of
    other data those of CIFAR-10 or, from 64 pixels on, of STL-10."""

    dataset: str = "cifar10"
    """cifar10, cifar20, stl10, FILE.npz, or a folder of images as ./FOLDER."""
    data_dir: Path | None = None
    """Folder of data sets; by default $SUL_JAX_DATA."""
    workdir: Path = Path("runs/nmce_images")
    """Where everything is written; an earlier run there is set aside, not lost."""
    image_size: int | None = None
    """Side to which the images of a folder are resized."""
    num_images: int | None = None
    """Use only the first training images."""
    num_test: int | None = None
    """Use only the first test images."""
    stage: int = 3
    """Last stage: 1 features, 2 clusters on fixed features, 3 all together. With --resume, those done
    before are not run again."""
    depth: int = 18
    """Of the ResNet: 10, 18 or 34."""
    stem: Literal["3x3", "5x5"] | None = None
    """First convolution: 3x3 for CIFAR, 5x5 with pooling from 64 pixels on."""
    augmentation: Literal["cifar", "imagenet"] | None = None
    """Random views: the paper's for CIFAR, or with stronger colours and blur, as from 64 pixels on."""
    features_from: Path | None = None
    """Workdir of another run whose stage 1 is taken instead of learning it."""
    num_filters: int = 64
    """Of the ResNet's first stage."""
    num_pre_features: int = 4096
    """Units below the embedding."""
    num_features: int = 128
    """Dimensions of the embedding."""
    num_clusters: int | None = None
    """Clusters; by default the number of classes."""
    batch_size: int = 1024
    """Images in a step, two views of each."""
    epochs: tuple[int, int, int] | None = None
    """Passes over the images in each stage."""
    learning_rates: tuple[float, float, float] | None = None
    """Of each stage, by LARS with a cosine to 0."""
    cluster_learning_rate: float = 0.5
    """Of the cluster head in stages 2 and 3, constant and without LARS."""
    weight_decays: tuple[float, float, float] | None = None
    """Of each stage, for weights but not for biases and normalisation."""
    trust_coefficient: float = 0.02
    """LARS's η."""
    eps_squared: float = 0.2
    """Squared distortion of the coding rates."""
    invariance_weights: tuple[float, float, float] | None = None
    """Weights λ of the views' similarity, of each stage."""
    temperature: float = 1.0
    """Temperature of the Gumbel softmax."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the network; losses and parameters are float32."""
    judge_features: bool = False
    """After stage 1, judge its features by labels: table 2 and figure A.1. Takes minutes."""
    num_views: int = 16
    """Random views whose features are averaged there."""
    sweep: tuple[float, ...] = ()
    """Weights λ with which stage 1 is run one after the other, each in a folder of its own (table A.3)."""
    seed: int = 0
    """First seed."""
    seeds: int = 1
    """Number of seeds: seed, seed + 1, …"""
    resume: bool = False
    """Continue the run in the workdir."""
    record: bool = False
    """Append the results to experiments/results/nmce_images.json."""


class Split(NamedTuple):
    """Images on the device, uint8 or floating, and their labels."""

    images: Array
    labels: np.ndarray | None


class Splits(NamedTuple):
    """What is learned from, and what classifiers on the features know and are asked."""

    train: Split
    known: Split
    asked: Split


def run(config: Config) -> list[SeedResult[NMCE]]:
    """Trains and evaluates; see the module's docstring.

    Args:
      config: the options.

    Returns:
      One `SeedResult` a seed; with `sweep`, one for each weight and seed.

    Raises:
      ValueError: options or data that cannot be used.
    """
    _check(config)
    if config.sweep:
        return _sweep(config)
    dataset = data.load(config.dataset, config.data_dir, image_size=config.image_size)
    if dataset.name == "stl10":  # the paper's 13,000
        dataset = data.joined(dataset)
    data.check_unit_range(dataset.train_images)
    splits = _splits(dataset, config)
    train = splits.train
    num_clusters = config.num_clusters or (None if train.labels is None else len(np.unique(train.labels)))
    if num_clusters is None:
        raise ConfigError("num_clusters is needed for images without labels")
    number = len(train.images)
    if config.batch_size > number:
        raise ConfigError(f"batch_size={config.batch_size} exceeds the {number} images")
    if config.judge_features and train.labels is None:
        raise ConfigError("judge_features needs labels")
    config = filled_in(replace(config, dataset=dataset.name, num_clusters=num_clusters), train.images.shape)
    paper = _paper(config)
    told_apart = identity(dataset.train_images[: config.num_images])
    if config.features_from is not None:  # before the run there is set aside, and hours are spent
        if config.features_from.resolve() == config.workdir.resolve():
            raise ConfigError("features_from is the workdir itself; give this run another --workdir")
        for seed in range(config.seed, config.seed + config.seeds):
            _borrowed(config, seed, build(config, seed, train.images.shape[-1]))
    results = []
    evaluation_only = ("stage", "judge_features", "num_views")
    with Workdir(EXPERIMENT, config, data=told_apart, may_differ=evaluation_only) as workdir:
        print(f"{dataset.name}: {number} images ({dataset.source})")
        for seed in workdir.seeds:
            network, values, seconds = _run_seed(config, seed, workdir, splits)
            judged = number if config.stage > 1 else len(splits.asked.images)
            workdir.finish(seed, Outcome(values, dataset, number, judged, seconds, paper))
            results.append(SeedResult(seed, network, values))
    print_metrics(results, paper)
    print(f"\nfigures, checkpoints and results: {config.workdir}")
    return results


def _run_seed(
    config: Config, seed: int, workdir: Workdir, splits: Splits
) -> tuple[NMCE, dict[str, float], float]:
    """The network after the last stage, its metrics, and the seconds of training and evaluation."""
    train = splits.train
    network = build(config, seed, train.images.shape[-1])
    values: dict[str, float] = {}
    seconds = 0.0
    drawn = seed == config.seed
    if config.features_from is not None:
        nnx.update(network.backbone, nnx.state(_borrowed(config, seed, network).backbone))
    for stage in range(1 if config.features_from is None else 2, config.stage + 1):
        if stage == 2:  # the embedding learned so far is dropped
            fresh = build(config, seed + 2**31, train.images.shape[-1])
            network.feature_head, network.cluster_head = fresh.feature_head, fresh.cluster_head
        looks, taken = _train(config, seed, stage, network, splits, workdir)
        values[f"stage{stage}_seconds"] = round(taken, 1)
        start = time.perf_counter()
        if stage == 1 and looks:
            values["knn_accuracy"] = looks[-1][1]
            if drawn:
                curve = np.array(looks).T
                figures.accuracies(
                    {"k-NN on the embedding": (curve[0], curve[1][:, None])},
                    "epoch", config.workdir / "knn.png", log=False,
                )  # fmt: skip
        if stage == 1 and config.judge_features:
            values |= _judge(config, seed, network, splits, drawn)
        if stage > 1 or drawn:
            features, logits = encode(network, train.images)
        if stage == 1 and drawn:
            figures.covariance(features, config.workdir / "figure_a2_covariance.png")
            whole = np.zeros(len(features), int)
            figures.singular_values(features, whole, config.workdir / "figure_a3_all.png")
        if stage > 1:
            found = np.argmax(logits, axis=1)
        if stage > 1 and train.labels is not None:
            judged = evaluation.agreement(train.labels, found)
            judged["clustering_accuracy"] = 100 - judged["clustering_error"]
            suffix = "_stage2" if stage == 2 else ""
            values |= {name + suffix: round(judged[name], 3) for name in _NAMES}
        if stage > 1 and stage == config.stage and drawn:
            figures.singular_values(features, found, config.workdir / "figure_a3_singular_values.png")
            images = np.asarray(train.images)
            figures.principal_components(images, features, found, config.workdir / "figure2.png")
            figures.gallery(images, found, train.labels, config.workdir / "clusters.png")
        network.save(config.workdir / f"network-seed{seed}-stage{stage}")
        seconds += taken + time.perf_counter() - start
    return network, values, seconds


def _borrowed(config: Config, seed: int, network: NMCE) -> NMCE:
    """The network that stage 1 of another run left, whose backbone fits this one."""
    assert config.features_from is not None
    path = config.features_from / f"network-seed{seed}-stage1"
    try:
        found = NMCE.load(path)
    except ValueError as error:
        raise ConfigError(f"features_from={str(config.features_from)!r}: {error}") from None
    sizes = [[leaf.shape for leaf in jax.tree.leaves(nnx.state(net.backbone))] for net in (found, network)]
    if sizes[0] != sizes[1]:
        raise ConfigError(f"features_from: the network in {str(path)!r} has other sizes than this run's")
    return found


def views(key: Array, images: Array, *, kind: str | None = "cifar") -> Array:
    """Two random views of each image by the paper's transformations, `[2, *images.shape]`.

    Args:
      key: `jax.random.key`.
      images: `[batch, height, width, channels]` in [0, 1].
      kind: `augmentation` of the `Config`.
    """
    strong: dict[str, Any] = {"jitter": (0.8, 0.8, 0.8, 0.2), "blur": 9}
    options = strong if kind == "imagenet" else {}
    return jnp.stack([augment.random_view(k, images, **options) for k in jax.random.split(key)])


def filled_in(config: Config, shape: tuple[int, ...]) -> Config:
    """The defaults that depend on the data set, its images' `shape` and the depth."""
    large = min(shape[1:3]) >= _LARGE
    other = _SCHEDULES["stl10" if large else "cifar10", 34 if config.depth == 34 else 18]
    schedule = _SCHEDULES.get((config.dataset, config.depth), other)
    own = {name: value for name, value in schedule._asdict().items() if getattr(config, name) is None}
    return replace(
        config,
        stem=config.stem or ("5x5" if large else "3x3"),
        augmentation=config.augmentation or ("imagenet" if large else "cifar"),
        **own,
    )


def build(config: Config, seed: int, channels: int) -> NMCE:
    """The untrained network."""
    rngs = nnx.Rngs(seed)
    assert config.num_clusters is not None
    assert config.stem is not None
    backbone = ResNet(
        config.depth,
        channels=channels,
        num_filters=config.num_filters,
        stem=config.stem,
        num_pre_features=config.num_pre_features,
        rngs=rngs,
    )
    return NMCE(
        backbone,
        backbone.num_features,
        num_features=config.num_features,
        num_clusters=config.num_clusters,
        rngs=rngs,
    )


def optimizer(config: Config, stage: int, steps_per_epoch: int) -> optax.GradientTransformation:
    """LARS with a cosine, after a warm-up in stage 1; a later stage's cluster head at a constant rate."""
    assert config.epochs is not None
    assert config.learning_rates is not None
    assert config.weight_decays is not None
    epochs, rate = config.epochs[stage - 1], config.learning_rates[stage - 1]
    decay, steps = config.weight_decays[stage - 1], epochs * steps_per_epoch
    warmup = min(10, epochs // 10) * steps_per_epoch if stage == 1 else 0
    schedule = optax.warmup_cosine_decay_schedule(
        0.0 if warmup else rate, rate, warmup, max(steps, warmup + 1)
    )

    def weights(params: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf.ndim > 1, params)

    lars = optax.chain(
        optax.masked(clipped_trust(schedule, config.trust_coefficient, decay), weights),
        optax.sgd(schedule, momentum=0.9),
    )
    plain = optax.chain(
        optax.add_decayed_weights(decay, weights), optax.sgd(config.cluster_learning_rate, momentum=0.9)
    )
    heads = {"backbone": "lars", "feature_head": "lars", "cluster_head": "plain"}

    def labels(params: Any) -> Any:
        return {name: jax.tree.map(lambda _, n=name: heads[n], part) for name, part in params.items()}

    return optax.multi_transform({"lars": lars, "plain": plain}, labels)


def clipped_trust(
    schedule: optax.Schedule, trust_coefficient: float, weight_decay: float
) -> optax.GradientTransformation:
    """LARS's scaling with the clip of the authors' code, before a descent at the rate η_t of `schedule`.

    (g + d·w) · min(1, η ‖w‖ / (‖g‖ + d ‖w‖) / η_t): no tensor moves faster than by plain descent. Without
    the clip (`optax.lars`) a tensor's step does not depend on the size of its gradient.
    """

    def init(params: Any) -> optax.ScaleByScheduleState:
        del params
        return optax.ScaleByScheduleState(count=jnp.zeros((), jnp.int32))

    def update(gradients: Any, state: Any, params: Any) -> tuple[Any, Any]:
        rate = jnp.maximum(schedule(state.count), 1e-12)

        def scaled(gradient: Array, weight: Array) -> Array:
            size = jnp.linalg.norm(weight)
            slope = jnp.linalg.norm(gradient) + weight_decay * size
            usable = (size > 0) & (slope > 0)
            trust = trust_coefficient * size / jnp.where(usable, slope, 1) / rate
            return (gradient + weight_decay * weight) * jnp.where(usable, jnp.minimum(trust, 1), 1)

        changed = jax.tree.map(scaled, gradients, params)
        return changed, optax.ScaleByScheduleState(count=optax.safe_increment(state.count))

    return optax.GradientTransformation(init, update)


_TRAINED = {
    1: ("backbone", "feature_head"),
    2: ("feature_head", "cluster_head"),
    3: ("backbone", "feature_head", "cluster_head"),
}


def training_step(
    config: Config, seed: int, stage: int, network: NMCE, num_images: int
) -> tuple[Callable[..., tuple[Any, Array]], Any]:
    """A step (state, index, images) -> (state, loss) of a stage, and the state before the first.

    The state is (parameters that the stage changes, the others, statistics, the optimiser's memory).
    """
    graph, params, statistics = nnx.split(network, nnx.Param, nnx.BatchStat)  # type: ignore[misc]
    trained = {name: params[name] for name in _TRAINED[stage]}
    fixed = {name: part for name, part in params.items() if name not in trained}
    per_epoch = num_images // config.batch_size
    descent = optimizer(config, stage, per_epoch)
    dtype = jnp.dtype(config.precision)
    assert config.invariance_weights is not None
    invariance_weight = config.invariance_weights[stage - 1]

    def loss(trained: Any, fixed: Any, statistics: Any, key: Array, images: Array) -> tuple[Array, Any]:
        low = jax.tree.map(lambda leaf: leaf.astype(dtype), trained | fixed)
        net = nnx.merge(graph, nnx.State(low), statistics, copy=True)  # statistics change at this trace level
        net.train()  # type: ignore[no-untyped-call]
        found = net(images.astype(dtype))
        features, logits = (v.astype(jnp.float32).reshape(2, -1, v.shape[-1]) for v in found)
        common: dict[str, Any] = {
            "eps_squared": config.eps_squared,
            "invariance_weight": invariance_weight,
        }
        if stage == 1:
            value = coding_rate.tcr_loss(features, average_views=False, **common)
        else:
            memberships = coding_rate.gumbel_softmax(key, logits, temperature=config.temperature)
            value = coding_rate.nmce_loss(features, memberships, **common)
        kept = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), nnx.state(net, nnx.BatchStat))
        return value, kept

    def step(state: Any, index: Array, images: Array) -> tuple[Any, Array]:
        trained, fixed, statistics, memory = state
        epoch, place = index // per_epoch, index % per_epoch
        of_stage = jax.random.fold_in(jax.random.key(seed), stage)
        order = jax.random.permutation(jax.random.fold_in(jax.random.fold_in(of_stage, 0), epoch), num_images)
        chosen = jax.lax.dynamic_slice(order, [place * config.batch_size], [config.batch_size])
        keys = jax.random.split(jax.random.fold_in(jax.random.fold_in(of_stage, 1), index))
        both = views(keys[0], evaluation.to_float(images[chosen]), kind=config.augmentation)
        both = both.reshape(-1, *images.shape[1:])
        (value, statistics), gradients = jax.value_and_grad(loss, has_aux=True)(
            trained, fixed, statistics, keys[1], both
        )
        changes, memory = descent.update(gradients, memory, trained)
        return (optax.apply_updates(trained, changes), fixed, statistics, memory), value

    return step, (trained, fixed, statistics, descent.init(trained))


def _train(
    config: Config, seed: int, stage: int, network: NMCE, splits: Splits, workdir: Workdir
) -> tuple[list[tuple[float, float]], float]:
    """Trains the network in place; (epoch, k-NN accuracy) on the way, and the seconds it took."""
    train, known, asked = splits
    assert config.epochs is not None
    step, state = training_step(config, seed, stage, network, len(train.images))
    per_epoch = len(train.images) // config.batch_size
    steps = config.epochs[stage - 1] * per_epoch
    looked = stage == 1 and known.labels is not None and asked.labels is not None

    def restore(state: Any) -> None:
        nnx.update(network, nnx.State(state[0] | state[1]), state[2])
        network.eval()  # type: ignore[no-untyped-call]

    def neighbours(state: Any) -> np.float64:
        restore(state)
        codes = [encode(network, split.images)[0] for split in (known, asked)]
        assert known.labels is not None
        assert asked.labels is not None
        judged = evaluation.classifiers(
            codes[0], known.labels, codes[1], asked.labels, names=["knn"], num_neighbors=_NEIGHBOURS
        )
        return np.float64(judged["knn"])

    trained = run_steps(
        compiled_steps(step, train.images),
        state,
        steps=steps,
        stride=convolution_stride(20),
        folder=config.workdir / f"checkpoints-{seed}-stage{stage}",
        title=f"seed {seed}, stage {stage}",
        log=partial(workdir.log, seed=seed, stage=stage),
        snapshot_at={round(share * steps) for share in _LOOKS} if looked else (),
        snapshot=neighbours if looked else lambda _: (),
        snapshot_like=np.float64(0) if looked else (),
    )
    restore(trained.state)
    return [(at / per_epoch, float(value)) for at, value in trained.snapshots], trained.seconds


def encode(network: NMCE, images: np.ndarray | Array) -> tuple[np.ndarray, np.ndarray]:
    """Features and cluster logits of images as they are."""
    graph, state = nnx.split(network)
    return jax.device_get(evaluation.map_batches(partial(_outputs, graph, state), images))


def layers(
    network: NMCE, images: Array, key: Array | None = None, *, kind: str | None = "cifar"
) -> dict[str, Array]:
    """Table 2's three kinds of features, of images as they are or (with a key) of a random view."""
    graph, state = nnx.split(network)
    numbers = itertools.count()

    def of_batch(batch: Array) -> dict[str, Array]:
        own = None if key is None else jax.random.fold_in(key, next(numbers))
        return _layers(graph, kind, state, own, batch)

    return evaluation.map_batches(of_batch, images)


@partial(jax.jit, static_argnums=0)
def _outputs(graph: Any, state: Any, batch: Array) -> tuple[Array, Array]:
    return nnx.merge(graph, state)(evaluation.to_float(batch))


@partial(jax.jit, static_argnums=(0, 1))
def _layers(graph: Any, kind: str | None, state: Any, key: Array | None, batch: Array) -> dict[str, Array]:
    net, batch = nnx.merge(graph, state), evaluation.to_float(batch)
    seen = batch if key is None else views(key, batch, kind=kind)[0]
    # What the three have in common is computed once.
    return {"proj": net(seen)[0], "pre_feature": net.backbone(seen), "pool": net.backbone.pool(seen)}


def _judge(config: Config, seed: int, network: NMCE, splits: Splits, drawn: bool) -> dict[str, float]:
    """Table 2: classifiers on three kinds of features, plain and averaged over views; draws figure A.1."""
    train, test = splits.known, splits.asked
    assert train.labels is not None
    assert test.labels is not None
    keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), 2**31), (2, config.num_views))

    def averaged(images: Array, keys: Array) -> dict[str, Array]:
        total = layers(network, images, keys[0], kind=config.augmentation)
        for key in keys[1:]:
            total = jax.tree.map(jnp.add, total, layers(network, images, key, kind=config.augmentation))
        return jax.tree.map(lambda values: values / len(keys), total)

    plain = [layers(network, split.images) for split in (train, test)]
    mean = [averaged(split.images, k) for split, k in zip((train, test), keys, strict=True)]
    values: dict[str, float] = {}
    for suffix, (known, asked) in {"": plain, f"_{config.num_views}_views": mean}.items():
        for name in known:
            codes = np.asarray(known[name]), np.asarray(asked[name])
            found = evaluation.classifiers(
                codes[0], train.labels, codes[1], test.labels, num_neighbors=_NEIGHBOURS, subspace_rank=_RANK
            )
            values |= {f"{rule}_{name}{suffix}": round(value, 3) for rule, value in found.items()}
    if drawn:
        _few_labels(config, mean[0], train.labels, mean[1], test.labels)
    return values


def _few_labels(
    config: Config,
    train: dict[str, Array],
    labels: np.ndarray,
    test: dict[str, Array],
    test_labels: np.ndarray,
) -> None:
    """Figure A.1: a support vector machine on few labelled images, chosen at random ten times."""
    generator = np.random.default_rng(config.seed)
    smallest = np.unique(labels, return_counts=True)[1].min()
    numbers = [number for number in _LABELS if number <= smallest]
    found: dict[str, list[list[float]]] = {"proj": [], "pool": []}
    for number in numbers:
        draws = [
            np.concatenate(
                [generator.choice(np.flatnonzero(labels == c), number, False) for c in np.unique(labels)]
            )
            for _ in range(_DRAWS)
        ]
        for name, curve in found.items():
            codes, asked = np.asarray(train[name]), np.asarray(test[name])
            curve.append(
                [
                    evaluation.classifiers(codes[d], labels[d], asked, test_labels, names=["svm"])["svm"]
                    for d in draws
                ]
            )
    positions = np.array(numbers) * len(np.unique(labels))
    curves = {name: (positions, values) for name, values in found.items()}
    figures.accuracies(curves, "labelled images", config.workdir / "figure_a1_few_labels.png", log=True)


def _sweep(config: Config) -> list[SeedResult[NMCE]]:
    """Table A.3: stage 1 with several weights λ."""
    common = replace(config, sweep=(), stage=1)
    others = config.invariance_weights or (0.0, 0.0, 0.0)  # of stages that are not reached
    settings = {
        f"lambda-{weight:g}": {"invariance_weights": (weight, *others[1:])} for weight in config.sweep
    }
    found = sweep(run, common, settings)
    accuracies = [[one.metrics.get("knn_accuracy", np.nan) for one in results] for results in found]
    figures.accuracies(
        {"k-NN on the embedding": (config.sweep, accuracies)}, "weight λ of the views' similarity",
        config.workdir / "table_a3.png", log=False,
    )  # fmt: skip
    return [one for results in found for one in results]


def _paper(config: Config) -> dict[str, float]:
    where = (config.dataset, config.depth)
    side = 96 if config.dataset == "stl10" else 32
    default = filled_in(Config(dataset=config.dataset, depth=config.depth), (1, side, side, 3))
    own = (
        "num_images", "num_filters", "num_pre_features", "num_features", "eps_squared", "stem",
        "augmentation", "features_from", "trust_coefficient", "temperature", "batch_size",
        "cluster_learning_rate", *Schedule._fields,
    )  # fmt: skip
    if config.stage == 1 or any(getattr(config, name) != getattr(default, name) for name in own):
        return {}
    last = dict(zip(_NAMES, PAPER.get(where, ()), strict=False)) if config.stage == 3 else {}
    before = zip(_NAMES, PAPER_STAGE_2.get(where, ()), strict=False)
    return last | {f"{name}_stage2": value for name, value in before}


def _splits(dataset: data.Dataset, config: Config) -> Splits:
    def split(images: np.ndarray, labels: np.ndarray | None, chosen: Any) -> Split:
        return Split(jnp.asarray(images[chosen]), None if labels is None else labels[chosen])

    train = split(dataset.train_images, dataset.train_labels, slice(config.num_images))
    if dataset.test_images is not dataset.train_images:
        return Splits(train, train, split(dataset.test_images, dataset.test_labels, slice(config.num_test)))
    # One set of images: classifiers are asked about every fifth, and know the others.
    asked = np.arange(len(train.images)) % 5 == 0
    images, labels = dataset.train_images[: config.num_images], train.labels
    return Splits(train, split(images, labels, ~asked), split(images, labels, asked))


def _check(config: Config) -> None:
    check_options(
        config,
        at_least={
            "stage": 1, "image_size": 1, "num_images": 2, "num_test": 1, "num_filters": 1,
            "num_pre_features": 1, "num_features": 1, "num_clusters": 1, "batch_size": 2, "num_views": 1,
            "seeds": 1, "seed": 0,
        },
        above={"trust_coefficient": 0, "eps_squared": 0, "temperature": 0, "cluster_learning_rate": 0},
    )  # fmt: skip
    if config.features_from is not None and (config.stage == 1 or config.sweep or config.judge_features):
        raise ConfigError("features_from has no part in stage 1, which sweep and judge_features are about")
    if config.stage > 3:
        raise ConfigError(f"stage={config.stage} is not accepted: it must be 1, 2 or 3")
    if config.depth not in RESNET_BLOCKS:
        raise ConfigError(f"depth={config.depth} is not accepted: it must be one of {tuple(RESNET_BLOCKS)}")
    lows = {"epochs": 1, "learning_rates": 0, "weight_decays": 0, "invariance_weights": 0}
    for name, low in lows.items():
        if not all(low <= value < np.inf for value in getattr(config, name) or ()):
            raise ConfigError(f"{name}={getattr(config, name)} is not accepted: each must be at least {low}")
    if len(set(config.sweep)) < len(config.sweep):
        raise ConfigError(f"sweep={config.sweep} is not accepted: different weights")
    if not all(0 <= weight < np.inf for weight in config.sweep):
        raise ConfigError(f"sweep={config.sweep} is not accepted: each must be at least 0")


def main() -> None:
    """The command line."""
    command_line(run, Config, description=__doc__)


if __name__ == "__main__":
    main()
