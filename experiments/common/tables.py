"""Tables of results, for a terminal and for a page."""

from collections.abc import Mapping, Sequence
from statistics import mean, stdev

from scipy.stats import spearmanr

from sul_jax.cli.tables import format_table

# Metrics, and what tables call them.
_COMPARED = {
    "clustering_accuracy": "accuracy, %",
    "normalized_mutual_info": "NMI, %",
    "adjusted_rand_index": "ARI, %",
    "knn_accuracy": "k-NN of the codes, %",
    "agreement": "seeds' agreement, %",
    "seconds": "seconds",
    "peak_gib": "peak GiB",
}
_RANKED = ("agreement", "clustering_accuracy")


def comparison(methods: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """A table of methods, each with the metrics of its seeds: their means, of the accuracy also the standard
    deviation, and the number of seeds.

    Below it, where there are at least three to rank, how agreement between seeds ranks them.

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
    table = format_table(["", *_COMPARED.values(), "seeds"], rows)
    rank, number = rank_correlation(methods)
    if number < 3:
        return table
    return (
        f"{table}\n\nSpearman's rank correlation of the seeds' agreement and the accuracy, over {number} "
        f"methods and numbers of clusters: {rank:.2f}"
    )


def rank_correlation(methods: Mapping[str, Sequence[Mapping[str, float]]]) -> tuple[float, int]:
    """Spearman's, between what the seeds agree on and their mean accuracy; and of how many.

    Args:
      methods: of each method, metrics of its seeds; `agreement` and `clustering_accuracy`, the same with
        `_8_clusters` behind them for another number of clusters than that of the classes, and so on.

    Example:
      >>> from experiments.common import tables
      >>> runs = {str(i): [{"agreement": i, "clustering_accuracy": i**2}] for i in range(4)}
      >>> tables.rank_correlation(runs)
      (1.0, 4)
    """
    pairs = [
        [mean(one[f"{metric}{name.removeprefix('agreement')}"] for one in seeds) for metric in _RANKED]
        for seeds in methods.values()
        for name in seeds[0]
        if name.startswith("agreement")
    ]
    if len(pairs) < 3:
        return float("nan"), len(pairs)
    return round(float(spearmanr(*zip(*pairs, strict=True)).statistic), 6), len(pairs)
