"""Clusters your own images: the command `sul-jax`.

    sul-jax cluster FOLDER --num-clusters 10
    sul-jax assign runs/cluster NEW

`cluster` learns from the pictures in a folder without labels, and writes a report, a table and the model;
`assign` puts new pictures into the clusters of a model. `sul-jax cluster --help` lists the options.
"""

import importlib
import importlib.util
import sys
from typing import NoReturn

# The commands, and what the extra `cli` installs and the library alone does not need.
_COMMANDS = ("cluster", "assign")
_NEEDED = ("tyro", "PIL", "matplotlib", "filelock")


def main() -> None:
    """The command line."""
    words = sys.argv[1:]
    if not words or words[0] in ("-h", "--help"):
        print((__doc__ or "").strip())
        return
    if words[0] not in _COMMANDS:
        _stop(f"{words[0]!r} is not a command; there are {' and '.join(_COMMANDS)}")
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        _stop(f"{', '.join(missing)} not found; sul-jax needs: pip install 'sul_jax[cli]'")
    options = importlib.import_module("sul_jax.cli.options")
    command = importlib.import_module(f"sul_jax.cli.{words[0]}")
    options.command_line(
        command.run,
        command.Config,
        description=command.__doc__,
        program=f"sul-jax {words[0]}",
        words=words[1:],
    )


def _stop(error: str) -> NoReturn:
    print(f"error: {error}", file=sys.stderr)
    raise SystemExit(2)
