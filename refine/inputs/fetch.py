"""The bytes of files on local disk, gs:// and s3://, and local copies of remote ones.

Remote files are read as streams alone: pyarrow's gs:// files with random access begin a download of
the whole when they are opened, and hold Python's lock while they wait for it.
"""

import hashlib
import io
import os
import tempfile
from pathlib import Path
from typing import BinaryIO

from refine.errors import RefineError
from refine.inputs.stores import PAUSES, Found, ask, client, is_remote, look
from refine.storage import locked

BUFFER = 1 << 20
CHUNK = 16 << 20


def open_file(file: Found) -> BinaryIO:
    """Opens a file for reading at any place; a remote one is downloaded first.

    Raises:
        RefineError: it can't be read, or is another than was found.
    """
    if is_remote(file.address):
        target = tempfile.TemporaryFile()  # noqa: SIM115 (the caller closes it)
        try:
            _download(file, target)
        except BaseException:
            target.close()
            raise
        target.seek(0)
        return target
    _check(file)
    try:
        return open(file.address, "rb", buffering=BUFFER)
    except OSError as e:
        raise RefineError(f"{file.address} can't be opened: {e.strerror}") from e


def read(address: str) -> bytes | None:
    """The content of a remote file, or None where there is none.

    Raises:
        RefineError: the store refuses, or can't be reached for minutes.
    """
    target = io.BytesIO()
    try:
        ask(address, lambda: _stream(address, target), PAUSES)
    except FileNotFoundError:
        return None
    return target.getvalue()


def fetch(file: Found, scratch: Path) -> Path:
    """A local copy of a remote file.

    It is whole or not there, whatever is killed. Processes that ask for the same copy wait for the
    first.

    Raises:
        RefineError: it can't be read, or is another than was found; the disk is full.
    """
    copy = copied(file, scratch)
    scratch.mkdir(parents=True, exist_ok=True)
    with locked(copy.with_name(f"{copy.name}.lock"), wait=True):
        if not copy.exists():
            partial = copy.with_name(f"{copy.name}.partial")
            with open(partial, "wb") as target:
                _download(file, target)
            partial.replace(copy)
    return copy


def copied(file: Found, scratch: Path) -> Path:
    """Where `fetch` puts its copy."""
    asked = hashlib.sha256(repr((file.address, file.size, file.stamp)).encode())
    return scratch / (asked.hexdigest()[:32] + os.path.splitext(file.address)[1])


def _check(file: Found) -> None:
    now = look(file.address, PAUSES)
    if now != file:
        what = "changed since the run began" if now else "gone"
        raise RefineError(f"{file.address} has {what}: restore it, or choose another --output")


def _download(file: Found, target: BinaryIO) -> None:
    _check(file)

    def whole() -> None:
        size = _stream(file.address, target)
        if size != file.size:  # a connection that broke off is not always told
            raise OSError(f"{size:,} of {file.size:,} bytes came")

    try:
        ask(file.address, whole, PAUSES)
    except FileNotFoundError as e:
        raise RefineError(f"{file.address} has gone: restore it") from e


def _stream(address: str, target: BinaryIO) -> int:
    """Writes a remote file over what the target holds; returns its bytes."""
    store, path = client(address)
    target.seek(0)
    target.truncate()
    with store.open_input_stream(path) as stream:
        while data := stream.read(CHUNK):
            try:
                target.write(data)
            except OSError as e:  # no reason to ask the store again
                raise RefineError(f"{address} can't be copied to this disk: {e.strerror}") from e
    return target.tell()
