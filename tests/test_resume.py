"""A run that nothing can spoil: trainers in processes of their own, killed, stopped and hung.

Every record that a step is given is written down, with a hash of its bytes, and compared with what
the unbroken run on one process was given at that step.
"""

import json
import re
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from hqclip_jax.checkpoint import Checkpoints
from hqclip_jax.lease import FILE
from hqclip_jax.telemetry import read_metrics
from hqclip_jax.watchdog import STATUS
from tests.processes import Processes
from tests.test_train import arguments

pytestmark = pytest.mark.slow

STEPS, BATCH, RECORDS = 10, 8, 60
STARTUP = 8.0  # seconds until the first step, or so, with what is compiled in the cache
STOPPED = 128 + signal.SIGTERM
Rows = list[list[str]]  # uid and hash of each row, in the order of the batch


@dataclass
class Run:
    """One workdir, trained by one start after another.

    Attributes:
        fields: of the configuration, for all starts.
        lives: folder of each start, with its records and logs.
    """

    dataset: Path
    folder: Path
    steps: int = STEPS
    fields: dict[str, object] = field(default_factory=dict)
    lives: list[Path] = field(default_factory=list)

    @property
    def workdir(self) -> Path:
        return self.folder / "run"

    def start(
        self, processes: int = 1, hold: Mapping[int, int] | None = None, **fields: object
    ) -> Processes:
        """Args:
        hold: by process, the step before which its data hang.
        """
        folder = self.folder / f"life-{len(self.lives)}"
        folder.mkdir(parents=True)
        self.lives.append(folder)
        mesh = {"mesh.fsdp": 1}
        fields = mesh | self.fields | fields
        own = arguments(self.dataset, self.workdir, f"{self.steps} steps", **fields)
        commands = []
        for rank in range(processes):
            command = ["-m", "tests.recorded", f"--record={folder / f'{rank}.jsonl'}"]
            if hold and rank in hold:
                command += [f"--hold={hold[rank]}"]
            commands.append(command + ["--distributed"] * (processes > 1) + own)
        return Processes(commands, folder)

    def finish(self, processes: int = 1, **fields: object) -> "Run":
        with self.start(processes, **fields) as group:
            assert group.ended() == [0] * processes, group.printed()
        return self

    def steps_of(self, life: int, rank: int = 0) -> dict[int, Rows]:
        """What one process was given in one life, by step."""
        path = self.lives[life] / f"{rank}.jsonl"
        # The last line may be half of it while the process writes.
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        return {line["step"]: line["rows"] for line in map(json.loads, lines)}

    def reached(self, step: int, rank: int = 0) -> bool:
        """Whether the process was given the batch of a step in the life that lasts."""
        return step in self.steps_of(-1, rank)

    def saved(self) -> int:
        """The last finished checkpoint, 0 without."""
        return max((int(p.name) for p in self.workdir.glob("checkpoints/*") if p.name.isdigit()),
                   default=0)  # fmt: skip

    def state(self) -> dict[str, np.ndarray]:
        """All arrays of the last checkpoint, the optimizer's too."""
        found = {}
        for part in ("params", "rest"):
            path = self.workdir / "checkpoints" / str(self.saved()) / part
            with ocp.PyTreeCheckpointer() as reader:
                stored = reader.metadata(path).item_metadata.tree
                host = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), stored)
                tree = reader.restore(path, restore_args=host)
            for name, array in jax.tree_util.tree_leaves_with_path(tree):
                found[part + jax.tree_util.keystr(name)] = array
        return found


def check_batches(run: Run, unbroken: Run) -> None:
    """Every process was given at every step its share of the unbroken run's batch, in every life
    that came so far, and each step was made by all processes of a life."""
    schedule = unbroken.steps_of(0)
    made: set[int] = set()
    for life, folder in enumerate(run.lives):
        hosts = len(list(folder.glob("log-*.txt")))
        given = [run.steps_of(life, rank) for rank in range(hosts)]
        for rank, steps in enumerate(given):
            first = min(steps, default=0)
            assert list(steps) == list(range(first, first + len(steps)))
            share = slice(rank * BATCH // hosts, (rank + 1) * BATCH // hosts)
            for step, rows in steps.items():
                assert rows == schedule[step][share], f"life {life}, rank {rank}, step {step}"
        made |= set.intersection(*map(set, given))
    assert made == set(range(1, run.steps + 1))


def check_losses(run: Run, unbroken: Run) -> None:
    found, expected = read_metrics(run.workdir), read_metrics(unbroken.workdir)
    assert [row["step"] for row in found] == list(range(1, run.steps + 1))
    for a, b in zip(found, expected, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)


def check_state(run: Run, unbroken: Run) -> None:
    """Bit for bit."""
    found, expected = run.state(), unbroken.state()
    assert run.saved() == unbroken.saved() == run.steps and found.keys() == expected.keys()
    assert any("'mu'" in name for name in found)
    for name, array in found.items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)


