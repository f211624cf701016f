"""What features tell about labels, by simple classifiers: a way to judge learning without labels."""

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array, lax

from sul_jax import k_subspaces, whitening
from sul_jax._check import check_finite, check_integer, check_labels, check_number, check_vectors
from sul_jax._linalg import at_least_float32
from sul_jax.learning_rule import LearningRule, gradient_rule


def classifiers(
    train: np.ndarray,
    train_labels: np.ndarray,
    test: np.ndarray,
    test_labels: np.ndarray,
    *,
    names: Sequence[str] = ("svm", "knn", "nearest_subspace"),
    num_neighbors: int = 20,
    subspace_rank: int = 10,
) -> dict[str, float]:
    """Test accuracies in percent of simple classifiers on features scaled to unit norm.

    Args:
      train: `[num_train, features]`.
      train_labels: `[num_train]`.
      test: `[num_test, features]`.
      test_labels: `[num_test]`.
      names: which of `svm` (linear), `knn` (by cosine), `nearest_subspace` (each class's leading singular
        vectors; the largest projection wins).
      num_neighbors: of `knn`, at most as many as there are vectors.
      subspace_rank: of `nearest_subspace`, at most the size of the smallest class.

    Example:
      >>> import numpy as np
      >>> from sul_jax import probes
      >>> codes, labels = np.repeat(np.eye(2, dtype=np.float32), 30, axis=0), np.repeat([0, 1], 30)
      >>> probes.classifiers(codes, labels, codes, labels, subspace_rank=1)
      {'svm': 100.0, 'knn': 100.0, 'nearest_subspace': 100.0}
    """
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.svm import LinearSVC

    train, test = (np.asarray(whitening.normalize(jnp.asarray(values))) for values in (train, test))

    def predict(name: str) -> np.ndarray:
        if name == "nearest_subspace":
            classes, counts = np.unique(train_labels, return_counts=True)
            rank = min(subspace_rank, train.shape[1], counts.min())
            parts = [np.linalg.svd(train[train_labels == c], full_matrices=False)[2][:rank] for c in classes]
            state = k_subspaces.KSubspacesState(jnp.asarray(np.stack(parts)))
            return classes[np.asarray(k_subspaces.assign(state, jnp.asarray(test)))]
        neighbors = min(num_neighbors, len(train))
        model = (
            LinearSVC(random_state=0) if name == "svm" else KNeighborsClassifier(neighbors, metric="cosine")
        )
        return np.asarray(model.fit(train, train_labels).predict(test))

    return {name: float(100 * np.mean(predict(name) == test_labels)) for name in names}


def linear_probe(
    key: Array,
    train: Array,
    train_labels: np.ndarray,
    test: Array,
    test_labels: np.ndarray,
    *,
    num_epochs: int = 20,
    batch_size: int = 256,
    learning_rate: float = 0.01,
    momentum: float = 0.9,
    weight_decay: float = 1e-4,
) -> float:
    """Test accuracy in percent of a linear classifier on fixed features.

    Multinomial logistic regression by stochastic gradient descent, with the learning rate
    η / √(1 + ηλt) at step t as in DeepCluster's evaluation.

    Args:
      key: `jax.random.key`, of the order of the examples.
      train: `[num_train, features]`.
      train_labels: `[num_train]`, from 0 on.
      test: `[num_test, features]`.
      test_labels: `[num_test]`.
      num_epochs: passes over the training features.
      batch_size: features in a minibatch; a last partial one is dropped.
      learning_rate: η, the step size.
      momentum: of the descent.
      weight_decay: λ, an L2 penalty added to the gradients.

    Example:
      >>> import jax
      >>> import numpy as np
      >>> from sul_jax import probes
      >>> codes, labels = np.repeat(np.eye(2, dtype=np.float32), 50, axis=0), np.repeat([0, 1], 50)
      >>> probes.linear_probe(jax.random.key(0), codes, labels, codes, labels, batch_size=10)
      100.0
    """
    layer = _probe(
        key,
        jnp.asarray(train),
        jnp.asarray(train_labels),
        num_classes=int(max(train_labels.max(), test_labels.max())) + 1,
        num_epochs=num_epochs,
        batch_size=min(batch_size, len(train)),
        learning_rate=learning_rate,
        momentum=momentum,
        weight_decay=weight_decay,
    )
    return _accuracy((layer["kernel"][...], layer["bias"][...]), test, test_labels)


