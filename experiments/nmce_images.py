"""Natural images clustered by their manifolds: CIFAR-10, CIFAR-20, STL-10 (paper 003, section 4.2).

    python -m experiments.nmce_images --data-dir DIR                                # all three stages
    python -m experiments.nmce_images --data-dir DIR --stage 1 --judge-features     # table 2, figure A.1
    python -m experiments.nmce_images --data-dir DIR --stage 3 --resume             # goes on from there
    python -m experiments.nmce_images --data-dir DIR --stage 1 --sweep 20 30 40 50 60 70     # table A.3
    python -m experiments.nmce_images --data-dir DIR --features-from RUN --weight-decays 0 0.001 0.001
    python -m experiments.nmce_images --dataset ./imagenet10 --image-size 96

Stage 1 learns features by the total coding rate (eq. 5). Stage 2 learns a new embedding and cluster head on
the fixed network by the NMCE loss (eq. 4). Stage 3 learns all of it. The paper reports for CIFAR-10 with
ResNet-18 accuracy 83.0, NMI 76.1 and ARI 71.0 after 600 + 100 + 100 epochs on a GPU (before stage 3: 81.9,
74.3, 69.0). experiments/results/README.md lists our results, with seeds, device and time.

The defaults are those of the paper's table B.1 for the data set and the depth; the authors' code uses other
numbers (stage 1: rate 0.3, λ 30, decay 1e-4; later stages: λ 0). As in their code, LARS is the clipped
variant, the cluster head learns without it at a constant rate, the network's batch statistics also change in
stage 2, and the clusters are judged on the training images. Stage 3 trains every layer, as the text says;
their code leaves out the layer below the embedding. Images stay in [0, 1]; their code standardises CIFAR's
channels. Figures 2 and A.3 show features of the original images; the paper averages over 16 views. The paper
finds stages 2 and 3 sensitive to the weight decay: --features-from repeats them without stage 1.
"""

import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array

from experiments import data
from experiments.common import embeddings, evaluation, features, figures
from experiments.common.classifier import Labelled
from experiments.common.options import ConfigError, check_at_most, check_options, command_line
from experiments.common.runs import Learned, SeedResult, Workdir, identity, run_seeds, same_setting, sweep
from experiments.common.training import Trained
from sul_jax import LearningRule, augment, metrics, nmce, training
from sul_jax.cli.ranges import NonNegativeFloat, PositiveFloat, PositiveInt, Range
from sul_jax.nn import NMCE

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


_OfStages = tuple[NonNegativeFloat, NonNegativeFloat, NonNegativeFloat]
_SMALL_RATES, _LARGE_RATES = (1.0, 0.5, 0.003), (1.0, 0.5, 0.0005)
_SCHEDULES = {
    ("cifar10", 18): Schedule((600, 100, 100), _SMALL_RATES, (1e-6, 0.005, 0.005), (50.0, 50.0, 50.0)),
    ("cifar10", 34): Schedule((1000, 100, 100), _SMALL_RATES, (1e-6, 0.001, 0.001), (50.0, 0.0, 0.0)),
    ("cifar20", 18): Schedule((600, 100, 100), _SMALL_RATES, (1e-6, 0.001, 0.001), (50.0, 0.0, 0.0)),
    ("cifar20", 34): Schedule((1000, 100, 100), _SMALL_RATES, (1e-6, 0.002, 0.002), (50.0, 0.0, 0.0)),
    ("stl10", 18): Schedule((1000, 400, 400), _LARGE_RATES, (1e-6, 0.002, 0.002), (30.0, 0.0, 30.0)),
    ("stl10", 34): Schedule((2000, 400, 400), _LARGE_RATES, (1e-6, 0.002, 0.002), (30.0, 0.0, 30.0)),
}


