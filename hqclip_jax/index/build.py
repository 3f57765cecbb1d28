"""Builds an index, or brings one up to date, so that a kill at any moment costs a batch at most.

Every batch that was embedded is a file in `parts/`, named when it is whole. At the end the vectors
that still stand are copied from the snapshot before, then from the parts, into a new snapshot;
`index.json` is replaced to name it, and what it replaces is removed. So a reader always finds one
state or the other, and what a kill leaves over is used, or removed, by the next build.
"""

import fcntl
import json
import logging
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

import numpy as np
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from safetensors.numpy import load_file, save_file

from hqclip_jax.index import approximate
from hqclip_jax.index.folder import Picture, Skip, Walk, printable
from hqclip_jax.index.store import (
    ABOUT,
    PARTS,
    SKIPPED,
    About,
    Index,
    Model,
    SearchError,
    decode,
    encode,
    replace_text,
    write_snapshot,
)

log = logging.getLogger(__name__)

NAMED = 20  # skipped pictures that are named in the log; all of them are in skipped.jsonl

Row = tuple[Picture, np.ndarray]


class Encoder(Protocol):
    """What a build needs of a model; see `hqclip_jax.index.model.SearchModel`."""

    about: Model

    def pictures(
        self, root: Path, pictures: Iterable[Picture]
    ) -> Iterator[tuple[list[Picture], np.ndarray, list[Skip]]]: ...


def build(index: Path, images: Path, model: Encoder, console: Console | None = None) -> About:
    """Embeds what is new or changed in a folder since the last build, and drops what is gone.

    Args:
        index: the index's folder; it is made, or brought up to date.
        images: the folder of pictures.
        console: shows a progress bar, if it is a terminal.

    Returns:
        what the index then is of.

    Raises:
        SearchError: no pictures, an index of another folder or model, or a build under way.
    """
    images = images.absolute()
    if not images.is_dir():
        raise SearchError(f"--images={images} is no folder")
    walk = Walk(images)
    wanted = {picture.key: picture for picture in walk}
    if not wanted:
        raise SearchError(_nothing(walk))
    index.mkdir(parents=True, exist_ok=True)
    with _alone(index):
        about = _begin(index, images, model.about)
        parts = _Parts(index / PARTS)
        kept = {p.key for p, _ in _rows(index, about, parts) if wanted.get(p.key) == p}
        todo = [picture for key, picture in wanted.items() if key not in kept]
        log.info("%d pictures, %d of them known", len(wanted), len(kept))
        skipped = list(walk.skipped)
        for pictures, z_nxD, left_out in _shown(model.pictures(images, todo), len(todo), console):
            parts.add(pictures, z_nxD.astype(np.float16))
            kept.update(picture.key for picture in pictures)
            skipped += left_out
        _tell(skipped)
        if not kept:
            raise SearchError(f"none of the {len(wanted):,} pictures in {images} can be read")
        rows = _standing(_rows(index, about, parts), wanted, kept)
        unchanged = about.snapshot and not parts.count and len(kept) == about.count
        if unchanged and approximate.wanted(about.count):  # the library may have come since
            unchanged = (index / about.snapshot / approximate.FILE).exists()
        counts = dict(Counter(skip.reason for skip in skipped))
        after = replace(
            about, count=len(kept), skipped=counts, others=walk.others,
            updated=datetime.now(UTC).isoformat(timespec="seconds"),
        )  # fmt: skip
        if not unchanged:
            after = replace(after, snapshot=f"{int(about.snapshot or 0) + 1:06}")
            write_snapshot(index / after.snapshot, rows, after.count, model.about.dim)
        lines = [json.dumps(asdict(skip)) + "\n" for skip in skipped]
        replace_text(index / SKIPPED, "".join(lines))
        after.write(index)
        _sweep(index, after.snapshot)
    return after


def _nothing(walk: Walk) -> str:
    found = f"{walk.others:,} other files" if walk.others else "nothing else"
    broken = "".join(f"; {s.name}: {s.reason} ({s.detail})" for s in walk.skipped[:3])
    return f"{walk.root} holds no pictures and no tars of pictures, only {found}{broken}"


