"""Two intertwined spirals, told apart without labels (paper 003, figure 1).

    python -m experiments.nmce_spiral              # no data needed
    python -m experiments.nmce_spiral --seeds 5

A small MLP learns features and soft clusters by the NMCE loss (eq. 4) from fresh points in every
step; a second view of a point is the point with a little noise. The paper shows the embedding
(figure 1) and trains on 4,096 points for 30,000 steps; ours takes fewer points, with the authors' code's
noise and the learning rate annealed at the end. The border between the clusters moves outwards along the
arms: with 24,000 steps and the rate annealed throughout, one seed of three had reached their ends.
README.md lists what it gives, with seeds, device and time.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array, lax

from experiments.common import figures
from experiments.common.options import ConfigError, check_options, command_line
from experiments.common.runs import Outcome, SeedResult, Workdir
from experiments.common.tables import print_metrics
from experiments.common.training import Trained, compiled_steps, run_steps
from experiments.data import Dataset
from sul_jax import LearningRule, coding_rate, from_loss, metrics
from sul_jax.nn import MLP, NMCE

EXPERIMENT = "nmce_spiral"
_STRIDE = 50  # steps in one compiled call


@dataclass(frozen=True)
class Config:
    """Options of the experiment."""

    workdir: Path = Path("runs/nmce_spiral")
    """Where everything is written; an earlier run there is set aside, not lost."""
    steps: int = 30_000
    """Training steps, as many as the paper's."""
    batch_size: int = 512
    """Points in a step, half of them on each manifold; the paper's 4096."""
    learning_rate: float = 2e-3
    """Adam's learning rate, annealed to 0 over the last fifth of the steps; the paper's constant 1e-3."""
    weight_decay: float = 1e-6
    """Decoupled weight decay."""
    noise: float = 0.1
    """Standard deviation of the points around the spirals, whose radius is 14; the authors' code's, in the
    text 0.05."""
    augmentation_noise: float = 0.2
    """Standard deviation of the noise that makes a view; the authors' code's, in the text 0.05."""
    num_features: int = 6
    """Dimensions of the embedding."""
    hidden_size: int = 128
    """Units of each hidden layer."""
    num_layers: int = 5
    """Hidden layers."""
    eps_squared: float = 0.01
    """Squared distortion of the coding rates."""
    invariance_weight: float = 4000.0
    """Weight λ of the views' similarity."""
    temperature: float = 0.2
    """Temperature of the Gumbel softmax."""
    tcr_steps: int = 0
    """First steps, with the total coding rate alone (eq. 5): features before clusters."""
    num_test: int = 4000
    """Points for evaluation."""
    seed: int = 0
    """First seed."""
    seeds: int = 1
    """Number of seeds: seed, seed + 1, …"""
    resume: bool = False
    """Continue the run in the workdir."""
    record: bool = False
    """Append the results to experiments/results/nmce_spiral.json."""


Sampler = Callable[[Array, int], tuple[Array, Array]]
"""From a key and a number to fresh points `[number, num_inputs]` and their labels."""
Figures = Callable[[Trained, np.ndarray, np.ndarray, np.ndarray], None]
"""Draws what training went through: with test points, their labels, the clusters found."""


