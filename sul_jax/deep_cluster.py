"""DeepCluster's rules (Caron et al. 2018) as studied by Mustapha et al. (2022).

A cycle clusters the features of a network, takes the clusters as labels, and trains the network to tell
them apart: `preprocess` and `pseudo_labels` (both in one: `feature_clusters`), `new_head`,
`balanced_indices`, then steps of `rule`.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from numpy.typing import ArrayLike

from sul_jax import k_means, metrics, whitening
from sul_jax._check import as_array, check_finite, check_integer, check_labels, check_vectors
from sul_jax._parallel import of_whole_batch
from sul_jax.learning_rule import GradientInfo, GradientState, LearningRule, gradient_rule

if TYPE_CHECKING:
    import optax
    from flax import nnx


def rule(
    build: "Callable[[nnx.Rngs], nnx.Module]",
    *,
    num_clusters: int,
    optimizer: "optax.GradientTransformation | None" = None,
    augmentation: Callable[[Array, Array], Array] | None = None,
    num_components: int | None = None,
) -> LearningRule:
    """DeepCluster as a `LearningRule`: a network learns clusters of its own features as classes.

    `update(state, inputs, *, key, labels=None)` is a step on the cross-entropy of `labels` (integers
    `[batch]`), which come from a cycle's clustering of all examples, as in the example below. Without labels
    a step is a whole cycle of the batch alone: it clusters the batch and takes a new head. `encode` gives
    the features that are clustered.

    Args:
      build: makes the network, from inputs and perhaps a `key` for dropout to `[batch, num_features]`, with
        an attribute `num_features`.
      num_clusters: K, the number of clusters.
      optimizer: by default gradient descent at a rate of 0.1 with a momentum of 0.9.
      augmentation: from a key and inputs to what the network learns from.
      num_components: as in `preprocess`, of steps without labels.

    Returns:
      A `LearningRule` with a `GradientState` of an `nn.Classifier`.

    Example:
      >>> import functools
      >>> import jax
      >>> from sul_jax import deep_cluster, nn, training
      >>> rule = deep_cluster.rule(lambda rngs: nn.LeNet5(rngs=rngs), num_clusters=3)
      >>> keys = jax.random.split(jax.random.key(1), 6)
      >>> images = jax.random.uniform(jax.random.key(0), (20, 32, 32, 1))
      >>> state = jax.jit(rule.init)(keys[0], images)
      >>> features = deep_cluster.preprocess(jax.jit(rule.encode)(state, images))  # a cycle begins
      >>> labels = deep_cluster.pseudo_labels(keys[1], features, num_clusters=3)
      >>> state = deep_cluster.new_head(keys[2], state)
      >>> order = deep_cluster.balanced_indices(keys[3], labels, num_clusters=3, num_samples=20)
      >>> order = order.reshape(2, 10)
      >>> scan = jax.jit(functools.partial(training.scan_updates, rule.update))
      >>> state, infos = scan(state, images, order, key=keys[4:6], labels=labels[order])
      >>> infos.loss.shape
      (2,)
    """
    import optax

    from sul_jax.nn import Classifier

    check_integer("num_clusters", num_clusters, low=1)

    def loss(
        network: Any, inputs: Array, *, key: Array, labels: Array, axis_name: str | None = None
    ) -> Array:
        inputs = as_array("inputs", inputs)
        crop_key, dropout_key = jax.random.split(key)
        if augmentation is not None:
            inputs = of_whole_batch(augmentation, axis_name)(crop_key, inputs)
        logits = network(inputs, key=dropout_key)
        value = jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))
        return value if axis_name is None else lax.pmean(value, axis_name)

    steps = gradient_rule(
        lambda rngs: Classifier(build(rngs), num_clusters, rngs=rngs),
        loss,
        optax.sgd(0.1, momentum=0.9) if optimizer is None else optimizer,
        encode=lambda classifier, inputs: classifier.network(as_array("inputs", inputs)),
    )

    def update(
        state: GradientState,
        inputs: Array,
        *,
        key: Array,
        labels: Array | None = None,
        axis_name: str | None = None,
    ) -> tuple[GradientState, GradientInfo]:
        if labels is None:
            cluster_key, head_key, key = jax.random.split(key, 3)
            labels = feature_clusters(
                cluster_key,
                steps.encode(state, inputs),
                num_clusters=num_clusters,
                num_components=num_components,
                axis_name=axis_name,
            )
            state = new_head(head_key, state)
        return steps.update(state, inputs, key=key, labels=labels, axis_name=axis_name)

    return LearningRule(steps.init, update, steps.encode)


def new_head(key: Array, state: GradientState) -> GradientState:
    """A top layer that has learned nothing, in every cycle: clusters have new numbers each time.

    Args:
      key: `jax.random.key`, of normal weights with a standard deviation of 0.01.
      state: of `rule`.

    Returns:
      The state with a new head, whose memory in the optimizer is zero; the rest is as it was.

    Example:
      >>> import jax
      >>> from sul_jax import deep_cluster, nn
      >>> rule = deep_cluster.rule(lambda rngs: nn.LeNet5(rngs=rngs), num_clusters=3)
      >>> state = rule.init(jax.random.key(0), None)
      >>> state = deep_cluster.new_head(jax.random.key(1), state)
      >>> state.params["head"]["bias"][...].tolist()
      [0.0, 0.0, 0.0]
    """

    def of_head(path: tuple[Any, ...]) -> bool:
        return any(getattr(part, "key", getattr(part, "name", None)) == "head" for part in path)

    def fresh(path: tuple[Any, ...], leaf: Array) -> Array:
        if not of_head(path):
            return leaf
        return (
            0.01 * jax.random.normal(key, leaf.shape, leaf.dtype) if leaf.ndim == 2 else jnp.zeros_like(leaf)
        )

    def forgotten(path: tuple[Any, ...], leaf: Array) -> Array:
        return jnp.zeros_like(leaf) if of_head(path) else leaf

    return state._replace(
        params=jax.tree.map_with_path(fresh, state.params),
        optimizer=jax.tree.map_with_path(forgotten, state.optimizer),
    )


def preprocess(features: Array, *, num_components: int | None = None, axis_name: str | None = None) -> Array:
    """Features as they are clustered: principal components, whitened, then scaled to unit norm.

    Args:
      features: `[batch, features]`.
      num_components: principal components kept and divided by their standard deviation; None leaves
        the features as they are, as the paper does for Fashion-MNIST.
      axis_name: mapped axis over which the batch is split.

    Returns:
      `[batch, num_components]`, or `[batch, features]` without components; rows of norm 1, zero where
      there is nothing to scale. Components without variance are zero.

    Raises:
      ValueError: `num_components` above the number of features, or (outside jit) values that are not
        finite.

    Example:
      >>> import jax
      >>> from sul_jax import deep_cluster
      >>> features = jax.random.normal(jax.random.key(0), (50, 6))
      >>> deep_cluster.preprocess(features, num_components=4).shape
      (50, 4)
    """
    features = check_vectors("features", features)
    check_finite("features", features)
    if num_components is not None:
        size = features.shape[1]
        check_integer("num_components", num_components, low=1, high=size, why=f": there are {size} features")
        state = whitening.pca(features, num_components=num_components, axis_name=axis_name)
        features = whitening.pca_whiten(features, state)
    return whitening.normalize(features)


def pseudo_labels(
    key: Array,
    features: Array,
    *,
    num_clusters: int,
    max_iterations: int = 20,
    tolerance: float | Array = 1e-4,
    init: Literal["k-means++", "random"] = "k-means++",
    empty_clusters: Literal["relocate", "split"] = "relocate",
    axis_name: str | None = None,
) -> Array:
    """Clusters of the features by one start of k-means, to be learned as classes.

    Args:
      key: `jax.random.key`.
      features: `[batch, features]`, from `preprocess`.
      num_clusters: K, the number of clusters.
      max_iterations: of Lloyd's algorithm.
      tolerance: as in `k_means.fit`; scikit-learn's is 1e-4, faiss always does all iterations.
      init: the first centroids; `"k-means++"` as scikit-learn, `"random"` as faiss.
      empty_clusters: `"relocate"` as scikit-learn, `"split"` as faiss; see `k_means.fit`.
      axis_name: mapped axis over which the batch is split.

    Returns:
      int32 `[batch]`, 0 to `num_clusters` − 1.

    Raises:
      ValueError: more clusters than vectors, or (outside jit) values that are not finite.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from sul_jax import deep_cluster
      >>> features = jnp.array([[0.0, 1.0], [0.0, 1.0], [1.0, 0.0]])
      >>> labels = deep_cluster.pseudo_labels(jax.random.key(0), features, num_clusters=2)
      >>> bool(labels[0] == labels[1]), bool(labels[0] == labels[2])
      (True, False)
    """
    features = check_vectors("features", features)
    check_finite("features", features)
    return k_means.fit(
        key,
        features,
        num_clusters=num_clusters,
        num_init=1,
        max_iterations=max_iterations,
        tolerance=tolerance,
        init=init,
        empty_clusters=empty_clusters,
        axis_name=axis_name,
    ).labels


def balanced_indices(key: Array, labels: Array, *, num_clusters: int, num_samples: int) -> Array:
    """A random order of examples in which every cluster that is not empty is seen equally often.

    A cluster larger than its share gives that many different examples, a smaller one is drawn from
    with replacement. Large clusters would otherwise be all that the network learns to predict.

    Args:
      key: `jax.random.key`.
      labels: int32 `[batch]`, 0 to `num_clusters` − 1.
      num_clusters: K, the number of clusters.
      num_samples: length of the epoch; the authors take about `batch`.

    Returns:
      int32 `[num_samples]`, indices into the batch; the shares of any two clusters differ by one at
      most.

    Raises:
      ValueError: no labels, labels out of range (outside jit), or a number below 1.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from sul_jax import deep_cluster
      >>> labels = jnp.array([0, 0, 0, 0, 0, 2])
      >>> indices = deep_cluster.balanced_indices(
      ...     jax.random.key(0), labels, num_clusters=3, num_samples=8
      ... )
      >>> jnp.bincount(labels[indices], length=3).tolist()
      [4, 0, 4]
    """
    labels = as_array("labels", labels)
    if labels.ndim != 1 or not len(labels):
        raise ValueError(f"labels must be a vector of at least one label, got shape {labels.shape}")
    check_integer("num_clusters", num_clusters, low=1)
    check_integer("num_samples", num_samples, low=1)
    labels = check_labels("labels", labels, num_examples=len(labels), num_classes=num_clusters)
    order_key, draw_key, shuffle_key = jax.random.split(key, 3)
    # Members of each cluster side by side, in random order.
    shuffled = jax.random.permutation(order_key, len(labels))
    members = shuffled[jnp.argsort(labels[shuffled])]
    sizes = jnp.sum(jax.nn.one_hot(labels, num_clusters, axis=0, dtype=bool), axis=1, dtype=jnp.int32)
    firsts = jnp.cumsum(sizes) - sizes
    filled = jnp.argsort(sizes == 0)  # the clusters that are not empty, in order
    number = jnp.sum(sizes > 0)
    place = jnp.arange(num_samples)
    owner = filled[place % number]
    turn = place // number
    share = -(-num_samples // number)
    drawn = jax.random.randint(draw_key, (num_samples,), 0, sizes[owner])
    within = jnp.where(sizes[owner] >= share, turn, drawn)
    return jax.random.permutation(shuffle_key, members[firsts[owner] + within]).astype(jnp.int32)


def feature_clusters(
    key: Array,
    features: Array,
    *,
    num_clusters: int,
    num_components: int | None = None,
    tolerance: float | Array = 1e-4,
    init: Literal["k-means++", "random"] = "k-means++",
    empty_clusters: Literal["relocate", "split"] = "relocate",
    axis_name: str | None = None,
) -> Array:
    """The pseudo-labels of a cycle: `preprocess`, then `pseudo_labels`.

    Args:
      key: `jax.random.key`.
      features: `[batch, features]`, as a network gives them.
      num_clusters: K, the number of clusters.
      num_components: as in `preprocess`.
      tolerance: as in `pseudo_labels`.
      init: as in `pseudo_labels`.
      empty_clusters: as in `pseudo_labels`.
      axis_name: mapped axis over which the batch is split.

    Returns:
      int32 `[batch]`, 0 to `num_clusters` − 1.

    Raises:
      ValueError: as `preprocess` and `pseudo_labels`.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from sul_jax import deep_cluster
      >>> features = jnp.repeat(jnp.eye(2), 3, axis=0)
      >>> labels = deep_cluster.feature_clusters(jax.random.key(0), features, num_clusters=2)
      >>> jnp.bincount(labels, length=2).tolist()
      [3, 3]
    """
    return pseudo_labels(
        key,
        preprocess(features, num_components=num_components, axis_name=axis_name),
        num_clusters=num_clusters,
        tolerance=tolerance,
        init=init,
        empty_clusters=empty_clusters,
        axis_name=axis_name,
    )


# Of `initial_alignment`, which is computed on the host: its loops are compiled once for each shape.
_feature_clusters = jax.jit(
    feature_clusters,
    static_argnames=("num_clusters", "num_components", "tolerance", "init", "empty_clusters"),
)


def initial_alignment(
    key: Array,
    features: Array,
    labels: ArrayLike,
    *,
    num_clusters: int,
    num_components: int | None = None,
    tolerance: float = 1e-4,
    init: Literal["k-means++", "random"] = "k-means++",
    empty_clusters: Literal["relocate", "split"] = "relocate",
) -> float:
    """How well the clusters of an untrained network's features agree with the classes (section 4.1.1).

    Args:
      key: `jax.random.key`.
      features: `[batch, features]` of the untrained network.
      labels: `[batch]`, the classes.
      num_clusters: K, the number of clusters.
      num_components: as in `preprocess`.
      tolerance: as in `pseudo_labels`.
      init: as in `pseudo_labels`.
      empty_clusters: as in `pseudo_labels`.

    Returns:
      Normalised mutual information of the `feature_clusters` and the classes, 0 to 1. It is computed on the
      host; the clustering is compiled once for all networks with as many features.

    Raises:
      ValueError: as `preprocess` and `pseudo_labels`.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from sul_jax import deep_cluster
      >>> features = jnp.repeat(jnp.eye(3), 4, axis=0)
      >>> labels = jnp.repeat(jnp.arange(3), 4)
      >>> deep_cluster.initial_alignment(jax.random.key(0), features, labels, num_clusters=3)
      1.0
    """
    features = check_vectors("features", features)
    check_finite("features", features)
    clusters = _feature_clusters(
        key,
        features,
        num_clusters=num_clusters,
        num_components=num_components,
        tolerance=tolerance,
        init=init,
        empty_clusters=empty_clusters,
    )
    return metrics.normalized_mutual_info(labels, np.asarray(clusters))
