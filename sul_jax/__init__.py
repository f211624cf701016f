"""Unsupervised and biologically plausible learning as small pure JAX functions."""

from sul_jax import energy, k_means, k_subspaces, learning_rule, metrics, patches, whitening
from sul_jax.learning_rule import LearningRule, stack

__version__ = "0.1.0"
__all__ = [
    "LearningRule",
    "energy",
    "k_means",
    "k_subspaces",
    "learning_rule",
    "metrics",
    "patches",
    "stack",
    "whitening",
]
