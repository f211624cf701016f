"""Tables of results, for a terminal and for a page."""

from collections.abc import Mapping, Sequence
from statistics import mean, stdev

from sul_jax.cli.tables import format_table

# Metrics, and what tables call them.
_COMPARED = {
    "clustering_accuracy": "accuracy, %",
    "normalized_mutual_info": "NMI, %",
    "adjusted_rand_index": "ARI, %",
    "knn_accuracy": "k-NN of the codes, %",
    "agreement": "seeds' agreement, %",
    "clusters_found": "clusters found",
    "seconds": "seconds",
    "peak_gib": "peak GiB",
}


def comparison(methods: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """A table of methods, each with the metrics of its seeds: their means, of the accuracy also the standard
    deviation, and the number of seeds.

    Example:
      >>> from experiments.common import tables
      >>> names = ("normalized_mutual_info", "adjusted_rand_index", "knn_accuracy", "seconds", "peak_gib")
      >>> seeds = [dict.fromkeys(names, 1.0) | {"clustering_accuracy": value} for value in (80.0, 82.0)]
      >>> print(tables.comparison({"pixels": seeds}).splitlines()[2][:26])
      | pixels |  81.0 ± 1.4 |
    """
    rows = []
    for method, seeds in methods.items():
        means = [
            f"{mean(seed[name] for seed in seeds):.1f}" if name in seeds[0] else "–" for name in _COMPARED
        ]
        if len(seeds) > 1:
            means[0] += f" ± {stdev(seed['clustering_accuracy'] for seed in seeds):.1f}"
        rows.append([method, *means, str(len(seeds))])
    return format_table(["", *_COMPARED.values(), "seeds"], rows)
