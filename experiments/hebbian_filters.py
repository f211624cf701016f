"""Filters learned without labels or gradients, and a classifier on what they respond (paper 001).

What `cifar10_hebbian`, `imagenet32_hebbian` and `mnist_hebbian` share: their defaults differ.
"""

import time
from collections.abc import Mapping
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

from experiments import data, evaluation, figures
from experiments.reporting import (
    ConfigError,
    Outcome,
    SeedResult,
    Workdir,
    check_options,
    identity,
    print_metrics,
)
from experiments.training import compiled_steps, over_batches, run_steps
from sul_jax import hebbian, patches, whitening
from sul_jax.hebbian import HebbianState
from sul_jax.nn import NNLBlock, NNLConv

_SHADOW = 25, 0.3  # columns of figure 6's shadow, and what is left of the light there
_FEATURE_BATCH = 250  # images of which features are taken at a time
_START_DRAWS = 10  # minibatches of which filters are made that start from patches
_DARK = 0.1  # norm below which a patch is too dark to be a filter
_MAX_SMALL = 1_000  # images below which a data set is small


class Architecture(NamedTuple):
    """Blocks and how their filters are learned.

    Attributes:
      blocks: the sizes.
      anti_hebbian: Δ of each block.
      twin_pools: pooling windows of the end-to-end twin.
      drops: epochs after which the classifier's learning rate drops, of `epochs`.
      epochs: of the classifier.
      batch_size: images in a minibatch of the classifier.
    """

    blocks: tuple[NNLBlock, ...]
    anti_hebbian: tuple[float, ...]
    twin_pools: tuple[int, ...]
    drops: tuple[int, ...] = (15, 30, 45, 60)
    epochs: int = 70
    batch_size: int = 300


# What the paper does not give is ours: windows, powers and pooling of `five`, all but the windows of
# `imagenet32`, and `full` (units that see whole images, as in the authors' notebook).
ARCHITECTURES: Mapping[str, Architecture] = {
    "single": Architecture((NNLBlock(4, 400, 40, 11),), (0.2,), (11,)),
    "five": Architecture(
        tuple(
            NNLBlock(size, 400, power, pool)
            for size, power, pool in ((3, 40, 14), (4, 40, 11), (5, 30, 11), (6, 30, 9), (8, 20, 11))
        ),
        (0.1, 0.1, 0.2, 0.15, 0.2),
        (14, 11, 11, 7, 11),
    ),
    "imagenet32": Architecture(
        tuple(
            NNLBlock(size, 400, power, pool)
            for size, power, pool in ((3, 40, 14), (4, 40, 11), (5, 30, 11), (8, 20, 11))
        ),
        (0.1, 0.2, 0.2, 0.2),
        (14, 11, 11, 11),
        (15, 25, 35, 45),
        48,
        200,
    ),
    "full": Architecture((NNLBlock(28, 2000, 20, 1, 1),), (0.4,), (1,)),
}
# Of eq. 4 and 5: what the learning rate becomes, in units of the first, after each drop.
_RATES = (0.8, 0.5, 0.2, 0.1)


