"""Shards of an object store, kept on local disk.

A shard is fetched whole, once per host: under a lock that ends with its process, into a file that
gets its name when size and hash are right. Its name holds the hash, so that a data set written anew
under the same address is fetched anew. The files' times of modification say when they were last
read.
"""

import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from hqclip_jax.data.folder import Folder
from hqclip_jax.data.record import DatasetError, Shard

LOCKS = 256  # shards share lock files; a chance meeting makes one wait for the other
GB = 1e9


@dataclass(frozen=True)
class ShardCache:
    """Fetched shards in a directory that all processes of a host share.

    Attributes:
        directory: on a local disk.
        gb: size that its files may have together, in 10⁹ bytes.
    """

    directory: Path
    gb: float
    _claimed: dict[str, int] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "directory", Path(self.directory).expanduser())

    def reserve(self, folder: Folder, size: int) -> None:
        """Says at start that `size` bytes of a folder will be asked for again and again.

        Raises:
            DatasetError: the cache or its disk can't hold them beside what was reserved before. A
                shuffle over the whole would then fetch a shard of hundreds of megabytes for nearly
                every record.
        """
        self._claimed[folder.path] = size
        wanted = sum(self._claimed.values())
        names = ", ".join(self._claimed)
        if wanted > self.gb * GB:
            raise DatasetError(
                f"{names}: {wanted / GB:,.1f} GB do not fit in data.cache_gb={self.gb:g}, and a "
                "shuffle over the whole would fetch whole shards for single records: raise it, "
                "copy the data to a disk or gs://, or mount the bucket and name the mount"
            )
        self.directory.mkdir(parents=True, exist_ok=True)
        room = shutil.disk_usage(self.directory).free + sum(s.st_size for _, s in self._files())
        if wanted > room:
            raise DatasetError(
                f"{names}: {wanted / GB:,.1f} GB do not fit on the disk of data.cache="
                f"{str(self.directory)!r}, which has room for {room / GB:,.1f}: name another"
            )

    def fetch(self, folder: Folder, shard: Shard) -> tuple[str, bool]:
        """A shard's local file, marked as just read, and whether it had to be fetched.

        Raises:
            OSError: it can't be fetched, or what came is not what the manifest says.
        """
        target = self.directory / self.name(folder, shard)
        try:
            os.utime(target)
            return str(target), False
        except FileNotFoundError:
            self.directory.mkdir(parents=True, exist_ok=True)
        with self._locked(f"lock-{int(target.name[:8], 16) % LOCKS:03d}"):
            if not target.exists():  # else fetched by another meanwhile
                self._fetch(folder, shard, target)
        return str(target), True

    @staticmethod
    def name(folder: Folder, shard: Shard) -> str:
        identity = f"{folder.file(shard.file)} {shard.bytes} {shard.sha256}"
        return f"{hashlib.sha256(identity.encode()).hexdigest()[:16]}-{shard.file}"

    def _fetch(self, folder: Folder, shard: Shard, target: Path) -> None:
        partial = target.with_name(target.name + ".part")
        digest = hashlib.sha256()
        try:
            with self._locked("lock"), open(partial, "wb") as file:
                self._evict(shard.bytes, partial.name)
                file.truncate(shard.bytes)  # so that others count it while it grows
            with open(partial, "r+b") as file:
                for chunk in folder.chunks(shard.file, shard.bytes):
                    file.write(chunk)
                    digest.update(chunk)
        except DatasetError as e:
            partial.unlink(missing_ok=True)
            raise OSError(str(e)) from e
        if shard.sha256 and digest.hexdigest() != shard.sha256:
            partial.unlink(missing_ok=True)
            raise OSError("what was fetched has another SHA-256 than the manifest says")
        partial.replace(target)

    def _evict(self, needed: int, but: str) -> None:
        """Deletes what was unused for longest until `needed` bytes fit.

        A process that has a deleted file open reads on; its disk space returns when it closes it.
        """
        found = sorted(self._files(), key=lambda item: item[1].st_mtime)
        size = sum(stat.st_size for _, stat in found)
        for path, stat in found:
            if size + needed <= self.gb * GB:
                break
            if path.name != but:
                path.unlink(missing_ok=True)
                size -= stat.st_size

    def _files(self) -> Iterator[tuple[Path, os.stat_result]]:
        with os.scandir(self.directory) as entries:
            for entry in entries:
                if not entry.name.startswith("lock"):
                    yield Path(entry.path), entry.stat()

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        with open(self.directory / name, "a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
