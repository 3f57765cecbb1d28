"""The whole story in minutes on two CPU cores: render, refine, train three ways, evaluate, report.

It repeats the published ablation in miniature: the same tiny model sees the same number of pictures
with their alt-text only, with descriptions too, and with negative identification and tag
classification on top. Eight of 48 colour-shape pairs never occur in training, and the evaluation
asks for them apart.

JAX is imported by the stages that need it: the processes of the refinement start without it.
"""

import argparse
import json
import logging
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from hqclip_jax import scenes
from hqclip_jax.demo_report import Shown, Told, gallery
from hqclip_jax.report import write
from hqclip_jax.shapes import HELD_OUT, PAIRS, encode
from hqclip_jax.telemetry import read_metrics, setup_logging

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

log = logging.getLogger(__name__)

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "demo.py"

EPILOG = """\
examples:
  python -m hqclip_jax.demo                        # 4,000 scenes, about five minutes on two cores
  python -m hqclip_jax.demo --quick                # only to see that everything runs
  python -m hqclip_jax.demo --out runs/long --samples 100000

Started again with the same --out it reuses what is finished and continues the rest; delete the
folder to begin anew. OUT/report.html shows the result; OUT/train/RECIPE is a run as any other, for
`python -m hqclip_jax.evaluate --checkpoint=OUT/train/RECIPE --suite=OUT/eval/suite.json`.
"""


class DemoError(RuntimeError):
    """A stage that did not finish; `status` is the exit status to end with."""

    def __init__(self, message: str, status: int = 2) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Recipe:
    """One way to train: what is laid over the configuration, and the data set in the folder."""

    name: str
    title: str
    p_desc: float
    hni: float
    tag: float
    data: str = "data"


RECIPES = (
    Recipe("alt_text", "alt-text only", p_desc=0.0, hni=0.0, tag=0.0),
    Recipe("descriptions", "+ descriptions", p_desc=0.5, hni=0.0, tag=0.0),
    Recipe("losses", "+ HNI and tag losses", p_desc=0.5, hni=1.0, tag=1.0),
)


@dataclass(frozen=True)
class Settings:
    """What a folder of results was made with.

    Attributes:
        scenes: training pictures.
        samples: pictures that each training sees, repeats counted.
        items: pictures in each evaluation set, about.
        seed: of the training scenes and of training.
    """

    scenes: int
    samples: int
    items: int
    seed: int


class Stages:
    """Runs each stage once: what is finished, and how long it took, is kept in a file.

    Args:
        out: the folder; its `stages.json` holds the settings and the stages.
        settings: what the folder's results are made with; a dataclass.

    Raises:
        DemoError: the folder holds results made with other settings.
    """

    def __init__(self, out: Path, settings: "DataclassInstance") -> None:
        self.path = out / "stages.json"
        self.seconds: dict[str, float] = {}
        self.finished: list[str] = []
        if self.path.exists():
            stored = json.loads(self.path.read_text())
            if stored["settings"] != asdict(settings):
                raise DemoError(
                    f"{out} holds a demo made with {stored['settings']}, and this one is to be "
                    f"{asdict(settings)}: name another --out, or delete the folder"
                )
            self.seconds, self.finished = stored["seconds"], stored["finished"]
        self.settings = settings

    def run(self, name: str, work: Callable[[], None]) -> None:
        """Does the work unless it is done; its time adds up over interrupted tries."""
        if name in self.finished:
            log.info("%s: finished before, in %.0f s; reused", name, self.seconds[name])
            return
        log.info("%s", name)
        started = time.monotonic()
        try:
            work()
            self.finished.append(name)
        finally:
            spent = time.monotonic() - started
            self.seconds[name] = self.seconds.get(name, 0.0) + spent
            stored = {"settings": asdict(self.settings), "seconds": self.seconds}
            write_json(self.path, stored | {"finished": self.finished})
        log.info("%s: %.1f s", name, self.seconds[name])


def write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".tmp")
    partial.write_text(json.dumps(value, indent=1))
    partial.replace(path)


def render(out: Path, settings: Settings) -> None:
    """Writes the pairs, their annotations, and the evaluation suite, in the published layouts."""
    scenes.write_pairs(out / "pairs", settings.scenes, settings.seed)
    scenes.write_annotations(out / "annotations", settings.scenes, settings.seed)
    render_suite(out / "eval", settings.items, settings.seed)


