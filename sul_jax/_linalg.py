"""Arithmetic that more than one rule needs."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from sul_jax._check import is_known

# Squared norm below which a vector counts as zero; small enough for any data, safe in float32.
_TINY = 1e-16


def fix_signs(rows: Array) -> Array:
    """Rows with a positive entry of largest size, where a factorisation leaves signs open.

    A sharded run then gives the same rows as a whole one.
    """
    peak = jnp.argmax(jnp.abs(rows), axis=-1, keepdims=True)
    return jnp.where(jnp.take_along_axis(rows, peak, axis=-1) < 0, -rows, rows)


def at_least_float32(values: Array) -> Array:
    """The values as they are, but half precision as float32: sums and factorisations need it."""
    values = jnp.asarray(values)
    return values.astype(jnp.promote_types(values.dtype, jnp.float32))


def root(squares: Array) -> Array:
    """Square roots of what is not negative, with a gradient of 0, not infinity, at 0; NaN stays NaN."""
    zero = squares <= 0
    return jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, squares)))


def inverse_norm(squares: Array) -> Array:
    """1 / norm from squared norms; 0, with a gradient of 0, for a norm of 1e-8 or less."""
    zero = squares <= _TINY
    return jnp.where(zero, 0, lax.rsqrt(jnp.where(zero, 1, squares)))


def unit(vectors: Array) -> Array:
    """Vectors of unit norm along the last axis; 0 for a norm of 1e-8 or less."""
    return vectors * inverse_norm(jnp.sum(jnp.square(vectors), axis=-1))[..., None]


def directions(name: str, vectors: Array, *, why: str = "metric='cosine' needs") -> Array:
    """Vectors of any size at unit norm; where they are known, such as have none raise.

    Args:
      name: of the argument, for the error.
      vectors: `[batch, features]`.
      why: what the error says before "norms above 0".

    Raises:
      ValueError: (outside jit) vectors of norm 0.
    """
    if is_known(vectors):
        zero = np.flatnonzero(~np.asarray(vectors).any(axis=1))
        if zero.size:
            raise ValueError(
                f"{name}: {zero.size} of {len(vectors)} vectors have norm 0, the first one in row "
                f"{zero[0]}; {why} norms above 0"
            )
    largest = jnp.max(jnp.abs(vectors), axis=1, keepdims=True)
    return unit(vectors / jnp.where(largest > 0, largest, 1))


def each(factorise: Callable[[Array], Any], matrices: Array) -> Any:
    """A factorisation of each matrix of a batch, `[batch, ...]`.

    XLA's CPU spreads a batch of factorisations over the threads that run the program, and waits for them in
    one of these: on few cores two such calls at a time, be it by two devices, wait for each other without
    end. One matrix after the other takes no longer there.
    """
    if jax.default_backend() == "cpu":
        return lax.map(factorise, matrices)
    return jax.vmap(factorise)(matrices)