@dataclass(frozen=True)
class Config:
    """Options of the experiment; those not given are the architecture's."""

    dataset: str = "auto"
    """cifar10, another data set of images, FILE.npz, photographs, or auto: CIFAR-10 if at hand, else
    scikit-learn's two photographs, from which filters are only learned and drawn."""
    data_dir: Path | None = None
    """Folder of data sets; by default $SUL_JAX_DATA."""
    workdir: Path = Path("runs/hebbian")
    """Where everything is written; an earlier run there is set aside, not lost."""
    architecture: Literal["single", "five", "imagenet32", "full"] = "single"
    """single: 400 filters of 4×4 pixels; five: five blocks of different windows; imagenet32: four; full:
    units that see whole images."""
    response: Literal["nnl", "relu"] = "nnl"
    """nnl: Hebbian filters, which stay as they are, and steep responses; relu: the twin, trained end
    to end."""
    num_units: int | None = None
    """Filters of each block."""
    powers: tuple[float, ...] = ()
    """Candidates for the power of all blocks; the best on the last num_validation training images is taken,
    and the classifier then learned from all of them."""
    num_validation: int = 5_000
    """Training images held out to choose among powers."""
    filters_from: Path | None = None
    """Network of another run whose filters are taken instead of learning them (transfer)."""
    filter_steps: int | None = None
    """Minibatches of patches; by default 100,000, 10,000 on small data."""
    filter_learning_rate: float = 4e-3
    """ε at the first minibatch; it falls linearly to 0."""
    filter_start: Literal["patches", "normal"] = "patches"
    """What filters start from: random patches of unit norm, so that every unit has something to learn from
    the first step on; or a normal distribution, as in the paper, which takes millions of minibatches."""
    patch_batch: int = 1_000
    """Patches in a minibatch."""
    anti_hebbian: float | None = None
    """Δ of all blocks."""
    rank: int = 2
    """m: the unit that learns away from an input."""
    normalize_update: bool = True
    """Divide an update by its largest entry, as the authors' code does."""
    epochs: int | None = None
    """Of the classifier; by default 70."""
    batch_size: int | None = None
    """Images in a minibatch of the classifier; by default 300."""
    learning_rate: float = 1e-4
    """Adam's, at first; it drops to a tenth as in eq. 4."""
    probe_every: int = 5
    """Epochs between two looks at the test error."""
    cache_gib: float = 8.0
    """Largest cache of features in GiB; where they would take more, they are computed anew in every epoch."""
    num_train: int | None = None
    """Use only the first training images."""
    num_test: int | None = None
    """Use only the first test images."""
    seed: int = 0
    """First seed."""
    seeds: int = 1
    """Number of seeds: seed, seed + 1, …"""
    resume: bool = False
    """Continue the run in the workdir."""
    record: bool = False
    """Append the results to experiments/results/."""


class Split(NamedTuple):
    """Images and what is learned or asked of them.

    Attributes:
      images: uint8 or floating `[num, height, width, channels]`.
      labels: int32 `[num]`.
    """

    images: np.ndarray
    labels: np.ndarray


class Learner(NamedTuple):
    """What an epoch of the classifier changes.

    Attributes:
      params: trained parameters.
      memory: of the optimiser.
      history: `[epochs, 2 + number of test sets]`: loss, seconds of training so far, and errors in percent;
        NaN where nobody looked.
    """

    params: Any
    memory: Any
    history: Array


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
    _check(config)
    dataset = data.load(config.dataset, config.data_dir, auto=auto)
    number = len(dataset.train_images[: config.num_train])
    small = number < _MAX_SMALL
    design = ARCHITECTURES[config.architecture]
    config = replace(
        config,
        dataset=dataset.name,
        filter_steps=config.filter_steps or (10_000 if small else 100_000),
        epochs=config.epochs or design.epochs,
        batch_size=min(config.batch_size or design.batch_size, number),
    )
    image_shape = dataset.train_images.shape[1:]
    blocks = blocks_of(config, image_shape)
    train = _split(dataset.train_images, dataset.train_labels, config.num_train)
    test = _split(dataset.test_images, dataset.test_labels, config.num_test)
    if config.powers and (train is None or not 0 < config.num_validation < number):
        raise ConfigError(
            f"num_validation={config.num_validation} is not accepted: powers are chosen on some of the "
            f"{number} training images, by their labels"
        )
    whole = config.num_train is None and config.num_test is None
    beside = paper.get((config.architecture, config.response)) if whole else None
    results = []
    told_apart = identity(dataset.train_images[: config.num_train])
    with Workdir(experiment, config, data=told_apart, may_differ=("num_test",)) as workdir:
        print(f"{dataset.name}: {number} images ({dataset.source})")
        for seed in workdir.seeds:
            began = time.perf_counter()
            network, values = _learn(config, seed, blocks, dataset, train, test, workdir)
            network.save(config.workdir / f"network-{seed}")
            values = {name: round(value, 3) for name, value in values.items()}
            tested = 0 if test is None else len(test.labels)
            named = {} if beside is None else {"test_error": beside}
            outcome = Outcome(values, dataset, number, tested, time.perf_counter() - began, named)
            workdir.finish(seed, outcome)
            results.append(SeedResult(seed, network, values))
    print_metrics(results, {} if beside is None else {"test_error": beside})
    print(f"\nfigures, networks and results: {config.workdir}")
    return results


