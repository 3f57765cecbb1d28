import json
from collections import Counter
from dataclasses import asdict, replace

import pytest

from hqclip_jax import demo_lvlm, report
from hqclip_jax.data.record import LISTS, MANIFEST_FILE, decode
from hqclip_jax.data.shards import open_source
from hqclip_jax.demo import DemoError, refine
from hqclip_jax.demo_lvlm import RECIPES, STREAMS, Lvlm, Settings
from hqclip_jax.demo_lvlm_report import MEASURES, student_sections, student_table
from hqclip_jax.scene_check import judge, shares
from hqclip_jax.shapes import sample

SETTINGS = Settings(
    taught=30, fresh=24, unseen=12, base_steps=7, epochs=1.0, samples=64, items=12, seed=0
)


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    """A demo as it is before the student, and what a faultless one would have written."""
    out = tmp_path_factory.mktemp("demo")
    demo_lvlm.render(out, SETTINGS)
    for name, data in (("taught", "taught"), ("fresh", "refined"), ("unseen", "unseen")):
        refine(out / "pairs" / name, out / "annotations" / name, out / data)
    return out


def uids(out, data) -> set[str]:
    return {decode(entry).uid for entry in open_source(out / data)}


def test_no_scene_is_taught_and_asked_about(rendered):
    parts = {data: uids(rendered, data) for data in ("taught", "refined", "unseen")}
    assert {name: len(part) for name, part in parts.items()} == {
        "taught": 30, "refined": 24, "unseen": 12
    }  # fmt: skip
    assert len(set.union(*parts.values())) == 66


def test_held_out_pairs_are_only_in_what_is_called_unseen():
    for name, (stream, split) in STREAMS.items():
        drawn = [sample(stream, index, split) for index in range(50)]
        assert all(scene.held_out is (name == "unseen") for scene in drawn)


def test_a_faultless_student_is_found_faultless(rendered):
    for data in ("refined", "unseen"):
        path = rendered / data / MANIFEST_FILE
        stored = json.loads(path.read_text())
        path.write_text(json.dumps(stored | {"engine_stats": {"images_per_second": 50.0}}))
    demo_lvlm.score(rendered, SETTINGS)
    student = json.loads((rendered / "student.json").read_text())
    for name, count in (("fresh", 24), ("unseen", 12)):
        assert student[name]["kept"] == student[name]["asked"] == count
        assert set(student[name]["shares"].values()) == {1.0}
        assert student[name]["engine"] == {"images_per_second": 50.0}


def test_records_meet_the_scene_that_they_are_about(rendered):
    found = Counter()
    for scene, record in demo_lvlm.told_of(rendered / "unseen", SETTINGS, "unseen"):
        assert scene.uid == record.uid and scene.held_out
        found.update(judge({field: getattr(record, field) for field in LISTS}, scene))
    assert shares(found)["held_out_pair"] == 1.0


def test_the_gallery_has_the_students_own_words(rendered):
    shown = demo_lvlm.shown(rendered, SETTINGS)
    first = decode(open_source(rendered / "unseen")[0])
    assert len(shown) == 8
    assert shown[0].desc == ", ".join(first.desc) and shown[0].scene.uid == first.uid


def test_recipes_differ_in_texts_and_losses_alone():
    by_name = {recipe.name: recipe for recipe in RECIPES}
    assert by_name["alt_text"].data == by_name["student"].data != by_name["truth"].data
    same = replace(by_name["truth"], name="student", title=by_name["student"].title, data="refined")
    assert same == by_name["student"]
    assert (by_name["alt_text"].p_desc, by_name["alt_text"].hni, by_name["alt_text"].tag) == (
        0,
        0,
        0,
    )


@pytest.fixture
def interpreter(tmp_path):
    """Stands in for the other environment's: notes its arguments, and ends with STATUS."""
    path = tmp_path / "python"
    path.write_text(
        '#!/bin/sh\necho "$HF_HUB_OFFLINE $@" >> "$(dirname "$0")/calls"\nexit ${STATUS:-0}\n'
    )
    path.chmod(0o755)
    return path


def test_each_stage_asks_for_what_the_others_made(interpreter, tmp_path):
    lvlm = Lvlm(interpreter, tmp_path / "out")
    lvlm.make_base(SETTINGS)
    lvlm.fine_tune(SETTINGS)
    lvlm.refine("fresh", "refined")
    base, sft, run = (tmp_path / "calls").read_text().splitlines()
    out = tmp_path / "out"
    assert f"1 -m refine.teaching.tiny_pretrain --output {out}/base" in base and "--steps 7" in base
    assert f"-m refine sft --model {out}/base --data {out}/taught --output {out}/student" in sft
    assert f"--model {out}/student --prompt {out}/prompt.txt --input {out}/pairs/fresh" in run
    assert "--max-pixels 4096" in run and "--max-pixels 4096" in sft
    assert '--vllm-option=dtype="float32"' in run


def test_a_failed_stage_ends_the_demo_with_its_status(interpreter, tmp_path, monkeypatch):
    monkeypatch.setenv("STATUS", "7")
    with pytest.raises(DemoError, match=r"-m refine\.teaching\.tiny_pretrain stopped") as stop:
        Lvlm(interpreter, tmp_path).make_base(SETTINGS)
    assert stop.value.status == 7


def test_an_absent_environment_is_told_before_anything_is_rendered(tmp_path, capsys):
    out = tmp_path / "out"
    status = demo_lvlm.main(["--out", str(out), "--refine-python", str(tmp_path / "python")])
    assert status == 2 and not out.exists()
    assert "`make refine-env` makes it" in " ".join(capsys.readouterr().out.split())


def test_the_tables_say_every_measure():
    measured = dict.fromkeys(MEASURES, 0.125)
    fresh = {"asked": 4000, "kept": 3990, "shares": measured, "engine": {"seconds": 61.7}}
    del measured["held_out_pair"]
    student = {"fresh": fresh, "unseen": fresh | {"shares": measured | {"held_out_pair": 0.5}}}
    table = student_table(student)
    assert table.row_count == len(MEASURES) + 1
    (_, (results, note)), (_, (pace,)) = sections = student_sections(student)
    assert "was in its training" in note
    page = report.page("title", "lead", sections)
    assert results in page and pace in page
    assert results.count("12.5</td>") == 2 * len(MEASURES) - 2
    assert "50.0" in results and "<td>-</td>" in results
    assert "3,990 of 4,000" in results and "62" in pace


def test_settings_are_kept_with_the_results(interpreter, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    stored = {"settings": asdict(SETTINGS), "seconds": {}, "finished": []}
    (out / "stages.json").write_text(json.dumps(stored))
    assert demo_lvlm.main(["--out", str(out), "--refine-python", str(interpreter)]) == 2
