import pickle

import numpy as np
import pytest

from hqclip_jax.data.text import clean
from hqclip_jax.data.tokenizer import (
    SPECIAL_PIECES,
    ClipTokenizer,
    TokenizerError,
    WordPieceTokenizer,
    make_tokenizer,
    tokenizer_from_json,
    with_context,
)
from hqclip_jax.formats.tokenizer_files import write_wordpiece
from tests.models.torch_peers import open_clip

WORDS = "a an photo of red green blue cup cups ##s ##per super cafe ! ' < > - 1 2 ##2 & ; |"
PIECES = (
    *SPECIAL_PIECES,
    *WORDS.split(),
    *["[", "]", "sep", "日", "本", "e", "##e", "istanbul", "##ı"],
)
WORDPIECE = WordPieceTokenizer(PIECES, 8)


def test_known_ids():
    # OpenAI's published example: "hello world!" is 3306, 1002, 256 in the CLIP vocabulary.
    found = ClipTokenizer(8)(["Hello world!", ""])
    assert found.tolist() == [[49406, 3306, 1002, 256, 49407, 0, 0, 0], [49406, 49407] + [0] * 6]
    assert found.dtype == np.int32


def test_a_long_text_is_cut_and_still_ends():
    tokenizer = ClipTokenizer(5)
    (row,) = tokenizer(["a photo of a very long cat"])
    assert row[0] == tokenizer.start_id and row[-1] == tokenizer.end_id
    assert tokenizer.length("a photo of a very long cat") == 9
    assert tokenizer.length("cat") == 3


def test_end_token_has_the_highest_id_so_that_argmax_finds_it():
    tokenizer = ClipTokenizer(16)
    for row in tokenizer(["a cat", "zebra 12345 日本 ÿ", "x " * 40]):
        assert row[np.argmax(row)] == tokenizer.end_id == tokenizer.vocab_size - 1
        assert np.sum(row == tokenizer.end_id) == 1


def test_special_tokens_in_a_text_are_plain_text():
    (row,) = ClipTokenizer(32)(["a <|endoftext|> b"])
    assert np.sum(row == ClipTokenizer.end_id) == 1


def test_a_worker_process_can_build_its_own():
    tokenizer = ClipTokenizer(8)
    tokenizer(["warm"])
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert np.array_equal(copy(["a cat"]), tokenizer(["a cat"]))


HARD = [
    "a photo of a cup", "", "Supers 12!", "CAFÉ Cafe\u0301", "red cups of blue cups of green cups",
    "日本 cup", "a\u200bb cup\u0000s", "a [SEP] b [CLS] [MASK] [PAD] [UNK]", "[ sep ] [sep]",
    "x" * 120 + " cup", "don't &amp; <b>", "İstanbul ISTANBUL ı", "a - - | / 1/2",
    "cups\tcups\nred", "🙂 red", "ﬁne photo",
]  # fmt: skip


@pytest.mark.parametrize("length", [4, 8, 32])
def test_wordpiece_ids_are_open_clips(tmp_path, length):
    write_wordpiece(tmp_path, WORDPIECE)
    theirs = open_clip.tokenizer.HFTokenizer(
        str(tmp_path), context_length=length, strip_sep_token=True
    )
    ours = with_context(WORDPIECE, length)
    found = ours([clean(text) for text in HARD])
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, theirs(HARD).numpy())
    assert len(np.unique(found)) > (10 if length == 4 else 20)


def test_a_wordpiece_text_is_known_to_be_cut():
    whole, cut = "a photo of a red cup", "a photo of a red cup super"
    assert (WORDPIECE.length(whole), WORDPIECE.length(cut), WORDPIECE.length("")) == (8, 9, 2)
    for text in (whole, cut, ""):
        (ids,) = WORDPIECE([text])
        assert WORDPIECE.cuts(text, ids) == (text == cut)


def test_a_tokenizer_comes_back_from_what_a_checkpoint_holds():
    for tokenizer in (ClipTokenizer(9), WORDPIECE):
        length = tokenizer.context_length
        assert tokenizer_from_json(tokenizer.to_json(), length) == tokenizer
        assert tokenizer_from_json(tokenizer.to_json(), 5) == with_context(tokenizer, 5)
        copy = pickle.loads(pickle.dumps(tokenizer))
        assert copy == tokenizer and np.array_equal(copy(["a cup"]), tokenizer(["a cup"]))
    with pytest.raises(TokenizerError, match="'bert' is unknown"):
        tokenizer_from_json({"name": "bert"}, 5)


def test_a_vocabulary_is_read_from_its_file(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join([*PIECES, ""]), encoding="utf-8")
    found = make_tokenizer(str(path), 8)
    assert found == WORDPIECE and found.vocab_size == 32_000
    path.write_bytes("\r\n".join(PIECES).encode())
    assert make_tokenizer(str(path), 8) == WORDPIECE
    assert make_tokenizer("", 8) == ClipTokenizer(8)


@pytest.mark.parametrize(("content", "says"), [
    ("a\nb\n", r"vocab\.txt: no WordPiece vocabulary: it lacks \[CLS\], \[MASK\]"),
    ("a\n" + "\n".join(SPECIAL_PIECES), r"does not begin with \[PAD\]"),
    (None, r"vocab\.txt can't be read"),
])  # fmt: skip
def test_a_file_that_is_no_vocabulary_is_refused(tmp_path, content, says):
    if content is not None:
        (tmp_path / "vocab.txt").write_text(content)
    with pytest.raises(TokenizerError, match=says):
        make_tokenizer(str(tmp_path / "vocab.txt"), 8)
    with pytest.raises(TokenizerError, match="rows to embed them"):
        WordPieceTokenizer(PIECES, 8, 5)