@pytest.fixture(scope="module")
def unbroken(dataset, tmp_path_factory) -> Run:
    return Run(dataset, tmp_path_factory.mktemp("unbroken")).finish()


@pytest.fixture(scope="module")
def unbroken_two(dataset, tmp_path_factory) -> Run:
    """By two processes, whose sums round otherwise."""
    return Run(dataset, tmp_path_factory.mktemp("unbroken-two")).finish(2)


def test_the_unbroken_run_goes_through_every_record_once_an_epoch(unbroken):
    uids = [uid for _, rows in sorted(unbroken.steps_of(0).items()) for uid, _ in rows]
    assert len(uids) == STEPS * BATCH
    assert len(set(uids[:RECORDS])) == RECORDS
    assert len(set(uids[RECORDS:])) == len(uids) - RECORDS


@pytest.mark.parametrize("tensor", [1, 2], ids=["rows apart", "the same rows, layers shared"])
def test_two_processes_equal_one(dataset, unbroken, unbroken_two, tmp_path, tensor):
    if tensor == 1:
        run = unbroken_two
        check_batches(run, unbroken)
    else:
        run = Run(dataset, tmp_path).finish(2, **{"mesh.tensor": 2})
        assert run.steps_of(0, 0) == run.steps_of(0, 1) == unbroken.steps_of(0)
    check_losses(run, unbroken)
    info = Checkpoints(run.workdir, read_only=True).info(STEPS)
    assert info.position == {"train": STEPS * BATCH}


def test_a_killed_process_repeats_what_was_not_saved_bit_for_bit(dataset, unbroken, tmp_path):
    """Five steps are saved and two more made, then kill −9."""
    run = Run(dataset, tmp_path, fields={"checkpoint.every": "5 steps"})
    with run.start(hold={0: 8}) as group:
        group.until(lambda: run.saved() == 5 and run.reached(7))
    run.finish()
    assert list(run.steps_of(0)) == [1, 2, 3, 4, 5, 6, 7]
    assert list(run.steps_of(1)) == [6, 7, 8, 9, 10]
    check_batches(run, unbroken)
    check_state(run, unbroken)


def test_one_of_two_killed_ends_the_other_and_both_continue(
    dataset, unbroken, unbroken_two, tmp_path
):
    """First one is killed, then the other, then both; they never wait for ever."""
    run = Run(dataset, tmp_path)
    # Who misses another in a step ends with 75, unless JAX, which misses it too, is sooner.
    for victim, step in ((1, 4), (0, 6)):
        status = kill_one(run, victim, step)
        assert status[victim] == -signal.SIGKILL
        assert status[1 - victim] in (STATUS, -signal.SIGABRT)
    with run.start(2, hold={0: 8, 1: 8}) as group:
        group.until(lambda: run.saved() == 6 and run.reached(7) and run.reached(7, rank=1))
        group.send(signal.SIGKILL)
    run.finish(2)
    assert [min(run.steps_of(life)) for life in range(4)] == [1, 3, 5, 7]
    check_batches(run, unbroken)
    check_state(run, unbroken_two)


def kill_one(run: Run, victim: int, step: int) -> list[int]:
    """Kills one of two while the other is in a step that the victim has no data for."""
    with run.start(2, hold={victim: step}) as group:
        group.until(lambda: run.saved() == step - 2 and run.reached(step, rank=1 - victim))
        group.send(signal.SIGKILL, victim)
        return group.ended(300)


def test_four_processes_then_two_then_one(dataset, unbroken, tmp_path):
    """The first leave on SIGTERM, the second are killed, the last ends; the epoch ends between."""
    run = Run(dataset, tmp_path)
    with run.start(4, hold={0: 4}) as group:
        group.until(lambda: run.reached(3) and run.reached(4, rank=3))
        group.send(signal.SIGTERM)
        assert group.ended() == [STOPPED] * 4, group.printed()
    saved = run.saved()
    assert saved in (2, 3)  # the first may still have told it in step 3
    with run.start(2, hold={0: 8, 1: 8}) as group:
        group.until(lambda: run.saved() == 6 and run.reached(7) and run.reached(7, rank=1))
    run.finish(1)
    assert [min(run.steps_of(life)) for life in range(3)] == [1, saved + 1, 7]
    check_batches(run, unbroken)
    check_losses(run, unbroken)


