"""Filters learned without labels or gradients, and a classifier on what they respond (paper 001).

What `cifar10_hebbian`, `imagenet32_hebbian` and `mnist_hebbian` share: their defaults differ.
"""

import json
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
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
from tqdm import tqdm

from experiments import data
from experiments.common import evaluation, figures
from experiments.common.options import ConfigError, check_options
from experiments.common.runs import Outcome, SeedResult, Workdir, identity, recorded, write_json
from experiments.common.tables import print_metrics
from experiments.common.training import compiled_steps, over_batches, run_steps
from sul_jax import hebbian, patches, whitening
from sul_jax.hebbian import HebbianState
from sul_jax.nn import NNLBlock, NNLConv

_SHADOW = 25, 0.3  # columns of figure 6's shadow, and what is left of the light there
_FEATURE_BATCH = 250  # images of which features are taken at a time
_PATCHES_OF_A_UNIT = 50  # of which those that filters start from are drawn; and that they compete for
_CURVES = "errors.json"  # of the first seed, over the time of supervised training
_DARK = 0.1  # norm below which a patch is too dark to be a filter


class Architecture(NamedTuple):
    """Blocks and how their filters are learned.

    Attributes:
      blocks: the sizes.
      anti_hebbian: Δ of each block.
      twin_pools: pooling windows of the end-to-end twin.
      drops: epochs after which a learning rate in drops falls, of `epochs`.
      epochs: of the classifier.
      batch_size: images in a minibatch of the classifier.
      learning_rate: of the classifier of steep responses, at first; chosen on held-out training images for
        `single` on CIFAR-10 and `full` on MNIST.
      twin_epochs: of the end-to-end twin, at a constant learning rate; None for the same as the classifier.
    """

    blocks: tuple[NNLBlock, ...]
    anti_hebbian: tuple[float, ...]
    twin_pools: tuple[int, ...]
    drops: tuple[int, ...] = (15, 30, 45, 60)
    epochs: int = 70
    batch_size: int = 300
    learning_rate: float = 6e-4
    twin_epochs: int | None = None


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
        epochs=48,
        batch_size=200,
        twin_epochs=5,
    ),
    "full": Architecture((NNLBlock(28, 2000, 5, 1, 1),), (0.4,), (1,), learning_rate=0.1),
}
# Of eq. 4 and 5: the learning rate before, between and after the drops, in units of the first.
_RATES = (1.0, 0.8, 0.5, 0.2, 0.1)
# Options that change no result, besides those that are not recorded.
_INCIDENTAL = ("probe_every", "cache_gib", "num_validation")


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
    """Candidates for the power of all blocks; the best on num_validation random training images is taken, and
    the classifier then learned from all of them. One alone is taken as it is."""
    num_validation: int = 5_000
    """Training images held out to choose among powers."""
    filters_from: Path | None = None
    """Network of another run whose filters are taken instead of learning them (transfer)."""
    filter_steps: int = 10_000
    """Minibatches of patches; 0 leaves the filters as they start, which shows what their learning adds."""
    filter_learning_rate: float = 4e-3
    """ε at the first minibatch; it falls linearly to 0."""
    filter_start: Literal["patches", "normal"] = "patches"
    """What filters start from: patches of unit norm, drawn one after the other and rather far from each
    other, so that every unit has something to learn from the first step on; or a normal distribution, as in
    the paper, which takes millions of minibatches."""
    patch_batch: int = 1_000
    """Patches in a minibatch."""
    anti_hebbian: float | None = None
    """Δ of all blocks."""
    rank: int = 2
    """m: the unit that learns away from an input."""
    normalize_update: bool = True
    """Divide an update by its largest entry, as the authors' code does."""
    epochs: int | None = None
    """Of the classifier; by default the architecture's: 70, of imagenet32 48 (its twin 5)."""
    batch_size: int | None = None
    """Images in a minibatch of the classifier; by default the architecture's: 300, of imagenet32 200."""
    learning_rate: float | None = None
    """Adam's, at first; by default 1e-4 for the twin, as in the paper, and for steep responses, which are
    small, the architecture's: 6e-4, of full 0.1."""
    schedule: Literal["drops", "linear", "constant"] | None = None
    """How it falls: in four drops to a tenth (eq. 4 and 5), linearly to 0, or not at all. By default linearly
    for steep responses, in drops for the twin, that of imagenet32 not at all."""
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
    beside: Path | None = None
    """Workdir of another run, such as the twin's, whose errors are drawn in the same picture."""
    resume: bool = False
    """Continue the run in the workdir."""
    record: bool = False
    """Append the results to experiments/results/."""


