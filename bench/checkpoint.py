"""What does a checkpoint cost the training loop?

    python -m bench.checkpoint [--arch=ViT-B/32] [--batch=4] [--steps=12] [--repeats=3]

Trains on a batch that is on the device. Stretches of `--steps` steps take turns, one without a
save and one with a save at its beginning, so that what else the machine does hits both alike;
figures are medians over the turns. A stretch ends when its steps and its save have ended; on a CPU
the steps must outlast the save, or the loop waits for it and `outlasted` says false. The save's own
seconds, also of CPU, are those of one with no step beside it. Prints, last, one JSON object:

    blocking_ms             for which `save` keeps the loop, at most
    save_seconds            until a save alone is on disk
    cpu_seconds_of_save     of this process, in that time
    wall_ratio              what a save adds to a stretch, over its CPU seconds per core
    step_while_saving_ratio a step while a save is under way, over one without
"""

import argparse
import json
import os
import resource
import statistics
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from bench.step import TAGS, VOCAB, contrastive_only, make_batch
from hqclip_jax.checkpoint import FOLDER, Checkpoints, RunInfo
from hqclip_jax.config import (
    CheckpointConfig,
    Config,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    validate,
)
from hqclip_jax.models.zoo import ARCHITECTURES
from hqclip_jax.optim import make_tx
from hqclip_jax.sharding import batch_sharding, make_mesh
from hqclip_jax.signals import send
from hqclip_jax.step import init_state, make_train_step


def cpu_seconds() -> float:
    """Of this process, all threads."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


class Loop:
    """A training loop that saves, and waits one step behind as the trainer does."""

    def __init__(self, config: Config, workdir: str) -> None:
        mesh = make_mesh(MeshConfig(), config.optim.batch, jax.devices()[:1])
        tx = make_tx(config.optim, 1, 1_000_000)
        num_tags = TAGS if config.loss.tag else 0
        graphdef, _, shardings, init = init_state(config, VOCAB, num_tags, tx, mesh)
        self.step = make_train_step(graphdef, tx, config, mesh, shardings)
        self.batch = jax.device_put(make_batch(config), batch_sharding(mesh))
        self.signals = send(mesh)
        self.state, self.done = init(), 0
        self.info = RunInfo(config, {}, None)
        self.checkpoints = Checkpoints(workdir, CheckpointConfig(keep=1))
        self.checkpoints.prepare(self.state)
        self.bytes = sum(x.nbytes for x in jax.tree.leaves(self.state))

    def stretch(self, steps: int, save: bool) -> tuple[float, float, list[float], bool]:
        """Seconds in all, seconds that `save` kept the loop, seconds of each step, and whether the
        steps outlasted the save."""
        began, blocked, seconds, before = time.perf_counter(), 0.0, [], None
        for i in range(steps):
            started = time.perf_counter()
            self.state, metrics = self.step(self.state, self.batch, self.signals)
            self.done += 1
            if save and i == 0:
                called = time.perf_counter()
                self.checkpoints.save(self.done, self.state, self.info)
                blocked = time.perf_counter() - called
            jax.block_until_ready(before)
            before = metrics
            seconds.append(time.perf_counter() - started)
        jax.block_until_ready(self.state)
        ended = time.perf_counter()
        self.checkpoints.wait()
        waited = time.perf_counter() - ended
        return time.perf_counter() - began, blocked, seconds[1:], waited < 0.1

    def save_alone(self) -> tuple[float, float]:
        """Seconds and CPU seconds of a save with nothing beside it."""
        self.stretch(1, save=False)
        began, cpu = time.perf_counter(), cpu_seconds()
        self.checkpoints.save(self.done, self.state, self.info)
        self.checkpoints.wait()
        return time.perf_counter() - began, cpu_seconds() - cpu


def measure(loop: Loop, steps: int, repeats: int) -> dict[str, float | bool]:
    plain, saving, blocked, alone, ratios, outlasted = [], [], [], [], [], True
    loop.stretch(2, save=True)  # compiles, and the first files
    for turn in range(repeats):
        without, _, quiet, _ = loop.stretch(steps, save=False)
        with_save, kept, busy, enough = loop.stretch(steps, save=True)
        plain.append(without)
        saving.append(with_save)
        blocked.append(kept)
        alone.append(loop.save_alone())
        ratios.append(statistics.median(busy) / statistics.median(quiet))
        outlasted &= enough
        print(f"turn {turn + 1}: {without:.2f} s without, {with_save:.2f} s with a save that kept "
              f"the loop {1e3 * kept:.1f} ms; alone {alone[-1][0]:.2f} s, {alone[-1][1]:.2f} s of "
              "CPU", flush=True)  # fmt: skip
    seconds, cpu = (statistics.median(column) for column in zip(*alone))
    added = statistics.median(np.subtract(saving, plain))
    cores = len(os.sched_getaffinity(0))
    return {
        "blocking_ms": round(1e3 * max(blocked), 1),
        "save_seconds": round(seconds, 2),
        "cpu_seconds_of_save": round(cpu, 2),
        "added_seconds": round(float(added), 2),
        "wall_ratio": round(float(added) / (cpu / cores), 3),
        "step_while_saving_ratio": round(statistics.median(ratios), 3),
        "outlasted": outlasted,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", default="ViT-B/32", choices=ARCHITECTURES)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--steps", type=int, default=12, help="of a stretch")
    parser.add_argument("--repeats", type=int, default=3, help="turns that each kind has")
    args = parser.parse_args()
    model = ModelConfig(arch=args.arch, dtype=args.dtype)
    config = contrastive_only(validate(Config(model=model, optim=OptimConfig(batch=args.batch))))
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as workdir:
        loop = Loop(config, workdir)
        figures = measure(loop, args.steps, args.repeats)
        loop.checkpoints.close()
        stored = sum(p.stat().st_size for p in (Path(workdir) / FOLDER).rglob("*") if p.is_file())
    on = jax.devices()[0].device_kind
    print(f"{args.arch}, batch {args.batch}, {on}; {loop.bytes / 1e9:.2f} GB of state, "
          f"{stored / 1e9:.2f} GB on disk; load {load:.1f}")  # fmt: skip
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
