"""Folders that appear whole or not at all, and JSON that is told from damage."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hqclip_jax.formats.described import FormatError


@contextmanager
def new_folder(out: str | Path) -> Iterator[Path]:
    """A folder beside `out` that takes its name when the block is left without an error, and goes
    otherwise.

    Raises:
        FormatError: `out` exists and is not an empty folder.
    """
    out = Path(out).absolute()
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise FormatError(f"--out={out} exists: name a new folder, or remove that one")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    partial.mkdir()
    try:
        yield partial
        if out.exists():
            out.rmdir()
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def read_json(path: Path) -> dict[str, Any]:
    """Raises:
    FormatError: no such file, or no JSON object in it.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise FormatError(f"{path} can't be read as JSON: {e}") from e
    if not isinstance(content, dict):
        raise FormatError(f"{path} holds no JSON object")
    return content
