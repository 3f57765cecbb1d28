import dataclasses
import io
import itertools
import logging
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import pytest
from rich.console import Console

from hqclip_jax import progress as progress_lib
from hqclip_jax.config import Config, OptimConfig
from hqclip_jax.data.record import DatasetError
from hqclip_jax.progress import Goodput, ProgressLine, Report


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_goodput_gives_every_second_to_one_kind():
    clock = Clock()
    goodput = Goodput(clock=clock)
    clock.now += 5  # setup
    with goodput("data"):
        clock.now += 2
    clock.now += 1  # setup still
    with goodput("compile"):
        clock.now += 30
    clock.now += 50  # steps
    with goodput("evaluation"):
        clock.now += 4
        with goodput("data"):
            clock.now += 3
        clock.now += 2
    clock.now += 10
    told = {"setup": 6, "data": 5, "compile": 30, "evaluation": 6, "step": 60}
    assert goodput.seconds == told | {"checkpoint": 0, "lost": 0}
    metrics = goodput.metrics()
    assert metrics.pop("seconds") == 107 == clock.now - 100
    assert metrics == {f"time/{kind}": s for kind, s in goodput.seconds.items()}


def test_goodput_goes_on_from_a_checkpoint_and_counts_what_a_kill_lost():
    clock = Clock()
    goodput = Goodput({"step": 900.0, "lost": 10.0}, lost=30.0, clock=clock)
    clock.now += 20
    with pytest.raises(KeyError), goodput("compile"):
        clock.now += 40
        raise KeyError
    assert goodput.seconds["step"] == 900
    assert goodput.seconds["lost"] == 40 and goodput.seconds["compile"] == 40
    assert goodput.metrics()["seconds"] == 1000
    assert goodput.line() == (
        "goodput 90.0%: steps 90.0%, compile 4.0%, setup 2.0%, lost 4.0%"
    )  # fmt: skip


def test_goodput_leaves_out_what_is_next_to_nothing():
    goodput = Goodput({"step": 10_000.0, "data": 6.0, "checkpoint": 4.0}, clock=Clock())
    assert goodput.line() == "goodput 99.9%: steps 99.9%, data 0.1%"
    assert Goodput(clock=Clock()).line() == "goodput 0.0%: nothing yet"


def test_goodput_knows_its_kinds():
    with (
        pytest.raises(ValueError, match="'chekpoint' is none of: step, data"),
        Goodput()("chekpoint"),
    ):
        pass


METRICS = {"loss": 1.25, "loss/hni": 0.5, "images_per_s": 1234.5}


def test_a_log_file_gets_one_line_per_report(caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    clock = itertools.count(1000.0, 2.0)  # two seconds pass whenever somebody looks
    monkeypatch.setattr(progress_lib, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    out = io.StringIO()
    with ProgressLine(Console(file=out), 20, 100) as progress:
        for step in range(21, 51):
            progress.advance(step)
        progress.report(50, METRICS)
    assert out.getvalue().strip() == ""
    # 2 s from the end of the first step, 21, to the report at 50; 50 steps to go.
    assert caplog.messages == ["step 50/100  loss 1.2500  1,234 images/s  hni 0.5000  ETA 0:00:03"]


def test_a_terminal_gets_a_bar(caplog):
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=120)
    with ProgressLine(console, 0, 100) as progress:
        progress.advance(50)
        progress.report(50, METRICS)
    assert "50/100" in out.getvalue() and "loss 1.2500" in out.getvalue()
    assert caplog.messages == []


TROUBLE = {
    "mfu": 0.5, "seconds": 200.0, "time/step": 150.0, "data_wait": 0.0612, "replaced": 1200.0,
}  # fmt: skip


def test_a_report_says_what_is_amiss_and_only_that(caplog):
    caplog.set_level(logging.INFO)
    with ProgressLine(Console(file=io.StringIO()), 0, 100) as progress:
        progress.advance(50)
        progress.report(50, METRICS | TROUBLE)
        progress.report(50, METRICS | TROUBLE | {"data_wait": 0.05, "replaced": 0.0})
    amiss, fine = caplog.messages
    assert "MFU 50.0%  goodput 75%  waits for data 6%  replaced 1,200  hni" in amiss
    assert "goodput 75%  hni" in fine and "waits" not in fine and "replaced" not in fine


@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_bar_is_one_line_however_narrow_the_terminal(width):
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=width)
    with ProgressLine(console, 0, 156_250) as progress:
        progress.advance(50)
        progress.report(50, METRICS | TROUBLE)
        out.truncate(0)
        progress._bar.refresh()
        shown = out.getvalue()
        assert "\n" not in shown and "loss 1.25" in shown and "50/156250" in shown


