"""How a run begins: from its own checkpoint, another run's, another's parameters, or nothing.

In two parts, because between them come the data, the vocabulary and the shapes of the state:

    origin = find_origin(config, workdir)       # reads what is there; origin.stored has the tags
    start = begin(origin, config, abstract, init, tags, records)
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from hqclip_jax.checkpoint import (
    CheckpointError,
    Checkpoints,
    RunInfo,
    check_same_data,
    check_same_run,
)
from hqclip_jax.config import Config
from hqclip_jax.data.tags import TagVocabulary
from hqclip_jax.data.tokenizer import Tokenizer, make_tokenizer, with_context
from hqclip_jax.models.resample import resample_positions
from hqclip_jax.restore import Found, find
from hqclip_jax.step import TrainState

log = logging.getLogger(__name__)

# What a loss adds to the model: fresh where the other run had none, or one for other tags.
LOSS_PARAMETERS = ("tag_head", "logit_bias", "hni_logit_scale")
POSITIONS = ("visual/positional_embedding", "text/positional_embedding")


@dataclass(frozen=True)
class Origin:
    """Where a run begins.

    Attributes:
        how: "own" checkpoint, "resume" of another run, "init" with its parameters, or "scratch".
        found: the checkpoint; None for "scratch".
    """

    how: str
    found: Found | None = None

    @property
    def stored(self) -> RunInfo | None:
        """Of the run that goes on; None where a new one begins. Its vocabulary stays, for the
        data set's counts may have changed since."""
        return self.found.info if self.found and self.how in ("own", "resume") else None

    def tokenizer(self, config: Config) -> Tokenizer:
        """The other run's, whose vocabulary its token embedding was made for; the configuration's
        where there is none.

        Raises:
            CheckpointError: `data.vocab` is another vocabulary.
            TokenizerError: `data.vocab` can't be read.
        """
        length = config.model.context_length
        if self.found is None:
            return make_tokenizer(config.data.vocab, length)
        stored = with_context(self.found.tokenizer(), length)
        if config.data.vocab and make_tokenizer(config.data.vocab, length) != stored:
            raise CheckpointError(
                f"data.vocab={config.data.vocab!r} is not the vocabulary that {self.found.path} "
                "was trained with: leave data.vocab empty, and its own is taken"
            )
        return stored


@dataclass(frozen=True)
class Start:
    """What the first step is given.

    Attributes:
        state: on the mesh.
        step: steps done already; 0 where a new run begins.
        info: of the run that goes on, with its data position and timers; None where one begins.
        how: as in `Origin`.
    """

    state: TrainState
    step: int
    info: RunInfo | None
    how: str


def find_origin(config: Config, workdir: str | Path) -> Origin:
    """The workdir's own latest checkpoint comes first, so that a run that was told `resume_from` or
    `init_from` goes on with itself when it is started again.

    Raises:
        CheckpointError: `resume_from` or `init_from` holds no checkpoint that can be read.
    """
    own = Checkpoints(workdir, read_only=True)
    if (latest := own.latest()) is not None:
        return Origin("own", Found(own, latest, own.info(latest)))
    own.close()
    if config.resume_from:
        return Origin("resume", find(config.resume_from))
    if config.init_from:
        return Origin("init", find(config.init_from))
    return Origin("scratch")


def begin(
    origin: Origin,
    config: Config,
    abstract: TrainState,
    init: Callable[[], TrainState],
    tags: TagVocabulary | None,
    records: Mapping[str, int],
) -> Start:
    """The state to train, and where the run is; says in the log what it did.

    Args:
        abstract: the state as `ShapeDtypeStruct`s with shardings.
        init: a fresh state on the mesh.
        tags: the tag head's vocabulary, `origin.stored.tags` where a run goes on.
        records: size of each data source.

    Raises:
        CheckpointError: the run that should go on is another one or its data have changed, or the
            parameters to begin with are not those of this architecture.
    """
    found, how = origin.found, origin.how
    if found is None:
        log.info("starting from scratch")
        return Start(init(), 0, None, how)
    if how == "init":
        return Start(_with_parameters(found, config, abstract, init, tags), 0, None, how)
    instead = "another --workdir" if how == "own" else "init_from, which takes its parameters only"
    check_same_run(found.info, config, len(tags) if tags else 0, found.path, instead)
    check_same_data(found.info, records, found.path)
    state = found.checkpoints.restore(found.step, abstract)
    found.checkpoints.close()
    log.info("continuing from step %d of %s", found.step, found.path.parent)
    if how == "own" and (other := config.resume_from or config.init_from):
        log.info("%s is not read again: the workdir has a checkpoint of its own", other)
    return Start(state, found.step, found.info, how)


