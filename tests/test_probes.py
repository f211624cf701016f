"""What features tell about labels, by simple classifiers."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from scipy.special import softmax
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from sul_jax import probes


def blobs(number: int) -> tuple[np.ndarray, np.ndarray]:
    """Three classes in eight dimensions, not quite apart."""
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 3, number)
    return (3 * np.eye(8)[labels] + 1.5 * rng.standard_normal((number, 8))).astype(np.float32), labels


def test_linear_probe_is_a_logistic_regression() -> None:
    x, labels = blobs(300)
    train, test = slice(0, 200), slice(200, 300)
    got = probes.linear_probe(
        jax.random.key(0), x[train], labels[train], x[test], labels[test], num_epochs=50, batch_size=20
    )
    expected = LogisticRegression().fit(x[train], labels[train]).score(x[test], labels[test])
    assert got == pytest.approx(100 * expected, abs=4)


def test_linear_probe_descends_as_numpy_does() -> None:
    """Three steps on the whole batch, the rate falling by the decay; the bias counts in the answer."""
    codes, labels = np.random.default_rng(0).standard_normal((20, 2), np.float32), np.arange(20) // 15
    weights, speed = np.zeros((3, 2)), np.zeros((3, 2))
    inputs = np.concatenate([codes, np.ones((20, 1))], axis=1)
    rate, momentum, decay = 2.0, 0.9, 0.5
    for step in range(3):
        errors = softmax(inputs @ weights, axis=1) - np.eye(2)[labels]
        speed = momentum * speed + inputs.T @ errors / 20 + decay * weights
        weights = weights - rate / np.sqrt(1 + rate * decay * step) * speed
    options = {"num_epochs": 3, "learning_rate": rate, "momentum": momentum, "weight_decay": decay}
    learned = probes._probe(jax.random.key(0), codes, labels, num_classes=2, batch_size=20, **options)
    found = np.concatenate([learned["kernel"][...], learned["bias"][...][None]])
    np.testing.assert_allclose(found, weights, rtol=1e-4, atol=1e-5)
    accuracy = probes.linear_probe(jax.random.key(0), codes, labels, codes, labels, **options)
    expected = np.mean((inputs @ weights).argmax(axis=1) == labels)
    assert accuracy == pytest.approx(100 * expected)
    assert expected != np.mean((codes @ weights[:2] - weights[2]).argmax(axis=1) == labels)


def test_classifiers_tell_apart_what_they_can() -> None:
    """The nearest of all neighbours' classes is the larger one; a hyperplane parts the two."""
    labels = np.repeat([0, 1], [20, 40])
    codes = np.eye(2, dtype=np.float32)[labels]
    options = {"names": ["svm", "knn"], "num_neighbors": 60}
    found = probes.classifiers(codes, labels, codes, labels, **options)
    assert found == {"svm": 100, "knn": pytest.approx(100 * 2 / 3)}


@pytest.mark.parametrize("penalty", [0.1, 0.001])
def test_logistic_regression_is_scikit_learns_on_standardised_features(penalty: float) -> None:
    x, labels = blobs(300)
    x = x * np.logspace(-3, 3, 8, dtype=np.float32) + 5
    x = np.pad(x, ((0, 0), (0, 1)), constant_values=1)
    mean, scale = probes._standard(x)
    scaler = StandardScaler().fit(x)
    np.testing.assert_allclose(mean, scaler.mean_, rtol=1e-5)
    np.testing.assert_allclose(scale[:8], 1 / scaler.scale_[:8], rtol=1e-3)
    assert scale[8] == 0
    standard = jnp.asarray((x - mean) * scale)
    peer = LogisticRegression(C=1 / (300 * penalty), tol=1e-8, max_iter=1000).fit(standard, labels)
    options = {"max_iterations": 300, "tolerance": 1e-4}
    found = partial(probes._minimum, standard, jnp.asarray(labels), jnp.ones(300), **options)
    zero = jnp.zeros((9, 3)), jnp.zeros(3)
    for start in (zero, found(1.0, zero)[0]):  # from another minimum it finds the same
        (weights, biases), left = found(penalty, start)
        np.testing.assert_allclose(
            softmax(standard @ weights + biases, axis=1), peer.predict_proba(standard), atol=2e-3
        )
        assert left < 1e-3
        assert not np.any(weights[8])


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_logistic_regression_does_not_depend_on_scale(scale: float, dtype: type) -> None:
    x, labels = blobs(300)
    told = labels[:200], (scale * x[200:]).astype(dtype), labels[200:]
    found = probes.logistic_regression(jax.random.key(0), (scale * x[:200]).astype(dtype), *told)
    expected = probes.logistic_regression(jax.random.key(0), x[:200], labels[:200], x[200:], labels[200:])
    assert found == pytest.approx(expected, abs=1)
    assert found > 75


