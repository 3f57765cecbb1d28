"""Checkpoints: train state, data position and all that describes the run, through Orbax.

One checkpoint is a directory named by its step, holding `params`, `ema` where the run keeps an
average of them, `rest` (all else of the train state) and `run` (JSON: data position, config, tag
vocabulary, tokenizer). Restoring is always against the mesh at hand, and evaluation reads `params`
or `ema`, and `run`.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import Mesh

from hqclip_jax import config as config_lib
from hqclip_jax.config import Config, ConfigError
from hqclip_jax.data.tags import TagVocabulary
from hqclip_jax.data.tokenizer import TOKENIZERS, ClipTokenizer
from hqclip_jax.models.clip import CLIP
from hqclip_jax.sharding import make_mesh, tree_shardings
from hqclip_jax.step import TrainState

FOLDER = "checkpoints"
FORMAT = 3
WEIGHTS = ("params", "ema")


class CheckpointError(ValueError):
    """A checkpoint that can't be used here; the message names it and the mend."""


@dataclass(frozen=True)
class RunInfo:
    """What a checkpoint says of its run.

    Attributes:
        config: the whole configuration.
        position: records consumed globally, by source.
        tags: the tag head's vocabulary, None where there is no head.
        tokenizer: name of the tokenizer.
        seconds: wall time spent in training so far.
    """

    config: Config
    position: dict[str, int]
    tags: TagVocabulary | None
    tokenizer: str = ClipTokenizer.name
    seconds: float = 0.0

    def to_json(self) -> dict:
        return {
            "format": FORMAT,
            "config": self.config.to_json(),
            "position": self.position,
            "tags": self.tags and self.tags.to_json(),
            "tokenizer": self.tokenizer,
            "seconds": self.seconds,
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
            seconds=stored["seconds"],
        )


class Checkpoints:
    """The checkpoints of one workdir. Orbax renames a step's directory when it is complete, so an
    interrupted save is never seen."""

    def __init__(
        self, workdir: str | Path, keep: int | None = None, read_only: bool = False
    ) -> None:
        """Args:
        workdir: the run's directory; the checkpoints lie in its `checkpoints`.
        keep: latest checkpoints that stay; None keeps all.
        read_only: never creates or deletes anything.
        """
        self.directory = Path(workdir).absolute() / FOLDER
        self.manager = ocp.CheckpointManager(
            self.directory,
            item_names=("params", "ema", "rest", "run"),
            item_handlers={
                "params": ocp.PyTreeCheckpointHandler(),
                "ema": ocp.PyTreeCheckpointHandler(),
                "rest": ocp.PyTreeCheckpointHandler(),
                "run": ocp.JsonCheckpointHandler(),
            },
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep, create=not read_only, read_only=read_only
            ),
        )

    def save(self, step: int, state: TrainState, info: RunInfo) -> None:
        """Copies the state to the host and writes it in the background."""
        if step in self.manager.all_steps():
            return
        parts = {name: ocp.args.PyTreeSave(part) for name, part in _parts(state).items()}
        run = ocp.args.JsonSave(info.to_json())
        self.manager.save(step, args=ocp.args.Composite(**parts, run=run))

    def latest(self) -> int | None:
        return self.manager.latest_step()

    def info(self, step: int) -> RunInfo:
        stored = self.manager.restore(step, args=ocp.args.Composite(run=ocp.args.JsonRestore()))
        return RunInfo.from_json(stored.run)

    def restore(self, step: int, abstract: TrainState) -> TrainState:
        """The whole state, laid out as the shardings of `abstract` say."""
        parts = {name: _restore_args(part) for name, part in _parts(abstract).items()}
        restored = self.manager.restore(step, args=ocp.args.Composite(**parts))
        ema = restored.ema if "ema" in parts else None
        return TrainState(params=restored.params, ema=ema, **restored.rest)

    def restore_weights(self, step: int, abstract: Any, name: str) -> Any:
        """`params` or `ema` alone."""
        args = ocp.args.Composite(**{name: _restore_args(abstract)})
        return self.manager.restore(step, args=args)[name]

    def close(self) -> None:
        """Waits for the last save and reports its error, if any."""
        self.manager.wait_until_finished()
        self.manager.close()


