"""What `--input` means: tars, Parquet files and folders with a listing; local, gs:// or s3://."""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from refine.errors import RefineError
from refine.inputs import folders, parquet
from refine.inputs.fetch import copied, fetch
from refine.inputs.pairs import BROKEN, Pair, Skip, read_pairs
from refine.inputs.stores import Found, children, is_remote, look, matching, whole
from refine.inputs.tars import digest_of, relative_names

TAR, PARQUET, FOLDER = "tar", "parquet", "folder"
# In the order in which a directory's files are looked for: img2dataset puts a Parquet file of
# metadata beside each tar.
KINDS = {TAR: (".tar", ".tar.gz", ".tgz"), PARQUET: (".parquet",), FOLDER: folders.LISTINGS}
FOOTERS = 16  # read at once


@dataclass(frozen=True)
class Input:
    """What one part of the output is made from: a file, or a piece of a large one.

    Attributes:
        name: of the file, in records and in `skipped.jsonl`; independent of where the data lies.
        size: of the file, bytes.
        stamp: changes when the file does.
        kind: "tar", "parquet" or "folder" (a listing beside its images).
        address: a local path, gs://BUCKET/KEY or s3://BUCKET/KEY.
        piece: the first and one past the last of the row groups (Parquet) or bytes (a listing) that
            it reads; None for all.
        images: the folder of a listing's images.
    """

    name: str
    size: int
    stamp: str
    kind: str
    address: str
    piece: tuple[int, int] | None = None
    images: str = ""

    def pairs(self) -> Iterator[Pair | Skip]:
        """Streams the pairs in order; memory does not grow with the file.

        A remote file must be made `local` first.

        Raises:
            RefineError: the file can't be opened, is compressed, lacks a column or has changed.
        """
        if is_remote(self.address):
            raise ValueError(f"{self.address} is not local: take the pairs of what local() gives")
        if self.kind == FOLDER:
            return folders.read_rows(Path(self.address), self.images, self.name, self.piece)
        if self.kind == PARQUET:
            return parquet.read_rows(Path(self.address), self.name, self.piece)
        return read_pairs(Path(self.address), self.name)

    def count(self, limit: int) -> int:
        """How many pairs it holds, up to `limit`: what can't be used counts, a break does not."""
        number, items = 0, self.pairs()
        while number < limit and (item := next(items, None)) is not None:
            number += not (isinstance(item, Skip) and item.reason in BROKEN)
        items.close()
        return number

    def local(self, scratch: Path) -> "Input":
        """The same input with its file on this machine, to be read as often as needed.

        A remote file is copied into `scratch`, unless it is there: whole or not at all, whatever is
        killed, and by one process where several ask. The images of a remote listing stay where they
        lie, and are read from there.

        Raises:
            RefineError: it has changed, or the store refuses or can't be reached for minutes.
        """
        if not is_remote(self.address):
            return self
        return replace(self, address=str(fetch(self._file, scratch)))

    def release(self, scratch: Path) -> None:
        """Removes the copy that `local` made of this input, when no process reads it any more; one
        of a listing stays for its other pieces."""
        if is_remote(self.address) and self.kind != FOLDER:
            copied(self._file, scratch).unlink(missing_ok=True)

    @property
    def _file(self) -> Found:
        return Found(self.address, self.size, self.stamp)


def find(given: Sequence[str]) -> list[Input]:
    """The inputs meant by files, globs and folders, each once, in the order given (sorted inside a
    folder or glob).

    A folder means its tars, else its Parquet files, else the one listing in it. Large Parquet files
    and listings give several inputs.

    Raises:
        RefineError: an argument matches nothing or is of no known kind, a store can't be reached,
            or a listing can't be used.
    """
    found: dict[str, tuple[str, Found]] = {}
    for argument in given:
        for kind, file in _files(argument):
            found.setdefault(whole(file.address), (kind, file))
    names = relative_names(list(found))
    with ThreadPoolExecutor(FOOTERS) as pool:
        cut = list(pool.map(lambda item: _pieces(*item), found.values()))
    return [
        Input(name, file.size, file.stamp, kind, file.address, *piece)
        for name, (kind, file), pieces in zip(names, found.values(), cut)
        for piece in pieces
    ]


def fingerprint(inputs: Sequence[Input], times: bool = False) -> dict:
    """How many files, their bytes, and a digest of names and sizes (with times: of stamps too),
    equal to that of `refine.inputs.tars.fingerprint` for local tars."""
    sizes = {i.address: i.size for i in inputs}
    rows = ((f"{i.name}{list(i.piece) if i.piece else ''}", i.size, i.stamp) for i in inputs)
    return {
        "files": len(sizes),
        "bytes": sum(sizes.values()),
        "sha256": digest_of(rows, times),
    }


def _files(argument: str) -> list[tuple[str, Found]]:
    """The files that an argument means, and their kinds."""
    found = look(argument)
    if found is None:
        matches = matching(argument)
        if not matches:
            raise RefineError(f"--input {argument}: no such file, and nothing matches it")
    else:
        matches = [found]
    files = []
    for match in matches:
        if match.folder:
            files += _inside(match.address, argument)
        elif kind := _kind(match.address):
            files.append((kind, match))
        else:
            raise RefineError(
                f"--input {argument}: {match.address} is of no known kind: expected *.tar, "
                "*.parquet, or a listing (*.csv, *.tsv, *.jsonl) beside its images"
            )
    return files


def _inside(folder: str, argument: str) -> list[tuple[str, Found]]:
    files = children(folder)
    for kind in KINDS:
        matches = [file for file in files if _kind(file.address) == kind]
        if kind == FOLDER and len(matches) > 1:
            names = ", ".join(os.path.basename(file.address) for file in matches)[:2000]
            raise RefineError(
                f"--input {argument}: {folder} holds several listings ({names}): name one of them"
            )
        if matches:
            return [(kind, file) for file in matches]
    raise RefineError(
        f"--input {argument}: the directory holds no *.tar, no *.parquet and no listing (*.csv, "
        "*.tsv, *.jsonl)"
    )


def _kind(address: str) -> str | None:
    return next((kind for kind, ends in KINDS.items() if address.lower().endswith(ends)), None)


def _pieces(kind: str, file: Found) -> list[tuple]:
    """What `Input` has after its address, for each piece of a file."""
    if kind == FOLDER:
        cut = folders.pieces(file)
        if not cut:
            raise RefineError(f"{file.address} lists no image")
        return [(piece, os.path.dirname(file.address) or ".") for piece in cut]
    return [(piece,) for piece in parquet.pieces(file)] if kind == PARQUET else [()]
