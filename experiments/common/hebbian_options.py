"""Options of the Hebbian experiments: architectures, what they fill in, and what is accepted."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax.numpy as jnp
import optax

from experiments.common.options import ConfigError, RunOptions, check_options
from sul_jax.cli.ranges import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Range
from sul_jax.nn import NNLBlock


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
INCIDENTAL = ("probe_every", "cache_gib", "num_validation")


@dataclass(frozen=True, kw_only=True)
class Config(RunOptions):
    """Options of the experiment; those not given come from the architecture."""

    dataset: str = "auto"
    """cifar10, another data set of images, FILE.npz, photographs, or auto: CIFAR-10 if available, else
    scikit-learn's two photographs (filters are then only learned and drawn)."""
    architecture: Literal["single", "five", "imagenet32", "full"] = "single"
    """single: 400 filters of 4×4 pixels; five: five blocks of different windows; imagenet32: four; full:
    units that see whole images."""
    response: Literal["nnl", "relu"] = "nnl"
    """nnl: fixed Hebbian filters and steep responses; relu: the twin, trained end to end."""
    num_units: Annotated[int, Range(2)] | None = None
    """Filters of each block."""
    sweep: bool = False
    """Compare filters that the rule learns with patches, k-means and noise, with 50, 100 and 400 of each."""
    powers: tuple[PositiveFloat, ...] = ()
    """Candidates for the power of all blocks. The best one on num_validation random training images is taken;
    then the classifier learns from all training images. A single candidate is used directly."""
    num_validation: int = 5_000
    """Training images held out to choose among powers."""
    filters_from: Path | None = None
    """Network of another run, whose filters are used instead of new ones (transfer)."""
    filter_steps: NonNegativeInt = 10_000
    """Minibatches of patches; 0 keeps the filters as they start, which shows what learning adds."""
    filter_learning_rate: PositiveFloat = 4e-3
    """ε at the first minibatch; it falls linearly to 0."""
    filter_start: Literal["patches", "random_patches", "k_means", "normal"] = "patches"
    """What filters start from. patches: patches of unit norm, drawn one by one and rather far from each
    other. random_patches: drawn evenly. k_means: centroids of spherical k-means of patches. normal: a normal
    distribution, as in the paper."""
    patch_batch: PositiveInt = 1_000
    """Patches in a minibatch."""
    anti_hebbian: NonNegativeFloat | None = None
    """Δ of all blocks."""
    rank: Annotated[int, Range(2)] = 2
    """m, the rank of the unit that learns away from an input."""
    normalize_update: bool = True
    """Divide an update by its largest entry, as the authors' code does."""
    epochs: PositiveInt | None = None
    """Epochs of the classifier; by default 70, or 48 for imagenet32 (its twin: 5)."""
    batch_size: PositiveInt | None = None
    """Images in a minibatch of the classifier; by default 300, or 200 for imagenet32."""
    learning_rate: PositiveFloat | None = None
    """Adam's learning rate at the start; by default 1e-4 for the twin, as in the paper. Steep responses are
    small and get 6e-4, or 0.1 for full."""
    schedule: Literal["drops", "linear", "constant"] | None = None
    """How the learning rate falls: in four drops to a tenth (eq. 4 and 5), linearly to 0, or not at all. By
    default linearly for steep responses, in drops for the twin, and not at all for the twin of imagenet32."""
    probe_every: PositiveInt = 5
    """Epochs between two measurements of the test error."""
    cache_gib: PositiveFloat = 8.0
    """Largest cache of features in GiB; if they need more, they are computed again in every epoch."""
    num_train: PositiveInt | None = None
    """Use only this many training images, the first ones."""
    num_test: PositiveInt | None = None
    """Use only this many test images, the first ones."""


@dataclass(frozen=True, kw_only=True)
class Filled(Config):
    """The options with the architecture's in place of those not given."""

    epochs: int
    batch_size: int
    learning_rate: float
    schedule: Literal["drops", "linear", "constant"]


def fill_in(config: Config, dataset: str, num_train: int) -> Filled:
    """The defaults that depend on the architecture and the data."""
    design = ARCHITECTURES[config.architecture]
    twin = config.response == "relu"
    short = design.twin_epochs if twin else None
    filled = {
        "dataset": dataset,
        "epochs": config.epochs or short or design.epochs,
        "batch_size": min(config.batch_size or design.batch_size, num_train),
        "learning_rate": config.learning_rate or (1e-4 if twin else design.learning_rate),
        "schedule": config.schedule or ("constant" if short else "drops" if twin else "linear"),
    }
    return Filled(**{**vars(config), **filled})


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


def optimizer(config: Filled, steps: int) -> optax.GradientTransformation:
    """Adam at the rates of the schedule, with so many steps an epoch."""
    design = ARCHITECTURES[config.architecture]
    epochs, highest = config.epochs, config.learning_rate
    drops = jnp.array([round(epoch * epochs / design.epochs) for epoch in design.drops])

    def rate(step: Any) -> Any:
        if config.schedule == "linear":
            return highest * (1 - step / (steps * epochs))
        if config.schedule == "constant":
            return highest
        return highest * jnp.array(_RATES)[jnp.searchsorted(drops, step // steps, side="right")]

    return optax.adam(rate)


def check(config: Config) -> None:
    """Raises `ConfigError` for options that do not go together or are out of range."""
    check_options(config)
    swept = ("response", "filters_from", "num_units", "filter_start", "anti_hebbian", "normalize_update")
    for name in swept if config.sweep else ():
        if getattr(config, name) != getattr(type(config)(), name):
            raise ConfigError(f"{name} is not accepted with sweep, which tries several kinds of filters")
    if config.powers and config.response == "relu":
        raise ConfigError("powers is not accepted with response='relu': the twin has no power")
    if config.filters_from is not None and config.response == "relu":
        raise ConfigError("filters_from is not accepted with response='relu': the twin is trained end to end")
