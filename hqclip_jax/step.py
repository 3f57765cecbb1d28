"""The training step: a pure function over a `TrainState`, jitted once with explicit shardings."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import lax
from jax.sharding import Mesh

from hqclip_jax import losses
from hqclip_jax.config import Config
from hqclip_jax.data.record import REPLACED
from hqclip_jax.losses import Metrics
from hqclip_jax.models.clip import CLIP, MAX_LOGIT_SCALE
from hqclip_jax.models.vision import draw_patches, patches_kept
from hqclip_jax.models.zoo import ARCHITECTURES
from hqclip_jax.sharding import (
    batch_sharding,
    gathered,
    join_rows,
    replicated,
    rows_split,
    split_rows,
    tree_shardings,
)  # fmt: skip
from hqclip_jax.signals import SAVE, SIGNALS, STOP, signal_sharding

Batch = dict[str, jax.Array]


class TrainState(NamedTuple):
    """What a step changes.

    Attributes:
        step: batches trained on or skipped, int32.
        params: f32.
        opt_state: the optimizer's moments.
        ema: moving average of the parameters, None where `optim.ema` is 0.
        skipped: updates left out because the loss or a gradient was no number, int32.
        streak: how many of them in a row, up to now, int32.
        stopped: 1 once a host has asked to stop; no step changes anything any more, int32.
        replaced: records that could not be read, by the reasons of `REPLACED`, int32 [reasons].
    """

    step: jax.Array
    params: Any
    opt_state: Any
    ema: Any
    skipped: jax.Array
    streak: jax.Array
    stopped: jax.Array
    replaced: jax.Array


def init_state(
    config: Config, vocab_size: int, num_tags: int, tx: optax.GradientTransformation, mesh: Mesh
) -> tuple[nnx.GraphDef, TrainState, TrainState, Callable[[], TrainState]]:
    """Shapes before arrays: nothing is allocated until the last value is called.

    Returns:
        the model's graph definition, the state as `ShapeDtypeStruct`s with shardings, those
        shardings, and a function that initialises the state in place on the mesh: every device
        draws its own parts, and no host or device ever holds the whole model.
    """

    def build(key: jax.Array) -> CLIP:
        return CLIP(config, vocab_size, num_tags, rngs=nnx.Rngs(key))

    graphdef, _ = nnx.split(nnx.eval_shape(lambda: build(jax.random.key(0))), nnx.Param)

    def init(key: jax.Array) -> TrainState:
        params = nnx.to_pure_dict(nnx.split(build(key), nnx.Param)[1])
        ema = jax.tree.map(jnp.copy, params) if config.optim.ema else None
        zero = jnp.zeros((), jnp.int32)
        replaced = jnp.zeros(len(REPLACED), jnp.int32)
        return TrainState(zero, params, tx.init(params), ema, zero, zero, zero, replaced)

    key = jax.random.key(config.seed)
    shapes = jax.eval_shape(init, key)
    shardings = tree_shardings(shapes, mesh)
    abstract = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
    )
    return graphdef, abstract, shardings, lambda: jax.jit(init, out_shardings=shardings)(key)


def batch_shapes(config: Config, mesh: Mesh) -> Batch:
    """What a step takes, as `ShapeDtypeStruct`s with shardings."""
    B, model, loss = config.optim.batch, config.model, config.loss
    shapes = {
        "image": ((B, model.image_size, model.image_size, 3), jnp.uint8),
        "text": ((B, model.context_length), jnp.int32),
        "text_cut": ((B,), jnp.float32),
        "replaced": ((B,), jnp.int32),
    }
    if loss.hni:
        shapes |= {
            "neg_text": ((B, model.context_length), jnp.int32),
            "neg_mask": ((B,), jnp.float32),
        }
    if loss.tag:
        shapes["tag_ids"] = ((B, config.data.max_tags), jnp.int32)
    return {
        name: jax.ShapeDtypeStruct(*shape, sharding=batch_sharding(mesh))
        for name, shape in shapes.items()
    }


def signal_shapes(mesh: Mesh) -> jax.ShapeDtypeStruct:
    """What a step takes of the hosts' signals."""
    return jax.ShapeDtypeStruct((mesh.size, SIGNALS), jnp.int32, sharding=signal_sharding(mesh))


