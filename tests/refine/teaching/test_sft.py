import argparse
import json
import re
from dataclasses import replace

import pytest

from refine.errors import RefineError
from refine.prompts import load_prompt
from refine.teaching import sft

PROMPT = load_prompt("student-v1")


def parsed(*arguments: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    sft.add_command(parser.add_subparsers())
    needed = {"--model": "base", "--data": "data", "--output": "out"}
    given = dict(zip(arguments[::2], arguments[1::2]))
    return parser.parse_args(["sft", *map(str, [x for p in (needed | given).items() for x in p])])


@pytest.fixture
def data(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "manifest.json").write_text(json.dumps({"shards": [{"sha256": "0"}]}))
    return tmp_path / "data"


@pytest.fixture
def course(data):
    return sft.Course.of(parsed("--data", data), PROMPT)


def test_the_rate_is_the_methods_unless_said(data):
    for method, rate in (("full", 1e-5), ("lora", 1e-4)):
        args = parsed("--data", data, "--method", method)
        assert sft.Course.of(args, PROMPT).lr == rate
    assert sft.Course.of(parsed("--data", data, "--lr", 0.5), PROMPT).lr == 0.5


def test_a_batch_is_made_of_micro_batches(data, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    course = sft.Course.of(parsed("--data", data, "--batch", 32, "--micro-batch", 4), PROMPT)
    assert course.accumulation == 4
    assert sft.Course.of(parsed("--data", data, "--batch", 32), PROMPT).micro_batch == 16
    with pytest.raises(RefineError, match="--batch 32 is no multiple of 2 processes"):
        sft.Course.of(parsed("--data", data, "--batch", 32, "--micro-batch", 5), PROMPT)


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_a_held_out_part_is_a_part(data, share):
    with pytest.raises(RefineError, match="is no share"):
        sft.Course.of(parsed("--data", data, "--held-out", share), PROMPT)


def test_only_the_same_course_goes_on(course, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    sft.claim(out, course)
    sft.claim(out, course)
    message = "begun with --max-pixels 262144, and now it is 4096"
    with pytest.raises(RefineError, match=message):
        sft.claim(out, replace(course, max_pixels=4096))
    with pytest.raises(RefineError, match="--prompt"):
        sft.claim(out, replace(course, prompt="another"))


def test_a_folder_with_other_things_is_left_alone(course, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("")
    with pytest.raises(RefineError, match=re.escape("(thesis.tex)")):
        sft.claim(tmp_path / "out", course)


def test_a_finished_training_is_told_again(data, tmp_path, capsys):
    args = parsed("--data", data, "--output", tmp_path / "out")
    (tmp_path / "out").mkdir()
    sft.claim(tmp_path / "out", sft.Course.of(args, PROMPT))
    exam = {"asked": 64, "valid": 60, "rejected": {"no_json": 4}}
    result = {"trained_on": 9800, "steps": 613, "exam": exam}
    (tmp_path / "out" / sft.RESULT).write_text(json.dumps(result))
    args.command(args)
    told = " ".join(capsys.readouterr().err.split())
    assert "9,800 records in 613 steps; of 64 held-out answers 60 are valid 4 no_json" in told


def test_help_names_the_next_command(capsys):
    with pytest.raises(SystemExit):
        parsed("--help", "")
    told = capsys.readouterr().out
    assert "refine run --engine vllm --model student" in told and "torchrun" in told
