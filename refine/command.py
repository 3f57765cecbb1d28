"""`python -m refine run`: its options, and what they mean together."""

import argparse
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from refine.arguments import identifier, megabytes, positive
from refine.errors import RefineError

if TYPE_CHECKING:
    from refine.engines import Engine
    from refine.engines.lvlm import Lvlm
    from refine.engines.openai import Server
    from refine.engines.vllm import Vllm
    from refine.inputs.find import Input
    from refine.runner import Makers

EPILOG = """\
examples:
  # a vision-language model on the GPUs of this machine, one engine each
  python -m refine run --engine vllm --model Qwen/Qwen2.5-VL-7B-Instruct --input 'pairs/*.tar' \\
      --output data/refined --max-pixels 262144

  # see what it would be asked, and what its first pictures look like to it, without asking
  python -m refine run --engine vllm --model student/ --input pairs/ --output x --dry-run

  # any OpenAI-compatible server; the key comes from OPENAI_API_KEY alone
  python -m refine run --engine openai --base-url http://localhost:8000/v1 --model my-model \\
      --prompt teacher-v1 --slots 64 --input s3://bucket/pairs/ --output data/refined

  # the third of sixteen shares, for a job array; `python -m refine merge` joins them
  python -m refine run --engine vllm --model student/ --shard 3 --num-shards 16 \\
      --input 'pairs/*.tar' --output data/share-3

  # join the published VLM-150M annotations to the images of DFN, by uid
  python -m refine run --engine annotations --input 'dfn/*.tar' --annotations vlm-150m/ \\
      --annotator vlm-150m --uids dfn_large.npy --output data/dfn-vlm150m --workers 64

  # a baseline from the alt-text alone; never looks at the pictures
  python -m refine run --engine rules --input pairs/ --output data/rules --limit 1000

A killed run goes on with the same command; no finished answer is asked for again. Inputs are tars
of KEY.jpg (png, webp), KEY.txt and KEY.json with a `uid`, as img2dataset and DataComp write them;
Parquet files with image bytes; or a folder of images with a CSV or JSONL beside them; on a disk,
gs:// or s3://. Annotation tars hold NNNNNN/<uid>.json with `tags`, `neg_tags`, `desc` and
`neg_desc`. What did not become a record is counted in manifest.json and named in skipped.jsonl, up
to a million of each reason; what --uids leaves out is only counted. Of pairs whose answers never
passed, quarantine.jsonl has the last output and what was wrong with it.
"""
LVLM = ("vllm", "openai")
MODEL_OPTIONS = ("model", "prompt", "max_pixels", "temperature", "top_p", "max_tokens", "retries")
VLLM_OPTIONS = ("engines", "tensor_parallel", "context", "gpu_memory", "vllm_option")
SERVER_OPTIONS = (
    "base_url", "requests_per_minute", "tokens_per_minute", "timeout", "patience", "price_in",
    "price_out", "max_cost",
)  # fmt: skip
JOINED_OPTIONS = ("annotations", "annotator", "index")


