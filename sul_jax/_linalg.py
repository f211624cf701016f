"""Linear algebra that more than one rule needs."""

import jax.numpy as jnp
from jax import Array


def fix_signs(rows: Array) -> Array:
    """Rows with a positive entry of largest size, where a factorisation leaves signs open.

    A sharded run then gives the same rows as a whole one.
    """
    peak = jnp.argmax(jnp.abs(rows), axis=-1, keepdims=True)
    return jnp.where(jnp.take_along_axis(rows, peak, axis=-1) < 0, -rows, rows)
