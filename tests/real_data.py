"""The folder of real data: a fixture of both halves' tests."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder that HQCLIP_TEST_DATA names. Set and wrong, it fails the test: never a skip."""
    named = os.environ.get("HQCLIP_TEST_DATA")
    if not named:
        pytest.skip("HQCLIP_TEST_DATA is not set")
    assert (Path(named) / "grocery" / "pairs").is_dir(), f"HQCLIP_TEST_DATA={named} holds no data"
    return Path(named)
