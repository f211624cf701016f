"""Hebbian units that see whole digits, and a classifier on their steep responses (paper 001).

    python -m experiments.mnist_hebbian                          # MNIST if available, else the bundled digits
    python -m experiments.mnist_hebbian --powers 4 5 6           # chosen on held-out training images

2,000 units learn whole images, without labels or gradients; the cosine of image and weights, raised to a
steep power, goes to a softmax layer. experiments/results/README.md lists our results on MNIST. More
minibatches are not better: on held-out training images 150, 500 and 3,000 gave errors of 2.4, 2.1 and 2.4 %.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from experiments import data
from experiments.common import hebbian_filters, hebbian_options
from experiments.common.options import command_line
from experiments.common.runs import SeedResult
from sul_jax.nn import NNLConv

EXPERIMENT = "mnist_hebbian"


@dataclass(frozen=True, kw_only=True)
class Config(hebbian_options.Config):
    """Options of the experiment; those not given come from the architecture."""

    dataset: str = "auto"
    """mnist, another data set of images, FILE.npz, or auto: MNIST if available, else the bundled digits."""
    workdir: Path = Path("runs/mnist_hebbian")
    """Where everything is written; a folder previous-… in it keeps an earlier run."""
    architecture: Literal["single", "five", "imagenet32", "full"] = "full"
    """full: units that see whole images; the others are those of `cifar10_hebbian`."""
    filter_steps: int = 500
    """Minibatches of images."""
    filter_learning_rate: float = 0.02
    """ε at the first minibatch; it falls linearly to 0."""


def run(config: Config) -> list[SeedResult[NNLConv]]:
    """Trains and evaluates; see the module's docstring and `hebbian_filters.run`."""
    return hebbian_filters.run(config, experiment=EXPERIMENT, auto=data.GRAY)


main = partial(command_line, run, Config, description=__doc__)


if __name__ == "__main__":
    main()
