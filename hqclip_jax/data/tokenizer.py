"""Tokenizers behind one small interface; all that one is made of travels in the checkpoint."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import instant_clip_tokenizer
import numpy as np


class TokenizerError(ValueError):
    """A vocabulary that is none, or a tokenizer that is unknown or not installed."""


@dataclass(frozen=True)
class ClipTokenizer:
    """OpenAI CLIP's byte-pair encoding, vocabulary embedded in the library.

    Texts must have passed `hqclip_jax.data.text.clean`. A text longer than the context is cut and
    ends with the end-of-text token all the same, so the pooled position always exists.
    """

    context_length: int = 77
    name: ClassVar[str] = "clip"
    vocab_size: ClassVar[int] = 49408
    start_id: ClassVar[int] = 49406
    end_id: ClassVar[int] = 49407
    pad_id: ClassVar[int] = 0

    @cached_property
    def _bpe(self) -> instant_clip_tokenizer.Tokenizer:
        return instant_clip_tokenizer.Tokenizer()

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Token ids, int32 [len(texts), context_length], zero-padded."""
        ids = self._bpe.tokenize_batch(list(texts), context_length=self.context_length)
        return ids.astype(np.int32)

    def length(self, text: str) -> int:
        """Tokens that `text` would take uncut, start and end tokens included."""
        return len(self._bpe.encode(text)) + 2

    def cuts(self, text: str, ids: np.ndarray) -> bool:
        """Whether `ids`, this tokenizer's of `text`, leave out its end."""
        return ids[-1] == self.end_id and self.length(text) > self.context_length

    def to_json(self) -> str:
        return self.name

    def __getstate__(self) -> dict:
        """Drops the Rust object, so that worker processes build their own."""
        return {"context_length": self.context_length}


SPECIAL_PIECES = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


@dataclass(frozen=True)
class WordPieceTokenizer:
    """BERT's WordPiece, lower-cased, as OpenCLIP gives it to CLIPA's models (Li et al. 2023).

    A text is [CLS], its pieces and zeros: the separator at its end is stripped, also where it is
    written out, and the tower pools the last position whatever stands there. Texts must have passed
    `hqclip_jax.data.text.clean`.

    Args:
        vocabulary: pieces by id, as the lines of BERT's `vocab.txt`; [PAD] comes first.
        context_length: start and the stripped end included.
        vocab_size: rows of the token embedding; CLIPA's models have 32,000 for BERT's 30,522.

    Raises:
        TokenizerError: special pieces are missing, or there are more pieces than rows.
    """

    vocabulary: tuple[str, ...]
    context_length: int = 32
    vocab_size: int = 32_000
    name: ClassVar[str] = "wordpiece"
    pad_id: ClassVar[int] = 0

    def __post_init__(self) -> None:
        if missing := sorted(set(SPECIAL_PIECES) - set(self.vocabulary)):
            raise TokenizerError(f"no WordPiece vocabulary: it lacks {', '.join(missing)}")
        if self.vocabulary[0] != "[PAD]":
            raise TokenizerError("no WordPiece vocabulary: it does not begin with [PAD]")
        if len(self.vocabulary) > self.vocab_size:
            raise TokenizerError(
                f"{len(self.vocabulary):,} pieces and {self.vocab_size:,} rows to embed them"
            )

    @classmethod
    def of_file(cls, path: str | Path, context_length: int = 32) -> "WordPieceTokenizer":
        """From a `vocab.txt`, a piece a line.

        Raises:
            TokenizerError: no such file, or it is none.
        """
        try:
            lines = Path(path).read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as e:
            raise TokenizerError(f"{path} can't be read as a vocab.txt: {e}") from e
        try:
            pieces = tuple(line.rstrip("\r") for line in lines[: -1 if not lines[-1] else None])
            return cls(pieces, context_length, max(cls.vocab_size, len(pieces)))
        except TokenizerError as e:
            raise TokenizerError(f"{path}: {e}") from e

    @cached_property
    def _bert(self) -> Any:
        try:
            from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
        except ImportError as e:
            raise TokenizerError(
                "a WordPiece vocabulary needs the tokenizers library: pip install tokenizers"
            ) from e
        ids = {piece: i for i, piece in enumerate(self.vocabulary)}
        bert = Tokenizer(models.WordPiece(ids, unk_token="[UNK]", max_input_chars_per_word=100))
        bert.normalizer = normalizers.BertNormalizer(lowercase=True)
        bert.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        # As transformers has it: written out in a text they are themselves.
        bert.add_special_tokens(list(SPECIAL_PIECES))
        return bert

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Token ids, int32 [len(texts), context_length], zero-padded."""
        found = np.zeros((len(texts), self.context_length), np.int32)
        found[:, 0] = self.vocabulary.index("[CLS]")
        for row, encoding in zip(found, self._bert.encode_batch(list(texts))):
            ids = encoding.ids[: self.context_length - 2]
            row[1 : len(ids) + 1] = ids
        found[found == self.vocabulary.index("[SEP]")] = self.pad_id
        return found

    def length(self, text: str) -> int:
        """Tokens that `text` would take uncut, start and end tokens included."""
        return len(self._bert.encode(text).ids) + 2

    def cuts(self, text: str, ids: np.ndarray) -> bool:
        """Whether `ids`, this tokenizer's of `text`, leave out its end."""
        return ids[-2] != self.pad_id and self.length(text) > self.context_length

    def to_json(self) -> dict:
        return {
            "name": self.name,
            "vocab_size": self.vocab_size,
            "vocabulary": list(self.vocabulary),
        }

    def __getstate__(self) -> dict:
        """Drops the Rust object, so that worker processes build their own."""
        return {k: v for k, v in self.__dict__.items() if k != "_bert"}


Tokenizer = ClipTokenizer | WordPieceTokenizer
TOKENIZERS = {t.name: t for t in (ClipTokenizer, WordPieceTokenizer)}


def make_tokenizer(vocab: str, context_length: int) -> Tokenizer:
    """CLIP's byte pairs, or the WordPiece of the `vocab.txt` that `vocab` names.

    Raises:
        TokenizerError: as `WordPieceTokenizer.of_file`.
    """
    if vocab:
        return WordPieceTokenizer.of_file(vocab, context_length)
    return ClipTokenizer(context_length)


def with_context(tokenizer: Tokenizer, context_length: int) -> Tokenizer:
    """The same one at another length."""
    return replace(tokenizer, context_length=context_length)


def tokenizer_from_json(stored: str | dict, context_length: int) -> Tokenizer:
    """What `to_json` gave, at a length.

    Raises:
        TokenizerError: another version's, or another program's.
    """
    name = stored if isinstance(stored, str) else stored.get("name")
    if name not in TOKENIZERS:
        raise TokenizerError(
            f"the checkpoint's tokenizer {name!r} is unknown here: {sorted(TOKENIZERS)}"
        )
    if name == ClipTokenizer.name:
        return ClipTokenizer(context_length)
    return WordPieceTokenizer(tuple(stored["vocabulary"]), context_length, stored["vocab_size"])
