"""Layers that learn by SoftHebb, and a linear classifier on their codes (Journé et al. 2023).

    python -m experiments.cifar10_soft_hebb                      # CIFAR-10 if available, else bundled digits
    python -m experiments.cifar10_soft_hebb --no-learn           # the control: filters stay as they start
    python -m experiments.cifar10_soft_hebb --num-units 24 96 384

Three convolutional layers of 96, 384 and 1,536 filters learn at once in a single pass over the images,
without labels, gradients or feedback. Then the filters stay fixed, and a linear classifier learns from their
codes, with dropout. The authors report 80.3 % accuracy on CIFAR-10. experiments/results/README.md lists our
results, with seeds, device and time.
"""

import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array

from experiments import data
from experiments.common import figures
from experiments.common.classifier import Labelled, Plan, classify
from experiments.common.evaluation import kept_features, to_float
from experiments.common.options import ConfigError, RunOptions, check_at_most, check_options, command_line
from experiments.common.runs import Learned, SeedResult, Workdir, identity, run_seeds, same_setting
from experiments.common.training import run_steps
from experiments.data import Split
from sul_jax import soft_hebb, training, whitening
from sul_jax.cli.ranges import PositiveFloat, PositiveInt, Range
from sul_jax.learning_rule import stack
from sul_jax.nn import SoftHebbNet

EXPERIMENT = "cifar10_soft_hebb"
PAPER = {"test_error": 19.7}
# Shares of the classifier's epochs after which its learning rate is halved.
_HALVED = (0.2, 0.35, 0.5, 0.6, 0.7, 0.8, 0.9)


@dataclass(frozen=True, kw_only=True)
class Config(RunOptions):
    """Options of the experiment."""

    workdir: Path = Path("runs/cifar10_soft_hebb")
    """Where everything is written; a folder previous-… in it keeps an earlier run."""
    dataset: str = "auto"
    """cifar10, another data set of labelled images, FILE.npz, or auto: CIFAR-10 if available, else the
    bundled digits."""
    num_units: tuple[Annotated[int, Range(2)], ...] = (96, 384, 1536)
    """Filters of each layer; at most three layers."""
    learn: bool = True
    """Let the filters learn; --no-learn keeps them as they start, at unit norm, which shows what learning
    adds."""
    batch_size: PositiveInt = 10
    """Images in a minibatch of the filters."""
    passes: PositiveInt = 1
    """Passes of the filters over the training images."""
    epochs: PositiveInt = 50
    """Epochs of the classifier."""
    classifier_batch: PositiveInt = 64
    """Images in a minibatch of the classifier."""
    learning_rate: PositiveFloat = 1e-3
    """Adam's learning rate at the start; it is halved seven times."""
    num_train: PositiveInt | None = None
    """Use only this many training images, the first ones."""
    num_test: PositiveInt | None = None
    """Use only this many test images, the first ones."""


class Setting(NamedTuple):
    """What all seeds of a run share."""

    config: Config
    layers: tuple[soft_hebb.SoftHebbLayer, ...]
    train: Split
    test: Split
    num_classes: int
    workdir: Workdir


def run(config: Config) -> list[SeedResult[SoftHebbNet]]:
    """Trains and evaluates; see the module's docstring.

    Raises:
      ValueError: options or data that cannot be used.
    """
    check_options(config)
    if not 1 <= len(config.num_units) <= len(soft_hebb.CIFAR10):
        raise ConfigError(f"num_units={config.num_units} is not accepted: it must have one to three layers")
    dataset = data.load(config.dataset, config.data_dir, auto=("cifar10", "digits"))
    images, splits, num_classes = data.split(dataset, config.num_train, config.num_test)
    if not splits:
        raise ConfigError(f"dataset={config.dataset!r} has no labels, which the classifier needs")
    for name in ("batch_size", "classifier_batch"):
        check_at_most(name, getattr(config, name), len(images), "training images")
    filled = replace(config, dataset=dataset.name)
    layers = tuple(
        layer._replace(num_units=number)
        for layer, number in zip(soft_hebb.CIFAR10, config.num_units, strict=False)
    )
    with Workdir(EXPERIMENT, filled, data=identity(images)) as workdir:
        setting = Setting(filled, layers, splits["train"], splits["test"], num_classes, workdir)
        numbers = {"num_train": len(images), "num_test": len(splits["test"])}
        paper = PAPER if same_setting(filled, Config(dataset="cifar10")) else {}
        return run_seeds(workdir, partial(map, partial(learn, setting)), dataset, **numbers, paper=paper)


