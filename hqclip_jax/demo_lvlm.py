"""The paper's first half in miniature: a student learns from a teacher, refines, and CLIP learns
from what it wrote.

A tiny Qwen2-VL is fine-tuned on annotations of rendered scenes (the generator is the teacher), runs
in vLLM over fresh scenes with noisy alt-text, and its texts are compared with what was drawn. Then
the same tiny CLIP is trained three times on those scenes: on the alt-text, on the student's texts,
and on the texts that the teacher would have given.

Two environments: this runs in JAX's, and calls the other's python for all that needs torch.
"""

import argparse
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from hqclip_jax import scene_teacher, scenes
from hqclip_jax.data.record import LISTS, MANIFEST_FILE, Record, decode
from hqclip_jax.data.shards import open_source
from hqclip_jax.demo import (
    DemoError,
    Recipe,
    Stages,
    evaluate,
    refine,
    render_suite,
    results_of,
    tell,
    train,
    write_json,
)
from hqclip_jax.demo_lvlm_report import CAVEATS, GALLERY, LEAD, student_sections, student_table
from hqclip_jax.demo_report import Shown, Told
from hqclip_jax.scene_check import judge, shares
from hqclip_jax.shapes import SIDE, Scene, sample
from hqclip_jax.telemetry import setup_logging

ROOT = Path(__file__).resolve().parent.parent
PROMPT = "Describe truly and falsely.{{image}}{{caption}}"
ENGINE = {"dtype": '"float32"', "enforce_eager": "true", "kv_cache_memory_bytes": str(256 << 20)}
"""Arguments of `vllm.LLM` for a tiny model on a CPU: bfloat16 is slow on most, and a compiled one
takes longer to start than the whole work."""
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "PYTHONPATH": str(ROOT),
    "PYTHONWARNINGS": "ignore",  # libraries' about one another
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process less to start
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the cores are not the engine's alone
}
MAX_TOKENS, CONTEXT, SLOTS = 160, 320, 32

EPILOG = """\
examples:
  python -m hqclip_jax.demo_lvlm             # about half an hour on two cores
  python -m hqclip_jax.demo_lvlm --quick     # only to see that everything runs; no result

Started again with the same --out it reuses what is finished and continues the rest; delete the
folder to begin anew. OUT/report.html shows the result; OUT/student is a model that
`python -m refine run --engine vllm --model OUT/student --prompt OUT/prompt.txt` takes.
"""

RECIPES = (
    Recipe("alt_text", "alt-text only", p_desc=0.0, hni=0.0, tag=0.0, data="refined"),
    Recipe("student", "the student's texts", p_desc=0.5, hni=1.0, tag=1.0, data="refined"),
    Recipe("truth", "true annotations", p_desc=0.5, hni=1.0, tag=1.0, data="true"),
)


@dataclass(frozen=True)
class Settings:
    """What a folder of results was made with.

    Attributes:
        taught: scenes that the teacher annotates for the student.
        fresh: scenes that the student refines.
        unseen: scenes with colour-shape pairs that it never saw, for its score alone.
        base_steps: of the base model's training.
        epochs: of the student's fine-tuning.
        samples: pictures that each training of CLIP sees, repeats counted.
        items: pictures in each evaluation set, about.
        seed: of everything.
    """

    taught: int
    fresh: int
    unseen: int
    base_steps: int
    epochs: float
    samples: int
    items: int
    seed: int


STREAMS = {"fresh": (0, "train"), "taught": (5, "train"), "unseen": (4, "test")}
"""What is added to the seed, and the split. The base model's own scenes are stream 6; evaluation
sets and the gallery take 1 to 3."""
BASE_STREAM = 6


def render(out: Path, settings: Settings) -> None:
    """Writes pairs and the teacher's annotations of them, the evaluation suite, the prompt, and the
    texts that the student's tokenizer is made for."""
    for name, (stream, split) in STREAMS.items():
        count, seed = getattr(settings, name), settings.seed + stream
        scenes.write_pairs(out / "pairs" / name, count, seed, split)
        scenes.write_annotations(
            out / "annotations" / name, count, seed, split, missing=0.0,
            annotate=scene_teacher.annotation,
        )  # fmt: skip
    render_suite(out / "eval", settings.items, settings.seed)
    (out / "prompt.txt").write_text(PROMPT)


class Lvlm:
    """The commands that run in the other environment.

    Args:
        python: its interpreter.
        out: the demo's folder.

    Raises:
        DemoError: there is no such interpreter.
    """

    def __init__(self, python: Path, out: Path) -> None:
        if not python.exists():
            raise DemoError(f"--refine-python {python}: no such file; `make refine-env` makes it")
        self.python, self.out = python, out

    def run(self, *arguments: object) -> None:
        """Runs `python -m ARGUMENTS`.

        Raises:
            DemoError: it failed, with its exit status.
        """
        command = [str(self.python.absolute()), "-m", *map(str, arguments)]
        status = subprocess.run(command, env=os.environ | ENVIRONMENT).returncode
        if status:
            raise DemoError(
                f"{' '.join(command[1:3])} stopped with exit status {status}; the same command "
                "goes on where it did", status if status > 0 else 128 - status
            )  # fmt: skip

    def make_base(self, settings: Settings) -> None:
        """The model that fine-tuning begins with."""
        self.run(
            "refine.teaching.tiny_pretrain", "--output", self.out / "base", "--prompt",
            self.out / "prompt.txt", "--steps", settings.base_steps,
            "--seed", settings.seed + BASE_STREAM,
        )  # fmt: skip

    def fine_tune(self, settings: Settings) -> None:
        """The student: a base model and what the teacher said."""
        self.run(
            "refine", "sft", "--model", self.out / "base", "--data", self.out / "taught",
            "--output", self.out / "student", "--prompt", self.out / "prompt.txt",
            "--epochs", settings.epochs, "--batch", 16, "--lr", 1e-3, "--warmup", 0.05,
            "--max-pixels", SIDE**2, "--max-tokens", MAX_TOKENS, "--held-out", 0.01,
            "--seed", settings.seed,
        )  # fmt: skip

    def refine(self, pairs: str, data: str) -> None:
        """The student's texts for pictures that it never saw, by vLLM."""
        options = [f"--vllm-option={name}={value}" for name, value in ENGINE.items()]
        self.run(
            "refine", "run", "--engine", "vllm", "--model", self.out / "student",
            "--prompt", self.out / "prompt.txt", "--input", self.out / "pairs" / pairs,
            "--output", self.out / data, "--name", "scenes", "--max-pixels", SIDE**2,
            "--max-tokens", MAX_TOKENS, "--context", CONTEXT, "--slots", SLOTS, *options,
        )  # fmt: skip


