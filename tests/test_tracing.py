import logging
import re
from pathlib import Path
from typing import Any

import jax
import pytest

from hqclip_jax.config import ProfileConfig
from hqclip_jax.tracing import Tracer


class Profiler:
    """Notes between which steps it was on; one trace at a time, as JAX's."""

    def __init__(self) -> None:
        self.step, self.traces, self.fails = 0, [], None
        self.folders: set[Path] = set()

    def start_trace(self, folder: Path, profiler_options: jax.profiler.ProfileOptions) -> None:
        assert profiler_options.python_tracer_level == 0
        if self.fails == "start":
            raise RuntimeError("Only one profile may be run at a time.")
        assert not self.traces or len(self.traces[-1]) == 2
        self.traces.append([self.step + 1])
        self.folders.add(folder)

    def stop_trace(self) -> None:
        (first,) = self.traces[-1]
        self.traces[-1] = [first, self.step]
        if self.fails == "stop":
            raise OSError(28, "No space left on device")


@pytest.fixture
def profiler(monkeypatch) -> Profiler:
    told = Profiler()
    monkeypatch.setattr(jax.profiler, "start_trace", told.start_trace)
    monkeypatch.setattr(jax.profiler, "stop_trace", told.stop_trace)
    return told


def run(
    profiler: Profiler,
    workdir: Path,
    steps: str,
    first: int,
    last: int,
    touched: int = 0,
    every: int = 10,
) -> list[list[int]]:
    """Steps `first` to `last` as the loop makes them: with a report at every tenth, `profile`
    touched in step `touched`. Returns the first and last step of each trace."""
    profiler.step = first - 1
    tracer = Tracer(ProfileConfig(steps), workdir)
    for step in range(first, last + 1):
        tracer.before(step)
        profiler.step = step
        if step == touched:
            tracer.file.touch()
        tracer.after(step, {"loss": jax.numpy.zeros(())})
        if step % every == 0 and step < last:
            tracer.asked(step + 1)
    tracer.close()
    tracer.close()  # nothing is left to end
    return profiler.traces


def test_nothing_is_traced_unasked(profiler, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    assert run(profiler, tmp_path, "", 1, 30) == [] and caplog.messages == []


@pytest.mark.parametrize("steps", [(5, 8), (1, 1), (30, 30), (1, 30)])
def test_the_steps_of_the_range_are_traced(profiler, tmp_path, steps):
    first, last = steps
    assert run(profiler, tmp_path, f"{first}:{last}", 1, 30) == [[first, last]]
    assert profiler.folders == {tmp_path / "traces"}


def test_a_trace_ends_when_its_last_step_is_done(profiler, tmp_path, monkeypatch):
    """A step that is only under way would be cut off."""
    waits: list[Any] = []
    monkeypatch.setattr(jax, "block_until_ready", lambda x: waits.append((profiler.step, x)))
    run(profiler, tmp_path, "5:8", 1, 30)
    ((step, metrics),) = waits
    assert step == 8 and "loss" in metrics


@pytest.mark.parametrize(
    ("first", "expected"),
    [(90, [[100, 105]]), (100, [[100, 105]]), (103, [[103, 105]]), (105, [[105, 105]]), (106, [])],
)
def test_a_run_that_goes_on_traces_what_is_left_of_the_range(
    profiler, tmp_path, caplog, first, expected
):
    caplog.set_level(logging.INFO)
    assert run(profiler, tmp_path, "100:105", first, 130) == expected
    beyond = f"profile.steps=100:105 is not traced: step {first} comes next"
    assert [m for m in caplog.messages if "not traced" in m] == [beyond] * (first == 106)


def test_a_range_that_was_not_reached_is_said(profiler, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    assert run(profiler, tmp_path, "100:105", 1, 99) == []
    assert set(caplog.messages) == {
        "profile.steps=100:105 is not traced: the run ended before"
    }  # fmt: skip


def test_a_touched_file_asks_for_five_steps_and_goes(profiler, tmp_path):
    assert run(profiler, tmp_path, "", 1, 40, touched=13) == [[21, 25]]
    assert not (tmp_path / "profile").exists()


def test_a_file_may_ask_again(profiler, tmp_path):
    run(profiler, tmp_path, "", 1, 40, touched=13)
    assert run(profiler, tmp_path, "", 41, 80, touched=50) == [[21, 25], [51, 55]]


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ("23:40", [[21, 40]]),  # begins within the trace that the file asked for
        ("15:22", [[15, 25]]),  # ends within it
        ("15:40", [[15, 40]]),  # holds it
        ("22:23", [[21, 25]]),  # lies in it
        ("26:30", [[21, 25], [26, 30]]),
        ("3:4", [[3, 4], [21, 25]]),
    ],
)
def test_file_and_range_together_trace_the_steps_of_both(profiler, tmp_path, steps, expected):
    assert run(profiler, tmp_path, steps, 1, 50, touched=14) == expected


def test_a_run_that_ends_in_a_trace_writes_what_there_is(profiler, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    assert run(profiler, tmp_path, "5:100", 1, 30) == [[5, 30]]
    assert caplog.messages == ["tracing steps 5 to 100", f"the trace is in {tmp_path / 'traces'}"]


@pytest.mark.parametrize(
    ("fails", "said"),
    [("start", "no trace of steps 5 to 8: Only one"), ("stop", "was not written: .*No space left")],
)
def test_a_trace_that_fails_ends_no_run(profiler, tmp_path, caplog, fails, said):
    profiler.fails = fails
    run(profiler, tmp_path, "5:8", 1, 30)
    (error,) = [r for r in caplog.records if r.levelno == logging.ERROR]
    assert re.search(said, error.message)
