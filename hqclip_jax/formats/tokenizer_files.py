"""The files that transformers' and OpenCLIP's tokenizers are made of."""

import gzip
import json
from functools import cache
from pathlib import Path
from typing import Any

from hqclip_jax.data.tokenizer import (
    SPECIAL_PIECES,
    ClipTokenizer,
    TokenizerError,
    WordPieceTokenizer,
)
from hqclip_jax.formats.described import FormatError
from hqclip_jax.formats.folder import read_json

MERGES = Path(__file__).with_name("clip_merges.txt.gz")
START, END = "<|startoftext|>", "<|endoftext|>"
# Without the special tokens' names, which transformers' own pattern begins with: text that names
# one is text.
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


@cache
def clip_merges() -> tuple[str, ...]:
    """The 48,894 merges, in order."""
    return tuple(gzip.decompress(MERGES.read_bytes()).decode().splitlines()[1:])


def _letters() -> list[str]:
    """A printable letter for each byte, in the order of their ids: bytes that are printable stand
    for themselves, the others for the letters from U+0100 on."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in plain]
    return [chr(b) for b in plain] + [chr(0x100 + i) for i in range(len(others))]


@cache
def clip_vocabulary() -> dict[str, int]:
    """Ids of the 49,408 tokens: letters, letters that end a word, merges, start and end."""
    letters = _letters()
    merged = [merge.replace(" ", "") for merge in clip_merges()]
    tokens = [*letters, *(x + "</w>" for x in letters), *merged, START, END]
    return {token: i for i, token in enumerate(tokens)}


def write_clip(folder: Path, context_length: int) -> None:
    """`vocab.json` and `merges.txt`, `tokenizer.json` for the tokenizers library, and how
    transformers is to use them: padded with the end-of-text token, which needs no rule of its own;
    id 0, with which this code pads, is "!", and as a special token it would be cut out of texts."""
    vocabulary = clip_vocabulary()
    write = lambda name, content, **options: (folder / name).write_text(
        json.dumps(content, ensure_ascii=False, **options) + "\n", encoding="utf-8"
    )
    write("vocab.json", vocabulary)
    merges = "\n".join(["#version: 0.2", *clip_merges(), ""])
    (folder / "merges.txt").write_text(merges, encoding="utf-8")
    write("tokenizer.json", _tokenizers_json(vocabulary))
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    write("special_tokens_map.json", special, indent=2)
    write("tokenizer_config.json", indent=2, content=special | {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": context_length,
        "do_lower_case": True,
        "add_prefix_space": False,
        "split_special_tokens": True,  # else a text that names the end token would end there
    })  # fmt: skip


def _tokenizers_json(vocabulary: dict[str, int]) -> dict[str, Any]:
    def added(content: str) -> dict[str, Any]:
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        return {"id": vocabulary[content], "content": content, **flags, "special": True}

    split = {"type": "Split", "pattern": {"Regex": _WORDS}, "behavior": "Removed", "invert": True}
    spaces = {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "}
    level = {"add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [added(START), added(END)],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [{"type": "NFC"}, spaces, {"type": "Lowercase"}],
        },
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [split, {"type": "ByteLevel", **level}],
        },
        "post_processor": {
            "type": "RobertaProcessing",
            "sep": [END, vocabulary[END]],
            "cls": [START, vocabulary[START]],
            "trim_offsets": False,
            "add_prefix_space": False,
        },
        "decoder": {"type": "ByteLevel", **level},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": END,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "</w>",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": list(clip_merges()),
        },
    }


def check_clip(folder: Path) -> None:
    """Refuses a folder whose merges are others than CLIP's; one that brings none may pass, for the
    rows of its token embedding are counted too.

    Raises:
        FormatError: names the file.
    """
    path = folder / "merges.txt"
    if path.is_file():
        lines = path.read_text(encoding="utf-8").splitlines()
        # OpenAI's own file goes on with merges that were never used.
        if tuple(lines[1 : len(clip_merges()) + 1]) != clip_merges():
            raise FormatError(
                f"{path} has other merges than CLIP's {ClipTokenizer.vocab_size:,} tokens, with "
                "which texts are read here"
            )


def write_wordpiece(folder: Path, tokenizer: WordPieceTokenizer) -> None:
    """`vocab.txt` and what makes transformers' BertTokenizer of it."""
    lines = "\n".join([*tokenizer.vocabulary, ""])
    (folder / "vocab.txt").write_text(lines, encoding="utf-8")
    names = {f"{piece.strip('[]').lower()}_token": piece for piece in SPECIAL_PIECES}
    config = names | {
        "tokenizer_class": "BertTokenizer",
        "model_max_length": tokenizer.context_length,
        "do_lower_case": True,
        "strip_accents": None,
        "tokenize_chinese_chars": True,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def read_wordpiece(folder: Path, context_length: int, vocab_size: int) -> WordPieceTokenizer:
    """From `vocab.txt`, or from a `tokenizer.json` that holds a WordPiece.

    Raises:
        FormatError: neither is there, or it does not lower-case.
    """
    config_path = folder / "tokenizer_config.json"
    config = read_json(config_path) if config_path.is_file() else {}
    if config.get("do_lower_case") is False or config.get("strip_accents") is False:
        raise FormatError(f"{config_path}: texts are lower-cased and lose their accents here")
    try:
        if (folder / "vocab.txt").is_file():
            found = WordPieceTokenizer.of_file(folder / "vocab.txt", context_length).vocabulary
        elif (folder / "tokenizer.json").is_file():
            model = read_json(folder / "tokenizer.json").get("model", {})
            if not isinstance(model.get("vocab"), dict) or "merges" in model:
                raise FormatError(f"{folder / 'tokenizer.json'} holds no WordPiece")
            found = tuple(sorted(model["vocab"], key=model["vocab"].get))
        else:
            raise FormatError(
                f"{folder} has neither vocab.txt nor tokenizer.json, and its texts are read by a "
                "WordPiece: put BERT's vocab.txt there, or name one with --vocab"
            )
        return WordPieceTokenizer(found, context_length, vocab_size)
    except TokenizerError as e:
        raise FormatError(str(e)) from e
