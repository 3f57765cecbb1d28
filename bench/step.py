"""How fast is a training step, next to OpenCLIP's on the same machine?

    python -m bench.step [--arch=ViT-B/32] [--batch=32] [--dtype=float32] [--steps=1] [--repeats=5]

A step is forward, loss, backward and AdamW on a batch that is on the device. The equal work is the
contrastive loss alone: there the two sides, each a process of its own, take turns, `--steps` at a
time, so that what else the machine does hits both alike. The row with all losses (HNI and tags over
10,000 classes) has no peer and runs afterwards, in the memory that they leave. Figures are medians
over the turns. Prints, last, one JSON object; `mfu` is of the chip's bf16 peak, null on a CPU.
"""

import argparse
import ctypes
import dataclasses
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import jax
import numpy as np

from hqclip_jax.config import Config, LossConfig, MeshConfig, ModelConfig, OptimConfig, validate
from hqclip_jax.cost import step_flops
from hqclip_jax.hardware import Chip, chip_of
from hqclip_jax.models.vision import CLIP_MEAN, CLIP_STD
from hqclip_jax.models.zoo import ARCHITECTURES
from hqclip_jax.optim import make_tx
from hqclip_jax.sharding import batch_sharding, make_mesh
from hqclip_jax.signals import send
from hqclip_jax.step import Batch, init_state, make_train_step

VOCAB, TAGS = 49408, 10_000

Run = Callable[[int], None]  # trains so many steps, and returns when the last is done


def make_batch(config: Config) -> Batch:
    """Random images, texts that fill the context, and with all losses negatives and tags."""
    rng = np.random.default_rng(0)
    B, L, size = config.optim.batch, config.model.context_length, config.model.image_size

    def texts() -> np.ndarray:
        ids = rng.integers(1, VOCAB - 2, (B, L), np.int32)
        ids[:, -1] = VOCAB - 1
        return ids

    batch = {
        "image": rng.integers(0, 256, (B, size, size, 3), np.uint8),
        "text": texts(), "text_cut": np.zeros(B, np.float32), "replaced": np.zeros(B, np.int32),
    }  # fmt: skip
    if config.loss.hni:
        batch |= {"neg_text": texts(), "neg_mask": np.ones(B, np.float32)}
    if config.loss.tag:
        batch["tag_ids"] = rng.integers(0, TAGS, (B, config.data.max_tags), np.int32)
    return batch


def our_step(config: Config) -> Run:
    """The step of `hqclip_jax.train` on the first device; on a CPU its loops are unrolled."""
    if jax.devices()[0].platform == "cpu":
        arch = ARCHITECTURES[config.model.arch]
        unroll = max(arch.vision.layers, arch.text.layers)
        model = dataclasses.replace(config.model, unroll=unroll)
        config = dataclasses.replace(config, model=model)
    mesh = make_mesh(MeshConfig(), config.optim.batch, jax.devices()[:1])
    tx = make_tx(config.optim, 1, 1_000_000)
    graphdef, _, shardings, init = init_state(
        config, VOCAB, TAGS if config.loss.tag else 0, tx, mesh
    )
    train_step = make_train_step(graphdef, tx, config, mesh, shardings)
    batch = jax.device_put(make_batch(config), batch_sharding(mesh))
    signals = send(mesh)
    state = init()

    def run(steps: int) -> None:
        nonlocal state
        for _ in range(steps):
            state, _ = train_step(state, batch, signals)
        jax.block_until_ready(state)

    return run


def open_clip_step(config: Config) -> Run:
    """OpenCLIP's step as its trainer has it; images come normalised, which its pipeline does."""
    import torch

    from tests.models.torch_peers import Sizes, open_clip, open_clip_model

    model_config, optim = config.model, config.optim
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if (device == "cuda") != (jax.devices()[0].platform == "gpu"):
        raise ModuleNotFoundError(f"torch runs on {device} here, JAX on {jax.devices()[0]}")
    sizes = Sizes(model_config.image_size, model_config.context_length, VOCAB)
    model = open_clip_model(ARCHITECTURES[model_config.arch], sizes).to(device).train()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.set_float32_matmul_precision("high")  # TF32 on a GPU, which is what JAX does there
    plain = [p for p in model.parameters() if p.ndim < 2]
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    optimizer = torch.optim.AdamW(
        [{"params": plain, "weight_decay": 0.0},
         {"params": decayed, "weight_decay": optim.weight_decay}],
        lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps,
    )  # fmt: skip
    loss = open_clip.ClipLoss()
    batch = make_batch(config)
    pixels = (batch["image"].astype(np.float32) / 255 - CLIP_MEAN) / CLIP_STD
    image = torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()).to(device)
    text = torch.from_numpy(batch["text"].astype(np.int64)).to(device)
    mixed = torch.autocast(device, torch.bfloat16, enabled=model_config.dtype == "bfloat16")

    def run(steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            with mixed:
                value = loss(*model(image, text))
            value.backward()
            optimizer.step()
            with torch.no_grad():
                model.logit_scale.clamp_(0, float(np.log(100)))
        model.logit_scale.item()

    return run


# As it comes, glibc hands large blocks back to the system, and gigabytes of temporaries are mapped
# and cleared at every step anew, on both sides.
ENVIRONMENT = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**62),
    "MALLOC_ARENA_MAX": "1",
    "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.45",  # two share a GPU
}