def render_suite(folder: Path, items: int, seed: int) -> None:
    """Writes the evaluation sets, of about `items` pictures each, and `suite.json`."""
    sets = []
    for name, split in (("seen", "train"), ("held_out", "test")):
        pairs = [p for p in PAIRS if (p in HELD_OUT) == (name == "held_out")]
        per_class = max(1, items // len(pairs))
        scenes.write_zeroshot(folder / f"zeroshot_{name}", per_class, seed + 1, pairs)
        scenes.write_hard_negatives(folder / f"hard_negatives_{name}", items, seed + 2, split)
        sets += [f"zeroshot_{name}", f"hard_negatives_{name}"]
    scenes.write_retrieval(folder / "retrieval", items, seed + 1)
    sets = [(name.removesuffix("_seen").removesuffix("_held_out"), name) for name in sets]
    sets.append(("retrieval", "retrieval"))
    listed = [{"task": task, "name": name, "path": name} for task, name in sets]
    write_json(folder / "suite.json", {"sets": listed})


def refine(pairs: Path, annotations: Path, data: Path) -> None:
    """Joins annotations and pairs into the data set, as a real one would be."""
    from refine.__main__ import main

    status = main(
        ["run", "--engine=annotations", "--input", str(pairs), "--annotations", str(annotations),
         "--annotator=scenes", f"--output={data}", "--name=scenes"]
    )  # fmt: skip
    if status:
        raise DemoError("the refinement did not finish; the same command goes on", status)


def train(out: Path, samples: int, seed: int, recipe: Recipe) -> None:
    """Trains one recipe, or continues it from its last checkpoint."""
    from hqclip_jax.train import main

    overrides = {
        "data.path": out / recipe.data, "data.p_desc": recipe.p_desc, "loss.hni": recipe.hni,
        "loss.tag": recipe.tag, "optim.duration": f"{samples} samples", "seed": seed,
    }  # fmt: skip
    arguments = [f"--config={CONFIG}", f"--workdir={out / 'train' / recipe.name}"]
    status = main(arguments + [f"--config.{name}={value}" for name, value in overrides.items()])
    if status:
        raise DemoError(
            f"training {recipe.title!r} stopped with exit status {status}; the same command "
            "continues it from its last checkpoint", status
        )  # fmt: skip


def evaluate(out: Path, recipes: Sequence[Recipe], shown: Sequence[Shown]) -> None:
    """Scores every recipe on every set, and the gallery's pictures with their own two texts."""
    from hqclip_jax.evals.datasets import Example
    from hqclip_jax.evals.embed import Embedder
    from hqclip_jax.evals.suite import load_suite
    from hqclip_jax.evaluate import failed, run_suite
    from hqclip_jax.restore import restore_model

    results = {}
    for recipe in recipes:
        restored = restore_model(out / "train" / recipe.name)
        embedder = Embedder(
            restored.model, restored.params, restored.tokenizer,
            restored.config.model.image_size, restored.mesh, batch=64,
        )  # fmt: skip
        found = run_suite(embedder, load_suite(str(out / "eval" / "suite.json")))
        if names := failed(found):
            raise DemoError(f"{recipe.title!r} could not be scored on {', '.join(names)}", 1)
        examples = (Example(f"scene {s.scene.key}", encode(s.scene)) for s in shown)
        zimg = next(embedder.images(examples))[1]
        texts = {"desc": [s.desc for s in shown], "neg_desc": [s.neg_desc for s in shown]}
        cosines = {field: (zimg * embedder.texts(texts[field])).sum(axis=1) for field in texts}
        gallery = {field: [float(c) for c in cosines[field]] for field in cosines}
        results[recipe.name] = {"sets": {n: r.scores for n, r in found.items()}, "gallery": gallery}
    write_json(out / "scores.json", results)


def run(out: Path, settings: Settings, console: Console) -> None:
    """All stages in order, then the table and the report.

    Raises:
        DemoError: a stage did not finish; what is finished stays.
    """
    stages, shown = Stages(out, settings), gallery()
    stages.run("render", lambda: render(out, settings))
    stages.run("refine", lambda: refine(out / "pairs", out / "annotations", out / "data"))
    for recipe in RECIPES:
        stages.run(
            f"train {recipe.name}",
            lambda recipe=recipe: train(out, settings.samples, settings.seed, recipe),
        )
    stages.run("evaluate", lambda: evaluate(out, RECIPES, shown))
    setting = f"{settings.scenes:,} pictures, {settings.samples:,} samples per training"
    tell(out, Told(*results_of(out, RECIPES), shown, stages.seconds, setting), console)


def results_of(out: Path, recipes: Sequence[Recipe]) -> tuple[dict, dict, dict]:
    """Titles, scores and training metrics, each by the recipe's name."""
    titles = {recipe.name: recipe.title for recipe in recipes}
    metrics = {name: read_metrics(out / "train" / name) for name in titles}
    return titles, json.loads((out / "scores.json").read_text()), metrics


def tell(out: Path, told: Told, console: Console) -> None:
    """Prints the table and what it can't say, and writes the report."""
    console.print(told.rich_table())
    for caveat in told.caveats:
        console.print(f"- {caveat}", highlight=False)
    spent = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in told.seconds.items())
    console.print(f"{spent}; {sum(told.seconds.values()):.0f} s in all", highlight=False)
    report = write(out / "report.html", told.page())
    console.print(f"report: {report}", highlight=False, soft_wrap=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m hqclip_jax.demo",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="[runs/demo]")
    parser.add_argument("--scenes", type=_positive, help="training pictures [4000]")
    parser.add_argument("--samples", type=_positive, help="pictures each training sees [10000]")
    parser.add_argument("--seed", type=int, default=0, help="of scenes and training [0]")
    parser.add_argument(
        "--quick", action="store_true", help="300 scenes, 256 samples: a minute, and no result"
    )
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return value


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 2 an error told, 128 + signal where a signal stopped a training."""
    arguments = _parser().parse_args(argv)
    quick = arguments.quick
    settings = Settings(
        scenes=arguments.scenes or (300 if quick else 4000),
        samples=arguments.samples or (256 if quick else 10_000),
        items=48 if quick else 480,
        seed=arguments.seed,
    )
    console = setup_logging()
    try:
        run(arguments.out, settings, console)
    except DemoError as e:
        console.print(f"error: {e}", style="red", markup=False, highlight=False, soft_wrap=True)
        return e.status
    return 0


if __name__ == "__main__":
    sys.exit(main())