@dataclass(frozen=True, kw_only=True)
class Config(embeddings.Config):
    """Options of the experiment; those not given are the paper's for the data set and the depth. Other data
    get those of CIFAR-10 or, from 64 pixels on, of STL-10."""

    dataset: str = "cifar10"
    """cifar10, cifar20, stl10, FILE.npz, or a folder of images as ./FOLDER."""
    workdir: Path = Path("runs/nmce_images")
    """Where everything is written; a folder previous-… in it keeps an earlier run."""
    image_size: int | None = None
    """Side to which the images of a folder are resized."""
    num_test: PositiveInt | None = None
    """Use only this many test images, the first ones."""
    stage: Annotated[int, Range(1, 3)] = 3
    """Last stage: 1 features, 2 clusters on fixed features, 3 all together. With --resume, stages that are
    done are not run again."""
    stem: Literal["3x3", "5x5"] | None = None
    """First convolution: 3x3 for CIFAR, 5x5 with pooling from 64 pixels on."""
    augmentation: Literal["cifar", "imagenet"] | None = None
    """Random views: cifar is the paper's for CIFAR; imagenet has stronger colours and blur, the default from
    64 pixels on."""
    features_from: Path | None = None
    """Workdir of another run, whose stage 1 is used instead of a new one."""
    num_filters: int = 64
    """Filters of the ResNet's first stage."""
    num_features: int = 128
    """Dimensions of the embedding."""
    batch_size: Annotated[int, Range(2)] = 1024
    """Images in a step, two views of each."""
    epochs: tuple[PositiveInt, PositiveInt, PositiveInt] | None = None
    """Passes over the images in each stage."""
    learning_rates: _OfStages | None = None
    """Learning rate of each stage, for LARS; it falls to 0 by a cosine."""
    cluster_learning_rate: PositiveFloat = 0.5
    """Learning rate of the cluster head in stages 2 and 3, constant and without LARS."""
    weight_decays: _OfStages | None = None
    """Weight decay of each stage, for weights but not for biases and normalisation."""
    trust_coefficient: PositiveFloat = 0.02
    """LARS's η."""
    eps_squared: float = 0.2
    """Squared distortion of the coding rates."""
    invariance_weights: _OfStages | None = None
    """Weight λ of the views' similarity, for each stage."""
    temperature: PositiveFloat = 1.0
    """Temperature of the Gumbel softmax."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Precision of the network; losses and parameters are float32."""
    judge_features: bool = False
    """After stage 1, judge its features by labels: table 2 and figure A.1. Takes minutes."""
    num_views: PositiveInt = 16
    """Random views over which --judge-features averages the features."""
    sweep: tuple[NonNegativeFloat, ...] = ()
    """Run stage 1 once for each of these weights λ, each in its own folder (table A.3)."""


@dataclass(frozen=True, kw_only=True)
class Filled(Config):
    """Options of which none waits for the data."""

    num_clusters: int
    stem: Literal["3x3", "5x5"]
    augmentation: Literal["cifar", "imagenet"]
    epochs: tuple[int, int, int]
    learning_rates: tuple[float, float, float]
    weight_decays: tuple[float, float, float]
    invariance_weights: tuple[float, float, float]


class Splits(NamedTuple):
    """What is learned from and judged.

    Attributes:
      images: learned from, on the device, uint8 or floating.
      labels: `[num_images]`, or None.
      judge: of the features; None without labels.
    """

    images: Array
    labels: np.ndarray | None
    judge: features.Judge | None


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
    number = len(splits.images)
    check_at_most("batch_size", config.batch_size, number, "images")
    if config.judge_features and splits.judge is None:
        raise ConfigError("judge_features needs labels")
    classes = None if splits.labels is None else len(np.unique(splits.labels))
    filled = fill_in(replace(config, dataset=dataset.name), splits.images.shape, classes)
    if filled.features_from is not None:  # before the run there is set aside, and hours are spent
        if filled.features_from.resolve() == filled.workdir.resolve():
            raise ConfigError("features_from is the workdir itself; give this run another --workdir")
        for seed in range(filled.seed, filled.seed + filled.seeds):
            _borrowed(filled.features_from, seed, build(filled, seed, splits.images.shape[-1]))
    told_apart = identity(dataset.train_images[: filled.num_images])
    evaluation_only = ("stage", "judge_features", "num_views")
    asked = 0 if splits.judge is None else len(splits.judge.asked.labels)
    judged = number if filled.stage > 1 else asked
    with Workdir(EXPERIMENT, filled, data=told_apart, may_differ=evaluation_only) as workdir:
        learn = partial(map, lambda seed: _run_seed(filled, seed, workdir, splits))
        numbers = {"num_train": number, "num_test": judged}
        return run_seeds(workdir, learn, dataset, **numbers, paper=_paper(filled))


