"""The whole way to a teacher's annotations: sample drawn, a server asked, a data set written."""

import argparse
import json

import pytest

from refine.errors import RefineError
from refine.prompts import load_prompt
from refine.teaching import teacher
from tests.refine.endpoint import OUTPUT_TOKENS, PROMPT_TOKENS, TEXTS, Endpoint, caption_of

KEY = "sk-0123456789abcdef"


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)


@pytest.fixture
def pairs(tmp_path, make):
    for tar in range(3):
        make.pairs(tmp_path / f"in/{tar}.tar", range(20 * tar, 20 * tar + 20))
    return tmp_path / "in"


def parse(*arguments) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    teacher.add_command(parser.add_subparsers())
    return parser.parse_args(["teach", *map(str, arguments)])


def teach(*arguments) -> None:
    args = parse(*arguments, "--workers", 1)
    args.command(args)


def own_answer(body: dict) -> str:
    """An answer that names the pair that was asked about."""
    number = caption_of(body).rpartition("no ")[2].split('"')[0].split()[0]
    return json.dumps(TEXTS | {"desc": [f"a red apple with the number {number} on it."]})


def test_a_sample_is_drawn_and_annotated(tmp_path, pairs, records, make):
    out = tmp_path / "out"
    with Endpoint(answer=own_answer) as endpoint:
        teach("--input", pairs, "--output", out, "--samples", 25, "--model", "m", "--base-url",
              endpoint.url)  # fmt: skip
        assert len(endpoint.bodies) == 25
        before = load_prompt("teacher-v1").text.partition("{{image}}")[0]
        assert endpoint.bodies[0]["messages"][0]["content"][0]["text"] == before
    found = records(out / "annotated")
    drawn = json.loads((out / "sample.json").read_text())
    assert len(found) == drawn["drawn"] == 25
    numbers = {make.uid(n): n for n in range(60)}
    for record in found:
        n = numbers.pop(record.uid)
        assert record.desc == (f"a red apple with the number {n} on it.",)
        assert (record.caption, record.image) == (f"A red apple no {n}", make.image(n))
        assert record.refiner == f"openai:m:{load_prompt('teacher-v1').digest}"
    told = json.loads((out / "annotated/manifest.json").read_text())["engine_stats"]
    assert told["prompt_tokens"] == 25 * PROMPT_TOKENS
    assert told["output_tokens"] == 25 * OUTPUT_TOKENS


def test_the_same_command_asks_nothing_again(tmp_path, pairs, records):
    out = tmp_path / "out"
    with Endpoint(lambda number, body: "401" if number == 10 else "ok") as endpoint:
        command = ("--input", pairs, "--output", out, "--samples", 25, "--model", "m",
                   "--base-url", endpoint.url, "--slots", 1)  # fmt: skip
        with pytest.raises(RefineError, match="OPENAI_API_KEY") as caught:
            teach(*command)
        assert KEY not in str(caught.value)
        drawn = (out / "sample.json").stat().st_mtime_ns
        teach(*command)
        assert len(endpoint.bodies) == 26
        assert (out / "sample.json").stat().st_mtime_ns == drawn
        teach(*command)
        assert len(endpoint.bodies) == 26
        with pytest.raises(RefineError, match="another --output"):
            teach(*command, "--samples", 24)
        with pytest.raises(RefineError, match="another --output"):
            teach(*command, "--max-tokens", 100)
    assert len(records(out / "annotated")) == 25


def test_the_limit_of_cost_holds_over_all_starts(tmp_path, pairs, records):
    prices = ("--price-in", 10, "--price-out", 100, "--max-tokens", OUTPUT_TOKENS)
    each = (PROMPT_TOKENS * 10 + OUTPUT_TOKENS * 100) / 1e6
    with Endpoint() as endpoint:
        command = ("--input", pairs, "--output", tmp_path / "out", "--samples", 25, "--model", "m",
                   "--base-url", endpoint.url, *prices)  # fmt: skip
        for _ in range(3):
            with pytest.raises(RefineError, match=r"--max-cost 0.03.*the same command"):
                teach(*command, "--max-cost", 10 * each)
            assert 7 <= len(endpoint.bodies) <= 10
        teach(*command, "--max-cost", 100 * each)
        assert len(endpoint.bodies) == 25
    assert len(records(tmp_path / "out/annotated")) == 25


def test_what_is_wrong_is_said_before_anything_is_read(tmp_path, pairs):
    command = ("--input", pairs, "--output", tmp_path / "out", "--model", "m")
    for wrong, message in (
        (("--max-cost", 5), "--max-cost needs --price-in"),
        (("--prompt", "no-such"), "--prompt no-such"),
        (("--base-url", "localhost:8000"), "--base-url localhost:8000"),
    ):
        with pytest.raises(RefineError, match=message):
            teach(*command, *wrong)
    with pytest.raises(RefineError, match="--input"):
        teach("--input", tmp_path / "absent", "--output", tmp_path / "out", "--model", "m")
    assert not (tmp_path / "out").exists()


def test_every_option_reaches_the_run(tmp_path):
    from refine import command

    given = ["--base-url", "http://there/v1", "--prompt", "student-v1", "--max-pixels", "1000",
             "--slots", "5", "--temperature", "0.5", "--max-tokens", "99", "--retries", "7",
             "--requests-per-minute", "11", "--tokens-per-minute", "12", "--timeout", "13.5",
             "--patience", "14.5", "--price-in", "0.25", "--price-out", "0.75", "--max-cost",
             "15.5"]  # fmt: skip
    assert set(given[::2]) == {option for option, _, _ in teacher.OPTIONS}
    args = parse("--input", "x", "--output", tmp_path, "--model", "org/m", "--seed", "-3",
                 "--workers", "2", "--structured", *given)  # fmt: skip
    run = teacher.run_arguments(args, tmp_path / "pairs")
    parser = argparse.ArgumentParser()
    command.add_command(parser.add_subparsers())
    asked = vars(parser.parse_args(run))
    for option, text in zip(given[::2], given[1::2]):
        assert str(asked[option[2:].replace("-", "_")]) == text
    assert (asked["engine"], asked["model"], asked["seed"]) == ("openai", "org/m", -3)
    assert asked["structured"] is True and asked["workers"] == 2
    assert asked["input"] == [str(tmp_path / "pairs")]
    assert asked["output"] == tmp_path / "annotated"
    plain = parse("--input", "x", "--output", tmp_path, "--model", "m")
    asked = vars(parser.parse_args(teacher.run_arguments(plain, tmp_path / "pairs")))
    assert asked["prompt"] == "teacher-v1"
    assert asked["structured"] is False and asked["temperature"] is None
