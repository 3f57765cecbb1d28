"""A folder of files on local disk, gs:// or s3://, as far as a data set needs it.

Object stores are read through tensorstore, which Orbax brings along: one way for both, and it takes
the credentials that the machine has (Google's application default, AWS's default chain). Nothing of
it is imported for a local folder.
"""

import functools
import os
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from hqclip_jax.data.record import DatasetError

REQUESTS = 128  # under way at once: each waits some 50 ms, and 30,000 shards are asked for
CHUNK = 32 * 2**20
AHEAD = 4  # chunks of a file requested before the first is used


@functools.cache
def _store(url: str):
    """The key-value store of a gs:// or s3:// folder, one per process."""
    import tensorstore

    scheme, _, place = url.partition("://")
    bucket, _, key = place.partition("/")
    driver = {"gs": "gcs", "s3": "s3"}[scheme]
    spec = {"driver": driver, "bucket": bucket, "path": f"{key}/" if key else ""}
    if driver == "s3":  # AWS's own names for what its clients read from the environment
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
        spec |= {k: v for k, v in (("endpoint", endpoint), ("aws_region", region)) if v}
    # The default of 32 attempts would hold back a wrong bucket or a lost network for a quarter of
    # an hour.
    retries = {"max_retries": 6, "initial_delay": "500ms"}
    limits = {f"{driver}_request_concurrency": {"limit": REQUESTS}}
    context = tensorstore.Context(limits | {f"{driver}_request_retries": retries})
    return tensorstore.KvStore.open(spec, context=context).result()


@dataclass(frozen=True)
class Folder:
    """One folder; files are named relative to it.

    Attributes:
        path: a local path, gs://BUCKET/FOLDER or s3://BUCKET/FOLDER.
    """

    path: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", self.path.rstrip("/") or "/")

    @property
    def scheme(self) -> str:
        """What stands before `://`, gs or s3; empty for a local folder."""
        scheme = self.path.partition("://")[0]
        return scheme if scheme in ("gs", "s3") else ""

    def file(self, name: str) -> str:
        return f"{self.path}/{name}" if self.scheme else str(Path(self.path, name))

    def read(self, name: str) -> bytes | None:
        """A small file's content; None where there is no such file.

        Raises:
            DatasetError: the store can't be reached, or keeps its doors shut.
        """
        if not self.scheme:
            path = Path(self.path, name)
            return path.read_bytes() if path.is_file() else None
        found = self._ask(name, lambda store: store.read(name).result())
        return found.value if found.state == "value" else None

    def chunks(self, name: str, size: int) -> Iterator[bytes]:
        """The file's first `size` bytes in order, remote ones some chunks ahead.

        Raises:
            DatasetError: the file is missing or shorter, or the store can't be reached.
        """
        if not self.scheme:
            with open(self.file(name), "rb") as file:
                while chunk := file.read(CHUNK):
                    yield chunk
            return
        store = self._ask(name, lambda store: store)
        ranges = (slice(a, min(a + CHUNK, size)) for a in range(0, size, CHUNK))
        asked: deque = deque()
        for part in ranges:
            asked.append(store.read(name, byte_range=part))
            if len(asked) >= AHEAD:
                yield self._value(name, asked.popleft())
        while asked:
            yield self._value(name, asked.popleft())

    def differing(self, sizes: Mapping[str, int | None]) -> dict[str, str]:
        """Compares the files with what they should be; None for a size asks only whether it is
        there.

        Returns:
            What is wrong, by name, in the order asked: "is missing", "has 5 bytes", …
        """
        if self.scheme:
            states = self._remote_states(sizes)
        else:
            with ThreadPoolExecutor(32) as pool:  # on a network file system a stat is a round trip
                states = pool.map(self._local_state, sizes.items())
        return {name: state for name, state in zip(sizes, states) if state}

    def _local_state(self, item: tuple[str, int | None]) -> str:
        name, size = item
        try:
            found = os.stat(self.file(name)).st_size
        except FileNotFoundError:
            return "is missing"
        return "" if size in (None, found) else f"has {found:,} bytes"

    def _remote_states(self, sizes: Mapping[str, int | None]) -> list[str]:
        # Tensorstore's list has no sizes. A read from the last byte on has one byte where the size
        # is right, and costs a request; those run side by side.
        def ask(store) -> list[str]:
            last = (slice(s - 1, None) if s else slice(0, 1) for s in sizes.values())
            reads = [store.read(name, byte_range=part) for name, part in zip(sizes, last)]
            return [state(read) for read in reads]

        def state(read) -> str:
            try:
                found = read.result()
            except ValueError as e:
                if "OUT_OF_RANGE" not in str(e):
                    raise
                return "has fewer bytes"
            if found.state != "value":
                return "is missing"
            return "" if len(found.value) == 1 else "has more bytes"

        return self._ask("", ask)

    def _value(self, name: str, read) -> bytes:
        found = self._ask(name, lambda _: read.result())
        if found.state != "value":
            raise DatasetError(f"{self.file(name)} is missing: restore it")
        return found.value

    def _ask(self, name: str, question):
        try:
            return question(_store(self.path))
        except (ValueError, OSError, PermissionError, NotImplementedError) as e:
            raise DatasetError(
                f"{self.file(name)} can't be read: {e}. Look at the bucket's name, this machine's "
                "credentials and the network"
            ) from e