def told_of(data: Path, settings: Settings, name: str) -> list[tuple[Scene, Record]]:
    """The records of a refinement, each with the scene that it is about."""
    stream, split = STREAMS[name]
    drawn = (sample(settings.seed + stream, i, split) for i in range(getattr(settings, name)))
    by_uid = {scene.uid: scene for scene in drawn}
    records = (decode(entry) for entry in open_source(data))
    return [(by_uid[record.uid], record) for record in records]


def score(out: Path, settings: Settings) -> None:
    """Compares what the student wrote with what was drawn."""
    results = {}
    for name, data in (("fresh", "refined"), ("unseen", "unseen")):
        found = Counter()
        pairs = told_of(out / data, settings, name)
        for scene, record in pairs:
            found.update(judge({field: getattr(record, field) for field in LISTS}, scene))
        manifest = json.loads((out / data / MANIFEST_FILE).read_text())
        results[name] = {
            "asked": getattr(settings, name),
            "kept": len(pairs),
            "shares": shares(found),
            "counts": manifest["counts"],
            "engine": manifest["engine_stats"],
        }
    write_json(out / "student.json", results)


def shown(out: Path, settings: Settings) -> list[Shown]:
    """The gallery: the first eight unseen scenes that the student answered about; not chosen."""
    return [
        Shown(scene, record.caption, ", ".join(record.desc), ", ".join(record.neg_desc))
        for scene, record in told_of(out / "unseen", settings, "unseen")[:8]
    ]


def run(out: Path, settings: Settings, python: Path, console: Console) -> None:
    """All stages in order, then the tables and the report.

    Raises:
        DemoError: a stage did not finish; what is finished stays.
    """
    lvlm, stages = Lvlm(python, out), Stages(out, settings)
    pairs, annotations = out / "pairs", out / "annotations"
    stages.run("render", lambda: render(out, settings))
    stages.run("teach", lambda: refine(pairs / "taught", annotations / "taught", out / "taught"))
    stages.run("base model", lambda: lvlm.make_base(settings))
    stages.run("fine-tune", lambda: lvlm.fine_tune(settings))
    stages.run("refine", lambda: lvlm.refine("fresh", "refined"))
    stages.run("refine unseen pairs", lambda: lvlm.refine("unseen", "unseen"))
    stages.run("score the student", lambda: score(out, settings))
    stages.run("true texts", lambda: refine(pairs / "fresh", annotations / "fresh", out / "true"))
    for recipe in RECIPES:
        stages.run(
            f"train on {recipe.title}",
            lambda recipe=recipe: train(out, settings.samples, settings.seed, recipe),
        )
    stages.run("evaluate", lambda: evaluate(out, RECIPES, shown(out, settings)))
    student = json.loads((out / "student.json").read_text())
    console.print(student_table(student))
    told = Told(
        *results_of(out, RECIPES),
        shown(out, settings),
        stages.seconds,
        f"{settings.taught:,} scenes taught, {settings.fresh:,} refined, {settings.samples:,} "
        "samples per training of CLIP",
        title="A student refines, in miniature",
        lead=LEAD,
        caveats=CAVEATS,
        chosen=GALLERY,
        sections=student_sections(student),
    )
    tell(out, told, console)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m hqclip_jax.demo_lvlm",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("runs/demo-lvlm"), help="[runs/demo-lvlm]")
    parser.add_argument(
        "--refine-python",
        type=Path,
        default=ROOT / ".venv-refine" / "bin" / "python",
        metavar="FILE",
        help="interpreter of the environment with vLLM and TRL [.venv-refine/bin/python]",
    )
    parser.add_argument("--seed", type=int, default=0, help="of scenes and training [0]")
    parser.add_argument(
        "--quick", action="store_true", help="a few scenes and steps: minutes, and no result"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 2 an error told, else that of the stage that stopped."""
    arguments = _parser().parse_args(argv)
    seed = arguments.seed
    if arguments.quick:
        settings = Settings(3200, 200, 40, 100, 1.0, 256, 48, seed)
    else:
        settings = Settings(16_000, 6000, 500, 1200, 1.0, 24_000, 480, seed)
    console = setup_logging()
    try:
        run(arguments.out, settings, arguments.refine_python, console)
    except DemoError as e:
        console.print(f"error: {e}", style="red", markup=False, highlight=False, soft_wrap=True)
        return e.status
    return 0


if __name__ == "__main__":
    sys.exit(main())
