"""How fast is a training step, next to OpenCLIP's on the same machine?

    python -m bench.step [--arch=ViT-B/32] [--batch=32] [--dtype=float32] [--steps=1] [--repeats=5]

A step is forward, loss, backward and AdamW on a batch that is on the device. The equal work is the
contrastive loss alone; the row with all losses (HNI and tags over 10,000 classes) has no peer. The
rows take turns, `--steps` at a time, so that what else the machine does hits all alike; figures are
medians over the turns. Prints, last, one JSON object; `mfu` is null where the chip is not known.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable

import jax
import numpy as np

from hqclip_jax.config import Config, LossConfig, MeshConfig, ModelConfig, OptimConfig, validate
from hqclip_jax.cost import step_flops
from hqclip_jax.hardware import chip_of
from hqclip_jax.models.vision import CLIP_MEAN, CLIP_STD
from hqclip_jax.models.zoo import ARCHITECTURES
from hqclip_jax.optim import make_tx
from hqclip_jax.sharding import batch_sharding, make_mesh
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

    batch = {"image": rng.integers(0, 256, (B, size, size, 3), np.uint8), "text": texts()}
    if config.loss.hni:
        batch |= {"neg_text": texts(), "neg_mask": np.ones(B, np.float32)}
    if config.loss.tag:
        batch["tag_ids"] = rng.integers(0, TAGS, (B, config.data.max_tags), np.int32)
    return batch


def our_step(config: Config) -> Run:
    """The step of `hqclip_jax.train` on the first device."""
    mesh = make_mesh(MeshConfig(), config.optim.batch, jax.devices()[:1])
    tx = make_tx(config.optim, 1, 1_000_000)
    graphdef, _, shardings, init = init_state(
        config, VOCAB, TAGS if config.loss.tag else 0, tx, mesh
    )
    train_step = make_train_step(graphdef, tx, config, mesh, shardings)
    batch = jax.device_put(make_batch(config), batch_sharding(mesh))
    state = init()

    def run(steps: int) -> None:
        nonlocal state
        for _ in range(steps):
            state, _ = train_step(state, batch)
        jax.block_until_ready(state)

    return run


def open_clip_step(config: Config) -> Run:
    """OpenCLIP's step as its trainer has it; images come normalised, which its pipeline does."""
    import torch

    from tests.models.torch_peers import Sizes, open_clip, open_clip_model

    model_config, optim = config.model, config.optim
    device = "cuda" if jax.devices()[0].platform == "gpu" else "cpu"
    sizes = Sizes(model_config.image_size, model_config.context_length, VOCAB)
    model = open_clip_model(ARCHITECTURES[model_config.arch], sizes).to(device).train()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
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


def has_open_clip() -> bool:
    """Whether the peer can run where JAX runs."""
    try:
        import torch
    except ModuleNotFoundError:
        return False
    return jax.devices()[0].platform == "cpu" or torch.cuda.is_available()


def measure(runs: dict[str, Run], steps: int, repeats: int) -> dict[str, list[float]]:
    """Seconds a step of each, turn by turn."""
    for name, run in runs.items():
        started = time.perf_counter()
        run(3)  # the allocator takes a few steps to settle
        print(f"{name}: compiled and warm after {time.perf_counter() - started:.0f} s", flush=True)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            started = time.perf_counter()
            run(steps)
            seconds[name].append((time.perf_counter() - started) / steps)
            print(f"{name}: {seconds[name][-1]:.2f} s a step", flush=True)
    return seconds


def figures_of(configs: dict[str, Config], seconds: dict[str, list[float]]) -> dict:
    """What the last line says."""
    batch = configs["ours"].optim.batch
    per_s = {name: batch / statistics.median(times) for name, times in seconds.items()}
    theirs = per_s.get("OpenCLIP")
    chip = chip_of(jax.devices()[0])
    flops = sum(step_flops(configs["ours"], num_tags=0).values())
    return {
        "ratio_to_openclip": theirs and round(per_s["ours"] / theirs, 3),
        "images_per_s": round(per_s["ours"], 2),
        "images_per_s_openclip": theirs and round(theirs, 2),
        "images_per_s_full_loss": round(per_s["ours, all losses"], 2),
        "mfu": chip and round(flops * per_s["ours"] / batch / chip.peak, 4),
    }


def keep_freed_memory() -> None:
    """Starts this program again with an allocator that keeps what a step frees for the next one.
    As it comes, glibc hands large blocks back to the system, and gigabytes of temporaries are
    mapped and cleared at every step anew, for both sides. Only the environment can say it: threads
    that are there already have their own heaps."""
    settings = {
        "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**62), "MALLOC_ARENA_MAX": "1",
    }  # fmt: skip
    if any(name not in os.environ for name in settings):
        os.execve(sys.executable, sys.orig_argv, os.environ | settings)


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
    keep_freed_memory()
    device, arch = jax.devices()[0], ARCHITECTURES[args.arch]
    unroll = max(arch.vision.layers, arch.text.layers) if device.platform == "cpu" else 1
    model = ModelConfig(arch=args.arch, dtype=args.dtype, unroll=unroll)
    configs = {
        name: validate(Config(model=model, optim=OptimConfig(batch=args.batch), loss=loss))
        for name, loss in (
            ("ours", LossConfig(hni=0, tag=0)),
            ("ours, all losses", LossConfig()),
        )
    }
    runs = {name: our_step(config) for name, config in configs.items()}
    if has_open_clip():
        runs["OpenCLIP"] = open_clip_step(configs["ours"])
    else:
        print(f"No OpenCLIP beside ours: torch is missing or has no kernels for {device}")
    load = os.getloadavg()[0]
    seconds = measure(runs, args.steps, args.repeats)
    print(f"{args.arch}, batch {args.batch}, {args.dtype}, {device.device_kind}; load {load:.1f}")
    print(f"{'':18}{'images/s':>10}{'ms a step':>12}{'fastest':>10}")
    for name, times in seconds.items():
        median = statistics.median(times)
        print(f"{name:18}{args.batch / median:10.2f}{1e3 * median:12.0f}{1e3 * min(times):10.0f}")
    print(json.dumps(figures_of(configs, seconds)))


if __name__ == "__main__":
    main()
