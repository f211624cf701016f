"""Files that are written whole or not at all."""

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` that is renamed to it when the block ends without an error.

    Args:
      path: the file; its folder is made if missing.

    Yields:
      The temporary file, which exists and is empty.

    Raises:
      OSError: the file cannot be written.

    Example:
      >>> import tempfile
      >>> from pathlib import Path
      >>> from sul_jax._files import atomic_path
      >>> file = Path(tempfile.mkdtemp()) / "note.txt"
      >>> with atomic_path(file) as temporary:
      ...     _ = temporary.write_text("whole", encoding="utf-8")
      >>> [path.name for path in file.parent.iterdir()]
      ['note.txt']
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        # mkstemp's files are private; a result should be as readable as any other file.
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def first_line(error: BaseException) -> str:
    """What an error says, in its first line; its kind where it says nothing.

    Args:
      error: that was raised.

    Example:
      >>> from sul_jax._files import first_line
      >>> first_line(OSError("no space\\nin /data")), first_line(EOFError())
      ('no space', 'EOFError')
    """
    return (str(error).splitlines() or [type(error).__name__])[0]


def write_json(path: Path, content: Any) -> None:
    """Writes JSON whole or not at all.

    Args:
      path: the file.
      content: what JSON can hold; no NaN.

    Raises:
      ValueError: NaN or an infinite number.
      OSError: the file cannot be written.

    Example:
      >>> import tempfile
      >>> from pathlib import Path
      >>> from sul_jax._files import write_json
      >>> file = Path(tempfile.mkdtemp()) / "numbers.json"
      >>> write_json(file, {"seeds": 3})
      >>> file.read_text(encoding="utf-8").split()
      ['{', '"seeds":', '3', '}']
    """
    with atomic_path(path) as temporary:
        text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
        # Names on disk are not always UTF-8; what Python makes of them is escaped.
        temporary.write_bytes((text + "\n").encode("utf-8", "backslashreplace"))


_NOTHING = object()


def read_json(path: Path, default: Any = _NOTHING) -> Any:
    """What a JSON file holds.

    Args:
      path: the file.
      default: returned where there is no such file.

    Raises:
      ValueError: it is not JSON, such as one that is cut off.
      OSError: the file cannot be read.

    Example:
      >>> import tempfile
      >>> from pathlib import Path
      >>> from sul_jax._files import read_json, write_json
      >>> file = Path(tempfile.mkdtemp()) / "numbers.json"
      >>> write_json(file, {"seeds": 3})
      >>> read_json(file)
      {'seeds': 3}
    """
    if default is not _NOTHING and not path.exists():
        return default
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is damaged or not JSON: {error}") from None