def add_command(commands: argparse._SubParsersAction) -> None:
    run = commands.add_parser(
        "run",
        help="refine pairs into a data set",
        description="Refines image-text pairs into ArrayRecord shards for TFDS and Grain.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    run.set_defaults(command=_run, parser=run)
    run.add_argument(
        "--engine",
        required=True,
        choices=("vllm", "openai", "annotations", "rules"),
        help="vllm: a vision-language model in this process. openai: one behind a server. "
        "annotations: published texts, joined by uid. rules: texts made from the alt-text by word "
        "lists; it never looks at the picture",
    )
    run.add_argument(
        "--input",
        required=True,
        nargs="+",
        metavar="FILES",
        help="tars, Parquet files or folders of pairs: names, globs, gs:// or s3://; of two "
        "records with one uid the first stays, in this order",
    )
    run.add_argument("--output", required=True, type=Path, metavar="DIR", help="the data set")
    run.add_argument("--uids", type=Path, metavar="FILE.npy", help="keep only these uids")
    run.add_argument("--name", default="refined", type=identifier, help="default: refined")
    run.add_argument("--split", default="train", type=identifier, help="default: train")
    run.add_argument(
        "--workers", type=positive, default=os.cpu_count(), help="processes; default: one a core"
    )
    run.add_argument(
        "--shard-mb",
        type=megabytes,
        default=512.0,
        help="megabytes in a shard, about: an input that yields more gives several, small ones "
        "share one; default: 512",
    )
    run.add_argument("--limit", type=positive, metavar="N", help="read only the first N pairs")
    run.add_argument("--shard", type=int, metavar="I", help="take only share I, from 0 on, of ...")
    run.add_argument("--num-shards", type=positive, metavar="N", help="... N shares of the inputs")
    run.add_argument(
        "--skip-pixels",
        type=positive,
        default=89_478_485,
        help="larger images are skipped before they are decoded; default: 89,478,485",
    )
    _add_model(run)
    _add_vllm(run)
    _add_server(run)
    joined = run.add_argument_group("engine annotations")
    joined.add_argument(
        "--annotations", nargs="+", metavar="TARS", help="files, globs, directories"
    )
    joined.add_argument(
        "--annotator", help="which model wrote them, kept in every record; default: -"
    )
    joined.add_argument(
        "--index",
        type=Path,
        metavar="DIR",
        help="keep the index over the annotations here, for other runs; default: inside the "
        "output, removed at the end",
    )


def _add_model(run: argparse.ArgumentParser) -> None:
    model = run.add_argument_group("engines vllm and openai")
    model.add_argument("--model", help="a folder, a name on the hub, or a name on the server")
    model.add_argument(
        "--prompt",
        metavar="NAME|FILE",
        help="student-v1, teacher-v1 or a file; default: student-v1",
    )
    model.add_argument(
        "--max-pixels",
        type=positive,
        metavar="N",
        help="pictures are shrunk to N pixels before the model sees them; default: 262144",
    )
    model.add_argument(
        "--slots",
        type=positive,
        metavar="N",
        help="requests at a time; default: vllm 256, openai 32",
    )
    model.add_argument("--temperature", type=float, help="default: 0, the likeliest token")
    model.add_argument("--top-p", type=float, help="default: 1")
    model.add_argument("--max-tokens", type=positive, help="of an answer; default: 512")
    model.add_argument("--seed", type=int, default=0, help="of the draws; default: 0")
    model.add_argument(
        "--retries", type=int, help="of an answer that does not pass, warmer each; default: 2"
    )
    model.add_argument(
        "--structured", action="store_true", help="hold the model to the JSON schema of the answer"
    )
    model.add_argument("--runner", choices=("local", "ray"), default="local", help="default: local")
    model.add_argument(
        "--allow-change",
        action="store_true",
        help="go on with a half-finished output though model, prompt or sampling have changed; "
        "each record says who wrote it",
    )
    model.add_argument(
        "--dry-run", action="store_true", help="show three finished prompts, and ask nothing"
    )


def _add_vllm(run: argparse.ArgumentParser) -> None:
    vllm = run.add_argument_group("engine vllm")
    vllm.add_argument("--engines", type=positive, help="default: GPUs / --tensor-parallel, or 1")
    vllm.add_argument("--tensor-parallel", type=positive, help="GPUs for each engine; default: 1")
    vllm.add_argument("--context", type=positive, help="tokens of a question and its answer")
    vllm.add_argument("--gpu-memory", type=float, help="share of a GPU's memory; default: 0.9")
    vllm.add_argument(
        "--vllm-option",
        action="append",
        type=_option,
        metavar="NAME=VALUE",
        help="any other argument of vllm.LLM, the value in JSON, such as quantization='\"fp8\"'",
    )
    vllm.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run code that comes with the model; only for one whose code you have read",
    )


def _add_server(run: argparse.ArgumentParser) -> None:
    server = run.add_argument_group("engine openai", "The key is read from OPENAI_API_KEY alone.")
    server.add_argument("--base-url", help="such as http://localhost:8000/v1; or OPENAI_BASE_URL")
    server.add_argument("--requests-per-minute", type=positive)
    server.add_argument("--tokens-per-minute", type=positive)
    server.add_argument("--timeout", type=float, help="seconds for one request; default: 120")
    server.add_argument(
        "--patience", type=float, help="seconds that the server may be away; default: 3600"
    )
    server.add_argument("--price-in", type=float, help="dollars for a million tokens of prompts")
    server.add_argument("--price-out", type=float, help="dollars for a million tokens of answers")
    server.add_argument("--max-cost", type=float, help="dollars; the run stops before them")


def _run(args: argparse.Namespace) -> None:
    # The parser answers --help without the second that these imports take.
    from refine.inputs.find import find
    from refine.runner import Here, Run, run

    _refuse_strangers(args)
    inputs, share = _shared(args, find(args.input))
    if args.uids and not args.uids.exists():
        raise RefineError(f"--uids {args.uids}: no such file")
    if args.engine in LVLM:
        engine, makers = _lvlm(args)
        if args.dry_run:
            from refine.dry_run import show

            show(engine, inputs, args.skip_pixels)
            return
    else:
        engine, makers = _plain(args), Here(args.workers)
    run(
        Run(
            inputs=tuple(inputs),
            output=args.output,
            engine=engine,
            uids=args.uids,
            name=args.name,
            split=args.split,
            shard_mb=args.shard_mb,
            limit=args.limit,
            skip_pixels=args.skip_pixels,
            workers=args.workers,
            makers=makers,
            share=share,
            allow_change=args.allow_change,
        )
    )


