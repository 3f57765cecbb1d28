"""Progress: a bar in a terminal, a line every few seconds elsewhere."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

EVERY_SECONDS = 15.0
# What is printed holds names from outside: ":m:" in one is no emoji, and "[b]" no markup.
console = Console(stderr=True, highlight=False, emoji=False, markup=False)


class Lines:
    """Log lines in place of a bar: at the end, and in between one every 15 s."""

    def __init__(self, title: str, total: int, unit: str):
        self.title, self.total, self.unit = title, total, unit
        self.done, self.note, self.last = 0, "", time.monotonic()

    def advance(self, steps: int, note: str = "") -> None:
        self.done, self.note = self.done + steps, note
        if self.done >= self.total or time.monotonic() - self.last >= EVERY_SECONDS:
            self.last = time.monotonic()
            console.print(
                f"{self.title}: {self.done:,} of {self.total:,} {self.unit} {self.note}".rstrip(),
                soft_wrap=True,
            )


class Bar:
    """The same as a bar."""

    def __init__(self, shown: Progress, title: str, total: int, unit: str):
        self.shown, self.task = shown, shown.add_task(title, total=total, unit=unit, note="")

    def advance(self, steps: int, note: str = "") -> None:
        self.shown.update(self.task, advance=steps, note=note)


@contextmanager
def progress(title: str, total: int, unit: str) -> Iterator[Lines | Bar]:
    """Shows how far a loop is; call `advance(steps, note)` on what it gives."""
    if not console.is_terminal:
        yield Lines(title, total, unit)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[unit]}"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console) as shown:
        yield Bar(shown, title, total, unit)
