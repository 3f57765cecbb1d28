"""VALSE (Parcalabescu et al. 2022, arXiv 2112.07566): a caption against its foil, in pieces that
are named for what differs: existence, plurality, counting, relations, actions, coreference."""

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from hqclip_jax.evals.compositional import Compositional
from hqclip_jax.evals.datasets import EvalDataError, Item, Region, load_json, text_of

FEWEST_VOTES = 2  # of three annotators, for the caption and against the foil


class Valse(Compositional):
    """Pairwise accuracy (the paper's acc_r) of each piece; published is their mean over pieces.

    `path` is the repository's folder `data`: a JSON file for each piece. The images come from seven
    sources and keep their names there: each is looked for in `images`, or in its folder of the name
    that the item's `dataset` has, or the piece; or in tars by its name.

    Only items that the authors call valid count: at least two of three annotators chose the
    caption and not the foil.
    """

    main: ClassVar[str] = "accuracy_macro"

    def items(self) -> Iterator[Item]:
        files = sorted(self.path.glob("*.json"))
        if not files:
            raise EvalDataError(f"{self.path} holds no .json of VALSE's")
        for file in files:
            items = load_json(file)
            if not isinstance(items, dict):
                raise EvalDataError(f"{file} is not a JSON object of items")
            for key, item in items.items():
                source = f"{file}: {key}"
                right, wrong = (text_of(item, field, source) for field in ("caption", "foil"))
                if self._votes(item, source) >= FEWEST_VOTES:
                    image = Region(self._file(item, file.stem, source))
                    yield Item(f"{file.stem}/{key}", (image,), (right,), (wrong,), file.stem)

    def _votes(self, item: dict, source: str) -> int:
        votes = item.get("mturk")
        if not isinstance(votes, dict) or not isinstance(votes.get("caption"), int):
            raise EvalDataError(f"{source} has no votes in `mturk`: {votes!r}")
        return votes["caption"]

    def _file(self, item: dict, piece: str, source: str) -> str:
        name = text_of(item, "image_file", source)
        folders = Path(), Path(str(item.get("dataset", ""))), Path(piece)
        places = [folder / name for folder in folders]
        return str(next((p for p in places if (self.where / p).is_file()), places[0]))
