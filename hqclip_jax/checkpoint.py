"""Checkpoints: train state, data position and all that describes the run, through Orbax.

One checkpoint is a directory named by its step, holding `params`, `ema` where the run keeps an
average of them, `rest` (all else of the train state), `run` (JSON: data position, config, tag
vocabulary, tokenizer, timers) and, where the best one stays, `metrics`. Restoring is always against
the mesh at hand, and evaluation reads `params` or `ema`, and `run`.
"""

import dataclasses
import json
import logging
import math
import time
from collections.abc import Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import (
    AnyPreservationPolicy,
    BestN,
    EveryNSteps,
    LatestN,
)

from hqclip_jax import config as config_lib
from hqclip_jax.config import CheckpointConfig, Config, ConfigError
from hqclip_jax.data.tags import TagVocabulary
from hqclip_jax.data.tokenizer import ClipTokenizer
from hqclip_jax.step import TrainState

log = logging.getLogger(__name__)

FOLDER = "checkpoints"
FORMAT = 4
WEIGHTS = ("params", "ema")
LONG_WAIT = 1.0  # seconds for the save before, worth a word in the log


class CheckpointError(ValueError):
    """A checkpoint that can't be used here; the message names it and the mend."""


@dataclass(frozen=True)
class RunInfo:
    """What a checkpoint says of its run.

    Attributes:
        config: the whole configuration.
        position: records consumed globally, by source.
        tags: the tag head's vocabulary, None where there is no head.
        tokenizer: what its `to_json` gives: the name, or that and a vocabulary.
        timers: seconds spent so far, over all its starts, by kind.
        records: size of each source, on which the order of its records depends.
    """

    config: Config
    position: dict[str, int]
    tags: TagVocabulary | None
    tokenizer: str | dict = ClipTokenizer.name
    timers: dict[str, float] = field(default_factory=dict)
    records: dict[str, int] = field(default_factory=dict)

    def to_json(self) -> dict:
        return {
            "format": FORMAT,
            "config": self.config.to_json(),
            "position": self.position,
            "tags": self.tags and self.tags.to_json(),
            "tokenizer": self.tokenizer,
            "timers": self.timers,
            "records": self.records,
        }

    @classmethod
    def from_json(cls, stored: dict) -> "RunInfo":
        if stored["format"] != FORMAT:
            raise CheckpointError(
                f"a checkpoint of format {stored['format']}, and this version reads {FORMAT}: use "
                "the version that wrote it, or another --workdir"
            )
        return cls(
            config=config_lib.from_json(stored["config"]),
            position=stored["position"],
            tags=stored["tags"] and TagVocabulary.from_json(stored["tags"]),
            tokenizer=stored["tokenizer"],
            timers=stored["timers"],
            records=stored["records"],
        )


class _Manager(ocp.CheckpointManager):
    """Orbax asks JAX's preemption service at every save, and of a step that the loop has long
    passed; the service would take that for where this process is."""

    def reached_preemption(self, step: int) -> bool:
        return False


