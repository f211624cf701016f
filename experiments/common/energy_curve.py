"""The learning curve of paper 000's figure 5: of a layer of its own, with its own sizes."""

from typing import Any

import jax
import numpy as np

from experiments.common import evaluation
from sul_jax import energy, training

NUM_STEPS = 60  # of the paper's 234


def learning_curve(
    train: np.ndarray, test: np.ndarray, *, seed: int, warmup_steps: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Energies of figure 5's layer: k = 64, r = 5, 9×9 patches of images whitened with 11×11, n = 16.

    Args:
      train: images to learn from, `[num_train, height, width, channels]`, of 11×11 pixels or more.
      test: images held out, of which up to 1,000 are taken.
      seed: of the layer and of the order of the images.
      warmup_steps: first steps, in which vectors are assigned by one direction of each subspace.

    Returns:
      Training energy of each step; the steps at which the energy of the test images was measured; those
      energies.
    """
    whiten, layer = energy.network_rules(
        energy.EnergyArchitecture(11, 16, (energy.EnergyLayer(64, 5, 1, 9, 0),))
    )
    key, batch_size = jax.random.key(seed), min(256, len(train))
    order = training.shuffled((seed, 0), len(train), batch_size, num_steps=NUM_STEPS)
    zca = jax.jit(lambda images: whiten.init(jax.random.key(0), evaluation.to_float(images)))(train)
    see = jax.jit(lambda images: whiten.encode(zca, evaluation.to_float(images)))
    batches, held_out = [see(train[chosen]) for chosen in order], see(test[:1000])
    warmup = np.arange(len(order)) < warmup_steps
    # Not a constant of the program, which XLA would fold for half a minute.
    measure = jax.jit(lambda state, images, warmup: layer.update(state, images, warmup=warmup)[1].energy)
    looks = {*range(0, len(order), max(1, len(order) // 16)), warmup_steps, len(order) - 1}
    energies: list[float] = []
    measured: dict[int, float] = {}

    def look(done: int, state: Any, infos: Any) -> None:
        energies.append(float(infos.energy[0]))
        if done in looks:
            measured[done] = float(measure(state, held_out, done < warmup_steps))

    training.train(
        training.compiled(lambda state, own: layer.update(state, own[0], warmup=own[1])),
        jax.jit(layer.init)(key, batches[0]),
        lambda first, end: (batches[first][None], warmup[first:end]),  # one by one
        num_steps=len(order),
        callback=look,
    )
    return np.array(energies), np.array([*measured]), np.array([*measured.values()])
