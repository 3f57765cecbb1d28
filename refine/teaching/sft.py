"""`python -m refine sft`: a small model learns from a teacher's annotations.

TRL's trainer does the training; here is what makes it part of the refinement: the student sees the
questions and pictures that the engines will show it, a killed training goes on from its last whole
checkpoint, part of the data is held out and answered at the end as a run would, and the result is
a folder that `--engine vllm --model` takes as it is. Method and hyperparameters are ours: the paper
says only that Qwen2-VL-7B was fine-tuned on 10,000 annotations.
"""

import argparse
import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from refine.arguments import positive
from refine.errors import RefineError
from refine.progress import console
from refine.prompts import Prompt, load_prompt
from refine.storage import locked, write_json

PLAN, RESULT, METRICS, CHECKPOINTS = "plan.json", "sft.json", "metrics.jsonl", "checkpoints"
RATES = {"full": 1e-5, "lora": 1e-4}

EPILOG = """\
examples:
  # Qwen2-VL-7B learns from 10,000 annotations of a teacher, on one GPU
  python -m refine sft --model Qwen/Qwen2-VL-7B-Instruct --data data/taught --output student \\
      --method lora --batch 32 --micro-batch 4 --max-pixels 262144

  # all weights, on eight GPUs that hold the whole model each
  torchrun --nproc-per-node 8 -m refine sft --model Qwen/Qwen2-VL-2B-Instruct --data data/taught \\
      --output student --batch 64 --micro-batch 4

  # then
  python -m refine run --engine vllm --model student --prompt student-v1 --max-pixels 262144 ...

A killed training goes on with the same command. OUTPUT holds the model, metrics.jsonl and sft.json
(the held-out part: loss, share of valid answers, what was wrong with the others).
"""


def add_command(commands: argparse._SubParsersAction) -> None:
    sft = commands.add_parser(
        "sft",
        help="fine-tune a vision-language model on annotated pairs",
        description=__doc__.partition("\n")[2].strip(),
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sft.set_defaults(command=_sft, parser=sft)
    add = sft.add_argument
    add("--model", required=True, metavar="DIR|NAME", help="what to begin with; Qwen2-VL's kind")
    add("--data", required=True, type=Path, metavar="DIR", help="output of `refine run` or `teach`")
    add("--output", required=True, type=Path, metavar="DIR", help="the student")
    add("--prompt", default="student-v1", metavar="NAME|FILE", help="default: student-v1")
    add("--method", choices=tuple(RATES), default="full", help="all weights, or low-rank additions "
        "to the language model that are merged into it at the end; default: full")  # fmt: skip
    add("--epochs", type=float, default=2.0, help="default: 2")
    add("--lr", type=float, help=f"peak of a cosine; default: {RATES}")
    add("--warmup", type=float, default=0.03, help="share of the steps; default: 0.03")
    add("--batch", type=positive, default=32, help="examples a step, over all GPUs; default: 32")
    add("--micro-batch", type=positive, help="examples a GPU works on at a time; default: --batch")
    add("--max-pixels", type=positive, default=262_144, metavar="N", help="pictures are shrunk to "
        "N pixels, as `refine run` is to do; default: 262144")  # fmt: skip
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of weights in training"
        "; bfloat16 takes half the memory and loses small steps; default: float32")  # fmt: skip
    add("--lora-rank", type=positive, default=16, help="default: 16")
    add("--held-out", type=float, default=0.02, metavar="SHARE", help="of the data; default: 0.02")
    add("--examples", type=int, default=64, help="held-out answers at the end; default: 64")
    add("--max-tokens", type=positive, default=512, help="of such an answer; default: 512")
    add("--checkpoint-every", type=positive, default=100, metavar="STEPS", help="default: 100")
    add("--seed", type=int, default=0, help="of the order and of LoRA's weights; default: 0")


