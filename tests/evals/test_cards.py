import numpy as np

from hqclip_jax.evals import cards
from hqclip_jax.evals.cards import choice_cards, class_cards, pick, retrieval_cards, top_k
from hqclip_jax.evals.datasets import Item, Region
from hqclip_jax.evals.outcome import Classes
from hqclip_jax.evals.ranking import first_match_ranks
from hqclip_jax.evals.retrieval import retrieval_ranks


def test_top_k_is_a_stable_sort():
    sims = np.random.default_rng(0).integers(-4, 0, (20, 30)).astype(np.float32)
    ids, values = top_k(sims, 5)
    assert np.array_equal(ids, np.argsort(-sims, axis=1, kind="stable")[:, :5])
    assert np.array_equal(values, np.take_along_axis(sims, ids, axis=1))
    assert top_k(sims[:, :3], 5)[0].shape == (20, 3)


def test_picks_depend_on_seed_and_size_alone():
    among = np.arange(100) % 3 == 0
    chosen = pick(among, 5)
    assert chosen == pick(among, 5) and len({*chosen}) == 5 and all(i % 3 == 0 for i in chosen)
    assert chosen != pick(among, 5, seed=1)
    # a picture on which both models fail is shown of both
    assert [i for i in pick(among | (np.arange(100) == 1), 6) if i != 1][:5] == chosen
    assert pick(np.zeros(4, bool), 5) == [] and pick(np.ones(2, bool), 5) in ([0, 1], [1, 0])


def test_class_cards_show_some_of_each_kind():
    sims = np.random.default_rng(0).random((40, 6)).astype(np.float32)
    ids, values = top_k(sims, 5)
    labels = np.where(np.arange(40) % 2, ids[:, 0], ids[:, 2])
    names = tuple("abcdef")
    sources = np.array([f"0.tar:{i}" for i in range(40)])
    found = class_cards(Classes(names, sources, labels, ids[:, 0]), ids, values)
    assert [c.section for c in found] == ["Named rightly"] * 6 + ["Named wrongly"] * 6
    for card in found:
        i = int(card.asked.source.partition(":")[2])
        assert card.asked.text == names[labels[i]]
        assert [a.right for a in card.answers].index(True) == (0 if i % 2 else 2)
        assert [a.similarity for a in card.answers] == sorted(values[i].tolist(), reverse=True)
    assert found == class_cards(Classes(names, sources, labels, ids[:, 0]), ids, values)


def test_retrieval_cards_agree_with_the_ranks(monkeypatch):
    rng = np.random.default_rng(2)
    zimg, ztxt = (rng.normal(size=(n, 8)).astype(np.float32) for n in (30, 60))
    owner = np.repeat(np.arange(30), 2)
    ztxt += zimg[owner]
    ways = retrieval_ranks(zimg, ztxt, owner)
    sources, captions = [f"i{i}" for i in range(30)], [f"t{i}" for i in range(60)]
    rows = []
    monkeypatch.setattr(cards, "top_k", lambda sims, k: rows.append(len(sims)) or top_k(sims, k))
    found = retrieval_cards(zimg, ztxt, owner, sources, captions, ways)
    assert max(rows) <= cards.EACH  # what is not shown is not multiplied out
    ranks = first_match_ranks(ztxt @ zimg.T, owner[:, None] == np.arange(30))
    sections = dict.fromkeys(card.section for card in found)
    assert [*sections] == [
        "Text to image, found", "Text to image, missed",
        "Image to text, found", "Image to text, missed",
    ]  # fmt: skip
    for card in found:
        assert len(card.answers) == 5
        assert card.answers[0].right == card.section.endswith("found")
        if card.section.startswith("Text"):
            q = int(card.asked.text[1:])
            right = [a.right for a in card.answers]
            assert (right.index(True) if True in right else 5) == min(ranks[q], 5)
            assert all(a.right == (a.source == f"i{owner[q]}") for a in card.answers)
        else:
            q = int(card.asked.source[1:])
            assert all(a.right == (owner[int(a.text[1:])] == q) for a in card.answers)


def test_a_tie_is_a_failure_and_a_right_choice_is_no_card():
    texts = [("own", "other", "swap"), ("a", "b", ""), ("c", "d", "")]
    items = [Item(r, (Region(r),), (r,), (w,), category) for r, w, category in texts]
    zimg = np.eye(3, dtype=np.float32)
    zneg = np.array([(0.5, 0, 0), (0, 0.4, 0), (0, 0, 0.1)], np.float32)
    zpos = np.array([(0.2, 0, 0), (0, 0.4, 0), (0, 0, 0.9)], np.float32)
    margins = np.einsum("nd,nd->n", zimg, zpos - zneg)
    found = choice_cards(
        items, [(i, 3 + i, 6 + i) for i in range(3)], np.concatenate([zimg, zpos, zneg]),
        ["x", "y", "z"], margins,
    )  # fmt: skip
    told = {card.asked.source: card for card in found}
    assert [*sorted(told)] == ["x", "y"]
    assert told["x"].asked.text == "swap, margin -0.300"
    assert [(a.text, a.right) for a in told["x"].answers] == [("other", False), ("own", True)]
    assert told["y"].asked.text == "margin 0.000"