def _leave_room_for_small_blocks() -> None:
    """Half a GiB of free memory. Small blocks that outlive a step go where they fit best: without,
    into the gigabytes that its temporaries leave, which then don't fit there again and take as much
    once more."""
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    block, _fence = libc.malloc(2**29), libc.malloc(64)
    libc.free(block)


def row(build: Callable[[Config], Run], config: Config, steps: int, turns: Connection) -> None:
    """One row, in its own process: says on which chip when it is warm, or why it can't run, and
    then, at every turn that it is given, the seconds of a step."""
    _leave_room_for_small_blocks()
    try:
        run = build(config)
    except ModuleNotFoundError as e:
        turns.send(e)
        return
    for _ in range(3):  # the allocator takes a few steps to settle
        run(1)  # on a CPU each step under way takes its memory, so one at a time
    turns.send(chip_of(jax.devices()[0]))
    while turns.recv():
        started = time.perf_counter()
        run(steps)
        turns.send((time.perf_counter() - started) / steps)


def _ask(turns: Connection, question: bool | None = None) -> Any:
    """What a row's process says, which is an error where it can't run or has died."""
    try:
        if question is not None:
            turns.send(question)
        return turns.recv()
    except (EOFError, OSError):
        return MemoryError("its process died; a smaller --batch takes less memory")


def measure(
    rows: dict[str, tuple[Callable[[Config], Run], Config]], steps: int, repeats: int
) -> tuple[Chip | None, dict[str, list[float]]]:
    """The chip, where it is known, and the seconds a step of each row that can run, by turn."""
    context, chip = multiprocessing.get_context("spawn"), None
    running: dict[str, Connection] = {}
    seconds: dict[str, list[float]] = {}
    for name, (build, config) in rows.items():
        started = time.perf_counter()
        running[name], theirs = context.Pipe()
        context.Process(target=row, args=(build, config, steps, theirs), daemon=True).start()
        theirs.close()  # so that the end of that process is seen here
        said = _ask(running[name])
        if isinstance(said, Exception):
            print(f"No {name}: {said}", flush=True)
            del running[name]
            continue
        chip, seconds[name] = said, []
        print(f"{name}: compiled and warm after {time.perf_counter() - started:.0f} s", flush=True)
    for _ in range(repeats):
        for name, turns in list(running.items()):
            said = _ask(turns, True)
            if isinstance(said, Exception):
                print(f"No {name}: {said}", flush=True)
                del running[name], seconds[name]
                continue
            seconds[name].append(said)
            print(f"{name}: {said:.2f} s a step", flush=True)
    for turns in running.values():
        _ask(turns, False)  # and wait for its end: the next may need its memory
    return chip, seconds


def figures_of(config: Config, chip: Chip | None, seconds: dict[str, list[float]]) -> dict:
    """What the last line says; null for what could not run."""
    batch = config.optim.batch
    per_s = {name: batch / statistics.median(times) for name, times in seconds.items()}
    ours, theirs, full = (per_s.get(name) for name in ("ours", "OpenCLIP", "ours, all losses"))

    def mfu(name: str, config: Config) -> float | None:
        flops = sum(step_flops(config, TAGS if config.loss.tag else 0).values())
        if chip is None or name not in per_s:
            return None
        return round(flops * per_s[name] / batch / chip.peak, 4)

    return {
        "ratio_to_openclip": ours and theirs and round(ours / theirs, 3),
        "images_per_s": ours and round(ours, 2),
        "images_per_s_openclip": theirs and round(theirs, 2),
        "images_per_s_full_loss": full and round(full, 2),
        "mfu": mfu("ours", contrastive_only(config)),
        "mfu_full_loss": mfu("ours, all losses", config),
    }


def contrastive_only(config: Config) -> Config:
    """The equal work."""
    return dataclasses.replace(config, loss=LossConfig(hni=0, tag=0))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", default="ViT-B/32", choices=ARCHITECTURES)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--steps", type=int, default=1, help="of a row before the next has a turn")
    parser.add_argument("--repeats", type=int, default=5, help="turns that each row has")
    args = parser.parse_args()
    os.environ.update(ENVIRONMENT)
    model = ModelConfig(arch=args.arch, dtype=args.dtype)
    config = validate(Config(model=model, optim=OptimConfig(batch=args.batch)))
    equal = contrastive_only(config)
    load = os.getloadavg()[0]
    seconds: dict[str, list[float]] = {}
    for rows in (
        {"ours": (our_step, equal), "OpenCLIP": (open_clip_step, equal)},
        {"ours, all losses": (our_step, config)},
    ):
        chip, more = measure(rows, args.steps, args.repeats)
        seconds |= more
    on = chip.name if chip else "CPU"
    print(f"{args.arch}, batch {args.batch}, {args.dtype}, {on}; load {load:.1f}")
    print(f"{'':18}{'images/s':>10}{'ms a step':>12}{'fastest':>10}")
    for name, times in seconds.items():
        median = statistics.median(times)
        print(f"{name:18}{args.batch / median:10.2f}{1e3 * median:12.0f}{1e3 * min(times):10.0f}")
    print(json.dumps(figures_of(config, chip, seconds)))


if __name__ == "__main__":
    main()
