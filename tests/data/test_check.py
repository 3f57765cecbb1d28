import dataclasses
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from hqclip_jax.data import check
from hqclip_jax.data.record import MANIFEST_FILE
from tests.conftest import make_record
from tests.data.test_shards import a_shard, flip


@pytest.fixture
def run(capsys):
    """Runs the command with one process; its exit status and report."""

    def checked(directory, *arguments: str) -> tuple[int, dict]:
        status = check.main([str(directory), "--json", "--workers=1", *arguments])
        return status, json.loads(capsys.readouterr().out)

    return checked


@pytest.fixture
def copy(dataset: Path, tmp_path: Path) -> Path:
    return shutil.copytree(dataset, tmp_path / "copy")


def picture(kind: str, side: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (side + 10, side)).save(buffer, kind)
    return buffer.getvalue()


def test_sound_data_set_and_what_is_in_it(dataset_of, run):
    first = make_record(1)
    records = [
        first,
        dataclasses.replace(first, image=picture("PNG", 64), caption=" "),
        dataclasses.replace(first, image=picture("WEBP", 300), neg_desc=(), neg_tags=()),
        dataclasses.replace(first, image=picture("JPEG", 1000), tags=(), desc=()),
    ]
    status, told = run(dataset_of(records))
    assert status == 0 and told["sound"] and told["complete"] and told["defects"] == {}
    assert told["records"] == told["records_read"] == 4
    assert told["lacking"] == {
        "caption": 1, "description": 1, "negatives": 1, "tags in the vocabulary": 1
    }  # fmt: skip
    assert told["formats"] == {"JPEG": 2, "PNG": 1, "WEBP": 1}
    assert told["shorter_side"] == {
        "below 64 px": 1, "64-127 px": 1, "224-447 px": 1, "896 px and more": 1
    }  # fmt: skip


def test_defects_are_counted_and_named(dataset_of, run, copy):
    broken = dataclasses.replace(make_record(2), image=b"\xff\xd8 no picture")
    status, told = run(dataset_of([make_record(1), broken]))
    assert status == 1 and told["defects"] == {"picture that does not decode": 1}
    assert "00000-of-00001 record 1: " in told["examples"]["picture that does not decode"][0]

    flip(a_shard(copy), 10_000)
    status, told = run(copy)
    assert status == 1 and not told["sound"]
    assert told["defects"] == {
        "damaged record": 1, "shard with another SHA-256 than the manifest says": 1
    }  # fmt: skip
    assert f"{a_shard(copy)} record " in told["examples"]["damaged record"][0]
    assert told["records_read"] == 60 and sum(told["formats"].values()) == 59


def test_flip_that_no_record_holds_is_found_by_its_hash(copy, run):
    flip(a_shard(copy), 65_000)  # between the records and the index
    assert run(copy)[1]["defects"] == {"shard with another SHA-256 than the manifest says": 1}


def test_faulty_shards_are_all_named_and_the_others_read(copy, run):
    shard = a_shard(copy)
    os.truncate(shard, 70_000)
    status, told = run(copy)
    assert status == 1 and told["records_read"] == 25
    assert told["defects"] == {"shard that was cut or changed": 1}
    shard.unlink()
    assert run(copy)[1]["defects"] == {"shard that is missing": 1}


def test_damaged_index_is_told_for_every_range_of_the_shard(copy, run):
    flip(a_shard(copy), a_shard(copy).stat().st_size - 65_536 + 50)
    status, told = run(copy)
    assert status == 1 and told["defects"]["shard that can't be read"] == 1


def test_sample_reads_a_share_the_same_every_time(copy, run):
    flip(a_shard(copy), 65_000)
    status, told = run(copy, "--sample=0.3")
    assert 5 < told["records_read"] < 30 and status == 1  # the hash is of the whole
    again = run(copy, "--sample=0.3")[1]
    assert again["records_read"] == told["records_read"]


def test_what_cannot_be_checked(tmp_path, copy, capsys):
    assert check.main([str(tmp_path / "nothing")]) == 2
    assert "is not a directory" in capsys.readouterr().err
    (copy / MANIFEST_FILE).write_text("{")
    assert check.main([str(copy)]) == 2


@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_data_set_in_a_bucket(remote, run, scheme, tmp_path):
    status, told = run(f"{scheme}://bucket/some/data", f"--cache={tmp_path}")
    assert status == 0 and told["records_read"] == 60


def test_report_for_people(copy, capsys):
    flip(a_shard(copy), 10_000)
    assert check.main([str(copy), "--workers=2"]) == 1
    out = capsys.readouterr().out
    assert "1 × damaged record" in out and "what is in 59 sound records" in out
    assert "2 shards, 60 of 60 records read" in out and "2 defects" in out


def test_interrupt_reports_what_it_has(dataset, monkeypatch, capsys):
    def interrupted(checker, jobs, workers):
        yield from ((job, checker(job)) for _, job in zip(range(2), jobs))
        raise KeyboardInterrupt

    monkeypatch.setattr(check, "run_jobs", interrupted)
    assert check.main([str(dataset)]) == 130
    out = capsys.readouterr().out
    assert "25 of 60 records read" in out and "interrupted, no defect so far" in out


def test_interrupt_ends_the_processes(dataset_of, tmp_path):
    directory = dataset_of([make_record(1)] * 20_000)
    command = [sys.executable, "-m", "hqclip_jax.data.check", str(directory), "--workers=2"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    while process.poll() is None and not _has_started(process.pid):
        pass
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err and "interrupted" in out


def _has_started(pid: int) -> bool:
    """Both processes and Python's resource tracker are there, and only the parent hears SIGINT."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    try:
        return len(children) == 3 and all(map(_ignores, children)) and not _ignores(pid)
    except FileNotFoundError:  # one of them has just ended
        return False


def _ignores(pid: int | str) -> bool:
    ignored = re.search(r"SigIgn:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())
    return bool(int(ignored[1], 16) & 1 << signal.SIGINT - 1)
