"""Tokenizers behind one small interface; the name travels in the checkpoint."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import instant_clip_tokenizer
import numpy as np


@dataclass(frozen=True)
class ClipTokenizer:
    """OpenAI CLIP's byte-pair encoding, vocabulary embedded in the library.

    Texts must have passed `hqclip_jax.data.text.clean`. A text longer than the context is cut and
    ends with the end-of-text token all the same, so the pooled position always exists.
    """

    context_length: int = 77
    name = "clip"
    vocab_size = 49408
    start_id = 49406
    end_id = 49407
    pad_id = 0

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

    def __getstate__(self) -> dict:
        """Drops the Rust object, so that worker processes build their own."""
        return {"context_length": self.context_length}


TOKENIZERS = {ClipTokenizer.name: ClipTokenizer}
