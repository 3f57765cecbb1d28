"""Trains CLIP on refined image-text data.

    python -m hqclip_jax.train --config=configs/demo.py --workdir=runs/demo \\
        --config.data.path=data/demo

Started again with the same --workdir it continues from the last checkpoint.
"""

import argparse
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import numpy as np
import optax
from rich.console import Console

from hqclip_jax import config as config_lib
from hqclip_jax.checkpoint import CheckpointError, Checkpoints, RunInfo, check_same_run
from hqclip_jax.config import Config, ConfigError
from hqclip_jax.cost import step_flops
from hqclip_jax.data.pipeline import Pipeline, to_device
from hqclip_jax.data.record import DatasetError
from hqclip_jax.data.tags import TagVocabulary
from hqclip_jax.data.tokenizer import ClipTokenizer
from hqclip_jax.optim import make_tx, warmup_cosine
from hqclip_jax.sharding import batch_sharding, bytes_per_device, make_mesh, reader
from hqclip_jax.step import Metrics, TrainState, init_state, make_train_step
from hqclip_jax.telemetry import (
    MetricWriter,
    ProgressLine,
    Stopwatch,
    setup_logging,
    utilisation,
)  # fmt: skip

log = logging.getLogger("hqclip_jax.train")

SOURCE = "train"  # the name of the one data source in a checkpoint's position


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 finished, 1 diverged, 2 wrong configuration or data, 128 + signal."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        overrides, rest = config_lib.split_overrides(argv)
        args = _parser().parse_args(rest)
        config = config_lib.load(args.config, overrides)
        if args.distributed:
            jax.distributed.initialize()
        _use_compile_cache()
        return train(config, Path(args.workdir), setup_logging())
    except (ConfigError, DatasetError, CheckpointError, FileNotFoundError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except FloatingPointError as e:
        print(f"error: {e}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m hqclip_jax.train",
        description=__doc__,
        epilog="fields of the configuration, with their defaults:\n" + config_lib.describe(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config", required=True, metavar="FILE.py[:ARG]",
        help="configuration, such as configs/small.py; override a field with --config.FIELD=VALUE",
    )  # fmt: skip
    parser.add_argument(
        "--workdir", required=True, help="checkpoints and metrics go here; continues what it holds"
    )
    parser.add_argument(
        "--distributed", action="store_true",
        help="join the other processes of a TPU pod or cluster (jax.distributed.initialize)",
    )  # fmt: skip
    return parser


def _use_compile_cache() -> None:
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        cache = Path("~/.cache/hqclip_jax/xla").expanduser()
        jax.config.update("jax_compilation_cache_dir", str(cache))


class StopSignal:
    """Remembers a SIGTERM or SIGINT, so that the loop can save before it ends; a second SIGINT
    stops at once. With several processes the signal keeps its usual effect: one that left the loop
    alone would leave the others waiting in a collective."""

    def __init__(self) -> None:
        self.number = 0
        self._old: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        if jax.process_count() == 1:
            self._old = {s: signal.signal(s, self._on) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _on(self, number: int, _: FrameType | None) -> None:
        if self.number == signal.SIGINT == number:
            raise KeyboardInterrupt
        self.number = number


@dataclass
class Report:
    """Collects what one report says; the metrics are fetched after the next step is under way, so
    that the device never waits for the host."""

    config: Config
    pipeline: Pipeline
    writer: MetricWriter | None
    progress: ProgressLine
    lr: optax.Schedule
    flops: float  # of one step
    watch: Stopwatch = field(default_factory=Stopwatch)
    due: tuple[int, Metrics] | None = None
    _last: tuple[int, float] | None = None

    def start(self, step: int) -> None:
        """The interval begins once the first step, which compiles, is done."""
        self._last = (step, time.monotonic())
        self.watch.take("data")

    def flush(self) -> None:
        """Writes the metrics that are due, if any.

        Raises:
            FloatingPointError: too many updates in a row were skipped, and all since.
        """
        if self.due is None:
            return
        step, fetched = self.due[0], jax.device_get(self.due[1])
        self.due = None
        metrics = {name: float(value) for name, value in fetched.items()}
        now = time.monotonic()
        since, then = self._last or (step, now)
        self._last = (step, now)
        elapsed = max(now - then, 1e-9)
        records = step * self.config.optim.batch
        if step > since:
            metrics |= utilisation((step - since) * self.flops, elapsed, jax.devices())
        metrics |= {
            "lr": float(self.lr(step - 1 - metrics["skipped"])),  # a skipped update takes no step
            "images_per_s": (step - since) * self.config.optim.batch / elapsed,
            "data_wait": min(self.watch.take("data") / elapsed, 1.0),
            "samples": records,
            "epoch": records / self.pipeline.records,
            "replaced": self.pipeline.replacements.reasons.total(),
        }
        if self.writer:
            self.writer.write(step, metrics)
            self.progress.report(step, metrics)
        if metrics["streak"] >= self.config.optim.max_skipped:
            raise FloatingPointError(
                f"the last {metrics['streak']:.0f} updates up to step {step} were skipped: the "
                f"loss ({metrics['loss']}) or a gradient is no number. The parameters are those "
                "before. Lower optim.lr, lengthen optim.warmup or set optim.clip_norm=1"
            )


def train(config: Config, workdir: Path, console: Console) -> int:
    """Runs until the configured duration is reached or a signal asks to stop."""
    if not config.data.path:
        raise ConfigError("data.path is not set: --config.data.path=DIR that `refine run` wrote")
    workdir.mkdir(parents=True, exist_ok=True)
    mesh = make_mesh(config.mesh, config.optim.batch, parts=config.optim.micro_batches)
    checkpoints = Checkpoints(workdir, config.checkpoint.keep)
    found = checkpoints.latest()
    stored = checkpoints.info(found) if found is not None else None

    tokenizer = ClipTokenizer(config.model.context_length)
    tags = _vocabulary(config, stored)
    num_tags = len(tags) if tags else 0
    if stored:
        check_same_run(stored, config, num_tags, checkpoints.directory)
    pipeline = Pipeline(config, tokenizer, tags)
    total = config.steps(config.optim.duration, pipeline.records, "optim.duration")
    warmup = config.steps(config.optim.warmup, pipeline.records, "optim.warmup")
    report_every = max(1, config.steps(config.log.every, pipeline.records, "log.every"))
    save_every = max(1, config.steps(config.checkpoint.every, pipeline.records, "checkpoint.every"))

    tx = make_tx(config.optim, warmup, total)
    graphdef, abstract, shardings, init = init_state(
        config, tokenizer.vocab_size, num_tags, tx, mesh
    )
    start, position = (found, stored.position[SOURCE]) if stored else (0, 0)
    state = checkpoints.restore(start, abstract) if stored else init()
    # A run that had stopped itself would stay so.
    state = state._replace(streak=jax.device_put(np.int32(0), shardings.streak))
    weights = jax.numpy.asarray(tags.idf()) if tags and config.loss.tag_idf else None
    train_step = make_train_step(graphdef, tx, config, mesh, shardings, weights)
    _announce(config, workdir, pipeline, abstract, mesh, start, total)

    first = jax.process_index() == 0
    if first:
        (workdir / "config.json").write_text(json.dumps(config.to_json(), indent=1))
    writer = MetricWriter(workdir, start) if first else None
    began = time.monotonic() - (stored.seconds if stored else 0.0)

    def save(step: int, state: TrainState) -> None:
        consumed = position + (step - start) * config.optim.batch
        spent = time.monotonic() - began
        info = RunInfo(config, {SOURCE: consumed}, tags, tokenizer.name, spent)
        checkpoints.save(step, state, info)

    batches = pipeline.batches(position, *reader(mesh))
    sharding = batch_sharding(mesh)
    step = start
    try:
        with StopSignal() as stop, ProgressLine(console, start, total) as progress:
            lr = warmup_cosine(config.optim.lr, warmup, total)
            flops = sum(step_flops(config, num_tags).values())
            report = Report(config, pipeline, writer, progress, lr, flops)
            while step < total and not stop.number:
                with report.watch("data"):
                    batch = to_device(next(batches), sharding, config.optim.batch)
                state, metrics = train_step(state, batch)
                report.flush()
                step += 1
                progress.advance(step)
                if step == start + 1:
                    jax.block_until_ready(metrics)
                    report.start(step)
                if step % report_every == 0 or step == total:
                    report.due = (step, metrics)
                if step % save_every == 0 and step < total:
                    save(step, state)
            report.flush()
        if step > start:
            save(step, state)
    finally:
        # After an error too: a save under way is finished work.
        checkpoints.close()
        batches.close()
        if writer:
            writer.close()
    if stop.number:
        log.info("stopped by %s, saved at step %d", signal.Signals(stop.number).name, step)
        return 128 + stop.number
    log.info("finished: %d steps in %.0f s, in %s", total, time.monotonic() - began, workdir)
    return 0


def _vocabulary(config: Config, stored: RunInfo | None) -> TagVocabulary | None:
    """The run's own vocabulary where it has one: the counts may have changed since."""
    if not config.loss.tag:
        return None
    if stored and stored.tags:
        return stored.tags
    return TagVocabulary.from_dataset(config.data.path, config.data.tag_vocabulary)


def _announce(
    config: Config, workdir: Path, pipeline: Pipeline, abstract: TrainState,
    mesh: jax.sharding.Mesh, start: int, total: int,
) -> None:  # fmt: skip
    """Says once what is about to run."""
    count = sum(np.prod(x.shape, dtype=int) for x in jax.tree.leaves(abstract.params))
    shape = " × ".join(f"{name} {size}" for name, size in mesh.shape.items())
    log.info("%s on %d %s device(s), mesh %s", config.model.arch, mesh.size,
             mesh.devices.flat[0].platform, shape)  # fmt: skip
    log.info("%.1fM parameters, %.0f MiB of state per device",
             count / 1e6, bytes_per_device(abstract, mesh) / 2**20)  # fmt: skip
    log.info("%s: %s records; %d steps of %d, %.1f epochs",
             config.data.path, f"{pipeline.records:,}", total, config.optim.batch,
             total * config.optim.batch / pipeline.records)  # fmt: skip
    cut = pipeline.truncation()
    log.info("texts longer than %d tokens: %s", config.model.context_length,
             ", ".join(f"{name} {share:.1%}" for name, share in cut.items()))  # fmt: skip
    log.info("%s step %d of %s", "continuing from" if start else "starting at", start, workdir)


if __name__ == "__main__":
    sys.exit(main())
