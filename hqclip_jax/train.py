"""Trains CLIP on refined image-text data.

    python -m hqclip_jax.train --config=configs/demo.py --workdir=runs/demo \\
        --config.data.path=data/demo

Started again with the same --workdir it continues from the last checkpoint. SIGTERM and SIGINT save
first, on all hosts though only one may get it.
"""

import argparse
import contextlib
import json
import logging
import os
import signal
import sys
import time
import traceback
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from rich.console import Console

from hqclip_jax import config as config_lib
from hqclip_jax.cadence import Every, Saver
from hqclip_jax.checkpoint import CheckpointError, Checkpoints, RunInfo
from hqclip_jax.config import Config, ConfigError, ProfileConfig
from hqclip_jax.cost import step_flops
from hqclip_jax.data.feed import Fed, Feed
from hqclip_jax.data.pipeline import Pipeline, to_device
from hqclip_jax.data.record import DatasetError
from hqclip_jax.data.tags import TagVocabulary
from hqclip_jax.data.tokenizer import TokenizerError
from hqclip_jax.evals.during import Evaluations, evaluators_of
from hqclip_jax.lease import Lease, LeaseError
from hqclip_jax.optim import make_tx, warmup_cosine
from hqclip_jax.progress import Goodput, ProgressLine, Report
from hqclip_jax.sharding import batch_sharding, bytes_per_device, make_mesh, reader
from hqclip_jax.signals import Control, StopSignal, end, leave, meet, send
from hqclip_jax.start import Start, begin, find_origin
from hqclip_jax.step import (
    Metrics,
    TrainState,
    batch_shapes,
    init_state,
    make_train_step,
    signal_shapes,
)
from hqclip_jax.telemetry import MetricWriter, setup_logging
from hqclip_jax.tracing import Tracer
from hqclip_jax.trackers import check_trackers
from hqclip_jax.watchdog import STATUS, Watchdog

