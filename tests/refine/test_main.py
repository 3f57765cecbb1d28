"""The command line, and the promises around it: no JAX, no TensorFlow, TFDS reads what it wrote."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from refine.__main__ import main

ROOT = Path(__file__).parents[2]

BLOCKED = """
import importlib.machinery, json, sys
names = {"jax", "jaxlib", "flax", "optax", "orbax", "grain", "torch", "tensorflow", "vllm"}
class Absent(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in names else super().find_spec(name, path, target)
sys.meta_path = [Absent if f is importlib.machinery.PathFinder else f for f in sys.meta_path]
try:
    import jax
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("jax is not hidden")
from refine.__main__ import main
"""

READ = """
status = main(["run", *sys.argv[2:], "--output", sys.argv[1]])
assert status == 0, status
import tensorflow_datasets as tfds
source = tfds.builder_from_directory(sys.argv[1]).as_data_source(
    "train", decoders={"image": tfds.decode.SkipDecoding()}
)
for row in source:
    plain = {}
    for name, value in row.items():
        if name == "image":
            plain[name] = value.hex()
        elif name in ("desc", "neg_desc", "tags", "neg_tags"):
            plain[name] = [text.decode() for text in value]
        else:
            plain[name] = value.decode() if isinstance(value, bytes) else int(value)
    print(json.dumps(plain))
assert not {m.partition(".")[0] for m in sys.modules} & names
"""


def run_blocked(*arguments) -> list[dict]:
    """Runs and reads through TFDS in a process without JAX, torch, TensorFlow and vLLM."""
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED + READ, *map(str, arguments)],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def plain(record) -> dict:
    lists = {k: list(v) for k, v in vars(record).items() if isinstance(v, tuple)}
    return vars(record) | lists | {"image": record.image.hex()}


def test_tfds_reads_every_record_with_nothing_else_installed(tmp_path, make, records):
    make.pairs(tmp_path / "p/0.tar", range(6))
    bare = {"tags": [], "neg_tags": [], "desc": [], "neg_desc": []}
    notes = [(f"0/{make.uid(n)}.json", json.dumps(make.texts(n)).encode()) for n in range(5)]
    notes.append((f"0/{make.uid(5)}.json", json.dumps(bare).encode()))
    make.tar(tmp_path / "a.tar", notes)
    out = tmp_path / "out"
    rows = run_blocked(
        out, "--engine", "annotations", "--input", tmp_path / "p", "--annotations",
        tmp_path / "a.tar", "--shard-mb", "0.003", "--workers", 1,
    )  # fmt: skip
    assert len(rows) == 6
    assert rows == [plain(r) for r in records(out)]
    assert [rows[5][name] for name in bare] == [[], [], [], []]
    assert rows[0]["neg_desc"] == ["a pear of number 0."]


def test_rules_need_nothing_else_installed_and_say_what_they_are(tmp_path, make, records):
    make.pairs(tmp_path / "p/0.tar", range(3))
    out = tmp_path / "out"
    rows = run_blocked(out, "--engine", "rules", "--input", tmp_path / "p", "--workers", 1)
    assert rows == [plain(r) for r in records(out)]
    assert [row["desc"] for row in rows] == [[f"a red apple no {n}"] for n in range(3)]
    assert all(row["neg_desc"] and row["neg_desc"] != row["desc"] for row in rows)
    manifest = json.loads((out / "manifest.json").read_text())
    assert "never looks at the picture" in manifest["note"]
    assert manifest["engine"] == "rules"


@pytest.mark.parametrize("engine", ["annotations", "rules"])
def test_real_pairs(real_data, tmp_path, refine, counts, records, engine):
    grocery = real_data / "grocery"
    joined = ("--annotations", grocery / "annotations/train") if engine == "annotations" else ()
    out = tmp_path / "out"
    assert (
        refine("--engine", engine, "--input", grocery / "pairs/train", *joined, "--output", out)
        == 0
    )
    found = counts(out)
    assert found.pop("annotations", 2640) == 2640
    assert found == {"pairs": 2640, "joined": 2640}
    import tensorflow_datasets as tfds

    source = tfds.builder_from_directory(out).as_data_source(
        "train", decoders={"image": tfds.decode.SkipDecoding()}
    )
    expected = records(out)
    assert len(source) == len(expected) == len({r.uid for r in expected}) == 2640
    for row, record in zip(source, expected):
        assert row["uid"].decode() == record.uid
        assert row["image"] == record.image
        assert [t.decode() for t in row["desc"]] == list(record.desc)
        assert (row["width"], row["height"]) == (record.width, record.height)
    assert sum(bool(r.desc and r.tags) for r in expected) == 2640


def test_no_command_lists_the_commands(capsys):
    with pytest.raises(SystemExit) as e:
        main([])
    assert e.value.code == 2
    assert "COMMAND" in capsys.readouterr().err


def test_help_teaches_and_names_the_rules_engine_for_what_it_is(capsys):
    with pytest.raises(SystemExit) as e:
        main(["run", "--help"])
    assert e.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "it never looks at the picture" in shown
    assert "examples:" in shown and "--annotator vlm-150m" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--engine", "annotations"), "--engine annotations needs --annotations TARS"),
        (("--engine", "rules", "--annotations", "x"), "--annotations is not for --engine rules"),
        (("--engine", "rules", "--index", "x"), "--index is not for --engine rules"),
        (("--engine", "rules", "--workers", "0"), "0 is not 1 or more"),
        (("--engine", "rules", "--shard-mb", "0"), "0 is not more than 0"),
        (("--engine", "rules", "--name", "My Data"), "use lower-case letters"),
        (("--engine", "telepathy"), "invalid choice"),
    ],
)
def test_arguments_that_do_not_fit(tmp_path, make, capsys, arguments, message):
    make.pairs(tmp_path / "0.tar", [0])
    with pytest.raises(SystemExit) as e:
        main(["run", "--input", str(tmp_path), "--output", str(tmp_path / "out"), *arguments])
    assert e.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--input", "gone/*.tar", "--input gone/*.tar: no such file"),
        ("--annotations", "gone.tar", "--annotations gone.tar: no such file"),
        ("--uids", "gone.npy", "--uids gone.npy: no such file"),
    ],
)
def test_missing_files_are_named(tmp_path, make, refine, capfd, option, value, message):
    given = {
        "--input": make.pairs(tmp_path / "0.tar", [0]),
        "--annotations": make.annotations(tmp_path / "a.tar", [0]),
        "--output": tmp_path / "out",
        "--engine": "annotations",
    } | {option: value}
    assert refine(*[part for item in given.items() for part in item]) == 2
    assert message in capfd.readouterr().err
    assert not (tmp_path / "out").exists()
