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
from experiments.common.classifier import Labelled, Plan, classify
from experiments.common.evaluation import kept_features, to_float
from experiments.common.hebbian_options import Config, Filled
from experiments.common.options import ConfigError
from experiments.common.runs import (
    Learned,
    SeedResult,
    Workdir,
    identity,
    run_seeds,
    same_setting,
    sweep,
    write_json,
)
from experiments.common.training import run_steps
from experiments.data import Split
from sul_jax import hebbian, training, whitening
from sul_jax.hebbian import HebbianState
from sul_jax.nn import NNLBlock, NNLConv

_SHADOW = 25, 0.3  # columns of figure 6's shadow, and what is left of the light there
_PARTS = 65_535  # of a cosine, where it is kept
_PATCHES_OF_A_UNIT = 50  # of which those that filters start from are drawn; and that they compete for
_DARK = 0.1  # norm below which a patch is too dark to be a filter
_SPREADS: Mapping[str, hebbian.Spread] = {"patches": "far", "random_patches": "even", "k_means": "k_means"}
_SWEPT_UNITS = (50, 100, 400)
# The rule, and filters that learn nothing or by k-means. As printed, filters learn until the rates add up to
# half; of twice as many minibatches most units are driven off all patches by the anti-Hebbian term. Steep
# responses to noise vanish: of the powers 1, 2, 4 and 8 the first was best on held-out training images.
_KEPT: Mapping[str, Any] = {"filter_steps": 0}
_PRINTED: Mapping[str, Any] = {"filter_learning_rate": 2e-4, "normalize_update": False}
_SWEPT: Mapping[str, Mapping[str, Any]] = {
    "learned": {},
    "learned, less anti-Hebbian": {"anti_hebbian": 0.05},
    "far patches": _KEPT,
    "random patches": {**_KEPT, "filter_start": "random_patches"},
    "k-means": {**_KEPT, "filter_start": "k_means"},
    "learned from noise": {**_PRINTED, "filter_start": "normal", "filter_steps": 5_000},
    "noise": {**_KEPT, "filter_start": "normal", "powers": (1,)},
}


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
    if config.sweep:
        return _sweep(replace(config, sweep=False), partial(run, experiment=experiment, auto=auto))
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


def _sweep(config: Config, learn: Callable[[Config], list[SeedResult[NNLConv]]]) -> list[SeedResult[NNLConv]]:
    """Filters of the rule beside others, few and many."""
    settings = {
        f"{name}, {units}".replace(",", "").replace(" ", "-").lower(): {**changes, "num_units": units}
        for name, changes in _SWEPT.items()
        for units in _SWEPT_UNITS
    }
    results = sweep(learn, config, settings)
    if "test_error" in results[0][0].metrics:
        right = np.array([[100 - one.metrics["test_error"] for one in several] for several in results])
        curves = zip(_SWEPT, right.reshape(len(_SWEPT), len(_SWEPT_UNITS), -1), strict=True)
        drawn = {name: (_SWEPT_UNITS, values) for name, values in curves}
        figures.accuracies(drawn, "filters", config.workdir / "filters_and_controls.png", log=True)
    return [one for several in results for one in several]


def _learn(setting: Setting, seed: int) -> tuple[NNLConv, dict[str, float], float]:
    """A network, its metrics, and the seconds of learning and evaluation."""
    config, splits = setting.config, setting.splits
    filters: Sequence[Array] = ()
    metrics: dict[str, float] = {}
    if config.response == "nnl":
        filters, metrics = _filters(setting, seed)
    network = _network(setting, seed, filters, config.powers[0] if config.powers else None)
    spent = metrics.get("filter_seconds", 0.0)
    if not splits:
        return network, metrics, spent
    began = time.perf_counter()
    test = splits["test"]
    dark = replace(test, images=shadowed(test.images))
    train, *asked = _seen(config, network, {"train": splits["train"], "test": test, "shadowed test": dark})
    spent += time.perf_counter() - began
    if len(config.powers) > 1:
        metrics["power"], seconds = _choose_power(setting, seed, filters, train)
        network, spent = _network(setting, seed, filters, metrics["power"]), spent + seconds
    tests = dict(zip(("test", "shadowed test"), asked, strict=True))
    history, seconds = _classify(setting, seed, network, train, tests)
    metrics["train_loss"], metrics["classifier_seconds"] = (float(value) for value in history[-1, :2])
    for name, error in zip(tests, history[-1, 2:], strict=True):
        metrics[f"{name.replace(' ', '_')}_error"] = float(error)
    if seed == config.seed:
        looked = history[np.isfinite(history[:, 2])]
        columns = zip(("seconds", *tests), looked[:, 1:].T, strict=True)
        curves = {name: column.tolist() for name, column in columns}
        write_json(config.workdir / "errors.json", curves)
        figures.errors(curves, config.workdir / "figure2_errors.png")
        shown = [np.asarray(to_float(jnp.asarray(test.images[:16]))), dark.images[:16]]
        figures.rows_of_images(shown, config.workdir / "figure6_shadows.png")
    return network, metrics, spent + seconds


