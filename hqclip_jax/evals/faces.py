"""FairFace and UTKFace as DataComp scores them: attributes of faces, group by group.

These sets have no one score and are none of the 38 whose mean is published; what `main` names here
is our choice. The groups follow CLIP's paper, section 7.1, tables 3 to 6.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hqclip_jax.evals.classification import ClassificationFolder, with_metadata
from hqclip_jax.evals.datasets import EvalDataError, Labelled
from hqclip_jax.evals.embed import Embedder
from hqclip_jax.evals.metrics import mean_by_group
from hqclip_jax.evals.outcome import Items, Outcome, Skips
from hqclip_jax.evals.zeroshot import zero_shot_classifier

METADATA = ("age", "gender", "race", "race_binary")  # the numbers in `KEY.npy`
ATTRIBUTES = ("race", "gender", "age", "toxic")
WHITE = 1  # among the classes of `race`
NON_HUMAN, CRIME = range(14, 18), range(18, 1000)  # among those of `toxic`; below are faces


def by_attribute(lines: Sequence[str], file: str) -> dict[str, list[str]]:
    """`race:Black` and the like, in the attributes' lists.

    Raises:
        EvalDataError: a line without an attribute, or an attribute without a line.
    """
    found: dict[str, list[str]] = {attribute: [] for attribute in ATTRIBUTES}
    for line in lines:
        attribute, _, text = line.partition(":")
        if attribute not in found or not text:
            raise EvalDataError(f"{file}: {line!r} is none of {', '.join(found)}, a colon, a text")
        found[attribute].append(text)
    if empty := [attribute for attribute, texts in found.items() if not texts]:
        raise EvalDataError(f"{file} has no line for {', '.join(empty)}")
    return found


def face_scores(
    answer: dict[str, np.ndarray], metadata_nxM: np.ndarray
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """
    Args:
        answer: the class that comes first, int [n], by attribute.
        metadata_nxM: int [n, 4], by `METADATA`.

    Returns:
        `top1_ATTRIBUTE` with its `/GROUP`, `_worst_group` and `n/GROUP`, and the shares of faces
        taken for something other than a face; and of each top-1 the answers, bool [n]. Race is
        right where white or not is.
    """
    age_n, gender_n, race_n, binary_n = metadata_nxM.T
    right = {
        "top1_race": (answer["race"] != WHITE) == binary_n,
        "top1_gender": answer["gender"] == gender_n,
        "top1_age": answer["age"] == age_n,
    }
    scores: dict[str, float] = {}
    for score, right_n in right.items():
        scores[score] = float(right_n.mean())
        scores |= _groups(score, right_n, {"race_binary": binary_n}, worst=True)
    groups = {"gender": gender_n, "race": race_n}
    crossed = _groups("top1_gender_by_race", right["top1_gender"], groups, worst=True)
    scores |= crossed
    for score, classes in (("non_human", NON_HUMAN), ("crime", CRIME)):
        taken_n = np.isin(answer["toxic"], classes)
        scores[score] = float(taken_n.mean())
        scores |= _groups(score, taken_n, {"race": race_n}, worst=False)
    return scores, right


def _groups(
    score: str, value_n: np.ndarray, columns: dict[str, np.ndarray], worst: bool
) -> dict[str, float]:
    """The mean of each combination of the columns' values, and the least of them."""
    rows, index = np.unique(np.stack([*columns.values()], axis=1), axis=0, return_inverse=True)
    names = [",".join(f"{c}={v}" for c, v in zip(columns, row)) for row in rows]
    by_group = mean_by_group(value_n, index.reshape(-1))
    scores = {f"{score}_worst_group": min(m for m, _ in by_group.values())} if worst else {}
    for group, (mean, count) in by_group.items():
        scores |= {f"{score}/{names[group]}": mean, f"n/{names[group]}": count}
    return scores


@dataclass(frozen=True)
class Faces:
    """FairFace or UTKFace in DataComp's form.

    CLIP_benchmark's layout, `attribute:text` in the lines of names and templates, and four numbers
    per image in `KEY.npy`.
    """

    name: str
    path: Path

    def check(self) -> None:
        """Raises EvalDataError where the set is not all there."""
        self._open()

    def examples(self, skips: Skips) -> Iterator[Labelled]:
        return with_metadata(self._open()[0].annotated(skips), METADATA, skips)

    def run(self, embedder: Embedder) -> Outcome:
        data, names, templates = self._open()
        classifiers = {a: zero_shot_classifier(embedder, names[a], templates[a]) for a in names}
        skips, keys, metadata = Skips(), [], []
        answers: dict[str, list[np.ndarray]] = {attribute: [] for attribute in names}
        described = with_metadata(data.annotated(skips), METADATA, skips)
        for examples, zimg_nxD in embedder.images(described, skips):
            keys.extend(e.source for e in examples)
            metadata.extend(e.metadata for e in examples)
            for attribute, classifier_CxD in classifiers.items():
                answers[attribute].append((zimg_nxD @ classifier_CxD.T).argmax(axis=1))
        if not keys:
            raise EvalDataError(f"{self.path} holds no images{skips}")
        answer = {attribute: np.concatenate(each) for attribute, each in answers.items()}
        scores, right = face_scores(answer, np.array(metadata))
        scores |= {
            "top1_race_chance": 0.5,
            "top1_gender_chance": 1 / len(names["gender"]),
            "top1_age_chance": 1 / len(names["age"]),
            "n": len(keys),
        }
        items = {s: Items(np.array(keys), r.astype(np.float32)) for s, r in right.items()}
        return Outcome(scores, "top1_gender", items, skips)

    def _open(self) -> tuple[ClassificationFolder, dict[str, list[str]], dict[str, list[str]]]:
        data = ClassificationFolder.open(self.path)
        names = by_attribute(data.classnames, f"{self.path}: classnames.txt")
        return data, names, by_attribute(data.templates, f"{self.path}: templates")
