import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hqclip_jax.lease import FILE, LOST, Holder, Lease, LeaseError, process_started

ROOT = Path(__file__).parent.parent
HOLD = """
import sys
from hqclip_jax.lease import Lease, LeaseError
try:
    with Lease(sys.argv[1]):
        print("held", flush=True)
        sys.stdin.read()
except LeaseError as e:
    print(e, flush=True)
"""


class Clock:
    """Time passes when somebody waits, and then something may happen."""

    def __init__(self, happens=lambda: None) -> None:
        self.now, self.happens = 0.0, happens

    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.happens()


def lease(workdir: Path, clock: Clock | None = None, **kwargs) -> Lease:
    """One whose thread never comes round to a renewal."""
    clock = clock or Clock()
    kwargs = {"interval": 1e6, "on_lost": pytest.fail} | kwargs
    return Lease(workdir, clock=lambda: clock.now, wait=clock.wait, **kwargs)


def hold(workdir: Path) -> subprocess.Popen:
    """Another process that tries to hold the workdir, and what it says of it."""
    return subprocess.Popen(
        [sys.executable, "-c", HOLD, str(workdir)],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def leave(workdir: Path, **changes) -> Holder:
    """The lease of a run elsewhere."""
    elsewhere = {"machine": "another", "host": "node7", "user": "ada", "job": "42", "token": "t"}
    holder = dataclasses.replace(Holder.here(), **(elsewhere | changes))
    (workdir / FILE).write_text(json.dumps(dataclasses.asdict(holder)))
    return holder


def touch(path: Path) -> None:
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))


def test_a_living_run_on_this_machine_is_named_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    with lease(tmp_path):
        second = hold(tmp_path)
        said, _ = second.communicate()
        assert f"{tmp_path} is in use by process {os.getpid()} of " in said and "job 77" in said
        assert "or use another --workdir" in said
    assert not (tmp_path / FILE).exists()
    with lease(tmp_path):  # released
        pass


def test_a_killed_run_on_this_machine_is_replaced_at_once(tmp_path, caplog):
    first = hold(tmp_path)
    assert first.stdout.readline() == "held\n"
    first.kill()
    first.wait()
    clock = Clock()
    with lease(tmp_path, clock) as held:
        assert json.loads((tmp_path / FILE).read_text())["token"] == held.holder.token
    assert clock.now == 0 and f"took the workdir over from process {first.pid}" in caplog.text


def test_another_process_of_the_same_number_is_not_the_holder(tmp_path):
    here = Holder.here()
    leave(tmp_path, machine=here.machine, pid=here.pid, process="1")
    clock = Clock()
    with lease(tmp_path, clock):
        assert clock.now == 0


def test_a_run_elsewhere_that_renews_is_refused_by_name(tmp_path):
    leave(tmp_path)
    clock = Clock()
    clock.happens = lambda: clock.now > 30 and touch(tmp_path / FILE)
    with pytest.raises(LeaseError, match=r"ada on node7, job 42.*sign of life"):
        lease(tmp_path, clock).__enter__()
    assert 30 < clock.now < 60


def test_a_run_elsewhere_that_is_silent_is_replaced_after_a_minute_of_our_clock(tmp_path):
    leave(tmp_path)
    os.utime(tmp_path / FILE, (4e9, 4e9))  # its clock is far ahead
    clock = Clock()
    with lease(tmp_path, clock, interval=10) as held:
        assert 60 <= clock.now < 70
        assert json.loads((tmp_path / FILE).read_text())["token"] == held.holder.token


def test_one_released_during_the_watch_is_taken_then(tmp_path):
    leave(tmp_path)
    clock = Clock(lambda: (tmp_path / FILE).unlink(missing_ok=True))
    with lease(tmp_path, clock, interval=10):
        assert clock.now < 10


@pytest.mark.parametrize("text", ["", "{", "[]", '{"token": "x"}'])
def test_a_lease_that_can_not_be_read_closes_nothing_for_good(tmp_path, text):
    (tmp_path / FILE).write_text(text)
    clock = Clock()
    with lease(tmp_path, clock, interval=10):
        assert clock.now >= 60