def test_the_better_penalty_is_chosen_and_learned_with_from_all() -> None:
    """A large one leaves the biases alone: every guess is the larger class."""
    rng = np.random.default_rng(0)
    labels = (rng.random(800) < 0.3).astype(int)
    x = (rng.standard_normal((800, 20)) + 0.4 * labels[:, None]).astype(np.float32)
    told = jax.random.key(0), x[:400], labels[:400], x[400:], labels[400:]
    large, small = (probes.logistic_regression(*told, penalties=(one,)) for one in (1e3, 0.1))
    assert small > large + 5
    assert probes.logistic_regression(*told, penalties=(1e3, 0.1)) == small
    order = np.asarray(jax.random.permutation(jax.random.key(0), 400))[40:]
    part = probes.logistic_regression(told[0], x[order], labels[order], *told[3:], penalties=(0.1,))
    assert part != small  # which the comparison above would not tell from learning from all


def test_logistic_regression_that_stops_early_warns() -> None:
    x, labels = blobs(300)
    with pytest.warns(ConvergenceWarning, match="has not converged in max_iterations=1"):
        probes.logistic_regression(
            jax.random.key(0), x, labels, x, labels, penalties=[1e-4], max_iterations=1
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"penalties": ()}, "penalties is empty"),
        ({"penalties": (0.1, 0.0)}, "penalties=0.0 is not accepted: it must be above 0"),
        ({"train": np.eye(4, dtype=np.float32)[:1], "train_labels": np.array([0])}, "num_train=1 is not"),
        ({"train": np.full((4, 4), np.nan, np.float32)}, "train holds NaN or infinite values"),
        ({"train": np.zeros(4, np.float32)}, r"train must have shape \[batch, features\]"),
        ({"test": np.zeros((4, 3), np.float32)}, "test has 3 features, but train has 4"),
        ({"train_labels": np.arange(4) - 1}, "train_labels go from -1 to 2"),
        ({"test_labels": np.arange(4)[:, None]}, r"test_labels must be integers of shape \[4\]"),
        ({"test_labels": np.ones(4)}, r"test_labels must be integers of shape \[4\]"),
        ({"max_iterations": 0}, "max_iterations=0 is not accepted"),
        ({"tolerance": np.nan}, "tolerance=nan is not accepted"),
    ],
)
def test_bad_input_of_logistic_regression(changes: dict[str, Any], message: str) -> None:
    codes, labels = np.eye(4, dtype=np.float32), np.arange(4)
    given = {"train": codes, "train_labels": labels, "test": codes, "test_labels": labels} | changes
    with pytest.raises(ValueError, match=message):
        probes.logistic_regression(jax.random.key(0), **given)


def test_softmax_rule_over_a_mapped_axis_is_that_of_the_whole_batch() -> None:
    rule = probes.softmax_rule(lambda rngs: nnx.Linear(3, 2, rngs=rngs), optax.sgd(0.5))
    inputs, labels = jax.random.normal(jax.random.key(0), (8, 3)), jnp.arange(8) % 2
    state = rule.init(jax.random.key(1), inputs)
    (whole, info) = jax.jit(rule.update)(state, inputs, labels=labels)

    def shard(inputs: jax.Array, labels: jax.Array) -> object:
        return rule.update(state, inputs, labels=labels, axis_name="batch")

    parts = jax.jit(jax.vmap(shard, axis_name="batch"))(inputs.reshape(4, 2, 3), labels.reshape(4, 2))
    for one, several in zip(jax.tree.leaves((whole, info)), jax.tree.leaves(parts), strict=True):
        np.testing.assert_allclose(several, np.broadcast_to(one, several.shape), rtol=1e-5, atol=1e-6)
