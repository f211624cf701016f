"""How estimators drive rules that descend a loss: minibatches from the host, programs kept between fits."""

from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from sul_jax import training
from sul_jax.estimators._images import Images
from sul_jax.learning_rule import GradientState, LearningRule
from sul_jax.seeds import over_seeds, stacked


def begin(rule: LearningRule, keys: Array) -> GradientState:
    """First states, with a leading axis of seeds."""
    seeds = [int(jax.random.randint(key, (), 0, 2**31 - 1)) for key in keys]
    state: GradientState = stacked([rule.init(jax.random.key(seed), None) for seed in seeds])
    return state


def descend(
    model: Any, keys: Array, images: Images, rule: LearningRule, state: GradientState, num_steps: int
) -> GradientState:
    """A rule's steps on minibatches of images.

    Args:
      model: the estimator, which knows the size of a minibatch and shows progress.
      keys: `[seeds]`.
      images: to learn from.
      rule: from a function that is cached, so that its compiled steps are found again.
      state: with a leading axis of seeds.
      num_steps: minibatches.
    """
    chosen = orders(folded(keys, 0), len(images.rows), model.batch_size, num_steps)
    step_keys = folded(keys, 1)

    def inputs(first: int, end: int) -> Any:
        return images.take(chosen[first:end]), np.arange(first, end)

    with model._shown_steps(num_steps, "learning") as callback:
        last: GradientState = training.train(
            _steps(rule), state, inputs, step_keys, num_steps=num_steps, callback=callback
        )
    return last


def orders(keys: Array, number: int, batch_size: int, num_steps: int) -> np.ndarray:
    """Indices `[num_steps, seeds, batch_size]`: passes in random order, one running into the next."""
    entropies = [np.asarray(jax.random.key_data(key)).tolist() for key in keys]
    of_seeds = [
        training.shuffled(entropy, number, batch_size, num_steps=num_steps, drop_last=False)
        for entropy in entropies
    ]
    return np.stack(of_seeds, axis=1)


def folded(keys: Array, number: int) -> Array:
    """Other keys of the same seeds."""
    return jnp.stack([jax.random.fold_in(key, number) for key in keys])


def forgotten(state: GradientState) -> GradientState:
    """With the optimizer's memory as it was at first."""
    return state._replace(optimizer=jax.tree.map(jnp.zeros_like, state.optimizer))


def learned(state: GradientState) -> GradientState:
    """Without the optimizer's memory."""
    return state._replace(optimizer=())


def number_of_steps(model: Any, images: Images) -> int:
    """Of the estimator's epochs, but at most its `max_steps`."""
    steps: int = min(model.max_steps, model.epochs * -(-len(images.rows) // model.batch_size))
    return steps


def as_images(kernel: Any) -> np.ndarray:
    """A convolution's kernel with its filters first."""
    return np.moveaxis(np.asarray(kernel[...]), -1, 0)


@lru_cache(maxsize=16)
def encoder(rule: LearningRule) -> Any:
    """A compiled `encode`."""
    return jax.jit(rule.encode)


@lru_cache(maxsize=16)
def _steps(rule: LearningRule) -> training.Step:
    def one(state: GradientState, key: Array, images: Array, number: Array) -> Any:
        return rule.update(state, images, key=jax.random.fold_in(key, number))

    mapped = over_seeds(one, (0, 0, 0, None))

    def step(state: GradientState, inputs: Any, keys: Array) -> Any:
        return mapped(state, keys, *inputs)

    return training.compiled(step)
