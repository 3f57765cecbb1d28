"""What the demo of the student tells beside the scores of CLIP: how true its texts are."""

from collections.abc import Mapping

from rich.table import Table

from hqclip_jax import report
from hqclip_jax.report import Markup, Share

LEAD = (
    "A tiny vision-language model learns from a teacher's annotations, refines scenes that it "
    "never saw, and CLIP is trained on what it wrote."
)

CAVEATS = (
    "One seed, a student of three million parameters, and a world of coloured shapes: nothing here "
    "forecasts photographs, other models or other scales. The margins cover the choice of test "
    "pictures alone.",
    "The teacher is the scenes' own generator, which makes no mistake. It tells every picture in "
    "one order and falsifies by rule, because so small a student learns rules and not draws; its "
    "negatives have fewer kinds than those of `make demo`.",
    "The base model stands for published weights: its vision tower was trained on labels of "
    "rendered scenes before the student saw its first annotation.",
    "Test captions share words and grammar with the teacher's texts, and name relations that it "
    "tells the other way round.",
    "The sizes were chosen for half an hour on two cores, and the recipes of CLIP are those of "
    "`make demo`, not tuned to this.",
)

GALLERY = (
    "The first eight scenes with an unseen pair that the student answered about, with its words; "
    "not chosen. A tick means that the description is nearer than the negative."
)

MEASURES = {
    "color": "colour", "shape": "shape", "size": "size", "texture": "texture", "count": "count",
    "pair": "colour and shape together", "held_out_pair": "the same, of pairs never seen",
    "relation": "relation", "background": "background", "desc": "sentences that are true",
    "tags": "tags that are true", "neg_desc": "negative sentences that are false",
    "neg_tags": "negative tags that are false",
}  # fmt: skip
NAMES = {"fresh": "fresh scenes", "unseen": "scenes with unseen pairs"}


def student_table(student: Mapping[str, dict]) -> Table:
    """How much of what the student says is right, in percent.

    Args:
        student: per name in `NAMES`: `asked`, `kept`, `shares` (by measure), `engine` (the engine's
            statistics).
    """
    table = Table("the student", title="right, in %")
    for title in NAMES.values():
        table.add_column(title, justify="right")
    for measure, title in MEASURES.items():
        table.add_row(title, *(_percent(student[n]["shares"].get(measure)) for n in NAMES))
    table.add_section()
    table.add_row("answers kept", *(f"{r['kept']} of {r['asked']}" for r in _rows(student)))
    return table


def student_sections(student: Mapping[str, dict]) -> list[tuple[str, list[Markup]]]:
    """The same for the report, and the pace of the refinement."""
    header = ["", *NAMES.values()]
    rows = [
        [title, *(_bar(student[name]["shares"].get(measure)) for name in NAMES)]
        for measure, title in MEASURES.items()
    ]
    quiet = [["answers kept", *(f"{r['kept']:,} of {r['asked']:,}" for r in _rows(student))]]
    note = report.element(
        "p",
        "In % of what the student told of pictures that it never saw, laid onto what was drawn so "
        "that most of it is right; what is not told is wrong. Of held-out pairs no picture and no "
        "text was in its training.",
        class_="note",
    )
    pace = report.table(
        ["", "pictures a second", "seconds", "tokens of questions", "tokens of answers"],
        [
            [title, *(f"{student[name]['engine'].get(key, 0):,.0f}" for key in PACE)]
            for name, title in NAMES.items()
        ],
    )
    return [
        ("The student", [report.table(header, rows, quiet), note]),
        ("The refinement", [pace]),
    ]


PACE = ("images_per_second", "seconds", "prompt_tokens", "output_tokens")


def _rows(student: Mapping[str, dict]) -> list[dict]:
    return [student[name] for name in NAMES]


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"


def _bar(share: float | None) -> Share | str:
    return "-" if share is None else Share(share)
