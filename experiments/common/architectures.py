"""Energy networks by name: the published ones, and those that `tune_energy` found and saved."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from experiments.common.options import ConfigError
from experiments.common.runs import read_json, write_json
from sul_jax import energy

SEARCHED = Path(__file__).parent / "architectures.json"


class Named(NamedTuple):
    """An architecture and where it comes from.

    Attributes:
      architecture: the sizes.
      options: what else `mnist_energy` must be given, such as `{"rescale": False}`.
      study: the search it came from; empty for a published one.
    """

    architecture: energy.EnergyArchitecture
    options: Mapping[str, Any] = {}
    study: Mapping[str, Any] = {}


def get(name: str) -> Named:
    """An architecture by name, or from a file that `tune_energy` wrote.

    Args:
      name: `1layer` to `4layer`, a name in `architectures.json` beside this file, or a `FILE.json`.

    Raises:
      ConfigError: no such architecture.

    Example:
      >>> from experiments.common import architectures
      >>> len(architectures.get("3layer").architecture.layers)
      3
    """
    if name in energy.ARCHITECTURES:
        return Named(energy.ARCHITECTURES[name])
    if name.endswith(".json"):
        try:
            return _named(read_json(Path(name)))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"architecture={name!r} is not a file of tune_energy ({error})") from None
    searched = _searched()
    if name not in searched:
        accepted = ", ".join([*energy.ARCHITECTURES, *searched])
        raise ConfigError(f"architecture={name!r} is unknown; accepted: {accepted}, or FILE.json")
    return _named(searched[name])


def save(path: Path, named: Named) -> None:
    """Writes an architecture to a file that `get` reads."""
    write_json(path, _stored(named))


def save_as(name: str, named: Named) -> None:
    """Puts an architecture into `experiments/common/architectures.json`."""
    write_json(SEARCHED, _searched() | {name: _stored(named)})


def check_new_name(name: str) -> None:
    """Raises `ConfigError` for a name that another network has, or that is no name."""
    if name in {*energy.ARCHITECTURES, *_searched(), "auto"} or not name.isidentifier():
        raise ConfigError(f"save_as={name!r} is not accepted: it must be an identifier that is not used yet")


def _searched() -> dict[str, Any]:
    stored: dict[str, Any] = read_json(SEARCHED, {})
    return stored


def _stored(named: Named) -> dict[str, Any]:
    return named._asdict() | {"architecture": named.architecture.to_dict()}


def _named(stored: Mapping[str, Any]) -> Named:
    architecture = energy.EnergyArchitecture.from_dict(stored["architecture"])
    options, study = stored["options"], stored["study"]
    if not isinstance(options, Mapping):
        raise ValueError(f"options={options!r} are not names and values")
    return Named(architecture, options, study)
