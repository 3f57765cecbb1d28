import json

import numpy as np
import pytest

from hqclip_jax.evals.datasets import EvalDataError
from hqclip_jax.evals.ranking import first_match_ranks
from hqclip_jax.evals.retrieval import Retrieval, ranks_by_owner, retrieval_ranks, retrieval_scores

from .colours import picture, write_tar


def unit(rng, n, d=6):
    z = rng.normal(size=(n, d)).astype(np.float32)
    return z / np.linalg.norm(z, axis=1, keepdims=True)


@pytest.fixture
def pairs():
    """30 images with one to five captions each, near them but not nearest."""
    rng = np.random.default_rng(0)
    zimg = unit(rng, 30)
    owner = np.repeat(np.arange(30), rng.integers(1, 6, 30))
    ztxt = zimg[owner] + 0.5 * rng.normal(size=(len(owner), 6)).astype(np.float32)
    return zimg, ztxt / np.linalg.norm(ztxt, axis=1, keepdims=True), owner


def test_recall_equals_looking_at_every_top_k(pairs):
    zimg, ztxt, owner = pairs
    found = retrieval_scores(retrieval_ranks(zimg, ztxt, owner))
    sims = ztxt @ zimg.T
    for k in (1, 5, 10):
        nearest_images = np.argsort(-sims, axis=1)[:, :k]
        image_recall = np.mean([owner[m] in nearest_images[m] for m in range(len(owner))])
        nearest_texts = np.argsort(-sims.T, axis=1)[:, :k]
        text_recall = np.mean([i in owner[nearest_texts[i]] for i in range(30)])
        assert found[f"image_retrieval_recall_at_{k}"] == pytest.approx(image_recall)
        assert found[f"text_retrieval_recall_at_{k}"] == pytest.approx(text_recall)
        assert found[f"recall_at_{k}"] == pytest.approx((image_recall + text_recall) / 2)
        assert found[f"image_retrieval_recall_at_{k}_chance"] == pytest.approx(k / 30)
    assert 0 < found["image_retrieval_recall_at_1"] < 1  # or the comparison would say little
    assert (found["n"], found["captions"]) == (30, len(owner))


@pytest.mark.parametrize("chunk_elements", [1, 31, 90, 10**6])
def test_strips_do_not_change_the_ranks(pairs, chunk_elements):
    zimg, ztxt, owner = pairs
    images = np.arange(30)
    whole = ranks_by_owner(ztxt, owner, zimg, images)
    assert np.array_equal(ranks_by_owner(ztxt, owner, zimg, images, chunk_elements), whole)
    back = ranks_by_owner(zimg, images, ztxt, owner)
    assert np.array_equal(ranks_by_owner(zimg, images, ztxt, owner, chunk_elements), back)


def test_ranks_are_those_of_the_reference_ties_included():
    """Few directions, so that many similarities are equal to the bit."""
    rng = np.random.default_rng(1)
    zimg = np.eye(4, dtype=np.float32)[rng.integers(0, 4, 40)]
    owner = rng.permutation(np.repeat(np.arange(40), rng.integers(1, 4, 40)))
    ztxt = np.eye(4, dtype=np.float32)[rng.integers(0, 4, len(owner))]
    images = np.arange(40)
    own = owner[:, None] == images
    expected = first_match_ranks(ztxt @ zimg.T, own)
    assert np.array_equal(ranks_by_owner(ztxt, owner, zimg, images), expected)
    back = first_match_ranks(zimg @ ztxt.T, own.T)
    assert np.array_equal(ranks_by_owner(zimg, images, ztxt, owner, 1000), back)
    assert len(set(expected.tolist())) > 10


def test_a_model_that_maps_all_to_one_point_scores_as_chance():
    z = np.ones((50, 3), np.float32)
    found = retrieval_scores(retrieval_ranks(z, z, np.arange(50)))
    assert found["recall_at_10"] == pytest.approx(found["recall_at_10_chance"])
    assert found["recall_at_10"] == pytest.approx(10 / 50)


def test_text_retrieval_chance_counts_every_caption():
    z = np.eye(3, dtype=np.float32)
    found = retrieval_scores(retrieval_ranks(z, z[[0, 0, 1, 2]], np.array([0, 0, 1, 2])))
    assert found["text_retrieval_recall_at_1_chance"] == pytest.approx((2 / 4 + 1 / 4 + 1 / 4) / 3)
    assert found["recall_at_1"] == 1


def test_evaluator(tmp_path, embedder):
    """Three pictures; the yellow one's second caption and the blue one's only caption say red."""
    members = {}
    for colour, captions in (
        ("red", ["red"]),
        ("yellow", ["yellow", "red"]),
        ("blue", ["some red thing"]),
    ):
        members[f"{colour}.png"] = picture(colour)
        members[f"{colour}.json"] = json.dumps({"captions": captions})
    evaluator = Retrieval("colours", write_tar(tmp_path / "0.tar", members))
    evaluator.check()
    outcome = evaluator.run(embedder)
    found = outcome.scores
    # captions: red and yellow find their picture, the two misplaced ones the red one
    assert found["image_retrieval_recall_at_1"] == pytest.approx(2 / 4)
    # pictures: blue has cosine 0 with all four captions, and its own is the last of them
    assert found["text_retrieval_recall_at_1"] == pytest.approx(2 / 3)
    assert found["text_retrieval_recall_at_5"] == 1
    assert (found["n"], found["captions"]) == (3, 4)
    for score, items in outcome.items.items():
        assert items.score() == pytest.approx(found[score])
    assert len({*outcome.items["image_retrieval_recall_at_1"].keys}) == 4


def test_empty_and_missing_sets(tmp_path, embedder):
    with pytest.raises(EvalDataError, match="holds no images"):
        Retrieval("empty", write_tar(tmp_path / "0.tar", {})).run(embedder)
    with pytest.raises(EvalDataError, match="nowhere is missing"):
        Retrieval("missing", tmp_path / "nowhere").check()