def blocks_of(config: Config, image_shape: tuple[int, ...]) -> tuple[NNLBlock, ...]:
    """The blocks, with what the options change."""
    design = ARCHITECTURES[config.architecture]
    pools = design.twin_pools if config.response == "relu" else [block.pool for block in design.blocks]
    blocks = (
        block._replace(pool=pool, num_units=config.num_units or block.num_units)
        for block, pool in zip(design.blocks, pools, strict=True)
    )
    if config.architecture == "full":
        if image_shape[0] != image_shape[1]:
            raise ConfigError(f"architecture='full' needs square images, not {image_shape[:2]}")
        blocks = (block._replace(kernel_size=image_shape[0]) for block in blocks)
    return tuple(blocks)


def _learn(
    config: Config,
    seed: int,
    blocks: tuple[NNLBlock, ...],
    dataset: data.Dataset,
    train: Split | None,
    test: Split | None,
    workdir: Workdir,
) -> tuple[NNLConv, dict[str, float]]:
    """A network and its metrics."""
    first, values = seed == config.seed, {}
    classes = 1 if train is None else int(train.labels.max()) + 1
    if test is not None:
        classes = max(classes, int(test.labels.max()) + 1)

    def build(power: float | None = None) -> NNLConv:
        sized = blocks if power is None else tuple(block._replace(power=power) for block in blocks)
        network = NNLConv(
            dataset.train_images.shape[1:],
            sized,
            num_classes=classes,
            response=config.response,
            rngs=nnx.Rngs(seed),
        )
        for index, weights in enumerate(filters):
            network.filters[index][...] = weights
        return network

    filters: list[Array] = []
    if config.response == "nnl":
        if config.filters_from is None:
            images = jnp.asarray(dataset.train_images[: config.num_train])
            learned = [
                learn_filters(config, seed, images, index, block, workdir)
                for index, block in enumerate(blocks)
            ]
            filters = [state.weights for state, _ in learned]
            values["filter_seconds"] = sum(seconds for _, seconds in learned)
        else:
            filters = _borrowed(config.filters_from, blocks, dataset.train_images.shape[-1])
        states = [HebbianState(weights) for weights in filters]
        dead = np.concatenate([np.asarray(hebbian.unconverged(state)) for state in states])
        values["converged_units"] = 100 * float(1 - dead.mean())
        channels = dataset.train_images.shape[-1]
        if channels == 3:
            shares = np.concatenate([color_share(np.asarray(weights)) for weights in filters])
            values["separated_units"] = 100 * float(np.mean(np.abs(shares - 0.5) > 0.3))
            if first:
                figures.separation(shares, config.workdir / "section5_colour_and_orientation.png")
        for index, weights in enumerate(filters if first else ()):
            name = "figure1_filters.png" if len(filters) == 1 else f"figure1_filters_{index + 1}.png"
            figures.filters(np.asarray(weights), channels, config.workdir / name)
    if train is None:
        return build(), values
    power = None
    if config.powers:
        power = _choose_power(config, seed, build, train, workdir)
        values["power"] = power
    network = build(power)
    tests = {} if test is None else {"test": test, "shadowed test": Split(shadowed(test.images), test.labels)}
    history = fit(config, seed, network, train, tests, workdir, "classifier")
    values["train_loss"], values["classifier_seconds"] = (float(value) for value in history[-1, :2])
    for name, error in zip(tests, history[-1, 2:], strict=True):
        values[f"{name.replace(' ', '_')}_error"] = float(error)
    if first and test is not None:
        looked = history[np.isfinite(history[:, 2])]
        curves = dict(zip(tests, looked[:, 2:].T, strict=True))
        figures.errors(looked[:, 1], curves, config.workdir / "figure2_errors.png")
        shown = np.arange(min(16, len(test.images)))
        figures.rows_of_images(
            [test.images[shown], shadowed(test.images[shown])], config.workdir / "figure6_shadows.png"
        )
    return network, values


