import io
import itertools
import json
import logging
import struct
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console
from tensorboardX.proto.event_pb2 import Event

from hqclip_jax import telemetry
from hqclip_jax.telemetry import (
    METRICS_FILE,
    MetricWriter,
    ProgressLine,
    Stopwatch,
    read_metrics,
)


def scalars(directory: Path, tag: str) -> list[tuple[int, float]]:
    """Reads event files: a length, its checksum, the event, its checksum, again and again."""
    found = []
    for path in sorted(directory.glob("events*")):
        data = path.read_bytes()
        while data:
            (size,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + size])
            data = data[16 + size :]
            found += [(event.step, v.simple_value) for v in event.summary.value if v.tag == tag]
    return found


def test_scalars_go_to_json_lines_and_tensorboard(tmp_path):
    writer = MetricWriter(tmp_path, 0)
    writer.write(10, {"loss": 2.0, "loss/hni": 0.123456789})
    writer.write(20, {"loss": 1.0})
    writer.close()
    assert read_metrics(tmp_path) == [
        {"step": 10, "loss": 2.0, "loss/hni": 0.123457},
        {"step": 20, "loss": 1.0},
    ]
    assert scalars(tmp_path / "tensorboard", "loss") == [(10, 2.0), (20, 1.0)]


def test_a_resumed_run_drops_what_was_written_after_its_checkpoint(tmp_path):
    writer = MetricWriter(tmp_path, 0)
    for step in (10, 20, 30):
        writer.write(step, {"loss": float(step)})
    writer.close()
    with (tmp_path / METRICS_FILE).open("a") as file:
        file.write('{"step": 40, "lo')  # killed in the middle of a line
    writer = MetricWriter(tmp_path, 20)
    writer.write(30, {"loss": 3.0})
    writer.close()
    assert [row["loss"] for row in read_metrics(tmp_path)] == [10, 20, 3]
    assert json.loads((tmp_path / METRICS_FILE).read_text().splitlines()[-1])["step"] == 30


def test_a_line_written_before_the_end_can_be_read(tmp_path):
    writer = MetricWriter(tmp_path, 0)
    writer.write(10, {"loss": 2.0})
    assert read_metrics(tmp_path)[0]["loss"] == 2.0
    writer.close()


def test_stopwatch_adds_up_until_it_is_taken(monkeypatch):
    now = iter([0.0, 1.5, 10.0, 12.0])
    monkeypatch.setattr("time.monotonic", lambda: next(now))
    watch = Stopwatch()
    for _ in range(2):
        with watch("data"):
            pass
    assert watch.take("data") == pytest.approx(3.5)
    assert watch.take("data") == 0


METRICS = {"loss": 1.25, "loss/hni": 0.5, "images_per_s": 1234.5}


def test_a_log_file_gets_one_line_per_report(caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    clock = itertools.count(1000.0, 2.0)  # two seconds pass whenever somebody looks
    monkeypatch.setattr(telemetry, "time", SimpleNamespace(monotonic=lambda: next(clock)))
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