def logistic_regression(
    key: Array,
    train: Array,
    train_labels: np.ndarray,
    test: Array,
    test_labels: np.ndarray,
    *,
    penalties: Sequence[float] = (0.1, 0.01, 0.001, 0.0001),
    max_iterations: int = 300,
    tolerance: float = 1e-4,
) -> float:
    """Test accuracy in percent of logistic regression that has converged, on standardised features.

    Unlike `linear_probe` it does not depend on the features' scale, nor on a learning rate or a number of
    epochs: what it finds is the minimum of the mean cross-entropy and λ/2 ‖W‖² (biases are free), by L-BFGS.
    Of several λ the best one on a tenth of the training features is taken; then all of them are learned from.

    Args:
      key: `jax.random.key`, of the choice of that tenth.
      train: `[num_train, features]`, floating; features that do not vary are left out.
      train_labels: integers `[num_train]`, from 0 on.
      test: `[num_test, features]`.
      test_labels: integers `[num_test]`, from 0 on.
      penalties: candidates for λ, positive.
      max_iterations: of L-BFGS, at least 1.
      tolerance: it ends where the gradient's norm is below this share of that of weights 0.

    Raises:
      ValueError: features that are not finite or of other shapes, labels of other numbers or below 0, no
        penalty, or fewer than 2 training features to choose a penalty on.
      TypeError: features that are not floating.

    Warns:
      ConvergenceWarning: after `max_iterations` the gradient is above 10 times the tolerance.

    Example:
      >>> import jax
      >>> import numpy as np
      >>> from sul_jax import probes
      >>> codes, labels = np.repeat(np.eye(2, dtype=np.float32), 50, axis=0), np.repeat([0, 1], 50)
      >>> probes.logistic_regression(jax.random.key(0), 1e6 * codes, labels, 1e6 * codes, labels)
      100.0
    """
    penalties = tuple(np.ravel(penalties).tolist())
    if not penalties:
        raise ValueError("penalties is empty: at least one is needed")
    for penalty in penalties:
        check_number("penalties", penalty, above=0)
    check_integer("max_iterations", max_iterations, low=1)
    check_number("tolerance", tolerance, above=0)
    train, known = _labelled("train", train, train_labels)
    test, asked = _labelled("test", test, test_labels)
    if test.shape[1] != train.shape[1]:
        raise ValueError(f"test has {test.shape[1]} features, but train has {train.shape[1]}")
    mean, scale = _standard(train)
    train, test = (train - mean) * scale, (test - mean) * scale
    find = partial(_minimum, train, known, max_iterations=max_iterations, tolerance=tolerance)
    num_classes = 1 + int(max(known.max(), asked.max()))
    zero = jnp.zeros((train.shape[1], num_classes)), jnp.zeros(num_classes)
    best, all_of_them = penalties[0], jnp.ones(len(train))
    if len(penalties) > 1:
        check_integer("num_train", len(train), low=2, why=": some are held out")
        order = np.asarray(jax.random.permutation(key, len(train)))
        hidden = order[: max(1, len(train) // 10)]
        shown = all_of_them.at[hidden].set(0)  # one program for all of them and for these
        layer, errors = zero, {}
        for penalty in sorted(penalties, reverse=True):  # each begins at the minimum before
            layer, _ = find(shown, penalty, layer)
            errors[penalty] = 100 - _accuracy(layer, train[hidden], known[hidden])
        best = min(errors, key=lambda penalty: errors[penalty])
    layer, left = find(all_of_them, best, zero)
    if left > 10 * tolerance:
        from sklearn.exceptions import ConvergenceWarning

        warnings.warn(
            f"logistic regression has not converged in max_iterations={max_iterations}: the gradient is "
            f"{left:.1g} of that of weights 0",
            ConvergenceWarning,
            stacklevel=2,
        )
    return _accuracy(layer, test, asked)


def _labelled(name: str, features: Any, labels: Any) -> tuple[Array, np.ndarray]:
    """Both, checked."""
    features = at_least_float32(check_vectors(name, features))
    check_finite(name, features)
    numbers = {"num_examples": len(features), "num_classes": 2**31 - 1}
    return features, np.asarray(check_labels(f"{name}_labels", labels, **numbers))


@jax.jit
def _standard(features: Array) -> tuple[Array, Array]:
    """Means, and what differences from them are multiplied by; 0 where there are none."""
    mean, deviation = jnp.mean(features, axis=0), jnp.std(features, axis=0)
    varies = deviation > 1e-6 * jnp.abs(mean)
    return mean, jnp.where(varies, 1 / jnp.where(varies, deviation, 1), 0)


def _accuracy(layer: tuple[Array, Array], features: Array, labels: np.ndarray) -> float:
    """In percent, of weights `[features, num_classes]` and biases."""
    logits = jnp.matmul(features, layer[0], precision="highest") + layer[1]
    return float(100 * np.mean(np.argmax(np.asarray(logits), axis=1) == labels))


@partial(jax.jit, static_argnames="max_iterations")
def _minimum(
    features: Array,
    labels: Array,
    weights: Array,
    penalty: float | Array,
    start: tuple[Array, Array],
    *,
    max_iterations: int,
    tolerance: float | Array,
) -> tuple[tuple[Array, Array], Array]:
    """The layer of standardised, weighted features, and its gradient's norm as a share of that at zero."""

    def objective(layer: tuple[Array, Array]) -> Array:
        logits = jnp.matmul(features, layer[0], precision="highest") + layer[1]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return weights @ losses / jnp.sum(weights) + penalty / 2 * jnp.sum(jnp.square(layer[0]))

    solver = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(objective)
    largest = jnp.maximum(optax.tree.norm(jax.grad(objective)(jax.tree.map(jnp.zeros_like, start))), 1e-30)

    def step(carry: Any) -> Any:
        layer, memory, number, _ = carry
        value, gradient = value_and_grad(layer, state=memory)
        changes, memory = solver.update(
            gradient, memory, layer, value=value, grad=gradient, value_fn=objective
        )
        return optax.apply_updates(layer, changes), memory, number + 1, optax.tree.norm(gradient) / largest

    def goes_on(carry: Any) -> Array:
        return (carry[2] < max_iterations) & (carry[3] > tolerance)

    begun = start, solver.init(start), 0, jnp.array(jnp.inf, start[1].dtype)
    layer, _, _, left = lax.while_loop(goes_on, step, begun)
    return layer, left


def softmax_rule(
    build: Callable[[nnx.Rngs], nnx.Module],
    optimizer: optax.GradientTransformation,
    *,
    logits: Callable[[Any, Array, Array | None], Array] = lambda module, inputs, key: module(inputs),
) -> LearningRule:
    """A module that learns classes from labels, by the cross-entropy of a softmax.

    Args:
      build: from random number streams to the module.
      optimizer: of all its parameters.
      logits: from the module, inputs and, while learning, a key to logits `[batch, num_classes]`; by default
        the module's call.

    Returns:
      A rule as `gradient_rule` makes it. `update` needs `labels`, `[batch]` from 0 on; `encode` gives logits.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from flax import nnx
      >>> from sul_jax import probes
      >>> rule = probes.softmax_rule(lambda rngs: nnx.Linear(2, 2, rngs=rngs), optax.sgd(1.0))
      >>> inputs, labels = jnp.eye(2), jnp.arange(2)
      >>> state = rule.init(jax.random.key(0), inputs)
      >>> for _ in range(9):
      ...     state, info = rule.update(state, inputs, labels=labels)
      >>> jnp.argmax(rule.encode(state, inputs), axis=1).tolist()
      [0, 1]
    """

    def loss(
        module: Any, inputs: Array, *, labels: Array, key: Array | None = None, axis_name: str | None
    ) -> Array:
        values = optax.softmax_cross_entropy_with_integer_labels(logits(module, inputs, key), labels)
        return jnp.mean(values) if axis_name is None else lax.pmean(jnp.mean(values), axis_name)

    return gradient_rule(build, loss, optimizer, encode=lambda module, inputs: logits(module, inputs, None))


@partial(jax.jit, static_argnames=("num_classes", "num_epochs", "batch_size"))
def _probe(
    key: Array,
    codes: Array,
    labels: Array,
    *,
    num_classes: int,
    num_epochs: int,
    batch_size: int,
    learning_rate: float | Array,
    momentum: float | Array,
    weight_decay: float | Array,
) -> Any:
    """The learned linear layer's parameters."""
    steps = len(codes) // batch_size
    rule = softmax_rule(
        lambda rngs: nnx.Linear(
            codes.shape[1], num_classes, kernel_init=nnx.initializers.zeros, precision="highest", rngs=rngs
        ),
        optax.chain(
            optax.add_decayed_weights(weight_decay),
            optax.sgd(lambda t: learning_rate / jnp.sqrt(1 + learning_rate * weight_decay * t), momentum),
        ),
    )

    def epoch(index: Array, state: Any) -> Any:
        order = jax.random.permutation(jax.random.fold_in(key, index), len(codes))

        def step(state: Any, chosen: Array) -> tuple[Any, None]:
            return rule.update(state, codes[chosen], labels=labels[chosen])[0], None

        return lax.scan(step, state, order[: steps * batch_size].reshape(steps, batch_size))[0]

    return lax.fori_loop(0, num_epochs, epoch, rule.init(key, codes)).params
