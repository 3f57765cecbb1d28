"""A run's checkpoint as a model: found, its parameters laid out, ready to embed."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from hqclip_jax.checkpoint import FOLDER, CheckpointError, Checkpoints, RunInfo
from hqclip_jax.config import Config, MeshConfig
from hqclip_jax.data.tags import TagVocabulary
from hqclip_jax.data.tokenizer import Tokenizer, TokenizerError, tokenizer_from_json
from hqclip_jax.models.clip import CLIP
from hqclip_jax.sharding import make_mesh, tree_shardings


@dataclass(frozen=True)
class Found:
    """One finished checkpoint of some run, opened to read."""

    checkpoints: Checkpoints
    step: int
    info: RunInfo

    @property
    def path(self) -> Path:
        return self.checkpoints.directory / str(self.step)

    def tokenizer(self) -> Tokenizer:
        """The one it was trained with, at its context length.

        Raises:
            CheckpointError: this version does not know it.
        """
        try:
            return tokenizer_from_json(self.info.tokenizer, self.info.config.model.context_length)
        except TokenizerError as e:
            raise CheckpointError(f"{self.path}: {e}") from e

    def model(self, mesh: Mesh) -> tuple[nnx.GraphDef, Any]:
        """The graph definition, and the parameters as `ShapeDtypeStruct`s laid out on `mesh`."""
        config, vocab_size = self.info.config, self.tokenizer().vocab_size
        num_tags = len(self.info.tags) if self.info.tags else 0
        graphdef, shapes = nnx.split(
            nnx.eval_shape(lambda: CLIP(config, vocab_size, num_tags, rngs=nnx.Rngs(0))), nnx.Param
        )
        shapes = nnx.to_pure_dict(shapes)
        abstract = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            shapes,
            tree_shardings(shapes, mesh),
        )
        return graphdef, abstract

    def weights(self, abstract: Any, name: str) -> Any:
        """`params` or `ema`, laid out as `abstract`, and closes the checkpoint.

        Raises:
            CheckpointError: no average in it, or its arrays are not those of its architecture.
        """
        if name == "ema" and not self.info.config.optim.ema:
            raise CheckpointError(f"{self.path} has no average: optim.ema was 0")
        try:
            return self.checkpoints.restore_weights(self.step, abstract, name)
        except (ValueError, KeyError) as e:
            arch = self.info.config.model.arch
            raise CheckpointError(f"{self.path} does not fit model.arch={arch!r}: {e}") from e
        finally:
            self.checkpoints.close()


def find(workdir: str | Path, step: int | None = None) -> Found:
    """Args:
        workdir: a run's directory, its `checkpoints`, or one step in it.
        step: which checkpoint; the latest by default.

    Raises:
        CheckpointError: no finished checkpoint there, or one that this version can't read.
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
    known = checkpoints.steps()
    if not known:
        raise CheckpointError(f"{path / FOLDER} holds no finished checkpoint yet")
    if step is not None and step not in known:
        raise CheckpointError(f"{path / FOLDER} has no step {step}; it has {known}")
    step = known[-1] if step is None else step
    return Found(checkpoints, step, checkpoints.info(step))


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
    tokenizer: Tokenizer
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
        CheckpointError: no finished checkpoint there, no average in it, or one that this version
            can't read.
    """
    found = find(workdir, step)
    mesh = make_mesh(MeshConfig(), len(jax.devices()))
    graphdef, abstract = found.model(mesh)
    params = found.weights(abstract, weights)
    info = found.info
    return RestoredModel(
        found.step, info.config, graphdef, params, found.tokenizer(), info.tags, mesh
    )
