"""What the demo tells: the table, what it can't say, and the report."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.table import Table

from hqclip_jax import report, scenes
from hqclip_jax.report import Card, Markup, Share
from hqclip_jax.shapes import HELD_OUT, PAIRS, Scene, encode, sample

COLUMNS = (
    ("zero-shot, seen pairs", "zeroshot_seen", "top1"),
    ("zero-shot, held-out pairs", "zeroshot_held_out", "top1"),
    ("retrieval R@1", "retrieval", "recall_at_1"),
    ("hard negatives, seen pairs", "hard_negatives_seen", "accuracy"),
    ("hard negatives, held-out pairs", "hard_negatives_held_out", "accuracy"),
)
"""Heading, set and score."""

CURVES = (
    ("Contrastive loss (the texts differ by recipe, so only slopes compare)", "loss/contrastive"),
    ("Share of a batch's pictures that find their own text", "accuracy"),
    ("Share of pictures nearer to their text than to its negative", "hni_accuracy"),
    ("Tag loss", "loss/tag"),
)
"""Title and metric."""

CAVEATS = (
    "One seed and one tiny model: another seed moves every number, by how much is not known here. "
    "The margins cover the choice of test pictures alone.",
    "The recipes see the same number of pictures, not the same computation: negatives are more "
    "text to encode.",
    "The annotations are the generator's own truth, which no vision-language model's are, and the "
    "alt-texts are as poor as we made them: the gain of descriptions is no forecast.",
    "Descriptions and test captions share words and grammar that alt-texts rarely have; part of a "
    "gain is that.",
    "The learning rate was chosen on alt-text alone, and the negatives were redrawn once; results "
    "of all recipes had been seen by then. Nothing here speaks of photographs or of other scales.",
)

LEAD = (
    "The ablation of negative identification and tag classification in miniature: one tiny model, "
    "trained three ways on rendered scenes."
)
CHOSEN = (
    "The first test scenes of a seed of their own, each with a held-out pair; not chosen. A tick "
    "means that the description is nearer than the negative."
)
GALLERY_SEED = 3


def gallery_scenes() -> list[Scene]:
    """The first eight test scenes of a stream of their own: not chosen."""
    return [sample(GALLERY_SEED, index, "test") for index in range(8)]


def margin(share: float, n: int) -> float:
    """Half the width of a binomial share's 95% interval (Agresti and Coull's, never zero)."""
    centre = (share * n + 2) / (n + 4)
    return 1.96 * (centre * (1 - centre) / (n + 4)) ** 0.5


@dataclass(frozen=True)
class Shown:
    """A picture of the gallery with its alt-text, description and negative description."""

    scene: Scene
    caption: str
    desc: str
    neg_desc: str


def gallery() -> list[Shown]:
    """The gallery's scenes with the generator's own texts."""
    shown = []
    for scene in gallery_scenes():
        told = scenes.annotation(scene)
        alt_text = scenes.alt_text(scene, scene.rng(scenes.ALT_TEXT))
        shown.append(Shown(scene, alt_text, ", ".join(told["desc"]), ", ".join(told["neg_desc"])))
    return shown


@dataclass(frozen=True)
class Told:
    """The demo's results.

    Attributes:
        titles: the recipes, by name.
        results: per recipe `sets` (scores by set) and `gallery` (cosines of each picture with its
            `desc` and `neg_desc`).
        metrics: per recipe the rows of its `metrics.jsonl`.
        shown: the gallery's pictures.
        seconds: wall time by stage.
        setting: sizes, in words.
        title: of the report.
        lead: what was done, in a sentence; the setting follows it.
        caveats: what the numbers can't say.
        chosen: how the gallery's pictures were chosen.
        sections: more headings with their parts, after the results.
    """

    titles: Mapping[str, str]
    results: Mapping[str, dict]
    metrics: Mapping[str, Sequence[Mapping[str, float]]]
    shown: Sequence[Shown]
    seconds: Mapping[str, float]
    setting: str
    title: str = "HQ-CLIP in miniature"
    lead: str = LEAD
    caveats: Sequence[str] = CAVEATS
    chosen: str = CHOSEN
    sections: Sequence[tuple[str, list[Markup]]] = ()

    def scores(self, recipe: str) -> list[float]:
        """One score for each of `COLUMNS`."""
        sets = self.results[recipe]["sets"]
        return [sets[name][score] for _, name, score in COLUMNS]

    def chance(self) -> list[float]:
        """Each column's chance level."""
        sets = next(iter(self.results.values()))["sets"]
        return [sets[name][f"{score}_chance"] for _, name, score in COLUMNS]

    def margins(self) -> list[float]:
        """Each column's widest 95% margin over the recipes."""
        sizes = [next(iter(self.results.values()))["sets"][name]["n"] for _, name, _ in COLUMNS]
        shares = zip(*(self.scores(recipe) for recipe in self.titles))
        return [max(margin(s, n) for s in column) for column, n in zip(shares, sizes)]

    def by_category(self, recipe: str) -> dict[str, float]:
        """Hard negatives by the fact that was changed, over both sets."""
        sets = self.results[recipe]["sets"]
        both = [sets["hard_negatives_seen"], sets["hard_negatives_held_out"]]
        shares = {}
        for category in scenes.CATEGORIES:
            n = [s[f"n/{category}"] for s in both]
            right = [s[f"accuracy/{category}"] * k for s, k in zip(both, n)]
            shares[category] = sum(right) / sum(n)
        return shares

    def rich_table(self) -> Table:
        """Recipes by scores, in percent."""
        table = Table("recipe", title=f"scores in % · {self.setting}")
        for heading, _, _ in COLUMNS:
            table.add_column(heading, justify="right")
        for recipe, title in self.titles.items():
            table.add_row(title, *(f"{100 * s:.1f}" for s in self.scores(recipe)))
        table.add_section()
        table.add_row("chance", *(f"{100 * s:.1f}" for s in self.chance()), style="dim")
        table.add_row("margin (95%)", *(f"±{100 * s:.1f}" for s in self.margins()), style="dim")
        return table

    def page(self) -> Markup:
        """The whole report."""
        lead = (
            f"{self.lead} {self.setting}; {len(HELD_OUT)} of {len(PAIRS)} colour-shape pairs occur "
            "in no training picture and no training text."
        )
        caveats = Markup("").join(report.element("li", caveat) for caveat in self.caveats)
        return report.page(
            self.title,
            lead,
            [
                ("Results", [self._results()]),
                *self.sections,
                ("What the numbers can't say", [report.element("ul", Markup(caveats))]),
                ("Hard negatives by changed fact", [self._categories()]),
                ("Training", [self._curves()]),
                ("Unseen pictures", [self._gallery()]),
                ("Wall time", [self._seconds()]),
            ],
        )

    def _results(self) -> Markup:
        header = ["recipe", *(heading for heading, _, _ in COLUMNS)]
        rows = [[t, *map(Share, self.scores(r))] for r, t in self.titles.items()]
        quiet = [
            ["chance", *(f"{100 * s:.1f}" for s in self.chance())],
            ["margin (95%)", *(f"±{100 * s:.1f}" for s in self.margins())],
        ]
        note = report.element(
            "p",
            "In %. Zero-shot: one large shape, to be named among all 48 pairs. Retrieval: the mean "
            "of both directions, over scenes with a held-out pair. Hard negatives: which of two "
            "captions that differ in one fact is the picture's.",
            class_="note",
        )
        return Markup(report.table(header, rows, quiet) + note)

    def _categories(self) -> Markup:
        rows = [[t, *map(Share, self.by_category(r).values())] for r, t in self.titles.items()]
        quiet = [["chance", *["50.0"] * len(scenes.CATEGORIES)]]
        return report.table(["recipe", *scenes.CATEGORIES], rows, quiet)

    def _curves(self) -> Markup:
        figures = []
        for heading, metric in CURVES:
            lines = {
                title: [(r["samples"], r[metric]) for r in self.metrics[recipe] if metric in r]
                for recipe, title in self.titles.items()
            }
            figures.append(report.curves(heading, lines, "samples", metric))
        return report.plots(figures)

    def _gallery(self) -> Markup:
        cards = []
        for k, shown in enumerate(self.shown):
            texts = [
                ("alt-text", shown.caption),
                ("description", shown.desc),
                ("negative", shown.neg_desc),
            ]
            rows = []
            for recipe, title in self.titles.items():
                cosines = self.results[recipe]["gallery"]
                true, false = cosines["desc"][k], cosines["neg_desc"][k]
                rows.append([title, report.verdict(f"{true:.2f}", true > false), f"{false:.2f}"])
            cards.append(Card(encode(shown.scene), texts, ("cosine", "desc.", "negative"), rows))
        note = report.element("p", self.chosen, class_="note")
        return Markup(note + report.gallery(cards))

    def _seconds(self) -> Markup:
        rows = [[name, f"{seconds:.0f}"] for name, seconds in self.seconds.items()]
        whole = [["in all", f"{sum(self.seconds.values()):.0f}"]]
        return report.table(["stage", "seconds"], rows, whole)
