"""Buckets that gs:// and s3:// lead to, without a cloud."""

from pathlib import Path

import pytest

from refine.inputs import fetch, stores
from tests.data.object_store import ObjectStore


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """One a module: its end takes half a second."""
    running = ObjectStore(tmp_path_factory.mktemp("buckets"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLOUD_STORAGE_EMULATOR_ENDPOINT", running.url)
        patch.setenv("AWS_ENDPOINT_URL_S3", running.url)
        patch.setenv("AWS_ACCESS_KEY_ID", "someone")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "something")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        stores._store.cache_clear()
        yield running
    stores._store.cache_clear()
    running.shutdown()


class Bucket:
    """One test's own bucket.

    Attributes:
        url: gs:// or s3://, and the bucket's name.
        root: the folder behind it.
    """

    def __init__(self, server: ObjectStore, scheme: str, name: str):
        self.server, self.name = server, name
        self.url, self.root = f"{scheme}://{name}", server.root / name
        self.root.mkdir()

    def put(self, key: str, data: bytes) -> str:
        path = self.root / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return f"{self.url}/{key}"

    def breaks(self, key: str, *statuses: int) -> None:
        """The statuses that the next requests for a key get."""
        self.server.broken[f"{self.name}/{key}"] = list(statuses)

    def asked(self, key: str) -> int:
        """How many requests for a key there were since the last time."""
        here = [path for path, _ in self.server.requests if path.endswith(f"/{key}")]
        self.server.requests.clear()
        return len(here)


@pytest.fixture(params=["gs", "s3"])
def bucket(request, server, tmp_path: Path, monkeypatch) -> Bucket:
    monkeypatch.setattr(fetch, "PAUSES", (0, 0))
    server.requests.clear()
    server.broken.clear()
    return Bucket(server, request.param, f"{request.param}-{tmp_path.name}".lower()[:60])