BATCH = 8


class Pipeline:
    """Of 60 and 1,000 records, read in turns from 40 and 0 on; `old` is no longer read."""

    def __init__(self) -> None:
        self.records = {"a": 60, "b": 1000}

    def position(self, steps: int) -> dict[str, int]:
        return {"a": 40 + steps * BATCH // 2, "b": steps * BATCH // 2, "old": 7}


class Rows(list):
    """A writer, and a progress line too: what each was given."""

    def __bool__(self) -> bool:
        return True

    def write(self, step: int, metrics: dict[str, float]) -> None:
        self.append((step, metrics))

    report = write


def said(skipped: int = 0, **replaced: int) -> dict[str, Any]:
    """The metrics of a step, on the device."""
    counts = {f"replaced/{name}": replaced.get(name, 0) for name in ("record", "image", "pixels")}
    values = {"loss": 0.5, "skipped": skipped} | counts
    return {k: jnp.asarray(v) for k, v in values.items()} | {"control": jnp.zeros(3, jnp.int32)}


@pytest.fixture
def made(tmp_path) -> Callable[..., SimpleNamespace]:
    """Makes the report of a run that goes on from a step, with a clock of ours."""

    def make(start: int = 0, writes: bool = True, **fields: Any) -> SimpleNamespace:
        told = SimpleNamespace(clock=Clock(), written=Rows(), shown=Rows())
        told.goodput = Goodput(clock=told.clock)
        told.log = tmp_path / "replaced-0.jsonl"
        config = Config(optim=OptimConfig(batch=BATCH))
        told.report = Report(
            config, Pipeline(), start, 0, lambda count: 1000.0 + count, 8e12, told.goodput,
            told.shown, told.written if writes else None, told.log,
        )  # fmt: skip
        told.report = dataclasses.replace(told.report, **fields)
        return told

    return make


def begin(told: SimpleNamespace, step: int) -> None:
    """The first step, which compiles for 30 s."""
    with told.goodput("compile"):
        told.clock.now += 30
    told.report.begin(step)


def test_a_report_is_written_once_it_is_due_and_then_no_more(made):
    told = made()
    begin(told, 1)
    told.report.flush()
    assert told.written == []
    told.report.due = (5, said())
    told.clock.now += 1
    told.report.flush()
    told.report.flush()
    ((step, metrics),) = told.written
    assert step == 5 and told.shown == told.written
    assert metrics["loss"] == 0.5 and metrics["samples"] == 40 and "control" not in metrics
    assert all(type(value) in (int, float) for value in metrics.values())


def test_rates_are_those_since_the_report_before_and_begin_after_the_compile(made):
    told = made()
    begin(told, 1)
    told.clock.now += 3
    with told.goodput("data"):
        told.clock.now += 1
    told.report.due = (11, said())
    told.report.flush()
    with told.goodput("data"):
        told.clock.now += 2
    told.report.due = (12, said())
    told.report.flush()
    (_, first), (_, second) = told.written
    assert first["images_per_s"] == 10 * BATCH / 4  # 34 s with the compile
    assert first["images_per_s_per_chip"] == first["images_per_s"] / 8
    assert first["data_wait"] == 0.25 and second["data_wait"] == 1
    assert first["tflops_per_chip"] == pytest.approx(10 * 8 / 4 / 8)
    assert second["images_per_s"] == BATCH / 2
    assert first["time/compile"] == 30 and first["seconds"] == 34 and second["seconds"] == 36


def test_the_first_step_has_no_rates(made):
    told = made()
    begin(told, 1)
    told.report.due = (1, said())
    told.report.flush()
    ((_, metrics),) = told.written
    assert not {"images_per_s", "images_per_s_per_chip", "data_wait"} & metrics.keys()


def test_samples_and_epochs_of_each_source_count_from_the_start_of_the_run(made):
    told = made(start=100)
    begin(told, 101)
    told.report.due = (110, said())
    told.report.flush()
    ((_, metrics),) = told.written
    assert metrics["samples"] == 880
    assert {k: v for k, v in metrics.items() if k.startswith(("samples/", "epoch/"))} == {
        "samples/a": 80, "epoch/a": 80 / 60, "samples/b": 40, "epoch/b": 0.04, "samples/old": 7,
    }  # fmt: skip


def test_a_skipped_update_takes_no_step_of_the_schedule(made):
    told = made()
    begin(told, 1)
    for step, skipped in ((1, 0), (2, 1), (9, 4)):
        told.report.due = (step, said(skipped))
        told.report.flush()
    assert [metrics["lr"] for _, metrics in told.written] == [1000, 1000, 1004]


def test_a_host_that_writes_nothing_knows_its_last_metrics_all_the_same(made):
    """By `last` all hosts decide alike which checkpoint is the best."""
    told = made(writes=False)
    begin(told, 1)
    assert told.report.last == {}
    for step in (3, 6):
        told.report.due = (step, said())
        told.report.flush()
        assert told.report.last["loss"] == 0.5 and told.report.last["samples"] == step * BATCH
    assert told.shown == []


def test_replaced_records_are_told_by_reason_and_together(made):
    told = made()
    begin(told, 1)
    told.report.due = (50, said(image=3, pixels=2))
    told.report.flush()
    ((_, metrics),) = told.written
    parts = Counter({k: v for k, v in metrics.items() if k.startswith("replaced")})
    assert parts == {"replaced": 5, "replaced/record": 0, "replaced/image": 3, "replaced/pixels": 2}


def replace(told: SimpleNamespace, step: int, count: int) -> None:
    told.report.due = (step, said(image=count))
    told.report.flush()


def test_too_many_replaced_records_stop_the_run_with_the_last_of_the_list(made):
    told = made()
    begin(told, 1)
    told.log.write_text("".join(f'{{"position": {i}}}\n' for i in range(30)))
    replace(told, 50, 10)  # of 400: ten are always allowed
    replace(told, 200, 16)  # a hundredth of 1,600
    with pytest.raises(DatasetError) as stopped:
        replace(told, 200, 17)
    message, *lines = str(stopped.value).splitlines()
    assert message.startswith("17 of 1600 records could not be read, more than data.max_replaced=0")
    assert str(told.log.with_name("replaced-*.jsonl")) in message
    assert lines == [f'{{"position": {i}}}' for i in range(10, 30)]
    assert told.written[-1][1]["replaced"] == 17  # said before it ends


def test_only_what_this_start_replaced_counts(made):
    told = made(start=1000, replaced_before=500)
    begin(told, 1001)
    told.log.touch()
    replace(told, 1050, 510)
    with pytest.raises(DatasetError, match=r"^11 of 400 records"):
        replace(told, 1050, 511)


def test_a_host_that_could_read_all_of_its_own_stops_with_the_others(made):
    told = made(writes=False)
    begin(told, 1)
    with pytest.raises(DatasetError, match=r"replaced-\*\.jsonl name them; this host could read"):
        replace(told, 50, 11)
