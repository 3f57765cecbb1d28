import numpy as np

from hqclip_jax.evals import marks
from hqclip_jax.evals.outcome import Card, Cell, Classes, Failure, Items, Outcome, Skips
from hqclip_jax.evals.page import Evaluation, document
from hqclip_jax.evals.pictures import jpeg_uri
from hqclip_jax.evals.results import scores_of
from tests.test_report import Reader

from .colours import picture

EVIL = "<script>alert(1)</script>\" onload='x' & <img src=x>"
ABOUT = {
    "checkpoint": f"runs/{EVIL}", "step": 3, "weights": "params", "suite": EVIL,
    "model": {"arch": "ViT-B/32", "image_size": 16}, "tokenizer": "clip", "samples": 1000,
}  # fmt: skip


def evil_outcome() -> Outcome:
    """Every text that comes from outside is hostile."""
    skips = Skips()
    for i in range(12):
        skips.add(f"reason {EVIL}", f"{EVIL}{i}")
    sources = np.array([f"{EVIL}{i}" for i in range(4)])
    classes = Classes((EVIL, "b", EVIL), sources, np.array([0, 0, 1, 2]), np.array([0, 2, 1, 0]))
    cards = (
        Card("Text to image, found", Cell(EVIL), (Cell("", str(sources[0]), 0.5, True),)),
        Card("Named wrongly", Cell(EVIL, "no picture of it"), (Cell(EVIL, "", 0.25, False),)),
    )
    scores = {"top1": 0.5, "top1_chance": 1 / 3, f"top1/{EVIL}": 0.5, f"n/{EVIL}": 2, "n": 4}
    items = {"top1": Items(sources, np.array([1, 0, 1, 0], np.float32))}
    return Outcome(scores, "top1", items, skips, cards, classes)


def pages(results, scale="small"):
    scores = {n: scores_of(r) for n, r in results.items() if isinstance(r, Outcome)}
    uri = jpeg_uri(picture("red"))
    found = {n: {f"{EVIL}{i}": uri for i in range(4)} for n in scores}
    return document(Evaluation(ABOUT, scale, results, scores, found))


def test_hostile_texts_are_escaped_everywhere():
    page = pages({EVIL: evil_outcome(), "gone": Failure(EVIL)})
    reader = Reader(page)
    assert "<script" not in page
    assert not [name for _, name, _ in reader.attributes if name.startswith("on")]
    sources = [value for tag, name, value in reader.attributes if (tag, name) == ("img", "src")]
    assert sources and all(s.startswith("data:image/jpeg;base64,") for s in sources)
    told = "".join(reader.text)
    # title, heading, link, overview, left out (reason, names), section, score, classes, cards, ...
    assert told.count("<script>alert(1)</script>") >= 20
    assert "Content-Security-Policy" in page


def test_the_page_tells_scores_chance_and_what_was_left_out():
    page = pages({"a set": evil_outcome(), "gone": Failure("x is missing")})
    cells = Reader(page).cells()
    assert {"a set", "50.0", "33.3", "gone", "x is missing", "and 4 more", "12"} <= {*cells}
    assert "no picture" in cells  # asked for and not found
    assert 'aria-label="50.0, 95% interval 15.0 to 85.0"' in page
    assert "Beside the paper" not in page  # none of DataComp's sets


def test_datacomps_columns_stand_above_the_papers():
    outcome = Outcome({"top1": 0.25, "top1_chance": 0.001, "n": 8}, "top1")
    page = pages({"imagenet1k": outcome, "imagenet-r": outcome})
    cells = Reader(page).cells()
    at = cells.index("this model")
    # 25.0 on ImageNet and R; means over fewer sets say of how many
    assert cells[at + 1 : at + 7] == ["25.0", "25.0", "25.0", "1 of 6 sets", "25.0", "2 of 38 sets"]
    assert cells.index("+ HQ-CLIP, ViT-B/32") > at and "8.7" in cells and "70.6" not in cells
    assert "ICCV 2025" in page
    assert "70.6" in Reader(pages({"imagenet1k": outcome}, "large")).cells()


def test_worst_and_best_classes_share_none():
    labels = np.repeat(np.arange(5), 4)
    predicted = np.where(np.arange(20) % 4 < labels, labels, (labels + 1) % 5)
    names = tuple(f"class {c}" for c in range(5))
    classes = Classes(names, np.array([f"s{i}" for i in range(20)]), labels, predicted)
    outcome = Outcome({"top1": 0.5, "n": 20}, "top1", classes=classes)
    cells = Reader(pages({"x": outcome})).cells()
    worst, best = cells.index("worst 3 of 5 classes"), cells.index("best 2")
    confused = cells.index("confused most: true → taken for")
    assert cells[worst + 3 : best : 3] == ["class 0", "class 1", "class 2"]
    assert cells[best + 3 : confused : 3] == ["class 4", "class 3"]


def test_a_set_with_one_answer_and_one_with_no_score_are_pages_too():
    one = Outcome({"top1": 1.0, "n": 1}, "top1", {"top1": Items(np.array(["k"]), np.ones(1))})
    Reader(pages({"one": one}))
    Reader(pages({"all failed": Failure("why")}))


def test_intervals_stay_on_their_axis():
    drawn = marks.whisker(0.5, -0.2, 3.0, 0.0, (0, 1))
    assert "--low: 0.00%" in drawn and "--high: 100.00%" in drawn and "--at: 50.00%" in drawn
    assert "span" not in marks.whisker(0.5, None, None, None, (0, 1)).replace("<span", "").replace(
        "</span", ""
    )