log = logging.getLogger("hqclip_jax.train")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 finished, 1 diverged or a fault, with its traceback, 2 wrong configuration or
    data, or a workdir in use, 3 another run took it over; and where the same command continues: 75
    ended by the watchdog or because another process did, 128 + signal stopped and, but for a second
    SIGINT, saved."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        overrides, rest = config_lib.split_overrides(argv)
        args = _parser().parse_args(rest)
        config = config_lib.load(args.config, overrides)
        check_trackers(config.log)  # on all hosts: one that ends alone leaves the others waiting
        if args.distributed:
            jax.distributed.initialize()
        _use_compile_cache()
        status = train(config, Path(args.workdir), setup_logging())
    except (
        ConfigError, DatasetError, CheckpointError, TokenizerError, LeaseError, FileNotFoundError,
    ) as e:  # fmt: skip
        print(f"error: {e}", file=sys.stderr)
        status = 2
    except FloatingPointError as e:
        print(f"error: {e}", file=sys.stderr)
        status = 1
    except KeyboardInterrupt:
        print("stopped at once by a second SIGINT", file=sys.stderr)
        status = 128 + signal.SIGINT
    except Exception as e:
        if not jax.distributed.is_initialized():
            raise
        traceback.print_exc()
        # In a step of several processes it mostly says that another one has ended.
        ended = isinstance(e, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(e)
        status = STATUS if ended else 1
    leave(status)
    return status


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
    # By default what compiles within a second is compiled at every start; there is much of it.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def train(config: Config, workdir: Path, console: Console) -> int:
    """Runs until the configured duration is reached or a signal asks to stop."""
    workdir.mkdir(parents=True, exist_ok=True)
    first = jax.process_index() == 0
    lease = Lease(workdir) if first else contextlib.nullcontext()

    def at_once(number: int) -> None:
        lease.__exit__(None, None, None)
        name = signal.Signals(number).name
        print(f"stopped by {name} before there was anything to save", flush=True)
        os._exit(128 + number)

    with lease, StopSignal(at_once) as stop:
        meet("lease", 600)  # its holder may have to be watched first
        return _train(config, workdir, console, stop)


def _train(config: Config, workdir: Path, console: Console, stop: StopSignal) -> int:
    began = time.monotonic()
    first = jax.process_index() == 0
    mesh = make_mesh(config.mesh, config.optim.batch, parts=config.optim.micro_batches)
    origin = find_origin(config, workdir)
    stored = origin.stored
    tokenizer = origin.tokenizer(config)
    tags = _vocabulary(config, stored)
    replaced_log = workdir / f"replaced-{jax.process_index()}.jsonl"
    pipeline = Pipeline(config, tokenizer, tags, stored and stored.position, replaced_log)
    every = Every.of(config, sum(pipeline.records.values()))
    evaluators = evaluators_of(config)

    tx = make_tx(config.optim, every.warmup, every.total)
    num_tags = len(tags) if tags else 0
    graphdef, abstract, shardings, init = init_state(
        config, tokenizer.vocab_size, num_tags, tx, mesh
    )
    start = begin(origin, config, abstract, init, tags, pipeline.records)
    weights = jax.numpy.asarray(tags.idf()) if tags and config.loss.tag_idf else None
    train_step = make_train_step(graphdef, tx, config, mesh, shardings, weights)
    _announce(config, pipeline, abstract, mesh, start.step, every.total)

    if first:
        (workdir / "config.json").write_text(json.dumps(config.to_json(), indent=1))
    put = lambda batch: to_device(batch, batch_sharding(mesh), config.optim.batch)
    with (
        MetricWriter(workdir, start.step, config) if first else contextlib.nullcontext() as writer,
        # It looks on until the last save is done, which may hang too.
        Watchdog(config.watchdog, workdir / f"stacks-{jax.process_index()}.txt") as watchdog,
        # After an error too: a save under way is finished work.
        contextlib.closing(Checkpoints(workdir, config.checkpoint, every.keep)) as checkpoints,
        contextlib.closing(Tracer(config.profile if first else ProfileConfig(), workdir)) as tracer,
        ProgressLine(console, start.step, every.total) as progress,
        Feed(pipeline.batches(*reader(mesh)), put) as feed,
    ):
        if config.checkpoint.best:
            shapes = abstract, batch_shapes(config, mesh), signal_shapes(mesh)
            checkpoints.check_best(jax.eval_shape(train_step, *shapes)[1])
        timers = start.info.timers if start.info else {}
        lost = max(0.0, writer.dropped_until - sum(timers.values())) if writer else 0.0
        goodput = Goodput(timers, lost, since=began)

        def info(step: int) -> RunInfo:
            position, seconds = pipeline.position(step - start.step), goodput.seconds
            told = tokenizer.to_json()
            return RunInfo(config, position, tags, told, seconds, pipeline.records)

        saver = Saver(config.checkpoint.minutes if first else 0, checkpoints, info, start.step)
        lr = warmup_cosine(config.optim.lr, every.warmup, every.total)
        flops = sum(step_flops(config, num_tags).values())
        replaced = int(start.state.replaced.sum())
        report = Report(
            config, pipeline, start.step, replaced, lr, flops, goodput, progress, writer,
            replaced_log,
        )  # fmt: skip
        evaluations = Evaluations(
            config, evaluators, graphdef, tokenizer, mesh, workdir, every.evaluate, every.total
        )
        loop = Loop(
            config,
            mesh,
            train_step,
            every,
            feed,
            report,
            saver,
            evaluations,
            watchdog,
            tracer,
            stop,
        )
        step = loop.run(start)
    log.info("%s", goodput.line())
    if step < every.total or evaluations.missing(step):
        number = stop.number or signal.SIGTERM  # another host's
        log.info("stopped by %s, saved at step %d", signal.Signals(number).name, step)
        return 128 + number
    log.info("finished: %d steps in %.0f s, in %s", step, goodput.metrics()["seconds"], workdir)
    return 0


@dataclass
class Loop:
    """The loop itself. Between two steps it waits for nothing but data: what the step before has
    said is fetched when the next one is under way."""

    config: Config
    mesh: Mesh
    train_step: Any
    every: Every
    feed: Feed
    report: Report
    saver: Saver
    evaluations: Evaluations
    watchdog: Watchdog
    tracer: Tracer
    stop: StopSignal
    failure: Exception | None = None  # to read, raised once what is done is saved

    def run(self, start: Start) -> int:
        """Trains from `start` to the end or until a host asks to stop, and saves.

        Returns:
            steps done.

        Raises:
            FloatingPointError: too many updates in a row were skipped.
            DatasetError: too many records could not be read.
            Whatever reading raised, once the steps before are saved.
        """
        # A run that had stopped, or was told to, would stay so.
        again = jax.device_put(np.int32(0), start.state.streak.sharding)
        state, step = start.state._replace(streak=again, stopped=again.copy()), start.step
        if self.evaluations.missing(step):  # it was broken off
            self._evaluate(step, state)
        uids: deque[tuple[int, np.ndarray]] = deque(maxlen=self.config.optim.max_skipped + 1)
        fed: Fed | None = None
        said: jax.Array | None = None  # by the step before
        while step < self.every.total:
            self.watchdog.beat(step, "waiting for data")
            with self.report.goodput("data"):
                fed = self._next() or fed
            if (self.stop or self.failure) and jax.process_count() == 1:
                break  # nobody to agree with
            step += 1
            self.tracer.before(step)
            self.watchdog.beat(step, "making a step")
            state, metrics = self._step(state, fed, first=step == start.step + 1)
            uids.append((step, fed.uids))
            self.watchdog.beat(step, Watchdog.WAITING)
            self.report.flush()
            control, said = _read(said), metrics["control"]
            if control.stopped:
                break
            self._check(control, step - 1, uids)
            self.report.progress.advance(step)
            self.tracer.after(step, metrics)
            save = (control.save or step % self.every.save == 0) and step < self.every.total
            if step % self.every.report == 0 or step == self.every.total or save:
                self.report.due = (step, metrics)
                if self.report.writer and step < self.every.total:
                    self.tracer.asked(step + 1)
            if save and not self._save(step, state, said):
                break
            if self.evaluations.due(step) and step < self.every.total:
                self._evaluate(step, state)
        self._check(_read(said), step, uids)
        self.report.flush()
        done = int(state.step)  # what was told to stop was not done
        if done > start.step:
            self._save(done, state, None)
        if self.failure:
            raise self.failure
        if start.step < done == self.every.total and self.evaluations.due(done):
            self._evaluate(done, state)
        return done

    def _next(self) -> Fed | None:
        """A batch, or None where there is a stop. After the first batch an error is a stop too: it
        ends this host alone, and the others would wait for it."""
        try:
            return self.feed.next(lambda: self.stop.anywhere() or bool(self.failure))
        except Exception as e:
            if not self.stop.saves:
                raise
            self.failure = e
            return None

    def _step(self, state: TrainState, fed: Fed, first: bool) -> tuple[TrainState, Metrics]:
        stop = bool(self.stop or self.failure)
        signals = send(self.mesh, stop=stop, save=self.saver.asks())
        if not first:
            return self.train_step(state, fed.arrays, signals)
        with self.report.goodput("compile"):
            self.watchdog.beat(int(state.step), "compiling")
            self.saver.checkpoints.prepare(state)
            state, metrics = self.train_step(state, fed.arrays, signals)
            jax.block_until_ready(metrics)
        self.stop.saves = True
        self.report.begin(int(state.step))
        return state, metrics

    def _save(self, step: int, state: TrainState, said: jax.Array | None) -> bool:
        """Whether the step was made, and so is saved: only now it is waited for."""
        self.watchdog.beat(step, "saving")
        if said is not None and _read(said).stopped:
            self.report.due = None
            return False
        self.report.flush()
        with self.report.goodput("checkpoint"):
            self.saver.save(step, state, self.report.last)
        return True

    def _evaluate(self, step: int, state: TrainState) -> None:
        """Waits for the step, flushes what it said, and scores its parameters."""
        self.report.flush()

        def stop() -> bool:
            self.watchdog.beat(step, "evaluating")
            return bool(self.stop)

        with self.report.goodput("evaluation"):
            scores = self.evaluations.run(step, state, stop)
        if scores:
            self.report.scores(step, scores)

    def _check(self, control: Control, step: int, uids: Sequence[tuple[int, np.ndarray]]) -> None:
        """Raises FloatingPointError if the updates up to `step` were no numbers, and names them."""
        if control.streak < self.config.optim.max_skipped:
            return
        first = step - control.streak + 1
        path = self.report.replaced_log.with_name(f"diverged-{jax.process_index()}.json")
        named = {
            s: [uid.decode() for uid in rows.tolist()] for s, rows in uids if first <= s <= step
        }
        path.write_text(json.dumps({"steps": [first, step], "uids": named}, indent=1))
        raise FloatingPointError(
            f"the updates of steps {first} to {step} were skipped: the loss or a gradient is no "
            f"number. The parameters are those before; {path} names the pictures. Lower optim.lr, "
            "lengthen optim.warmup or set optim.clip_norm=1"
        )


def _read(said: jax.Array | None) -> Control:
    return Control(0, 0, 0) if said is None else Control(*map(int, np.asarray(said)))


def _vocabulary(config: Config, stored: RunInfo | None) -> TagVocabulary | None:
    """The run's own vocabulary where it has one: the counts may have changed since."""
    if not config.loss.tag:
        return None
    if stored and stored.tags:
        return stored.tags
    paths = [source.path for source in config_lib.sources(config.data.path)]
    return TagVocabulary.from_datasets(paths, config.data.tag_vocabulary)


def _announce(
    config: Config, pipeline: Pipeline, abstract: TrainState, mesh: Mesh, start: int, total: int
) -> None:
    """Says once what is about to run."""
    count = sum(np.prod(x.shape, dtype=int) for x in jax.tree.leaves(abstract.params))
    shape = " × ".join(f"{name} {size}" for name, size in mesh.shape.items())
    log.info("%s on %d %s device(s), mesh %s", config.model.arch, mesh.size,
             mesh.devices.flat[0].platform, shape)  # fmt: skip
    log.info("%.1fM parameters, %.0f MiB of state per device",
             count / 1e6, bytes_per_device(abstract, mesh) / 2**20)  # fmt: skip
    for name, share in pipeline.shares().items():
        log.info("%s: %s records, %.1f%% of the samples, %.2f epochs so far", name,
                 f"{pipeline.records[name]:,}", 100 * share,
                 pipeline.position(0)[name] / pipeline.records[name])  # fmt: skip
    log.info("%d steps of %d, %.1f epochs", total, config.optim.batch,
             total * config.optim.batch / sum(pipeline.records.values()))  # fmt: skip
    cut = pipeline.truncation()
    log.info("texts longer than %d tokens: %s", config.model.context_length,
             ", ".join(f"{name} {share:.1%}" for name, share in cut.items()))  # fmt: skip


if __name__ == "__main__":
    end(main())
