"""A folder of pictures as a list: what lies in it and in its tars, and how to read one of them.

Nothing is decoded here. Names are what the file system says, bytes that are no UTF-8 included (as
Python's surrogate escapes), so they are for `open`; for people there is `printable`.
"""

import os
import stat
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")
MAX_BYTES = 512 * 2**20  # of one picture's file: twice the largest that `data.image` decodes, raw


class PictureError(ValueError):
    """A picture that can't be read; `reason` is the same few words for all of a kind."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture on a disk. Two that are equal hold the same bytes, as far as size and time tell.

    Attributes:
        path: of the file, relative to the folder.
        size, mtime_ns: of the file.
        member: the name inside, where the file is a tar; else empty.
        start, length: where in the file its bytes are.
    """

    path: str
    size: int
    mtime_ns: int
    member: str
    start: int
    length: int

    @property
    def key(self) -> tuple[str, str]:
        return self.path, self.member

    @property
    def name(self) -> str:
        return f"{self.path}:{self.member}" if self.member else self.path

    def read(self, root: Path) -> bytes:
        """The encoded picture.

        Raises:
            PictureError: too large, cut short, gone, or another one since it was listed.
        """
        if self.length > MAX_BYTES:
            raise PictureError("file too large", f"{self.length:,} bytes, more than {MAX_BYTES:,}")
        try:
            with (root / self.path).open("rb") as file:
                now = os.fstat(file.fileno())
                if (now.st_size, now.st_mtime_ns) != (self.size, self.mtime_ns):
                    raise PictureError("changed since it was listed")
                file.seek(self.start)
                encoded = file.read(self.length)
        except OSError as e:
            raise PictureError("unreadable file", e.strerror or str(e)) from e
        if len(encoded) < self.length:
            raise PictureError("cut short", f"{len(encoded):,} of {self.length:,} bytes")
        return encoded


@dataclass(frozen=True)
class Skip:
    """What was left out, and why."""

    name: str
    reason: str
    detail: str = ""


class Walk:
    """The pictures of a folder and all below it, in the order of their names.

    Names that begin with a dot are passed over, and links to folders are not followed: they may
    lead in circles. Of a name that a tar has twice, the last one counts, as for `tar` itself.

    Attributes:
        skipped: folders and tars that can't be read.
        others: number of files whose suffix is neither a picture's nor a tar's.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.skipped: list[Skip] = []
        self.others = 0

    def __iter__(self) -> Iterator[Picture]:
        self.skipped, self.others = [], 0
        yield from self._folder("")

    def _folder(self, relative: str) -> Iterator[Picture]:
        try:
            with os.scandir(self.root / relative) as entries:
                entries = sorted((e for e in entries if e.name[0] != "."), key=lambda e: e.name)
        except OSError as e:
            self.skipped.append(Skip(relative or ".", "unreadable folder", e.strerror or str(e)))
            return
        for entry in entries:
            path = os.path.join(relative, entry.name)
            if entry.is_dir(follow_symlinks=False):
                yield from self._folder(path)
            elif entry.name.lower().endswith((*SUFFIXES, ".tar")):
                yield from self._file(path)
            else:
                self.others += 1

    def _file(self, path: str) -> Iterator[Picture]:
        try:
            found = os.stat(self.root / path)
        except OSError as e:
            self.skipped.append(Skip(path, "unreadable file", e.strerror or str(e)))
            return
        if not stat.S_ISREG(found.st_mode):  # opening a pipe would wait for ever
            self.skipped.append(Skip(path, "no regular file"))
        elif path.lower().endswith(".tar"):
            yield from self._tar(path, found)
        else:
            yield Picture(path, found.st_size, found.st_mtime_ns, "", 0, found.st_size)

    def _tar(self, path: str, found: os.stat_result) -> Iterator[Picture]:
        members: dict[str, Picture] = {}
        try:
            with tarfile.open(self.root / path, "r:") as tar:
                for member in tar:
                    if not (member.isreg() and not member.issparse()):
                        continue
                    if member.name.lower().endswith(SUFFIXES):
                        members[member.name] = Picture(
                            path, found.st_size, found.st_mtime_ns,
                            member.name, member.offset_data, member.size,
                        )  # fmt: skip
                end = tar.offset
            with (self.root / path).open("rb") as file:
                file.seek(end)
                # `tarfile` takes a broken header, or no more bytes, for a complete archive's end.
                if file.read(1024) != bytes(1024):
                    raise tarfile.ReadError(f"no end after byte {end:,}")
        except (tarfile.TarError, OSError, ValueError) as e:
            # What stands before the damage is read all the same.
            reason = "broken tar, or none"
            self.skipped.append(Skip(path, reason, f"{e}; {len(members)} pictures found in it"))
        yield from members.values()


def printable(name: str) -> str:
    """A name for a terminal or a log: what can't be seen or acts there is shown by its code."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name)
