import numpy as np
import pytest

from hqclip_jax.evals import probe
from hqclip_jax.evals.datasets import EvalDataError
from hqclip_jax.evals.logistic import Classifier
from hqclip_jax.evals.outcome import Skips
from hqclip_jax.evals.probe import FewShot, Probe, best_penalty, held_out

from .colours import COLOURS, picture, write_tar

NAMES = list(COLOURS)


@pytest.mark.parametrize("peak", [-48, -47, -1, 0, 3, 48])
def test_search_finds_the_peak_of_the_published_grid_in_15_fits(peak):
    asked = []

    def score(penalty):
        asked.append(8 * np.log10(penalty))
        return -abs(asked[-1] - peak)

    assert best_penalty(score) == pytest.approx(10 ** (peak / 8))
    assert len(asked) == len({round(e) for e in asked}) <= 15
    assert sorted(round(e) for e in asked[:7]) == [*range(-48, 49, 16)]
    assert min(asked) >= -48.01
    assert max(asked) <= 48.01


def test_of_equal_penalties_the_middle_one():
    """All from 10⁻⁶ to 1 are equal; an end of them would be chosen by the last bit of the bias."""
    assert 1e-4 < best_penalty(lambda penalty: float(penalty < 2)) < 1e-1


def test_a_tenth_of_each_class_is_held_out():
    labels = np.repeat([0, 1, 2], [40, 19, 9])
    mask = held_out(labels)
    assert np.bincount(labels[mask], minlength=3).tolist() == [4, 1, 0]
    assert mask.tolist() == held_out(labels).tolist()


def two_tone(mine, other):
    return picture(mine, mine, other)


def write_split(folder, split, count, classes=NAMES, wrong=0):
    """`count` pictures a class, two thirds of its colour; the first `wrong` of the split lie."""
    members = {}
    for i in range(count * len(classes)):
        mine = classes[i % len(classes)]
        label = NAMES.index(mine)
        members[f"s{i}.png"] = two_tone(mine, NAMES[(label + 1 + i // len(classes)) % len(NAMES)])
        members[f"s{i}.cls"] = str(label if i >= wrong else (label + 1) % len(NAMES))
    write_tar(folder / split / "0.tar", members)
    (folder / split / "nshards.txt").write_text("1")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "classnames.txt").write_text("\n".join(NAMES))
    (tmp_path / "zeroshot_classification_templates.txt").write_text("a {c}")
    write_split(tmp_path, "train", 10)
    write_split(tmp_path, "test", 4, wrong=3)
    return tmp_path


def test_probe_learns_the_colours(folder, embedder):
    evaluator = Probe("colours", folder)
    evaluator.check()
    outcome = evaluator.run(embedder)
    found = outcome.scores
    assert found["top1"] == outcome.items["top1"].score() == pytest.approx(17 / 20)
    assert (found["top1_chance"], found["n"], found["n_train"]) == (1 / 5, 20, 50)
    assert outcome.settings["gradient"] <= 1e-4
    assert outcome.settings["penalty"] < 1e6
    assert [e.source for e in evaluator.examples(Skips())] == outcome.items["top1"].keys.tolist()


def test_val_chooses_and_then_trains(folder, embedder, monkeypatch):
    write_split(folder, "val", 2)
    seen = []
    fit = probe.fit_probe

    def spy(train, validation, *rest, **more):
        seen.append((len(train.keys), len(validation.keys)))
        return fit(train, validation, *rest, **more)

    monkeypatch.setattr(probe, "fit_probe", spy)
    assert Probe("colours", folder).run(embedder).scores["n_train"] == 60
    assert seen == [(50, 10)]


def test_few_shot_improves_with_shots_and_says_what_is_short(folder, embedder, monkeypatch):
    monkeypatch.setattr(probe, "SHOTS", (1, 4, 16))
    monkeypatch.setattr(probe, "SEEDS", 3)
    outcome = FewShot("colours", folder).run(embedder)
    found = outcome.scores
    assert outcome.main == "top1_4_shot"
    assert found["top1_1_shot"] <= found["top1_4_shot"] == pytest.approx(17 / 20)
    assert found["top1_4_shot_std"] == 0
    assert found["top1_1_shot_chance"] == 1 / 5
    assert found["top1_1_shot"] == pytest.approx(outcome.items["top1_1_shot"].score())
    assert outcome.skips.names == {"shots: no class has images left to validate on": ["16 shots"]}
    again = FewShot("colours", folder).run(embedder)
    assert again.scores == found


def test_draws_differ_and_validate_on_other_images(folder, embedder, monkeypatch):
    monkeypatch.setattr(probe, "SHOTS", (2,))
    drawn = []

    def spy(train, validation, classes, mesh, both):
        assert np.bincount(train.label_n).tolist() == np.bincount(validation.label_n).tolist()
        assert np.bincount(train.label_n).tolist() == [2] * 5
        assert not {*train.keys} & {*validation.keys}
        assert not both
        drawn.append(frozenset(train.keys))
        return Classifier(np.eye(3, 5), np.zeros(5), 0, 0), 1.0

    monkeypatch.setattr(probe, "fit_probe", spy)
    FewShot("colours", folder).run(embedder)
    assert len({*drawn}) == len(drawn) == probe.SEEDS


def test_image_folders(tmp_path, embedder):
    for split, count in (("train", 10), ("test", 1)):
        for name in ("blue", "red"):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                (tmp_path / split / name / f"{i}.png").write_bytes(picture(name))
    (tmp_path / "train" / "red" / "Thumbs.db").touch()
    outcome = Probe("folders", tmp_path).run(embedder)
    assert outcome.scores["top1"] == 1
    assert outcome.skips.total == 1
    (tmp_path / "test" / "green").mkdir()
    with pytest.raises(EvalDataError, match=r"train and test have other classes: \['green'\]"):
        Probe("folders", tmp_path).check()


def test_missing_splits(folder, embedder):
    (folder / "train" / "0.tar").unlink()
    with pytest.raises(EvalDataError, match=r"promises 1 tars, missing beside it: 0\.tar"):
        Probe("x", folder).check()
    (folder / "train" / "nshards.txt").unlink()
    with pytest.raises(EvalDataError, match=r"holds neither train/nshards\.txt nor a \.tar"):
        FewShot("x", folder).check()
    write_split(folder, "train", 1)
    with pytest.raises(EvalDataError, match="no class of 10 images"):
        Probe("x", folder).run(embedder)
    with pytest.raises(EvalDataError, match="no class of two images"):
        FewShot("x", folder).run(embedder)


def test_a_probe_never_tests_on_what_it_trained_on(tmp_path, embedder):
    """Without split folders the readers take a whole folder, for every split."""
    for name in ("blue", "red"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.png").write_bytes(picture(name))
    with pytest.raises(EvalDataError, match="train is missing: a probe needs train and test"):
        Probe("flat", tmp_path).check()


def test_val_has_the_classes_of_train(folder):
    write_split(folder, "val", 2)
    Probe("x", folder).check()
    for split, names in (("train", "ab"), ("test", "ab"), ("val", "b")):
        for name in names:
            (folder / "images" / split / name).mkdir(parents=True)
    with pytest.raises(EvalDataError, match=r"train and val have other classes: \['a'\]"):
        Probe("x", folder / "images").check()
