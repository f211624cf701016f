"""What features tell about labels, by simple classifiers."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from scipy.special import softmax
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
    x = np.concatenate(
        [x * np.logspace(-3, 3, 8, dtype=np.float32) + 5, np.ones((300, 1), np.float32)], axis=1
    )
    scaler = StandardScaler().fit(x)
    peer = LogisticRegression(C=1 / (300 * penalty), tol=1e-8, max_iter=1000)
    peer.fit(scaler.transform(x), labels)
    options = {"num_classes": 3, "max_iterations": 300, "tolerance": 1e-4}
    found = partial(probes._minimum, jnp.asarray(x), jnp.asarray(labels), **options)
    expected = peer.predict_proba(scaler.transform(x))
    for start in (None, found(1.0, None)):  # from another minimum it finds the same
        weights, biases = (np.asarray(part) for part in found(penalty, start))
        np.testing.assert_allclose(softmax(x @ weights + biases, axis=1), expected, atol=0.01)
        assert not np.any(weights[8])


def test_logistic_regression_does_not_depend_on_scale() -> None:
    x, labels = blobs(300)
    told = labels[:200], labels[200:]
    plain, scaled = (
        probes.logistic_regression(jax.random.key(0), y[:200], told[0], y[200:], told[1])
        for y in (x, 1000 * x + 7)
    )
    assert plain == pytest.approx(scaled, abs=1)
    assert plain > 75


@pytest.mark.parametrize(
    ("penalties", "number", "message"),
    [
        ((), 4, "penalties is empty"),
        ((0.1, 0.0), 4, "penalties=0.0 is not accepted: it must be above 0"),
        ((0.1, 1.0), 1, "num_train=1 is not accepted: it must be at least 2"),
    ],
)
def test_bad_penalties(penalties: tuple[float, ...], number: int, message: str) -> None:
    codes, labels = np.eye(4, dtype=np.float32)[:number], np.arange(number)
    with pytest.raises(ValueError, match=message):
        probes.logistic_regression(jax.random.key(0), codes, labels, codes, labels, penalties=penalties)


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
