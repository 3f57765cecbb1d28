"""Files on local disk, gs:// and s3://: what is there, and whom to ask for it.

Object stores are read through pyarrow, which tensorflow-datasets brings along: its listings tell
sizes and times (tensorstore's tell names alone), and Parquet needs it anyway. It is imported only
where an address asks for it, and finds the credentials that the machine has.
"""

import functools
import glob
import os
import re
import stat
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from fnmatch import fnmatchcase
from typing import TypeVar

from refine.errors import RefineError

CONNECT_SECONDS, REQUEST_SECONDS = 5, 20
# Seconds between attempts in the middle of a run, which outlives two minutes without network; what
# a person waits for at its start is tried by the client library alone.
PAUSES = (1, 2, 4, 8, 16, 32, 60)
REFUSED = re.compile(
    "ACCESS_DENIED|PERMISSION_DENIED|UNAUTHENTICATED|INVALID_ACCESS|NO_SUCH_BUCKET"
)
MAGIC = re.compile(r"[*?[]")
T = TypeVar("T")


@dataclass(frozen=True)
class Found:
    """A file or folder.

    Attributes:
        address: a local path, gs://BUCKET/KEY or s3://BUCKET/KEY.
        size: bytes; 0 for a folder.
        stamp: changes when the file does: nanoseconds of its modification, seconds where remote.
        folder: whether it is one.
    """

    address: str
    size: int = 0
    stamp: str = ""
    folder: bool = False


def is_remote(address: str) -> bool:
    return address.startswith(("gs://", "s3://"))


def whole(address: str) -> str:
    """One absolute name for each file, however it was given; remote ones begin with /gs: or /s3:"""
    if is_remote(address):
        return "/" + address.replace("://", ":/", 1)
    return os.path.realpath(address)


def look(address: str, pauses: Sequence[float] = ()) -> Found | None:
    """What lies at an address, or None; a store that fails is asked again after each pause.

    Raises:
        RefineError: the store can't be reached or refuses, or the file may not be read.
    """
    if is_remote(address):
        store, path = client(address)
        if "/" not in path:  # asking for a bucket itself takes a right that few readers have
            return Found(address, folder=True)
        return _described(address, ask(address, lambda: store.get_file_info(path), pauses))
    try:
        found = os.stat(address)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as e:
        raise RefineError(f"{address} can't be read: {e}") from e
    if stat.S_ISDIR(found.st_mode):
        return Found(address, folder=True)
    return Found(address, found.st_size, str(found.st_mtime_ns))


def children(address: str) -> list[Found]:
    """The files directly inside a folder, sorted by name.

    Raises:
        RefineError: as `look`.
    """
    if is_remote(address):
        found = _listed(address.rstrip("/"))
    else:
        try:
            names = os.listdir(address)
        except OSError as e:
            raise RefineError(f"{address} can't be read: {e.strerror}") from e
        found = [look(os.path.join(address, name)) for name in names]
    return sorted((f for f in found if f and not f.folder), key=lambda f: f.address)


def matching(pattern: str) -> list[Found]:
    """The files and folders that a pattern of *, ?, [abc] and ** matches, sorted by name.

    Raises:
        RefineError: as `look`.
    """
    if is_remote(pattern):
        found = _globbed(pattern)
    else:
        found = [look(name) for name in glob.glob(pattern, recursive=True)]
    return sorted((f for f in found if f), key=lambda f: f.address)


def client(address: str) -> tuple:
    """pyarrow's file system for a remote address, and the address as it wants it: BUCKET/KEY.

    Raises:
        RefineError: the address names no bucket, or its region can't be found out.
    """
    scheme, _, path = address.partition("://")
    bucket = path.partition("/")[0]
    if not bucket:
        raise RefineError(f"{address} names no bucket: give one as gs://BUCKET or s3://BUCKET")
    return _store(scheme, bucket), path.rstrip("/")


