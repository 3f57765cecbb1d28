"""Twenty kills of a real vLLM over real photos: nothing lost, nothing asked twice."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from hqclip_jax.data.record import decode
from tests.refine.real_engine import ENVIRONMENT, arguments, tiny

pytestmark = pytest.mark.lvlm

ROOT = Path(__file__).parents[2]
KILLS, SLOTS = 20, 16


@pytest.fixture
def photos(real_data) -> Path:
    return real_data / "grocery/pairs/test"


def start(model: Path, photos: Path, output: Path, answers: Path) -> subprocess.Popen:
    command = [
        sys.executable, "-m", "tests.refine.real_engine", "run", "--engine", "vllm",
        "--model", model, "--structured", "--slots", SLOTS, "--max-tokens", 150,
        "--max-pixels", 112 * 112, "--workers", 1, "--input", photos, "--output", output,
        *arguments(),
    ]  # fmt: skip
    env = os.environ | ENVIRONMENT | {"HQCLIP_TEST_ANSWERS": str(answers)}
    with output.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(
            list(map(str, command)), cwd=ROOT, env=env, stdout=log, stderr=log,
            start_new_session=True,
        )  # fmt: skip


def generated(answers: Path) -> list[str]:
    return answers.read_text().splitlines() if answers.exists() else []


def descendants(pid: int) -> list[int]:
    found = [int(p) for t in Path(f"/proc/{pid}/task").iterdir()
             for p in (t / "children").read_text().split()]  # fmt: skip
    return found + [grandchild for child in found for grandchild in descendants(child)]


def kill(process: subprocess.Popen, which: str, rng: np.random.Generator) -> None:
    """The command alone, all of its processes at once, or any one of them."""
    if which == "all":
        os.killpg(process.pid, signal.SIGKILL)
    elif which == "command":
        process.kill()
    else:
        os.kill(int(rng.choice(descendants(process.pid))), signal.SIGKILL)
        process.kill()
    process.wait()


def uids(output: Path) -> list[str]:
    from array_record.python.array_record_module import ArrayRecordReader

    found = []
    for shard in sorted(output.glob("*.array_record-*")):
        reader = ArrayRecordReader(str(shard))
        found += [decode(entry).uid for entry in reader.read_all()]
        reader.close()
    return found


def test_twenty_kills_lose_nothing_and_nothing_is_generated_twice(tmp_path, photos):
    rng = np.random.default_rng(0)
    model, output, answers = tiny(tmp_path / "tiny"), tmp_path / "out", tmp_path / "answers.txt"
    kills = Counter()
    for number in range(KILLS):
        process = start(model, photos, output, answers)
        before = len(generated(answers))
        # Some die while they start, the others after so many answers.
        goal = before + int(rng.integers(1, 100)) if number % 5 else before
        until = time.monotonic() + (180 if number % 5 else rng.uniform(0.5, 8))
        while process.poll() is None and time.monotonic() < until:
            if number % 5 and len(generated(answers)) >= goal:
                break
            time.sleep(0.002)
        assert process.poll() is None, output.with_suffix(".log").read_text()[-3000:]
        assert number % 5 == 0 or len(generated(answers)) >= goal, "too slow to be killed"
        which = ("all", "command", "any")[number % 3]
        kill(process, which, rng)
        kills[which] += 1
    assert sum(kills.values()) == KILLS and not (output / "manifest.json").exists()
    assert start(model, photos, output, answers).wait(600) == 0

    manifest = json.loads((output / "manifest.json").read_text())
    found, held = uids(output), output / "quarantine.jsonl"
    quarantined = [json.loads(line) for line in held.open()] if held.exists() else []
    whole = {json.loads(path)["uid"] for path in photo_metadata(photos)}
    assert len(found) == len(set(found)) and manifest["counts"]["pairs"] == len(whole) == 2485
    assert Counter(found) + Counter(q["uid"] for q in quarantined) == Counter(whole)
    assert all(q["reason"] and q["raw"] is not None for q in quarantined)
    assert len(found) >= 0.8 * len(whole)
    twice = sum(count - 1 for count in Counter(generated(answers)).values())
    print(f"kills {dict(kills)}, generated twice {twice}, valid {len(found) / len(whole):.3f}")
    assert twice <= KILLS * SLOTS  # of a kill, those of the one step that it cut short
    assert not (output / ".parts").exists()


def photo_metadata(photos: Path) -> list[bytes]:
    import tarfile

    found = []
    for path in sorted(photos.glob("*.tar")):
        with tarfile.open(path) as tar:
            found += [tar.extractfile(m).read() for m in tar if m.name.endswith(".json")]
    return found
