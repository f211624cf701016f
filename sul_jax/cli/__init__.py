"""Clusters your own images: the command `sul-jax`.

    sul-jax cluster FOLDER --num-clusters 10
    sul-jax assign runs/cluster NEW

`cluster` learns from the pictures in a folder without labels, and writes a report, a table and the model;
`assign` puts new pictures into the clusters of a model. `sul-jax cluster --help` lists the options.
"""

import importlib.util
import sys

# What the extra `cli` installs and the library alone does not need.
_NEEDED = ("tyro", "PIL", "matplotlib", "filelock")


def main() -> None:
    """The command line."""
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        print(
            f"error: {', '.join(missing)} not found; sul-jax needs: pip install 'sul_jax[cli]'",
            file=sys.stderr,
        )
        raise SystemExit(2)
    from sul_jax.cli import assign, cluster, options

    options.command_line(
        {"cluster": (cluster.Config, cluster.run), "assign": (assign.Config, assign.run)}, description=__doc__
    )