@contextmanager
def _alone(index: Path) -> Iterator[None]:
    """The kernel lets go of the lock with its process, however that ends."""
    with (index / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise SearchError(f"another build of {index} is under way: wait for its end") from e
        yield


def _begin(index: Path, images: Path, model: Model) -> About:
    """The index as it is; a new one is written, so that parts never meet another model's."""
    if not (index / ABOUT).exists():
        if {path.name for path in index.iterdir()} - {"lock", f"{ABOUT}.tmp"}:
            raise SearchError(f"{index} holds other things and no index: give another --index")
        About(str(images), model).write(index)
    about = About.read(index)
    mend = f"give another --index, or remove {index}"
    if about.model.digest != model.digest:
        raise SearchError(f"{index} was built by {about.model}, not by {model}: {mend}")
    if Path(about.images) != images:
        raise SearchError(f"{index} is of the folder {about.images}, not of {images}: {mend}")
    _sweep(index, about.snapshot, parts=False)
    return about


def _sweep(index: Path, snapshot: str, parts: bool = True) -> None:
    """Removes snapshots that `index.json` does not name, and the parts."""
    for path in index.iterdir():
        name = path.name.removesuffix(".tmp")
        ours = name.isdecimal() or (parts and name == PARTS)
        if ours and path.is_dir() and path.name != snapshot:
            shutil.rmtree(path)


class _Parts:
    """Batches of pictures with their vectors, each a file."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        for partial in folder.glob("*.tmp"):
            partial.unlink()
        self.folder, self.count = folder, 0
        if files := self._files():
            self.count = int(files[-1].stem)

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("*.safetensors"))

    def add(self, pictures: Sequence[Picture], z_nxD: np.ndarray) -> None:
        if not pictures:
            return
        self.count += 1
        path = self.folder / f"{self.count:08}.safetensors"
        partial = path.with_suffix(".tmp")
        lines = np.frombuffer(b"".join(map(encode, pictures)), np.uint8)
        save_file({"vectors": z_nxD, "pictures": lines}, partial)
        partial.replace(path)

    def __iter__(self) -> Iterator[Row]:
        for path in self._files():
            part = load_file(path)
            yield from zip(map(decode, part["pictures"].tobytes().splitlines()), part["vectors"])


def _rows(index: Path, about: About, parts: _Parts) -> Iterator[Row]:
    """What is embedded already: the snapshot's rows, then the parts'."""
    if about.snapshot:
        before = Index.open(index)
        yield from zip(before.pictures(), before.vectors)
    yield from parts


def _standing(
    rows: Iterable[Row], wanted: dict[tuple[str, str], Picture], kept: set[tuple[str, str]]
) -> Iterator[Row]:
    """The rows of pictures that are still as they were, each once; empties `kept`."""
    for picture, z_D in rows:
        if picture.key in kept and wanted[picture.key] == picture:
            kept.remove(picture.key)
            yield picture, z_D


def _shown(
    batches: Iterable[tuple[list[Picture], np.ndarray, list[Skip]]],
    total: int,
    console: Console | None,
) -> Iterator[tuple[list[Picture], np.ndarray, list[Skip]]]:
    columns = (
        TextColumn("embedding"), BarColumn(), MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"), TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    shown = bool(total) and console is not None and console.is_terminal
    with Progress(*columns, console=console, disable=not shown, transient=True) as progress:
        bar = progress.add_task("", total=total, rate="")
        for batch in batches:
            yield batch
            progress.advance(bar, len(batch[0]) + len(batch[2]))
            speed = progress.tasks[0].speed
            progress.update(bar, rate=f"{speed:,.0f}/s" if speed else "")


def _tell(skipped: Sequence[Skip]) -> None:
    for skip in skipped[:NAMED]:
        detail = f" ({printable(skip.detail)})" if skip.detail else ""
        log.warning("left out: %s: %s%s", printable(skip.name), skip.reason, detail)
    if len(skipped) > NAMED:
        log.warning("and %d more: see %s", len(skipped) - NAMED, SKIPPED)


def hint(about: About) -> str:
    """How to make searching faster, where that is worth a word."""
    if about.count < approximate.FROM or approximate.available():
        return ""
    return f"{about.count:,} vectors: `pip install faiss-cpu` and build again to search them faster"
