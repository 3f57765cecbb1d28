"""`--engine openai` against a real vLLM server over loopback."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from refine.__main__ import main
from tests.refine.real_engine import ENVIRONMENT, tiny

pytestmark = pytest.mark.lvlm

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The address of a server; it answers nonsense, which is all that random weights know."""
    folder = tmp_path_factory.mktemp("server")
    model = tiny(folder / "tiny")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model),
        "--served-model-name", "tiny", "--host", "127.0.0.1", "--port", str(port),
        "--dtype", "float32", "--enforce-eager", "--max-num-seqs", "8",
        "--kv-cache-memory-bytes", str(256 << 20), "--limit-mm-per-prompt", '{"image": 1}',
        "--api-key", "secret-of-the-test",
    ]  # fmt: skip
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            command, env=os.environ | ENVIRONMENT, stdout=log, stderr=log, start_new_session=True
        )
    try:
        until = time.monotonic() + 240
        while not _healthy(port):
            assert process.poll() is None, (folder / "log").read_text()[-3000:]
            assert time.monotonic() < until, (folder / "log").read_text()[-3000:]
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)


def _healthy(port: int) -> bool:
    try:
        return urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).status == 200
    except OSError:
        return False


def run(server: str, tmp_path: Path, *more: str) -> int:
    return main(
        ["run", "--engine", "openai", "--base-url", server, "--model", "tiny", "--slots", "8",
         "--max-tokens", "40", "--retries", "1", "--workers", "1", "--input", str(tmp_path / "in"),
         "--output", str(tmp_path / "out"), *more]
    )  # fmt: skip


def test_every_pair_reaches_the_server_and_what_it_says_is_judged(
    server, tmp_path, make, monkeypatch, capfd
):
    make.pairs(tmp_path / "in/0.tar", range(30))
    monkeypatch.setenv("OPENAI_API_KEY", "secret-of-the-test")
    assert run(server, tmp_path) == 2  # random weights: all of it is quarantined
    told = capfd.readouterr().err
    assert "no pair became a record" in told and "secret" not in told
    lines = [json.loads(line) for line in (tmp_path / "out/quarantine.jsonl").open()]
    assert sorted(q["uid"] for q in lines) == sorted(make.uid(n) for n in range(30))
    assert {q["attempts"] for q in lines} == {2}
    assert any(q["raw"] for q in lines)
    left = "".join(p.read_text("utf-8", "replace") for p in tmp_path.rglob("*.json*"))
    assert "secret" not in left


def test_a_wrong_key_and_a_wrong_model_are_told(server, tmp_path, make, monkeypatch, capfd):
    make.pairs(tmp_path / "in/0.tar", range(2))
    monkeypatch.setenv("OPENAI_API_KEY", "wrong-key-of-the-test")
    assert run(server, tmp_path) == 2
    told = capfd.readouterr().err
    assert "OPENAI_API_KEY" in told and "wrong-key" not in told
    monkeypatch.setenv("OPENAI_API_KEY", "secret-of-the-test")
    assert run(server, tmp_path, "--model", "other", "--allow-change") == 2
    assert "other" in capfd.readouterr().err