def _run_seed(config: Filled, seed: int, workdir: Workdir, splits: Splits) -> Learned[NMCE]:
    """The network after the last stage."""
    channels = splits.images.shape[-1]
    network = build(config, seed, channels)
    if config.features_from is not None:
        nnx.update(network.backbone, nnx.state(_borrowed(config.features_from, seed, network).backbone))
    values: dict[str, float] = {}
    seconds = 0.0
    for stage in range(1 if config.features_from is None else 2, config.stage + 1):
        if stage == 2:  # the embedding learned so far is dropped
            fresh = build(config, seed + 2**31, channels)
            network.feature_head, network.cluster_head = fresh.feature_head, fresh.cluster_head
        trained = _train(config, seed, stage, network, splits, workdir)
        values[f"stage{stage}_seconds"] = round(trained.seconds, 1)
        start = time.perf_counter()
        if stage == 1:
            values |= _judge_features(config, seed, network, splits, trained)
        else:
            values |= _judge_clusters(config, seed, stage, network, splits)
        network.save(config.workdir / f"network-seed{seed}-stage{stage}")
        seconds += trained.seconds + time.perf_counter() - start
    return Learned(network, values, seconds)


def _borrowed(run: Path, seed: int, network: NMCE) -> NMCE:
    """The network that stage 1 of another run left, whose backbone fits this one."""
    path = run / f"network-seed{seed}-stage1"
    try:
        learned = NMCE.load(path)
    except ValueError as error:
        raise ConfigError(f"features_from={str(run)!r}: {error}") from None
    sizes = [[leaf.shape for leaf in jax.tree.leaves(nnx.state(net.backbone))] for net in (learned, network)]
    if sizes[0] != sizes[1]:
        raise ConfigError(f"features_from: the network in {str(path)!r} has other sizes than this run's")
    return learned


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


def _one_view(key: Array, images: Array, *, kind: str) -> Array:
    return views(key, images, kind=kind)[0]


def fill_in(config: Config, shape: tuple[int, ...], num_classes: int | None) -> Filled:
    """The defaults that depend on the data set, its images' `shape`, its classes and the depth."""
    num_clusters = config.num_clusters or num_classes
    if num_clusters is None:
        raise ConfigError("num_clusters is needed for images without labels")
    large = min(shape[1:3]) >= _LARGE
    other = _SCHEDULES["stl10" if large else "cifar10", 34 if config.depth == 34 else 18]
    schedule = _SCHEDULES.get((config.dataset, config.depth), other)
    defaults = schedule._asdict() | {
        "num_clusters": num_clusters,
        "stem": "5x5" if large else "3x3",
        "augmentation": "imagenet" if large else "cifar",
    }
    given = {name: value for name, value in vars(config).items() if value is not None}
    return Filled(**{**vars(config), **defaults, **given})


def build(config: Filled, seed: int, channels: int) -> NMCE:
    """The untrained network."""
    return embeddings.build(
        config, nnx.Rngs(seed), channels=channels, stem=config.stem, num_clusters=config.num_clusters
    )


