"""What a server is, before it is asked anything."""

import pytest

from refine.engines.openai import Server
from refine.errors import RefineError


def test_addresses(monkeypatch):
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    assert Server("m").address == "https://api.openai.com/v1"
    monkeypatch.setenv("OPENAI_BASE_URL", "http://there:8000/v1")
    assert Server("m").address == "http://there:8000/v1"
    server = Server("org/m", "https://me:secret@there/v1")
    assert server.shown_address == "https://there/v1"
    assert (server.name, server.identity()) == ("org/m", {"engine": "openai", "name": "org/m"})
    for wrong in ("localhost:8000", "ftp://there", "http://", "http://there:port", "//there"):
        with pytest.raises(RefineError, match="--base-url"):
            Server("m", wrong)
    with pytest.raises(RefineError, match="--base-url") as caught:
        Server("m", "ftp://me:secret@there")
    assert "secret" not in str(caught.value)
    with pytest.raises(RefineError, match="--max-cost needs --price-in and --price-out"):
        Server("m", max_cost=5.0)
