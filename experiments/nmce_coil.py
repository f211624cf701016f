"""Objects from all sides: COIL-20 and COIL-100 clustered by their manifolds (paper 003, section 4.2).

    python -m experiments.nmce_coil --data-dir DIR                       # COIL-20 at the paper's size
    python -m experiments.nmce_coil --data-dir DIR --image-size 32 --depth 10 --num-filters 16 --steps 300
    python -m experiments.nmce_coil --data-dir DIR --dataset coil100 --depth 10 --num-features 200 \
        --eps-squared 0.001 --steps 10000 --gamma 200 --l1-ratio 0.5 --num-clusters 94

A ResNet learns features by the total coding rate (eq. 5), the whole data set as one batch; subspace
clustering of the features (self-expression by an elastic net, then spectral clustering) finds the
objects. A network that has learned for minutes wants a sparser graph than the paper's, `--gammas 1.5 2 3 5 10
20 50 400` (9 to 16 % error instead of 49 on COIL-20). The paper reports 0.0 % for COIL-20 and 11.53 % for
COIL-100; its published code reaches the latter with 94 clusters, a number tuned on labels, so README.md
has rows for 94 and for 100, and what ours gives, with seeds, device and time.
"""

import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array

from experiments import data
from experiments.common import evaluation, figures
from experiments.common.options import ConfigError, check_options, command_line
from experiments.common.runs import Outcome, SeedResult, Workdir, identity
from experiments.common.tables import print_metrics
from experiments.common.training import compiled_steps, convolution_stride, run_steps
from experiments.nmce_images import encode
from sul_jax import augment, coding_rate
from sul_jax.nn import NMCE, ResNet
from sul_jax.nn.backbones import RESNET_BLOCKS

EXPERIMENT = "nmce_coil"
# Error in percent (table 1) by data set and number of clusters.
PAPER = {("coil20", 20): 0.0, ("coil100", 94): 11.53}


@dataclass(frozen=True)
class Config:
    """Options of the experiment; the defaults are the paper's for COIL-20."""

    dataset: str = "coil20"
    """coil20, coil100, or FILE.npz."""
    data_dir: Path | None = None
    """Folder of data sets; by default $SUL_JAX_DATA."""
    workdir: Path = Path("runs/nmce_coil")
    """Where everything is written; an earlier run there is set aside, not lost."""
    image_size: int = 64
    """Side to which images are resized."""
    num_images: int | None = None
    """Use only the first images."""
    depth: int = 18
    """Of the ResNet: 10, 18 or 34."""
    num_filters: int = 32
    """Of the ResNet's first stage."""
    num_pre_features: int = 4096
    """Units below the embedding."""
    num_features: int = 40
    """Dimensions of the embedding."""
    steps: int = 2000
    """Training steps, each on all images."""
    learning_rate: float = 1e-3
    """Adam's learning rate at the start, annealed to 0 by a cosine."""
    weight_decay: float = 1e-6
    """L2 penalty added to the gradients."""
    eps_squared: float = 0.01
    """Squared distortion of the coding rate."""
    invariance_weight: float = 20.0
    """Weight λ of the views' similarity."""
    gamma: float = 400.0
    """Self-expression: the larger, the closer the fit and the more neighbours."""
    gammas: tuple[float, ...] = ()
    """Candidates for gamma instead: the smallest is taken whose graph has at most as many connected parts as
    there are clusters."""
    l1_ratio: float = 1.0
    """Self-expression: 1 is the lasso, less an elastic net."""
    num_clusters: int | None = None
    """Clusters; by default the number of classes."""
    seed: int = 0
    """First seed."""
    seeds: int = 1
    """Number of seeds: seed, seed + 1, …"""
    resume: bool = False
    """Continue the run in the workdir."""
    record: bool = False
    """Append the results to experiments/results/nmce_coil.json."""


def run(config: Config) -> list[SeedResult[NMCE]]:
    """Trains and evaluates; see the module's docstring.

    Args:
      config: the options.

    Returns:
      One `SeedResult` a seed.

    Raises:
      ValueError: options or data that cannot be used.
    """
    _check(config)
    dataset = data.load(config.dataset, config.data_dir)
    labels = None if dataset.train_labels is None else dataset.train_labels[: config.num_images]
    data.check_unit_range(dataset.train_images)
    images = resized(dataset.train_images[: config.num_images], config.image_size)
    classes = None if labels is None else len(np.unique(labels))
    num_clusters = config.num_clusters or classes
    if num_clusters is None:
        raise ConfigError("num_clusters is needed for images without labels")
    if num_clusters > len(images):
        raise ConfigError(f"num_clusters={num_clusters} exceeds the {len(images)} images")
    config = replace(config, dataset=dataset.name)
    paper_size = (config.num_images, config.image_size) == (None, Config.image_size)
    published = PAPER.get((dataset.name, num_clusters)) if paper_size else None
    paper = {} if published is None else {"clustering_error": published}
    results = []
    evaluation_only = ("num_clusters", "gamma", "gammas", "l1_ratio")
    with Workdir(EXPERIMENT, config, data=identity(images), may_differ=evaluation_only) as workdir:
        print(f"{dataset.name}: {len(images)} images ({dataset.source})")
        for seed in workdir.seeds:
            network, seconds = train(config, seed, jnp.asarray(images), workdir)
            network.save(config.workdir / f"network-seed{seed}")
            start = time.perf_counter()
            features, _ = encode(network, images)
            clusters = evaluation.subspace_clustering(
                features,
                num_clusters=num_clusters,
                gamma=config.gammas or config.gamma,
                l1_ratio=config.l1_ratio,
                seed=seed,
            )
            found = clusters.labels
            values: dict[str, float] = {} if labels is None else evaluation.agreement(labels, found)
            values |= {"num_clusters": num_clusters, "training_seconds": round(seconds, 1)}
            values |= {"gamma": clusters.gamma, "graph_parts": clusters.num_parts}
            seconds += time.perf_counter() - start
            workdir.finish(seed, Outcome(values, dataset, len(images), len(images), seconds, paper))
            if seed == config.seed:
                groups = found if labels is None else labels
                figures.singular_values(features, groups, config.workdir / "figure_a3_singular_values.png")
                figures.gallery(images, found, labels, config.workdir / "clusters.png")
            results.append(SeedResult(seed, network, values))
    print_metrics(results, paper)
    print(f"\nfigures, checkpoints and results: {config.workdir}")
    return results


