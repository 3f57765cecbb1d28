import html
from collections import Counter

import ftfy
import numpy as np
import pytest

from hqclip_jax.data.text import TextChoice, clean, list_to_text


@pytest.mark.parametrize(
    ("raw", "cleaned"),
    [
        ("  two\n words\t", "two words"),
        ("fish &amp;amp; chips", "fish & chips"),  # escaped twice, as crawlers do
        ("&lt;b&gt;", "<b>"),
        ("schÃ¶n", "schön"),  # UTF-8 read as Latin-1
        ("“quoted”", '"quoted"'),
        ("", ""),
        (f"one &#{'1' * 5000}; two", "one � two"),  # no such character
        (f"one &amp;#{'1' * 5000} two", "one � two"),
    ],
)
def test_clean(raw, cleaned):
    assert clean(raw) == cleaned
    assert clean(clean(raw)) == cleaned


def test_the_short_way_for_plain_ascii_changes_nothing():
    rng = np.random.default_rng(0)
    for _ in range(300):
        raw = "".join(map(chr, rng.integers(32, 127, 30)))
        assert clean(raw) == " ".join(html.unescape(html.unescape(ftfy.fix_text(raw))).split())


PARTS = ("one.", "two.", "three.")


def test_list_forms():
    rng = np.random.default_rng(0)
    assert list_to_text(PARTS, "join", rng) == "one., two., three."
    assert list_to_text(PARTS, "first", rng) == "one."
    assert {list_to_text(PARTS, "sample", rng) for _ in range(50)} == set(PARTS)
    shuffled = {list_to_text(PARTS, "shuffle", rng) for _ in range(100)}
    assert len(shuffled) == 6
    assert all(sorted(s.split(", ")) == sorted(PARTS) for s in shuffled)
    assert list_to_text((), "sample", rng) == ""


def draw(choice: TextChoice, caption: str, desc: tuple[str, ...], n: int = 2000) -> Counter:
    rng = np.random.default_rng(1)
    return Counter(choice.positive(caption, desc, rng) for _ in range(n))


def test_probability_of_the_description():
    assert draw(TextChoice(p_desc=0), "alt", ("d",)) == {"alt": 2000}
    assert draw(TextChoice(p_desc=1), "alt", ("d",)) == {"d": 2000}
    # 2000 draws at 0.25: five standard deviations are 97.
    assert abs(draw(TextChoice(p_desc=0.25), "alt", ("d",))["d"] - 500) < 97


def test_whichever_text_exists_is_taken():
    assert draw(TextChoice(), "", ("d",)) == {"d": 2000}
    assert draw(TextChoice(), "alt", ()) == {"alt": 2000}
    assert draw(TextChoice(), "", ()) == {"": 2000}


def test_negative_is_description_or_tags_or_nothing():
    rng = np.random.default_rng(2)
    both = Counter(TextChoice().negative(("n",), ("a", "b"), rng) for _ in range(2000))
    assert set(both) == {"n", "a, b"} and abs(both["n"] - 1000) < 112
    assert TextChoice(p_neg_desc=1).negative((), ("a", "b"), rng) == "a, b"
    assert TextChoice(p_neg_desc=0).negative(("n",), (), rng) == "n"
    assert TextChoice().negative((), (), rng) == ""
