"""Clustering two manifolds whose points are drawn anew in every step, by coding rates (paper 003)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array

from experiments.common.options import ConfigError, RunOptions, check_options
from experiments.common.runs import Learned, SeedResult, Workdir, run_seeds
from experiments.common.training import Trained, run_steps
from experiments.data import Dataset
from sul_jax import LearningRule, metrics, nmce, training
from sul_jax.cli.ranges import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Range
from sul_jax.nn import MLP, NMCE

_STRIDE = 50  # steps in one compiled call


@dataclass(frozen=True, kw_only=True)
class Config(RunOptions):
    """Options that the experiments have in common; each says its own defaults."""

    steps: PositiveInt
    """Training steps."""
    batch_size: Annotated[int, Range(2)]
    """Points in a step, half of them on each manifold; the paper takes 4096."""
    learning_rate: PositiveFloat
    """Adam's learning rate, annealed to 0 over the last fifth of the steps."""
    weight_decay: NonNegativeFloat = 1e-6
    """Decoupled weight decay."""
    noise: NonNegativeFloat
    """Standard deviation of the points around the manifolds."""
    augmentation_noise: NonNegativeFloat
    """Standard deviation of the noise that makes a view."""
    num_features: PositiveInt
    """Dimensions of the embedding."""
    hidden_size: PositiveInt = 128
    """Units of each hidden layer."""
    num_layers: PositiveInt = 5
    """Hidden layers."""
    eps_squared: PositiveFloat = 0.01
    """Squared distortion of the coding rates."""
    invariance_weight: NonNegativeFloat
    """Weight λ of the views' similarity."""
    temperature: PositiveFloat = 0.2
    """Temperature of the Gumbel softmax."""
    tcr_steps: NonNegativeInt = 0
    """First steps, which use only the total coding rate (eq. 5): features before clusters."""
    num_test: Annotated[int, Range(2)] = 4000
    """Points for evaluation."""


class Source(NamedTuple):
    """Where points come from.

    Attributes:
      name: of the data.
      num_inputs: dimensions of a point.
      sample: from a seed's key, a key and a number to fresh points `[number, num_inputs]` and their labels.
    """

    name: str
    num_inputs: int
    sample: Callable[[Array, Array, int], tuple[Array, Array]]


class Embedded(NamedTuple):
    """What a network makes of points.

    Attributes:
      features: `[num_points, num_features]`, of unit norm.
      clusters: `[num_points]`.
    """

    features: np.ndarray
    clusters: np.ndarray


Draw = Callable[[np.ndarray, np.ndarray, list[tuple[int, Embedded]]], None]
"""Draws test points with their labels, and what the network found in them at several steps."""


def run(
    config: Config,
    experiment: str,
    source: Source,
    *,
    paper: Mapping[str, float] = {},
    draw: Draw | None = None,
) -> list[SeedResult[NMCE]]:
    """Trains and evaluates, seed by seed.

    Args:
      config: the options.
      experiment: its name.
      source: of the points.
      paper: what the paper reports.
      draw: called for the first seed.

    Returns:
      One `SeedResult` a seed.

    Raises:
      ConfigError: options that cannot be used.
    """
    _check(config)
    rule = learning_rule(config, source.num_inputs)
    steps = training.compiled(partial(_step, config, rule, source))
    with Workdir(experiment, config, data={}) as workdir:

        def learn(seed: int) -> Learned[NMCE]:
            key = jax.random.key(seed)
            trained = _train(config, seed, workdir, steps, rule.init(key, None))
            drawn = source.sample(key, jax.random.fold_in(key, 2**31), config.num_test)
            points, labels = jax.device_get(drawn)
            network = build(config, source.num_inputs, nnx.Rngs(seed))
            if draw is not None and seed == config.seed:
                states = [(at, find(network, params, points)) for at, params in trained.snapshots]
                draw(points, labels, states)
            values = evaluate(find(network, trained.state.params, points), labels)
            network.save(config.workdir / f"network-seed{seed}")
            values["training_seconds"] = round(trained.seconds, 1)
            return Learned(network, values, trained.seconds)

        nothing = np.zeros(0)  # the data are not kept
        about = Dataset(source.name, nothing, None, nothing, None, "generated anew in every step")
        seen = config.steps * config.batch_size
        numbers = {"num_train": seen, "num_test": config.num_test}
        return run_seeds(workdir, partial(map, learn), about, **numbers, paper=paper)


