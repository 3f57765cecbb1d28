"""transformers' and the tokenizers library's readings of our files are OpenCLIP's ids."""

import json

import pytest

from hqclip_jax.data.text import clean
from hqclip_jax.data.tokenizer import ClipTokenizer
from hqclip_jax.formats.tokenizer_files import clip_merges, clip_vocabulary, write_clip
from tests.formats import models
from tests.models.torch_peers import open_clip, transformers

HARD = [clean(text) for text in (
    *models.TEXTS, "a <|endoftext|> b", "<|startoftext|>", "İstanbul ŞÇ 日本 ÿ é", "cafe\u0301",
    "²³½ ١٢ a\u200bb", "it's we'll THEY'D", "🙂🙃 ok", "x" * 300, "a  b\tc", "1999 12,5%",
)]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_clip(folder, 16)
    return folder


def test_the_vocabulary_is_open_clips():
    theirs = open_clip.tokenizer.SimpleTokenizer().encoder
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    assert clip_vocabulary() == {names.get(k, k): i for k, i in theirs.items()}
    assert len(clip_merges()) == 48_894


def test_transformers_ids_are_ours(folder):
    padded = transformers.CLIPTokenizer.from_pretrained(folder)(
        HARD, padding="max_length", truncation=True
    )["input_ids"]
    ours = ClipTokenizer(16)(HARD)
    for theirs, own in zip(padded, ours.tolist(), strict=True):
        end = own.index(ClipTokenizer.end_id) + 1
        assert theirs[:end] == own[:end]
        assert set(theirs[end:]) <= {ClipTokenizer.end_id} and set(own[end:]) <= {0}


def test_the_tokenizers_library_reads_the_same(folder):
    tokenizers = pytest.importorskip("tokenizers")
    raw = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    raw.encode_special_tokens = True
    clip = ClipTokenizer(400)
    for text in HARD:
        ids = raw.encode(text).ids
        assert clip([text])[0, : len(ids)].tolist() == ids


def test_a_user_is_told_the_context(folder):
    auto = transformers.AutoTokenizer.from_pretrained(folder)
    assert isinstance(auto, transformers.CLIPTokenizer) and auto.model_max_length == 16
    assert json.loads((folder / "special_tokens_map.json").read_text())["pad_token"] == (
        "<|endoftext|>"
    )
