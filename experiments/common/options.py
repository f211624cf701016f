"""What the experiments' options have in common, and their command lines."""

import contextlib
import ctypes
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro


class ConfigError(ValueError):
    """A configuration that cannot run, said in one line."""


@dataclass(frozen=True, kw_only=True)
class CommandOptions:
    """Options that every command has: where it finds its data and works."""

    data_dir: Path | None = None
    """Folder of data sets; by default $SUL_JAX_DATA."""
    workdir: Path = Path("runs")
    """Where everything is written; an earlier run there is set aside, not lost."""
    seed: int = 0
    """Of all that is random; the first one where there are several."""
    resume: bool = False
    """Continue the run in the workdir."""
    record: bool = False
    """Append the results to experiments/results/, in the file of this experiment."""


@dataclass(frozen=True, kw_only=True)
class RunOptions(CommandOptions):
    """Options of an experiment that is run with several seeds."""

    seeds: int = 1
    """Number of seeds: seed, seed + 1, …"""


def check_options(
    config: Any, *, at_least: Mapping[str, float] = {}, above: Mapping[str, float] = {}
) -> None:
    """Raises `ConfigError` for an option out of range or infinite; one that is None is not given."""
    for bounds, words in ((at_least, "at least"), (above, "above")):
        for name, low in bounds.items():
            value = getattr(config, name)
            if value is None:
                continue
            if not (low <= value if words == "at least" else low < value) or value == float("inf"):
                raise ConfigError(f"{name}={value} is not accepted: it must be {words} {low}")
    last = getattr(config, "seed", 0) + getattr(config, "seeds", 1) - 1
    if last >= 2**32:  # jax.random.key takes 32 bits: larger seeds are smaller ones again
        raise ConfigError(f"seed={config.seed} is not accepted: the last seed, {last}, is beyond 2³² − 1")


def command_line(run: Callable[[Any], Any], config: type[Any], *, description: str) -> None:
    """Parses the command line and runs; an error is one line, with SUL_JAX_TRACEBACK set a traceback."""
    parsed = tyro.cli(config, description=description)
    _keep_freed_memory()
    try:
        run(parsed)
    except KeyboardInterrupt:
        hint = "; the same command with --resume goes on" if hasattr(parsed, "resume") else ""
        print(f"\ninterrupted{hint}", file=sys.stderr)
        raise SystemExit(130) from None
    except (ValueError, TypeError, OSError) as error:
        if os.environ.get("SUL_JAX_TRACEBACK"):
            raise
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def _keep_freed_memory() -> None:
    """Large arrays out of memory that was used before, where the C library is glibc.

    By default it returns every large array to the system, which clears the pages of the next one: a step of
    a linear classifier on 300 × 40,000 features took 26 ms so, and 14 ms without.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            c_library = ctypes.CDLL(None)
            # M_MMAP_THRESHOLD; the second, M_TRIM_THRESHOLD, alone would make more of them go back.
            if c_library.mallopt(-3, 2**31 - 1) == 1:
                c_library.mallopt(-1, 2**31 - 1)
