"""Backends opened before a stand-in server, asked and read."""

import time

import pytest
from PIL import Image

from refine.engines.backend import Request, Sampling
from refine.engines.chat import ServerBackend
from refine.engines.openai import Server
from refine.engines.pace import Backoff, Clock
from refine.errors import RefineError
from refine.prompts import load_prompt
from tests.refine.endpoint import KINDS

KEY = "sk-0123456789abcdef"
IMAGE = Image.new("RGB", (48, 32), "red")
SPEED = 1000  # waits of a second take a millisecond
FAULTS = sorted(set(KINDS.values()))


@pytest.fixture(name="environment", autouse=True)
def chat_environment(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)


@pytest.fixture(name="connect")
def connecting():
    """Opens backends, and closes them after the test."""
    opened = []

    def connect(endpoint, sampling=None, speed=SPEED, **options):
        server = Server("m", endpoint.url, **({"timeout": 5.0} | options))
        prompt, clock = load_prompt("student-v1"), Clock(speed)
        backend = ServerBackend(server, prompt, sampling or Sampling(), clock, Backoff(0.5, 20))
        opened.append(backend)
        return backend

    yield connect
    for backend in opened:
        backend.close()


def ask(backend, numbers, attempt=0):
    for number in numbers:
        backend.submit(Request(f"k{number}", f"caption {number}.", IMAGE, attempt))


def collect(backend, count, seconds=60.0):
    """The next replies."""
    replies, end = [], time.monotonic() + seconds
    while len(replies) < count:
        assert time.monotonic() < end, f"{len(replies)} of {count}: {backend.counters()}"
        replies += backend.replies()
    return replies


def error_of(backend, seconds=60.0):
    """The error that ends a backend, and the replies before it."""
    replies, end = [], time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            replies += backend.replies()
        except RefineError as e:
            return str(e), replies
    raise AssertionError(f"no error: {backend.counters()}")


def first(what):
    """Does something to the first request, and answers all others."""
    return lambda number, body: what if number == 0 else "ok"


def faults(backend):
    return {kind: backend.counters()[kind] for kind in FAULTS if backend.counters()[kind]}