def build(config: Config, num_inputs: int, rngs: nnx.Rngs) -> NMCE:
    """The untrained network."""
    backbone = MLP(num_inputs, config.hidden_size, num_layers=config.num_layers, rngs=rngs)
    return NMCE(backbone, config.hidden_size, num_features=config.num_features, num_clusters=2, rngs=rngs)


def learning_rule(config: Config, num_inputs: int) -> LearningRule:
    """Adam on the NMCE loss of points with a little noise."""

    def views(key: Array, points: Array) -> Array:
        return points + config.augmentation_noise * jax.random.normal(key, (2, *points.shape))

    # Decoupled decay: with an L2 penalty Adam would shrink the cluster head to nothing during
    # `tcr_steps`, when the penalty is all of its gradient.
    annealed = max(1, config.steps // 5)
    schedule = optax.linear_schedule(config.learning_rate, 0.0, annealed, config.steps - annealed)
    return nmce.rule(
        partial(build, config, num_inputs),
        views=views,
        optimizer=optax.adamw(schedule, b2=0.99, weight_decay=config.weight_decay),
        eps_squared=config.eps_squared,
        invariance_weight=config.invariance_weight,
        temperature=config.temperature,
    )


def _step(
    config: Config, rule: LearningRule, source: Source, state: Any, index: Array, key: Array
) -> tuple[Any, Any]:
    """On fresh points; `key` is the seed's."""
    data_key, step_key = jax.random.split(jax.random.fold_in(key, index))
    points, _ = source.sample(key, data_key, config.batch_size)
    compression = jnp.where(index < config.tcr_steps, 0.0, 1.0)
    return rule.update(state, points, key=step_key, compression_weight=compression)


def _train(config: Config, seed: int, workdir: Workdir, steps: training.Step, state: Any) -> Trained:
    """The rule's state after all steps, with snapshots of its parameters on the way."""
    return run_steps(
        steps,
        state,
        np.arange,
        jax.random.key(seed),
        num_steps=config.steps,
        workdir=workdir,
        name=f"{seed}",
        stride=_STRIDE,
        about={"seed": seed},
        snapshot_at={round(share * config.steps) for share in (0, 0.01, 0.03, 0.1, 0.3, 1)},
        snapshot=lambda state: state.params,
    )


def find(network: NMCE, params: Any, points: np.ndarray) -> Embedded:
    """Features and clusters of points; the network takes the parameters."""
    nnx.update(network, params)
    features, logits = jax.device_get(nnx.jit(lambda net, x: net(x))(network, points))
    return Embedded(np.asarray(features), np.argmax(logits, axis=1))


def evaluate(embedded: Embedded, labels: np.ndarray) -> dict[str, float]:
    """Accuracy in percent, and table A.1's columns.

    These are mean |cosine| of pairs from different true or found clusters, and within one. A column that
    needs two clusters is left out where there is only one.

    Args:
      embedded: of the points.
      labels: `[num_points]`, the true clusters 0 and 1.
    """
    features, clusters = embedded
    values = {"clustering_accuracy": 100 * metrics.clustering_accuracy(labels, clusters)}
    for name, groups in {"true": labels, "found": clusters}.items():
        parts = [features[groups == group] for group in np.unique(groups)]
        if len(parts) == 2:
            values[f"cosine_{name}_clusters"] = np.mean(np.abs(parts[0] @ parts[1].T))
    values["cosine_within_cluster"] = np.mean([np.mean(np.abs(part @ part.T)) for part in parts])
    return {name: round(float(value), 4) for name, value in values.items()}


def _check(config: Config) -> None:
    check_options(config)
    if config.tcr_steps >= config.steps:
        raise ConfigError(f"tcr_steps={config.tcr_steps} leaves no steps of {config.steps} for clusters")
