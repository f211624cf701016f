"""Ranges of options, said in their annotations."""

import inspect
import math
import numbers
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args, get_origin


@dataclass(frozen=True)
class Range:
    """What values an option may have, said in its annotation: `Annotated[int, Range(1)]`.

    Attributes:
      low: the least value.
      high: the largest value.
      open: the least value itself is not accepted.
    """

    low: float
    high: float = math.inf
    open: bool = False

    def __contains__(self, value: object) -> bool:
        if not isinstance(value, numbers.Real) or isinstance(value, bool):
            return False
        number = float(value)
        above = self.low < number if self.open else self.low <= number
        return above and number <= self.high and not math.isinf(number)

    def __str__(self) -> str:
        if math.isinf(self.high):
            return f"{'above' if self.open else 'at least'} {self.low}"
        return f"above {self.low}, up to {self.high}" if self.open else f"between {self.low} and {self.high}"


@dataclass(frozen=True)
class OneOf:
    """The words of a `Literal`."""

    words: tuple[Any, ...]

    def __contains__(self, value: object) -> bool:
        return value in self.words

    def __str__(self) -> str:
        return f"one of {', '.join(map(str, self.words))}"


PositiveInt = Annotated[int, Range(1)]
NonNegativeInt = Annotated[int, Range(0)]
PositiveFloat = Annotated[float, Range(0, open=True)]
NonNegativeFloat = Annotated[float, Range(0)]


def ranges(kind: type) -> dict[str, Range | OneOf]:
    """By the option's name, those of a class and the classes below; declared anew, an option keeps its range.

    Example:
      >>> from dataclasses import dataclass
      >>> from sul_jax.cli.ranges import PositiveInt, ranges
      >>> @dataclass
      ... class Config:
      ...     epochs: PositiveInt | None = None
      >>> ranges(Config)
      {'epochs': Range(low=1, high=inf, open=False)}
    """
    hints = [hint for base in kind.__mro__[::-1] for hint in inspect.get_annotations(base).items()]
    return {name: own for name, hint in hints if (own := _range(hint)) is not None}


def _range(hint: Any) -> Range | OneOf | None:
    """An annotation's own, its tuple's, or the first of a union whose types but None all have one."""
    if get_origin(hint) is Literal:
        return OneOf(get_args(hint))
    own = [data for data in getattr(hint, "__metadata__", ()) if isinstance(data, Range)]
    inner = [_range(one) for one in get_args(hint) if one not in (type(None), ...)]
    within = [] if None in inner else inner
    return next(iter([*own, *within]), None)