def learn_filters(
    config: Config, seed: int, images: Array, index: int, block: NNLBlock, workdir: Workdir
) -> tuple[HebbianState, float]:
    """Weights of a block from random patches, cut out minibatch by minibatch, and the seconds it took."""
    assert config.filter_steps is not None
    size = block.kernel_size
    delta = config.anti_hebbian
    if delta is None:
        delta = ARCHITECTURES[config.architecture].anti_hebbian[index]
    rates = optax.linear_schedule(config.filter_learning_rate, 0.0, config.filter_steps)
    bounds = (len(images), images.shape[1] - size + 1, images.shape[2] - size + 1)
    key = jax.random.fold_in(jax.random.key(seed), index)

    def draw(key: Array, images: Array) -> Array:
        keys = jax.random.split(key, 3)
        places = (
            jax.random.randint(k, (config.patch_batch,), 0, bound)
            for k, bound in zip(keys, bounds, strict=True)
        )
        return evaluation.to_float(patches.cut(images, *places, kernel_size=size))

    def step(state: HebbianState, number: Array, images: Array) -> tuple[HebbianState, Array]:
        state, _ = hebbian.update(
            state,
            draw(jax.random.fold_in(key, number), images),
            learning_rate=rates(number),
            anti_hebbian=delta,
            rank=config.rank,
            normalize_update=config.normalize_update,
        )
        share = jnp.mean(hebbian.unconverged(state), dtype=jnp.float32)
        return state, jnp.where(jnp.all(jnp.isfinite(state.weights)), share, jnp.nan)

    example = jax.eval_shape(draw, key, images)
    start_key = jax.random.fold_in(key, config.filter_steps)
    start = hebbian.init(start_key, jnp.zeros((1, example.shape[1])), num_units=block.num_units)
    if config.filter_start == "patches":
        seen = jnp.concatenate([draw(k, images) for k in jax.random.split(start_key, _START_DRAWS)])
        bright = seen[jnp.argsort(jnp.linalg.norm(seen, axis=1) < _DARK)]  # dark ones last
        if len(bright) >= block.num_units:
            start = HebbianState(whitening.normalize(bright[: block.num_units]))
    trained = run_steps(
        compiled_steps(step, images),
        start,
        steps=config.filter_steps,
        stride=500,
        folder=config.workdir / f"checkpoints-{seed}-filters-{index}",
        title=f"seed {seed}, filters of {size}×{size}",
        value_name="unconverged",
        log=partial(workdir.log, seed=seed, block=index),
    )
    return trained.state, trained.seconds


def color_share(weights: np.ndarray) -> np.ndarray:
    """How much of a filter's pattern is colour: 0 for a gray grating, 1 for an even coloured patch.

    Args:
      weights: `[num_units, pixels · 3]`.

    Returns:
      `[num_units]` in [0, 1]: the share of chrominance in chrominance and variation of the luminance.

    Example:
      >>> import numpy as np
      >>> from experiments import hebbian_filters
      >>> hebbian_filters.color_share(np.array([[1, 0, 0, 1, 0, 0], [1, 1, 1, 0, 0, 0.0]])).tolist()
      [1.0, 0.0]
    """
    pattern = weights.reshape(len(weights), -1, 3)
    luminance = pattern.mean(axis=2, keepdims=True)
    chrominance = np.square(pattern - luminance).sum(axis=(1, 2))
    variation = 3 * np.square(luminance - luminance.mean(axis=1, keepdims=True)).sum(axis=(1, 2))
    return np.asarray(chrominance / np.maximum(chrominance + variation, 1e-12))


