"""Argument checks with one style of message: the argument, what was given, what is accepted."""

import math
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


def check_integer(name: str, value: int, *, low: int, high: int | None = None, why: str = "") -> None:
    """Raises unless `value` is an integer in `[low, high]`."""
    try:
        if isinstance(value, bool | np.bool_):  # Python counts them as integers
            raise TypeError
        operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None
    if value < low or (high is not None and value > high):
        accepted = f"at least {low}" if high is None else f"between {low} and {high}"
        raise ValueError(f"{name}={value} is not accepted: it must be {accepted}{why}")


def check_number(
    name: str, value: Any, *, low: float = -math.inf, above: float = -math.inf, high: float = math.inf
) -> None:
    """Raises unless a number, or each of an array of them, is finite and in range, where it is known."""
    if not is_known(value):
        return
    numbers = np.asarray(value)
    if numbers.dtype.kind not in "iuf" and not jnp.issubdtype(numbers.dtype, jnp.floating):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not (np.isfinite(numbers) & (numbers >= low) & (numbers > above) & (numbers <= high)).all():
        bounds = {"at least": low, "above": above, "at most": high}
        words = " and ".join(f"{word} {bound}" for word, bound in bounds.items() if math.isfinite(bound))
        given = f"={value}" if numbers.size == 1 else f" between {numbers.min():.4g} and {numbers.max():.4g}"
        raise ValueError(f"{name}{given} is not accepted: it must be {words or 'finite'}")


def check_choice(name: str, value: Any, accepted: tuple[str, ...]) -> None:
    """Raises unless `value` is one of the accepted words."""
    if value not in accepted:
        raise ValueError(f"{name}={value!r} is not accepted: it must be one of {accepted}")


def on_host(name: str, values: Any) -> np.ndarray:
    """What is no array of JAX as NumPy's; raises, quoting none of it, where that is no array of numbers."""
    kind = type(values).__name__
    try:
        foreign = hasattr(values, "__dlpack__") and not hasattr(values, "__array__")
        array = np.from_dlpack(values) if foreign else np.asarray(values)
        kind += f" of {array.dtype}"
        if array.dtype.kind in "biuf":
            return array.astype(array.dtype.newbyteorder("="), copy=False)
        if jnp.issubdtype(array.dtype, np.number):  # bfloat16 and its like
            return array
    except (TypeError, ValueError, RuntimeError, BufferError):  # as tensors that want a gradient
        pass
    raise TypeError(
        f"{name} must be an array of numbers, got {kind}; accepted are JAX arrays and what NumPy can make an "
        "array of: lists of equal lengths, data frames of numbers, CPU tensors"
    )


def as_array(name: str, values: Any) -> Array:
    """Any array of numbers as JAX's."""
    return values if isinstance(values, jax.Array) else jnp.asarray(on_host(name, values))


def check_images(name: str, images: Any, *, image_shape: tuple[int, int, int] | None = None) -> Array:
    """Returns `images`; raises unless they are a non-empty floating `[batch, height, width, channels]`."""
    images = check_array(name, images, ndim=4, axes="[batch, height, width, channels]")
    if image_shape is not None and images.shape[1:] != image_shape:
        raise ValueError(f"{name} has shape {images.shape}, expected [batch, *{image_shape}]")
    return images


def check_vectors(name: str, inputs: Any, *, features: int | None = None) -> Array:
    """Returns `inputs`; raises unless they are a non-empty floating `[batch, features]`."""
    inputs = check_array(name, inputs, ndim=2, axes="[batch, features]")
    if features is not None and inputs.shape[1] != features:
        raise ValueError(
            f"{name} has {inputs.shape[1]} features (shape {tuple(inputs.shape)}), "
            f"but the state was made for {features}"
        )
    return inputs


def check_array(name: str, array: Any, *, ndim: int, axes: str) -> Array:
    """Returns `array`; raises unless it has `ndim` non-empty axes and a floating type."""
    array = as_array(name, array)
    if array.ndim != ndim:
        raise ValueError(f"{name} must have shape {axes}, got {array.ndim} axes: {array.shape}")
    if 0 in array.shape:
        raise ValueError(f"{name} is empty: its shape is {array.shape}; {axes} must all be at least 1")
    return check_floating(name, array)


def check_floating(name: str, array: Any) -> Array:
    """Returns `array`; raises unless it has a floating type."""
    array = as_array(name, array)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(
            f"{name} must be floating point, got {array.dtype}; "
            "convert integer pixels first, for example images / 255"
        )
    return array


def is_known(values: Any) -> bool:
    """Whether this process has the values: not inside jit, nor where others hold a part of them."""
    return not isinstance(values, jax.core.Tracer) and bool(getattr(values, "is_fully_addressable", True))


def check_finite(name: str, values: Array) -> None:
    """Raises if values are NaN or infinite, where they are known."""
    if is_known(values) and not np.isfinite(np.asarray(values)).all():
        raise ValueError(f"{name} holds NaN or infinite values; all must be finite")


def check_weights(name: str, weights: Any, number: int) -> Array:
    """Returns `weights`; raises unless they are `[number]`, and where known at least 0 and not all 0."""
    weights = as_array(name, weights)
    if weights.shape != (number,):
        raise ValueError(f"{name} must have shape [{number}], one for each vector, got {list(weights.shape)}")
    check_number(name, weights, low=0)
    if is_known(weights) and not np.any(np.asarray(weights) > 0):
        raise ValueError(f"{name}: all weights are zero; some must be positive")
    return weights


def check_labels(name: str, labels: Any, *, num_examples: int, num_classes: int) -> Array:
    """Returns `labels`; raises unless they are integers `[num_examples]`, outside jit in [0, num_classes)."""
    labels = as_array(name, labels)
    if jnp.shape(labels) != (num_examples,) or not jnp.issubdtype(jnp.result_type(labels), jnp.integer):
        raise ValueError(
            f"{name} must be integers of shape [{num_examples}], got {jnp.result_type(labels)} of shape "
            f"{list(jnp.shape(labels))}"
        )
    if isinstance(labels, jax.core.Tracer):
        return labels
    values = np.asarray(labels)  # np.min would be traced where they are a constant of a program
    low, high = int(values.min()), int(values.max())
    if low < 0 or high >= num_classes:
        raise ValueError(f"{name} go from {low} to {high}; 0 to {num_classes - 1} are accepted")
    return labels
