"""What every estimator shares: its seed, its folder on disk, and a warning."""

import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted

from sul_jax.estimators import _saved


class Estimator(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):  # type: ignore[misc]
    """Of images or of vectors."""

    random_state: Any
    verbose: bool

    def save(self, path: str | Path) -> None:
        """Writes what was learned to an Orbax checkpoint folder, to be read by `estimators.load`.

        Args:
          path: the folder, new or an earlier checkpoint of the same kind of estimator.

        Raises:
          ValueError: there is something else at `path`.
        """
        check_is_fitted(self)
        _saved.save(self, path)

    def _arrays(self) -> dict[str, Any]:
        """What is stored."""
        raise NotImplementedError

    def _restore(self, arrays: dict[str, np.ndarray], path: str | Path) -> None:
        """From what `_arrays` gave."""
        raise NotImplementedError

    def _draw_seed(self) -> None:
        """Sets `seed_`, that of all that is drawn, by `random_state`."""
        self.seed_ = int(check_random_state(self.random_state).randint(2**31 - 1))

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float32"]
        return tags


def warn_of_few(found: int, asked: int, why: str) -> None:
    """Warns where fewer clusters were found than asked for."""
    if found < asked:
        warn(f"only {found} of n_clusters={asked} clusters were found: {why}")


def warn(message: str) -> None:
    """A `ConvergenceWarning` at the first function up the stack that is neither ours nor scikit-learn's."""
    frame, level = sys._getframe(), 1
    while frame.f_back and frame.f_globals.get("__name__", "").startswith(("sul_jax.", "sklearn.")):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, ConvergenceWarning, stacklevel=level)