def ask(address: str, question: Callable[[], T], pauses: Sequence[float] = ()) -> T:
    """Asks a store, and again after each pause (seconds) if it fails.

    Raises:
        FileNotFoundError: there is no such file.
        RefineError: it refuses, or still fails.
    """
    for pause in (*pauses, None):
        try:
            return question()
        except (FileNotFoundError, RefineError):
            raise
        except (OSError, ValueError) as e:
            if pause is None or isinstance(e, ValueError) or REFUSED.search(str(e)):
                raise RefineError(
                    f"{address} can't be read: {e}. Look at the bucket's name, this machine's "
                    "credentials and the network, and run the same command again"
                ) from e
            time.sleep(pause)
    raise AssertionError("the last attempt returns or raises")


@functools.cache
def _store(scheme: str, bucket: str):
    """The client for a bucket, one per process."""
    from pyarrow import fs

    if scheme == "gs":
        limit = timedelta(seconds=REQUEST_SECONDS)
        standin = os.environ.get("CLOUD_STORAGE_EMULATOR_ENDPOINT")
        if standin:
            kind, _, place = standin.rpartition("://")
            return fs.GcsFileSystem(
                anonymous=True,
                scheme=kind or "http",
                endpoint_override=place,
                retry_time_limit=limit,
            )
        return fs.GcsFileSystem(retry_time_limit=limit)
    # AWS's own names for what its clients read from the environment; pyarrow's does not.
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if not region and not endpoint:
        region = ask(f"s3://{bucket}", lambda: fs.resolve_s3_region(bucket))
    retries = fs.AwsStandardS3RetryStrategy(max_attempts=5)
    return fs.S3FileSystem(
        region=region or "us-east-1",
        endpoint_override=endpoint,
        connect_timeout=CONNECT_SECONDS,
        retry_strategy=retries,
    )


def _described(address: str, info) -> Found | None:
    from pyarrow.fs import FileType

    if info.type == FileType.NotFound:
        return None
    if info.type == FileType.Directory:
        return Found(address, folder=True)
    # Seconds: some stores list finer times than they tell of one object.
    stamp = "" if info.mtime_ns is None else str(info.mtime_ns // 10**9)
    return Found(address, info.size, stamp)


def _listed(folder: str, recursive: bool = False) -> list[Found]:
    from pyarrow.fs import FileSelector

    store, path = client(folder)
    selector = FileSelector(path, allow_not_found=True, recursive=recursive)
    scheme = folder.partition("://")[0]
    infos = ask(folder, lambda: store.get_file_info(selector))
    return [_described(f"{scheme}://{info.path}", info) for info in infos]


def _globbed(pattern: str) -> list[Found]:
    """What fits a remote pattern, out of all that lies below its part without magic."""
    magic = MAGIC.search(pattern)
    if not magic:
        return []
    base = pattern[: magic.start()].rpartition("/")[0]
    parts = pattern[len(base) + 1 :].rstrip("/").split("/")
    folders = pattern.endswith("/")
    # Stores know no folders, and gs:// lists none, so they are told from what lies below them; only
    # a pattern with an extension means files right here.
    below = folders or len(parts) > 1 or not os.path.splitext(parts[0])[1]
    found: dict[str, Found] = {}
    for file in _listed(base, recursive=below):
        names = file.address[len(base) + 1 :].split("/")
        if _fits(names, parts):
            found[file.address] = file
        for depth in range(1, len(names)):
            if _fits(names[:depth], parts):
                address = "/".join([base, *names[:depth]])
                found[address] = Found(address, folder=True)
    return [file for file in found.values() if file.folder or not folders]


def _fits(names: Sequence[str], parts: Sequence[str]) -> bool:
    if not parts:
        return not names
    if parts[0] == "**":
        return any(_fits(names[n:], parts[1:]) for n in range(len(names) + 1))
    return bool(names) and fnmatchcase(names[0], parts[0]) and _fits(names[1:], parts[1:])