def _refuse_strangers(args: argparse.Namespace) -> None:
    """Ends with the usage where an option is not for the engine, or one that it needs is absent."""
    needed = {"annotations": ("annotations",), "vllm": ("model",), "openai": ("model",)}
    metavar = {"annotations": "TARS"}
    for option in needed.get(args.engine, ()):
        if not getattr(args, option):
            name = metavar.get(option, option.upper())
            args.parser.error(f"--engine {args.engine} needs --{option} {name}")
    strange = {
        "annotations": (*MODEL_OPTIONS, "slots", *VLLM_OPTIONS, *SERVER_OPTIONS),
        "rules": (*MODEL_OPTIONS, "slots", *VLLM_OPTIONS, *SERVER_OPTIONS, *JOINED_OPTIONS),
        "vllm": (*SERVER_OPTIONS, *JOINED_OPTIONS),
        "openai": (*VLLM_OPTIONS, *JOINED_OPTIONS),
    }
    flags = ("structured", "allow_change", "dry_run")
    for option in (*strange[args.engine], *(flags if args.engine not in LVLM else ())):
        if getattr(args, option) not in (None, False):
            args.parser.error(f"--{option.replace('_', '-')} is not for --engine {args.engine}")
    if (args.shard is None) != (args.num_shards is None):
        args.parser.error("--shard and --num-shards go together")
    if args.shard is not None and not 0 <= args.shard < args.num_shards:
        args.parser.error(f"--shard is from 0 to {args.num_shards - 1}")


def _shared(args: argparse.Namespace, inputs: "list[Input]") -> "tuple[list[Input], str]":
    """The inputs of the share that was asked for, and the share's name."""
    if args.shard is None:
        return inputs, ""
    mine = inputs[args.shard :: args.num_shards]
    if not mine:
        raise RefineError(
            f"--shard {args.shard} of {args.num_shards} has nothing to do: there are "
            f"{len(inputs)} inputs; use --num-shards {len(inputs)} or fewer"
        )
    return mine, f"{args.shard}/{args.num_shards}"


def _plain(args: argparse.Namespace) -> "Engine":
    if args.engine == "rules":
        from refine.engines.rules import Rules

        return Rules()
    from refine.engines.annotations import Annotations
    from refine.inputs.tars import expand
    from refine.runner import INDEX

    return Annotations(
        tars=tuple(expand(args.annotations, "--annotations")),
        index=args.index or args.output / INDEX,
        annotator=args.annotator or "-",
    )


def _lvlm(args: argparse.Namespace) -> "tuple[Lvlm, Makers]":
    """The engine, and who makes its parts."""
    from refine.engines.backend import Sampling
    from refine.engines.lvlm import Lvlm
    from refine.fleet import Local, visible_gpus
    from refine.prompts import load_prompt
    from refine.runner import PARTS

    drawn = {"temperature": args.temperature, "top_p": args.top_p, "max_tokens": args.max_tokens,
             "retries": args.retries}  # fmt: skip
    sampling = Sampling(
        **{name: value for name, value in drawn.items() if value is not None},
        seed=args.seed,
        structured=args.structured,
    )
    gpus = (args.tensor_parallel or 1) if visible_gpus() else 0
    engines = args.engines or (len(visible_gpus()) // gpus if gpus else 1)
    if not engines or (gpus and engines * gpus > len(visible_gpus())):
        raise RefineError(
            f"{engines or 1} engines of {gpus} GPUs need more than the {len(visible_gpus())} that "
            "are visible: use a smaller --engines or --tensor-parallel"
        )
    engine = Lvlm(
        model=_vllm(args) if args.engine == "vllm" else _server(args),
        prompt=load_prompt(args.prompt or "student-v1"),
        sampling=sampling,
        max_pixels=args.max_pixels or 262_144,
        parts=args.output / PARTS,
    )
    if args.runner == "ray":
        from refine.ray_runner import OnRay

        return engine, OnRay(args.engines, gpus=args.tensor_parallel or 1, workers=args.workers)
    if args.engine == "openai":
        engines, gpus = 1, 0
    return engine, Local(engines, gpus, args.workers)


def _vllm(args: argparse.Namespace) -> "Vllm":
    from refine.engines.vllm import Vllm

    options = dict(args.vllm_option or ())
    if args.tensor_parallel:
        options["tensor_parallel_size"] = args.tensor_parallel
    chosen = {"slots": args.slots, "context": args.context, "memory": args.gpu_memory}
    return Vllm(
        path=args.model,
        options=options,
        trust_remote_code=args.trust_remote_code,
        **{name: value for name, value in chosen.items() if value is not None},
    )


def _server(args: argparse.Namespace) -> "Server":
    from refine.engines.openai import Server

    chosen = {"slots": args.slots} | {name: getattr(args, name) for name in SERVER_OPTIONS}
    return Server(
        model=args.model, **{name: value for name, value in chosen.items() if value is not None}
    )


def _option(text: str) -> tuple[str, object]:
    name, sign, value = text.partition("=")
    if not sign:
        raise argparse.ArgumentTypeError(f"{text!r} is no NAME=VALUE")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value
