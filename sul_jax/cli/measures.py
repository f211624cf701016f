"""Measures of clusters that need no labels, by which a number of clusters may be chosen."""

from collections.abc import Mapping
from functools import partial
from itertools import pairwise

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


def label_free(
    codes: np.ndarray, clusterings: Mapping[int, np.ndarray], *, directions: bool = False
) -> dict[int, dict[str, float]]:
    """Measures of clusterings of the same codes, on their 64 leading principal components at most.

    - `silhouette`: how much nearer codes are to their own cluster than to the next, from -1 to 1.
    - `gap`: by how much log inertia is below that of codes spread evenly over the same box along the
      principal axes, in as many clusters by k-means (Tibshirani et al. 2001). 0 where there are as many
      clusters as codes.
    - `coding_length`: of a code at unit norm, less the mean of all, in nats and at ε² = 0.1 (see
      `coding_rate.coding_length`); the only one of which less is better.

    Args:
      codes: finite `[num_codes, num_features]`; 3,000 are drawn, or five for each cluster, where there are
        more.
      clusterings: labels `[num_codes]` by the number of clusters; labels are in [0, number).
      directions: whether codes count by their directions alone, as for k-means by cosine.

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
    rows = rng.permutation(len(codes))[: max(_SOME, 5 * max(clusterings))]
    codes = np.asarray(codes[rows], np.float64)
    unit = _leading(normalize(codes))
    places = unit if directions else _leading(codes)
    low, high = places.min(axis=0), places.max(axis=0)
    even = [rng.uniform(low, high, places.shape) for _ in range(_REFERENCES)]
    found = {}
    for number, labels in clusterings.items():
        own = labels[rows]
        several = 1 < len(np.unique(own)) < len(own)
        varied = number < len(own) and places.any()
        gap = np.mean([_by_chance(one, number) for one in even]) - _inertia(places, own) if varied else 0.0
        length = _length(unit.astype(np.float32), own, num_clusters=number)
        found[number] = {
            "silhouette": float(silhouette_score(places, own)) if several else 0.0,
            "gap": float(gap),
            "coding_length": float(length) / len(own),
        }
    return found


def best(measured: Mapping[int, Mapping[str, float]]) -> dict[str, int]:
    """The number of clusters that each measure would choose: the largest gap is not sought, but as Tibshirani
    et al. do the least number whose gap the next one does not exceed (the standard error is left out, being
    small for thousands of codes).

    Args:
      measured: by the number of clusters, measures by name; `agreement` may be among them.

    Example:
      >>> from sul_jax.cli import measures
      >>> measures.best({2: {"gap": 0.1, "coding_length": 3.0}, 3: {"gap": 0.2, "coding_length": 2.0}})
      {'gap': 3, 'coding_length': 3}
    """
    numbers = sorted(measured)
    chosen = {}
    for name in measured[numbers[0]]:
        values = {n: measured[n][name] for n in numbers}
        if name == "gap":
            chosen[name] = next((n for n, m in pairwise(numbers) if values[n] >= values[m]), numbers[-1])
        else:
            chosen[name] = (min if name == "coding_length" else max)(numbers, key=values.__getitem__)
    return chosen


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
    with np.errstate(invalid="ignore"):  # of codes that do not vary
        places: np.ndarray = PCA(min(_COMPONENTS, *codes.shape), random_state=0).fit_transform(codes)
    return places


def _by_chance(places: np.ndarray, number: int) -> float:
    """Log inertia of k-means."""
    return float(np.log(KMeans(number, n_init=1, random_state=0).fit(places).inertia_))


def _inertia(places: np.ndarray, labels: np.ndarray) -> float:
    """Log inertia of clusters."""
    groups = [places[labels == cluster] for cluster in np.unique(labels)]
    total = sum(np.sum(np.square(own - own.mean(axis=0))) for own in groups)
    return float(np.log(max(total, np.finfo(np.float64).tiny)))