class Split(NamedTuple):
    """Images and what is learned or asked of them.

    Attributes:
      images: uint8 or floating `[num, height, width, channels]`.
      labels: int32 `[num]`, or None.
      num_classes: of all labels of the data set.
    """

    images: np.ndarray
    labels: np.ndarray | None
    num_classes: int


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
    train, test = _split(dataset, config)
    number = len(train.images)
    config = _fill_in(config, dataset.name, number)
    published = type(config)(architecture=config.architecture, response=config.response)
    # The paper's number stands beside runs of its own setting alone.
    same = _computed(config) == _computed(_fill_in(published, auto[0], number))
    beside = paper.get((config.architecture, config.response)) if same else None
    if len(config.powers) > 1 and (train.labels is None or not 0 < config.num_validation < number):
        raise ConfigError(
            f"num_validation={config.num_validation} is not accepted: powers are chosen on some of the "
            f"{number} training images, by their labels"
        )
    shape = dataset.train_images.shape[1:]
    blocks = blocks_of(config, shape)
    nnx.eval_shape(lambda: NNLConv(shape, blocks, num_classes=1, rngs=nnx.Rngs(0)))  # do they fit?
    told_apart = identity(train.images)
    others = {} if config.beside is None else {f"{config.beside.name}: ": _curves(config.beside)}
    borrowed = None
    if config.filters_from is not None:
        borrowed = _borrowed(config.filters_from, blocks, shape[-1])
        told_apart["filters"] = zlib.crc32(b"".join(np.asarray(w).tobytes() for w in borrowed))
    results = []
    with Workdir(experiment, config, data=told_apart) as workdir:
        print(f"{dataset.name}: {number} images ({dataset.source})")
        for seed in workdir.seeds:
            network, values, seconds = _learn(config, seed, blocks, borrowed, others, train, test, workdir)
            network.save(config.workdir / f"network-{seed}")
            values = {name: round(value, 3) for name, value in values.items()}
            tested = 0 if test is None else len(test.images)
            named = {} if beside is None else {"test_error": beside}
            workdir.finish(seed, Outcome(values, dataset, number, tested, seconds, named))
            results.append(SeedResult(seed, network, values))
    print_metrics(results, {} if beside is None else {"test_error": beside})
    print(f"\nfigures, networks and results: {config.workdir}")
    return results


def _computed(config: Config) -> dict[str, Any]:
    """The options that a result depends on."""
    return {name: value for name, value in recorded(config).items() if name not in _INCIDENTAL}


