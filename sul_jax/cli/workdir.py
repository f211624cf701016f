"""The folder of a run: one run at a time, nothing lost, nothing half written."""

import json
import shutil
import tempfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, get_args

import filelock
import numpy as np

from sul_jax._files import read_json, write_json
from sul_jax.cli.options import ConfigError
from sul_jax.tracking import Service, Tracker


def identity(images: np.ndarray) -> dict[str, Any]:
    """What tells training images apart from others.

    Example:
      >>> import numpy as np
      >>> from sul_jax.cli.workdir import identity
      >>> identity(np.zeros((2, 4, 4, 1), np.uint8))
      {'num_train': 2, 'shape': (4, 4, 1), 'crc32': 420107693}
    """
    return {"num_train": len(images), "shape": images.shape[1:], "crc32": zlib.crc32(images.tobytes())}


def make_workdir(path: Path) -> None:
    """Makes a run's folder where there is none; raises `ConfigError` where it cannot be made."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()  # an existing folder may be read-only
    except OSError as error:
        raise ConfigError(f"workdir={str(path)!r} cannot be written: {error}") from None


class Workdir:
    """The folder of a run: `config.json`, `metrics.jsonl`, `results.json`, and whatever the program writes.

    A context manager that holds a lock on the folder and at its end writes `results.json`. A new run in a
    folder that holds an earlier one, or what is left of one, sets that aside in `previous-…`; nothing is
    lost, and nothing of it is read.

    Attributes:
      path: the folder.
      described: what `config.json` says of the run.
      results: what `results.json` is to hold, filled by the program.
    """

    def __init__(
        self,
        path: Path,
        program: str,
        about: Mapping[str, Any],
        *,
        files: Sequence[str],
        state: Sequence[str],
        resume: bool,
        may_differ: Sequence[str],
        track: Service | None = None,
    ):
        """Opens the folder.

        Args:
          path: the folder, made if missing.
          program: name of what runs.
          about: what the run computes and from which data (see `identity`): all that makes it this run.
          files: patterns of what the program writes, and of an earlier run sets aside.
          state: patterns of what it reads when it goes on. Where there is any without a `config.json`, nobody
            knows of what: it is set aside too.
          resume: go on with the run in the folder, of the same program, options and data.
          may_differ: names in `about` that need not be the same on resume.
          track: a service that gets the lines of `metrics.jsonl` as well.

        Raises:
          ConfigError: the folder cannot be written, is in use, holds something else, or `resume` finds a
            run of another configuration.
          ValueError: the service's package is not installed.
        """
        self.path, self._files = path, (*files, "metrics.jsonl", *get_args(Service))
        self.results: list[dict[str, Any]] = []
        # Through JSON, so that it compares equal to what is read back.
        self.described: dict[str, Any] = json.loads(json.dumps({"experiment": program, **about}))
        make_workdir(path)
        self._lock = _locked(path)
        try:
            stored = path / "config.json"
            if stored.exists():
                earlier = self._read(stored, program)
                if resume:
                    self._compare(earlier, may_differ)
                else:
                    self._set_aside()
            else:
                if resume:
                    print(f"nothing to resume in {path}: a new run begins")
                if any(self._matching(state)):
                    self._set_aside()
            self._sweep()
            write_json(stored, self.described)
            self._tracker = None if track is None else Tracker(track, path / track, about=self.described)
        except BaseException:
            self._lock.release()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, _: object, __: TracebackType | None) -> None:
        if kind is None:
            write_json(self.path / "results.json", self.results)
        if self._tracker is not None:
            self._tracker.close()
        self._lock.release()

    def log(self, **values: Any) -> None:
        """Appends a line to `metrics.jsonl`; `step` is the number of steps done, `seed` or `seeds` whose."""
        with open(self.path / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")
        if self._tracker is not None:
            seed, step = values.pop("seed", values.pop("seeds", None)), values.pop("step", None)
            self._tracker.log({f"seed{seed}/{name}": value for name, value in values.items()}, step=step)

    def _read(self, stored: Path, program: str) -> dict[str, Any]:
        try:
            earlier = read_json(stored)
        except ValueError:
            earlier = None
        if not isinstance(earlier, dict) or earlier.get("experiment") != program:
            raise ConfigError(
                f"workdir={str(self.path)!r} holds a config.json that is not a run of {program}; "
                "give another --workdir"
            )
        return earlier

    def _compare(self, earlier: Mapping[str, Any], may_differ: Sequence[str]) -> None:
        for key, value in self.described.items():
            other = earlier.get(key)
            if key not in may_differ and other != value:
                raise ConfigError(
                    f"workdir={str(self.path)!r} holds a run with {key}={other!r}, which "
                    f"cannot be resumed with {key}={value!r}; "
                    "give the same options or another --workdir"
                )

    def _matching(self, patterns: Sequence[str]) -> list[Path]:
        return [entry for pattern in patterns for entry in sorted(self.path.glob(pattern))]

    def _set_aside(self) -> None:
        number = 1
        while (old := self.path / f"previous-{number:03d}").exists():
            number += 1
        old.mkdir()
        # The config goes last: until then the folder counts as an earlier run's.
        for entry in self._matching((*self._files, "config.json")):
            if entry.exists() or entry.is_symlink():  # two patterns may name it
                shutil.move(entry, old / entry.name)

    def _sweep(self) -> None:
        """Removes what a run that was killed had not yet given its name."""
        for pattern in (*self._files, "config.json"):
            for temporary in self._matching((f".{pattern}.????????*", f".{pattern}.new*")):
                if temporary.is_symlink():
                    continue
                if temporary.is_dir():
                    shutil.rmtree(temporary, ignore_errors=True)
                else:
                    temporary.unlink(missing_ok=True)


def _locked(path: Path) -> filelock.BaseFileLock:
    """A lock on the folder that ends with the process."""
    name = path / ".lock"
    if name.is_symlink():  # it would be written to where the link leads
        raise ConfigError(f"workdir={str(path)!r} holds a .lock that is a link; remove it")
    lock = filelock.FileLock(name, timeout=0, thread_local=False)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise ConfigError(f"workdir={str(path)!r} is in use by another run") from None
    except (OSError, NotImplementedError, RuntimeError) as error:
        raise ConfigError(f"workdir={str(path)!r} cannot be locked: {error}") from None
    return lock
