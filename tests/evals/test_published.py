import pytest

from hqclip_jax.evals.groups import GroupMean
from hqclip_jax.evals.published import (
    COLUMNS,
    MEMBERS,
    closest_scale,
    column_means,
    published,
)


def test_the_papers_own_means_agree_with_its_columns():
    """Rounding is to 0.1. One line is printed otherwise; its note says so."""
    assert len(published()) == 21
    for row in published():
        if "as printed" in row.note:
            continue
        for column, parts in (
            ("shifts", ("v2", "a", "o", "r", "sketch", "objectnet")),
            ("retrieval", ("coco", "flickr", "winogavil")),
        ):
            if all(part in row.scores for part in (column, *parts)):
                mean = sum(row.scores[part] for part in parts) / len(parts)
                # tables 2 and 3 average over unrounded scores
                assert row.scores[column] == pytest.approx(mean, abs=0.101), row
    large = [row for row in published() if row.scale == "large" and row.method == "+ HQ-CLIP"]
    assert large[0].scores["imagenet"] == 70.6 and large[0].scores["average38"] == 58.6
    veclip = next(row for row in published() if row.method == "VeCLIP")
    assert "average38" not in veclip.scores


@pytest.mark.parametrize(
    "arch, samples, scale",
    [
        ("ViT-B/32", 0, "small"),
        ("ViT-B/32", 50e6, "medium"),
        ("ViT-B/32", 1e10, "medium"),
        ("ViT-B/16", 1e6, "large"),
        ("ViT-L/14-quickgelu", 5e8, "xlarge"),
        ("ViT-Pico/8", 24_000, "small"),
        ("ViT-S/16", 2e9, "large"),
    ],
)
def test_closest_scale(arch, samples, scale):
    assert closest_scale(arch, samples) == scale


def test_a_mean_over_fewer_sets_says_of_how_many():
    means = column_means({"imagenetv2": 0.2, "imagenet-a": 0.4, "no set of theirs": 1.0})
    assert means["v2"] == GroupMean(0.2, 1, 1)
    absent = ("imagenet_sketch", "imagenet-o", "imagenet-r", "objectnet")
    shifts = means["shifts"]
    assert (shifts.mean, shifts.have, shifts.of) == (pytest.approx(0.3), 2, 6)
    assert sorted(shifts.missing) == sorted(absent)
    assert (means["average38"].have, means["average38"].of) == (2, 38)
    assert [*means] == [c for c in COLUMNS if c in means]
    assert "imagenet" not in means and column_means({}) == {}
    assert column_means({"mscoco_captions": 0.1}) == column_means({"mscoco": 0.1})


def test_every_column_knows_its_sets():
    assert {*MEMBERS} == {*COLUMNS}
    sizes = {column: len({*names}) for column, names in MEMBERS.items() if len(names) > 1}
    assert sizes == {"shifts": 6, "vtab": 13, "retrieval": 3, "average38": 38}
    assert sum(map(len, MEMBERS.values())) == 10 + 6 + 13 + 3 + 38  # none is named twice
