"""A sample of pairs, drawn from inputs and written as tars of its own.

    FOLDER/pairs/00000.tar …   the pairs, in img2dataset's layout, in random order
    FOLDER/sample.json         how they were drawn, and how many of which kind; written last
    FOLDER/.drawing/           while it is being done

A killed draw starts anew; a finished one is left as it is.
"""

import json
import shutil
import tarfile
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from refine.errors import RefineError
from refine.inputs.find import Input, fingerprint
from refine.inputs.pairs import FORMATS, ImageError, Pair, image_size
from refine.parallel import ordered_map
from refine.progress import console, progress
from refine.storage import locked, write_json
from refine.teaching.sampling import KINDS, Survey
from refine.teaching.survey import SKIP_PIXELS, here, survey
from refine.uids import to_hex

PAIRS, SAMPLE_FILE, DRAWING = "pairs", "sample.json", ".drawing"
TAR_PAIRS = 1000
GONE = "gone"  # a pair that is not there when it is fetched


def draw(inputs: Sequence[Input], folder: Path, samples: int, seed: int, workers: int) -> Path:
    """Draws a sample, unless it is drawn already, and returns the folder of its tars.

    Args:
        inputs: of pairs.
        folder: where the sample goes.
        samples: how many pairs.
        seed: of the draw.
        workers: processes that read.

    Raises:
        RefineError: the folder holds something else, or a sample that was drawn otherwise; an input
            can't be read; nothing can be drawn.
    """
    plan = {"input": fingerprint(inputs), "samples": samples, "seed": seed}
    scratch, done = folder / DRAWING, folder / SAMPLE_FILE
    if done.exists():
        _compare(folder, json.loads(done.read_text())["plan"], plan)
        shutil.rmtree(scratch, ignore_errors=True)
        return folder / PAIRS
    _claim(folder, scratch)
    with locked(scratch / "lock", wait=False):
        begun = scratch / "plan.json"
        if begun.exists():
            _compare(folder, json.loads(begun.read_text()), plan)
        write_json(begun, plan)
        for left in (folder / PAIRS, scratch / "fetched", scratch / PAIRS):
            shutil.rmtree(left, ignore_errors=True)
        found = survey(inputs, seed, samples, scratch / "remote", workers)
        rows, broken = _fetch_sound(found, inputs, samples, scratch, workers)
        if not len(rows):
            raise RefineError(
                f"--input has no pair to draw: of what is there, {dict(found.skips) or 'nothing'} "
                "is no pair or no picture"
            )
        _write_tars(rows, scratch / "fetched", scratch / PAIRS)
        (scratch / PAIRS).rename(folder / PAIRS)
        write_json(done, {"plan": plan} | _told(rows, found, broken))
    shutil.rmtree(scratch)
    console.print(
        f"{folder / PAIRS}: {len(rows):,} pairs drawn from {int(found.counts.sum()):,}",
        soft_wrap=True,
    )
    return folder / PAIRS


def _claim(folder: Path, scratch: Path) -> None:
    try:
        if folder.exists() and not scratch.exists():
            foreign = sorted(p.name for p in folder.iterdir())
            if foreign:
                raise RefineError(
                    f"--output {folder} holds other files ({foreign[0]}): choose another --output"
                )
        scratch.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise RefineError(f"--output {folder} can't be written: {e.strerror}") from e


def _compare(folder: Path, there: dict, now: dict) -> None:
    differing = [key for key in there | now if there.get(key) != now.get(key)]
    if differing:
        key = differing[0]
        raise RefineError(
            f"{folder} was begun with other arguments ({', '.join(differing)}; {key} was "
            f"{there.get(key)}, now {now.get(key)}): choose another --output, or delete it first"
        )


