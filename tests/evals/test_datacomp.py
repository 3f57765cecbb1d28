"""The packaged suites against what DataComp's `tasklist.yml` and `aggregate_scores.py` say."""

import json

import pytest

from hqclip_jax.evals.groups import group_means
from hqclip_jax.evals.multilabel import MultiLabel
from hqclip_jax.evals.retrieval import Retrieval
from hqclip_jax.evals.suite import (
    TASKS,
    SuiteError,
    known_suites,
    load_suite,
    suite_groups,
    tasks_help,
)
from hqclip_jax.evals.winogavil import WinoGAViL
from hqclip_jax.evals.zeroshot import ZeroShot

from .colours import write_classification, write_tar


def test_38_sets_and_their_main_scores(tmp_path):
    suite = load_suite("datacomp", tmp_path)
    assert len(suite) == 38
    mains = {e.name: e.main for e in suite if isinstance(e, ZeroShot) and e.main != "top1"}
    by_class = ("caltech101", "fgvc_aircraft", "flowers102", "pets")
    assert mains == dict.fromkeys(by_class, "mean_per_class") | {
        "iwildcam": "f1_macro",
        "fmow": "top1_worst_group",
        "geode": "top1_worst_group",
        "dollar_street": "top5_worst_group",
    }
    other = [e for e in suite if not isinstance(e, ZeroShot)]
    assert [type(e) for e in other] == [Retrieval, Retrieval, WinoGAViL]
    paths = {e.path.name for e in suite if isinstance(e, ZeroShot)}
    assert len(paths) == 35
    assert all(p.startswith("wds_") and p.endswith("_test") for p in paths)
    assert sum(e.size for e in suite if isinstance(e, ZeroShot)) == 687_806
    assert sum(e.classes for e in suite if isinstance(e, ZeroShot)) == 5_630


def test_groups(tmp_path):
    groups = suite_groups("datacomp")
    sizes = {"ImageNet": 1, "ImageNet shifts": 6, "VTAB": 13, "Retrieval": 3, "Average": 38}
    assert {group: len({*names}) for group, names in groups.items()} == sizes
    assert {*groups["Average"]} == {e.name for e in load_suite("datacomp", tmp_path)}
    scores = {name: i / 100 for i, name in enumerate(groups["Average"])}
    means = group_means(groups, scores)
    assert means["Average"].mean == pytest.approx(sum(range(38)) / 38 / 100)
    assert means["ImageNet"].mean == scores["imagenet1k"]
    assert suite_groups("imagenet") == {}


def test_group_means_of_a_published_model():
    """OpenCLIP's table of the 38 sets, row of ViT-L-14 datacomp_xl_s13b_b90k, and the means that
    DataComp's paper has for it in table 3."""
    row = (
        "0.7921,0.9465,0.9824,0.8736,0.3555,0.2443,0.3157,0.6649,0.7124,0.4750,0.9452,0.5853,0.6795,"
        "0.7205,0.6959,0.3255,0.9083,0.2785,0.8661,0.7425,0.8262,0.9506,0.8247,0.5118,0.6101,0.6941,"
        "0.9305,0.9925,0.7427,0.6769,0.8119,0.5451,0.4666,0.1614,0.5089,0.2403,0.6624,0.9152"
    )
    groups = suite_groups("datacomp")
    rest = [name for name in groups["Average"] if name != "imagenet1k"]
    scores = zip(["imagenet1k", *rest], map(float, row.split(",")), strict=True)
    means = {group: mean.mean for group, mean in group_means(groups, dict(scores)).items()}
    assert means == pytest.approx(
        {
            "ImageNet": 0.792, "ImageNet shifts": 0.679, "VTAB": 0.652, "Retrieval": 0.608,
            "Average": 0.663,
        },
        abs=5e-4,
    )  # fmt: skip