def optimizer(config: Filled, stage: int, steps_per_epoch: int) -> optax.GradientTransformation:
    """LARS with a cosine, after a warm-up in stage 1; a later stage's cluster head at a constant rate."""
    epochs, rate = config.epochs[stage - 1], config.learning_rates[stage - 1]
    decay, steps = config.weight_decays[stage - 1], epochs * steps_per_epoch
    warmup = min(10, epochs // 10) * steps_per_epoch if stage == 1 else 0
    schedule = optax.warmup_cosine_decay_schedule(
        0.0 if warmup else rate, rate, warmup, max(steps, warmup + 1)
    )

    lars = nmce.lars(schedule, trust_coefficient=config.trust_coefficient, weight_decay=decay)
    descent = optax.sgd(config.cluster_learning_rate, momentum=0.9)
    plain = optax.chain(optax.add_decayed_weights(decay, nmce.matrices), descent)

    def labels(params: Any) -> Any:
        name = {"cluster_head": "plain"}.get
        return jax.tree_util.tree_map_with_path(lambda path, _: name(path[0].key, "lars"), params)

    return optax.multi_transform({"lars": lars, "plain": plain}, labels)


def learning_rule(config: Filled, stage: int, network: NMCE, num_images: int) -> LearningRule:
    """The rule of a stage, which goes on from the network as it is."""

    def two_views(key: Array, images: Array) -> Array:
        return views(jax.random.split(key)[0], images, kind=config.augmentation)

    heads = ("feature_head", "cluster_head")
    trained = {1: ("backbone", "feature_head"), 2: heads, 3: ("backbone", *heads)}[stage]
    return nmce.rule(
        lambda rngs: network,
        views=two_views,
        optimizer=optimizer(config, stage, num_images // config.batch_size),
        clusters=stage > 1,
        eps_squared=config.eps_squared,
        invariance_weight=config.invariance_weights[stage - 1],
        temperature=config.temperature,
        average_views=False,
        trained=trained,
        dtype=jnp.dtype(config.precision),
    )


def training_step(rule: LearningRule, state: Any, batch: training.Minibatch, images: Array) -> Any:
    """A step of a rule on a minibatch of the images."""
    return rule.update(state, evaluation.to_float(images[batch.indices]), key=batch.key)


def _train(config: Filled, seed: int, stage: int, network: NMCE, splits: Splits, workdir: Workdir) -> Trained:
    """Trains the network in place; on the way, in stage 1, its k-NN accuracy."""
    number, key = len(splits.images), jax.random.key(seed)
    rule = learning_rule(config, stage, network, number)
    batches = training.Minibatches(jax.random.fold_in(key, stage), number, config.batch_size)
    num_steps = config.epochs[stage - 1] * batches.per_epoch

    def neighbours(judge: features.Judge, state: Any) -> np.float64:
        embeddings.restore(network, state)
        known, asked = (own._replace(inputs=embeddings.encode(network, own.inputs)[0]) for own in judge)
        return np.float64(features.classified(known, asked, ["knn"])["knn"])

    looks: dict[str, Any] = {}
    if stage == 1 and splits.judge is not None:
        looks = {
            "snapshot_at": {round(share * num_steps) for share in _LOOKS},
            "snapshot": partial(neighbours, splits.judge),
            "snapshot_like": np.float64(0),
        }
    trained = embeddings.train(
        partial(training_step, rule),
        rule.init(key, None),
        batches,
        splits.images,
        num_steps=num_steps,
        workdir=workdir,
        name=f"{seed}-stage{stage}",
        title=f"seed {seed}, stage {stage}",
        about={"seed": seed, "stage": stage},
        **looks,
    )
    embeddings.restore(network, trained.state)
    return trained


def _judge_features(
    config: Filled, seed: int, network: NMCE, splits: Splits, trained: Trained
) -> dict[str, float]:
    """After stage 1, by their neighbours and, where asked for, table 2; draws figures for the first seed."""
    values = {}
    drawn = seed == config.seed
    if trained.snapshots:
        per_epoch = len(splits.images) // config.batch_size
        epochs = np.array([at / per_epoch for at, _ in trained.snapshots])
        accuracies = np.array([float(accuracy) for _, accuracy in trained.snapshots])
        values["knn_accuracy"] = float(accuracies[-1])
        if drawn:
            curves = {"k-NN on the embedding": (epochs, accuracies[:, None])}
            figures.accuracies(curves, "epoch", config.workdir / "knn.png", log=False)
    if config.judge_features and splits.judge is not None:
        key = jax.random.fold_in(jax.random.key(seed), 2**31)
        view = partial(_one_view, kind=config.augmentation)
        known, coded = features.table(network, splits.judge, view, key, num_views=config.num_views)
        values |= known
        if drawn:
            features.few_labels(config.seed, coded, config.workdir / "figure_a1_few_labels.png")
    if drawn:
        codes, _ = embeddings.encode(network, splits.images)
        figures.covariance(codes, config.workdir / "figure_a2_covariance.png")
        figures.singular_values(codes, np.zeros(len(codes), int), config.workdir / "figure_a3_all.png")
    return values


def _judge_clusters(config: Filled, seed: int, stage: int, network: NMCE, splits: Splits) -> dict[str, float]:
    """After a later stage, of the images learned from; draws figures for the first seed's last one."""
    codes, logits = embeddings.encode(network, splits.images)
    clusters = np.argmax(logits, axis=1)
    if seed == config.seed and stage == config.stage:
        images = np.asarray(splits.images)
        figures.singular_values(codes, clusters, config.workdir / "figure_a3_singular_values.png")
        figures.principal_components(images, codes, clusters, config.workdir / "figure2.png")
        figures.gallery(images, clusters, splits.labels, config.workdir / "clusters.png")
    suffix = "_stage2" if stage == 2 else ""
    judged = {} if splits.labels is None else metrics.in_percent(splits.labels, clusters)
    return {name + suffix: round(value, 3) for name, value in judged.items()}


def _sweep(config: Config) -> list[SeedResult[NMCE]]:
    """Table A.3: stage 1 with several weights λ."""
    common = replace(config, sweep=(), stage=1)
    others = config.invariance_weights or (0.0, 0.0, 0.0)  # of stages that are not reached
    settings = {
        f"lambda-{weight:g}": {"invariance_weights": (weight, *others[1:])} for weight in config.sweep
    }
    swept = sweep(run, common, settings)
    accuracies = [[one.metrics.get("knn_accuracy", np.nan) for one in results] for results in swept]
    figures.accuracies(
        {"k-NN on the embedding": (config.sweep, accuracies)}, "weight λ of the views' similarity",
        config.workdir / "table_a3.png", log=False,
    )  # fmt: skip
    return [one for results in swept for one in results]


def _paper(config: Filled) -> dict[str, float]:
    """The paper's numbers, for the paper's own setting."""
    where = (config.dataset, config.depth)
    side = 96 if config.dataset == "stl10" else 32
    plain = Config(dataset=config.dataset, depth=config.depth)
    default = fill_in(plain, (1, side, side, 3), config.num_clusters)
    may_differ = ("stage", "precision", "judge_features", "num_views", "num_test", "image_size")
    if config.stage == 1 or not same_setting(config, default, may_differ):
        return {}
    last = dict(zip(_NAMES, PAPER.get(where, ()), strict=False)) if config.stage == 3 else {}
    before = zip(_NAMES, PAPER_STAGE_2.get(where, ()), strict=False)
    return last | {f"{name}_stage2": value for name, value in before}


def _splits(dataset: data.Dataset, config: Config) -> Splits:
    train = dataset.train[: config.num_images]
    on_device = data.Split(jnp.asarray(train.images), train.labels)
    known, asked = on_device, dataset.test[: config.num_test]
    if dataset.is_one_set:  # classifiers are asked about every fifth, and know the others
        fifth = np.arange(len(train)) % 5 == 0
        known, asked = train[~fifth], train[fifth]
    if known.labels is None or asked.labels is None:
        return Splits(on_device.images, train.labels, None)
    parts = (Labelled(jnp.asarray(own.images), np.asarray(own.labels)) for own in (known, asked))
    return Splits(on_device.images, on_device.labels, features.Judge(*parts))


def _check(config: Config) -> None:
    check_options(config)
    if config.features_from is not None and (config.stage == 1 or config.sweep or config.judge_features):
        raise ConfigError(
            "features_from skips stage 1: it cannot be used with stage=1, sweep or judge_features"
        )
    if len(set(config.sweep)) < len(config.sweep):
        raise ConfigError(f"sweep={config.sweep} is not accepted: give different weights")


main = partial(command_line, run, Config, description=__doc__)


if __name__ == "__main__":
    main()