def _fetch_sound(
    found: Survey, inputs: Sequence[Input], samples: int, scratch: Path, workers: int
) -> tuple[np.ndarray, Counter[str]]:
    """Fetches what is drawn, and draws others for pictures that do not decode, until all do."""
    fetched: set[str] = set()
    broken: dict[str, str] = {}
    while True:
        rows = found.choose(samples, without=broken)
        wanted = defaultdict(set)
        for uid, source in zip(map(to_hex, rows["uid"]), rows["source"].tolist()):
            if uid not in fetched:
                wanted[source].add(uid)
        if not wanted:
            return rows, Counter(broken.values())
        errands = [Errand(inputs[n], frozenset(uids)) for n, uids in sorted(wanted.items())]
        with progress("fetching the drawn", len(errands), "inputs") as bar:
            for came in ordered_map(Fetch(scratch), errands, workers):
                fetched |= {uid for uid, reason in came.items() if not reason}
                broken |= {uid: reason for uid, reason in came.items() if reason}
                bar.advance(1)


@dataclass(frozen=True)
class Errand:
    """An input, and the uids to fetch from it."""

    given: Input
    uids: frozenset[str]


@dataclass(frozen=True)
class Fetch:
    """Writes pairs as files into `scratch`/fetched, in any process; for each uid it returns why it
    could not, or ""."""

    scratch: Path

    def __call__(self, _: None, errand: Errand) -> dict[str, str]:
        target = self.scratch / "fetched"
        target.mkdir(exist_ok=True)
        came: dict[str, str] = {}
        with here(errand.given, self.scratch / "remote") as pairs:
            for pair in pairs:
                if not isinstance(pair, Pair) or pair.uid not in errand.uids - came.keys():
                    continue
                try:
                    size = image_size(pair.image, SKIP_PIXELS)
                except ImageError as e:
                    came[pair.uid] = e.reason
                    continue
                (target / pair.uid).write_bytes(pair.image)
                (target / f"{pair.uid}.json").write_text(_meta(pair, *size), encoding="utf-8")
                came[pair.uid] = ""
                if len(came) == len(errand.uids):
                    break
        return dict.fromkeys(errand.uids, GONE) | came


def _meta(pair: Pair, width: int, height: int) -> str:
    meta = {
        "uid": pair.uid,
        "caption": pair.caption,
        "status": "success",
        "width": width,
        "height": height,
        "source": pair.source,
        "source_key": pair.key,
    }
    return json.dumps(meta, ensure_ascii=False)


def _write_tars(rows: np.ndarray, fetched: Path, target: Path) -> None:
    target.mkdir()
    with progress("writing", len(rows), "pairs") as bar:
        for number, start in enumerate(range(0, len(rows), TAR_PAIRS)):
            with tarfile.open(
                target / f"{number:05d}.tar", "w", format=tarfile.USTAR_FORMAT
            ) as tar:
                for place, uid in enumerate(rows["uid"][start : start + TAR_PAIRS]):
                    _add(tar, f"{number:05d}{place:04d}", fetched / to_hex(uid))
                    bar.advance(1)


def _add(tar: tarfile.TarFile, key: str, path: Path) -> None:
    image = path.read_bytes()
    meta = path.with_name(f"{path.name}.json").read_bytes()
    with Image.open(BytesIO(image), formats=FORMATS) as opened:
        form = {"PNG": "png", "WEBP": "webp"}.get(opened.format or "", "jpg")
    caption = json.loads(meta)["caption"].encode()
    for extension, data in ((form, image), ("txt", caption), ("json", meta)):
        info = tarfile.TarInfo(f"{key}.{extension}")
        info.size = len(data)
        tar.addfile(info, BytesIO(data))


def _told(rows: np.ndarray, found: Survey, broken: Counter[str]) -> dict:
    """What `sample.json` says beside the plan."""
    drawn = np.bincount(rows["kind"], minlength=len(KINDS))
    kinds = [
        {
            "caption_words": words,
            "shape": shape,
            "shorter_side": size,
            "pairs": int(count),
            "drawn": int(n),
        }
        for (words, shape, size), count, n in zip(KINDS, found.counts, drawn)
        if count
    ]
    return {
        "drawn": len(rows),
        "pairs": int(found.counts.sum()),
        "inputs_drawn_from": len(np.unique(rows["source"])),
        "skipped": dict(sorted(found.skips.items())),
        "drawn_and_replaced": dict(sorted(broken.items())),
        "kinds": kinds,
    }
