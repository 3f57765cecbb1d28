import json
import math
import struct
import time
from pathlib import Path

import pytest
from tensorboardX.proto.event_pb2 import Event

from hqclip_jax import telemetry
from hqclip_jax.telemetry import (
    METRICS_FILE,
    MetricWriter,
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
    before = time.time()
    writer = MetricWriter(tmp_path, 0)
    assert writer.dropped_until == 0
    writer.write(10, {"loss": 2.0, "loss/hni": 0.123456789, "samples": 12_800_000_001})
    writer.write(20, {"loss": 1.0})
    writer.close()
    rows = read_metrics(tmp_path)
    assert before - 0.001 <= rows[0].pop("time") <= rows[1].pop("time") <= time.time() + 0.001
    assert rows == [
        {"step": 10, "loss": 2.0, "loss/hni": 0.123457, "samples": 12_800_000_001},
        {"step": 20, "loss": 1.0},
    ]
    assert scalars(tmp_path / "tensorboard", "loss") == [(10, 2.0), (20, 1.0)]


def test_a_value_that_is_no_number_is_null_and_comes_back_as_nan(tmp_path):
    def strict(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    values = {"loss": float("nan"), "grad_norm": float("inf"), "lr": -float("inf"), "mfu": 0.5}
    for step in (0, 1):  # written, and kept by the next start
        writer = MetricWriter(tmp_path, step)
        writer.write(step + 1, values)
        writer.close()
    for line in (tmp_path / METRICS_FILE).read_text().splitlines():
        row = json.loads(line, parse_constant=strict)
        assert row["loss"] is row["grad_norm"] is row["lr"] is None and row["mfu"] == 0.5
    for row in read_metrics(tmp_path):
        assert math.isnan(row["loss"]) and math.isnan(row["grad_norm"]) and row["mfu"] == 0.5


def test_a_resumed_run_drops_what_was_written_after_its_checkpoint(tmp_path):
    writer = MetricWriter(tmp_path, 0)
    for step in (10, 20, 30, 40, 50):
        seconds = float("nan") if step in (30, 50) else 1.5 * step
        writer.write(step, {"loss": float(step), "seconds": seconds})
    writer.close()
    with (tmp_path / METRICS_FILE).open("a") as file:
        file.write('{"step": 60, "lo')  # killed in the middle of a line
    writer = MetricWriter(tmp_path, 20)
    assert writer.dropped_until == 60
    writer.write(30, {"loss": 3.0})
    writer.write(40, {"loss": 4.0})
    writer.close()
    rows = read_metrics(tmp_path)
    assert [row["loss"] for row in rows] == [10, 20, 3, 4]
    assert [row.get("resumed_from") for row in rows] == [None, None, 20, None]
    dropped = (tmp_path / "metrics.dropped.jsonl").read_text().splitlines()
    assert [json.loads(line)["loss"] for line in dropped] == [30, 40, 50]


def test_a_run_killed_before_its_first_checkpoint_says_that_it_began_again(tmp_path):
    for _ in range(2):
        writer = MetricWriter(tmp_path, 0)
        writer.write(10, {"loss": 1.0, "seconds": 7.0})
        writer.close()
    (row,) = read_metrics(tmp_path)
    assert row["resumed_from"] == 0 and writer.dropped_until == 7


@pytest.mark.parametrize("line", ["\x00\x00", "7", "[1]", '{"loss": 1}', '{"step": 2', "null"])
def test_a_line_that_is_no_report_is_left_out_and_said(tmp_path, caplog, line):
    (tmp_path / METRICS_FILE).write_text(f'{{"step": 1}}\n{line}\n\n{{"step": 3}}\n')
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 3]
    assert "1 line(s)" in caplog.text


def test_a_line_written_before_the_end_can_be_read(tmp_path):
    writer = MetricWriter(tmp_path, 0)
    writer.write(10, {"loss": 2.0})
    assert read_metrics(tmp_path)[0]["loss"] == 2.0
    writer.close()


def test_the_command_draws_runs(tmp_path, capsys):
    (tmp_path / METRICS_FILE).write_text('{"step": 1, "loss": 2.0}\n')
    assert telemetry.main(["plot", str(tmp_path), "--metrics", "loss"]) == 0
    assert capsys.readouterr().out.split() == [
        str(tmp_path / "curves.html"),
        str(tmp_path / "curves.png"),
    ]
    assert telemetry.main(["plot", str(tmp_path / "nowhere")]) == 2
    assert "nowhere: no such directory" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        telemetry.main(["plot", "--help"])
    assert "--x samples --smooth 20" in capsys.readouterr().out