def test_groups_of_a_file(tmp_path):
    file = tmp_path / "mine.json"
    sets = [{"task": "zeroshot", "name": "a", "path": "a"}]
    file.write_text(json.dumps({"sets": sets, "groups": {"all": ["a"]}}))
    assert suite_groups(str(file)) == {"all": ["a"]}
    assert suite_groups(str(tmp_path)) == {}
    for members in (["b"], "a"):
        file.write_text(json.dumps({"sets": sets, "groups": {"all": members}}))
        with pytest.raises(SuiteError, match="group 'all' must list names of its sets"):
            suite_groups(str(file))


def test_sets_of_both_homes_are_found(tmp_path):
    write_classification(tmp_path / "wds_imagenet1k_test", {"red": 0})
    write_classification(tmp_path / "wds_mnist", {"red": 0})
    (tmp_path / "winogavil_test").mkdir()
    assert load_suite("imagenet", tmp_path)[0].path.name == "wds_imagenet1k_test"
    by_name = {e.name: e for e in load_suite("datacomp", tmp_path)}
    assert by_name["mnist"].path.name == "wds_mnist"
    assert by_name["cars"].path.name == "wds_cars_test"
    by_name["mnist"].check()
    assert by_name["winogavil"].path.name == "winogavil"


def test_multilabel_folder_is_a_suite_of_one(tmp_path):
    folder = write_classification(tmp_path / "voc", {"red": 0})
    (folder / "dataset_type.txt").write_text("multilabel\n")
    assert load_suite(str(folder)) == [MultiLabel("voc", folder)]


def test_entry_with_all_kinds_of_values(tmp_path):
    entry = {
        "task": "zeroshot", "name": "fmow", "path": "f", "classnames": "en.json:fmow",
        "metadata": ["region", "y"], "group_by": "region", "main": "top5_worst_group", "size": 9,
    }  # fmt: skip
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"sets": [entry]}))
    (found,) = load_suite(str(file))
    names = tmp_path / "en.json:fmow"
    expected = ZeroShot(
        "fmow", tmp_path / "f", "top5_worst_group", names, metadata=("region", "y"),
        group_by="region", size=9,
    )  # fmt: skip
    assert found == expected


@pytest.mark.parametrize(
    "more, message",
    [
        ({"sise": 9, "klasses": 2}, "'a' has unknown keys klasses, sise: zeroshot must have task"),
        ({"size": "9"}, "'a': size is \"9\", which should be int"),
        ({"path": 3}, "path is 3, which should be a path"),
        ({"metadata": "region"}, "should be a list of texts"),
        ({"metadata": [1]}, "should be a list of texts"),
        ({"main": "top2"}, "'a': main 'top2' is not one of top1, top5, mean_per_class, f1_macro"),
        ({"main": "top1_worst_group"}, "main 'top1_worst_group' is not one of"),
        ({"group_by": "region"}, r"group_by 'region' is none of metadata \[\]"),
    ],
)
def test_unusable_entry(tmp_path, more, message):
    file = tmp_path / "mine.json"
    entry = {"task": "zeroshot", "name": "a", "path": "a"} | more
    file.write_text(json.dumps({"sets": [entry]}))
    with pytest.raises(SuiteError, match=message):
        load_suite(str(file))


def test_help_names_every_task_and_key():
    text = tasks_help()
    assert all(f"    {task}" in text for task in TASKS)
    assert "May have main, classnames, templates, split, label, metadata, group_by," in text
    assert max(map(len, text.splitlines())) <= 100


def test_missing_set_of_a_suite_is_named(tmp_path, embedder):
    write_tar(tmp_path / "wds_flickr30k" / "0.tar", {})
    suite = {e.name: e for e in load_suite("datacomp", tmp_path)}
    suite["flickr30k"].check()
    assert known_suites()["datacomp"]["sets"]
    for name in ("mscoco", "winogavil", "geode"):
        with pytest.raises(ValueError, match=f"{suite[name].path}.* is missing"):
            suite[name].check()
