"""Filters learned without labels or gradients, and a classifier on what they respond (paper 001).

What `cifar10_hebbian`, `imagenet32_hebbian` and `mnist_hebbian` share: their defaults differ.
"""

import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array

from experiments import data
from experiments.common import figures
from experiments.common import hebbian_options as options
from experiments.common.evaluation import half_precision_features, map_batches, to_float
from experiments.common.hebbian_options import Config, Filled
from experiments.common.options import ConfigError
from experiments.common.runs import (
    Learned,
    SeedResult,
    Workdir,
    identity,
    run_seeds,
    same_setting,
    write_json,
)
from experiments.common.training import run_steps
from experiments.data import Split
from sul_jax import hebbian, training
from sul_jax.hebbian import HebbianState
from sul_jax.learning_rule import GradientState, LearningRule, gradient_rule
from sul_jax.nn import NNLBlock, NNLConv

_SHADOW = 25, 0.3  # columns of figure 6's shadow, and what is left of the light there
_FEATURE_BATCH = 250  # images whose classes are guessed at a time
_PATCHES_OF_A_UNIT = 50  # of which those that filters start from are drawn; and that they compete for
_DARK = 0.1  # norm below which a patch is too dark to be a filter


class Setting(NamedTuple):
    """What all seeds of a run share.

    Attributes:
      config: the options.
      blocks: sizes of the network.
      images: training images.
      splits: `train` and `test`; none where there are no labels.
      num_classes: of all labels of the data set.
      borrowed: filters of another run, by block; none to learn them.
      workdir: of the run.
    """

    config: Filled
    blocks: tuple[NNLBlock, ...]
    images: np.ndarray
    splits: Mapping[str, Split]
    num_classes: int
    borrowed: Sequence[Array]
    workdir: Workdir


def run(
    config: Config,
    *,
    experiment: str,
    auto: tuple[str, str] = data.COLOUR,
    paper: Mapping[tuple[str, str], float] = {},
) -> list[SeedResult[NNLConv]]:
    """Learns, evaluates and draws.

    Args:
      config: the options.
      experiment: the name that results are recorded by.
      auto: what the data set `auto` may be.
      paper: test error in percent, by architecture and response, of the whole data set.

    Raises:
      ValueError: options or data that cannot be used.
    """
    options.check(config)
    dataset = data.load(config.dataset, config.data_dir, auto=auto)
    images, splits, num_classes = data.split(dataset, config.num_train, config.num_test)
    number, shape = len(images), images.shape[1:]
    if len(config.powers) > 1 and not (splits and 0 < config.num_validation < number):
        raise ConfigError(
            f"num_validation={config.num_validation} is not accepted: powers are chosen on some of the "
            f"{number} training images, by their labels"
        )
    filled = options.fill_in(config, dataset.name, number)
    published = type(config)(architecture=config.architecture, response=config.response)
    # The paper's number stands beside runs of its own setting alone.
    same = same_setting(filled, options.fill_in(published, auto[0], number), options.INCIDENTAL)
    error = paper.get((config.architecture, config.response))
    reported = {"test_error": error} if same and error is not None else {}
    blocks = options.blocks_of(config, shape)
    nnx.eval_shape(lambda: NNLConv(shape, blocks, num_classes=1, rngs=nnx.Rngs(0)))  # do they fit?
    borrowed = [] if config.filters_from is None else _borrowed(config.filters_from, blocks, shape[-1])
    told_apart = identity(images)
    if borrowed:
        told_apart["filters"] = zlib.crc32(b"".join(np.asarray(w).tobytes() for w in borrowed))
    with Workdir(experiment, filled, data=told_apart) as workdir:
        setting = Setting(filled, blocks, images, splits, num_classes, borrowed, workdir)

        def learn(seed: int) -> Learned[NNLConv]:
            network, metrics, seconds = _learn(setting, seed)
            network.save(config.workdir / f"network-{seed}")
            return Learned(network, {name: round(value, 3) for name, value in metrics.items()}, seconds)

        numbers = {"num_train": number, "num_test": len(splits["test"]) if splits else 0}
        return run_seeds(workdir, partial(map, learn), dataset, **numbers, paper=reported)


