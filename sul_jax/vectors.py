"""Vectors in memory or on disk, read a chunk at a time.

Embeddings of many examples do not fit into memory. `read` takes an array, a memory map, a file (`.npy`,
`.npz` or `.parquet`) or a folder of such files, its shards in the order of their names, and gives chunks of
one size in float32. The next chunk is read while the current one is processed.
"""

import copy
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np

from sul_jax._check import check_integer, on_host
from sul_jax._files import first_line

ENDINGS = (".npy", ".npz", ".parquet")
"""Files of vectors."""
# What an .npz file or a table may call them; a single array, or a single column of lists, is them too.
_NAMES = ("embeddings", "embedding", "features", "vectors")
# Bytes that are read and checked at a time.
_PIECE = 2**24
# Places that tell vectors apart, and vectors at each.
_LOOKED_AT = 64


class _Part(NamedTuple):
    name: str
    number: int
    features: int
    exact: bool  # whether they are in float64
    pieces: Callable[[int, int], Iterator[np.ndarray]]  # of rows from first to end, of any numbers


class Vectors:
    """Vectors `[num_vectors, num_features]`, of which only a chunk is in memory.

    Attributes:
      num_vectors: of all parts.
      num_features: of each.
      parts: names and numbers of vectors of the files, or of the one array.
    """

    def __init__(self, parts: Sequence[_Part], *, directions: bool = False):
        """Parts of one width, none of them empty; see `read`."""
        self._parts, self._directions = parts, directions
        self._offset: np.ndarray | None = None
        self.parts = [(part.name, part.number) for part in parts]
        self.num_vectors = sum(part.number for part in parts)
        self.num_features = parts[0].features
        self._first, self._end = 0, self.num_vectors

    def share(self, index: int, number: int) -> Self:
        """One of several parts that are alike in size and together all vectors, in order.

        Args:
          index: 0 to number − 1.
          number: parts.

        Raises:
          ValueError: fewer vectors than parts.
        """
        check_integer("number", number, low=1, high=self.num_vectors, why=", the number of vectors")
        check_integer("index", index, low=0, high=number - 1)
        return self._between(*(self._first + self.num_vectors * one // number for one in (index, index + 1)))

    def middle(self) -> np.ndarray | None:
        """Where about the vectors lie, `[num_features]`, if they are in float64 and so may lie far from 0."""
        if not self._parts[0].exact:
            return None
        middle: np.ndarray = np.mean(next(self._parts[0].pieces(0, self._parts[0].number)), axis=0)
        return middle

    def relative_to(self, offset: np.ndarray | None) -> Self:
        """The same, less an offset `[num_features]`, which is subtracted before float32 rounds them.

        Args:
          offset: None for the vectors as they are.
        """
        moved = copy.copy(self)
        moved._offset = offset
        return moved

    def identity(self) -> dict[str, Any]:
        """What tells these vectors apart from others: their number and width, and some of them."""
        number, code = self.num_vectors, 0
        for place in range(_LOOKED_AT):
            start = self._first + place * max(0, number - _LOOKED_AT) // (_LOOKED_AT - 1)
            for chunk in self._between(start, min(start + _LOOKED_AT, self._end)).chunks(_LOOKED_AT):
                code = zlib.crc32(chunk.data, code)
        return {"num_vectors": number, "num_features": self.num_features, "crc32": code}

    def _between(self, first: int, end: int) -> Self:
        some = copy.copy(self)
        some._first, some._end, some.num_vectors = first, end, end - first
        return some

    def __len__(self) -> int:
        return self.num_vectors

    @property
    def rows(self) -> slice:
        """Where these are among the vectors that `read` opened."""
        return slice(self._first, self._end)

    def chunks(self, size: int) -> Iterator[np.ndarray]:
        """All vectors in order, in chunks of one size but for the last.

        Args:
          size: vectors in a chunk.

        Returns:
          An iterator over float32 `[size, num_features]`.

        Raises:
          ValueError: a file that has changed since, or values that are not finite, named by file and row.
        """
        check_integer("size", size, low=1)
        return _ahead(self._filled(size))

    def sample(
        self, number: int, *, seed: int = 0, among: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Vectors drawn at random, in their order.

        Args:
          number: at most of them.
          seed: of the draw.
          among: `[num_vectors]`, which ones; by default all.

        Returns:
          float32 `[number, num_features]`, or all there are, and their rows.
        """
        rows = self.num_vectors if among is None else np.flatnonzero(among)
        number = min(number, self.num_vectors if among is None else len(rows))  # type: ignore[arg-type]
        chosen = np.sort(np.random.default_rng(seed).choice(rows, number, replace=False))
        drawn = np.empty((number, self.num_features), np.float32)
        start = 0
        for chunk in self.chunks(max(1, _PIECE // (4 * self.num_features))):
            first, end = np.searchsorted(chosen, (start, start + len(chunk)))
            drawn[first:end] = chunk[chosen[first:end] - start]
            start += len(chunk)
        return drawn, chosen

    def _checked(self, piece: np.ndarray, name: str, start: int) -> np.ndarray:
        with np.errstate(over="ignore", invalid="ignore"):
            exact = piece if self._offset is None else piece - self._offset
            values = np.asarray(exact).astype(np.float32, copy=False)
        if not (finite := np.isfinite(values)).all():
            row = start + int(np.argmin(finite.all(axis=1)))
            raise ValueError(f"{name}, row {row}: NaN, infinite or beyond float32; values must be finite")
        if self._directions and not (some := values.any(axis=1)).all():
            raise ValueError(
                f"{name}, row {start + int(np.argmin(some))}: norm 0; cosines need norms above 0"
            )
        return values

    def _filled(self, size: int) -> Iterator[np.ndarray]:
        chunk, filled = np.empty((min(size, self.num_vectors), self.num_features), np.float32), 0
        left, behind = self.num_vectors, 0
        for part in self._parts:
            start, end = (min(max(row - behind, 0), part.number) for row in (self._first, self._end))
            behind += part.number
            for piece in part.pieces(start, end) if start < end else ():
                values = self._checked(piece, part.name, start)
                start += len(piece)
                if start > end:
                    break
                while len(values):
                    taken = min(len(values), len(chunk) - filled)
                    chunk[filled : filled + taken] = values[:taken]
                    values, filled = values[taken:], filled + taken
                    if filled == len(chunk):
                        yield chunk
                        left -= filled
                        chunk, filled = np.empty((min(size, left), self.num_features), np.float32), 0
            if start != end:
                raise ValueError(f"{part.name} has changed since it was opened: {start} vectors, not {end}")


def read(source: Any, *, directions: bool = False) -> Vectors:
    """Opens vectors.

    Args:
      source: an array or memory map `[num_vectors, num_features]` of floats or integers, a file, a folder of
        files or a sequence of paths. An `.npz` file holds an array `embeddings`, a `.parquet` file a column
        of lists of one length (for which pyarrow is needed); one of another name is taken where it is alone.
      directions: vectors of norm 0 are an error.

    Returns:
      `Vectors`.

    Raises:
      ValueError: nothing to read, a file that cannot be read or is empty, or files of different widths.
      TypeError: what is neither numbers nor a path.

    Example:
      >>> import tempfile
      >>> from pathlib import Path
      >>> import numpy as np
      >>> from sul_jax import vectors
      >>> folder = Path(tempfile.mkdtemp())
      >>> for shard in range(3):
      ...     np.save(folder / f"{shard}.npy", np.full((40, 5), shard, np.float16))
      >>> given = vectors.read(folder)
      >>> given.num_vectors, given.num_features, [len(chunk) for chunk in given.chunks(50)]
      (120, 5, [50, 50, 20])
    """
    parts = [_of_file(path) for path in files(source)] if is_path(source) else [_of_array("X", source)]
    for part in parts:
        if part.features != parts[0].features:
            raise ValueError(
                f"{part.name} holds vectors of {part.features} features, but {parts[0].name} of "
                f"{parts[0].features}"
            )
    return Vectors(parts, directions=directions)


def is_path(source: Any) -> bool:
    """Whether vectors are named by a path, or several, rather than given.

    Example:
      >>> from sul_jax import vectors
      >>> vectors.is_path("codes.npy"), vectors.is_path([[1.0, 2.0]])
      (True, False)
    """
    kinds = (str, os.PathLike)
    if isinstance(source, list | tuple) and source:
        return all(isinstance(one, kinds) for one in source)
    return isinstance(source, kinds)


def files(source: Any) -> list[Path]:
    """The files of vectors that a path, or several, name.

    Args:
      source: a file, a folder or a sequence of files.

    Raises:
      ValueError: a folder without any, or a path that is neither.
    """
    if isinstance(source, list | tuple):
        return [path for one in source for path in files(one)]
    path = Path(source)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ValueError(f"{str(path)!r} is neither a file nor a folder of vectors")
    found = sorted(
        one
        for one in path.iterdir()
        if one.suffix.lower() in ENDINGS and one.is_file() and not one.name.startswith(".")
    )
    if not found:
        raise ValueError(f"{str(path)!r} holds no vectors: no {', '.join(ENDINGS)} file")
    return found


def _of_file(path: Path) -> _Part:
    if path.suffix.lower() == ".parquet":
        return _of_table(path)
    if path.suffix.lower() not in ENDINGS:
        raise ValueError(f"{path.name} is not a file of vectors; accepted: {', '.join(ENDINGS)}")
    try:
        stored = np.load(path, mmap_mode="r", allow_pickle=False)
        if not isinstance(stored, np.ndarray):
            with stored as arrays:
                chosen = _chosen(path.name, "array", arrays.files)
                part = _of_array(path.name, arrays[chosen])
            # What was read is forgotten, and read again when its turn comes: one file is in memory at a time.
            return part._replace(pieces=partial(_pieces_of_npz, path, chosen))
    except (OSError, EOFError, SyntaxError, TypeError, MemoryError) as error:
        raise ValueError(f"{path.name} cannot be read: {first_line(error)}") from None
    except Exception as error:  # what NumPy and zipfile raise of damaged files has no common kind
        if isinstance(error, ValueError) and str(error).startswith(path.name):
            raise
        raise ValueError(f"{path.name} cannot be read: {first_line(error)}") from None
    return _of_array(path.name, stored)


def _of_array(name: str, given: Any) -> _Part:
    array = given if isinstance(given, np.ndarray) else on_host(name, given)
    if array.ndim != 2:
        raise ValueError(f"{name} must have shape [num_vectors, num_features], got {list(array.shape)}")
    if 0 in array.shape:
        raise ValueError(f"{name} holds no vectors: its shape is {list(array.shape)}")
    if array.dtype.kind not in "iuf" and array.dtype.name != "bfloat16":
        raise TypeError(f"{name} must hold floats or integers, got {array.dtype}")
    number, features = array.shape
    size = max(1, _PIECE // (array.itemsize * features))

    def pieces(first: int, end: int) -> Iterator[np.ndarray]:
        return (array[start : min(start + size, end)] for start in range(first, end, size))

    return _Part(name, number, features, array.dtype == np.float64, pieces)


def _pieces_of_npz(path: Path, name: str, first: int, end: int) -> Iterator[np.ndarray]:
    with np.load(path, allow_pickle=False) as arrays:
        part = _of_array(path.name, arrays[name])
    return part.pieces(first, end)


def _of_table(path: Path) -> _Part:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise ValueError(f"{path.name} needs pyarrow: pip install pyarrow") from None
    try:
        table = parquet.ParquetFile(path)
        schema = table.schema_arrow
        kinds = pyarrow.types
        of_numbers = [
            field
            for field in schema
            if (
                kinds.is_fixed_size_list(field.type)
                or kinds.is_list(field.type)
                or kinds.is_large_list(field.type)
            )
            and (kinds.is_floating(field.type.value_type) or kinds.is_integer(field.type.value_type))
        ]
        lists = [field.name for field in of_numbers if kinds.is_fixed_size_list(field.type)]
        lists = lists or [field.name for field in of_numbers]
        number = table.metadata.num_rows
        column = _chosen(path.name, "column of lists of numbers", lists)
        exact = kinds.is_float64(schema.field(column).type.value_type)
        first = next(table.iter_batches(1, columns=[column]), None)
        features = 0 if first is None or first.column(0)[0].as_py() is None else len(first.column(0)[0])
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path.name} cannot be read: {first_line(error)}") from None
    if not number or not features:
        raise ValueError(f"{path.name} holds no vectors")

    def pieces(first: int, end: int) -> Iterator[np.ndarray]:
        table, size = parquet.ParquetFile(path), max(1, _PIECE // (4 * features))
        numbers = [table.metadata.row_group(index).num_rows for index in range(table.num_row_groups)]
        ends = np.cumsum(numbers)
        groups = np.flatnonzero((ends > first) & (ends - numbers < end)).tolist()
        start = int(ends[groups[0]] - numbers[groups[0]]) if groups else 0
        for batch in table.iter_batches(size, row_groups=groups, columns=[column]):
            lists = batch.column(0)
            values = lists.flatten().to_numpy(zero_copy_only=False)
            if lists.null_count or values.size != len(lists) * features:
                raise ValueError(
                    f"{path.name}: rows {start} to {start + len(lists) - 1} of {column!r} are not all lists "
                    f"of {features} numbers"
                )
            rows = values.reshape(-1, features)
            # A file that has grown since gives more than was asked for, to be noticed.
            last = len(rows) if end == number else max(0, end - start)
            yield rows[max(0, first - start) : last]
            start += len(lists)

    return _Part(path.name, number, features, exact, pieces)


def _chosen(name: str, kind: str, there: Sequence[str]) -> str:
    """Which of several arrays holds the vectors."""
    known = [one for one in _NAMES if one in there] or list(there)
    if len(known) != 1 and known[:1] != list(_NAMES[:1]):
        found = ", ".join(map(repr, there)) or "nothing"
        raise ValueError(f"{name} has no {kind} named {_NAMES[0]!r}; it has {found}")
    return known[0]


def _ahead(chunks: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """The same, each made while the one before is worked on."""
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, chunks, None)
        while (chunk := coming.result()) is not None:
            coming = thread.submit(next, chunks, None)
            yield chunk