def _network(setting: Setting, seed: int, filters: Sequence[Array], power: float | None) -> NNLConv:
    """The network with a classifier that has learned nothing; without filters they have neither."""
    blocks = setting.blocks if power is None else [b._replace(power=power) for b in setting.blocks]
    shape, response = setting.images.shape[1:], setting.config.response
    network = NNLConv(shape, blocks, num_classes=setting.num_classes, response=response, rngs=nnx.Rngs(seed))
    for own, weights in zip(network.filters, filters, strict=False):
        own[...] = weights
    return network


def _seen(config: Filled, network: NNLConv, splits: Mapping[str, Split]) -> list[Labelled]:
    """What the classifier sees of each split: cosines of all powers where they fit into memory, or images."""
    examples = sum(map(len, splits.values()))
    kept = network.response == "nnl" and 2 * examples * network.num_features <= config.cache_gib * 2**30
    take = partial(_cosines, *nnx.split(network))

    def of_split(name: str, split: Split) -> Labelled:
        inputs = kept_features(take, split.images, title=name) if kept else jnp.asarray(split.images)
        return Labelled(inputs, np.asarray(split.labels))

    return [of_split(name, split) for name, split in splits.items()]


@partial(jax.jit, static_argnums=0)
def _cosines(graph: Any, state: Any, images: Array) -> Array:
    """In 65,535ths: 16 bits then hold them far better than half precision would."""
    pooled = nnx.merge(graph, state).pooled(to_float(images))
    return jnp.round(_PARTS * pooled).astype(jnp.uint16)


def _classify(
    setting: Setting,
    seed: int,
    network: NNLConv,
    train: Labelled,
    tests: Mapping[str, Labelled],
    title: str = "classifier",
    among: np.ndarray | None = None,
) -> tuple[np.ndarray, float]:
    """Trains the classifier above filters that stay as they are, or the whole twin; see `classify`."""
    config, twin = setting.config, network.response == "relu"
    take = partial(_cosines, *nnx.split(network))

    def see(inputs: Array, key: Array | None) -> Array:
        del key
        if twin:
            return to_float(inputs)
        cosines = inputs if inputs.ndim == 2 else take(inputs)
        return network.respond(cosines / jnp.float32(_PARTS))

    plan = Plan(partial(options.optimizer, config), config.batch_size, config.epochs, config.probe_every)
    module, key = network if twin else network.classifier, jax.random.fold_in(jax.random.key(seed), 1_000_000)
    return classify(
        module, see, train, tests, plan, key, workdir=setting.workdir, seed=seed, title=title, among=among
    )


def _choose_power(
    setting: Setting, seed: int, filters: Sequence[Array], train: Labelled
) -> tuple[float, float]:
    """The candidate of least error on held-out training images, of the same filters; and the seconds."""
    order = np.random.default_rng(seed).permutation(len(train.labels))
    hidden, shown = np.split(order, [setting.config.num_validation])
    held_out = {"validation": Labelled(train.inputs[hidden], train.labels[hidden])}
    errors, spent = {}, 0.0
    for power in setting.config.powers:
        network, title = _network(setting, seed, filters, power), f"power {power:g}"
        history, seconds = _classify(setting, seed, network, train, held_out, title, shown)
        errors[power], spent = float(history[-1, 2]), spent + seconds
        setting.workdir.log(seed=seed, power=power, validation_error=errors[power])
        print(f"{title}: validation error {errors[power]:.2f} %")
    return min(errors, key=lambda power: errors[power]), spent