def _learn(setting: Setting, seed: int) -> tuple[NNLConv, dict[str, float], float]:
    """A network, its metrics, and the seconds of learning and evaluation."""
    config, splits = setting.config, setting.splits
    filters: Sequence[Array] = ()
    metrics: dict[str, float] = {}
    if config.response == "nnl":
        filters, metrics = _filters(setting, seed)
    spent = metrics.get("filter_seconds", 0.0)
    if not splits:
        return _network(setting, filters, None, nnx.Rngs(seed)), metrics, spent
    power = config.powers[0] if config.powers else None
    if len(config.powers) > 1:
        power, seconds = _choose_power(setting, seed, filters)
        metrics["power"], spent = power, spent + seconds
    test = splits["test"]
    tests = {"test": test, "shadowed test": replace(test, images=shadowed(test.images))}
    build = partial(_network, setting, filters, power)
    network, history, seconds = fit(setting, seed, build, splits["train"], tests, "classifier")
    metrics["train_loss"], metrics["classifier_seconds"] = (float(value) for value in history[-1, :2])
    for name, error in zip(tests, history[-1, 2:], strict=True):
        metrics[f"{name.replace(' ', '_')}_error"] = float(error)
    if seed == config.seed:
        looked = history[np.isfinite(history[:, 2])]
        columns = zip(("seconds", *tests), looked[:, 1:].T, strict=True)
        curves = {name: column.tolist() for name, column in columns}
        write_json(config.workdir / "errors.json", curves)
        figures.errors(curves, config.workdir / "figure2_errors.png")
        shown = [np.asarray(to_float(jnp.asarray(test.images[:16]))), tests["shadowed test"].images[:16]]
        figures.rows_of_images(shown, config.workdir / "figure6_shadows.png")
    return network, metrics, spent + seconds


def _network(setting: Setting, filters: Sequence[Array], power: float | None, rngs: nnx.Rngs) -> NNLConv:
    """The network with a classifier that has learned nothing; without filters they have neither."""
    blocks = setting.blocks if power is None else [b._replace(power=power) for b in setting.blocks]
    network = NNLConv(
        setting.images.shape[1:],
        blocks,
        num_classes=setting.num_classes,
        response=setting.config.response,
        rngs=rngs,
    )
    for own, weights in zip(network.filters, filters, strict=False):
        own[...] = weights
    return network


def _filters(setting: Setting, seed: int) -> tuple[Sequence[Array], dict[str, float]]:
    """Filters of all blocks, learned or borrowed, and what is measured of them."""
    config, channels = setting.config, setting.images.shape[-1]
    metrics = {}
    filters = setting.borrowed
    if not filters:
        images = jnp.asarray(setting.images)
        learned = [learn_filters(setting, seed, index, images) for index in range(len(setting.blocks))]
        filters = [block.weights for block in learned]
        metrics["filter_seconds"] = sum(block.seconds for block in learned)
        metrics["winning_units"] = 100 * float(np.mean([block.winning for block in learned]))
    dead = [np.asarray(hebbian.unconverged(HebbianState(weights))) for weights in filters]
    metrics["converged_units"] = 100 * float(1 - np.concatenate(dead).mean())
    drawn = seed == config.seed
    if channels == 3:
        shares = np.concatenate([color_share(np.asarray(weights)) for weights in filters])
        metrics["separated_units"] = 100 * float(np.mean(np.abs(shares - 0.5) > 0.3))
        if drawn:
            figures.separation(shares, config.workdir / "section5_colour_and_orientation.png")
    for index, weights in enumerate(filters if drawn else ()):
        name = "figure1_filters.png" if len(filters) == 1 else f"figure1_filters_{index + 1}.png"
        figures.filters(np.asarray(weights), channels, config.workdir / name)
    return filters, metrics


