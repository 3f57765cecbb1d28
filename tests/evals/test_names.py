import importlib.util
import json

import pytest

from hqclip_jax.evals import names
from hqclip_jax.evals.datasets import EvalDataError
from hqclip_jax.evals.names import (
    DEFAULT_TEMPLATES,
    class_names,
    imagenet_names,
    read_names,
    read_templates,
    templates_for,
)

needs_openclip = pytest.mark.skipif(
    importlib.util.find_spec("open_clip") is None, reason="open_clip is not installed"
)


def test_lines_or_a_key_of_a_table(tmp_path):
    lines = tmp_path / "n.txt"
    lines.write_text("bŏa\n crane \n\n", encoding="utf-8")
    assert read_names(lines) == ("bŏa", "crane")
    table = tmp_path / "en.json"
    table.write_text(json.dumps({"birds": ["crane: a bird", "gull"], "none": [], "odd": [1]}))
    assert read_names(tmp_path / "en.json:birds") == ("crane: a bird", "gull")
    for key, message in (("fish", "has no key 'fish'"), ("none", "no list"), ("odd", "no list")):
        with pytest.raises(EvalDataError, match=message):
            read_names(tmp_path / f"en.json:{key}")
    with pytest.raises(EvalDataError, match=r"no\.json is missing"):
        read_names(tmp_path / "no.json:birds")


def test_template_needs_a_place_for_the_class(tmp_path):
    file = tmp_path / "t.txt"
    file.write_text("a {c}\na {}\n")
    with pytest.raises(EvalDataError, match=r"'a \{\}' has no \{c\}"):
        read_templates(file)


def test_given_file_then_the_folders_own_then_the_raw_names(tmp_path):
    raw = ["apple_pie", "œuf"]
    assert class_names(raw, tmp_path, None) == ("apple pie", "œuf")
    assert templates_for(raw, tmp_path, None) == DEFAULT_TEMPLATES
    (tmp_path / "classnames.txt").write_text("pie\negg\n")
    (tmp_path / "zeroshot_classification_templates.txt").write_text("some {c}\n")
    assert class_names(raw, tmp_path, None) == ("pie", "egg")
    assert templates_for(raw, tmp_path, None) == ("some {c}",)
    given = tmp_path / "given.txt"
    given.write_text("p {c}\ne {c}\n")
    assert class_names(raw, tmp_path, given) == templates_for(raw, tmp_path, given)


def test_names_must_be_as_many_as_the_classes(tmp_path):
    (tmp_path / "classnames.txt").write_text("pie\n")
    with pytest.raises(EvalDataError, match=r"classnames\.txt has 1 names for the 2 classes of"):
        class_names(["a", "b"], tmp_path, None)


@needs_openclip
def test_wordnet_ids_are_imagenets_names(tmp_path):
    ids = ["n01440764", "n03445777", "n15075141"]  # first, 574th and last
    assert class_names(ids, tmp_path, None) == ("tench", "golf ball", "toilet paper")
    templates = templates_for(ids, tmp_path, None)
    assert (len(templates), templates[0]) == (80, "a bad photo of a {c}.")
    with pytest.raises(EvalDataError, match="1 classes such as n99999999 are none of ImageNet's"):
        imagenet_names(["n01440764", "n99999999"], tmp_path)


@needs_openclip
def test_imagenets_names_are_those_of_the_published_table(real_data, tmp_path):
    prompts = real_data / "prompts"
    ids = names._imagenet_ids()
    assert ids == sorted(ids)
    assert imagenet_names(ids, tmp_path) == read_names(prompts / "en_classnames.json:imagenet1k")
    table = prompts / "en_zeroshot_classification_templates.json:imagenet1k"
    assert templates_for(ids, tmp_path, None) == read_templates(table)


def test_without_openclip_the_files_to_supply_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(names, "_read_openclip", lambda: None)
    with pytest.raises(EvalDataError, match=r"open_clip_torch`, or write classnames\.txt and zero"):
        class_names(["n01440764"], tmp_path, None)
    (tmp_path / "classnames.txt").write_text("tench\n")
    assert class_names(["n01440764"], tmp_path, None) == ("tench",)