def embed(
    model: CLIP, batch: Batch, config: Config, tag_weights_V: jax.Array | None
) -> dict[str, jax.Array]:
    """All that the losses need of the images and texts of a batch, or of a part of one.

    Returns:
        `zimg`, `ztxt` and, with HNI, `zneg` f32 [B, D]; with tags `tag_loss`, `tag_recall` and
        `tag_mask` f32 [B]. The tag logits, B × V, end here.
    """
    rows = {}
    rows["zimg"], tag_logits_BxV = model.encode_image_and_tags(batch["image"], batch.get("keep"))
    if config.loss.hni:
        # One forward for both texts. Stacked beside its positive, a negative stays on its device;
        # concatenated behind all positives, it would have to move.
        texts_Bx2xL = jnp.stack([batch["text"], batch["neg_text"]], axis=1)
        z_Bx2xD = model.encode_text(texts_Bx2xL.reshape(-1, texts_Bx2xL.shape[-1])).reshape(
            *texts_Bx2xL.shape[:2], -1
        )
        rows["ztxt"], rows["zneg"] = z_Bx2xD[:, 0], z_Bx2xD[:, 1]
    else:
        rows["ztxt"] = model.encode_text(batch["text"])
    if config.loss.tag:
        scores = losses.tag_classification(
            tag_logits_BxV, batch["tag_ids"], config.loss.tag_form, tag_weights_V
        )
        rows |= dict(zip(("tag_loss", "tag_recall", "tag_mask"), scores))
    return rows


def loss_fn(
    graphdef: nnx.GraphDef,
    params: Any,
    batch: Batch,
    config: Config,
    mesh: Mesh,
    tag_weights_V: jax.Array | None = None,
) -> tuple[jax.Array, Metrics]:
    """The weighted sum of the losses over the global batch, and what is logged of it.

    With `optim.micro_batches` the towers see a part of the batch at a time and keep nothing but
    its embeddings; the losses see all of them; and the backward pass embeds each part once more.
    So value and gradient are those of the whole batch, which averaged gradients of parts would not
    be: each image has the texts of all parts for rivals (GradCache, Gao et al. 2021).

    Args:
        batch: as `batch_shapes` has it; `keep` int32 [B, K] where patches are dropped.
    """
    parts = config.optim.micro_batches

    def rows_of(params: Any, batch: Batch) -> dict[str, jax.Array]:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            model = nnx.merge(graphdef, gathered(params, config.model.dtype))
            return jax.tree.map(rows_split, embed(model, batch, config, tag_weights_V))

    if parts == 1:
        rows = rows_of(params, batch)
    else:
        again = jax.checkpoint(rows_of, prevent_cse=False)
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            split = jax.tree.map(lambda x: split_rows(x, parts), batch)
            rows = lax.map(lambda part: again(params, part), split)
            rows = jax.tree.map(join_rows, rows)

    scale = jnp.exp(params["logit_scale"])
    own = params.get("hni_logit_scale")
    metrics = {"logit_scale": scale} | losses.image_text(
        rows["zimg"], rows["ztxt"], scale, config.loss, mesh,
        zneg_BxD=rows.get("zneg"), neg_mask_B=batch.get("neg_mask"),
        bias=params.get("logit_bias"), hni_scale=None if own is None else jnp.exp(own),
    )  # fmt: skip
    if config.loss.tag:
        metrics["loss/tag"] = losses.masked_mean(rows["tag_loss"], rows["tag_mask"])
        metrics["tag_recall"] = losses.masked_mean(rows["tag_recall"], rows["tag_mask"])
    loss = sum(
        getattr(config.loss, part) * metrics[f"loss/{part}"]
        for part in ("contrastive", "hni", "tag")
        if f"loss/{part}" in metrics
    )
    return loss, metrics | {"loss": loss}