class Filters(NamedTuple):
    """Filters of a block.

    Attributes:
      weights: `[num_units, features]`.
      winning: the share of units that any of many fresh patches, fifty for each unit or more, drives most.
      seconds: of learning them.
    """

    weights: Array
    winning: float
    seconds: float


def learn_filters(setting: Setting, seed: int, index: int, images: Array) -> Filters:
    """Filters of a block from random patches, cut out minibatch by minibatch."""
    config, block = setting.config, setting.blocks[index]
    designed = options.ARCHITECTURES[config.architecture].anti_hebbian[index]
    rule = hebbian.rule(
        num_units=block.num_units,
        anti_hebbian=designed if config.anti_hebbian is None else config.anti_hebbian,
        rank=config.rank,
        normalize_update=config.normalize_update,
    )
    rates = optax.linear_schedule(config.filter_learning_rate, 0.0, config.filter_steps)
    key = jax.random.fold_in(jax.random.key(seed), index)

    def draw(key: Array, images: Array) -> Array:
        size = block.kernel_size
        return to_float(hebbian.random_patches(key, images, num_patches=config.patch_batch, kernel_size=size))

    def step(state: HebbianState, number: Array, images: Array) -> tuple[HebbianState, Array]:
        batch = draw(jax.random.fold_in(key, number), images)
        state, _ = rule.update(state, batch, learning_rate=rates(number))
        share = jnp.mean(hebbian.unconverged(state), dtype=jnp.float32)
        return state, jnp.where(jnp.all(jnp.isfinite(state.weights)), share, jnp.nan)

    def many(key: Array) -> Iterator[Array]:
        number = -(-_PATCHES_OF_A_UNIT * block.num_units // config.patch_batch)
        return (draw(one, images) for one in jax.random.split(key, number))

    start_key = jax.random.fold_in(key, config.filter_steps)
    start = _start_bright if config.filter_start == "patches" else hebbian.init
    trained = run_steps(
        training.compiled(step),
        start(start_key, jnp.concatenate(list(many(start_key))), num_units=block.num_units),
        jnp.arange,
        images,
        num_steps=config.filter_steps,
        workdir=setting.workdir,
        name=f"{seed}-filters-{index}",
        title=f"seed {seed}, filters of {block.kernel_size}×{block.kernel_size}",
        stride=500,
        value_name="unconverged",
        about={"seed": seed, "block": index},
    )
    weights = trained.state.weights
    winners: set[int] = set()
    for fresh in many(jax.random.fold_in(key, config.filter_steps + 1)):
        drives = jnp.matmul(fresh, weights.T, precision="highest")
        winners.update(np.asarray(jnp.argmax(drives, axis=1)).tolist())
    return Filters(weights, len(winners) / block.num_units, trained.seconds)


def _start_bright(key: Array, patches: Array, *, num_units: int) -> HebbianState:
    """`hebbian.init_from_inputs` of the patches that are not black."""
    bright = patches[jnp.linalg.norm(patches, axis=1) > _DARK]
    if len(bright) < num_units:
        raise ConfigError(
            f"filter_start='patches' needs {num_units} patches that are not black, but found {len(bright)} "
            f"among {len(patches)}; filter_start='normal' needs none"
        )
    return jax.jit(partial(hebbian.init_from_inputs, num_units=num_units))(key, bright)


def color_share(weights: np.ndarray) -> np.ndarray:
    """How much of a filter's pattern is colour: 0 for a gray grating, 1 for an even coloured patch.

    Args:
      weights: `[num_units, pixels · 3]`.

    Returns:
      `[num_units]` in [0, 1]: the share of chrominance in chrominance and variation of the luminance.

    Example:
      >>> import numpy as np
      >>> from experiments.common import hebbian_filters
      >>> hebbian_filters.color_share(np.array([[1, 0, 0, 1, 0, 0], [1, 1, 1, 0, 0, 0.0]])).tolist()
      [1.0, 0.0]
    """
    pattern = weights.reshape(len(weights), -1, 3)
    luminance = pattern.mean(axis=2, keepdims=True)
    chrominance = np.square(pattern - luminance).sum(axis=(1, 2))
    variation = 3 * np.square(luminance - luminance.mean(axis=1, keepdims=True)).sum(axis=(1, 2))
    return np.asarray(chrominance / np.maximum(chrominance + variation, 1e-12))


def shadowed(images: np.ndarray) -> np.ndarray:
    """Images in [0, 1] with figure 6's shadow on their left: of 32 columns, 25."""
    columns = round(images.shape[2] * _SHADOW[0] / 32)
    light = np.where(np.arange(images.shape[2]) < columns, _SHADOW[1], 1.0)[:, None]
    # Not rounded to whole numbers again: only the brightness is to change.
    return np.asarray(to_float(jnp.asarray(images)) * light, np.float32)


class Learner(NamedTuple):
    """What an epoch of the classifier changes.

    Attributes:
      network: state of its rule.
      history: `[epochs, 2 + number of test sets]`: loss, seconds of training so far, and errors in percent;
        NaN where nobody looked.
    """

    network: GradientState
    history: Array


def fit(
    setting: Setting,
    seed: int,
    build: Callable[[nnx.Rngs], NNLConv],
    train: Split,
    tests: Mapping[str, Split],
    title: str,
) -> tuple[NNLConv, np.ndarray, float]:
    """Trains the classifier, or everything where responses are plain.

    Filters that stay as they are respond to every image once, kept in half precision, where memory allows.
    Errors are those on features so kept, where a response below 6e-8 counts as 0.

    Returns:
      The network, the history, as in `Learner`, and the seconds of all of it.
    """
    began = time.perf_counter()
    config, number = setting.config, len(train)
    batch_size = min(config.batch_size, number)
    num_steps = number // batch_size
    network = build(nnx.Rngs(seed))
    rule = _rule(network, build, optax.adam(options.learning_rates(config, num_steps)))
    seen, *judged = _inputs(config, network, {"": train, **tests})
    labels = jnp.asarray(train.labels)

    def step(
        state: GradientState, chosen: Array, inputs: Array, labels: Array
    ) -> tuple[GradientState, Array]:
        state, info = rule.update(state, inputs[chosen], labels=labels[chosen])
        return state, info.loss

    steps = training.compiled(step, scan=training.scans_convolutions())
    guess = jax.jit(lambda state, inputs: jnp.argmax(rule.encode(state, inputs), axis=1))
    key = jax.random.fold_in(jax.random.key(seed), 1_000_000)

    def error(state: GradientState, inputs: Array, labels: np.ndarray | None) -> Any:
        guesses = map_batches(partial(guess, state), inputs, batch_size=_FEATURE_BATCH)
        return 100 * np.mean(np.asarray(guesses) != labels)

    def advance(learner: Learner, epoch: int) -> tuple[Learner, Array]:
        started = time.perf_counter()
        order = jax.random.permutation(jax.random.fold_in(key, epoch), number)[: num_steps * batch_size]
        state, losses = steps(learner.network, order.reshape(num_steps, batch_size), seen, labels)
        loss = jax.block_until_ready(jnp.mean(losses))
        before = learner.history[epoch - 1, 1] if epoch else 0.0
        look = (epoch + 1) % config.probe_every == 0 or epoch + 1 == config.epochs
        elapsed = before + time.perf_counter() - started
        sets = zip(judged, tests.values(), strict=True)
        errors = [error(state, inputs, split.labels) if look else jnp.nan for inputs, split in sets]
        return Learner(state, learner.history.at[epoch].set(jnp.array([loss, elapsed, *errors]))), loss

    start = rule.init(jax.random.key(seed), seen)
    prepared = time.perf_counter() - began
    result = run_steps(
        advance,
        Learner(start, jnp.full((config.epochs, 2 + len(tests)), jnp.nan)),
        num_steps=config.epochs,
        workdir=setting.workdir,
        name=f"{seed}-{title.replace(' ', '-')}",
        title=f"seed {seed}, {title}",
        unit="epoch",
        about={"seed": seed},
    )
    learned: Learner = result.state
    nnx.update(_trained(network), learned.network.params)
    return network, np.asarray(learned.history), prepared + result.seconds


def _rule(
    network: NNLConv, build: Callable[[nnx.Rngs], NNLConv], optimizer: optax.GradientTransformation
) -> LearningRule:
    """Learns what is `_trained` of the network, from images or from features that are kept."""

    def logits(trained: Any, inputs: Array) -> Array:
        if network.response == "relu":
            return trained(to_float(inputs))
        features = inputs if inputs.ndim == 2 else _features(*nnx.split(network), inputs)
        return trained(features.astype(jnp.float32))

    def loss(trained: Any, inputs: Array, *, labels: Array, axis_name: str | None) -> Array:
        del axis_name  # one device
        values = optax.softmax_cross_entropy_with_integer_labels(logits(trained, inputs), labels)
        return jnp.mean(values)

    return gradient_rule(lambda rngs: _trained(build(rngs)), loss, optimizer, encode=logits)


def _trained(network: NNLConv) -> nnx.Module:
    """The classifier above filters that stay as they are, or the whole twin."""
    return network.classifier if network.response == "nnl" else network


@partial(jax.jit, static_argnums=0)
def _features(graph: Any, state: Any, images: Array) -> Array:
    """In half precision."""
    return nnx.merge(graph, state).features(to_float(images)).astype(jnp.float16)


def _inputs(config: Filled, network: NNLConv, splits: Mapping[str, Split]) -> list[Array]:
    """What the classifier sees of each split: features where they fit into memory, else images."""
    examples = sum(map(len, splits.values()))
    kept = network.response == "nnl" and 2 * examples * network.num_features <= config.cache_gib * 2**30
    if not kept:
        return [jnp.asarray(split.images) for split in splits.values()]
    take = partial(_features, *nnx.split(network))
    return [
        half_precision_features(take, split.images, title=f"{name} features".lstrip())
        for name, split in splits.items()
    ]


def _choose_power(setting: Setting, seed: int, filters: Sequence[Array]) -> tuple[float, float]:
    """The candidate of least error on held-out training images, of the same filters; and the seconds."""
    train, powers = setting.splits["train"], setting.config.powers
    order = np.random.default_rng(seed).permutation(len(train.images))
    hidden, shown = (train[chosen] for chosen in np.split(order, [setting.config.num_validation]))
    errors, spent = {}, 0.0
    for power in powers:
        build, title = partial(_network, setting, filters, power), f"power {power:g}"
        _, history, seconds = fit(setting, seed, build, shown, {"validation": hidden}, title)
        errors[power], spent = float(history[-1, 2]), spent + seconds
        setting.workdir.log(seed=seed, power=power, validation_error=errors[power])
        print(f"{title}: validation error {errors[power]:.2f} %")
    return min(errors, key=lambda power: errors[power]), spent


def _borrowed(path: Path, blocks: tuple[NNLBlock, ...], channels: int) -> list[Array]:
    """The filters of another run's network, which must be of these sizes and Hebbian."""
    network = NNLConv.load(path)
    if network.response != "nnl":
        raise ConfigError(
            f"filters_from={str(path)!r} holds a twin trained end to end (response={network.response!r}): "
            f"steep responses need filters of the Hebbian rule"
        )
    wanted = [(block.kernel_size, block.num_units) for block in blocks]
    stored = [(block.kernel_size, block.num_units) for block in network.blocks]
    if (wanted, channels) != (stored, network.image_shape[-1]):
        raise ConfigError(
            f"filters_from={str(path)!r} holds filters of (window, number) {stored} for "
            f"{network.image_shape[-1]} channels, not {wanted} for {channels}"
        )
    return [weights[...] for weights in network.filters]
