"""Pairs from a folder of image files with a listing beside them: CSV, TSV or JSONL.

The listing names each image by its path inside the folder, as Hugging Face's and OpenCLIP's do.
Such a path comes from outside, and must not lead out of the folder.
"""

import csv
import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from hqclip_jax.data.text import clean
from refine.errors import RefineError
from refine.inputs.fetch import open_file, read
from refine.inputs.pairs import CAPTION_COLUMNS, UID_COLUMNS, Pair, Skip, uid_of
from refine.inputs.stores import Found, is_remote

LISTINGS = (".csv", ".tsv", ".jsonl")
PATH_COLUMNS = ("file_name", "image", "path", "filepath")
PIECE_ROWS = 10_000
LINE_BYTES = 1 << 20
AHEAD = 16  # images asked for before the first is used: each waits for a disk or a network


class _RowError(Exception):
    """A row that is no pair; `reason` is its key in the counts."""

    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason = reason


@dataclass(frozen=True)
class _Row:
    path: str
    caption: str
    uid: object


def pieces(listing: Found) -> list[tuple[int, int]]:
    """Cuts a listing into spans of bytes that hold 10,000 rows each, the last fewer.

    Raises:
        RefineError: it can't be read, is in no UTF-8, or lacks a column.
    """
    found: list[tuple[int, int]] = []
    with open_file(listing) as file:
        lines, rows = _open_rows(file, listing.address)
        start, number = lines.at, 0
        for number, _ in enumerate(rows, 1):
            if number % PIECE_ROWS == 0:
                found.append((start, lines.at))
                start = lines.at
    return [*found, (start, listing.size)] if number % PIECE_ROWS else found


def read_rows(path: Path, root: str, source: str, piece: tuple[int, int]) -> Iterator[Pair | Skip]:
    """Streams the pairs that a piece of a listing names, in order, some images ahead.

    A row that can't be read, or leads out of the folder, yields a Skip "malformed_row"; one whose
    image is not there "missing_image".

    Args:
        path: the listing, a local file.
        root: the folder of its images; local, gs:// or s3://.
        source: the listing's name in records and in `skipped.jsonl`.
        piece: first byte and one past the last.

    Raises:
        RefineError: the listing can't be opened, or the images' store can't be reached.
    """
    try:
        opened = open(path, "rb")  # noqa: SIM115 (closed below)
    except OSError as e:
        raise RefineError(f"{path} can't be opened: {e.strerror}") from e
    pending: deque[Future] = deque()
    with opened as file, ThreadPoolExecutor(AHEAD) as pool:
        for row in _open_rows(file, str(path), piece)[1]:
            pending.append(pool.submit(_load, row, root, source))
            if len(pending) == AHEAD:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _load(row: _Row | _RowError, root: str, source: str) -> Pair | Skip:
    if isinstance(row, _RowError):
        return Skip(row.reason, source, detail=str(row))
    try:
        image = _image(root, row.path)
    except _RowError as e:
        uid = uid_of(row.uid, None, "")
        return Skip(e.reason, source, row.path[:200], uid, str(e))
    uid = uid_of(row.uid, image, row.caption)
    return Pair(uid, image, clean(row.caption), source, row.path)


def _image(root: str, path: str) -> bytes:
    """The bytes of an image.

    Raises:
        _RowError: "malformed_row" for a path that leads out of the folder, "missing_image".
    """
    inside = PurePosixPath(path)
    if inside.is_absolute() or ".." in inside.parts or not inside.parts or "\0" in path:
        raise _RowError("malformed_row", "the path leads out of the folder")
    if is_remote(root):
        data = read(f"{root}/{inside}")
        if data is None:
            raise _RowError("missing_image", "no such file")
        return data
    try:
        file = Path(root, inside).resolve()
        if not file.is_relative_to(Path(root).resolve()):
            raise _RowError("malformed_row", "the path is a link that leads out of the folder")
        if not file.is_file():  # a pipe would never end
            raise _RowError("missing_image", "no such file")
        return file.read_bytes()
    except (OSError, RuntimeError, ValueError) as e:  # too long, a loop of links, no such encoding
        raise _RowError("missing_image", f"{type(e).__name__}: {e}"[:500]) from e


