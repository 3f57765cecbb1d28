"""CLIP scores of an output: by a checkpoint in transformers' layout, here, or by one of ours, which
needs JAX and so runs in a process of its own, `python -m hqclip_jax.score`."""

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from hqclip_jax.data.record import Record
from refine.errors import RefineError
from refine.inputs.pairs import ImageError
from refine.inputs.pictures import prepared
from refine.judging.outputs import Output
from refine.judging.scores import (
    CLIP_COLUMNS,
    About,
    Scores,
    ahead,
    clip_rows,
    digest_of,
    fill,
    slug,
)

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).parents[2]
OURS = "checkpoints"  # the folder in a workdir of training
LARGEST_PICTURE = 89_478_485  # pixels


@dataclass(frozen=True)
class Clip:
    """A checkpoint to score with.

    Attributes:
        checkpoint: a folder in transformers' layout, with config.json; or the --workdir of a
            training, one step in it, or its `checkpoints`.
        python: the interpreter that has JAX, for the latter.
        batch: pictures at a time.
    """

    checkpoint: Path
    python: str = sys.executable
    batch: int = 64

    def scores(self, output: Output, numbers: np.ndarray | None = None) -> Scores:
        """Scores what has no row yet.

        Args:
            output: whose records.
            numbers: which, int64 [n], ascending; None for all.

        Raises:
            RefineError: no checkpoint of either kind, or it can't be loaded.
        """
        if (self.checkpoint / "config.json").exists():
            return fill(output, self._here, numbers)
        steps = self.checkpoint.parent if self.checkpoint.name.isdigit() else self.checkpoint
        if steps.name == OURS or (steps / OURS).is_dir():
            return self._apart(output, numbers)
        raise RefineError(
            f"--clip {self.checkpoint} is no checkpoint: give a folder with config.json and "
            f"weights as transformers saves them, or the --workdir of a training, with {OURS!r} "
            "in it"
        )

    def close(self) -> None:
        """Gives memory back."""
        if "_here" in vars(self):
            self._here.close()

    @cached_property
    def _here(self) -> "TransformersClip":
        return TransformersClip(self.checkpoint, self.batch)

    def _apart(self, output: Output, numbers: np.ndarray | None) -> Scores:
        command = [
            self.python, "-m", "hqclip_jax.score", f"--checkpoint={self.checkpoint}",
            f"--data={output.directory}", f"--batch={self.batch}",
        ]  # fmt: skip
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        with TemporaryDirectory() as scratch:
            if numbers is not None:
                chosen = Path(scratch, "numbers.npy")
                np.save(chosen, numbers)
                command.append(f"--numbers={chosen}")
            try:
                done = subprocess.run(
                    command,
                    stdout=subprocess.PIPE,
                    text=True,
                    env=os.environ | {"PYTHONPATH": path},
                )
            except OSError as e:
                raise RefineError(f"--clip-python {self.python}: {e.strerror}") from e
        if done.returncode:
            raise RefineError(
                f"--clip {self.checkpoint}: `{self.python} -m hqclip_jax.score` failed (above is "
                "why); if JAX is not installed there, name an interpreter that has it with "
                "--clip-python"
            )
        return Scores(output, About(**json.loads(done.stdout.splitlines()[-1])))


class TransformersClip:
    """A CLIPModel of transformers: a `Scorer`.

    Args:
        folder: with config.json, weights, tokenizer and preprocessor_config.json. Only these are
            read; nothing is fetched, and no code in the folder runs.
        batch: pictures at a time.

    Raises:
        RefineError: torch or transformers is not installed, or the folder can't be loaded.
    """

    def __init__(self, folder: Path, batch: int = 64) -> None:
        self.folder, self.batch = folder, batch
        try:
            import torch
            from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer
        except ImportError as e:
            raise RefineError(
                f"--clip {folder} needs torch and transformers ({e}): install "
                "requirements-refine.txt"
            ) from e
        local: dict[str, Any] = {"local_files_only": True}
        try:
            model = CLIPModel.from_pretrained(folder, trust_remote_code=False, **local)
            self.tokenizer = CLIPTokenizer.from_pretrained(folder, **local)
            self.processor = CLIPImageProcessorPil.from_pretrained(folder, **local)
        except (OSError, ValueError, KeyError, RuntimeError) as e:
            raise RefineError(f"--clip {folder} can't be loaded as a CLIPModel: {e}") from e
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = model.float().eval().to(self.device)
        self.context = model.config.text_config.max_position_embeddings
        name = f"clip-{slug(folder.resolve().name)}-{digest_of(folder)}"
        self.about = About(name, "clip", CLIP_COLUMNS, {"context": self.context})

    def score(
        self, records: Iterable[tuple[int, Record]]
    ) -> Iterator[tuple[int, dict[str, float]]]:
        """Yields the rows in order; pictures are decoded ahead."""
        decoded = ahead(lambda item: self._pixels(item[1].image), records, 2 * self.batch)
        while batch := list(islice(decoded, self.batch)):
            items = [item for item, _ in batch]
            yield from clip_rows(
                items, self._images([p for _, p in batch]), self._texts, self._length
            )

    def close(self) -> None:
        """Gives the device's memory back."""
        import torch

        del self.model
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def _pixels(self, encoded: bytes) -> np.ndarray | None:
        """A picture as the tower takes it, f32 [3, s, s]; None where it does not decode."""
        try:
            image = prepared(encoded, LARGEST_PICTURE, LARGEST_PICTURE)
        except ImageError:
            return None
        return np.asarray(self.processor(images=image, return_tensors="np")["pixel_values"][0])

    def _images(self, pixels: list[np.ndarray | None]) -> np.ndarray:
        import torch

        known = [i for i, each in enumerate(pixels) if each is not None]
        z = np.full((len(pixels), self.model.config.projection_dim), np.nan, np.float32)
        if known:
            stacked = torch.from_numpy(np.stack([pixels[i] for i in known])).to(self.device)
            with torch.inference_mode():
                features = self.model.get_image_features(pixel_values=stacked).pooler_output
            z[known] = _unit(features)
        return z

    def _texts(self, texts: list[str]) -> np.ndarray:
        import torch

        found = []
        for start in range(0, len(texts), 4 * self.batch):
            # Text that names a special token is text: it must not end the sequence.
            encoded = self.tokenizer(
                texts[start : start + 4 * self.batch],
                padding=True,
                truncation=True,
                max_length=self.context,
                split_special_tokens=True,
                return_tensors="pt",
            ).to(self.device)
            with torch.inference_mode():
                found.append(_unit(self.model.get_text_features(**encoded).pooler_output))
        return np.concatenate(found)

    def _length(self, text: str) -> int:
        return len(self.tokenizer(text, split_special_tokens=True, verbose=False)["input_ids"])


def _unit(features: "torch.Tensor") -> np.ndarray:
    """Rows of unit length, f32 [n, D]."""
    return (features / features.norm(dim=-1, keepdim=True)).float().cpu().numpy()