def shadowed(images: np.ndarray) -> np.ndarray:
    """Images with figure 6's shadow on their left: of 32 columns, 25."""
    columns = round(images.shape[2] * _SHADOW[0] / 32)
    light = np.where(np.arange(images.shape[2]) < columns, _SHADOW[1], 1.0)[:, None]
    return np.asarray(images * light).astype(images.dtype)


def fit(
    config: Config,
    seed: int,
    network: NNLConv,
    train: Split,
    tests: Mapping[str, Split],
    workdir: Workdir,
    title: str,
) -> np.ndarray:
    """Trains the classifier, or everything where responses are plain; the network is changed in place.

    Filters that stay as they are respond to every image once, kept in half precision, where memory allows.

    Returns:
      The history, as in `Learner`.
    """
    assert config.epochs is not None
    assert config.batch_size is not None
    batch_size, number = min(config.batch_size, len(train.labels)), len(train.labels)
    steps = number // batch_size
    fixed = network.response == "nnl"
    trained = network.classifier if fixed else network
    graph, params = nnx.split(trained)
    network_graph, network_state = nnx.split(network)

    examples = number + sum(len(split.labels) for split in tests.values())
    cached = fixed and 2 * examples * network.num_features <= config.cache_gib * 2**30

    def logits(params: Any, inputs: Array) -> Array:
        if fixed and not cached:
            inputs = _features(network_graph, network_state, inputs)
        inputs = inputs.astype(jnp.float32) if fixed else evaluation.to_float(inputs)
        return nnx.merge(graph, params)(inputs)

    if cached:
        take = partial(_features, network_graph, network_state)
        seen = _kept(take, train.images, network.num_features, "features")
        judged = {n: _kept(take, s.images, network.num_features, f"{n} features") for n, s in tests.items()}
    else:
        seen = jnp.asarray(train.images)
        judged = {name: jnp.asarray(split.images) for name, split in tests.items()}
    labels = jnp.asarray(train.labels)
    design = ARCHITECTURES[config.architecture]
    ratios = np.array(_RATES) / np.array((1, *_RATES[:-1]))
    drops = {
        round(epoch * config.epochs / design.epochs) * steps: float(ratio)
        for epoch, ratio in zip(design.drops, ratios, strict=True)
    }
    optimizer = optax.adam(optax.piecewise_constant_schedule(config.learning_rate, drops))

    def loss(params: Any, inputs: Array, labels: Array) -> Array:
        values = optax.softmax_cross_entropy_with_integer_labels(logits(params, inputs), labels)
        return jnp.mean(values)

    def step(learner: Learner, chosen: Array, inputs: Array, labels: Array) -> tuple[Learner, Array]:
        value, gradients = jax.value_and_grad(loss)(learner.params, inputs[chosen], labels[chosen])
        changes, memory = optimizer.update(gradients, learner.memory, learner.params)
        return learner._replace(params=optax.apply_updates(learner.params, changes), memory=memory), value

    take_steps = over_batches(step)
    guess = jax.jit(lambda params, inputs: jnp.argmax(logits(params, inputs), axis=1))
    key = jax.random.fold_in(jax.random.key(seed), 1_000_000)

    def advance(learner: Learner, epoch: int, _: int) -> tuple[Learner, Array]:
        began = time.perf_counter()
        order = jax.random.permutation(jax.random.fold_in(key, epoch), number)[: steps * batch_size]
        learner, value = take_steps(learner, order.reshape(steps, batch_size), seen, labels)
        jax.block_until_ready(value)
        before = learner.history[epoch - 1, 1] if epoch else 0.0
        row = [value, before + time.perf_counter() - began]
        look = (epoch + 1) % config.probe_every == 0 or epoch + 1 == config.epochs
        for name, split in tests.items():
            error = jnp.nan
            if look:
                found = evaluation.map_batches(
                    partial(guess, learner.params), judged[name], batch_size=_FEATURE_BATCH
                )
                error = 100 * np.mean(np.asarray(found) != split.labels)
            row.append(error)
        return learner._replace(history=learner.history.at[epoch].set(jnp.stack(jnp.array(row)))), value

    result = run_steps(
        advance,
        Learner(params, optimizer.init(params), jnp.full((config.epochs, 2 + len(tests)), jnp.nan)),
        steps=config.epochs,
        stride=1,
        folder=config.workdir / f"checkpoints-{seed}-{title.replace(' ', '-')}",
        title=f"seed {seed}, {title}",
        unit="epoch",
        log=partial(workdir.log, seed=seed),
    )
    nnx.update(trained, result.state.params)
    return np.asarray(result.state.history)


