"""A ResNet with an embedding and clusters, learned from a data set of images by coding rates (paper 003)."""

from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

import jax
import numpy as np
from flax import nnx
from jax import Array

from experiments.common import evaluation
from experiments.common.options import RunOptions
from experiments.common.training import Trained, run_steps
from sul_jax import training
from sul_jax.cli.ranges import PositiveFloat, PositiveInt, Range
from sul_jax.nn import NMCE, ResNet

_STRIDE = 20  # steps in one compiled call, where convolutions are scanned


@dataclass(frozen=True, kw_only=True)
class Config(RunOptions):
    """Options that the experiments have in common; each says its own defaults."""

    dataset: str
    """Name, FILE.npz or ./FOLDER."""
    image_size: PositiveInt | None = None
    """Side to which images are resized."""
    num_images: Annotated[int, Range(2)] | None = None
    """Use only this many training images, the first ones."""
    depth: Literal[10, 18, 34] = 18
    """Depth of the ResNet."""
    num_filters: PositiveInt
    """Filters of the ResNet's first stage."""
    num_pre_features: PositiveInt = 4096
    """Units below the embedding."""
    num_features: PositiveInt
    """Dimensions of the embedding."""
    eps_squared: PositiveFloat
    """Squared distortion of the coding rates."""
    num_clusters: PositiveInt | None = None
    """Clusters; by default the number of classes."""


def build(
    config: Config, rngs: nnx.Rngs, *, channels: int, stem: Literal["3x3", "5x5"], num_clusters: int
) -> NMCE:
    """The untrained network."""
    backbone = ResNet(
        config.depth,
        channels=channels,
        num_filters=config.num_filters,
        stem=stem,
        num_pre_features=config.num_pre_features,
        rngs=rngs,
    )
    size = backbone.num_features
    return NMCE(backbone, size, num_features=config.num_features, num_clusters=num_clusters, rngs=rngs)


def train(step: training.Step, state: Any, inputs: training.Inputs, images: Array, **options: Any) -> Trained:
    """Trains a rule on images with a progress bar and checkpoints.

    Args:
      step: from a state, one step's inputs and the images to the new state and the rule's info.
      state: before the first step.
      inputs: of the steps from first to before end.
      images: handed to every step.
      **options: of `run_steps`.
    """
    scan = training.scans_convolutions()
    steps, stride = training.compiled(step, scan=scan), _STRIDE if scan else 1
    return run_steps(steps, state, inputs, images, stride=stride, **options)


def restore(network: NMCE, state: Any) -> None:
    """Puts what a rule has learned into the network, for evaluation."""
    nnx.update(network, state.params, state.rest)
    network.eval()  # type: ignore[no-untyped-call]


def encode(network: NMCE, images: np.ndarray | Array) -> tuple[np.ndarray, np.ndarray]:
    """Features and cluster logits of images as they are."""
    graph, state = nnx.split(network)
    coded: tuple[np.ndarray, np.ndarray] = jax.device_get(
        training.map_batches(partial(_outputs, graph, state), images)
    )
    return coded


@partial(jax.jit, static_argnums=0)
def _outputs(graph: Any, state: Any, batch: Array) -> tuple[Array, Array]:
    return nnx.merge(graph, state)(evaluation.to_float(batch))
