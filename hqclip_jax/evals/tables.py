"""An evaluation's tables in the terminal."""

from collections.abc import Mapping

from rich.markup import escape
from rich.table import Table

from hqclip_jax.evals.groups import GroupMean
from hqclip_jax.evals.outcome import Failure, Result
from hqclip_jax.evals.published import COLUMNS, column_means, published
from hqclip_jax.evals.results import main_scores, named_scores, queries


def results_table(results: Mapping[str, Result]) -> Table:
    """One row a score, in percent, with its chance level and the number of answers behind it."""
    table = Table("set", title="scores in %")
    table.add_column("score", overflow="fold")
    for column in ("value", "chance", "n"):
        table.add_column(column, justify="right")
    for name, result in results.items():
        if isinstance(result, Failure):
            table.add_row(escape(name), f"[red]{escape(result.error)}[/]", "-", "-", "-")
            continue
        scores = result.scores
        for score in named_scores(scores):
            chance = scores.get(f"{score}_chance")
            table.add_row(
                escape(name),
                escape(score),
                f"{100 * scores[score]:.1f}",
                "-" if chance is None else f"{100 * chance:.1f}",
                f"{queries(result, score):,}",
            )
        if result.skips.total:
            table.add_row(escape(name), "[yellow]left out[/]", "", "", f"{result.skips.total:,}")
        table.add_section()
    return table


def mean_text(mean: GroupMean | None) -> str:
    """A column's value, with how many sets it is of where some are missing."""
    if mean is None:
        return ""
    part = "" if mean.have == mean.of else f" ({mean.have} of {mean.of})"
    return f"{100 * mean.mean:.1f}{part}"


def columns_table(results: Mapping[str, Result], scale: str) -> Table | None:
    """Ours and the paper's in DataComp's columns, which stand below each other here; None where
    no set of theirs was scored."""
    ours = column_means(main_scores(results))
    if not ours:
        return None
    rows = [row for row in published() if row.scale == scale]
    table = Table("column", title=f"DataComp's columns in %, and as published at scale {scale}")
    for heading in ("this model", *(f"{row.method}\n{row.model}" for row in rows)):
        table.add_column(escape(heading), justify="right")
    for column, heading in COLUMNS.items():
        theirs = (f"{row.scores[column]:.1f}" if column in row.scores else "" for row in rows)
        table.add_row(heading, mean_text(ours.get(column)), *theirs)
    return table