def make_train_step(
    graphdef: nnx.GraphDef,
    tx: optax.GradientTransformation,
    config: Config,
    mesh: Mesh,
    shardings: TrainState,
    tag_weights_V: jax.Array | None = None,
) -> Callable[[TrainState, Batch, jax.Array], tuple[TrainState, Metrics]]:
    """The jitted step, of state, batch and `signals.send`. The state it is given is donated: only
    the returned one may be used. Among the metrics is `control`, a `signals.Control` as int32 [3].

    An update whose loss or gradient is no number is skipped: parameters, moments and average stay,
    and `skipped` and `streak` count it. After `optim.max_skipped` of them in a row none is made any
    more: the run has stopped, however late its host hears of it.
    """
    arch, optim = ARCHITECTURES[config.model.arch], config.optim

    def step(state: TrainState, batch: Batch, signals: jax.Array) -> tuple[TrainState, Metrics]:
        if config.model.patch_dropout:
            key = jax.random.fold_in(jax.random.key(config.seed), state.step)
            kept = patches_kept(arch, config.model.image_size, config.model.patch_dropout)
            patches = (config.model.image_size // arch.patch) ** 2
            keep_BxK = draw_patches(key, optim.batch, patches, kept)
            keep_BxK = lax.with_sharding_constraint(keep_BxK, batch_sharding(mesh))
            batch = batch | {"keep": keep_BxK}

        def of_params(params: Any) -> tuple[jax.Array, Metrics]:
            # Gradients get the parameters' sharding from it, also where they add up over parts.
            params = lax.with_sharding_constraint(params, shardings.params)
            return loss_fn(graphdef, params, batch, config, mesh, tag_weights_V)

        grads, metrics = jax.grad(of_params, has_aux=True)(state.params)
        for tower in ("visual", "text"):
            metrics[f"grad_norm/{tower}"] = optax.global_norm(grads[tower])
        metrics["grad_norm"] = optax.global_norm(grads)
        # Sums over all devices that hang on nothing: a CPU with few threads may begin them on some
        # devices, something else on the others, and wait for ever. So they wait for the gradients,
        # whose norm is never -inf (a CPU's compiler drops an `optimization_barrier`).
        late = jnp.isneginf(metrics["grad_norm"]).astype(jnp.int32)
        signals, replaced_B = signals + late, batch["replaced"] + late
        text_cut_B = batch["text_cut"] + late
        asked = signals.max(axis=0)
        stopped = jnp.maximum(state.stopped, asked[STOP])
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        for name in ("logit_scale", "hni_logit_scale"):
            if name in params:
                # OpenAI's clamp: beyond 100 training becomes unstable.
                params[name] = jnp.clip(params[name], 0, MAX_LOGIT_SCALE)
        ema = state.ema and jax.tree.map(
            lambda old, new: optim.ema * old + (1 - optim.ema) * new, state.ema, params
        )
        sound = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
        sound &= (state.streak < optim.max_skipped) & (stopped == 0)
        params, opt_state, ema = jax.tree.map(
            lambda new, old: jnp.where(sound, new, old),
            (params, opt_state, ema),
            (state.params, state.opt_state, state.ema),
        )
        # A step that is stopped was never made, whatever its batch held.
        made = 1 - stopped
        skipped = state.skipped + made * ~sound
        streak = jnp.where(sound, 0, state.streak + made)
        reasons = jnp.arange(1, len(REPLACED) + 1)
        replaced = state.replaced + made * (replaced_B == reasons[:, None]).sum(axis=1)
        metrics |= {"skipped": skipped, "streak": streak, "text_cut": text_cut_B.mean()}
        metrics |= {f"replaced/{name}": replaced[i] for i, name in enumerate(REPLACED)}
        metrics["control"] = jnp.stack([stopped, asked[SAVE], streak])
        return TrainState(
            state.step + made, params, opt_state, ema, skipped, streak, stopped, replaced
        ), metrics

    return jax.jit(
        step,
        in_shardings=(shardings, batch_sharding(mesh), signal_sharding(mesh)),
        out_shardings=(shardings, replicated(mesh)),  # without it donation is mostly lost
        donate_argnums=0,
    )
