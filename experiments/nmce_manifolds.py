"""Two random curved manifolds of 3 and 6 dimensions, told apart without labels (paper 003, table A.1).

    python -m experiments.nmce_manifolds                  # identifiable: random biases keep them apart
    python -m experiments.nmce_manifolds --no-biases      # both go through the origin

Points are Gaussian noise sent through random LeakyReLU networks. The paper reports 100.0 % accuracy with
biases and 69.8 % without; it does not give the networks' depth and width or the dimension of the space, so we
chose them. experiments/results/README.md lists our results, with seeds, device and time.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
from jax import Array

from experiments.common import generated
from experiments.common.options import command_line
from experiments.common.runs import SeedResult
from sul_jax.cli.ranges import PositiveInt
from sul_jax.nn import NMCE

EXPERIMENT = "nmce_manifolds"
# Accuracy in percent and mean |cosine|: table A.1, identifiable and not.
PAPER = {
    True: (100.0, 0.017, 0.017, 0.503),
    False: (69.8, 0.717, 0.287, 0.770),
}


@dataclass(frozen=True, kw_only=True)
class Config(generated.Config):
    """Options of the experiment."""

    workdir: Path = Path("runs/nmce_manifolds")
    """Where everything is written; a folder previous-… in it keeps an earlier run."""
    biases: bool = True
    """Random biases in the networks that make the data: the manifolds are then far apart and
    identifiable."""
    num_dimensions: PositiveInt = 40
    """Dimensions of the space."""
    num_data_layers: PositiveInt = 3
    """Layers of the networks that make the data. Each layer shrinks its points. Without biases, two layers
    leave the manifolds far enough from the origin to be told apart; with four layers, most points lie within
    the noise."""
    steps: int = 3000
    """Training steps."""
    batch_size: int = 1024
    """Points in a step, half of them on each manifold; the paper takes 4096."""
    tcr_steps: int = 1500
    """First steps, which use only the total coding rate (eq. 5): features before clusters."""
    learning_rate: float = 1e-3
    """Adam's learning rate, annealed to 0 over the last fifth of the steps."""
    noise: float = 0.0
    """Standard deviation of noise around the manifolds."""
    augmentation_noise: float = 0.1
    """Standard deviation of the noise that makes a second view."""
    num_features: int = 12
    """Dimensions of the embedding."""
    invariance_weight: float = 100.0
    """Weight λ of the views' similarity."""
    record: bool = False
    """Append the results to experiments/results/nmce_manifolds.json."""


def manifolds(
    data_key: Array,
    key: Array,
    *,
    num_points: int,
    num_dimensions: int,
    num_layers: int,
    biases: bool,
    noise: float | Array = 0.0,
) -> tuple[Array, Array]:
    """Points on a 3- and a 6-dimensional manifold.

    Args:
      data_key: of the two random networks.
      key: of the points.
      num_points: how many; the first half lies on the first manifold.
      num_dimensions: of the space.
      num_layers: linear layers of each network, with LeakyReLU (slope 0.2) in between.
      biases: whether they have biases.
      noise: standard deviation of Gaussian noise around the manifolds.

    Returns:
      Points `[num_points, num_dimensions]`, labels `[num_points]`.

    Example:
      >>> import jax
      >>> from experiments.nmce_manifolds import manifolds
      >>> keys = jax.random.split(jax.random.key(0))
      >>> points, labels = manifolds(
      ...     *keys, num_points=8, num_dimensions=10, num_layers=2, biases=True
      ... )
      >>> points.shape, labels.tolist()
      ((8, 10), [0, 0, 0, 0, 1, 1, 1, 1])
    """
    half = num_points // 2
    sizes = (half, num_points - half)
    parts = []
    for index, (size, rank) in enumerate(zip(sizes, (3, 6), strict=True)):
        place_key, net_key = (jax.random.fold_in(k, index) for k in (key, data_key))
        points = jax.random.normal(place_key, (size, rank))
        for layer in range(num_layers):
            weight_key, bias_key = jax.random.split(jax.random.fold_in(net_key, layer))
            if layer:
                points = jax.nn.leaky_relu(points, 0.2)
            bound = points.shape[1] ** -0.5  # of a linear layer as it is commonly initialised
            draw = partial(jax.random.uniform, minval=-bound, maxval=bound)
            points = points @ draw(weight_key, (points.shape[1], num_dimensions))
            if biases:
                points = points + draw(bias_key, (num_dimensions,))
        parts.append(points)
    points = jnp.concatenate(parts)
    points = points + noise * jax.random.normal(jax.random.fold_in(key, 2), points.shape)
    return points, jnp.repeat(jnp.arange(2), jnp.array(sizes), total_repeat_length=num_points)


def run(config: Config) -> list[SeedResult[NMCE]]:
    """Trains and evaluates; see the module's docstring.

    Args:
      config: the options.

    Returns:
      One `SeedResult` a seed.

    Raises:
      ValueError: options that cannot be used.
    """
    points = partial(
        manifolds,
        num_dimensions=config.num_dimensions,
        num_layers=config.num_data_layers,
        biases=config.biases,
        noise=config.noise,
    )

    def sample(seed_key: Array, key: Array, number: int) -> tuple[Array, Array]:
        return points(jax.random.fold_in(seed_key, 2**31 + 1), key, num_points=number)

    names = ("clustering_accuracy", "cosine_true_clusters", "cosine_found_clusters", "cosine_within_cluster")
    paper = dict(zip(names, PAPER[config.biases], strict=True))
    source = generated.Source("manifolds", config.num_dimensions, sample)
    return generated.run(config, EXPERIMENT, source, paper=paper)


main = partial(command_line, run, Config, description=__doc__)


if __name__ == "__main__":
    main()
