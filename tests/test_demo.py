import json
import tarfile
from types import SimpleNamespace

import pytest

from hqclip_jax import demo
from hqclip_jax.config import load, split_overrides
from hqclip_jax.demo import DemoError, Settings, Stages
from hqclip_jax.demo_report import COLUMNS, Told, gallery, gallery_scenes, margin
from hqclip_jax.shapes import HELD_OUT, PAIRS

SETTINGS = Settings(scenes=12, samples=64, items=12, seed=5)


def test_a_stage_runs_once_and_its_time_is_kept(tmp_path):
    ran = []
    Stages(tmp_path, SETTINGS).run("render", lambda: ran.append(1))
    again = Stages(tmp_path, SETTINGS)
    seconds = again.seconds["render"]
    again.run("render", lambda: ran.append(2))
    assert ran == [1]
    assert again.seconds["render"] == seconds


def test_an_interrupted_stage_runs_again_and_its_time_adds_up(tmp_path, monkeypatch):
    clock = iter([0.0, 5.0, 100.0, 107.0])
    monkeypatch.setattr(demo, "time", SimpleNamespace(monotonic=lambda: next(clock)))

    def stopped():
        raise DemoError("stopped", 143)

    with pytest.raises(DemoError):
        Stages(tmp_path, SETTINGS).run("train", stopped)
    again = Stages(tmp_path, SETTINGS)
    assert again.finished == [] and again.seconds == {"train": 5.0}
    again.run("train", lambda: None)
    assert Stages(tmp_path, SETTINGS).seconds == {"train": 12.0}


def test_a_folder_made_with_other_settings_is_refused(tmp_path, capsys):
    Stages(tmp_path, SETTINGS).run("render", lambda: None)
    assert demo.main(["--quick", "--out", str(tmp_path)]) == 2
    told = capsys.readouterr().out
    assert "delete the folder" in told and "'samples': 64" in told and "'samples': 256" in told


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    demo.render(out, SETTINGS)
    return out


def test_evaluation_sets_keep_seen_and_held_out_apart(rendered):
    for name, held_out in (("zeroshot_seen", False), ("zeroshot_held_out", True)):
        with tarfile.open(rendered / "eval" / name / "test" / "0.tar") as tar:
            labels = [tar.extractfile(m).read() for m in tar if m.name.endswith(".cls")]
        assert {PAIRS[int(label)] in HELD_OUT for label in labels} == {held_out}
        assert len({int(label) for label in labels}) == (8 if held_out else 40)
    held_out_names = [" ".join(pair) for pair in HELD_OUT]
    with tarfile.open(rendered / "eval" / "hard_negatives_seen" / "00000.tar") as tar:
        texts = b"".join(tar.extractfile(m).read() for m in tar if m.name.endswith("json"))
    assert not [name for name in held_out_names if name in texts.decode()]


def test_suite_and_refinement_take_what_was_rendered(rendered):
    from hqclip_jax.data.shards import open_source
    from hqclip_jax.evals.suite import load_suite

    suite = load_suite(str(rendered / "eval" / "suite.json"))
    assert {e.name for e in suite} == {name for _, name, _ in COLUMNS}
    for evaluator in suite:
        evaluator.check()
    demo.refine(rendered / "pairs", rendered / "annotations", rendered / "data")
    assert len(open_source(rendered / "data")) == 12


def test_recipes_differ_only_in_what_they_are_said_to(monkeypatch, tmp_path):
    import hqclip_jax.train

    calls = []
    monkeypatch.setattr(hqclip_jax.train, "main", lambda argv: calls.append(argv) or 0)
    for recipe in demo.RECIPES:
        demo.train(tmp_path, SETTINGS.samples, SETTINGS.seed, recipe)
    configs = []
    for argv in calls:
        overrides, rest = split_overrides(argv)
        configs.append(load(rest[0].removeprefix("--config="), overrides))
        assert rest[1].startswith(f"--workdir={tmp_path}/train/")
    chosen = [(c.data.p_desc, c.loss.hni, c.loss.tag) for c in configs]
    assert chosen == [(0, 0, 0), (0.5, 0, 0), (0.5, 1, 1)]
    assert len({(c.model, c.optim, c.seed, c.data.path) for c in configs}) == 1
    assert configs[0].optim.duration == "64 samples" and configs[0].seed == 5