def resized(images: np.ndarray, size: int) -> np.ndarray:
    """Images as float32 in [0, 1] with sides of `size`."""
    images = np.asarray(evaluation.to_float(jnp.asarray(images)))
    if images.shape[1:3] == (size, size):
        return images
    whole = partial(augment.random_resized_crop, jax.random.key(0), scale=(1.0, 1.0), size=(size, size))
    stretch = jax.jit(partial(whole, ratio=(images.shape[2] / images.shape[1],) * 2))
    return np.asarray(evaluation.map_batches(stretch, images))


def views(key: Array, images: Array) -> Array:
    """Two random views of each image by the paper's transformations, `[2, *images.shape]`."""

    def view(key: Array) -> Array:
        keys = jax.random.split(key, 3)
        changed = augment.horizontal_flip(keys[0], images)
        changed = augment.random_perspective(keys[1], changed, distortion=0.3, probability=0.6)
        return augment.color_jitter(keys[2], changed, brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2)

    return jnp.stack([view(k) for k in jax.random.split(key)])


def build(config: Config, seed: int, channels: int) -> NMCE:
    """The untrained network; its cluster head is not used here."""
    rngs = nnx.Rngs(seed)
    backbone = ResNet(
        config.depth,
        channels=channels,
        num_filters=config.num_filters,
        stem="5x5",
        num_pre_features=config.num_pre_features,
        rngs=rngs,
    )
    return NMCE(backbone, backbone.num_features, num_features=config.num_features, num_clusters=1, rngs=rngs)


def train(config: Config, seed: int, images: Array, workdir: Workdir) -> tuple[NMCE, float]:
    """The trained network and the seconds it took; continues from its checkpoint."""
    network = build(config, seed, images.shape[-1])
    graph, params, statistics = nnx.split(network, nnx.Param, nnx.BatchStat)  # type: ignore[misc]
    optimizer = optax.chain(
        optax.add_decayed_weights(config.weight_decay),
        optax.adam(optax.cosine_decay_schedule(config.learning_rate, config.steps), b2=0.99),
    )

    def loss(params: Any, statistics: Any, images: Array) -> tuple[Array, Any]:
        net = nnx.merge(graph, params, statistics, copy=True)  # statistics change at this trace level
        net.train()  # type: ignore[no-untyped-call]
        features, _ = net(images)
        value = coding_rate.tcr_loss(
            features.reshape(2, -1, features.shape[-1]),
            eps_squared=config.eps_squared,
            invariance_weight=config.invariance_weight,
        )
        return value, nnx.state(net, nnx.BatchStat)

    def step(state: Any, index: Array, images: Array) -> tuple[Any, Array]:
        params, statistics, memory = state
        both = views(jax.random.fold_in(jax.random.key(seed), index), images)
        both = both.reshape(-1, *images.shape[1:])
        (value, statistics), gradients = jax.value_and_grad(loss, has_aux=True)(params, statistics, both)
        changes, memory = optimizer.update(gradients, memory, params)
        return (optax.apply_updates(params, changes), statistics, memory), value

    trained = run_steps(
        compiled_steps(step, images),
        (params, statistics, optimizer.init(params)),
        steps=config.steps,
        stride=convolution_stride(20),
        folder=config.workdir / f"checkpoints-{seed}",
        title=f"seed {seed}",
        log=partial(workdir.log, seed=seed),
    )
    nnx.update(network, trained.state[0], trained.state[1])
    network.eval()  # type: ignore[no-untyped-call]
    return network, trained.seconds


def _check(config: Config) -> None:
    check_options(
        config,
        at_least={
            "image_size": 1, "num_filters": 1, "num_pre_features": 1, "num_features": 1, "steps": 1,
            "seeds": 1, "seed": 0, "num_images": 2, "num_clusters": 1, "weight_decay": 0,
            "invariance_weight": 0,
        },
        above={"learning_rate": 0, "eps_squared": 0, "gamma": 1, "l1_ratio": 0},
    )  # fmt: skip
    if any(not 1 < value < float("inf") for value in config.gammas):
        raise ConfigError(f"gammas={config.gammas} is not accepted: each must be above 1 and finite")
    if config.depth not in RESNET_BLOCKS:
        raise ConfigError(f"depth={config.depth} is not accepted: it must be one of {tuple(RESNET_BLOCKS)}")
    if config.l1_ratio > 1:
        raise ConfigError(f"l1_ratio={config.l1_ratio} is not accepted: it must be in (0, 1]")


def main() -> None:
    """The command line."""
    command_line(run, Config, description=__doc__)


if __name__ == "__main__":
    main()