def test_a_signal_to_one_of_two_saves_one_step_of_both(dataset, unbroken, unbroken_two, tmp_path):
    """While they train; then while one waits for data, which is told it, or the other is."""
    run = Run(dataset, tmp_path)
    assert 2 <= stop_one(run, told=1, at=3) <= 5
    assert stop_one(run, told=0, at=7, hold=0) == 6
    assert stop_one(run, told=1, at=8, hold=0) == 7
    run.finish(2)
    check_batches(run, unbroken)
    check_state(run, unbroken_two)


def stop_one(run: Run, told: int, at: int, hold: int | None = None) -> int:
    """SIGTERM to one of two when they are at a step. Returns the step that both say they saved.

    Args:
        hold: the process that has no data for that step.
    """
    with run.start(2, {} if hold is None else {hold: at}) as group:
        group.until(lambda: run.reached(at, rank=0 if hold == 1 else 1))
        group.send(signal.SIGTERM, told)
        assert group.ended() == [STOPPED] * 2, group.printed()
    said = [re.findall(r"stopped by SIGTERM, saved at step (\d+)", log.read_text())
            for log in group.logs]  # fmt: skip
    assert said == [[str(run.saved())]] * 2
    return run.saved()


def test_data_that_hang_are_named_by_both_processes_which_end(
    dataset, unbroken, unbroken_two, tmp_path
):
    run = Run(dataset, tmp_path)
    with run.start(2, hold={1: 5}, **{"watchdog.warn": 10, "watchdog.abort": 40}) as group:
        assert group.ended() == [STATUS] * 2, group.printed()
    for log in group.logs:
        late = r"no step for \d+ s: late is host 1 \(.+\), waiting for data at step 4; this is host"
        assert re.search(late, log.read_text()), log.read_text()
    waiting, stepping = ((run.workdir / f"stacks-{rank}.txt").read_text() for rank in (1, 0))
    assert "host 1" in waiting and re.search(r"feed\.py.* in next\b", waiting)
    assert re.search(r"recorded\.py.* in batches\b", waiting)  # where it hangs
    assert "host 0" in stepping and "waiting for a step's result at step 6" in stepping
    run.finish(2)
    assert list(run.steps_of(1)) == list(range(5, STEPS + 1))
    check_batches(run, unbroken)
    check_state(run, unbroken_two)


def test_a_workdir_in_use_is_refused_until_its_holder_is_killed(dataset, tmp_path):
    run = Run(dataset, tmp_path)
    holder = lambda: json.loads((run.workdir / FILE).read_text())["pid"]
    with run.start(2, hold={0: 3, 1: 3}) as group:
        group.until(lambda: (run.workdir / FILE).exists())
        for processes in (1, 2):
            with run.start(processes) as second:
                assert second.ended(90)[0] == 2, second.printed()
                assert 0 not in second.ended()
            said = f"{run.workdir} is in use by process {group.ranks[0].pid}"
            assert said in second.logs[0].read_text()
        assert holder() == group.ranks[0].pid
        group.send(signal.SIGKILL)
    with run.start(1) as group:
        group.until(lambda: holder() == group.ranks[0].pid, seconds=60)
        said = "took the workdir over from process"
        group.until(lambda: said in group.logs[0].read_text(), seconds=5)


def test_twenty_kills_at_random_moments_change_nothing(dataset, tmp_path):
    steps = 200  # more than twenty lives can reach, however fast the machine
    whole = Run(dataset, tmp_path / "whole", steps=steps).finish()
    run = Run(dataset, tmp_path / "killed", steps=steps)
    rng = np.random.default_rng(0)
    saved = again = torn = 0
    for moment in rng.permutation(["start"] * 5 + ["step"] * 8 + ["save"] * 7):
        kill(run, moment, rng)
        lived = run.steps_of(-1)
        # What was saved is never lost, and every life begins right behind it.
        assert run.saved() >= saved and min(lived, default=saved + 1) == saved + 1
        saved, again = run.saved(), again + max(0, max(lived, default=0) - run.saved())
        torn += bool(unfinished(run))
    assert saved > 5 and again > 10 and torn > 2, (saved, again, torn)
    run.finish()
    check_batches(run, whole)
    check_state(run, whole)


def kill(run: Run, moment: str, rng: np.random.Generator) -> None:
    """Starts the run and kills it while it starts, after some steps or while it saves."""
    steps = rng.integers(1, 8)  # the fifth comes once the first save is done
    with run.start() as group:
        if moment == "start":
            time.sleep(rng.uniform(0, STARTUP))
        else:
            group.until(lambda: len(run.steps_of(-1)) >= steps)
            if moment == "save":
                group.until(lambda: unfinished(run))
            time.sleep(rng.uniform(0, 0.1))
        group.send(signal.SIGKILL)


def unfinished(run: Run) -> list[Path]:
    """Checkpoints that were begun."""
    return [p for p in run.workdir.glob("checkpoints/*") if not p.name.isdigit()]
