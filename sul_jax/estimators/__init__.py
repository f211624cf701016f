"""Scikit-learn estimators: each method learns from unlabelled images and clusters them.

They hold what was learned and compile what they run; rules, training and mathematics are this package's. An
image's code and cluster do not depend on the batch it comes in: programs take batches of one size.
"""

from sul_jax.estimators._base import fit_together
from sul_jax.estimators._saved import load
from sul_jax.estimators.acol import ACOLClustering
from sul_jax.estimators.deep_cluster import DeepClustering
from sul_jax.estimators.energy import EnergyClustering
from sul_jax.estimators.nmce import NMCEClustering
from sul_jax.estimators.pixels import PixelClustering

__all__ = [
    "ACOLClustering",
    "DeepClustering",
    "EnergyClustering",
    "NMCEClustering",
    "PixelClustering",
    "fit_together",
    "load",
]
