import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from refine.errors import RefineError
from refine.parallel import ordered_map


def base() -> int:
    return 100


def add(state: int, item: int) -> tuple[int, int]:
    return state + item, os.getpid()


def die(_: None, item: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_results_come_in_order_from_other_processes():
    here = list(ordered_map(add, range(20), 1, base))
    there = list(ordered_map(add, range(20), 2, base))
    assert [value for value, _ in here] == [value for value, _ in there] == list(range(100, 120))
    assert {pid for _, pid in here} == {os.getpid()}
    assert os.getpid() not in {pid for _, pid in there}
    assert list(ordered_map(add, [], 2, base)) == []


def test_a_killed_worker_is_told():
    with pytest.raises(RefineError, match="a worker process died"):
        list(ordered_map(die, range(4), 2))


ORPHAN = """
import sys, time, os
from refine.parallel import ordered_map
def wait(_, item):
    print(os.getpid(), flush=True)
    time.sleep(60)
if __name__ == "__main__":
    list(ordered_map(wait, range(4), 2))
"""


def test_workers_end_with_a_killed_parent(tmp_path):
    script = tmp_path / "orphan.py"
    script.write_text(ORPHAN)
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    parent = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True, env=env)
    workers = [int(parent.stdout.readline()) for _ in range(2)]
    parent.kill()
    parent.wait()
    until = time.monotonic() + 10
    while time.monotonic() < until and any(_alive(pid) for pid in workers):
        time.sleep(0.02)
    assert not any(_alive(pid) for pid in workers)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False