def spirals(key: Array, *, num_points: int, noise: float | Array) -> tuple[Array, Array]:
    """Points on two spirals, one the other's mirror image through the origin.

    Args:
      key: `jax.random.key`.
      num_points: how many; the first half lies on the first spiral.
      noise: standard deviation of the Gaussian noise.

    Returns:
      Points `[num_points, 2]` with radii of about 5 to 14, labels `[num_points]`.

    Example:
      >>> import jax
      >>> from experiments.nmce_spiral import spirals
      >>> points, labels = spirals(jax.random.key(0), num_points=10, noise=0.05)
      >>> points.shape, labels.tolist()
      ((10, 2), [0, 0, 0, 0, 0, 1, 1, 1, 1, 1])
    """
    place, around = jax.random.split(key)
    angle = 1.5 * jnp.pi * (1 + 2 * jax.random.uniform(place, (num_points,)))
    labels = (jnp.arange(num_points) >= num_points // 2).astype(jnp.int32)
    side = 1 - 2 * labels
    points = (side * angle)[:, None] * jnp.stack([jnp.cos(angle), jnp.sin(angle)], axis=1)
    return points + noise * jax.random.normal(around, points.shape), labels


def run(config: Config) -> list[SeedResult[NMCE]]:
    """Trains and evaluates; see the module's docstring.

    Args:
      config: the options.

    Returns:
      One `SeedResult` a seed.

    Raises:
      ValueError: options that cannot be used.
    """
    check(config)

    def sample(key: Array, number: int) -> tuple[Array, Array]:
        return spirals(key, num_points=number, noise=config.noise)

    return run_seeds(config, EXPERIMENT, "spiral", lambda seed: sample, {}, partial(draw, config))


def run_seeds(
    config: Config,
    experiment: str,
    name: str,
    sampler: Callable[[int], Sampler],
    paper: Mapping[str, float],
    figures: Figures | None = None,
) -> list[SeedResult[NMCE]]:
    """Trains and evaluates on generated data, seed by seed.

    Args:
      config: the options.
      experiment: its name.
      name: that of the data.
      sampler: the data of a seed.
      paper: what the paper reports.
      figures: drawn for the first seed.
    """
    results = []
    with Workdir(experiment, config, data={}) as workdir:
        for seed in workdir.seeds:
            sample = sampler(seed)
            trained = train(config, seed, workdir, sample)
            test_key = jax.random.fold_in(jax.random.key(seed), 2**31)
            points, labels = jax.device_get(sample(test_key, config.num_test))
            result, found = evaluate(config, seed, trained.state.params, points, labels)
            result.network.save(config.workdir / f"network-seed{seed}")
            result.metrics["training_seconds"] = round(trained.seconds, 1)
            dataset = Dataset(name, points, labels, points, labels, "generated anew in every step")
            seen = config.steps * config.batch_size
            outcome = Outcome(result.metrics, dataset, seen, config.num_test, trained.seconds, paper)
            workdir.finish(seed, outcome)
            if figures is not None and seed == config.seed:
                figures(trained, points, labels, found)
            results.append(result)
    print_metrics(results, paper)
    print(f"\ncheckpoints, results and figures: {config.workdir}")
    return results


def build(config: Config, seed: int, num_inputs: int) -> NMCE:
    """The untrained network."""
    rngs = nnx.Rngs(seed)
    backbone = MLP(num_inputs, config.hidden_size, num_layers=config.num_layers, rngs=rngs)
    return NMCE(backbone, config.hidden_size, num_features=config.num_features, num_clusters=2, rngs=rngs)


def learning_rule(config: Config, seed: int, num_inputs: int) -> LearningRule:
    """Adam on the NMCE loss; inputs are two views of each point, `[batch, 2, num_inputs]`."""
    graph = nnx.graphdef(build(config, seed, num_inputs))

    def init(key: Array, inputs: Array) -> Any:
        del key, inputs  # the seed and the number of inputs say it all
        return nnx.state(build(config, seed, num_inputs))

    def apply(params: Any, inputs: Array) -> tuple[Array, Array]:
        found = nnx.merge(graph, params)(inputs.reshape(-1, num_inputs))
        features, logits = (values.reshape(*inputs.shape[:2], -1) for values in found)
        return features, logits

    def loss(
        activations: tuple[Array, Array],
        *,
        key: Array,
        compression_weight: Array,
        axis_name: str | None = None,
    ) -> Array:
        if axis_name is not None:
            key = jax.random.fold_in(key, lax.axis_index(axis_name))
        features, logits = (values.swapaxes(0, 1) for values in activations)
        memberships = coding_rate.gumbel_softmax(key, logits, temperature=config.temperature)
        return coding_rate.nmce_loss(
            features,
            memberships,
            eps_squared=config.eps_squared,
            invariance_weight=config.invariance_weight,
            compression_weight=compression_weight,
            axis_name=axis_name,
        )

    # Decoupled decay: with an L2 penalty Adam would shrink the cluster head to nothing during
    # `tcr_steps`, when the penalty is all of its gradient.
    annealed = max(1, config.steps // 5)
    schedule = optax.linear_schedule(config.learning_rate, 0.0, annealed, config.steps - annealed)
    optimizer = optax.adamw(schedule, b2=0.99, weight_decay=config.weight_decay)
    return from_loss(loss, init, apply, optimizer)


def train(config: Config, seed: int, workdir: Workdir, sample: Sampler) -> Trained:
    """The rule's state after all steps, with snapshots of its parameters on the way."""
    points = jax.eval_shape(lambda key: sample(key, config.batch_size)[0], jax.random.key(0))
    num_inputs = points.shape[1]
    rule = learning_rule(config, seed, num_inputs)

    def step(state: Any, index: Array) -> tuple[Any, Array]:
        data_key, view_key, gumbel_key = jax.random.split(jax.random.fold_in(jax.random.key(seed), index), 3)
        points, _ = sample(data_key, config.batch_size)
        noise = jax.random.normal(view_key, (len(points), 2, num_inputs))
        views = points[:, None] + config.augmentation_noise * noise
        compress = jnp.where(index < config.tcr_steps, 0.0, 1.0)
        state, info = rule.update(state, views, key=gumbel_key, compression_weight=compress)
        return state, info.loss

    return run_steps(
        compiled_steps(step),
        rule.init(jax.random.key(seed), jnp.zeros((1, 2, num_inputs))),
        steps=config.steps,
        stride=_STRIDE,
        folder=config.workdir / f"checkpoints-{seed}",
        title=f"seed {seed}",
        log=partial(workdir.log, seed=seed),
        snapshot_at={round(share * config.steps) for share in (0, 0.01, 0.03, 0.1, 0.3, 1)},
        snapshot=lambda state: state.params,
    )


def evaluate(
    config: Config, seed: int, params: Any, points: np.ndarray, labels: np.ndarray
) -> tuple[SeedResult[NMCE], np.ndarray]:
    """Accuracy and mean |cosine| between and within clusters, and the clusters found."""
    network = build(config, seed, points.shape[1])
    nnx.update(network, params)
    features, logits = jax.device_get(nnx.jit(lambda net, x: net(x))(network, points))
    found = np.argmax(logits, axis=1)
    values = {"clustering_accuracy": 100 * metrics.clustering_accuracy(labels, found)}
    values |= cosines(features, labels, found)
    return SeedResult(seed, network, {k: round(float(v), 4) for k, v in values.items()}), found


def cosines(features: np.ndarray, labels: np.ndarray, found: np.ndarray) -> dict[str, float]:
    """Table A.1's columns: mean |cosine| of pairs from different true or found clusters, and within one.

    A column that needs two clusters is left out where there is only one.

    Args:
      features: `[num, features]` of unit norm.
      labels: `[num]`, the true clusters 0 and 1.
      found: `[num]`, the clusters found.
    """
    values = {}
    for name, clusters in {"true": labels, "found": found}.items():
        parts = [features[clusters == c] for c in np.unique(clusters)]
        if len(parts) == 2:
            values[f"cosine_{name}_clusters"] = float(np.mean(np.abs(parts[0] @ parts[1].T)))
    within = [np.mean(np.abs(part @ part.T)) for c in np.unique(found) for part in [features[found == c]]]
    return values | {"cosine_within_cluster": float(np.mean(within))}


def draw(config: Config, trained: Trained, points: np.ndarray, labels: np.ndarray, found: np.ndarray) -> None:
    """Figure 1: the clusters in the plane and the embedding, while learning."""
    network = build(config, config.seed, points.shape[1])
    states = []
    for step, params in trained.snapshots:
        nnx.update(network, params)
        features, logits = jax.device_get(nnx.jit(lambda net, x: net(x))(network, points))
        states.append((step, np.asarray(features), np.argmax(logits, axis=1)))
    figures.manifolds(points, labels, states, config.workdir / "figure1_spiral.png")


def check(config: Config) -> None:
    """Raises where an option is out of range."""
    check_options(
        config,
        at_least={
            "tcr_steps": 0, "steps": 1, "batch_size": 2, "num_test": 2, "seeds": 1, "seed": 0,
            "num_layers": 1, "hidden_size": 1, "num_features": 1, "noise": 0, "augmentation_noise": 0,
            "weight_decay": 0, "invariance_weight": 0,
        },
        above={"learning_rate": 0, "eps_squared": 0, "temperature": 0},
    )  # fmt: skip
    if config.tcr_steps >= config.steps:
        raise ConfigError(f"tcr_steps={config.tcr_steps} leaves none of the {config.steps} steps to clusters")


def main() -> None:
    """The command line."""
    command_line(run, Config, description=__doc__)


if __name__ == "__main__":
    main()