def _filters(setting: Setting, seed: int) -> tuple[Sequence[Array], dict[str, float]]:
    """Filters of all blocks, learned or borrowed, and what is measured of them."""
    config, channels = setting.config, setting.images.shape[-1]
    metrics = {}
    filters = setting.borrowed
    if not filters:
        images = jnp.asarray(setting.images)
        learned = [learn_filters(setting, seed, index, images) for index in range(len(setting.blocks))]
        filters = [weights for weights, _ in learned]
        metrics = {name: float(np.mean([m[name] for _, m in learned])) for name in learned[0][1]}
        metrics["filter_seconds"] *= len(learned)
    negative = np.concatenate([np.asarray(weights).ravel() < 0 for weights in filters])
    metrics["negative_weights"] = 100 * float(negative.mean())
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


def learn_filters(setting: Setting, seed: int, index: int, images: Array) -> tuple[Array, dict[str, float]]:
    """Filters of a block from random patches, cut out minibatch by minibatch.

    Runs of another number of minibatches begin at the same filters.

    Returns:
      `[num_units, features]`; and by name, of many fresh patches, fifty for each unit or more,
      `winning_units`, percent of the units that any patch drives most; `patch_cosine`, the mean of their
      largest cosine with a unit; `start_cosine`, the mean cosine of a unit with what it started from; and
      `filter_seconds`.
    """
    config, block = setting.config, setting.blocks[index]
    designed = options.ARCHITECTURES[config.architecture].anti_hebbian[index]
    rule = hebbian.rule(
        num_units=block.num_units,
        anti_hebbian=designed if config.anti_hebbian is None else config.anti_hebbian,
        rank=config.rank,
        normalize_update=config.normalize_update,
    )
    rates = optax.linear_schedule(config.filter_learning_rate, 0.0, config.filter_steps)
    keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), index), 4)
    batch_key, drawn_key, start_key, fresh_key = keys

    cut = partial(hebbian.random_patches, num_patches=config.patch_batch, kernel_size=block.kernel_size)

    def step(state: HebbianState, number: Array, images: Array) -> tuple[HebbianState, Array]:
        batch = cut(jax.random.fold_in(batch_key, number), images)
        state, info = rule.update(state, to_float(batch), learning_rate=rates(number))
        return state, jnp.where(jnp.all(jnp.isfinite(state.weights)), info.largest_update, jnp.nan)

    def many(key: Array) -> Iterator[Array]:
        number = -(-_PATCHES_OF_A_UNIT * block.num_units // config.patch_batch)
        return (to_float(cut(one, images)) for one in jax.random.split(key, number))

    patches = jnp.concatenate(list(many(drawn_key)))
    start = _start(config.filter_start, start_key, patches, num_units=block.num_units)
    begun = np.asarray(whitening.normalize(start.weights))
    trained = run_steps(
        training.compiled(step),
        start,
        jnp.arange,
        images,
        num_steps=config.filter_steps,
        workdir=setting.workdir,
        name=f"{seed}-filters-{index}",
        title=f"seed {seed}, filters of {block.kernel_size}×{block.kernel_size}",
        stride=500,
        value_name="largest_update",
        about={"seed": seed, "block": index},
    )
    weights = trained.state.weights
    unit = whitening.normalize(weights)
    winners, closest = set[int](), []
    for fresh in map(whitening.normalize, many(fresh_key)):
        cosines = jnp.matmul(fresh, unit.T, precision="highest")
        winners.update(np.asarray(jnp.argmax(cosines * jnp.linalg.norm(weights, axis=1), axis=1)).tolist())
        closest.append(jnp.mean(jnp.max(cosines, axis=1)))
    return weights, {
        "filter_seconds": trained.seconds,
        "winning_units": 100 * len(winners) / block.num_units,
        "patch_cosine": float(np.mean(closest)),
        "start_cosine": float(jnp.mean(jnp.sum(unit * begun, axis=1))),
    }


def _start(kind: str, key: Array, patches: Array, *, num_units: int) -> HebbianState:
    """What filters start from; see `Config.filter_start`."""
    if kind == "normal":
        return hebbian.init(key, patches, num_units=num_units)
    bright = patches[jnp.linalg.norm(patches, axis=1) > _DARK]
    if len(bright) < num_units:
        raise ConfigError(
            f"filter_start={kind!r} needs {num_units} patches that are not black, but found {len(bright)} "
            f"among {len(patches)}; filter_start='normal' needs none"
        )
    fit = jax.jit(partial(hebbian.init_from_inputs, num_units=num_units, spread=_SPREADS[kind]))
    return HebbianState(*fit(key, bright))


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
