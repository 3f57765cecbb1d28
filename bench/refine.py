"""What does `refine run` cost beside the model itself, and does its memory grow?

    .venv-refine/bin/python -m bench.refine --pairs DIR [DIR ...] [--images 600] [--repeats 3]
    .venv-refine/bin/python -m bench.refine --pairs DIR --memory 5000
    .venv-refine/bin/python -m bench.refine --pairs DIR --structured    # what the schema costs
    .venv-refine/bin/python -m bench.refine --pairs DIR --shape 7b      # on a GPU, random weights

Both sides ask the same engine about the same prepared prompts. One hands all of them to vLLM in
one call, pictures decoded beforehand; the other is the whole command, from the moment when its
engine is up to the finished data set, decoding, judging, journaling and writing included. Without
`--model` the weights are random, those of a tiny Qwen2-VL or of `--shape`, held to valid answers by
a grammar.
Prints, last, one JSON object.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from math import isqrt
from pathlib import Path
from tempfile import TemporaryDirectory

from refine.engines.backend import Request, Sampling
from refine.engines.vllm import Vllm
from refine.inputs.find import find
from refine.inputs.pairs import Pair
from refine.inputs.pictures import prepared
from refine.prompts import fence, load_prompt
from tests.refine.real_engine import ENVIRONMENT, OPTIONS, Held, tiny

PIXELS, TOKENS = 112 * 112, 150
PATCH, VOCABULARY = 14, 151_936  # Qwen2-VL's
SHAPES = {
    "2b": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
           "num_attention_heads": 12, "num_key_value_heads": 2},
    "7b": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
           "num_attention_heads": 28, "num_key_value_heads": 4},
}  # fmt: skip
"""Language models of Qwen2-VL's sizes; the vision tower is the family's, 0.7 billion parameters."""


def shaped(folder: Path, shape: str, side: int) -> Path:
    """The folder of a model without weights, which vLLM draws, for pictures of `side` pixels."""
    from transformers import Qwen2VLConfig

    from refine.teaching.tiny import make_processor, make_tokenizer, scene_texts

    tokenizer = make_tokenizer(scene_texts(), 512)
    # Drawn weights say any of the ids, so each has a text.
    tokenizer.add_tokens([f"<{i}>" for i in range(len(tokenizer), VOCABULARY)])
    config = Qwen2VLConfig(
        text_config=SHAPES[shape] | {"vocab_size": VOCABULARY, "max_position_embeddings": 8192},
        vision_config={"hidden_size": SHAPES[shape]["hidden_size"]},
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
        architectures=["Qwen2VLForConditionalGeneration"],
    )
    config.save_pretrained(folder)
    make_processor(tokenizer, side, PATCH).save_pretrained(folder)
    return folder


def one_call(model: Path, args: argparse.Namespace) -> dict[str, float]:
    """Seconds that vLLM takes for all prompts in one call, and what it said."""
    made = Held if args.held == "grammar" else Vllm
    described = made(str(model), slots=args.slots, options=options(args))
    sampling = Sampling(max_tokens=args.tokens, structured=args.held != "free")
    backend = described.open(load_prompt("student-v1"), sampling, args.pixels)
    requests = prompts(args)
    messages = [backend._messages(request) for request in requests]
    began = time.perf_counter()
    outputs = backend._llm.chat(messages, backend._params(0), use_tqdm=False)
    seconds = time.perf_counter() - began
    tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
    return {"seconds": seconds, "images": len(outputs), "tokens": tokens}


def prompts(args: argparse.Namespace) -> list[Request]:
    found: list[Request] = []
    for each in find(args.pairs):
        for pair in each.pairs():
            if isinstance(pair, Pair):
                picture = prepared(pair.image, 10**8, args.pixels)
                found.append(Request(str(len(found)), fence(pair.caption), picture))
            if len(found) == args.images:
                return found
    return found


def options(args: argparse.Namespace) -> dict:
    return {"load_format": "dummy"} if args.shape else OPTIONS


def refine_run(model: Path, args: argparse.Namespace, output: Path, images: int) -> dict:
    """The command, from the line that says that its engine is up to its end."""
    held = args.held == "grammar"
    module = "tests.refine.real_engine" if held else "refine"
    command = [
        sys.executable, "-m", module, "run", "--engine", "vllm", "--model", model, "--input",
        *args.pairs, "--output", output, "--limit", images, "--slots", args.slots,
        "--max-tokens", args.tokens, "--max-pixels", args.pixels, "--retries", 0,
        "--workers", args.workers, *(["--structured"] if held else []),
        *(f"--vllm-option={name}={json.dumps(value)}" for name, value in options(args).items()),
    ]  # fmt: skip
    process = subprocess.Popen(
        list(map(str, command)), stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    began, told, memory = 0.0, [], []
    for line in process.stderr:
        told.append(line)
        if not began and "takes" in line and "tokens" in line:
            began = time.perf_counter()
        if began and "pairs," in line:
            pairs = line.split("parts ")[-1].split(" pairs")[0].replace(",", "")
            memory.append((int(pairs), resident(process.pid)))
    if process.wait():
        raise SystemExit("".join(told[-20:]))
    seconds = time.perf_counter() - began
    manifest = json.loads((output / "manifest.json").read_text())
    counts = manifest["counts"]
    return {"seconds": seconds, "stats": manifest["engine_stats"], "memory": memory,
            "records": counts["joined"], "pairs": counts["pairs"]}  # fmt: skip


def resident(pid: int) -> int:
    """Bytes of a process and all below it, shared pages divided among their users."""
    total = 0
    try:
        total = int(Path(f"/proc/{pid}/smaps_rollup").read_text().split("Pss:")[1].split()[0])
        children = [c for t in Path(f"/proc/{pid}/task").iterdir()
                    for c in (t / "children").read_text().split()]  # fmt: skip
    except (OSError, IndexError):
        return 0
    return 1024 * total + sum(resident(int(child)) for child in children)


def apart(model: Path, held: str) -> dict:
    """`one_call` in a process of its own."""
    command = [sys.executable, "-m", "bench.refine", *sys.argv[1:], "--one-call",
               "--model", model, "--held", held]  # fmt: skip
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])


def overhead(model: Path, args: argparse.Namespace, folder: Path) -> dict:
    """Both sides in turn, and the median of their ratios."""
    turns = []
    for turn in range(args.repeats):
        whole = refine_run(model, args, folder / f"out-{turn}", args.images)
        bare = apart(model, args.held)
        ratio = whole["seconds"] / bare["seconds"]
        turns.append((ratio, whole, bare))
        print(f"run {whole['seconds']:.1f} s, one call {bare['seconds']:.1f} s: {ratio:.3f}")
    ratio, whole, bare = sorted(turns, key=lambda turn: turn[0])[len(turns) // 2]
    return {
        "overhead_ratio": statistics.median(turn[0] for turn in turns),
        "ratios": [round(turn[0], 3) for turn in turns],
        "images": whole["pairs"],
        "records": whole["records"],
        "images_per_second": round(whole["pairs"] / whole["seconds"], 2),
        "one_call_images_per_second": round(bare["images"] / bare["seconds"], 2),
        "starved_share": round(1 - whole["stats"]["busy_share"], 4),
        "output_tokens": [whole["stats"]["output_tokens"], bare["tokens"]],
    }


def structured_cost(model: Path, args: argparse.Namespace) -> dict:
    """Tokens a second of a model left free, over those of one held to the schema: the one a run
    takes, and for the tiny model also the grammar."""
    held = ("free", "schema", "grammar") if args.held == "grammar" else ("free", "schema")
    sides = {how: apart(model, how) for how in held}
    rates = {how: side["tokens"] / side["seconds"] for how, side in sides.items()}
    return {f"{how}_cost": rates["free"] / rate for how, rate in rates.items() if how != "free"} | {
        "tokens_per_second_free": round(rates["free"], 1)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--pairs", nargs="+", required=True, help="as --input of refine run")
    add("--model", help="a folder that vLLM loads; its answers must pass without a grammar")
    add("--shape", choices=SHAPES, help="a model of random weights, on a GPU")
    add("--images", type=int, default=600)
    add("--repeats", type=int, default=3)
    add("--structured", action="store_true", help="only what holding to the schema costs")
    add("--memory", type=int, metavar="IMAGES", help="only memory, over so many")
    add("--slots", type=int)
    add("--workers", type=int, default=max(1, os.cpu_count() // 2))
    add("--pixels", type=int)
    add("--tokens", type=int)
    add("--one-call", action="store_true", help=argparse.SUPPRESS)
    add("--held", choices=("free", "schema", "grammar"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    small = not args.shape
    args.slots = args.slots or (16 if small else 256)
    args.pixels = args.pixels or (PIXELS if small else 504 * 504)
    args.tokens = args.tokens or (TOKENS if small else 256)
    args.held = args.held or ("free" if args.model else "grammar")
    if small:
        os.environ.update(ENVIRONMENT)
    if args.one_call:
        print(json.dumps(one_call(Path(args.model), args)))
        return
    with TemporaryDirectory() as folder:
        folder = Path(folder)
        if args.shape:
            model = shaped(folder / args.shape, args.shape, isqrt(args.pixels))
        else:
            model = Path(args.model) if args.model else tiny(folder / "hqclip-tiny")
        if args.structured:
            figures = structured_cost(model, args)
        elif args.memory:
            run = refine_run(model, args, folder / "out", args.memory)
            steady = [m for m in run["memory"] if m[0] >= 400]
            first, last = steady[0], steady[-1]
            figures = {"resident_at": [first[0], last[0]],
                       "resident_mib": [round(m[1] / 2**20) for m in (first, last)],
                       "resident_growth": last[1] / first[1]}  # fmt: skip
        else:
            figures = overhead(model, args, folder)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
