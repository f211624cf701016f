"""Vectors in memory and on disk: every kind of file, read alike, and what is wrong said in one line."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sul_jax import vectors

X = np.random.default_rng(0).standard_normal((120, 7)).astype(np.float32)


def write(folder: Path, kind: str, values: np.ndarray, name: str = "part") -> Path:
    path = folder / f"{name}.{kind}"
    if kind == "npy":
        np.save(path, values)
    elif kind == "npz":
        np.savez(path, embeddings=values, labels=np.arange(len(values)))
    else:
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        flat = pyarrow.array(values.ravel())
        column = pyarrow.FixedSizeListArray.from_arrays(flat, values.shape[1])
        table = pyarrow.table({"id": np.arange(len(values)), "embedding": column})
        parquet.write_table(table, path, row_group_size=13)
    return path


def whole(source: Any, size: int = 50, **options: Any) -> np.ndarray:
    chunks = list(vectors.read(source, **options).chunks(size))
    assert {len(chunk) for chunk in chunks[:-1]} <= {size}
    assert all(chunk.dtype == np.float32 for chunk in chunks)
    return np.concatenate(chunks)


@pytest.mark.parametrize("kind", ["npy", "npz", "parquet"])
def test_files_and_folders(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vectors, "_PIECE", 7 * 4 * 11)
    path = write(tmp_path, kind, X)
    for source in (path, str(path), [path], tmp_path):
        np.testing.assert_array_equal(whole(source), X)
    shards = tmp_path / "shards"
    shards.mkdir()
    for number, first in enumerate((0, 30, 37)):
        end = (30, 37, 120)[number]
        write(shards, kind, X[first:end], f"{number}")
    (shards / "notes.txt").write_text("not vectors", encoding="utf-8")
    given = vectors.read(shards)
    assert given.parts == [(f"0.{kind}", 30), (f"1.{kind}", 7), (f"2.{kind}", 83)]
    assert (len(given), given.num_features) == (120, 7)
    for size in (1, 30, 64, 500):
        np.testing.assert_array_equal(np.concatenate(list(given.chunks(size))), X)
    sample, rows = given.sample(40, seed=3)
    np.testing.assert_array_equal(sample, X[rows])
    assert sample.shape == (40, 7)
    assert len(np.unique(sample, axis=0)) == 40
    np.testing.assert_array_equal(given.sample(500)[0], X)
    for parts in (1, 2, 7):
        shares = [given.share(index, parts) for index in range(parts)]
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
        np.testing.assert_array_equal(np.concatenate([c for s in shares for c in s.chunks(9)]), X)
        np.testing.assert_array_equal(np.concatenate([X[share.rows] for share in shares]), X)
    assert given.identity() == vectors.read(X).identity()
    changed = X.copy()
    changed[60, 2] += 1
    assert vectors.read(changed).identity() != given.identity()


@pytest.mark.parametrize("kind", ["float16", "float64", "int8", "uint8", "int64", ">f4"])
def test_numbers_of_any_type_become_float32(kind: str, tmp_path: Path) -> None:
    values = (10 * X).astype(kind)
    np.testing.assert_array_equal(whole(write(tmp_path, "npy", values)), values.astype(np.float32))
    np.testing.assert_array_equal(whole(values), values.astype(np.float32))
    memory_map = np.load(tmp_path / "part.npy", mmap_mode="r")
    np.testing.assert_array_equal(whole(memory_map), values.astype(np.float32))


def test_an_offset_is_subtracted_before_rounding() -> None:
    far = X.astype(np.float64) + 1e9
    offset = np.full(7, 1e9)
    chunks = vectors.read(far).relative_to(offset).chunks(50)
    np.testing.assert_allclose(np.concatenate(list(chunks)), X, atol=1e-6)
    np.testing.assert_allclose(vectors.read(far).middle(), far.mean(axis=0), rtol=1e-12)
    assert vectors.read(X).middle() is None


def test_a_column_of_lists_of_one_length(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"v": X.tolist()}), tmp_path / "a.parquet")
    np.testing.assert_array_equal(whole(tmp_path / "a.parquet"), X)


def nan(folder: Path) -> Any:
    values = X.copy()
    values[[17, 90], 3] = np.nan
    write(folder, "npy", X[:5], "a")
    write(folder, "npy", values, "b")
    return folder


def table(folder: Path, columns: Any, rows: int | None = None) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table(columns)[:rows], folder / "a.parquet")
    return folder / "a.parquet"


def shrunk(folder: Path) -> Any:
    write(folder, "parquet", X, "a")
    given = vectors.read(folder)
    write(folder, "parquet", X[:50], "a")
    return given


def other(folder: Path, name: str, content: bytes) -> Path:
    (folder / name).write_bytes(content)
    return folder / name


def widths(folder: Path) -> Path:
    write(folder, "npy", X, "a")
    write(folder, "npz", X[:, :4], "b")
    return folder


BAD: dict[str, tuple[Any, str]] = {
    "widths": (widths, r"b.npz holds vectors of 4 features, but a.npy of 7"),
    "NaN": (nan, "b.npy, row 17: NaN, infinite or beyond float32; values must be finite"),
    "beyond float32": (lambda f: write(f, "npy", np.full((3, 2), 1e300)), "part.npy, row 0: NaN, infinite"),
    "norm 0": (lambda f: np.eye(4) * [1, 1, 0, 1], "X, row 2: norm 0; cosines need norms above 0"),
    "empty shard": (lambda f: write(f, "npy", X[:0]), r"part.npy holds no vectors: its shape is \[0, 7\]"),
    "empty table": (lambda f: table(f, {"v": [[1.0]]}, rows=0), "a.parquet holds no vectors"),
    "empty lists": (lambda f: table(f, {"v": [[]]}), "a.parquet has no column of lists of numbers"),
    "1-D": (lambda f: write(f, "npy", X[:, 0]), r"part.npy must have shape \[num_vectors, num_features\]"),
    "text": (lambda f: write(f, "npy", np.full((2, 2), "a")), "part.npy must hold floats or integers"),
    "booleans": (lambda f: write(f, "npy", X > 0), "part.npy must hold floats or integers, got bool"),
    "objects": (lambda f: write(f, "npy", X.astype(object)), "part.npy cannot be read: Array can't be"),
    "key": (
        lambda f: [np.savez(f / "a.npz", codes=X, others=X), f][1],
        "a.npz has no array named 'embeddings'; it has 'codes', 'others'",
    ),
    "column": (
        lambda f: table(f, {"id": [1, 2], "v": [["a"], ["b"]]}), "has no column of lists of numbers named"
    ),
    "ragged": (lambda f: table(f, {"v": [[1.0, 2.0], [3.0]]}), "rows 0 to 1 of 'v' are not all lists of 2"),
    "missing value": (lambda f: table(f, {"v": [[1.0, 2.0], None]}), "rows 0 to 1 of 'v' are not all lists"),
    "damaged npy": (lambda f: other(f, "a.npy", b"\x93NUMPY\x01\x00"), "a.npy cannot be read: "),
    "damaged npz": (lambda f: other(f, "a.npz", b"PK\x03\x04"), "a.npz cannot be read: "),
    "damaged parquet": (lambda f: other(f, "a.parquet", b"PAR1"), "a.parquet cannot be read: "),
    "another kind": (lambda f: other(f, "a.csv", b"1,2"), "a.csv is not a file of vectors"),
    "no files": (lambda f: f, "holds no vectors: no .npy, .npz, .parquet file"),
    "no folder": (lambda f: f / "missing", "is neither a file nor a folder of vectors"),
    "changed": (shrunk, "a.parquet has changed since it was opened: 50 vectors, not 120"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_is_one_line(case: str, tmp_path: Path) -> None:
    make, message = BAD[case]
    if "arquet" in message:
        pytest.importorskip("pyarrow")
    source = make(tmp_path)
    read = source.chunks if isinstance(source, vectors.Vectors) else partial(whole, source)
    options = {"directions": True} if case == "norm 0" else {}
    with pytest.raises((ValueError, TypeError), match=message) as raised:
        list(read(size=9, **options))
    assert "\n" not in str(raised.value)


def test_reading_stops_with_its_reader(tmp_path: Path) -> None:
    for _ in vectors.read(write(tmp_path, "npy", X)).chunks(10):
        break
