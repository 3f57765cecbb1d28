"""A model on its way out: what a format's writer is given."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from hqclip_jax.config import Config
from hqclip_jax.data.tokenizer import Tokenizer, WordPieceTokenizer
from hqclip_jax.formats.described import FormatError
from hqclip_jax.models.convert import write_safetensors
from hqclip_jax.models.zoo import ARCHITECTURES, Architecture

DTYPES = {
    t: np.dtype(getattr(np, t, None) or getattr(ml_dtypes, t))
    for t in ("float32", "float16", "bfloat16")
}


@dataclass(frozen=True)
class Model:
    """Attributes:
    config: of the run.
    tokenizer: its own.
    params: nested, f32 numpy arrays.
    dtype: of the weights in the file, a key of `DTYPES`.
    """

    config: Config
    tokenizer: Tokenizer
    params: Mapping[str, Any]
    dtype: str = "float32"

    @property
    def arch(self) -> Architecture:
        return ARCHITECTURES[self.config.model.arch]

    @property
    def wordpiece(self) -> bool:
        return isinstance(self.tokenizer, WordPieceTokenizer)

    def cast(self, x: np.ndarray) -> np.ndarray:
        """As the file holds it; the same array where nothing changes, for there may be many GB."""
        return x.astype(DTYPES[self.dtype], copy=False)

    def save(self, path: Path, weights: Mapping[str, np.ndarray]) -> None:
        """Writes the weights in `dtype`.

        Raises:
            FormatError: a weight is too large for it, or no number at all.
        """
        with np.errstate(over="ignore"):
            weights = {name: self.cast(x) for name, x in weights.items()}
        finite = lambda x: bool(np.isfinite(x.astype(np.float32, copy=False)).all())
        bad = [name for name, x in weights.items() if not finite(x)]
        if bad:
            mend = "; bfloat16 has float32's range" if self.dtype == "float16" else ""
            some = ", ".join(bad[:5])
            raise FormatError(f"{some}: values that are not finite as {self.dtype}{mend}")
        write_safetensors(path, weights)
