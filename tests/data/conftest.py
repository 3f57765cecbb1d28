"""A data set in a bucket, without a cloud."""

import shutil

import pytest

from hqclip_jax.data import shards
from hqclip_jax.data.shards import Readers
from tests.data.object_store import ObjectStore


@pytest.fixture
def readers(monkeypatch):
    """Fresh readers, so that a test may bound or count them."""
    fresh = Readers()
    monkeypatch.setattr(shards, "readers", lambda: fresh)
    monkeypatch.setattr(shards, "PAUSES", (0, 0))
    return fresh


@pytest.fixture(scope="session")
def store(dataset, tmp_path_factory):
    """The data set in a bucket of a server that gs:// and s3:// lead to. One a process: what
    connects to it reads its address once."""
    root = tmp_path_factory.mktemp("buckets")
    shutil.copytree(dataset, root / "bucket" / "some" / "data")
    server = ObjectStore(root)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLOUD_STORAGE_EMULATOR_ENDPOINT", server.url)
        patch.setenv("TENSORSTORE_GCS_HTTP_URL", server.url)
        patch.setenv("AWS_ENDPOINT_URL_S3", server.url)
        patch.setenv("AWS_REGION", "us-east-1")
        patch.setenv("AWS_ACCESS_KEY_ID", "someone")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "something")
        yield server
    server.shutdown()


@pytest.fixture
def remote(store, dataset, readers):
    """The same, whole again before every test, and with no request made."""
    inside = store.root / "bucket" / "some" / "data"
    shutil.copytree(dataset, inside, dirs_exist_ok=True)
    store.requests.clear()
    store.broken.clear()
    return store