def learn(setting: Setting, seed: int) -> Learned[SoftHebbNet]:
    """A network, its metrics, and the seconds of learning and evaluation."""
    config, train, test = setting.config, setting.train, setting.test
    states, filter_seconds = filters(setting, seed)
    network = SoftHebbNet(
        train.images.shape[1:], setting.layers, num_classes=setting.num_classes, rngs=nnx.Rngs(seed)
    )
    network.set_states(states)
    began = time.perf_counter()
    take = partial(_features, *nnx.split(network))
    asked, known = (
        Labelled(kept_features(take, one.images, title=f"seed {seed}, {name}"), np.asarray(one.labels))
        for name, one in (("test codes", test), ("codes", train))
    )
    seconds = time.perf_counter() - began

    def optimizer(per_epoch: int) -> optax.GradientTransformation:
        halved = {int(share * config.epochs) * per_epoch: 0.5 for share in _HALVED}
        return optax.adam(optax.piecewise_constant_schedule(config.learning_rate, halved))

    plan = Plan(optimizer, config.classifier_batch, config.epochs, probe_every=config.epochs, fill_last=True)
    key = jax.random.fold_in(jax.random.key(seed), 1)
    history, classifier_seconds = classify(
        network.classifier, half_dropped, known, {"test": asked, "train": known}, plan, key,
        workdir=setting.workdir, seed=seed,
    )  # fmt: skip
    norms = np.concatenate([np.linalg.norm(layer.weights, axis=1) for layer in states])
    metrics = dict(zip(("test_error", "train_error"), history[-1, 2:].tolist(), strict=True))
    metrics["converged_units"] = 100 * float(np.mean(np.abs(norms - 1) < 0.1))
    metrics |= {"filter_seconds": filter_seconds, "classifier_seconds": classifier_seconds}
    network.save(config.workdir / f"network-{seed}")
    if seed == config.seed:
        weights = np.asarray(states[0].weights)
        figures.filters(weights, train.images.shape[3], config.workdir / "filters.png")
    total = filter_seconds + seconds + classifier_seconds
    return Learned(network, {name: round(value, 3) for name, value in metrics.items()}, total)


def filters(setting: Setting, seed: int) -> tuple[tuple[soft_hebb.SoftHebbLayerState, ...], float]:
    """What all layers learn at once, or how they start, with the statistics of their inputs; and the time."""
    config, images = setting.config, setting.train.images
    rule = stack(*soft_hebb.network_rules(setting.layers))
    start_key, order_key = jax.random.split(jax.random.key(seed))
    batches = training.Minibatches(order_key, len(images), config.batch_size)
    first = to_float(jnp.asarray(images[batches(0, 1).indices[0]]))
    states = jax.jit(rule.init)(start_key, first)
    rates = {}
    if not config.learn:
        states = tuple(one._replace(weights=whitening.normalize(one.weights)) for one in states)
        rates = {"learning_rate": 0.0}

    def step(states: Any, chosen: Array, images: Array) -> tuple[Any, Array]:
        states, infos = rule.update(states, to_float(images[chosen]), **rates)
        # The distance from unit norm that is left, NaN where the weights are.
        return states, jnp.mean(jnp.stack([jnp.mean(jnp.abs(info.norms - 1)) for info in infos]))

    trained = run_steps(
        training.compiled(step, scan=training.scans_convolutions()),
        states,
        lambda first, end: batches(first, end).indices,
        jnp.asarray(images),
        num_steps=config.passes * batches.per_epoch,
        workdir=setting.workdir,
        name=f"{seed}-filters",
        title=f"seed {seed}, filters",
        stride=10,
        value_name="norms_off_1",
        about={"seed": seed},
    )
    return trained.state, trained.seconds


def half_dropped(codes: Array, key: Array | None) -> Array:
    """Single precision and, with a key, dropout of one half by the bits of random words.

    A random number for each value would take longest of all.
    """
    values = codes.astype(jnp.float32)
    if key is None:
        return values
    words = jax.random.bits(key, (len(values), -(-values.shape[1] // 32)), jnp.uint32)
    kept = (words[..., None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
    return jnp.where(kept.reshape(len(values), -1)[:, : values.shape[1]], 2 * values, 0)


@partial(jax.jit, static_argnums=0)
def _features(graph: Any, state: Any, images: Array) -> Array:
    return nnx.merge(graph, state).features(to_float(images)).astype(jnp.float16)


main = partial(command_line, run, Config, description=__doc__)


if __name__ == "__main__":
    main()
