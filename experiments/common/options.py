"""What the experiments' options have in common; their command lines are those of `sul_jax.cli`."""

from dataclasses import dataclass
from pathlib import Path

from sul_jax.cli.options import ConfigError as ConfigError
from sul_jax.cli.options import check_at_most as check_at_most
from sul_jax.cli.options import check_options as check_options
from sul_jax.cli.options import command_line as command_line
from sul_jax.cli.ranges import NonNegativeInt, PositiveInt
from sul_jax.tracking import Service


@dataclass(frozen=True, kw_only=True)
class CommandOptions:
    """Options that every command has: where it finds its data and works."""

    data_dir: Path | None = None
    """Folder of data sets; by default $SUL_JAX_DATA."""
    workdir: Path = Path("runs")
    """Where everything is written; a folder previous-… in it keeps an earlier run."""
    seed: NonNegativeInt = 0
    """Seed of all random numbers; with several seeds, the first one."""
    resume: bool = False
    """Continue the run in the workdir."""
    record: bool = False
    """Append the results to experiments/results/, in the file of this experiment."""


@dataclass(frozen=True, kw_only=True)
class RunOptions(CommandOptions):
    """Options of an experiment that is run with several seeds."""

    seeds: PositiveInt = 1
    """Number of seeds: seed, seed + 1, …"""
    track: Service | None = None
    """Where the numbers of metrics.jsonl are also sent; needs `pip install 'sul_jax[tracking]'`."""