def test_who_comes_back_to_anothers_lease_hears_of_it(tmp_path):
    said = []
    with lease(tmp_path, on_lost=said.append) as old:
        before = (tmp_path / FILE).stat().st_mtime_ns
        old.check()
        assert said == [] and (tmp_path / FILE).stat().st_mtime_ns > before
        leave(tmp_path)
        old.check()
        (tmp_path / FILE).unlink()
        old.check()
        assert "taken over by process" in said[0] and "node7" in said[0] and "removed" in said[1]
        leave(tmp_path)
    assert (tmp_path / FILE).exists()  # another's lease is not released


def test_by_default_who_lost_its_lease_ends_itself(tmp_path):
    program = """
import json, sys
from pathlib import Path
from hqclip_jax.lease import FILE, Lease
lease = Lease(sys.argv[1], interval=1e6)
with lease:
    (Path(sys.argv[1]) / FILE).unlink()
    lease.check()
"""
    run = subprocess.run(
        [sys.executable, "-c", program, tmp_path], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == LOST and "this run no longer holds the workdir" in run.stderr


def test_the_thread_renews(tmp_path):
    with lease(tmp_path, interval=1e-3) as held:
        path = tmp_path / FILE
        before = path.stat().st_mtime_ns
        while path.stat().st_mtime_ns == before:
            assert held._thread.is_alive()


def test_of_many_that_take_over_at_once_one_wins(tmp_path):
    dead = subprocess.Popen(["true"])
    dead.wait()
    leave(tmp_path, machine=Holder.here().machine, pid=dead.pid, process="1")
    rivals = [hold(tmp_path) for _ in range(6)]
    said = [rival.stdout.readline() for rival in rivals]
    assert sum(line == "held\n" for line in said) == 1
    assert sum("is in use by process" in line for line in said) == 5
    for rival in rivals:
        rival.communicate()


def test_who_decides_on_a_dead_holder_too_late_gives_way(tmp_path, monkeypatch):
    dead = leave(tmp_path, machine=Holder.here().machine, process="1")
    rivals, is_dead = [], Lease._is_dead

    def late(self: Lease, holder: Holder, changed: int) -> bool:
        decided = is_dead(self, holder, changed)
        if holder == dead:  # another process takes over between the decision and the deed
            rivals.append(hold(tmp_path))
            assert rivals[0].stdout.readline() == "held\n"
        return decided

    monkeypatch.setattr(Lease, "_is_dead", late)
    with pytest.raises(LeaseError, match=r"in use by process (?!0\b)"):
        lease(tmp_path).__enter__()
    assert json.loads((tmp_path / FILE).read_text())["pid"] == rivals[0].pid
    rivals[0].communicate()


@pytest.mark.parametrize("call", ["link", "unlink", "utime", "flock"])
def test_a_kill_at_any_moment_leaves_a_workdir_that_opens(tmp_path, call):
    """Killed where the lease is made, renewed or released: at the system call itself."""
    program = f"""
import fcntl, os, pathlib, signal, sys
from hqclip_jax.lease import Lease
def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)
lease = Lease(sys.argv[1], interval=1e6)
if "{call}" == "link":
    os.link = die
with lease:
    if "{call}" == "unlink":
        pathlib.Path.unlink = die
    elif "{call}" == "utime":
        os.utime = die
    elif "{call}" == "flock":
        fcntl.flock = die
    if "{call}" != "unlink":
        lease.check()
"""
    run = subprocess.run([sys.executable, "-c", program, tmp_path], cwd=ROOT, check=False)
    assert run.returncode == -signal.SIGKILL
    with lease(tmp_path) as held:
        held.check()


def test_a_process_that_has_ended_has_no_start(tmp_path):
    child = subprocess.Popen(["true"])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # ended, and not yet collected
    assert process_started(child.pid) == ""
    child.wait()
    assert process_started(child.pid) == "" and process_started(os.getpid()) != ""
