"""What features know of the labels, and how they come to it: table 2 and figure A.1 of paper 003."""

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from experiments.common import evaluation, figures
from experiments.common.classifier import Labelled
from sul_jax import probes, training
from sul_jax.nn import NMCE

_LABELS = (1, 2, 5, 10, 20, 50, 100)  # of each class, for figure A.1
_DRAWS = 10
_NEIGHBOURS, _RANK = 11, 30  # of the authors' classifiers; ours scale all features to unit norm first

View = Callable[[Array, Array], Array]
"""From a key and images `[batch, ...]` to a random view of them."""


class Judge(NamedTuple):
    """What classifiers on the features know, and what they are asked."""

    known: Labelled
    asked: Labelled


def classified(
    known: Labelled, asked: Labelled, names: Sequence[str] = ("svm", "knn", "nearest_subspace")
) -> dict[str, float]:
    """Accuracies in percent of the paper's classifiers on features."""
    return probes.classifiers(
        known.inputs, known.labels, asked.inputs, asked.labels,
        names=names, num_neighbors=_NEIGHBOURS, subspace_rank=_RANK,
    )  # fmt: skip


def layers(network: NMCE, images: Array, view: View | None = None, key: Array | None = None) -> Any:
    """Table 2's three kinds of features by name, of images as they are or (with a key) of a random view."""
    graph, state = nnx.split(network)
    numbers = itertools.count()

    def of_batch(batch: Array) -> dict[str, Array]:
        own = None if key is None else jax.random.fold_in(key, next(numbers))
        return _layers(graph, view, state, own, batch)

    return training.map_batches(of_batch, images)


@partial(jax.jit, static_argnums=(0, 1))
def _layers(graph: Any, view: View | None, state: Any, key: Array | None, batch: Array) -> dict[str, Array]:
    net, batch = nnx.merge(graph, state), evaluation.to_float(batch)
    seen = batch if view is None or key is None else view(key, batch)
    # What the three have in common is computed once.
    return {"proj": net(seen)[0], "pre_feature": net.backbone(seen), "pool": net.backbone.pool(seen)}


def averaged(network: NMCE, images: Array, view: View, keys: Array) -> Any:
    """The means of `layers` over random views, one for each key."""
    total = layers(network, images, view, keys[0])
    for key in keys[1:]:
        total = jax.tree.map(jnp.add, total, layers(network, images, view, key))
    return jax.tree.map(lambda values: values / len(keys), total)


def table(
    network: NMCE, judge: Judge, view: View, key: Array, *, num_views: int
) -> tuple[dict[str, float], Judge]:
    """Table 2: accuracies on `layers`, plain and averaged over random views; and the averages."""
    keys = jax.random.split(key, (2, num_views))
    plain = Judge(*(Labelled(layers(network, own.inputs), own.labels) for own in judge))
    means = (averaged(network, own.inputs, view, k) for own, k in zip(judge, keys, strict=True))
    mean = Judge(*(Labelled(coded, own.labels) for coded, own in zip(means, judge, strict=True)))
    values: dict[str, float] = {}
    for suffix, coded in {"": plain, f"_{num_views}_views": mean}.items():
        for name in coded.known.inputs:
            accuracies = classified(_layer(coded.known, name), _layer(coded.asked, name))
            values |= {f"{rule}_{name}{suffix}": round(value, 3) for rule, value in accuracies.items()}
    return values, mean


def _layer(coded: Labelled, name: str) -> Labelled:
    return Labelled(np.asarray(coded.inputs[name]), coded.labels)


def few_labels(seed: int, coded: Judge, path: Path) -> None:
    """Figure A.1: a support vector machine on few labelled images, chosen at random ten times.

    Args:
      seed: of the choice.
      coded: as `table` gives it.
      path: of the PNG.
    """
    generator = np.random.default_rng(seed)
    labels = coded.known.labels
    classes, sizes = np.unique(labels, return_counts=True)
    numbers = [number for number in _LABELS if number <= sizes.min()]
    curves: dict[str, list[list[float]]] = {"proj": [], "pool": []}
    for number in numbers:
        draws = [
            np.concatenate([generator.choice(np.flatnonzero(labels == c), number, False) for c in classes])
            for _ in range(_DRAWS)
        ]
        for name, curve in curves.items():
            known, asked = _layer(coded.known, name), _layer(coded.asked, name)
            few = [Labelled(known.inputs[chosen], labels[chosen]) for chosen in draws]
            curve.append([classified(own, asked, ["svm"])["svm"] for own in few])
    positions = np.array(numbers) * len(classes)
    shown = {name: (positions, curve) for name, curve in curves.items()}
    figures.accuracies(shown, "labelled images", path, log=True)
