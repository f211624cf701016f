"""Measures of clusters that need no labels, by which a number of clusters may be chosen."""

from collections.abc import Mapping
from functools import partial

import jax
import numpy as np
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.metrics import silhouette_score
from sklearn.preprocessing import normalize

from sul_jax import coding_rate

# What tables and figures call them, and how they print.
TITLES = {
    "agreement": ("agreement between seeds (ARI, %)", ".1f"),
    "silhouette": ("silhouette", ".3f"),
    "gap": ("gap statistic", ".3f"),
    "coding_length": ("coding length (nats; less is better)", ".2f"),
}
# Codes that are looked at, and principal components of them.
_SOME, _COMPONENTS = 3000, 64
# Uniform references of the gap statistic.
_REFERENCES = 2
_length = jax.jit(partial(coding_rate.coding_length, eps_squared=0.1), static_argnames="num_clusters")


def label_free(codes: np.ndarray, clusterings: Mapping[int, np.ndarray]) -> dict[int, dict[str, float]]:
    """Measures of clusterings of the same codes; some codes are drawn where they are many.

    - `silhouette`: how much nearer codes are to their own cluster than to the next, from -1 to 1.
    - `gap`: by how much log inertia is below that of codes spread evenly over the same box along the
      principal axes, clustered into as many (Tibshirani et al. 2001).
    - `coding_length`: of a code at unit norm in nats, at ε² = 0.1 (see `coding_rate.coding_length`); the only
      one of which less is better.

    Args:
      codes: finite `[num_codes, num_features]`.
      clusterings: labels `[num_codes]` by the number of clusters; labels are in [0, number).

    Returns:
      By the number of clusters, the measures by name.

    Example:
      >>> import numpy as np
      >>> from sul_jax.cli import measures
      >>> codes = np.repeat(np.eye(3), 30, axis=0) + 0.1 * np.random.default_rng(0).standard_normal((90, 3))
      >>> found = measures.label_free(codes, {2: np.arange(90) // 60, 3: np.arange(90) // 30})
      >>> found[3]["silhouette"] > found[2]["silhouette"], found[3]["gap"] > found[2]["gap"]
      (True, True)
    """
    rng = np.random.default_rng(0)
    rows = rng.permutation(len(codes))[:_SOME]
    codes = np.asarray(codes, np.float64)[rows]
    if (codes == codes[0]).all():  # nothing to measure
        return {number: {"silhouette": 0.0, "gap": 0.0, "coding_length": 0.0} for number in clusterings}
    places, directions = _leading(codes), _leading(normalize(codes)).astype(np.float32)
    low, high = places.min(axis=0), places.max(axis=0)
    even = [rng.uniform(low, high, places.shape) for _ in range(_REFERENCES)]
    found = {}
    for number, labels in clusterings.items():
        own = labels[rows]
        several = 1 < len(np.unique(own)) < len(own)
        by_chance = [KMeans(number, n_init=1, random_state=0).fit(one).inertia_ for one in even]
        found[number] = {
            "silhouette": float(silhouette_score(places, own)) if several else 0.0,
            "gap": float(np.mean(_log(np.array(by_chance))) - _log(_inertia(places, own))),
            "coding_length": float(_length(directions, own, num_clusters=number)) / len(own),
        }
    return found


def best(measured: Mapping[int, Mapping[str, float]]) -> dict[str, int]:
    """The number of clusters that each measure would choose.

    Args:
      measured: by the number of clusters, measures by name; `agreement` may be among them.

    Example:
      >>> from sul_jax.cli import measures
      >>> measures.best({2: {"gap": 0.1, "coding_length": 3.0}, 3: {"gap": 0.2, "coding_length": 2.0}})
      {'gap': 3, 'coding_length': 3}
    """
    names = next(iter(measured.values()))
    signs = {name: -1 if name == "coding_length" else 1 for name in names}
    return {name: max(measured, key=lambda n: signs[name] * measured[n][name]) for name in names}


def table(measured: Mapping[int, Mapping[str, float]]) -> tuple[list[str], list[list[str]]]:
    """Header and rows for a table; a star marks what each measure would choose.

    Args:
      measured: as for `best`.

    Example:
      >>> from sul_jax.cli import measures
      >>> measures.table({2: {"gap": 0.1}, 3: {"gap": 0.2}})
      (['clusters', 'gap statistic'], [['2', '0.100'], ['3', '0.200 *']])
    """
    chosen = best(measured)
    rows = [
        [str(n), *(f"{own[m]:{TITLES[m][1]}}{' *' * (chosen[m] == n)}" for m in chosen)]
        for n, own in measured.items()
    ]
    return ["clusters", *(TITLES[m][0] for m in chosen)], rows


def _leading(codes: np.ndarray) -> np.ndarray:
    places: np.ndarray = PCA(min(_COMPONENTS, *codes.shape), random_state=0).fit_transform(codes)
    return places


def _inertia(places: np.ndarray, labels: np.ndarray) -> np.ndarray:
    total = np.zeros(())
    for cluster in np.unique(labels):
        own = places[labels == cluster]
        total = total + np.sum(np.square(own - own.mean(axis=0)))
    return total


def _log(values: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(values, np.finfo(np.float64).tiny))