def _parts(state: TrainState) -> dict[str, Any]:
    """The items of a checkpoint: what is evaluated apart from what only training needs."""
    rest = state._asdict()
    parts = {name: rest.pop(name) for name in WEIGHTS}
    return {name: part for name, part in parts.items() if part is not None} | {"rest": rest}


def _restore_args(abstract: Any) -> ocp.args.PyTreeRestore:
    return ocp.args.PyTreeRestore(
        item=abstract, restore_args=ocp.checkpoint_utils.construct_restore_args(abstract)
    )


def check_same_run(stored: RunInfo, config: Config, num_tags: int, where: Path) -> None:
    """Refuses to continue a run of another model or batch.

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
            f"{where} holds a checkpoint of another run: {'; '.join(lines)}. Use another "
            "--workdir, or the configuration it was trained with"
        )


def _tokenizer(info: RunInfo) -> ClipTokenizer:
    if info.tokenizer not in TOKENIZERS:
        raise CheckpointError(
            f"the checkpoint's tokenizer {info.tokenizer!r} is unknown here: {sorted(TOKENIZERS)}"
        )
    return TOKENIZERS[info.tokenizer](info.config.model.context_length)


@dataclass(frozen=True)
class RestoredModel:
    """A model ready to embed: `nnx.merge(model, params)` gives the towers.

    Attributes:
        step: of the checkpoint.
        config: the run's, from the checkpoint.
        model: graph definition of `CLIP`.
        params: f32 arrays on `mesh`.
        tokenizer: the one it was trained with, at its context length.
        tags: vocabulary of the tag head, or None.
        mesh: all devices at hand, as replicas.
    """

    step: int
    config: Config
    model: nnx.GraphDef
    params: Any
    tokenizer: ClipTokenizer
    tags: TagVocabulary | None
    mesh: Mesh


def restore_model(
    workdir: str | Path, step: int | None = None, weights: str = "params"
) -> RestoredModel:
    """Restores the parameters of a run for evaluation; everything else is read from there too.

    Args:
        workdir: the run's directory, its `checkpoints`, or one step in it.
        step: which checkpoint; the latest by default.
        weights: `params`, or `ema` for their average.

    Raises:
        CheckpointError: no committed checkpoint there, no average in it, or one that this version
            can't read.
    """
    path = Path(workdir).absolute()
    if path.name.isdigit() and path.parent.name == FOLDER:
        step, path = int(path.name), path.parent
    if path.name == FOLDER:
        path = path.parent
    if not (path / FOLDER).is_dir():
        raise CheckpointError(
            f"{workdir} holds no checkpoint: give the --workdir of a run, with {FOLDER!r} in it"
        )
    checkpoints = Checkpoints(path, read_only=True)
    known = sorted(checkpoints.manager.all_steps())
    if not known:
        raise CheckpointError(f"{path / FOLDER} holds no finished checkpoint yet")
    if step is not None and step not in known:
        raise CheckpointError(f"{path / FOLDER} has no step {step}; it has {known}")
    step = known[-1] if step is None else step
    try:
        info = checkpoints.info(step)
    except (KeyError, TypeError, json.JSONDecodeError, ConfigError) as e:
        raise CheckpointError(
            f"{path / FOLDER / str(step)} was not written by this code: {e}"
        ) from e
    if weights == "ema" and not info.config.optim.ema:
        raise CheckpointError(f"{path / FOLDER / str(step)} has no average: optim.ema was 0")
    tokenizer = _tokenizer(info)
    mesh = make_mesh(config_lib.MeshConfig(), len(jax.devices()))
    num_tags = len(info.tags) if info.tags else 0
    model, shapes = nnx.split(
        nnx.eval_shape(lambda: CLIP(info.config, tokenizer.vocab_size, num_tags, rngs=nnx.Rngs(0))),
        nnx.Param,
    )
    shapes = nnx.to_pure_dict(shapes)
    abstract = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        shapes,
        tree_shardings(shapes, mesh),
    )
    try:
        params = checkpoints.restore_weights(step, abstract, weights)
    except (ValueError, KeyError) as e:
        raise CheckpointError(
            f"{path / FOLDER / str(step)} does not fit model.arch={info.config.model.arch!r}: {e}"
        ) from e
    checkpoints.manager.close()
    return RestoredModel(step, info.config, model, params, tokenizer, info.tags, mesh)
