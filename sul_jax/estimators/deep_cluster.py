"""Clustering by DeepCluster (paper 004)."""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from sklearn.utils.validation import check_is_fitted

from sul_jax import deep_cluster, training
from sul_jax.estimators import _learning
from sul_jax.estimators._base import ImageClustering
from sul_jax.estimators._images import Images
from sul_jax.learning_rule import GradientState, LearningRule
from sul_jax.nn import LeNet5
from sul_jax.seeds import of_seed, over_seeds, stacked

# Compiled once for each shape: called as they are, their loops would be compiled anew every time.
_pseudo_labels = jax.jit(deep_cluster.pseudo_labels, static_argnames="num_clusters")
_preprocess = jax.jit(deep_cluster.preprocess)
_balanced_indices = jax.jit(deep_cluster.balanced_indices, static_argnames=("num_clusters", "num_samples"))


class DeepClustering(ImageClustering):
    """DeepCluster: a LeNet-5 learns its own features' clusters as classes, again and again (paper 004).

    Args:
      n_clusters: clusters, of the pseudo-labels and of the last k-means.
      image_shape: height, width and perhaps channels of images given as rows, which need it.
      cycles: times the features are clustered, each followed by learning the clusters.
      steps_per_cycle: minibatches of a cycle, at most one pass over the images.
      batch_size: images in a minibatch.
      learning_rate: of the descent with momentum 0.9.
      random_state: an integer for the same result every time, on one machine with as many threads.
      verbose: show progress.

    Attributes:
      labels_: int32 `[num_images]`, clusters of the images learned from.
      cluster_centers_: `[n_clusters, num_features]`.

    Example:
      >>> import numpy as np
      >>> from sul_jax.estimators import DeepClustering
      >>> images = np.random.default_rng(0).random((20, 8, 8))
      >>> DeepClustering(2, cycles=1, batch_size=10).fit(images).transform(images).shape
      (20, 84)
    """

    image_size = 32  # LeNet-5's
    learns_clusters = True

    def __init__(
        self,
        n_clusters: int = 8,
        *,
        image_shape: tuple[int, ...] | None = None,
        cycles: int = 10,
        steps_per_cycle: int = 100,
        batch_size: int = 128,
        learning_rate: float = 0.02,
        random_state: Any = None,
        verbose: bool = False,
    ):
        self.n_clusters = n_clusters
        self.image_shape = image_shape
        self.cycles = cycles
        self.steps_per_cycle = steps_per_cycle
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.random_state = random_state
        self.verbose = verbose

    def _rule(self) -> LearningRule:
        return _rule(self.image_shape_[2], self.n_clusters, self.learning_rate)

    def _template(self) -> Any:
        return _learning.learned(jax.eval_shape(self._rule().init, jax.random.key(0), None))

    def _learn(self, keys: Array, images: Images) -> Any:
        rule, seeds = self._rule(), range(len(keys))
        state = _learning.begin(rule, keys)
        steps = max(1, min(self.steps_per_cycle, len(images.rows) // self.batch_size))
        for cycle in self._progress(range(self.cycles), "cycle"):
            begun = [
                self._begin_cycle(jax.random.fold_in(keys[seed], cycle), of_seed(state, seed), images, steps)
                for seed in seeds
            ]
            state = stacked([own for own, _, _ in begun])
            orders, labels = (np.stack([part[place] for part in begun], axis=1) for place in (1, 2))

            def inputs(first: int, end: int, orders: Any = orders, labels: Any = labels) -> Any:
                return images.take(orders[first:end]), labels[first:end]

            state = training.train(_steps(rule), state, inputs, keys, num_steps=steps)
        return _learning.learned(state)

    def _begin_cycle(self, key: Array, state: GradientState, images: Images, steps: int) -> Any:
        """Clusters of the features, a new head, and the minibatches' indices and labels."""
        cluster_key, order_key, head_key, _ = jax.random.split(key, 4)
        features = _preprocess(jnp.asarray(self._codes(images.rows, _learning.learned(state))))
        clusters = _pseudo_labels(cluster_key, features, num_clusters=self.n_clusters)
        order = _balanced_indices(
            order_key, clusters, num_clusters=self.n_clusters, num_samples=steps * self.batch_size
        )
        indices = np.asarray(order).reshape(steps, self.batch_size)
        state = deep_cluster.new_head(head_key, _learning.forgotten(state))
        return state, indices, np.asarray(clusters)[indices]

    def _encoder(self, learned: Any) -> Callable[[Array], Array]:
        return partial(_learning.encoder(self._rule()), learned)

    def first_kernels(self) -> np.ndarray:
        """The first layer's, `[6, 5, 5, channels]`."""
        check_is_fitted(self)
        return _learning.as_images(self.learned_.params["network"]["convolutions"][0]["kernel"])


@lru_cache(maxsize=4)  # so that compiled programs are found again
def _rule(channels: int, num_clusters: int, rate: float) -> LearningRule:
    return deep_cluster.rule(
        lambda rngs: LeNet5(channels=channels, rngs=rngs),
        num_clusters=num_clusters,
        optimizer=optax.sgd(rate, momentum=0.9),
    )


@lru_cache(maxsize=4)
def _steps(rule: LearningRule) -> training.Step:
    def one(state: GradientState, key: Array, images: Array, labels: Array) -> Any:
        return rule.update(state, images, key=key, labels=labels)  # nothing is drawn by the key

    mapped = over_seeds(one)

    def step(state: GradientState, inputs: Any, keys: Array) -> Any:
        return mapped(state, keys, *inputs)

    return training.compiled(step)