class Checkpoints:
    """The checkpoints of one workdir.

    A save copies the state on its devices, and the loop goes on as soon as that is dispatched: a
    thread hands the copy to Orbax. So a save takes the memory of one more state (parameters,
    moments, average) on every device while it lasts; where there is no room for it, the loop waits
    until the state is on the host. One save is under way at a time, and the next one waits for it:
    left out, it would lose more work than `checkpoint.every` promises.

    Orbax renames a step's directory when it is complete, so an interrupted save is never seen, and
    its leftovers go when the workdir is opened again.
    """

    def __init__(
        self,
        workdir: str | Path,
        config: CheckpointConfig | None = None,
        keep_every: int = 0,
        read_only: bool = False,
    ) -> None:
        """Args:
        workdir: the run's directory; the checkpoints lie in its `checkpoints`.
        config: which stay on disk; None keeps all.
        keep_every: steps between those that stay for good, `config.keep_every` in steps; 0 for
            none. Steps that are no multiple of it are not meant.
        read_only: never creates or deletes anything.
        """
        self.directory = Path(workdir).absolute() / FOLDER
        self.best = config.best if config else ""
        if not read_only:
            self.directory.mkdir(parents=True, exist_ok=True)
        # Compression would save 8% of the bytes and take as much time again on the CPU.
        arrays = {
            name: ocp.PyTreeCheckpointHandler(use_compression=False) for name in (*WEIGHTS, "rest")
        }
        self._manager = _Manager(
            self.directory,
            item_names=(*arrays, "run"),
            item_handlers=arrays | {"run": ocp.JsonCheckpointHandler()},
            options=ocp.CheckpointManagerOptions(
                create=False,
                read_only=read_only,
                cleanup_tmp_directories=not read_only,
                preservation_policy=config and _preserved(config, keep_every),
                # Without it Orbax would not write the metrics that the policy asks for.
                best_fn=(lambda metrics: metrics[self.best]) if self.best else None,
                # Processes wait for one another through the coordination service. Told nothing,
                # Orbax runs a collective on the devices, which from a thread of its own could come
                # before a step's on one process and after it on another: both would hang.
                multiprocessing_options=ocp.options.MultiprocessingOptions(
                    active_processes=set(range(jax.process_count()))
                ),
            ),
        )
        self._copy = jax.jit(lambda state: jax.tree.map(jnp.copy, state))
        self._room: bool | None = None
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._under_way: Future[None] | None = None

    def prepare(self, state: TrainState) -> None:
        """Compiles the copy of a save, for which the first one would otherwise wait."""
        self._copy(state)

    def save(
        self,
        step: int,
        state: TrainState,
        info: RunInfo,
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Writes a checkpoint in the background; the state may be donated when this returns.

        Waits for the save before, if it is still under way, and raises its error if it failed.

        Args:
            metrics: what was last reported, equal on all processes, if anything was; with
                `checkpoint.best`, the metric of that name is kept beside the checkpoint.

        Raises:
            CheckpointError: `checkpoint.best` is none of the metrics.
        """
        if metrics:
            self.check_best(metrics)
        began = time.monotonic()
        self.wait()
        if (waited := time.monotonic() - began) > LONG_WAIT:
            log.warning("step %d waited %.1f s for the save before to end", step, waited)
        if step in self._manager.all_steps():
            return
        if self._room is None:
            self._room = _room_for_copy(state)
        if self._room:
            state = self._copy(state)
        best = {self.best: float(metrics[self.best])} if self.best and metrics else None
        self._under_way = self._thread.submit(self._write, step, state, info.to_json(), best)
        if not self._room:
            self._under_way.result()

    def _write(self, step: int, state: TrainState, info: dict, metrics: dict | None) -> None:
        parts = {name: ocp.args.PyTreeSave(part) for name, part in _parts(state).items()}
        args = ocp.args.Composite(**parts, run=ocp.args.JsonSave(info))
        # Returns when the state is on the host.
        self._manager.save(step, args=args, metrics=metrics)

    def check_best(self, metrics: Collection[str]) -> None:
        """Args:
        metrics: names of those that there are.

        Raises:
            CheckpointError: `checkpoint.best` is none of the metrics.
        """
        if self.best and self.best not in metrics:
            raise CheckpointError(
                f"checkpoint.best={self.best!r} is none of the reported metrics: "
                f"{', '.join(sorted(metrics))}"
            )

    def wait(self) -> None:
        """Returns when no save is under way; raises the error of the last one, if it failed."""
        try:
            if self._under_way is not None:
                self._under_way.result()
        finally:
            self._under_way = None
            self._manager.wait_until_finished()

    def steps(self) -> list[int]:
        """Finished checkpoints, oldest first."""
        return sorted(self._manager.all_steps())

    def latest(self) -> int | None:
        return self._manager.latest_step()

    def info(self, step: int) -> RunInfo:
        """Raises:
        CheckpointError: another version or another program wrote it.
        """
        try:
            stored = self._manager.restore(
                step, args=ocp.args.Composite(run=ocp.args.JsonRestore())
            )
            return RunInfo.from_json(stored.run)
        except (KeyError, TypeError, json.JSONDecodeError, ConfigError) as e:
            raise CheckpointError(
                f"{self.directory / str(step)} was not written by this code: {e}"
            ) from e

    def restore(self, step: int, abstract: TrainState) -> TrainState:
        """The whole state, laid out as the shardings of `abstract` say.

        Raises:
            CheckpointError: the checkpoint was imported and holds parameters only.
        """
        where = self.directory / str(step)
        if not (where / "rest").is_dir():
            raise CheckpointError(
                f"{where} was imported: it holds parameters, and no run that could go on. Begin "
                f"one with --config.init_from={self.directory.parent} in another --workdir"
            )
        parts = {name: _restore_args(part) for name, part in _parts(abstract).items()}
        restored = self._manager.restore(step, args=ocp.args.Composite(**parts))
        ema = restored.ema if "ema" in parts else None
        return TrainState(params=restored.params, ema=ema, **restored.rest)

    def restore_weights(self, step: int, abstract: Any, name: str) -> Any:
        """`params` or `ema` alone."""
        args = ocp.args.Composite(**{name: _restore_args(abstract)})
        return self._manager.restore(step, args=args)[name]

    def save_params(self, step: int, params: Any, info: RunInfo) -> None:
        """Writes parameters that were trained elsewhere, which can be evaluated and begun from but
        not gone on with; returns when they are there."""
        parts = {"params": ocp.args.PyTreeSave(params), "run": ocp.args.JsonSave(info.to_json())}
        self._manager.save(step, args=ocp.args.Composite(**parts))
        self.wait()

    def close(self) -> None:
        """Waits for the last save and reports its error, if any."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            self._manager.close()


def _preserved(config: CheckpointConfig, keep_every: int) -> AnyPreservationPolicy:
    """Which checkpoints stay: what any of the policies keeps."""
    policies: list[Any] = [LatestN(config.keep)]
    if keep_every:
        policies.append(EveryNSteps(keep_every))
    if config.best:
        sign = 1 if config.best_mode == "max" else -1

        def merit(metrics: dict[str, float]) -> float:
            """What is no number, or was not recorded yet, is never best."""
            value = metrics.get(config.best, math.nan)
            return -math.inf if math.isnan(value) else sign * value

        policies.append(BestN(get_metric_fn=merit, n=1, keep_checkpoints_without_metrics=False))
    return AnyPreservationPolicy(policies)


def _room_for_copy(state: TrainState) -> bool:
    """Whether each device has memory for a second state beside what the steps so far took; the same
    on all processes. Unknown on a CPU, and then yes."""
    needed: dict[jax.Device, int] = {}
    for x in jax.tree.leaves(state):
        for shard in x.addressable_shards:
            needed[shard.device] = needed.get(shard.device, 0) + shard.data.nbytes
    room = True
    for device, count in needed.items():
        stats = device.memory_stats() or {}
        if "bytes_limit" in stats:
            room &= stats["peak_bytes_in_use"] + count <= stats["bytes_limit"]
    if jax.process_count() > 1:
        room = bool(multihost_utils.process_allgather(jnp.asarray(room)).all())
    if not room:
        log.warning("no room on the devices for a copy of the state: a save blocks the step")
    return room


def _parts(state: TrainState) -> dict[str, Any]:
    """The items of a checkpoint: what is evaluated apart from what only training needs."""
    rest = state._asdict()
    parts = {name: rest.pop(name) for name in WEIGHTS}
    return {name: part for name, part in parts.items() if part is not None} | {"rest": rest}


def _restore_args(abstract: Any) -> ocp.args.PyTreeRestore:
    return ocp.args.PyTreeRestore(
        item=abstract, restore_args=ocp.checkpoint_utils.construct_restore_args(abstract)
    )


def check_same_run(
    stored: RunInfo, config: Config, num_tags: int, where: Path, instead: str = "another --workdir"
) -> None:
    """Refuses to continue a run of another model or batch.

    Args:
        where: the checkpoint's place, for the message.
        instead: what to use instead, likewise.

    Raises:
        CheckpointError: names the fields that disagree.
    """
    ours, theirs = dataclasses.asdict(config.model), dataclasses.asdict(stored.config.model)
    # These change speed and memory, not the parameters.
    free = ("dtype", "remat", "unroll", "patch_dropout")
    pairs = [(f"model.{k}", theirs[k], ours[k]) for k in ours if k not in free]
    for k in ("contrastive_form", "tag_input"):
        pairs.append((f"loss.{k}", getattr(stored.config.loss, k), getattr(config.loss, k)))
    own = [bool(c.loss.hni) and c.loss.hni_scale == "own" for c in (stored.config, config)]
    pairs.append(("loss.hni > 0 with loss.hni_scale=own", *own))
    # Steps, which the schedule counts, would no longer be the samples that they were.
    pairs.append(("optim.batch", stored.config.optim.batch, config.optim.batch))
    # Whether there is an average at all; its decay may change.
    pairs.append(("optim.ema > 0", stored.config.optim.ema > 0, config.optim.ema > 0))
    lines = [f"{name} is {a!r} there, {b!r} here" for name, a, b in pairs if a != b]
    stored_tags = len(stored.tags) if stored.tags else 0
    if stored_tags != num_tags:
        lines.append(f"the tag head has {stored_tags} classes there, {num_tags} here")
    if lines:
        raise CheckpointError(
            f"{where} holds a checkpoint of another run: {'; '.join(lines)}. Use {instead}, or the "
            "configuration it was trained with"
        )


def check_same_data(stored: RunInfo, records: Mapping[str, int], where: Path) -> None:
    """Refuses to go on in the middle of a source whose size, and so whose order, is another. A
    source that is new starts at 0, and one that is gone is forgotten.

    Raises:
        CheckpointError: names the sources with both sizes.
    """
    lines = [
        f"{name!r} had {stored.records[name]:,} records and has {count:,}"
        for name, count in records.items()
        if stored.records.get(name, count) != count
    ]
    if lines:
        raise CheckpointError(
            f"{where} is in the middle of other data: {'; '.join(lines)}, so their order is "
            "another. Give the source another name in data.path, as NAME:WEIGHT=DIR, to start it "
            "at 0, or bring the old data back"
        )
