"""One run in several processes, each on its own share of the data, by `jax.distributed`."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import jax
import numpy as np

from sul_jax._files import first_line
from sul_jax._parallel import gathered, wait_for_all
from sul_jax.cli.options import ConfigError

# Seconds without a sign of life after which a process is taken for lost.
_SILENCE = 30


def is_first() -> bool:
    """Whether this process writes what the run gives; true without others."""
    return jax.process_index() == 0


def of_first(flag: bool) -> bool:
    """What the first process says, in all of them."""
    return bool(gathered(np.array([flag]))[0])


@contextmanager
def together() -> Iterator[None]:
    """Meets the other processes of the run; if one of them ends early, all end, each with one line.

    Where they are is known from the launcher (SLURM, Open MPI, Kubernetes, a TPU pod; see
    `jax.distributed.initialize`) or from JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID. An
    error in the block ends this process at once: the others are not to wait for it.

    Raises:
      ConfigError: no launcher, or the others do not come.
    """
    _connect()
    try:
        yield
        wait_for_all()  # for the first, which writes: at the exit nobody waits for long
    except BaseException as error:
        if jax.process_count() > 1:
            _end(error)
        raise


def _connect() -> None:
    try:
        number, own = (_number(name) for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"))
        jax.distributed.initialize(num_processes=number, process_id=own, heartbeat_timeout_seconds=_SILENCE)
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            "distributed needs a launcher that JAX knows (srun, mpirun), or JAX_COORDINATOR_ADDRESS, "
            f"JAX_NUM_PROCESSES and JAX_PROCESS_ID in each process: {first_line(error)}"
        ) from None
    if not is_first():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # the first one tells


def _number(name: str) -> int | None:
    given = os.environ.get(name)
    if given is None:
        return None
    if not given.isdecimal():
        raise ValueError(f"{name}={given!r} is not a number")
    return int(given)


def _end(error: BaseException) -> NoReturn:
    """Ends this process; what Python does at the exit would wait for the others."""
    text = first_line(error)
    if isinstance(error, jax.errors.JaxRuntimeError) or "Gloo" in text:
        text = "another process of this run has ended; start all of them again with --resume"
    print(f"error: process {jax.process_index()}: {text}", file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(130 if isinstance(error, KeyboardInterrupt) else 2)
