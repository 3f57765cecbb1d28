"""Tars: which files an argument means, and what one holds, from its headers alone.

The standard library's `tarfile` keeps every member in memory and takes a header it can't read for
the end of the archive; here memory does not grow with the tar, and a cut is told.
"""

import glob
import hashlib
import os
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from refine.errors import RefineError

BLOCK = 512
BUFFER = 1 << 20
COMPRESSED = {
    b"\x1f\x8b": "gunzip",
    b"BZh": "bunzip2",
    b"\xfd7zXZ": "unxz",
    b"\x28\xb5\x2f\xfd": "unzstd",
}


class BrokenTar(Exception):
    """The tar can't be read from some byte on; what came before is good."""


@dataclass(frozen=True)
class Member:
    """A regular file inside a tar: its name, first byte and bytes."""

    name: str
    offset: int
    size: int


def expand(given: Sequence[str], option: str) -> list[Path]:
    """The files meant by tar names, globs and directories of tars, each once, in the order given
    (sorted inside a directory or glob).

    Raises:
        RefineError: an argument matches nothing.
    """
    found: dict[Path, Path] = {}
    for argument in given:
        path = Path(argument)
        if path.is_dir():
            matches = sorted(p for s in ("*.tar", "*.tar.gz", "*.tgz") for p in path.glob(s))
            if not matches:
                raise RefineError(f"{option} {argument}: the directory holds no *.tar")
        elif path.exists():
            matches = [path]
        else:
            matches = [Path(p) for p in sorted(glob.glob(argument, recursive=True))]
            if not matches:
                raise RefineError(f"{option} {argument}: no such file, and nothing matches it")
        for match in matches:
            found.setdefault(match.resolve(), match)
    return list(found.values())


def short_names(paths: Sequence[Path]) -> list[str]:
    """Names relative to the folder that all paths share, so that they don't depend on where the
    data lies."""
    return relative_names([str(path.resolve()) for path in paths])


def relative_names(whole: Sequence[str]) -> list[str]:
    """The same of absolute names, which need not be of files on this machine."""
    common = os.path.commonpath({os.path.dirname(name) for name in whole})
    names = [os.path.relpath(name, common) for name in whole]
    return [os.fsencode(name).decode("utf-8", "replace") for name in names]


def fingerprint(paths: Sequence[Path], times: bool = False) -> dict:
    """How many files, their bytes, and a digest of names and sizes (with times: of mtimes too)."""
    stats = [path.stat() for path in paths]
    rows = ((n, s.st_size, s.st_mtime_ns) for n, s in zip(short_names(paths), stats, strict=True))
    return {
        "files": len(paths),
        "bytes": sum(stat.st_size for stat in stats),
        "sha256": digest_of(rows, times),
    }


def digest_of(rows: Iterable[tuple[str, int, int | str]], times: bool) -> str:
    """The digest in a fingerprint, of each file's name, bytes and time of change."""
    digest = hashlib.sha256()
    for name, size, time in rows:
        digest.update(f"{name}\t{size}\t{time if times else ''}\n".encode())
    return digest.hexdigest()


def open_tar(path: Path) -> BinaryIO:
    """Opens an uncompressed tar.

    Raises:
        RefineError: the file can't be opened, or is compressed and so can't be read at an offset.
    """
    try:
        file = open(path, "rb", buffering=BUFFER)  # noqa: SIM115 (the caller closes it)
    except OSError as e:
        raise RefineError(f"{path} can't be opened: {e.strerror}") from e
    start = file.peek(8)
    for magic, tool in COMPRESSED.items():
        if start.startswith(magic):
            file.close()
            raise RefineError(
                f"{path} is compressed, and a compressed tar can't be read at an offset: "
                f"run `{tool}` on it first"
            )
    return file


def members(file: BinaryIO) -> Iterator[Member]:
    """The regular files of a tar, in order; the caller may move the file's position meanwhile.

    Reads ustar, GNU (long names) and pax headers. Blocks of zeros are passed over, so that tars
    put behind one another with `cat` are read to the last.

    Raises:
        BrokenTar: a header is invalid, or the file ends before the archive does.
    """
    end = os.fstat(file.fileno()).st_size
    position, ended, extra = 0, False, {}
    while position < end:
        file.seek(position)
        block = file.read(BLOCK)
        position += BLOCK
        if not block.strip(b"\0"):
            ended = True
            continue
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "replace")
            size = int(extra.get("size", info.size))
        except (tarfile.HeaderError, ValueError) as e:
            raise BrokenTar(f"no tar header at byte {position - BLOCK:,}") from e
        if size < 0:
            raise BrokenTar(f"a negative size at byte {position - BLOCK:,}")
        has_data = info.isreg() or info.type not in tarfile.SUPPORTED_TYPES
        has_data = has_data or info.type in (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
        stored = size if has_data else 0
        name = extra.get("path", info.name)
        if position + stored > end:
            raise BrokenTar(f"the file ends at byte {end:,}, inside {name!r}")
        if info.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
            extra |= _pax_fields(file.read(min(stored, BUFFER)))
        elif info.type == tarfile.GNUTYPE_LONGNAME:
            extra["path"] = file.read(min(stored, BUFFER)).rstrip(b"\0").decode("utf-8", "replace")
        elif info.type not in (tarfile.GNUTYPE_LONGLINK, tarfile.XGLTYPE):
            if info.type in (tarfile.REGTYPE, tarfile.AREGTYPE):
                yield Member(name, position, size)
            extra = {}
        position += -(-stored // BLOCK) * BLOCK
        ended = False
    if not ended:
        raise BrokenTar(f"the file ends at byte {end:,} with no end-of-archive mark")


def _pax_fields(data: bytes) -> dict[str, str]:
    """`path` and `size` of a pax header: records of "LENGTH KEY=VALUE\\n"."""
    fields = {}
    while data:
        length = data.split(b" ", 1)[0]
        if not length.isdigit() or not 0 < int(length) <= len(data):
            raise BrokenTar("a pax header can't be read")
        key, _, value = data[len(length) + 1 : int(length) - 1].partition(b"=")
        if key in (b"path", b"size"):
            fields[key.decode()] = value.decode("utf-8", "replace")
        data = data[int(length) :]
    return fields
