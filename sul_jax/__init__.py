"""Unsupervised and biologically plausible learning as small pure JAX functions."""

import importlib
from typing import TYPE_CHECKING, Any

from sul_jax import (
    acol,
    augment,
    coding_rate,
    deep_cluster,
    devices,
    energy,
    gar,
    hebbian,
    k_means,
    k_subspaces,
    learning_rule,
    metrics,
    nmce,
    patches,
    rate_reduction,
    seeds,
    soft_hebb,
    tracking,
    training,
    vectors,
    whitening,
)
from sul_jax.learning_rule import LearningRule, gradient_rule, stack

if TYPE_CHECKING:
    from sul_jax import estimators as estimators
    from sul_jax import nn as nn
    from sul_jax import probes as probes
    from sul_jax import subspace_clustering as subspace_clustering

__version__ = "0.2.0"
__all__ = [
    "LearningRule",
    "acol",
    "augment",
    "coding_rate",
    "deep_cluster",
    "devices",
    "energy",
    "estimators",
    "gar",
    "gradient_rule",
    "hebbian",
    "k_means",
    "k_subspaces",
    "learning_rule",
    "metrics",
    "nmce",
    "nn",
    "patches",
    "probes",
    "rate_reduction",
    "seeds",
    "soft_hebb",
    "stack",
    "subspace_clustering",
    "tracking",
    "training",
    "vectors",
    "whitening",
]


def __getattr__(name: str) -> Any:
    # Flax, Orbax and scikit-learn take longer to import than the rest together: only when they are used.
    if name in ("estimators", "nn", "probes", "subspace_clustering"):
        return importlib.import_module(f"sul_jax.{name}")
    raise AttributeError(f"module 'sul_jax' has no attribute {name!r}")
