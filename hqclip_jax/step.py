"""The training step: a pure function over a `TrainState`, jitted once with explicit shardings."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from hqclip_jax import losses
from hqclip_jax.config import Config, LossConfig
from hqclip_jax.models.clip import CLIP, MAX_LOGIT_SCALE
from hqclip_jax.sharding import BATCH_AXES, P, batch_sharding, replicated, tree_shardings

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


class TrainState(NamedTuple):
    """What a step changes: steps done, parameters (f32) and the optimizer's moments."""

    step: jax.Array
    params: Any
    opt_state: Any


def init_state(
    config: Config, vocab_size: int, num_tags: int, tx: optax.GradientTransformation, mesh: Mesh
) -> tuple[nnx.GraphDef, TrainState, Any, Callable[[], TrainState]]:
    """Shapes before arrays: nothing is allocated until the last value is called.

    Returns:
        the model's graph definition, the state as `ShapeDtypeStruct`s with shardings, those
        shardings, and a function that initialises the state in place on the mesh.
    """

    def build(key: jax.Array) -> CLIP:
        return CLIP(config, vocab_size, num_tags, rngs=nnx.Rngs(key))

    graphdef, _ = nnx.split(nnx.eval_shape(lambda: build(jax.random.key(0))), nnx.Param)

    def init(key: jax.Array) -> TrainState:
        params = nnx.to_pure_dict(nnx.split(build(key), nnx.Param)[1])
        return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params))

    key = jax.random.key(config.seed)
    shapes = jax.eval_shape(init, key)
    shardings = tree_shardings(shapes, mesh)
    abstract = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
    )
    return graphdef, abstract, shardings, lambda: jax.jit(init, out_shardings=shardings)(key)


def loss_fn(
    model: CLIP, batch: Batch, config: LossConfig, mesh: Mesh, tag_weights_V: jax.Array | None
) -> tuple[jax.Array, Metrics]:
    """The weighted sum of the losses over the global batch, and what is logged of it.

    Args:
        batch: `image` uint8 [B, H, W, 3] and `text` int32 [B, L]; with HNI `neg_text` int32 [B, L]
            and `neg_mask` [B]; with tags `tag_ids` int32 [B, T].
    """
    scale = jnp.exp(model.logit_scale[...])
    zimg_BxD, tag_logits_BxV = model.encode_image_and_tags(batch["image"])
    metrics: Metrics = {"logit_scale": scale}
    if config.hni:
        # One forward for both texts. Stacked beside its positive, a negative stays on its device;
        # concatenated behind all positives, it would have to move.
        texts_Bx2xL = jnp.stack([batch["text"], batch["neg_text"]], axis=1)
        z_Bx2xD = model.encode_text(texts_Bx2xL.reshape(-1, texts_Bx2xL.shape[-1])).reshape(
            *texts_Bx2xL.shape[:2], -1
        )
        ztxt_BxD, zneg_BxD = z_Bx2xD[:, 0], z_Bx2xD[:, 1]
        metrics["loss/hni"], metrics["hni_accuracy"] = losses.hni(
            zimg_BxD, ztxt_BxD, zneg_BxD, batch["neg_mask"], scale
        )
        metrics["neg_share"] = jnp.mean(batch["neg_mask"].astype(jnp.float32))
    else:
        ztxt_BxD = model.encode_text(batch["text"])
    if config.contrastive:
        sharded = jax.shard_map(
            lambda zimg, ztxt, scale: losses.contrastive(zimg, ztxt, scale, BATCH_AXES),
            mesh=mesh,
            in_specs=(P(BATCH_AXES), P(BATCH_AXES), P()),
            out_specs=(P(), P()),
        )
        metrics["loss/contrastive"], metrics["accuracy"] = sharded(zimg_BxD, ztxt_BxD, scale)
    if config.tag:
        metrics["loss/tag"], metrics["tag_recall"] = losses.tag_classification(
            tag_logits_BxV, batch["tag_ids"], config.tag_form, tag_weights_V
        )
    loss = sum(
        weight * metrics[f"loss/{part}"]
        for part, weight in vars(config).items()
        if f"loss/{part}" in metrics
    )
    return loss, metrics | {"loss": loss}


def make_train_step(
    graphdef: nnx.GraphDef,
    tx: optax.GradientTransformation,
    config: Config,
    mesh: Mesh,
    shardings: Any,
    tag_weights_V: jax.Array | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The jitted step. The state it is given is donated: only the returned one may be used."""

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        def of_params(params: Any) -> tuple[jax.Array, Metrics]:
            model = nnx.merge(graphdef, params)
            return loss_fn(model, batch, config.loss, mesh, tag_weights_V)

        grads, metrics = jax.grad(of_params, has_aux=True)(state.params)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        # OpenAI's clamp: beyond 100 training becomes unstable.
        params["logit_scale"] = jnp.clip(params["logit_scale"], 0, MAX_LOGIT_SCALE)
        for tower in ("visual", "text"):
            metrics[f"grad_norm/{tower}"] = optax.global_norm(grads[tower])
        return TrainState(state.step + 1, params, opt_state), metrics

    return jax.jit(
        step,
        in_shardings=(shardings, batch_sharding(mesh)),
        out_shardings=(shardings, replicated(mesh)),  # without it donation is mostly lost
        donate_argnums=0,
    )
