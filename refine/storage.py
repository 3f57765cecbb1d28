"""Files that appear whole or not at all, and directories with one writer."""

import fcntl
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from refine.errors import RefineError


def write_json(path: Path, value: dict) -> None:
    partial = path.with_name(path.name + ".tmp")
    partial.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
    partial.replace(path)


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def locked(path: Path, wait: bool) -> Iterator[None]:
    """Holds a lock that ends with the process, however that ends.

    Raises:
        RefineError: another process holds it and `wait` is False.
    """
    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as e:
            raise RefineError(f"another run is writing to {path.parent}: wait for its end") from e
        except OSError as e:
            raise RefineError(f"{path} can't be locked ({e.strerror}): use a local disk") from e
        yield
