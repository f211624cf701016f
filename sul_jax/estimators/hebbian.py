"""Features of vectors by ranked Hebbian learning (paper 001)."""

from functools import lru_cache
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import ArrayLike

from sul_jax import hebbian, training
from sul_jax._check import check_integer, check_number
from sul_jax.estimators._estimator import warn
from sul_jax.estimators._vectors import VectorEstimator, chunk_size

_encode = jax.jit(hebbian.encode)
_first = jax.jit(hebbian.init_from_inputs, static_argnames="num_units")
# Vectors that the first weights are drawn from.
_DRAWN_FROM = 2**13


class HebbianFeatures(VectorEstimator):
    """Units that compete for vectors: the winner learns towards one, the unit of rank m away from it.

    The code of a vector is ReLU(cos(x, W))^n of each unit (eq. 3). Units begin as vectors far from each
    other, and the learning rate falls linearly to 0.

    Args:
      n_units: units.
      rank: m, from 2 to the number of units.
      anti_hebbian: Δ, how much the unit of rank m unlearns. If most vectors point in nearly one direction, a
        large one drives most units off all of them.
      power: n, of the code.
      learning_rate: the first; the largest change of a weight in a step.
      batch_size: vectors of a step.
      epochs: passes over the vectors.
      random_state: an integer for the same result every time, on one machine with as many threads.
      verbose: show progress.

    Attributes:
      components_: float32 `[n_units, num_features]`, the units' weights.

    Example:
      >>> import numpy as np
      >>> from sul_jax.estimators import HebbianFeatures
      >>> vectors = np.random.default_rng(0).random((100, 6))
      >>> HebbianFeatures(4, random_state=0).fit_transform(vectors).shape
      (100, 4)
    """

    _kept = ("components_",)

    def __init__(
        self,
        n_units: int = 100,
        *,
        rank: int = 2,
        anti_hebbian: float = 0.2,
        power: float = 4.5,
        learning_rate: float = 0.02,
        batch_size: int = 128,
        epochs: int = 10,
        random_state: Any = None,
        verbose: bool = False,
    ):
        self.n_units = n_units
        self.rank = rank
        self.anti_hebbian = anti_hebbian
        self.power = power
        self.learning_rate = learning_rate
        self.batch_size = batch_size
        self.epochs = epochs
        self.random_state = random_state
        self.verbose = verbose

    def fit(self, X: ArrayLike, y: object = None) -> Self:  # noqa: N803
        """Learns units.

        Args:
          X: `[num_vectors, num_features]`, a memory map, a file of vectors or a folder of them; see
            `sul_jax.vectors.read`. Vectors of a chunk are shuffled with each other.
          y: ignored.

        Returns:
          The estimator itself.

        Raises:
          ValueError: vectors that are not finite or fewer than units, or an option out of range.

        Warns:
          ConvergenceWarning: less than half of the units won a vector in the last epoch.
        """
        check_integer("n_units", self.n_units, low=2)
        check_integer("rank", self.rank, low=2, high=self.n_units, why=", the number of units")
        check_integer("batch_size", self.batch_size, low=1)
        check_integer("epochs", self.epochs, low=1)
        for name in ("anti_hebbian", "learning_rate"):
            check_number(name, getattr(self, name), low=0)
        check_number("power", self.power, above=0)
        self._draw_seed()
        source = self._given(X, least=2).source
        number = source.num_vectors
        check_integer("n_units", self.n_units, low=2, high=number, why=", n_samples")
        some, _ = source.sample(max(self.n_units, _DRAWN_FROM), seed=self.seed_)
        state = _first(jax.random.key(self.seed_), some, num_units=self.n_units)
        steps, size, done = _steps(self.rank), chunk_size(source), 0
        batch = min(self.batch_size, number)
        total = self.epochs * sum(-(-min(size, number - first) // batch) for first in range(0, number, size))
        for epoch in range(self.epochs):
            won = np.zeros(self.n_units, bool)
            for place, chunk in enumerate(self._chunks(source, size)):
                entropy, minibatches = (self.seed_, epoch, place), -(-len(chunk) // batch)
                order = training.shuffled(entropy, len(chunk), batch, num_steps=minibatches, drop_last=False)
                rates = self.learning_rate * (1 - (done + np.arange(len(order))) / total)
                inputs = (jnp.asarray(order), jnp.asarray(rates, jnp.float32))
                state, infos = steps(state, inputs, jnp.asarray(chunk), jnp.float32(self.anti_hebbian))
                won |= np.asarray(infos.wins).any(axis=0)
                done += len(order)
        if 2 * won.sum() < self.n_units:
            warn(
                f"only {won.sum()} of n_units={self.n_units} units won a vector in the last epoch: most were "
                "driven off all vectors, or never won one; lower anti_hebbian, learning_rate or n_units"
            )
        self.components_ = np.asarray(state.weights)
        return self

    def _codes(self, inputs: Array) -> Array:
        return _encode(hebbian.HebbianState(jnp.asarray(self.components_)), inputs, power=self.power)

    @property
    def _n_features_out(self) -> int:
        return len(self.components_)


@lru_cache(maxsize=16)
def _steps(rank: int) -> training.Step:
    def step(state: Any, own: tuple[Array, Array], inputs: Array, anti_hebbian: Array) -> tuple[Any, Any]:
        order, rate = own
        return hebbian.update(state, inputs[order], learning_rate=rate, anti_hebbian=anti_hebbian, rank=rank)

    return training.compiled(step)