def _fill_in(config: Config, name: str, number: int) -> Any:
    """The defaults that depend on the architecture and the data."""
    design = ARCHITECTURES[config.architecture]
    twin = config.response == "relu" and design.twin_epochs is not None
    return replace(
        config,
        dataset=name,
        epochs=config.epochs or (design.twin_epochs if twin else design.epochs),
        batch_size=min(config.batch_size or design.batch_size, number),
        learning_rate=config.learning_rate or (1e-4 if config.response == "relu" else design.learning_rate),
        schedule=config.schedule
        or ("linear" if config.response == "nnl" else "constant" if twin else "drops"),
    )


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
    borrowed: list[Array] | None,
    others: Mapping[str, Mapping[str, Sequence[float]]],
    train: Split,
    test: Split | None,
    workdir: Workdir,
) -> tuple[NNLConv, dict[str, float], float]:
    """A network, its metrics, and the seconds of learning and evaluation."""
    first, spent = seed == config.seed, 0.0
    values: dict[str, float] = {}
    channels = train.images.shape[-1]

    def build(power: float | None = None) -> NNLConv:
        sized = blocks if power is None else tuple(block._replace(power=power) for block in blocks)
        network = NNLConv(
            train.images.shape[1:],
            sized,
            num_classes=train.num_classes,
            response=config.response,
            rngs=nnx.Rngs(seed),
        )
        for index, weights in enumerate(filters):
            network.filters[index][...] = weights
        return network

    filters: list[Array] = []
    if config.response == "nnl":
        if borrowed is None:
            images = jnp.asarray(train.images)
            learned = [
                learn_filters(config, seed, images, index, block, workdir)
                for index, block in enumerate(blocks)
            ]
            del images
            filters = [found.weights for found in learned]
            spent = values["filter_seconds"] = sum(found.seconds for found in learned)
            values["winning_units"] = 100 * float(np.mean([found.winning for found in learned]))
        else:
            filters = borrowed
        dead = [np.asarray(hebbian.unconverged(HebbianState(weights))) for weights in filters]
        values["converged_units"] = 100 * float(1 - np.concatenate(dead).mean())
        if channels == 3:
            shares = np.concatenate([color_share(np.asarray(weights)) for weights in filters])
            values["separated_units"] = 100 * float(np.mean(np.abs(shares - 0.5) > 0.3))
            if first:
                figures.separation(shares, config.workdir / "section5_colour_and_orientation.png")
        for index, weights in enumerate(filters if first else ()):
            name = "figure1_filters.png" if len(filters) == 1 else f"figure1_filters_{index + 1}.png"
            figures.filters(np.asarray(weights), channels, config.workdir / name)
    if train.labels is None:
        return build(), values, spent
    power = config.powers[0] if config.powers else None
    if len(config.powers) > 1:
        power, seconds = _choose_power(config, seed, build, train, workdir)
        values["power"], spent = power, spent + seconds
    network = build(power)
    tests = {}
    if test is not None:
        tests = {"test": test, "shadowed test": test._replace(images=shadowed(test.images))}
    history, seconds = fit(config, seed, network, train, tests, workdir, "classifier")
    values["train_loss"], values["classifier_seconds"] = (float(value) for value in history[-1, :2])
    for name, error in zip(tests, history[-1, 2:], strict=True):
        values[f"{name.replace(' ', '_')}_error"] = float(error)
    if first and test is not None:
        looked = history[np.isfinite(history[:, 2])]
        curves = {"seconds": looked[:, 1].tolist()}
        curves |= {name: looked[:, 2 + index].tolist() for index, name in enumerate(tests)}
        write_json(config.workdir / _CURVES, curves)
        figures.errors({"": curves, **others}, config.workdir / "figure2_errors.png")
        shown = test.images[:16]
        figures.rows_of_images(
            [np.asarray(evaluation.to_float(jnp.asarray(shown))), shadowed(shown)],
            config.workdir / "figure6_shadows.png",
        )
    return network, values, spent + seconds


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


