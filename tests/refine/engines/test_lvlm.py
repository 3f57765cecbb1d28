"""Whole runs of an engine that looks, its model a rule: kills, reasons, sums, the manifest."""

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

from refine.engines.backend import Sampling
from refine.engines.lvlm import Lvlm, join, used
from refine.fleet import Local
from refine.inputs.find import find
from refine.inputs.pairs import Pair
from refine.journal import Answer, Journal, journal_folder, key_of
from refine.prompts import load_prompt
from refine.runner import PARTS, Run, run
from tests.refine.fake_model import Fake

ROOT = Path(__file__).parents[3]
SCRIPT = """
import sys
from pathlib import Path
from tests.refine.engines.test_lvlm import asked_of
from refine.runner import run
if __name__ == "__main__":
    run(asked_of(Path(sys.argv[1]), pause=float(sys.argv[2])))
"""


def asked_of(folder: Path, **fake) -> Run:
    output = folder / "out"
    model = Fake(folder / "asked.txt", **fake)
    engine = Lvlm(model, load_prompt("student-v1"), Sampling(), 300, output / PARTS)
    inputs = tuple(find([str(folder / "in")]))
    return Run(inputs, output, engine, shard_mb=0.02, makers=Local(2, 0, 2))


def write(folder: Path, make, tars: int, pairs: int) -> None:
    """Every tenth alt-text makes the model fail, every twentieth only at first."""
    for i in range(tars):
        members = []
        for number in range(i * pairs, (i + 1) * pairs):
            pair = make.pair(number)
            kind = {3: "never", 13: "twice"}.get(number % 20, "text")
            members += [pair[0], (pair[1][0], f"{kind} {number}".encode()), pair[2]]
        make.tar(folder / f"in/{i}.tar", members)


def test_a_run_and_what_its_manifest_says(tmp_path, make, records, counts):
    write(tmp_path, make, 3, 40)
    assert run(asked_of(tmp_path))["joined"] == 114
    found = records(tmp_path / "out")
    assert [r.uid for r in found] == [make.uid(n) for n in range(120) if n % 20 != 3]
    assert all(r.desc[-1] == f"the number is {r.caption.split()[-1]}." for r in found)
    refiner = f"fake:model:{load_prompt('student-v1').digest}"
    assert {r.refiner for r in found} == {refiner}
    assert counts(tmp_path / "out") == {"pairs": 120, "joined": 114, "refusal": 6}
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    stats = manifest["engine_stats"]
    assert stats["answers"] == 120 and stats["retries"] == 18 and stats["retried_refusal"] == 18
    assert stats["output_tokens"] == 114 * 20 + 24 * 3
    assert stats["seconds"] > 0 and 0 <= stats["busy_share"] <= 1
    assert stats["images_per_second"] == pytest.approx(120 / stats["seconds"], rel=0.01)
    assert manifest["plan"]["prompt"]["name"] == "student-v1"
    assert len((tmp_path / "out/quarantine.jsonl").read_text().splitlines()) == 6
    assert not (tmp_path / "out" / PARTS).exists()


def test_kills_at_random_moments_lose_nothing(tmp_path, make, records):
    write(tmp_path, make, 5, 20)
    rng = np.random.default_rng(1)
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, script, tmp_path, "0.004"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    asked = asked_of(tmp_path).engine.model.asked
    kills = 0
    while not (tmp_path / "out/manifest.json").exists():
        assert kills < 20
        process = subprocess.Popen(command, cwd=ROOT, env=env, start_new_session=True)
        goal = len(asked()) + int(rng.integers(1, 40))
        until = time.monotonic() + 60
        while process.poll() is None and len(asked()) < goal and time.monotonic() < until:
            time.sleep(0.001)
        if process.poll() is None:
            (os.killpg if kills % 2 else os.kill)(process.pid, signal.SIGKILL)
            kills += 1
        assert process.wait() in (0, -signal.SIGKILL)
    found = Counter(r.uid for r in records(tmp_path / "out"))
    held = [json.loads(line) for line in (tmp_path / "out/quarantine.jsonl").open()]
    assert found + Counter(q["uid"] for q in held) == Counter(make.uid(n) for n in range(100))
    assert kills >= 3
    # Five never pass and five pass at the second try: asked three times and twice.
    needed = 100 + 2 * 5 + 5
    assert len(asked()) - needed <= kills * 2 * 2 * 4 * 3  # two engines, two rounds of four, thrice


def test_an_answer_is_joined_to_the_pair_that_it_was_given_for(tmp_path):
    pair = Pair("0" * 32, b"image", "a", "s", "k")
    changed = Pair("0" * 32, b"other image", "a", "s", "k")
    journal = Journal(journal_folder(tmp_path, 4))
    journal.add(Answer(key_of(pair), reason="refusal", raw="no", attempts=2, output_tokens=7))
    journal.count({"seconds": 2.0})
    journal.close()
    first, second, sums = join(tmp_path, [pair, changed], 4)
    assert (first.reason, first.raw, first.attempts) == ("refusal", "no", 2)
    assert second.reason == "not_asked"
    assert sums.values == {"seconds": 2.0, "answers": 1, "prompt_tokens": 0, "output_tokens": 7,
                           "repaired": 0, "retries": 1}  # fmt: skip
    assert used(tmp_path) == (0, 7)
