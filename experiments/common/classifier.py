"""A classifier that learns epoch by epoch, with looks at its errors on the way, and goes on after a kill."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array

from experiments.common.runs import Workdir
from experiments.common.training import Timer, run_steps
from sul_jax import probes, training
from sul_jax.learning_rule import GradientState

_GUESSED = 250  # examples whose classes are guessed at a time


class Labelled(NamedTuple):
    """Examples on the device, `[num, ...]`, or features of them by name, and labels `[num]`."""

    inputs: Any
    labels: np.ndarray


class Plan(NamedTuple):
    """How a classifier learns.

    Attributes:
      optimizer: of all parameters, for so many minibatches an epoch.
      batch_size: examples in a minibatch, or all there are.
      epochs: passes over the examples.
      probe_every: epochs between two looks at the errors; there is one after the last epoch too.
      fill_last: whether the last minibatch of an epoch is filled up and not dropped.
    """

    optimizer: Callable[[int], optax.GradientTransformation]
    batch_size: int
    epochs: int
    probe_every: int
    fill_last: bool = False


class Course(NamedTuple):
    """What an epoch changes, or what is left of it all.

    Attributes:
      state: of the gradient rule.
      history: `[epochs, 2 + number of test sets]`: loss, seconds of training so far, and errors in percent;
        NaN where nobody looked.
    """

    state: GradientState
    history: Array


def classify(
    module: nnx.Module,
    see: Callable[[Array, Array | None], Array],
    train: Labelled,
    tests: Mapping[str, Labelled],
    plan: Plan,
    key: Array,
    *,
    workdir: Workdir,
    seed: int,
    title: str = "classifier",
    among: np.ndarray | None = None,
) -> tuple[np.ndarray, float]:
    """Trains a module, in place, to tell classes by a softmax of its outputs.

    Args:
      module: from what `see` gives to logits, with the parameters that it begins with.
      see: from inputs of a minibatch, and a key while learning, to what the module takes.
      train: what is learned from.
      tests: what errors are measured on, by name.
      plan: how it learns.
      key: of the order, and of what `see` draws.
      workdir: of the run.
      seed: for the log.
      title: of the progress bar, after the seed.
      among: which of the training examples are learned from; None for all.

    Returns:
      `Course.history`, and the seconds of training and its looks.
    """
    number = len(train.labels) if among is None else len(among)
    batches = training.Minibatches(key, number, min(plan.batch_size, number), fill_last=plan.fill_last)
    graph, begin = nnx.split(module)
    rule = probes.softmax_rule(
        lambda rngs: nnx.merge(graph, jax.tree.map(jnp.copy, begin)),  # the steps use them up
        plan.optimizer(batches.per_epoch),
        logits=lambda module, inputs, key: module(see(inputs, key)),
    )

    def step(
        state: GradientState, batch: training.Minibatch, inputs: Array, labels: Array, places: Array | None
    ) -> tuple[GradientState, Array]:
        chosen = batch.indices if places is None else places[batch.indices]
        state, info = rule.update(state, inputs[chosen], key=batch.key, labels=labels[chosen])
        return state, info.loss

    steps = training.compiled(step, scan=train.inputs.ndim == 2 or training.scans_convolutions())
    guess = jax.jit(lambda state, inputs: jnp.argmax(rule.encode(state, inputs), axis=1))
    labels, places = jnp.asarray(train.labels), None if among is None else jnp.asarray(among)

    def error(state: GradientState, test: Labelled) -> Any:
        guesses = training.map_batches(partial(guess, state), test.inputs, batch_size=_GUESSED)
        return 100 * np.mean(np.asarray(guesses) != test.labels)

    def epoch(course: Course, index: int) -> tuple[Course, Array]:
        timer = Timer(float(course.history[index - 1, 1]) if index else 0.0)
        first = index * batches.per_epoch
        chosen = batches(first, first + batches.per_epoch)
        state, losses = steps(course.state, chosen, train.inputs, labels, places)
        mean = jax.block_until_ready(jnp.mean(losses))
        elapsed = timer.seconds()
        look = (index + 1) % plan.probe_every == 0 or index + 1 == plan.epochs
        errors = [error(state, test) if look else jnp.nan for test in tests.values()]
        return Course(state, course.history.at[index].set(jnp.array([mean, elapsed, *errors]))), mean

    trained = run_steps(
        epoch,
        Course(rule.init(key, train.inputs), jnp.full((plan.epochs, 2 + len(tests)), jnp.nan)),
        num_steps=plan.epochs,
        workdir=workdir,
        name=f"{seed}-{title.replace(' ', '-')}",
        title=f"seed {seed}, {title}",
        unit="epoch",
        about={"seed": seed},
    )
    learned: Course = trained.state
    nnx.update(module, learned.state.params, learned.state.rest)
    return np.asarray(learned.history), trained.seconds