class _Lines:
    """Lines of a file up to a byte, as text; `at` is the byte where the next one begins."""

    def __init__(self, file: BinaryIO, start: int, stop: int):
        self._file, self.at, self._stop = file, start, stop
        file.seek(start)

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        line = self._next() if self.at < self._stop else b""
        if not line:
            raise StopIteration
        if len(line) == LINE_BYTES and not line.endswith(b"\n"):
            while (more := self._next()) and not more.endswith(b"\n"):
                pass
            raise _RowError("malformed_row", f"a line of more than {LINE_BYTES:,} bytes")
        return line.decode("utf-8", "replace")

    def _next(self) -> bytes:
        line = self._file.readline(LINE_BYTES)
        self.at += len(line)
        return line


def _open_rows(
    file: BinaryIO, name: str, piece: tuple[int, int] | None = None
) -> tuple[_Lines, Iterator[_Row | _RowError]]:
    """A listing's lines, and the rows that they hold: all, or those of a piece.

    Raises:
        RefineError: it is in no UTF-8, or lacks a column.
    """
    mark = file.read(3)
    if mark.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise RefineError(f"{name} is in UTF-16: save it as UTF-8")
    begin = 3 if mark == b"\xef\xbb\xbf" else 0
    size = file.seek(0, os.SEEK_END)
    head = _Lines(file, begin, size)
    try:
        first = next(head, "")
    except _RowError:
        first = ""
    if name.lower().endswith(".jsonl"):
        with suppress(_RowError):  # one bad line among others
            _require(name, list(_object(first) or PATH_COLUMNS + CAPTION_COLUMNS))
        lines = _Lines(file, *(piece or (begin, size)))
        return lines, _rows(lines, lambda: _object(next(lines)))
    delimiter = "\t" if "\t" in first else ","
    try:
        columns = next(csv.reader([first], delimiter=delimiter), [])
    except csv.Error as e:
        raise RefineError(f"{name} is no CSV: {e}") from e
    columns = [column.strip().lower() for column in columns]
    _require(name, columns)
    lines = _Lines(file, *(piece or (head.at, size)))
    fields = csv.reader(lines, delimiter=delimiter)
    return lines, _rows(lines, lambda: _named(columns, next(fields)))


def _require(name: str, columns: Sequence[str]) -> None:
    for wanted in (PATH_COLUMNS, CAPTION_COLUMNS):
        if not set(wanted) & set(columns):
            raise RefineError(
                f"{name} has no column {' or '.join(wanted)}: it holds "
                f"{', '.join(columns)[:2000] or 'none'}"
            )


def _rows(lines: _Lines, following: Callable[[], dict | None]) -> Iterator[_Row | _RowError]:
    """Rows until `following` stops; None is a blank line, and an error costs one row."""
    while True:
        at = lines.at
        try:
            fields = following()
            if fields is not None:
                yield _row(fields)
        except StopIteration:
            return
        except (_RowError, csv.Error) as e:
            yield _RowError("malformed_row", f"at byte {at:,}: {e}"[:500])


def _object(line: str) -> dict | None:
    """A line of JSONL, its keys in lower case; None for a blank one.

    Raises:
        _RowError: it is no JSON object.
    """
    if not line.strip():
        return None
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as e:
        raise _RowError("malformed_row", str(e)) from e
    if not isinstance(value, dict):
        raise _RowError("malformed_row", f"a {type(value).__name__}, no object")
    found: dict = {}
    for name, held in value.items():
        found.setdefault(name.lower(), held)
    return found


def _named(names: Sequence[str], values: Sequence[str]) -> dict | None:
    """A row of CSV by its columns' names; None for a blank one.

    Raises:
        _RowError: it has more or fewer fields than there are columns.
    """
    if not values:
        return None
    if len(values) != len(names):
        raise _RowError("malformed_row", f"{len(values)} fields, {len(names)} columns")
    return dict(zip(names, values))


def _row(fields: dict) -> _Row:
    path, caption, uid = (
        next((fields[name] for name in names if name in fields), None)
        for names in (PATH_COLUMNS, CAPTION_COLUMNS, UID_COLUMNS)
    )
    if not isinstance(path, str) or not path:
        raise _RowError("malformed_row", f"the image's path is {path!r}"[:200])
    if not isinstance(caption, str | None):
        raise _RowError("malformed_row", f"caption is a {type(caption).__name__}, not a string")
    return _Row(path, caption or "", uid)
