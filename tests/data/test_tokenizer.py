import pickle

import numpy as np

from hqclip_jax.data.tokenizer import ClipTokenizer


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