def _choose_power(config: Config, seed: int, build: Any, train: Split, workdir: Workdir) -> float:
    """The candidate of least error on held-out training images, of the same filters."""
    held = len(train.labels) - config.num_validation
    shown = Split(train.images[:held], train.labels[:held])
    hidden = {"validation": Split(train.images[held:], train.labels[held:])}
    errors = {}
    for power in config.powers:
        title = f"power {power:g}"
        history = fit(config, seed, build(power), shown, hidden, workdir, title)
        errors[power] = float(history[-1, 2])
        workdir.log(seed=seed, power=power, validation_error=errors[power])
        print(f"{title}: validation error {errors[power]:.2f} %")
    return min(errors, key=lambda power: errors[power])


@partial(jax.jit, static_argnums=0)
def _features(graph: Any, state: Any, images: Array) -> Array:
    found: Array = nnx.merge(graph, state).features(evaluation.to_float(images))
    return found.astype(jnp.float16)


def _kept(take: Any, images: np.ndarray, num_features: int, title: str) -> Array:
    """Features of all images in half precision, filled in batch by batch: never held twice on a CPU."""
    from tqdm import tqdm

    kept = np.empty((len(images), num_features), np.float16)
    for start in tqdm(range(0, len(images), _FEATURE_BATCH), desc=title, unit="batch"):
        part = images[start : start + _FEATURE_BATCH]
        kept[start : start + len(part)] = np.asarray(take(jnp.asarray(part)))
    return jnp.asarray(kept)


def _borrowed(path: Path, blocks: tuple[NNLBlock, ...], channels: int) -> list[Array]:
    network = NNLConv.load(path)
    wanted = [(block.kernel_size, block.num_units) for block in blocks]
    found = [(block.kernel_size, block.num_units) for block in network.blocks]
    if (wanted, channels) != (found, network.image_shape[-1]):
        raise ConfigError(
            f"filters_from={str(path)!r} holds filters of (window, number) {found} for "
            f"{network.image_shape[-1]} channels, not {wanted} for {channels}"
        )
    return [weights[...] for weights in network.filters]


def _split(images: np.ndarray, labels: np.ndarray | None, number: int | None) -> Split | None:
    return None if labels is None else Split(images[:number], labels[:number])


def _check(config: Config) -> None:
    check_options(
        config,
        at_least={
            "num_units": 2, "filter_steps": 1, "patch_batch": 1, "anti_hebbian": 0, "rank": 2, "epochs": 1,
            "batch_size": 1, "probe_every": 1, "num_train": 1, "num_test": 1, "seed": 0, "seeds": 1,
        },
        above={"filter_learning_rate": 0, "learning_rate": 0, "cache_gib": 0},
    )  # fmt: skip
    for power in config.powers:
        if not 0 < power < float("inf"):
            raise ConfigError(f"powers={config.powers} is not accepted: powers are positive")
    if config.powers and config.response == "relu":
        raise ConfigError("powers have no part in plain responses (response='relu')")
