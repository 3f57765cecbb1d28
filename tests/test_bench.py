import importlib
from pathlib import Path

import pytest

BENCH = Path(__file__).parent.parent / "bench"


@pytest.mark.parametrize("name", sorted(p.stem for p in BENCH.glob("*.py") if p.stem[0] != "_"))
def test_every_benchmark_can_start(name):
    """They are run by hand, and would break unseen when what they import moves."""
    assert callable(importlib.import_module(f"bench.{name}").main)
