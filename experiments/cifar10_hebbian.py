"""Hebbian filters in colour and a classifier on their steep responses (paper 001, sections 3, 5, 6 and 7).

    python -m experiments.cifar10_hebbian                              # CIFAR-10 if available, or two photos
    python -m experiments.cifar10_hebbian --response relu              # the twin, trained end to end
    python -m experiments.cifar10_hebbian --architecture five
    python -m experiments.cifar10_hebbian --filters-from runs/photographs/network-0   # transfer

Filters of 4×4 pixels learn from raw patches, without labels or gradients. The cosine of patch and filter is
raised to the power 40; the largest value of 11×11 places goes to a softmax layer. The paper reports test
errors of 27.80 % (twin 27.11 %), with five blocks 23.40 % (22.57 %), and with five blocks and a shadow over
most of each test image about 28 % (over 50 %). experiments/results/README.md lists our results, with seeds,
device and time.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from experiments.common import hebbian_filters, hebbian_options
from experiments.common.options import command_line
from experiments.common.runs import SeedResult
from sul_jax.nn import NNLConv

EXPERIMENT = "cifar10_hebbian"
# Test error in percent: section 3.
PAPER = {("single", "nnl"): 27.80, ("single", "relu"): 27.11, ("five", "nnl"): 23.40, ("five", "relu"): 22.57}


@dataclass(frozen=True, kw_only=True)
class Config(hebbian_options.Config):
    """Options of the experiment; those not given come from the architecture."""

    workdir: Path = Path("runs/cifar10_hebbian")
    """Where everything is written; a folder previous-… in it keeps an earlier run."""


def run(config: Config) -> list[SeedResult[NNLConv]]:
    """Trains and evaluates; see the module's docstring and `hebbian_filters.run`."""
    return hebbian_filters.run(config, experiment=EXPERIMENT, paper=PAPER)


main = partial(command_line, run, Config, description=__doc__)


if __name__ == "__main__":
    main()