@dataclass(frozen=True)
class Course:
    """What is taught to whom, and how: two trainings are the same if this is.

    Attributes:
        model: a folder, or a name on the hub.
        data: the digest of the data set's records.
        prompt: the digest of the prompt.
        method: "full" or "lora".
        epochs: over what is not held out.
        lr: the peak of a cosine.
        warmup: share of the steps before the peak.
        batch: examples a step, over all processes.
        micro_batch: examples that a process works on at a time.
        max_pixels: of a picture.
        dtype: of the weights that are trained.
        lora_rank: of the additions.
        held_out: share of the records that are never trained on.
        seed: of the order and of LoRA's weights.
    """

    model: str
    data: str
    prompt: str
    method: str
    epochs: float
    lr: float
    warmup: float
    batch: int
    micro_batch: int
    max_pixels: int
    dtype: str
    lora_rank: int
    held_out: float
    seed: int

    @property
    def accumulation(self) -> int:
        """Micro-batches of each process in a step."""
        return self.batch // (self.micro_batch * processes())

    @classmethod
    def of(cls, args: argparse.Namespace, prompt: Prompt) -> "Course":
        """The course that a command asks for.

        Raises:
            RefineError: an option is out of its range, or `--data` is no data set.
        """
        from refine.teaching.lessons import data_digest  # a second, which --help does not need

        micro = args.micro_batch or max(1, args.batch // processes())
        if args.batch % (micro * processes()):
            raise RefineError(
                f"--batch {args.batch} is no multiple of {processes()} processes with "
                f"--micro-batch {micro} each"
            )
        if not 0 <= args.held_out < 1:
            raise RefineError(f"--held-out {args.held_out} is no share: use 0 or more, below 1")
        return cls(
            args.model, data_digest(args.data), prompt.digest, args.method, args.epochs,
            args.lr or RATES[args.method], args.warmup, args.batch, micro, args.max_pixels,
            args.dtype, args.lora_rank, args.held_out, args.seed,
        )  # fmt: skip


def processes() -> int:
    """How many train together, as torchrun says."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this process is the one that writes."""
    return os.environ.get("RANK", "0") == "0"


def _sft(args: argparse.Namespace) -> None:
    prompt = load_prompt(args.prompt)
    course = Course.of(args, prompt)
    args.output.mkdir(parents=True, exist_ok=True)
    finished = (args.output / RESULT).exists()
    if not is_first():
        if not finished:
            _teach(args, course, prompt)
        return
    with locked(args.output / "lock", wait=False):
        claim(args.output, course)
        if not finished:
            _teach(args, course, prompt)
    _report(json.loads((args.output / RESULT).read_text()), args.output)


def claim(output: Path, course: Course) -> None:
    """Keeps what this output is made with.

    Raises:
        RefineError: it was begun with something else, or holds other files.
    """
    path = output / PLAN
    if not path.exists():
        foreign = {entry.name for entry in output.iterdir()} - {"lock"}
        if foreign:
            raise RefineError(
                f"--output {output} holds other files ({min(foreign)}): choose an empty directory"
            )
        write_json(path, asdict(course))
    stored = json.loads(path.read_text())
    for name, value in asdict(course).items():
        if stored.get(name) != value:
            raise RefineError(
                f"--output {output} was begun with --{name.replace('_', '-')} {stored.get(name)}, "
                f"and now it is {value}: go on with the former, or name another --output"
            )


def _teach(args: argparse.Namespace, course: Course, prompt: Prompt) -> None:
    """Trains, saves the student, has it answer the held-out part, and keeps how it went."""
    from refine.teaching.lessons import Lessons, split
    from refine.teaching.sft_exam import examine
    from refine.teaching.sft_trainer import save, train

    lessons = Lessons(args.data, prompt, course.max_pixels)
    parts = split(lessons, course.held_out)
    trainer = train(
        course,
        lessons.columns(parts.train),
        lessons.columns(parts.held_out),
        args.output / CHECKPOINTS,
        args.output / METRICS,
        args.checkpoint_every,
    )
    loss = trainer.evaluate()["eval_loss"] if parts.held_out else None
    student = save(trainer, args.model, args.output)
    if not is_first():
        return
    asked = parts.held_out[: args.examples]
    result = {
        "trained_on": len(parts.train),
        "held_out": len(parts.held_out),
        "unusable": dict(parts.unusable),
        "steps": trainer.state.global_step,
        "held_out_loss": loss,
        "exam": examine(student, trainer.processing_class, lessons, asked, args.max_tokens),
    }
    write_json(args.output / RESULT, result)
    shutil.rmtree(args.output / CHECKPOINTS)


def _report(result: dict, output: Path) -> None:
    exam = result["exam"]
    console.print(
        f"trained on {result['trained_on']:,} records in {result['steps']:,} steps; of "
        f"{exam['asked']} held-out answers {exam['valid']} are valid"
    )
    for reason, count in exam["rejected"].items():
        console.print(f"  {count} {reason}")
    console.print(f"the student: {output}", soft_wrap=True)