def learn_filters(
    config: Config, seed: int, images: Array, index: int, block: NNLBlock, workdir: Workdir
) -> Filters:
    """Filters from random patches, cut out minibatch by minibatch."""
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

    def many(key: Array) -> Iterator[Array]:
        number = -(-_PATCHES_OF_A_UNIT * block.num_units // config.patch_batch)
        return (draw(one, images) for one in jax.random.split(key, number))

    start_key = jax.random.fold_in(key, config.filter_steps)
    patch = jnp.concatenate(list(many(start_key)))
    start = hebbian.init(start_key, patch, num_units=block.num_units)
    if config.filter_start == "patches":
        bright = patch[jnp.linalg.norm(patch, axis=1) > _DARK]
        if len(bright) < block.num_units:
            raise ConfigError(
                f"filter_start='patches' needs {block.num_units} patches that are not black, and found "
                f"{len(bright)} among {len(patch)}; filter_start='normal' needs none"
            )
        start = HebbianState(jax.jit(spread, static_argnums=2)(start_key, bright, block.num_units))
        del bright
    del patch
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
    weights = trained.state.weights
    winners: set[int] = set()
    for fresh in many(jax.random.fold_in(key, config.filter_steps + 1)):
        drives = jnp.matmul(fresh, weights.T, precision="highest")
        winners.update(np.asarray(jnp.argmax(drives, axis=1)).tolist())
    return Filters(weights, len(winners) / block.num_units, trained.seconds)


def spread(key: Array, vectors: Array, number: int) -> Array:
    """Some of many vectors, of unit norm, drawn one after the other with probability ∝ d⁴.

    d is the distance on the sphere from those drawn before: as in k-means++, but with rarer directions drawn
    more often. Patches drawn evenly are nearly all smooth and gray.

    Args:
      key: `jax.random.key`.
      vectors: `[num, features]`.
      number: how many to draw.

    Returns:
      `[number, features]`.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from experiments.common.hebbian_filters import spread
      >>> vectors = jnp.array([[2.0, 0.0]] * 50 + [[0.0, 3.0]])
      >>> sorted(spread(jax.random.key(0), vectors, 2).tolist())
      [[0.0, 1.0], [1.0, 0.0]]
    """
    unit = whitening.normalize(vectors)

    def draw(index: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        found, squares = carry
        chosen = unit[jax.random.categorical(jax.random.fold_in(key, index), 2 * jnp.log(squares))]
        squares = jnp.minimum(squares, jnp.maximum(2 - 2 * jnp.matmul(unit, chosen), 0))
        return found.at[index].set(chosen), squares

    empty = jnp.zeros((number, unit.shape[1]), unit.dtype)
    return jax.lax.fori_loop(0, number, draw, (empty, jnp.ones(len(unit))))[0]


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
    return np.asarray(evaluation.to_float(jnp.asarray(images)) * light, np.float32)


def fit(
    config: Config,
    seed: int,
    network: NNLConv,
    train: Split,
    tests: Mapping[str, Split],
    workdir: Workdir,
    title: str,
) -> tuple[np.ndarray, float]:
    """Trains the classifier, or everything where responses are plain; the network is changed in place.

    Filters that stay as they are respond to every image once, kept in half precision, where memory allows.
    Errors are those on features so kept, where a response below 6e-8 counts as 0.

    Returns:
      The history, as in `Learner`, and the seconds of all of it.
    """
    assert config.epochs is not None
    assert config.batch_size is not None
    assert config.learning_rate is not None
    assert train.labels is not None
    began = time.perf_counter()
    number = len(train.images)
    batch_size = min(config.batch_size, number)
    steps = number // batch_size
    fixed = network.response == "nnl"
    trained = network.classifier if fixed else network
    graph, params = nnx.split(trained)
    network_graph, network_state = nnx.split(network)

    examples = number + sum(len(split.images) for split in tests.values())
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
    epochs, highest = config.epochs, config.learning_rate
    drops = jnp.array([round(epoch * epochs / design.epochs) for epoch in design.drops])

    def rate(step: Any) -> Any:
        if config.schedule == "linear":
            return highest * (1 - step / (steps * epochs))
        if config.schedule == "constant":
            return highest
        return highest * jnp.array(_RATES)[jnp.searchsorted(drops, step // steps, side="right")]

    optimizer = optax.adam(rate)

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
        started = time.perf_counter()
        order = jax.random.permutation(jax.random.fold_in(key, epoch), number)[: steps * batch_size]
        learner, value = take_steps(learner, order.reshape(steps, batch_size), seen, labels)
        jax.block_until_ready(value)
        before = learner.history[epoch - 1, 1] if epoch else 0.0
        row = [value, before + time.perf_counter() - started]
        look = (epoch + 1) % config.probe_every == 0 or epoch + 1 == config.epochs
        for name, split in tests.items():
            error = jnp.nan
            if look:
                found = evaluation.map_batches(
                    partial(guess, learner.params), judged[name], batch_size=_FEATURE_BATCH
                )
                error = 100 * np.mean(np.asarray(found) != split.labels)
            row.append(error)
        return learner._replace(history=learner.history.at[epoch].set(jnp.array(row))), value

    prepared = time.perf_counter() - began
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
    return np.asarray(result.state.history), prepared + result.seconds


def _choose_power(
    config: Config, seed: int, build: Any, train: Split, workdir: Workdir
) -> tuple[float, float]:
    """The candidate of least error on held-out training images, of the same filters; and the seconds."""
    assert train.labels is not None
    order = np.random.default_rng(seed).permutation(len(train.images))
    hidden, shown = (
        Split(train.images[chosen], train.labels[chosen], train.num_classes)
        for chosen in np.split(order, [config.num_validation])
    )
    errors, spent = {}, 0.0
    for power in config.powers:
        title = f"power {power:g}"
        history, seconds = fit(config, seed, build(power), shown, {"validation": hidden}, workdir, title)
        errors[power], spent = float(history[-1, 2]), spent + seconds
        workdir.log(seed=seed, power=power, validation_error=errors[power])
        print(f"{title}: validation error {errors[power]:.2f} %")
    return min(errors, key=lambda power: errors[power]), spent


@partial(jax.jit, static_argnums=0)
def _features(graph: Any, state: Any, images: Array) -> Array:
    found: Array = nnx.merge(graph, state).features(evaluation.to_float(images))
    return found.astype(jnp.float16)


def _kept(take: Any, images: np.ndarray, num_features: int, title: str) -> Array:
    """Features of all images in half precision, filled in batch by batch: never held twice on a CPU."""
    size = 2 * len(images) * num_features
    # A CPU's device takes an array over as it is if it begins at a multiple of 64 bytes.
    memory = np.empty(size + 64, np.uint8)
    begin = -memory.ctypes.data % 64
    kept = memory[begin : begin + size].view(np.float16).reshape(len(images), num_features)
    for start in tqdm(range(0, len(images), _FEATURE_BATCH), desc=title, unit="batch"):
        part = images[start : start + _FEATURE_BATCH]
        kept[start : start + len(part)] = np.asarray(take(jnp.asarray(part)))
    return jax.device_put(kept, may_alias=True)


def _curves(path: Path) -> dict[str, list[float]]:
    """What another run wrote to its workdir."""
    try:
        found: dict[str, list[float]] = json.loads((path / _CURVES).read_text())
        if len({len(values) for values in found.values()} | {len(found["seconds"])}) > 1:
            raise ValueError("curves of different lengths")
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise ConfigError(
            f"beside={str(path)!r} has no {_CURVES} of a run with test images ({error})"
        ) from None
    return found


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


def _split(dataset: data.Dataset, config: Config) -> tuple[Split, Split | None]:
    """Training and test images; of data that come as one set, every fifth is a test image."""
    labels, test_labels = dataset.train_labels, dataset.test_labels
    if labels is None or test_labels is None:
        return Split(dataset.train_images[: config.num_train], None, 1), None
    classes = int(max(labels.max(), test_labels.max())) + 1
    images, test_images = dataset.train_images, dataset.test_images
    if test_images is images:
        held = np.arange(len(images)) % 5 == 4
        images, labels, test_images, test_labels = images[~held], labels[~held], images[held], labels[held]
    return (
        Split(images[: config.num_train], labels[: config.num_train], classes),
        Split(test_images[: config.num_test], test_labels[: config.num_test], classes),
    )


def _check(config: Config) -> None:
    check_options(
        config,
        at_least={
            "num_units": 2, "filter_steps": 0, "patch_batch": 1, "anti_hebbian": 0, "rank": 2, "epochs": 1,
            "batch_size": 1, "probe_every": 1, "num_train": 1, "num_test": 1, "seed": 0, "seeds": 1,
        },
        above={"filter_learning_rate": 0, "learning_rate": 0, "cache_gib": 0},
    )  # fmt: skip
    for power in config.powers:
        if not 0 < power < float("inf"):
            raise ConfigError(f"powers={config.powers} is not accepted: powers are positive")
    if config.powers and config.response == "relu":
        raise ConfigError("powers have no part in plain responses (response='relu')")
    if config.filters_from is not None and config.response == "relu":
        raise ConfigError("filters_from has no part in what is trained end to end (response='relu')")