def test_a_stopped_training_ends_the_demo_with_its_status(monkeypatch, tmp_path, capsys):
    import hqclip_jax.train

    monkeypatch.setattr(demo, "render", lambda out, settings: None)
    monkeypatch.setattr(demo, "refine", lambda pairs, annotations, data: None)
    monkeypatch.setattr(hqclip_jax.train, "main", lambda argv: 143)
    assert demo.main(["--out", str(tmp_path)]) == 143
    assert "continues it from its last checkpoint" in " ".join(capsys.readouterr().out.split())
    assert json.loads((tmp_path / "stages.json").read_text())["finished"] == ["render", "refine"]


def results(top1: float) -> dict:
    sets = {
        name: {score: top1, f"{score}_chance": 0.25, "n": 100, **categories}
        for _, name, score in COLUMNS
        for categories in [
            {f"accuracy/{c}": top1 for c in demo.scenes.CATEGORIES}
            | {f"n/{c}": 10 for c in demo.scenes.CATEGORIES}
        ]
    }
    cosines = {"desc": [0.5] * 8, "neg_desc": [0.25] * 8}
    return {"sets": sets, "gallery": cosines}


@pytest.fixture
def told() -> Told:
    scores = {"a": results(0.5), "b": results(0.75)}
    scores["a"]["sets"]["hard_negatives_held_out"]["accuracy/color"] = 0.2
    scores["a"]["sets"]["hard_negatives_held_out"]["n/color"] = 30
    rows = [{"step": 1, "samples": 64, "loss/contrastive": 4.0, "accuracy": 0.1}]
    metrics = {"a": rows, "b": rows}
    titles = {"a": "recipe <A>", "b": "recipe B"}
    return Told(titles, scores, metrics, gallery(), {"render": 3.0, "refine": 4.0}, "12 pictures")


def test_told_scores_chance_and_margins(told):
    assert told.scores("b") == [0.75] * 5
    assert told.chance() == [0.25] * 5
    assert told.margins() == [margin(0.5, 100)] * 5
    assert margin(0.5, 96) == pytest.approx(1.96 * 0.05)  # 98 of 196 would be 0.05 off at most
    assert margin(0.0, 96) > 0
    # ten items at 0.5 and thirty at 0.2
    assert told.by_category("a")["color"] == pytest.approx((10 * 0.5 + 30 * 0.2) / 40)


def test_report_holds_scores_caveats_and_the_gallery(told):
    page = told.page()
    assert "recipe &lt;A&gt;" in page and "recipe <A>" not in page
    assert page.count("<img ") == 8
    assert page.count("✓") == 16  # 0.50 over 0.25, eight pictures, two recipes
    assert "27.5" in page  # the category above, in percent
    assert "One seed and one tiny model" in page
    assert ">7<" in page  # seconds in all


def test_gallery_scenes_are_held_out():
    assert all(scene.held_out for scene in gallery_scenes())


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as stop:
        demo.main(["--help"])
    assert stop.value.code == 0
    told = capsys.readouterr().out
    assert "--quick" in told and "examples:" in told and "reuses what is finished" in told


@pytest.mark.slow
def test_quick_demo_runs_and_then_reuses_all(tmp_path, caplog):
    out = tmp_path / "demo"
    assert demo.main(["--quick", "--out", str(out)]) == 0
    page = (out / "report.html").read_text()
    assert page.count("<img ") == 8 and page.count("<svg") == 4
    scores = json.loads((out / "scores.json").read_text())
    assert set(scores) == {r.name for r in demo.RECIPES}
    for recipe in scores.values():
        for _, name, score in COLUMNS:
            assert 0 <= recipe["sets"][name][score] <= 1
    before = (out / "stages.json").read_text()
    assert demo.main(["--quick", "--out", str(out)]) == 0
    assert (out / "stages.json").read_text() == before