def _with_parameters(
    found: Found,
    config: Config,
    abstract: TrainState,
    init: Callable[[], TrainState],
    tags: TagVocabulary | None,
) -> TrainState:
    """A fresh state whose parameters are another run's: their average, where it has one, which is
    what one would evaluate, and so build on."""
    mesh = jax.tree.leaves(abstract.params)[0].sharding.mesh
    _, stored = found.model(mesh)
    wanted, theirs = _by_name(abstract.params), _by_name(stored)
    fresh = _fresh(found, config, tags, wanted, theirs)
    _check_same_architecture(found, config, wanted, theirs)
    weights = "ema" if found.info.config.optim.ema else "params"
    model = config.model
    params = resample_positions(
        found.weights(stored, weights), model.arch, model.image_size, model.context_length
    )
    state = init()
    state = state._replace(params=_merged(state.params, _by_name(params), fresh))
    if state.ema is not None:
        # An array of its own: the step donates both.
        state = state._replace(ema=jax.tree.map(lambda x: x.copy(), state.params))
    changed = [n for n in POSITIONS if wanted[n].shape != theirs[n].shape]
    log.info("starting with the %s of step %d of %s%s%s",
             "average" if weights == "ema" else "parameters", found.step, found.path.parent,
             f"; resampled: {', '.join(changed)}" if changed else "",
             f"; fresh: {', '.join(sorted(fresh))}" if fresh else "")  # fmt: skip
    return state


def _by_name(tree: Any) -> dict[str, Any]:
    """Leaves by their path, as `text/blocks/qkv/kernel`."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in leaves}


def _fresh(
    found: Found, config: Config, tags: TagVocabulary | None, wanted: dict, theirs: dict
) -> set[str]:
    """Names of the parameters that a loss adds and the other run has not, or for other tags."""
    head = found.info.tags and tags and found.info.tags.tags == tags.tags
    head = head and found.info.config.loss.tag_input == config.loss.tag_input
    return {
        name
        for name in wanted
        if name.startswith(LOSS_PARAMETERS)
        and (name not in theirs or (name.startswith("tag_head") and not head))
    }


def _check_same_architecture(found: Found, config: Config, wanted: dict, theirs: dict) -> None:
    """Raises:
    CheckpointError: names up to five parameters, with both shapes.
    """
    lines = []
    for name in sorted(wanted.keys() | theirs.keys()):
        if name.startswith(LOSS_PARAMETERS):
            continue
        there, here = (tuple(t[name].shape) if name in t else None for t in (theirs, wanted))
        rows = slice(1, None) if name in POSITIONS and there and here else slice(None)
        if there is None or here is None or there[rows] != here[rows]:
            lines.append(f"{name} is {there or 'missing'} there, {here or 'missing'} here")
    stored = found.info.config.model
    if stored.act != config.model.act:
        lines.insert(0, f"model.act is {stored.act!r} there, {config.model.act!r} here")
    if lines:
        more = f" and {len(lines) - 5} more" if len(lines) > 5 else ""
        raise CheckpointError(
            f"init_from={config.init_from!r} is a {stored.arch}, which does not fit model.arch="
            f"{config.model.arch!r}: {'; '.join(lines[:5])}{more}. Only image size, text length "
            "and tags may be others"
        )


def _merged(own: Any, taken: dict[str, Any], fresh: set[str]) -> Any:
    """`own` with the parameters that are not fresh replaced, laid out as they were."""

    def of(path: tuple, x: jax.Array) -> jax.Array:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return x if name in fresh else jax.device_put(taken[name], x.sharding)

    return jax.tree_util.tree_map_with_path(of, own)
